"""The Metal kernels of the gated residual, run on the CPU: against float64, with every access watched."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest

from nalora_mlx.activations import ACTIVATIONS
from nalora_mlx.kernels import backend, fused, gated_residual, selfcheck
from nalora_mlx.kernels.fused import Operands, Variant

from ..truth import FAMILIES, TRUTH
from . import lane

EPS = 2.0**-23
HALF_ULP = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
TINY = {
    mx.float32: 2.0**-126,
    mx.float16: 2.0**-25,
    mx.bfloat16: 2.0**-126,
}  # where results lose their last digits
ORDERS = (("forward", "end"), ("reverse", "start"), ("shuffled", "end"))


@pytest.fixture(scope="module", autouse=True)
def guarded():
    lane.require("guarded")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Calls of a kernel run it on the CPU, in three orders that must agree to the bit."""
    build = fused._kernel

    def kernel(*of):
        made = build(*of)

        def call(*, inputs, **launch):
            (traced,) = lane.trace(lambda *arrays: made(inputs=list(arrays), **launch), *inputs)
            runs = [traced.run(inputs, order=order, guard=guard) for order, guard in ORDERS]
            for run in runs:
                for got, want in zip(run, runs[0], strict=True):
                    assert not lane.poisoned(got).any(), "an element was never written"
                    np.testing.assert_array_equal(got, want)
            return [mx.array(o).astype(spec.dtype) for o, spec in zip(runs[0], traced.outputs, strict=True)]

        return call

    monkeypatch.setattr(fused, "_kernel", kernel)


# --- float64 ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """phi, phi', rho, and the up branch with its derivative, in float64."""

    row: object
    phi: object
    slope: object
    selection: object = None
    up: object = staticmethod(lambda u: u)
    up_slope: object = staticmethod(np.ones_like)


def differences(function):
    """The derivative of a float64 function by central differences, to 1e-9."""
    return lambda x: (function(x + 1e-5) - function(x - 1e-5)) / 2e-5


def exact_family(name):
    row, phi, up = FAMILIES[name]
    return Exact(row, phi, differences(phi), None, up, differences(up))


EXACT = {name: Exact(row, *TRUTH[name][:3]) for name, row in ACTIVATIONS.items()}
EXACT |= {name: exact_family(name) for name in FAMILIES if name != "gelu_topk"}


def float64(a):
    return np.array(a.astype(mx.float32)).astype(np.float64)


def halves(variant, arrays):
    """Gate and up in float64 from the arrays that hold them."""
    if variant.halves == "separate":
        return [float64(a) for a in arrays]
    both = np.split(float64(arrays[0]), 2, axis=-1)
    return both if variant.halves == "gate first" else both[::-1]


def pre_activations(variant, o, experts):
    """z0, z, u and the sizes that rounding is relative to."""
    (g0, u0), out, sizes = halves(variant, o.bases), [], []
    products, magnitudes = [0.0, 0.0], [0.0, 0.0]
    if o.lows:
        for i, scale in enumerate(o.scales):
            low, b = float64(o.lows[min(i, len(o.lows) - 1)]), o.bs[min(i, len(o.bs) - 1)]
            if experts is None:
                b = halves(variant, o.bs)[i]
                products[i], magnitudes[i] = scale * low @ b, abs(scale) * np.abs(low) @ np.abs(b)
            else:
                b = float64(b)
                width = b.shape[1]
                if variant.halves != "separate":
                    first = (i == 0) == (variant.halves == "gate first")
                    b = b[:, : width // 2] if first else b[:, width // 2 :]
                b = b[experts]  # [N, F, R]
                products[i] = scale * np.einsum("nr,nfr->nf", low, b)
                magnitudes[i] = abs(scale) * np.einsum("nr,nfr->nf", np.abs(low), np.abs(b))
    for base, product, magnitude in zip((g0, u0), products, magnitudes, strict=True):
        out.append(base + product)
        sizes.append(np.abs(base) + magnitude)
    z0 = g0 if o.z0 is None else halves(variant, [o.z0] * (2 if variant.halves == "separate" else 1))[0]
    return z0, *out, *sizes


def check(exact, variant, o, dh, experts=None, bound=8.0):
    """Both kernels against float64, elementwise: errors in what float32 arithmetic may lose, and one rounding to T."""
    dtype = o.bases[0].dtype
    h, sums = (np.array(a.astype(mx.float32)) for a in fused.forward("metal", variant, o))
    grads = fused.backward("metal", variant, o, dh)
    z0, z, u, size_z, size_u = pre_activations(variant, o, experts)
    lost = (bound + (o.lows[0].shape[-1] if o.lows else 0)) * EPS
    phi, slope, v, v_slope = exact.phi(z), exact.slope(z), exact.up(u), exact.up_slope(u)
    size_v = np.abs(v) + np.abs(v_slope) * size_u
    size_phi = np.abs(phi) + (np.abs(slope) + 0.3) * size_z
    size_slope = np.abs(slope) + (2.0 if exact.row.name in ("relu2", "xielu") else 1.0) * size_z

    def close(got, want, arithmetic, where=True):
        allowed = 1.01 * HALF_ULP[dtype] * np.abs(want) + lost * arithmetic + TINY[dtype]
        wrong = np.broadcast_to(where, want.shape) & ~(np.abs(got - want) <= allowed)
        assert not wrong.any(), (
            got[wrong][:3],
            want[wrong][:3],
            np.abs(got - want)[wrong][:3] / allowed[wrong][:3],
        )

    close(h, phi * v, np.abs(v) * size_phi + np.abs(phi) * size_v)

    # Where a derivative jumps, rounding decides the side.
    def steady(function, x, size):
        return np.abs(function(x + 4 * lost * size + 3e-5) - function(x - 4 * lost * size - 3e-5)) < 0.05

    sure_z, sure_u = steady(exact.slope, z, size_z), steady(exact.up_slope, u, size_u)
    g = float64(dh)
    dz, du = halves(variant, grads)
    close(dz, g * v * slope, np.abs(g) * (np.abs(v) * size_slope + np.abs(slope) * size_v) + 1e-9, sure_z)
    close(du, g * phi * v_slope, np.abs(g) * size_phi * (np.abs(v_slope) + size_u) + 1e-9, sure_u)
    if variant.statistic is None:
        assert sums.shape == (1, 1, 1)
        assert sums[0, 0, 0] == 0
        return
    check_sums(exact, variant, o, sums, lost, (z0, z, slope, v, size_z, size_slope, size_v, sure_z))


def check_sums(exact, variant, o, sums, lost, found):
    z0, z, slope, v, size_z, size_slope, size_v, sure_z = found
    w = float64(o.weights)[:, None]
    tiles = rows_of_tiles(o, len(z))

    def per_tile(array):
        return np.stack([(w * array)[rows].sum(axis=0) for rows in tiles])

    def close(got, want, arithmetic, unsure):
        allowed = fused.TILE * EPS * per_tile(np.abs(want)) + per_tile(lost * arithmetic) + per_tile(unsure)
        assert (np.abs(got - per_tile(want)) <= allowed + 1e-30).all()

    response, size = np.abs(slope), size_slope
    if variant.statistic == "sensitivity":
        response, size = np.abs(slope * v), np.abs(v) * size_slope + np.abs(slope) * size_v
    close(sums[0], response, size + 1e-3, np.where(sure_z, 0, 2 * (1 + np.abs(v))))
    for got, boundary in zip(sums[1:], variant.boundaries, strict=False):
        above = z >= boundary if exact.row.left_closed else z > boundary
        close(got, above * 1.0, 0.0, np.abs(z - boundary) < 2 * lost * size_z)
    if variant.diagnose:
        frozen = exact.selection(z0)
        feature, selected = np.abs((z - z0) * frozen * v), np.abs(z * (exact.selection(z) - frozen) * v)
        size = (np.abs(z) + size_z) * (1 + np.abs(z)) * (np.abs(v) + size_v)
        jump = np.where(np.minimum(np.abs(z), np.abs(z0)) < 1e-5, 1e-4 * np.abs(v), 0)
        close(sums[-2], feature, size, jump)
        close(sums[-1], selected, size, jump)


def rows_of_tiles(o, rows):
    if o.tiles is None:
        return [slice(i, i + fused.TILE) for i in range(0, rows, fused.TILE)]
    return [slice(start, stop) for _, start, stop in np.array(o.tiles).tolist()]


# --- inputs -------------------------------------------------------------------------------------------------


def operands(variant, rows, features, rank, dtype=mx.float32, experts=None, seed=0):
    """Random inputs whose z and u spread over a few units, and a gradient of h."""
    rng = np.random.default_rng(seed)
    low_dtype = mx.float32 if dtype == mx.float16 else dtype

    def normal(*shape, dtype=dtype, size=1.0):
        return mx.array((size * rng.standard_normal(shape)).astype(np.float32)).astype(dtype)

    count = 2 if variant.halves == "separate" else 1
    width = features * (3 - count)
    shape = (rank, width) if experts is None else (variant.experts, width, rank)
    o = Operands(
        tuple(normal(rows, width, size=2.0) for _ in range(count)),
        tuple(normal(rows, rank, dtype=low_dtype) for _ in range(count)) if rank else (),
        tuple(normal(*shape, dtype=low_dtype) for _ in range(count)) if rank else (),
        (0.5, -0.25 if count == 2 else 0.5),
        normal(rows, width) if variant.diagnose and not rank else None,
        mx.array((rng.random(rows) > 0.2) * rng.integers(1, 3, rows).astype(np.float32)),
        None if experts is None else fused.expert_tiles(mx.array(experts), variant.experts),
    )
    return o, normal(rows, features)


def full(row, **settings):
    """All that can be asked of an activation."""
    return Variant(
        row,
        statistic="derivative",
        boundaries=row.boundaries,
        diagnose=row.selection is not None,
        **settings,
    )


# --- equality -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(EXACT))
def test_every_activation(name):
    variant = full(EXACT[name].row)
    for rows, features in ((70, 20), (3, 11)):
        check(EXACT[name], variant, *operands(variant, rows, features, 4))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_half_types(name, dtype):
    variant = full(EXACT[name].row)
    for rows, features in ((70, 20), (3, 11)):
        check(EXACT[name], variant, *operands(variant, rows, features, 4, dtype))


@pytest.mark.parametrize("rank", [0, 1, 16])
@pytest.mark.parametrize("statistic", [None, "sensitivity"])
def test_ranks_and_statistics(rank, statistic):
    row = ACTIVATIONS["silu"]
    variant = Variant(row)
    if statistic:
        variant = replace(full(row), statistic=statistic)
    for rows, features in ((8, 12), (130, 9)):
        check(EXACT["silu"], variant, *operands(variant, rows, features, rank))


@pytest.mark.parametrize("side", ["gate first", "up first"])
def test_one_projection_for_both(side):
    variant = full(ACTIVATIONS["gelu_tanh"], halves=side)
    for rows, features in ((70, 12), (9, 7)):
        check(EXACT["gelu_tanh"], variant, *operands(variant, rows, features, 4))


@pytest.mark.parametrize("side", fused.HALVES)
def test_experts(side):
    """Rows of several experts, one of them with none, in tiles of one expert each."""
    variant = full(ACTIVATIONS["silu"], halves=side, experts=4)
    experts = np.sort(np.random.default_rng(0).choice([0, 2, 3], 200, p=[0.1, 0.6, 0.3]))
    for features in (8, 5):
        o, dh = operands(variant, 200, features, 4, experts=experts)
        tiles = np.array(o.tiles)
        covered = np.concatenate([np.arange(start, stop) for _, start, stop in tiles])
        np.testing.assert_array_equal(covered, np.arange(200))
        for expert, start, stop in tiles:
            assert stop - start <= fused.TILE
            assert (experts[start:stop] == expert).all()
        check(EXACT["silu"], variant, o, dh, experts=experts)


@pytest.mark.parametrize(
    ("rows", "features"), [(1, 11), (7, 576), (1023, 33), (5, 4097), (64, 1536), (65, 8)]
)
def test_odd_shapes(rows, features):
    variant = full(ACTIVATIONS["silu"])
    check(EXACT["silu"], variant, *operands(variant, rows, features, 8))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_no_worse_than_mlx_in_a_half_type(dtype):
    """Largest error of h and of both gradients: at most 1.5 times that of MLX's own operations, plus one ulp."""
    variant = Variant(ACTIVATIONS["silu"])
    o, dh = operands(variant, 40, 64, 4, dtype)
    _, z, u, *_ = pre_activations(variant, o, None)

    def naive(g0, u0):
        z, u = (
            base + (scale * (low.astype(dtype) @ b.astype(dtype))).astype(dtype)
            for base, low, b, scale in zip((g0, u0), o.lows, o.bs, o.scales, strict=True)
        )
        return z * mx.sigmoid(z) * u

    (h,), found = mx.vjp(naive, list(o.bases), [dh])
    want = [
        EXACT["silu"].phi(z) * u,
        float64(dh) * u * EXACT["silu"].slope(z),
        float64(dh) * EXACT["silu"].phi(z),
    ]
    got = [fused.forward("metal", variant, o)[0], *fused.backward("metal", variant, o, dh)]
    for mine, theirs, truth in zip(got, [h, *found], want, strict=True):
        allowed = 1.5 * np.abs(float64(theirs) - truth).max() + 2 * HALF_ULP[dtype] * np.abs(truth).max()
        assert np.abs(float64(mine) - truth).max() <= allowed


def test_far_from_zero():
    row = ACTIVATIONS["silu"]
    variant = full(row)
    o, dh = operands(variant, 4, 16, 0)
    far = np.array([1e4, -1e4, 88, -88, 104, -104, 30, -30, 17, -17, 0.0, -0.0, 1e-30, -1e-30, 5, -5])
    o = replace(o, bases=(mx.array(np.tile(far, (4, 1)).astype(np.float32)), o.bases[1]))
    for name in ("silu", "gelu", "gelu_tanh", "sigmoid", "relu", "relu2"):
        check(EXACT[name], full(EXACT[name].row), o, dh)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_not_a_number_and_infinity_come_through_as_in_mlx(name):
    row = ACTIVATIONS[name]
    values = [np.nan, np.inf, -np.inf, 1.0]
    z, u = (mx.array(a.reshape(2, 8).astype(np.float32)) for a in np.meshgrid(values, values))
    for dtype in (mx.float32, mx.bfloat16):
        o = Operands((z.astype(dtype), u.astype(dtype)))
        h, _ = fused.forward("metal", Variant(row), o)
        want = np.array((row.phi(z) * u).astype(dtype).astype(mx.float32))
        np.testing.assert_allclose(np.array(h.astype(mx.float32)), want, rtol=1e-6)


def test_padding_may_hold_anything():
    variant = full(ACTIVATIONS["silu"])
    o, _ = operands(variant, 12, 8, 4)
    rows = np.array(o.bases[0])
    rows[3] = np.nan
    weights = np.ones(12, np.float32)
    weights[3] = 0
    with_nan = replace(o, bases=(mx.array(rows), o.bases[1]), weights=mx.array(weights))
    without = replace(o, weights=mx.array(weights))
    np.testing.assert_array_equal(
        fused.forward("metal", variant, with_nan)[1], fused.forward("metal", variant, without)[1]
    )


# --- the operation around the kernels -----------------------------------------------------------------------


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("rank", [4, 17])
@pytest.mark.parametrize("side", ["separate", "up first"])
def test_operation_equals_the_reference(monkeypatch, side, rank, experts):
    """h, sums and the gradients of bases, low-rank inputs and B, with the product inside the kernel and outside."""
    monkeypatch.setattr(backend, "backend", lambda: "metal")
    variant = full(ACTIVATIONS["silu"], halves=side, experts=experts)
    projections, weights, dh = selfcheck.example(variant, mx.float32, mx.float32, rank, 12)
    kind = backend.kind_of("metal", variant, projections)
    assert kind[-1] == (rank if rank <= fused.MAX_RANK else 0)
    results = []
    for found in (None, "is wrong"):
        monkeypatch.setitem(backend.faults, kind, found)

        def run(variant, projections, weights):
            h, seen = gated_residual.gated_residual(variant, projections, weights)
            return h, [seen[name] for name in sorted(seen)]

        results.append(selfcheck._all(run, variant, projections, weights, dh[:, None] if experts else dh))
    assert len(results[0]) == 1 + 3 + bool(experts) + (6 if side == "separate" else 3)
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * np.abs(np.array(want)).max())


def test_self_check_passes_right_kernels_and_refuses_wrong_ones(monkeypatch):
    monkeypatch.setattr(selfcheck, "backend", lambda: "metal")
    monkeypatch.setattr(backend, "faults", faults := {})
    monkeypatch.setattr(selfcheck, "faults", faults)
    variant = replace(full(ACTIVATIONS["silu"]), diagnose=False)
    selfcheck.prepare(variant, mx.float32, mx.float32, 4)
    assert set(faults.values()) == {None}
    assert len(faults) == 6  # with statistics, diagnosed, without; product inside and outside
    right = fused.backward
    monkeypatch.setattr(fused, "backward", lambda *a: tuple(1.001 * d for d in right(*a)))
    faults.clear()
    with pytest.warns(UserWarning, match="silu in .*float32 is not used: its result is off by") as warned:
        selfcheck.prepare(variant, mx.float32, mx.float32, 4)
    assert len(warned) == 6
    assert None not in faults.values()

    def broken(*_):
        raise RuntimeError("[metal::Device] Unable to build metal library\nmore")

    monkeypatch.setattr(fused, "forward", broken)
    faults.clear()
    with pytest.warns(UserWarning, match=r"does not run \(\[metal::Device\] Unable to build metal library\)"):
        selfcheck.prepare(variant, mx.float32, mx.float32, 4)


def test_doctor_tries_every_kernel(monkeypatch, capsys):
    """The page of a right machine, and of one whose kernels are wrong in one activation."""
    from rich.console import Console

    from nalora_mlx import doctor
    from nalora_mlx.kernels import survey

    monkeypatch.setattr(backend, "backend", lambda: "metal")
    monkeypatch.setattr(survey, "DTYPES", (mx.bfloat16,))
    monkeypatch.setattr(survey, "RANKS", (8,))
    monkeypatch.setattr(survey, "ROWS", 16)
    monkeypatch.setattr(survey, "FEATURES", 16)
    console = Console(highlight=False, width=400)
    doctor._kernels(console)
    page = capsys.readouterr().out
    assert "gated residual: 12 of 12 metal kernels agree with MLX" in page
    assert "of a copy" in page
    right = fused.backward
    monkeypatch.setattr(
        fused,
        "backward",
        lambda b, variant, *a: (
            (mx.zeros((1,)),) * 2 if variant.activation.name == "relu" else right(b, variant, *a)
        ),
    )
    doctor._kernels(console)
    page = capsys.readouterr().out
    assert "gated residual: 11 of 12 metal kernels agree with MLX" in page
    assert "finding: the metal kernel of relu, mlx.core.bfloat16, rank 8 is not used, since " in page
