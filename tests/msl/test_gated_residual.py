"""The Metal kernels of the gated residual, run on the CPU: accuracy against float64, and checked memory accesses."""

import itertools
from contextlib import nullcontext
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest

from nalora_mlx.ops.activations import ACTIVATIONS
from nalora_mlx.ops.kernels import backend, fused, gated_residual, reference, selfcheck
from nalora_mlx.ops.kernels.backend import KernelKey
from nalora_mlx.ops.kernels.fused import Operands, Variant
from nalora_mlx.ops.kernels.low_rank import LowRank

from ..float64_reference import FAMILIES, TRUTH
from . import lane

EPS = 2.0**-23
HALF_ULP = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
TINY = {mx.float32: 2.0**-126, mx.float16: 2.0**-25, mx.bfloat16: 2.0**-126}  # where results become denormal


@pytest.fixture(scope="module", autouse=True)
def guarded():
    lane.require("guarded")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Run kernels on the CPU, in three thread orders whose results must be bitwise equal."""
    build = fused._kernel
    monkeypatch.setattr(fused, "_kernel", lambda *args: lane.emulated(build(*args)))


# --- float64 ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """An activation in float64: phi, phi', rho, and the transform of the up branch with its derivative."""

    row: object
    phi: object
    slope: object
    selection: object = None
    up: object = staticmethod(lambda u: u)
    up_slope: object = staticmethod(np.ones_like)


def differences(function):
    """Return the derivative of a float64 function by central differences, accurate to 1e-9."""
    return lambda x: (function(x + 1e-5) - function(x - 1e-5)) / 2e-5


def exact_family(name):
    row, phi, up = FAMILIES[name]
    return Exact(row, phi, differences(phi), None, up, differences(up))


EXACT = {name: Exact(row, *TRUTH[name][:3]) for name, row in ACTIVATIONS.items()}
EXACT |= {name: exact_family(name) for name in FAMILIES if name != "gelu_topk"}


def float64(a):
    return np.array(a.astype(mx.float32)).astype(np.float64)


def halves(variant, arrays):
    """Return gate and up in float64 from the arrays of the projections."""
    if variant.gate_up_layout == "separate":
        return [float64(a) for a in arrays]
    both = np.split(float64(arrays[0]), 2, axis=-1)
    return both if variant.gate_up_layout == "gate first" else both[::-1]


def pre_activations(variant, o, experts):
    """Return z0, z, u, and the magnitudes of the terms of z and u, which rounding errors are relative to."""
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
                if variant.gate_up_layout != "separate":
                    first = (i == 0) == (variant.gate_up_layout == "gate first")
                    b = b[:, : width // 2] if first else b[:, width // 2 :]
                b = b[experts]  # [N, F, R]
                products[i] = scale * np.einsum("nr,nfr->nf", low, b)
                magnitudes[i] = abs(scale) * np.einsum("nr,nfr->nf", np.abs(low), np.abs(b))
    for base, product, magnitude in zip((g0, u0), products, magnitudes, strict=True):
        out.append(base + product)
        sizes.append(np.abs(base) + magnitude)
    z0 = (
        g0
        if o.z0 is None
        else halves(variant, [o.z0] * (2 if variant.gate_up_layout == "separate" else 1))[0]
    )
    return z0, *out, *sizes


def check(exact, variant, o, dh, experts=None, bound=8.0):
    """Compare both kernels with float64, elementwise.

    The allowed error is that of float32 arithmetic (`lost` times the magnitude of the terms) plus one rounding to the
    output's dtype.
    """
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

    # Near a jump of a derivative, rounding decides the side.
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
    """Return random operands whose z and u have a standard deviation of a few units, and a gradient of h."""
    rng = np.random.default_rng(seed)
    low_dtype = mx.float32 if dtype == mx.float16 else dtype

    def normal(*shape, dtype=dtype, size=1.0):
        return mx.array((size * rng.standard_normal(shape)).astype(np.float32)).astype(dtype)

    count = 2 if variant.gate_up_layout == "separate" else 1
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
    """Return the variant with all statistics that an activation supports."""
    return Variant(
        row,
        statistic="derivative",
        boundaries=row.boundaries,
        diagnose=row.selection is not None,
        **settings,
    )


# --- equality -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(EXACT))
def test_activations(name):
    variant = full(EXACT[name].row)
    for rows, features in ((70, 20), (3, 11)):
        check(EXACT[name], variant, *operands(variant, rows, features, 4))


HALF_PRECISION = [(name, dtype) for name in sorted(EXACT) for dtype in (mx.float16, mx.bfloat16)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    lane.slow_except(HALF_PRECISION, lambda case: case[0] == "silu" or case == ("situ", mx.bfloat16)),
    ids=str,
)
def test_half_precision(name, dtype):
    variant = full(EXACT[name].row)
    for rows, features in ((70, 20), (3, 11)):
        o, dh = operands(variant, rows, features, 4, dtype)
        check(EXACT[name], variant, o, dh)
        no_worse_than_mlx(EXACT[name], variant, o, dh)


@pytest.mark.parametrize("rank", [0, 1, 6, 16])
@pytest.mark.parametrize("statistic", [None, "sensitivity"])
def test_ranks_and_statistics(rank, statistic):
    row = ACTIVATIONS["silu"]
    variant = Variant(row)
    if statistic:
        variant = replace(full(row), statistic=statistic)
    for rows, features in ((8, 12), (130, 9)):
        check(EXACT["silu"], variant, *operands(variant, rows, features, rank))


@pytest.mark.parametrize("layout", ["gate first", "up first"])
def test_joint_projection(layout):
    variant = full(ACTIVATIONS["gelu_tanh"], gate_up_layout=layout)
    for rows, features in ((70, 12), (9, 7)):
        check(EXACT["gelu_tanh"], variant, *operands(variant, rows, features, 4))


@pytest.mark.parametrize("layout", fused.GATE_UP_LAYOUTS)
def test_experts(layout):
    """The first and one more of the experts have no rows. Each tile has one expert."""
    variant = full(ACTIVATIONS["silu"], gate_up_layout=layout, experts=5)
    experts = np.sort(np.random.default_rng(0).choice([1, 3, 4], 200, p=[0.1, 0.6, 0.3]))
    for features in (8, 5):
        o, dh = operands(variant, 200, features, 4, experts=experts)
        tiles = np.array(o.tiles)
        covered = np.concatenate([np.arange(start, stop) for _, start, stop in tiles])
        np.testing.assert_array_equal(covered, np.arange(200))
        for expert, start, stop in tiles:
            assert stop - start <= fused.TILE
            assert (experts[start:stop] == expert).all()
        check(EXACT["silu"], variant, o, dh, experts=experts)


ODD_SHAPES = [(1, 11), (1023, 33), (5, 4097), (64, 1536), (65, 8)]
MORE_ODD_SHAPES = [(1, 576), (7, 576), (1, 4097), (7, 1536), (1023, 576)]


@pytest.mark.parametrize(
    ("rows", "features"),
    lane.slow_except(ODD_SHAPES + MORE_ODD_SHAPES, lambda shape: shape in ODD_SHAPES),
)
def test_odd_shapes(rows, features):
    variant = full(ACTIVATIONS["silu"])
    check(EXACT["silu"], variant, *operands(variant, rows, features, 8))


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_numbers_of_rows_in_flight(monkeypatch, ahead):
    """Rows fewer than those in flight, as many, and not a multiple of them."""
    monkeypatch.setattr(fused, "AHEAD", ahead)
    variant = full(ACTIVATIONS["silu"])
    for rows, features in itertools.product((1, 2, 3, 4, 67), (8, 5)):
        check(EXACT["silu"], variant, *operands(variant, rows, features, 4))


def no_worse_than_mlx(exact, variant, o, dh):
    """Check that errors of h and both gradients are at most 1.5 times those of MLX's own operations, plus one ulp."""
    dtype, row = o.bases[0].dtype, exact.row
    _, z, u, *_ = pre_activations(variant, o, None)

    def naive(g0, u0):
        z, u = (
            base + (scale * (low.astype(dtype) @ b.astype(dtype))).astype(dtype)
            for base, low, b, scale in zip((g0, u0), o.lows, o.bs, o.scales, strict=True)
        )
        return row.native_phi(z) * (u if row.up is None else row.up(u))

    (h,), found = mx.vjp(naive, list(o.bases), [dh])
    want = [exact.phi(z) * exact.up(u), float64(dh) * exact.up(u) * exact.slope(z)]
    want.append(float64(dh) * exact.phi(z) * exact.up_slope(u))
    got = [fused.forward("metal", variant, o)[0], *fused.backward("metal", variant, o, dh)]
    kinks = np.zeros_like(z, bool)
    for function, x in ((exact.slope, z), (exact.up_slope, u)):  # where rounding decides the side of a jump
        kinks |= np.abs(function(x + 0.1) - function(x - 0.1)) > 0.45
    for mine, theirs, truth in zip(got, [h, *found], want, strict=True):
        mine, theirs = (np.where(kinks, 0, np.abs(float64(a) - truth)) for a in (mine, theirs))
        allowed = 1.5 * theirs.max() + 2 * HALF_ULP[dtype] * np.abs(truth).max()
        assert mine.max() <= allowed


FAR = [1e4, -1e4, 88, -88, 104, -104, 30, -30, 17, -17, 0.0, -0.0, 1e-30, -1e-30, 5, -5]


@pytest.mark.parametrize("rank", lane.slow_except([0, 4], lambda rank: rank == 4))
@pytest.mark.parametrize("name", sorted(EXACT))
def test_large_and_tiny_inputs(name, rank):
    variant = full(EXACT[name].row)
    if rank == 0 and name not in ACTIVATIONS:
        return  # for the families, rank 4 is enough
    o, dh = operands(variant, 4, 16, rank)
    far = mx.array(np.tile(np.array(FAR), (4, 1)).astype(np.float32))
    check(EXACT[name], variant, o._replace(bases=(far, o.bases[1])), dh)


@pytest.mark.parametrize("name", sorted(EXACT))
@pytest.mark.parametrize(
    "dtype", lane.slow_except([mx.float32, mx.bfloat16], lambda dtype: dtype == mx.float32), ids=str
)
def test_nan_and_infinity_propagate_as_in_mlx(name, dtype):
    """Check h, dz and du. Where MLX computes 0 times infinity, which is NaN, the kernel may return the limit."""
    row = EXACT[name].row
    values = [np.nan, np.inf, -np.inf, 1.0]
    variant = full(row)
    o, dh = operands(variant, 2, 8, 4, dtype)
    far = [mx.array(a.reshape(2, 8).astype(np.float32)).astype(dtype) for a in np.meshgrid(values, values)]
    o = o._replace(bases=tuple(far))
    got = [fused.forward("metal", variant, o)[0], *fused.backward("metal", variant, o, dh)]

    def naive(g0, u0):
        z, u = (
            base.astype(mx.float32) + scale * (low.astype(mx.float32) @ b.astype(mx.float32))
            for base, low, b, scale in zip((g0, u0), o.lows, o.bs, o.scales, strict=True)
        )
        return reference.gated_product(row, z, u)

    (h,), gradients = mx.vjp(naive, far, [dh.astype(mx.float32)])
    given = np.isnan(np.array(far[0].astype(mx.float32))) | np.isnan(np.array(far[1].astype(mx.float32)))
    for mine, theirs in zip(got, [h, *gradients], strict=True):
        mine, theirs = np.array(mine.astype(mx.float32)), np.array(theirs.astype(dtype).astype(mx.float32))
        free = np.isnan(theirs) & ~given
        np.testing.assert_allclose(
            np.where(free, 0, mine), np.where(free, 0, theirs), rtol=4 * HALF_ULP[dtype] + 1e-5, atol=1e-6
        )
    with_nan = np.isnan(np.array(far[0].astype(mx.float32)))
    assert np.isnan(float64(got[0])[with_nan]).all()
    if name not in ("relu",):  # whose derivative at NaN is 0 in MLX
        assert np.isnan(float64(got[1])[with_nan]).all()


def test_padding_may_hold_nan():
    variant = full(ACTIVATIONS["silu"])
    o, _ = operands(variant, 12, 8, 4)
    rows = np.array(o.bases[0])
    rows[3] = np.nan
    weights = np.ones(12, np.float32)
    weights[3] = 0
    with_nan = o._replace(bases=(mx.array(rows), o.bases[1]), weights=mx.array(weights))
    without = o._replace(weights=mx.array(weights))
    np.testing.assert_array_equal(
        fused.forward("metal", variant, with_nan)[1], fused.forward("metal", variant, without)[1]
    )


# --- the operation around the kernels -----------------------------------------------------------------------


def both_ways(monkeypatch, variant, dtype, rank, routed, wrap=lambda run: run):
    """Return h, sums and gradients of all arrays, by the kernel and by the reference, and the arrays."""
    monkeypatch.setattr(backend, "backend", lambda: "metal")
    low_dtype = mx.float32 if dtype == mx.float16 else dtype
    projections, weights, dh = selfcheck.example_inputs(variant, dtype, low_dtype, rank, 12, routed)
    key = backend.kernel_key("metal", variant, projections)
    assert key.rank == (rank if rank <= fused.MAX_RANK else 0)
    results = []
    for disabled in (set(), {"metal"}):
        monkeypatch.setattr(backend, "verified", {key})
        monkeypatch.setattr(backend, "disabled_backends", disabled)

        def run(variant, projections, weights):
            h, statistics = gated_residual.gated_residual(variant, projections, weights)
            return h, [statistics[name] for name in sorted(statistics)]

        cotangent = dh[:, None] if variant.experts else dh
        results.append(selfcheck.outputs_and_gradients(wrap(run), variant, projections, weights, cotangent))
    return results, [a for p in projections for a in (p.base, *p.lora_arrays)]


OPERATIONS = list(itertools.product(["separate", "up first"], [4, 17], [0, 3], [False, True]))


@pytest.mark.parametrize(
    ("layout", "rank", "experts", "routed"),
    lane.slow_except(OPERATIONS, lambda case: case[3] and (case[0] == "separate") == (case[2] == 0)),
)
def test_operation_equals_the_reference(monkeypatch, layout, rank, experts, routed):
    """Compare h, sums and all gradients, with the low-rank product in the kernel (rank 4) and outside (rank 17)."""
    variant = full(ACTIVATIONS["silu"], gate_up_layout=layout, experts=experts)
    results, arrays = both_ways(monkeypatch, variant, mx.float32, rank, routed)
    assert len(arrays) == (6 if layout == "separate" else 3) + routed
    assert len(results[0]) == 1 + 3 + bool(experts) + len(arrays)
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * np.abs(np.array(want)).max())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_operation_in_half_precision(monkeypatch, dtype):
    """Gradients have the dtypes of their arrays, and agree with the reference within a few ulp."""
    results, arrays = both_ways(monkeypatch, full(ACTIVATIONS["silu"]), dtype, 4, routed=True)
    got, want = results
    assert [a.dtype for a in got[-len(arrays) :]] == [a.dtype for a in arrays]
    assert [a.dtype for a in got] == [a.dtype for a in want]
    for mine, theirs in zip(got, want, strict=True):
        mine, theirs = float64(mine), float64(theirs)
        assert np.abs(mine - theirs).max() <= 8 * HALF_ULP[dtype] * np.abs(theirs).max()


def test_operation_under_checkpoint_and_accumulation(monkeypatch):
    """Accumulate two parts of the rows, both recomputed. An emulated kernel cannot run under mx.compile."""

    def accumulated(run):
        def run_parts(variant, projections, weights):
            parts = []
            for rows in (slice(0, 40), slice(40, None)):
                cut = tuple(p._replace(base=p.base[rows], low=p.low[rows]) for p in projections)
                arrays = [a for p in cut for a in (p.base, *p.lora_arrays)]

                def part(*arrays, cut=cut, rows=rows):
                    new = tuple(
                        selfcheck.replace_arrays(p, arrays[3 * i : 3 * i + 3]) for i, p in enumerate(cut)
                    )
                    h, sums = run(variant, new, weights[rows])
                    return [h, *sums]

                parts.append(mx.checkpoint(part)(*arrays))
            h, *sums = ([a, b] for a, b in zip(*parts, strict=True))
            return mx.concatenate(h), [a + b for a, b in sums]

        return run_parts

    results, _ = both_ways(monkeypatch, full(ACTIVATIONS["silu"]), mx.float32, 4, False, accumulated)
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * np.abs(np.array(want)).max())


def test_no_statistics_without_weights(monkeypatch):
    variant = full(ACTIVATIONS["silu"])
    projections, _, _ = selfcheck.example_inputs(variant, mx.float32, mx.float32, 4, 12)
    monkeypatch.setattr(backend, "backend", lambda: "metal")
    keys = {backend.kernel_key("metal", one, projections) for one in (variant, variant.without_statistics)}
    monkeypatch.setattr(backend, "verified", keys)
    h, statistics = gated_residual.gated_residual(variant, projections)
    assert statistics == {}
    assert not mx.isnan(h).any()


@pytest.fixture
def unchecked(monkeypatch):
    """Pretend there is a Metal device, with no kernels checked; return verified kernels and disabled backends."""
    monkeypatch.setattr(backend, "backend", lambda: "metal")
    for name in ("verified", "disabled_backends"):
        monkeypatch.setattr(backend, name, set())
    return backend.verified, backend.disabled_backends


def test_self_check_accepts_correct_kernels(unchecked):
    variant = replace(full(ACTIVATIONS["silu"]), diagnose=False)
    for dtype in (mx.float32, mx.bfloat16):
        selfcheck.verify_kernels(variant, dtype, dtype, 4)
    verified, disabled = unchecked
    # With statistics, diagnosed, and without; low-rank product inside and outside; two dtypes.
    assert len(verified) == 12
    assert not disabled


@pytest.mark.filterwarnings("error")
def test_self_check_warns_once_about_wrong_kernels(monkeypatch, unchecked):
    variant = replace(full(ACTIVATIONS["silu"]), diagnose=False)
    right = fused.backward
    monkeypatch.setattr(fused, "backward", lambda *a: tuple(1.001 * d for d in right(*a)))
    with pytest.warns(
        UserWarning, match="silu in .*float32 failed its self-check: a result is off by"
    ) as warned:
        selfcheck.verify_kernels(variant, mx.float32, mx.float32, 4)
    assert len(warned) == 1
    # A second warning would be an error here.
    selfcheck.verify_kernels(full(ACTIVATIONS["gelu"]), mx.float32, mx.float32, 4)
    assert unchecked == (set(), {"metal"})


def test_self_check_rejects_kernels_that_do_not_run(monkeypatch, unchecked):
    def broken(*_):
        raise RuntimeError("[metal::Device] Unable to build metal library\nmore")

    monkeypatch.setattr(fused, "forward", broken)
    with pytest.warns(UserWarning, match=r"does not run \(\[metal::Device\] Unable to build metal library\)"):
        selfcheck.verify_kernels(Variant(ACTIVATIONS["silu"]), mx.float32, mx.float32, 4)
    assert unchecked[1] == {"metal"}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_self_check_detects_inexact_sums_in_every_dtype(monkeypatch, dtype):
    key = KernelKey("metal", full(ACTIVATIONS["silu"]), dtype, dtype, 4)
    assert selfcheck.find_error(key) is None
    right = fused.forward
    monkeypatch.setattr(fused, "forward", lambda *a: (right(*a)[0], 1.0001 * right(*a)[1]))
    assert "a result is off by 1.0e-04" in selfcheck.find_error(key)


def test_self_check_tolerates_tf32(monkeypatch):
    """Matrix products may round their inputs to eleven bits, but gradients of the wrong dtype are detected."""

    def to_tf32(a):
        return (a.view(mx.uint32) & 0xFFFFE000).view(mx.float32)

    class TF32LowRank(LowRank):
        def _add(self, base, low, b, *routed):
            return super()._add(base, to_tf32(low), to_tf32(b), *routed)

        def gradients(self, arrays, dy, scale):
            return super().gradients(tuple(map(to_tf32, arrays)), to_tf32(dy), scale)

    key = KernelKey("metal", full(ACTIVATIONS["silu"]), mx.float32, mx.float32, 4)
    right = selfcheck.run_kernel

    def with_tf32(backend, variant, projections, weights):
        new = tuple(TF32LowRank(*p) for p in projections)
        return right(backend, variant, new, weights)

    monkeypatch.setattr(selfcheck, "run_kernel", with_tf32)
    assert selfcheck.find_error(key) is None
    assert selfcheck.find_error(key._replace(low_dtype=None, rank=0)) is None
    monkeypatch.setattr(
        TF32LowRank, "gradients", lambda s, *a: tuple(g.astype(mx.float16) for g in LowRank.gradients(s, *a))
    )
    assert "float16 instead of mlx.core.float32" in selfcheck.find_error(key)


class Page:
    """Collects the lines of doctor's page."""

    def __init__(self):
        self.lines = []

    def add(self, text):
        self.lines.append(text)

    note = ok = failure = add

    def working(self, _):
        return nullcontext()


@pytest.fixture
def small_diagnostics(monkeypatch):
    """Doctor's checks of kernels, for a Metal device and with small arrays in the bandwidth test."""
    from nalora_mlx.ops.kernels import healthcheck

    monkeypatch.setattr(backend, "backend", lambda: "metal")
    monkeypatch.setattr(healthcheck, "ROWS", 16)
    monkeypatch.setattr(healthcheck, "FEATURES", 16)
    return healthcheck


def doctor_lines():
    from nalora_mlx.doctor.machine import check_kernels

    check_kernels(page := Page(), few=False)
    return page.lines


def test_doctor_reports_wrong_kernels(monkeypatch, small_diagnostics):
    wrong = "a result is off by 1.0e-01 of the largest value"
    errors = {}
    monkeypatch.setattr(small_diagnostics, "find_error", lambda key: errors.get(key.variant.activation.name))
    lines = doctor_lines()
    assert "gated residual: 72 of 72 metal kernels agree with MLX" in lines
    assert any("of a copy" in line for line in lines)
    errors["relu"] = wrong
    lines = doctor_lines()
    assert "gated residual: 63 of 72 metal kernels agree with MLX" in lines
    assert any(f"of relu, mlx.core.bfloat16, rank 8 is not used, since {wrong}" in line for line in lines)


@pytest.mark.slow
def test_doctor_checks_every_kernel(monkeypatch, small_diagnostics):
    """With correct kernels, and with the kernels of one activation wrong."""
    monkeypatch.setattr(small_diagnostics, "DTYPES", (mx.bfloat16,))
    monkeypatch.setattr(small_diagnostics, "RANKS", (8,))
    product = mx.gather_mm  # supports only float32 on a CPU

    def in_float32(a, b, **where):
        return product(a.astype(mx.float32), b.astype(mx.float32), **where).astype(a.dtype)

    monkeypatch.setattr(mx, "gather_mm", in_float32)
    assert "gated residual: 24 of 24 metal kernels agree with MLX" in doctor_lines()
    right = fused.backward
    monkeypatch.setattr(
        fused,
        "backward",
        lambda b, variant, *a: (
            (mx.zeros((1,)),) * 2 if variant.activation.name == "relu" else right(b, variant, *a)
        ),
    )
    assert "gated residual: 23 of 24 metal kernels agree with MLX" in doctor_lines()
