"""The predicted cost of training steps: fusion as MLX does it, launches, bytes and floating-point operations."""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from nalora_mlx.training.traced_graph import trace_graph

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import step_cost  # noqa: E402
from compiled_graph import VIEWS  # noqa: E402
from step_cost_fusion import FUSED, fuse  # noqa: E402
from step_cost_model import CHIPS, Cost, Efficiency, Total, operation_costs, total_cost  # noqa: E402
from step_cost_trace import MEASURED, NA_LORA, PAPER, THEIRS, TRAINERS, Step, trace_step  # noqa: E402

TINY = Step(THEIRS, "tiny", 2, 64)


def compiled_kinds(function, *arrays):
    """Return the operations of the graph that mx.compile makes of a function, by kind."""
    outputs = [a for _, a in tree_flatten(mx.compile(function)(*arrays))]
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, *outputs)
        return Counter(re.findall(r"\{ \d+ \[label =\"([^\"]*)\"", Path(file.name).read_text()))


def fused_names(function, *arrays):
    """Return the same as predicted, with MLX's names."""
    names = Counter()
    for operation in fuse(trace_graph(function, *arrays)):
        parts = "".join(part.kind for part in operation.arguments) if operation.kind == FUSED else ""
        names["Compiled" + parts if parts else operation.kind] += 1
    return names


def chain(x):
    """More elementwise operations than one kernel takes, with a value that is read twice."""
    y = mx.exp(x)
    for _ in range(13):
        y = mx.sin(y) * 2
    return y + mx.cos(y).T


def reductions(x):
    return mx.softmax(x * 2 + 1) @ mx.abs(x.T - mx.max(x, axis=0, keepdims=True).T)


def broadcasts(x):
    row = mx.exp(x[:1] * 3)
    return (x - row) * row + mx.where(x > row, x, 0), row + 1


def many_inputs(x):
    """A tree of sums with more inputs than one kernel takes."""
    values = [mx.abs(x[i] @ x) for i in range(32)]
    while len(values) > 1:
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


@pytest.mark.parametrize("function", [chain, reductions, broadcasts, many_inputs])
def test_fusion_is_that_of_mlx(function):
    x = mx.random.normal((32, 32))
    mx.eval(x)
    expected = compiled_kinds(function, x)
    rename = {"Max": "Reduce", "Sum": "Reduce"}
    grouped = Counter()
    for kind, count in expected.items():
        grouped[rename.get(kind, kind)] += count
    assert fused_names(function, x) == grouped


def training_step():
    """Return a small model's training step, all of its state, and inputs."""
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.RMSNorm(32), nn.Linear(32, 8))
    optimizer = optim.Adam(1e-3)
    x, y = mx.random.normal((4, 16)), mx.random.normal((4, 8))
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    mx.eval(state, x, y)

    def step(x, y):
        loss, gradients = nn.value_and_grad(model, lambda x, y: nn.losses.mse_loss(model(x), y))(x, y)
        optimizer.update(model, gradients)
        return loss

    return step, state, (x, y)


def test_fusion_of_a_training_step_is_that_of_mlx():
    step, state, arrays = training_step()
    compiled = partial(mx.compile, inputs=state, outputs=state)(step)
    outputs = [compiled(*arrays), *(a for _, a in tree_flatten(state) if isinstance(a, mx.array))]
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, *outputs)
        kinds = re.findall(r"\{ \d+ \[label =\"([^\"]*)\"", Path(file.name).read_text())
    step, state, arrays = training_step()
    graph = trace_graph(lambda *arrays: [step(*arrays), state], *arrays)
    expected = sum(kind not in VIEWS for kind in kinds)
    found = sum(operation.kind not in VIEWS for operation in fuse(graph))
    assert abs(found - expected) <= 0.02 * expected


def costs_of(function, *arrays):
    return list(operation_costs(fuse(trace_graph(function, *arrays)), "metal"))


def test_products_are_counted_by_hand():
    x, w = mx.zeros((2, 64, 48)), mx.zeros((48, 32))
    (cost,) = costs_of(lambda x, w: x @ w, x, w)
    assert (cost.launches, cost.flops, cost.flops_single) == (1, 0, 2 * 128 * 48 * 32)
    assert cost.bytes == 4 * (128 * 48 + 48 * 32 + 128 * 32)
    (cost,) = costs_of(lambda x, w: x @ mx.broadcast_to(w, (2, *w.shape)), x, w)
    assert cost.bytes == 4 * (128 * 48 + 48 * 32 + 128 * 32)  # one matrix
    half = x.astype(mx.bfloat16), w.astype(mx.bfloat16)
    (cost,) = costs_of(lambda x, w: x @ w, *half)
    assert (cost.flops, cost.flops_single) == (2 * 128 * 48 * 32, 0)


def test_launches():
    x = mx.zeros((256, 2048))
    assert costs_of(lambda x: x.T.reshape(-1)[None], x)[0] == Cost("Reshape", 1, 2 * x.nbytes)  # a copy
    assert costs_of(lambda x: x.reshape(-1)[None], x) == []  # a view
    assert sum(c.launches for c in costs_of(lambda x: mx.concatenate([x, x, x]), x)) == 3
    assert [c.launches for c in costs_of(lambda x: mx.sum(x), x)] == [2]
    assert [c.launches for c in costs_of(lambda x: mx.sum(x, axis=1), x)] == [1]
    split = costs_of(lambda x: x.T[:16] @ x[:, :16], x)  # a long inner dimension, a small result
    assert [c.launches for c in split] == [2]
    row = mx.zeros((1, 2048))
    (fused,) = costs_of(lambda x, row: mx.exp(x) * row + 1, x, row)  # the row is read once
    assert (fused.launches, fused.bytes) == (1, 2 * x.nbytes + row.nbytes + 4)


def test_flops_of_a_step(monkeypatch):
    """Compare the products of a whole step with a count by hand; all sizes are multiples of 16."""
    depth, rank, rows, length = 2, 16, 2, 64
    hidden, mlp, vocabulary, heads, width = 48, 112, 304, 3, 16
    shape = {"intermediate_size": mlp, "vocab_size": vocabulary, "head_dim": width}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    monkeypatch.setitem(step_cost.SHAPES, "test", step_cost.SHAPES["tiny"] | shape)
    traced = trace_step(Step(THEIRS, "test", rows, length, rank=rank))
    product = 2 * rows * length  # times the two sides of the weight
    sizes = [(hidden, hidden)] * 4 + [(hidden, mlp)] * 2 + [(mlp, hidden)]
    frozen = sum(2 * product * a * b for a, b in sizes)  # forward and backward
    adapters = sum(3 * product * rank * (a + b) for a, b in sizes)  # forward, gradients of x and of A and B
    attention = 6 * 2 * rows * heads * length * length * width  # two products forward, four backward
    head = 2 * product * hidden * vocabulary
    not_needed = 3 * product * hidden * (hidden + rank)  # the gradient of x of the first layer's q, k and v
    expected = depth * (frozen + adapters + attention) + head - not_needed
    assert total_cost(map(fuse, traced.graphs), "metal").flops == expected


def test_prediction_is_the_sum_over_launches():
    chip = CHIPS["M1"]._replace(bandwidth=100, half=2, single=1, cores=10)
    efficiency = Efficiency(0.5, 0.5, 0.25, 1e-3, 1e-6, 0.0)
    total = Total(2, (Cost("a", 1, 50 * 10**9), Cost("b", 2, 0, 10**12, 0, 5)))
    assert total.seconds(chip, efficiency) == pytest.approx(3e-3 + 1.0 + 2.0)
    slow_cpu = efficiency._replace(encode=2.0, build=0.5)
    assert total.seconds(chip, slow_cpu) == pytest.approx(6.0 + 1.0)


def kinds_of(trainer):
    return Counter(cost.kind for cost in step_cost.predict(Step(trainer, "tiny", 2, 64)).total.costs)


def test_a_measured_update_has_two_more_forward_passes():
    """Up to the gates of the last layer. The first norm is that of the same embeddings."""
    assert kinds_of(MEASURED)["rms_norm"] - kinds_of(NA_LORA)["rms_norm"] == 4 + 3


def test_our_step_is_traced_with_the_kernels_of_a_gpu():
    kinds = kinds_of(PAPER)
    assert kinds["nalora_forward"] == kinds["nalora_backward"] == 2
    assert kinds["rms_norm"] == 5
    cuda = step_cost.predict(Step(NA_LORA, "llama-3.2-1b", 1, 128, backend="cuda", depth=1)).total.costs
    assert {"attention", "attention_vjp"} <= {cost.kind for cost in cuda}


def test_four_bit_weights_are_smaller():
    full, quantized = (trace_step(Step(THEIRS, "llama-3.2-1b", 1, 32, bits=b, depth=1)) for b in (16, 4))
    assert quantized.weights == pytest.approx(full.weights * 4.5 / 16, rel=0.01)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_peak_is_at_least_the_state(trainer):
    one = step_cost.predict(Step(trainer, "tiny", 2, 64))
    adapters = 4 * 8 * 2 * (4 * 48 + 2 * (2 * 24) + 3 * 148 + 4 * 48 - 96)
    assert one.peak > 3 * adapters // 2


def test_command(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(step_cost.SHAPES["tiny"]))
    command = [
        sys.executable,
        str(ROOT / "scripts/step_cost.py"),
        str(config),
        "--rows",
        "2",
        "--length",
        "32",
    ]
    result = subprocess.run([*command, "--chips", "M4 Max", "--json"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["trainer"] for row in rows] == list(TRAINERS)
    assert all(row["launches"] > 0 and row["milliseconds"]["M4 Max"] > 0 for row in rows)
    result = subprocess.run([*command, "--chips", "M9"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "M9" in result.stderr


def test_the_tables_smallest_row_is_in_step():
    page = (ROOT / "docs/step-cost.md").read_text()
    assert step_cost.table_row("smollm2-135m", 16, (4, 160)) in page
