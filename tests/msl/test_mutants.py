"""Mutation tests: each mutant breaks a kernel, and a check of the kernel tests must fail."""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest

from nalora_mlx.ops.activations import ACTIVATIONS
from nalora_mlx.ops.kernels import fused
from nalora_mlx.ops.kernels.fused import Variant

from . import lane
from .test_gated_residual import EXACT, check, emulated, full, guarded, operands  # noqa: F401

FILES = {name: fused.source(f"metal/{name}.metal") for name in ("common", "forward", "backward")}


# Inputs for the checks: name of the activation, variant, operands, gradient of h, and the experts of the rows, if any.


def plain(dtype=mx.float32):
    variant = full(ACTIVATIONS["silu"])
    return "silu", variant, *operands(variant, 70, 11, 4, dtype)


def aligned():
    variant = full(ACTIVATIONS["silu"])
    return "silu", variant, *operands(variant, 70, 12, 4)


def joined():
    variant = full(ACTIVATIONS["silu"], gate_up_layout="gate first")
    return "silu", variant, *operands(variant, 70, 11, 4)


def sensitivity():
    variant = Variant(ACTIVATIONS["silu"], statistic="sensitivity", boundaries=ACTIVATIONS["silu"].boundaries)
    return "silu", variant, *operands(variant, 70, 11, 4)


def product_outside():
    variant = full(ACTIVATIONS["silu"])
    return "silu", variant, *operands(variant, 70, 11, 0)


def open_boundary():
    variant = full(ACTIVATIONS["relu"])
    o, dh = operands(variant, 6, 8, 0)
    zero = mx.zeros((6, 8))
    return "relu", variant, fused.Operands((zero, o.bases[1]), z0=zero, weights=o.weights), dh


def with_experts():
    variant = full(ACTIVATIONS["silu"], experts=3)
    experts = np.repeat([0, 1, 2], [30, 70, 20])
    return "silu", variant, *operands(variant, 120, 11, 4, experts=experts), experts


def one_row():
    variant = full(ACTIVATIONS["silu"])
    return "silu", variant, *operands(variant, 1, 11, 4)


def rank_six():
    variant = full(ACTIVATIONS["silu"])
    return "silu", variant, *operands(variant, 70, 11, 6)


def without_statistics():
    variant = Variant(ACTIVATIONS["silu"])
    return "silu", variant, *operands(variant, 70, 11, 4)


@cache
def activation(name):
    return lambda: (name, full(EXACT[name].row), *operands(full(EXACT[name].row), 70, 11, 4))


# The file, the text to replace, its replacement, and the inputs that reveal the fault (None: NaN in padding).
MUTANTS = [
    # forward
    (
        "forward",
        "tiles[3 * tile + 2] : metal::min(rows, (tile + 1) * TILE)",
        "tiles[3 * tile + 2] : (tile + 1) * TILE",
        plain,
    ),
    ("forward", "tile * TILE;", "tile * TILE + (tile > 0);", plain),
    ("forward", "metal::min(rows, (tile + 1) * TILE)", "metal::min(rows - 1, (tile + 1) * TILE)", plain),
    ("forward", "to_gate.add(ag, n, scale[0], z);", "to_gate.add(au, n, scale[0], z);", plain),
    ("forward", "to_up.add(au, n, scale[1], u);", "to_up.add(au, n, scale[0], u);", plain),
    ("forward", "to_up(bu,", "to_up(bg,", plain),
    ("forward", "u0 + next * at.width", "g0 + next * at.width", plain),
    ("forward", "at.channel + at.up, whole", "at.channel + at.gate, whole", joined),
    ("forward", "out[j] = phi * v;", "out[j] = slope * v;", plain),
    ("forward", "out[j] = phi * v;", "out[j] = phi * u[j];", activation("swiglu_output_clamped")),
    ("forward", "&& weight > 0.0f", "", None),
    ("forward", "STATISTIC > 0 ? w[n] : 0.0f", "STATISTIC > 0 ? w[start] : 0.0f", plain),
    (
        "forward",
        "metal::abs(STATISTIC == 2 ? slope * v : slope)",
        "(STATISTIC == 2 ? slope * v : slope)",
        plain,
    ),
    ("forward", "STATISTIC == 2 ? slope * v : slope", "STATISTIC == 2 ? slope * phi : slope", sensitivity),
    ("forward", "CLOSED ? z[j] >= boundary[0] : z[j] > boundary[0]", "z[j] >= boundary[0]", open_boundary),
    ("forward", "z[j] >= boundary[1]", "z[j] >= boundary[0]", plain),
    ("forward", "(z[j] - before[j]) * frozen * v", "(z[j] - before[j]) * frozen", plain),
    ("forward", "GATE::selection(before[j])", "GATE::selection(z[j])", plain),
    ("forward", "load4<T>(z0 + size_t(n)", "load4<T>(g0 + size_t(n)", product_outside),
    (
        "forward",
        "size_t(n) * at.features + at.channel, whole",
        "size_t(n) * at.features + at.channel + 1, whole",
        plain,
    ),
    ("forward", "to + 2 * plane", "to + plane", plain),
    ("forward", "(1 + BOUNDARIES) * plane", "BOUNDARIES * plane", plain),
    ("forward", "tiles[3 * tile] : 0", "tiles[3 * tile] / 2 : 0", with_experts),
    ("forward", "tiles[3 * tile + 1] :", "tiles[3 * tile + 1] + 1 :", with_experts),
    ("forward", "at.channel == 0 && tile == 0", "false", without_statistics),
    ("forward", "metal::min(n + AHEAD, last)", "n + AHEAD", plain),
    ("forward", "metal::min(n + AHEAD, last)", "metal::min(n + 1, last)", plain),
    ("forward", "metal::min(start + i, last)", "start + i", one_row),
    ("forward", "metal::min(start + i, last)", "metal::min(start, last)", plain),
    ("forward", "if (n >= stop) continue;", "if (n > stop) continue;", one_row),
    # backward
    ("backward", "metal::min(rows, (tile + 1) * TILE)", "(tile + 1) * TILE", plain),
    ("backward", "metal::min(rows, (tile + 1) * TILE)", "metal::min(rows - 1, (tile + 1) * TILE)", plain),
    ("backward", "tile * TILE;", "tile * TILE + (tile > 0);", plain),
    ("backward", "to_gate.add(ag, n, scale[0], z);", "to_gate.add(ag, n, 1.0f, z);", plain),
    ("backward", "to_up.add(au, n, scale[1], u);", "", plain),
    ("backward", "to_gate(bg,", "to_gate(bu,", plain),
    ("backward", "to_z[j] = g[j] * v * slope;", "to_z[j] = g[j] * v * phi;", plain),
    ("backward", "to_z[j] = g[j] * v * slope;", "to_z[j] = g[j] * slope;", plain),
    (
        "backward",
        "to_u[j] = g[j] * phi * up_slope;",
        "to_u[j] = g[j] * phi;",
        activation("swiglu_output_clamped"),
    ),
    ("backward", "to_u[j] = g[j] * phi * up_slope;", "to_u[j] = g[j] * slope * up_slope;", plain),
    ("backward", "dh + next * at.features", "dh + next * at.width", joined),
    ("backward", "HALVES == 0 ? size_t(rows) * at.features : 0", "0", plain),
    ("backward", "d + apart + row + at.up", "d + apart + row + at.gate", joined),
    ("backward", "d + row + at.gate, whole", "d + row + at.gate, true", plain),
    ("backward", "tiles[3 * tile] : 0", "0 : 0", with_experts),
    ("backward", "metal::min(n + AHEAD, last)", "n + AHEAD", plain),
    ("backward", "metal::min(n + AHEAD, last)", "metal::min(n + 1, last)", plain),
    ("backward", "metal::min(start + i, last)", "start + i", one_row),
    ("backward", "if (n >= stop) continue;", "if (n > stop) continue;", one_row),
    # both
    ("common", "k + i >= RANK", "k + i >= RANK - 1", plain),
    ("common", "RANK % 4 == 0, RANK - k", "true, RANK - k", rank_six),
    ("common", "RANK % 4 == 0, RANK - k", "false, 4", rank_six),
    ("common", "count > 2 ? p[2] : zero", "zero", plain),
    ("common", "size_t(row) * RANK + k", "size_t(row) * RANK + RANK - 1 - k", plain),
    ("common", "size_t(k) * width + column", "size_t(k) * width + column + 1", plain),
    (
        "common",
        "(size_t(expert) * width + column) * RANK + k",
        "size_t(expert) * width * RANK + column + k * width",
        with_experts,
    ),
    ("common", "metal::min(j, count - 1)", "0", plain),
    ("common", "channel = 4 * thread_x", "channel = 3 * thread_x", plain),
    ("common", "features % 4 == 0", "true", plain),
    ("common", "gate = halves == 2 ? features : 0", "gate = halves == 1 ? features : 0", joined),
    ("common", "z >= 0.0f ? p : e * p", "z >= 0.0f ? e * p : p", plain),
    (
        "common",
        "slope = s * (1.0f + z * sigmoid(-z));\n    return z * s;\n  }\n};\n\n// exp(-z^2",
        "slope = s;\n    return z * s;\n  }\n};\n\n// exp(-z^2",
        plain,
    ),
    ("common", "vec<T, 4>(T(from[0])", "vec<T, 4>(T(from[0] * 0.9999f)", aligned),
    # activations
    ("common", "density * (m + z) : 1.0f", "density * m : 1.0f", activation("gelu")),
    ("common", "z * (z < 0.0f ? density * m :", "z * (z > 0.0f ? density * m :", activation("gelu")),
    ("common", "0.134145f", "0.044715f", activation("gelu_tanh")),
    ("common", "slope = 2.0f * m;", "slope = m;", activation("relu2")),
    ("common", "slope = s * sigmoid(-z);", "slope = s;", activation("sigmoid")),
    (
        "common",
        "const float m = at_most(z, c[1]);",
        "const float m = at_most(z, c[0]);",
        activation("swiglu_oai"),
    ),
    ("common", "CLAMPED_UP(1, 1.0f)", "CLAMPED_UP(1, 0.0f)", activation("swiglu_oai")),
    ("common", "z >= c[0] ? 0.0f : slope", "slope", activation("swiglu_input_clamped")),
    (
        "common",
        "value >= c[0] ? 0.0f : slope",
        "z >= c[0] ? 0.0f : slope",
        activation("swiglu_output_clamped"),
    ),
    (
        "common",
        "slope = u > -c[LIMIT] && u < c[LIMIT]",
        "slope = u < c[LIMIT]",
        activation("swiglu_input_clamped"),
    ),
    ("common", "metal::precise::tanh(z / c[0])", "metal::precise::tanh(z)", activation("situ")),
    ("common", "slope = 1.0f - t * t;", "slope = t * t;", activation("situ")),
    ("common", "if (c[1] == 0.0f) {", "if (false) {", activation("situ without a bound on u")),
    ("common", "2.0f * c[0] * z : low_slope", "c[0] * z : low_slope", activation("xielu")),
    ("common", "return p * x * x;", "return p * x;", activation("xielu")),
]


def test_every_file_has_at_least_ten_mutants():
    for name in FILES:
        assert sum(mutant[0] == name for mutant in MUTANTS) >= 10


def run_check(make_inputs):
    """Compare the current kernels with float64 on the given inputs."""
    if make_inputs is None:
        variant = full(ACTIVATIONS["silu"])
        o, _ = operands(variant, 12, 8, 4)
        weights = mx.array((np.arange(12) != 3).astype(np.float32))
        rows = np.array(o.bases[0])
        rows[3] = np.nan
        o = fused.Operands((mx.array(rows), o.bases[1]), o.lows, o.bs, o.scales, None, weights)
        assert not mx.isnan(fused.forward("metal", variant, o)[1]).any()
        return
    exact, *rest = make_inputs()
    experts = rest.pop() if len(rest) == 4 else None
    check(EXACT[exact], *rest, experts=experts)


INPUTS = list(dict.fromkeys(mutant[-1] for mutant in MUTANTS))


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(INPUTS)))
def test_checks_pass_without_a_fault(index):
    run_check(INPUTS[index])


@pytest.mark.parametrize("index", lane.slow_except(range(len(MUTANTS)), lambda index: index % 11 == 0))
def test_mutants_are_detected(monkeypatch, index):
    name, old, new, make_inputs = MUTANTS[index]
    assert FILES[name].count(old) >= 1, "the mutant no longer applies"
    texts = {**FILES, name: FILES[name].replace(old, new)}
    monkeypatch.setattr(
        fused, "source", lambda path: texts[path.removeprefix("metal/").removesuffix(".metal")]
    )
    with pytest.raises((AssertionError, lane.MSLError)) as caught:
        run_check(make_inputs)
    assert "does not compile" not in str(caught.value), "the mutant does not compile"
    assert "Metal would reject" not in str(caught.value)
