"""Traced graphs: gradients of custom functions are in their places, and the simulated memory is that of MLX's rules."""

import gc
import math

import mlx.core as mx
import numpy as np
import pytest

from nalora_mlx.ops.custom_function import checkpoint, custom_function, tracing_custom_functions
from nalora_mlx.training import graph_memory
from nalora_mlx.training.graph_memory import (
    MAX_TASKS,
    TASK_SIZES,
    TaskSize,
    evaluation_order,
    fused,
    peak_bytes,
)
from nalora_mlx.training.traced_graph import Array, trace_graph

SIZE = 256 * 256 * 4  # bytes of a matrix
MATRIX, WEIGHT = mx.zeros((256, 256)), mx.ones((256, 256))
mx.eval(MATRIX, WEIGHT)
ONE_BY_ONE = TaskSize(1, math.inf)


def kinds(graph):
    return [operation.kind for operation in graph.operations]


def assert_closed(graph):
    """Assert that each operation comes after those that compute its inputs, and that nothing else is used."""
    known = {array.name for array in graph.inputs + graph.constants}
    for operation in graph.operations:
        assert known.issuperset(array.name for array in operation.inputs), operation
        known.update(array.name for array in operation.outputs)
    assert known.issuperset(array.name for array in graph.outputs)


@custom_function
def function(x, y):
    return [mx.exp(x) @ y, mx.sin(x)]


@function.vjp
def _(primals, cotangents, outputs):
    x, y = primals
    dproduct, dsine = cotangents
    return mx.cos(x) * dsine + mx.tanh(dproduct @ y.T), mx.sum(outputs[1]) * mx.ones_like(y)


def test_the_graph_of_a_function():
    weight = mx.array(np.ones((4, 2), np.float16))
    graph = trace_graph(lambda x: {"y": [x @ weight, x]}, mx.zeros((3, 4), mx.float16))
    assert kinds(graph) == ["Matmul"]
    (x,), (w,) = graph.inputs, graph.constants
    assert (x.shape, w.shape, w.nbytes) == ((3, 4), (4, 2), 16)
    assert graph.operations[0].inputs == (x, w)
    assert graph.outputs == (*graph.operations[0].outputs, x)


def test_the_gradient_of_a_custom_function_is_its_own():
    """The graph has the operations of the function and of its gradient, each once, and no trace of the markers."""

    def loss(x, y):
        product, sine = function(mx.sigmoid(x), y)
        return product.sum() + mx.sqrt(sine).sum()

    graph = trace_graph(mx.value_and_grad(loss), mx.ones((3, 4)), mx.ones((4, 5)))
    assert_closed(graph)
    found = kinds(graph)
    assert {kind: found.count(kind) for kind in ("Exp", "Sin", "Cos", "Tanh", "Matmul")} == {
        "Exp": 1,
        "Sin": 1,
        "Cos": 1,
        "Tanh": 1,
        "Matmul": 2,
    }
    tanh, cos, sine = (next(o for o in graph.operations if o.kind == kind) for kind in ("Tanh", "Cos", "Sin"))
    assert cos.inputs == sine.inputs  # both of the function's argument
    producer = {array: operation for operation in graph.operations for array in operation.outputs}
    product = producer[tanh.inputs[0]]
    assert product.kind == "Matmul"
    assert producer[product.inputs[0]].kind == "Broadcast"  # the gradient of a sum
    assert all(abs(a.nbytes) < 1e6 and isinstance(a, Array) for a in graph.constants)


def test_only_the_gradients_that_are_needed_are_in_the_graph():
    def loss(x, y):
        return function(x, y)[1].sum()

    found = kinds(trace_graph(mx.grad(loss, argnums=0), mx.ones((3, 4)), mx.ones((4, 5))))
    assert "Cos" in found
    assert "Sin" not in found


def test_nested_custom_functions():
    @custom_function
    def outer(x):
        return function(x, x)[1] * 2

    @outer.vjp
    def _(x, d, y):
        return mx.grad(lambda x: (function(x, x)[0] * d).sum())(x) + y

    graph = trace_graph(mx.grad(lambda x: outer(x).sum()), mx.ones((4, 4)))
    assert_closed(graph)
    assert kinds(graph).count("Tanh") == 1
    assert kinds(graph).count("Sin") == 1  # MLX merges those of the forward and the gradient


def test_tracing_leaves_everything_as_it_was():
    contiguous, compiled = mx.contiguous, mx.compile(lambda x: mx.exp(x) + 1)
    graph = trace_graph(lambda x: mx.contiguous(compiled(x).T).sum(), MATRIX)
    assert "Contiguous" in kinds(graph)
    assert "Exp" in kinds(graph)
    assert mx.contiguous is contiguous
    assert function(mx.zeros((2, 2)), mx.ones((2, 2)))[1].tolist() == [[0, 0], [0, 0]]


def test_the_gradient_of_contiguous_is_in_the_graph():
    graph = trace_graph(mx.grad(lambda x: mx.exp(mx.contiguous(x.T)).sum()), MATRIX)
    assert_closed(graph)
    assert kinds(graph).count("Contiguous") == 1
    assert kinds(graph).count("Multiply") == 1  # of the gradient of exp


def test_an_unknown_operation_raises():
    other = mx.custom_function(mx.exp)
    other.vjp(lambda x, d, y: d)
    with pytest.raises(ValueError, match="CustomTransforms"):
        trace_graph(other, MATRIX)


def test_checkpointed_functions_keep_their_gradients():
    """With custom functions replaced as in a trace, but run."""

    def as_mlx(function, gradient, arrays):
        replaced = mx.custom_function(function)
        replaced.vjp(gradient)
        return replaced(*arrays)

    def block(parameters, x, *, scale):
        hidden = mx.tanh(x @ parameters["w"][0]) * scale
        return hidden, [hidden.sum(axis=0)]

    def loss(w, x, form):
        y, (total,) = form(block)({"w": [w]}, x, scale=2.0)
        return (y**2).sum() + total.max()

    w, x = mx.random.normal((4, 4), key=mx.random.key(0)), mx.random.normal((3, 4), key=mx.random.key(1))
    with tracing_custom_functions(as_mlx):
        found = mx.grad(loss, argnums=[0, 1])(w, x, checkpoint)
    expected = mx.grad(loss, argnums=[0, 1])(w, x, lambda block: block)
    for gradient, truth in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(gradient), np.array(truth), rtol=1e-6)


# --- memory -----------------------------------------------------------------------------------------------------------


def products(count):
    def chain(x):
        for _ in range(count):
            x = x @ WEIGHT
        return x

    return trace_graph(chain, MATRIX)


@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_chain_of_products(count):
    """At most `MAX_TASKS` tasks are unfinished, so as many products are live, and the input of the first of them."""
    graph = products(count)
    assert peak_bytes(graph, ONE_BY_ONE) == min(count, MAX_TASKS + 1) * SIZE
    assert peak_bytes(graph, TaskSize(5, math.inf)) == min(count, 5 * MAX_TASKS + 5) * SIZE
    assert peak_bytes(graph, TaskSize(50, 1)) == min(count, MAX_TASKS + 1) * SIZE


def test_views_take_no_memory_and_keep_their_source():
    graph = trace_graph(lambda x: (x @ WEIGHT).reshape(128, 512).T[:4], MATRIX)
    assert peak_bytes(graph, ONE_BY_ONE) == SIZE
    # The product stays until its view is read, after 20 products that would have freed it.
    graph = trace_graph(lambda x: products_of(x) @ mx.split(x @ WEIGHT, 2)[0].T, MATRIX)
    assert peak_bytes(graph, ONE_BY_ONE) >= (MAX_TASKS + 1) * SIZE


def products_of(x):
    for _ in range(20):
        x = x @ WEIGHT
    return x


def test_a_reshape_of_a_transposed_array_copies():
    graph = trace_graph(lambda x: (x @ WEIGHT).T.reshape(-1), MATRIX)
    assert peak_bytes(graph, ONE_BY_ONE) == 2 * SIZE


def test_elementwise_operations_are_fused():
    """One loop with one output; but an array that something else reads is computed by itself."""
    graph = trace_graph(lambda x: mx.exp(mx.sin(x) * 2 + x), MATRIX)
    assert kinds(fused(graph)) == ["Compiled"]
    assert peak_bytes(graph, ONE_BY_ONE) == SIZE

    def shared(x):
        y = mx.sin(x)
        return mx.exp(y) + (y @ WEIGHT)

    assert sorted(kinds(fused(trace_graph(shared, MATRIX)))) == ["Compiled", "Matmul", "Sin"]
    deep = trace_graph(lambda x: mx.sin(mx.sin(mx.sin(x)) ** 1.5), MATRIX)
    assert len(fused(deep).operations) == 1


def test_the_order_of_evaluation():
    """An operation runs after all that it reads, and each once."""
    graph = trace_graph(mx.grad(lambda x: (mx.tanh(x @ WEIGHT) @ x).sum()), MATRIX)
    order = evaluation_order(graph)
    assert sorted(map(id, order)) == sorted(map(id, graph.operations))
    computed = {array.name for array in graph.inputs + graph.constants}
    for operation in order:
        assert computed.issuperset(array.name for array in operation.inputs)
        computed.update(array.name for array in operation.outputs)


@pytest.fixture
def one_task_in_flight(monkeypatch):
    """Make MLX, and the simulation, finish each task before the next one begins."""
    monkeypatch.setattr(graph_memory, "MAX_TASKS", 1)
    before = mx.set_memory_limit(1)
    yield
    mx.set_memory_limit(before)


def network(x):
    layers = [x]
    for _ in range(6):
        layers.append(mx.tanh(layers[-1] @ WEIGHT) * 2)
    return mx.grad(lambda x: sum((layer @ x).sum() for layer in layers))(x), layers[-1]


def branches(x):
    parts = [mx.softmax(x @ WEIGHT * i, axis=-1) for i in range(1, 30)]
    return sum(part.T @ x for part in parts)


def attend(x):
    heads = (x @ WEIGHT).reshape(256, 4, 64).swapaxes(0, 1)
    return mx.value_and_grad(lambda x: (mx.softmax(x @ heads.swapaxes(1, 2)) @ heads).sum())(heads)


@pytest.mark.parametrize("function", [network, branches, attend])
def test_the_peak_is_that_of_a_real_evaluation(one_task_in_flight, function):
    """Between the simulation's peaks with tasks of one operation and of five; MLX may also write to inputs' buffers."""
    graph, x = trace_graph(function, MATRIX), mx.random.normal((256, 256))
    mx.eval(x)
    compiled = mx.compile(function)
    mx.synchronize()
    gc.collect()  # arrays of earlier tests that wait for the garbage collector
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(compiled(x))
    measured = mx.get_peak_memory() - before
    assert peak_bytes(graph, ONE_BY_ONE) <= measured <= 1.01 * peak_bytes(graph, TASK_SIZES["cpu"])
