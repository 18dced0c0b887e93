"""The graph of a function as MLX traces it, with shapes and dtypes, without running the function."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from nalora_mlx.ops.custom_function import Gradient, custom_function, tracing_custom_functions


class Array(NamedTuple):
    """An array of a graph, known by its name."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Size of its elements in bytes."""
        return math.prod(self.shape) * self.dtype.size


class Operation(NamedTuple):
    """One operation of a graph: an MLX primitive such as Matmul, with arguments such as axes."""

    kind: str
    arguments: tuple[Any, ...]
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]


@dataclass(frozen=True)
class TracedGraph:
    """A graph of operations, as it is before mx.compile fuses elementwise operations.

    Attributes:
        operations: each after those that compute its inputs.
        inputs: the arguments of the function.
        constants: all other arrays that it uses, such as weights.
        outputs: what it returns, flattened.
    """

    operations: tuple[Operation, ...]
    inputs: tuple[Array, ...]
    constants: tuple[Array, ...]
    outputs: tuple[Array, ...]


def trace_graph(function: Callable[..., Any], *arguments: mx.array) -> TracedGraph:
    """Trace a function that returns a tree of arrays. Nothing is executed.

    Functions compiled with mx.compile appear as the operations that they consist of. So do functions with a gradient of
    their own, `ops.custom_function`. What the function changes outside, such as a model's parameters, must be restored
    by the caller.

    Raises:
        ValueError: the graph has an operation that MLX does not export.
    """
    records: list[dict[str, Any]] = []
    markers = _Markers()
    count = 0

    def flat(*arrays: mx.array) -> list[mx.array]:
        nonlocal count
        found = [leaf for _, leaf in tree_flatten(function(*arrays)) if isinstance(leaf, mx.array)]
        count = len(found)
        return found + markers.gradients

    enabled = "MLX_DISABLE_COMPILE" not in os.environ
    mx.disable_compile()  # graphs that were compiled before hold custom functions
    try:
        with (
            tracing_custom_functions(markers.call),
            _patched("contiguous", markers.contiguous),
            _patched("segmented_mm", _segmented_mm),
            _patched("gather_mm", _gather_mm),
        ):
            mx.export_function(records.append, flat, *arguments)
    finally:
        if enabled:
            mx.enable_compile()
    return markers.replace(records, count)


def _segmented_mm(a: mx.array, b: mx.array, segments: mx.array, **_: Any) -> mx.array:
    """Return an array like that of mx.segmented_mm, which MLX does not export."""
    return _array_from((*segments.shape[:-1], a.shape[-2], b.shape[-1]), a.dtype, [a, b, segments])


_mlx_gather_mm = mx.gather_mm


def _gather_mm(a: mx.array, b: mx.array, *indices: Any, **options: Any) -> mx.array:
    """Compute mx.gather_mm with a gradient of b that MLX exports; MLX computes it by segmented_mm."""
    function = custom_function(lambda a, b: _mlx_gather_mm(a, b, *indices, **options))

    @function.vjp
    def _(primals, d, _output):
        a, b = primals
        da = mx.vjp(lambda a: _mlx_gather_mm(a, b, *indices, **options), [a], [d])[1][0]
        return da, _array_from(b.shape, b.dtype, [a, d])

    return function(a, b)


def _array_from(shape: Sequence[int], dtype: mx.Dtype, sources: list[mx.array]) -> mx.array:
    """Return an array that exists only once the sources are computed."""
    return mx.depends([mx.zeros(shape, dtype)], sources)[0]


@contextmanager
def _patched(name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(mx, name)
    setattr(mx, name, function)
    try:
        yield
    finally:
        setattr(mx, name, original)


# --- functions with a gradient of their own ---------------------------------------------------------------------------
#
# MLX does not export its primitive for them. Each call is traced as follows:
#
# 1. Compute the outputs from the arguments with gradients stopped.
# 2. Multiply each argument and each output by a constant of its own, a marker, and connect arguments and outputs by a
#    sum. MLX's gradient then multiplies the gradient of an output, and that of an argument, by the same markers, which
#    shows where these gradients are in the graph.
# 3. Compute the function's own gradients of the arguments, from placeholders for the gradients of the outputs.
# 4. In the exported graph, connect the placeholders with the gradients of the outputs, and use the function's own
#    gradients in place of MLX's. Then the multiplications, which nothing uses, are dropped.

_FIRST_MARKER = -(2.0**20) - 0.5  # no model has such constants
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass
class _Markers:
    """The calls of custom functions in a trace."""

    count: int = 0
    outputs: list[tuple[int, int]] = field(
        default_factory=list
    )  # marker of an output, that of its placeholder
    arguments: list[int] = field(default_factory=list)  # markers of arguments, in the order of `gradients`
    gradients: list[mx.array] = field(default_factory=list)
    copies: set[int] = field(default_factory=set)

    def call(self, function: Callable[..., Any], gradient: Gradient, arrays: Sequence[mx.array]) -> Any:
        """Trace a call of a custom function."""
        stopped = [mx.stop_gradient(array) for array in arrays]
        result = function(*stopped)
        single = isinstance(result, mx.array)
        outputs = [mx.stop_gradient(output) for output in ([result] if single else result)]
        link, marked = mx.array(0.0), []
        for array in arrays:
            number, marker = self._marker()
            marked.append(number)
            if array.dtype in _FLOATS:
                link = link + mx.sum((array * marker.astype(array.dtype)).astype(mx.float32))
        linked, cotangents = [], []
        for output in outputs:
            number, marker = self._marker()
            placeholder_number, placeholder = self._marker()
            cotangents.append(mx.broadcast_to(placeholder.astype(output.dtype), output.shape))
            if output.dtype in _FLOATS:
                self.outputs.append((number, placeholder_number))
                linked.append((output + link.astype(output.dtype)) * marker.astype(output.dtype))
            else:
                linked.append(output)
        primals = stopped[0] if len(stopped) == 1 else tuple(stopped)
        found = gradient(primals, cotangents[0] if single else cotangents, outputs[0] if single else outputs)
        for number, array in zip(marked, [found] if isinstance(found, mx.array) else found, strict=True):
            if isinstance(array, mx.array):
                self.arguments.append(number)
                self.gradients.append(array)
        return linked[0] if single else type(result)(linked)

    def contiguous(self, array: mx.array, *_: Any, **__: Any) -> mx.array:
        """Trace mx.contiguous, which MLX does not export either, as a product with a marker."""
        number, marker = self._marker()
        self.copies.add(number)
        return array * marker.astype(array.dtype)

    def _marker(self) -> tuple[int, mx.array]:
        self.count += 1
        return self.count, mx.array(_FIRST_MARKER - self.count)

    def replace(self, records: Iterable[dict[str, Any]], count: int) -> TracedGraph:
        """Return the graph that MLX exported, with gradients in their places.

        Args:
            records: what mx.export_function returned.
            count: the number of outputs without the gradients of custom functions.
        """
        lists: dict[str, list[Any]] = {"inputs": [], "outputs": [], "constants": []}
        arrays = dict[str, Array]()

        def array(record: tuple[Any, ...]) -> Array:
            found = arrays.get(record[0])
            if found is None:
                found = arrays[record[0]] = Array(*record)
            return found

        operations, marker_of = [], dict[str, int]()
        for record in records:
            if record["type"] == "primitive":
                inputs, outputs = tuple(map(array, record["inputs"])), tuple(map(array, record["outputs"]))
                operations.append(Operation(record["name"], tuple(record["arguments"]), inputs, outputs))
            elif record["type"] in lists:
                lists[record["type"]] = record[record["type"]]
        for name, constant in lists["constants"]:
            if constant.ndim == 0 and constant.dtype == mx.float32:
                number = _FIRST_MARKER - constant.item()
                if 0 < number <= self.count:
                    marker_of[name] = round(number)
        constants = tuple(Array(name, a.shape, a.dtype) for name, a in lists["constants"])
        inputs, outputs = (tuple(Array(*a) for a in lists[name]) for name in ("inputs", "outputs"))
        renamed = self._renamed(operations, marker_of, outputs[count:])
        return _connected(operations, inputs, constants, outputs[:count], renamed)

    def _renamed(
        self, operations: list[Operation], marker_of: dict[str, int], gradients: Sequence[Array]
    ) -> dict[str, Array]:
        """Return the arrays to use in place of others, by name."""
        forward, backward = dict[int, Operation](), dict[int, Operation]()
        producer = {array.name: operation for operation in operations for array in operation.outputs}
        placeholders = dict[int, list[str]]()
        for i, operation in enumerate(operations):
            found = [marker_of.get(array.name) for array in operation.inputs]
            if operation.kind in ("AsType", "Broadcast") and found[0] is not None:
                marker_of[operation.outputs[0].name] = found[0]
            elif operation.kind == "Multiply" and found[1] is not None:
                forward[found[1]] = operation
                if found[1] in self.copies:
                    operations[i] = Operation("Contiguous", (), operation.inputs[:1], operation.outputs)
            elif operation.kind == "Multiply" and found[0] is not None:
                backward[found[0]] = operation
        for name, number in marker_of.items():
            placeholders.setdefault(number, []).append(name)
        renamed = {
            operation.outputs[0].name: operation.inputs[1]
            for number, operation in backward.items()
            if number in self.copies
        }
        for number, placeholder in self.outputs:
            if number in forward:
                total = producer[forward[number].inputs[0].name]
                renamed[forward[number].outputs[0].name] = total.inputs[0]
            if number in backward:
                for name in placeholders.get(placeholder, []):
                    renamed[name] = backward[number].inputs[1]
        for number, gradient in zip(self.arguments, gradients, strict=True):
            if number in backward:
                renamed[backward[number].outputs[0].name] = gradient
        return renamed


def _connected(
    operations: Sequence[Operation],
    arguments: tuple[Array, ...],
    constants: tuple[Array, ...],
    outputs: tuple[Array, ...],
    renamed: dict[str, Array],
) -> TracedGraph:
    """Return the graph of what the outputs depend on, with arrays renamed."""

    def final(array: Array) -> Array:
        while array.name in renamed:
            array = renamed[array.name]
        return array

    producer = {array.name: i for i, operation in enumerate(operations) for array in operation.outputs}
    inputs = [tuple(final(array) for array in operation.inputs) for operation in operations]
    outputs = tuple(final(array) for array in outputs)
    ordered, seen = list[int](), set[int]()
    for output in outputs:
        stack = [(producer[output.name], 0)] if output.name in producer else []
        while stack:  # depth first; a recursion would be too deep
            index, at = stack.pop()
            if at == 0 and index in seen:
                continue
            seen.add(index)
            if at == len(inputs[index]):
                ordered.append(index)
                continue
            stack.append((index, at + 1))
            source = producer.get(inputs[index][at].name)
            if source is not None and source not in seen:
                stack.append((source, 0))
    used = {array.name for i in ordered for array in inputs[i]} | {array.name for array in outputs}
    kept = tuple(operations[i]._replace(inputs=inputs[i]) for i in ordered)
    return TracedGraph(kept, arguments, tuple(a for a in constants if a.name in used), outputs)
