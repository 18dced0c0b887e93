"""The gated residual without kernels: accuracy, chunks, MLX's transformations, memory, and the choice of kernels."""

import importlib
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.activations import swiglu
from mlx_lm.tuner.lora import LoRALinear

from nalora_mlx import NALoRAConfig, adapt
from nalora_mlx.core.errors import InputError
from nalora_mlx.ops.activations import ACTIVATIONS
from nalora_mlx.ops.kernels import backend, selfcheck
from nalora_mlx.ops.kernels.fused import GATE_UP_LAYOUTS, Variant
from nalora_mlx.ops.kernels.gated_residual import gated_residual
from nalora_mlx.ops.kernels.low_rank import LowRank
from tests.conftest import build_model, set_sizes
from tests.float64_reference import FAMILIES, TRUTH

PHI = {name: (row, TRUTH[name][0], lambda u: u) for name, row in ACTIVATIONS.items()} | FAMILIES


def make_inputs(variant, rows=37, features=12, rank=4, dtype=mx.float32):
    """Return projections, row weights with padding, and a gradient of h."""
    low_dtype = mx.float32 if dtype == mx.float16 else dtype
    projections, _, _ = selfcheck.example_inputs(variant, dtype, low_dtype, rank, features)
    cut = [p._replace(base=p.base[:rows], low=p.low[:rows]) for p in projections]
    if variant.experts:
        cut = [p._replace(experts=p.experts[:rows]) for p in cut]
    weights = (mx.arange(rows) % 4 != 1).astype(mx.float32)
    return tuple(cut), weights, mx.random.normal((rows, features), key=mx.random.key(5)).astype(dtype)


def as_function(variant, projections, weights):
    """Return the operation as a function of its differentiable arrays, and these arrays."""
    arrays = [a for p in projections for a in (p.base, *p.lora_arrays)]

    def run(*arrays):
        remaining = iter(arrays)
        new = (
            selfcheck.replace_arrays(p, [next(remaining) for _ in (p.base, *p.lora_arrays)])
            for p in projections
        )
        return gated_residual(variant, tuple(new), weights)

    return run, arrays


def numeric_gradient(f, arrays, index, entries, step=1e-6):
    """Return central differences of a float64 scalar function at some entries of one array."""
    found = []
    for entry in entries:
        moved = [a.copy() for a in arrays]
        moved[index].flat[entry] += step
        high = f(*moved)
        moved[index].flat[entry] -= 2 * step
        found.append((high - f(*moved)) / (2 * step))
    return np.array(found)


@pytest.mark.parametrize("chunk", [1, 1 << 20], ids=["chunks", "whole"])
@pytest.mark.parametrize("name", sorted(PHI))
def test_value_and_gradients_match_float64(monkeypatch, name, chunk):
    set_sizes(monkeypatch, chunk_bytes=chunk * 4 * 12 * 5)  # five rows at a time
    row, phi, up = PHI[name]
    variant = Variant(row, statistic="derivative")
    projections, weights, dh = make_inputs(variant)
    run, arrays = as_function(variant, projections, weights)
    dh64 = np.array(dh).astype(np.float64)

    def exact(g0, ag, bg, u0, au, bu):
        return phi(g0 + 0.5 * ag @ bg) * up(u0 + 0.5 * au @ bu)

    exact_arrays = [np.array(a).astype(np.float64) for a in arrays]
    want = exact(*exact_arrays)
    (h, found) = mx.vjp(lambda *a: run(*a)[0], arrays, [dh])
    np.testing.assert_allclose(np.array(h[0]), want, rtol=2e-5, atol=1e-5)
    for index, gradient in enumerate(found):
        entries = range(0, exact_arrays[index].size, max(1, exact_arrays[index].size // 9))
        numeric = numeric_gradient(lambda *a: (exact(*a) * dh64).sum(), exact_arrays, index, entries)
        scale = np.abs(np.array(gradient)).max()
        np.testing.assert_allclose(
            np.array(gradient).flat[list(entries)], numeric, rtol=1e-4, atol=2e-5 * scale
        )


def exact_projections(variant, projections):
    """Return z0, z and u in float64, [N, F]."""
    found = []
    for p in projections:
        base, low, b = (np.array(a).astype(np.float64) for a in (p.base, p.low, p.b))
        base, low = base.reshape(len(base), -1), low.reshape(len(low), -1)
        product = low @ b if p.experts is None else np.einsum("nr,nfr->nf", low, b[np.array(p.experts)])
        found.append((base, base + p.scale * product))
    if variant.gate_up_layout == "separate":
        return found[0][0], found[0][1], found[1][1]
    (base, y) = found[0]
    (z0, _), (z, u) = np.split(base, 2, axis=-1), np.split(y, 2, axis=-1)
    if variant.gate_up_layout == "up first":
        return np.split(base, 2, axis=-1)[1], u, z
    return z0, z, u


@pytest.mark.parametrize("statistic", ["derivative", "sensitivity"])
@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("layout", GATE_UP_LAYOUTS)
@pytest.mark.parametrize("name", ["silu", "gelu", "relu"])
def test_statistics_match_float64(name, layout, experts, statistic):
    """Sums agree within a few ulp, counts exactly."""
    row, (_, slope, selection, _) = ACTIVATIONS[name], TRUTH[name]
    variant = Variant(row, layout, statistic, row.boundaries, diagnose=True, experts=experts)
    projections, weights, _ = make_inputs(variant)
    run, arrays = as_function(variant, projections, weights)
    _, statistics = run(*arrays)
    z0, z, u = exact_projections(variant, projections)
    w = np.array(weights).astype(np.float64)[:, None]

    def total(array):
        if not experts:
            return (w * array).sum(axis=0)
        chosen = np.array(projections[0].experts)
        return np.stack([(w * array)[chosen == e].sum(axis=0) for e in range(experts)])

    def close(got, want):
        ulp = 2.0**-23 * np.abs(want).max()
        np.testing.assert_allclose(np.array(got), want, rtol=0, atol=8 * ulp)

    close(statistics["responsiveness"], total(np.abs(slope(z) * (u if statistic == "sensitivity" else 1))))
    above = np.stack([total((z >= b if row.left_closed else z > b) * 1.0) for b in row.boundaries])
    np.testing.assert_array_equal(np.array(statistics["above_boundary"]), above)
    feature, selected = (z - z0) * selection(z0) * u, z * (selection(z) - selection(z0)) * u
    close(statistics["misalignment"][0], (w * np.abs(feature)).sum())
    close(statistics["misalignment"][1], (w * np.abs(selected)).sum())
    if experts:
        np.testing.assert_array_equal(np.array(statistics["tokens"]), total(np.ones((len(z), 1)))[:, 0])


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_float32_errors_are_a_few_ulp(name):
    """Check h and all gradients, relative to the terms that each is a sum of."""
    variant = Variant(ACTIVATIONS[name])
    phi, slope, *_ = TRUTH[name]
    projections, weights, dh = make_inputs(variant)
    run, arrays = as_function(variant, projections, weights)
    (h,), (dg0, dag, dbg, du0, dau, dbu) = mx.vjp(lambda *a: run(*a)[0], arrays, [dh])
    _, z, u = exact_projections(variant, projections)
    g, (ag, bg), (au, bu) = (
        np.array(dh).astype(np.float64),
        *((np.array(p.low).astype(np.float64), np.array(p.b).astype(np.float64)) for p in projections),
    )
    dz, du = g * u * slope(z), g * phi(z)
    size_z, size_u = np.abs(g * u) * (np.abs(slope(z)) + np.abs(z) + 0.5), np.abs(g) * (np.abs(z) + 0.3)

    def close(got, want, size, ulps):
        assert (np.abs(np.array(got) - want) <= ulps * 2.0**-23 * size + 1e-30).all()

    close(h, phi(z) * u, np.abs(u) * (np.abs(z) + 0.3), 6)
    close(dg0, dz, size_z, 6)
    close(du0, du, size_u, 6)
    for da, db, a, b, d, size in ((dag, dbg, ag, bg, dz, size_z), (dau, dbu, au, bu, du, size_u)):
        close(da, 0.5 * d @ b.T, 0.5 * size @ np.abs(b).T, 12)
        close(db, 0.5 * a.T @ d, 0.5 * np.abs(a).T @ size, 12)


def test_no_statistics_without_weights():
    row = ACTIVATIONS["silu"]
    variant = Variant(row, statistic="derivative", boundaries=row.boundaries, diagnose=True)
    projections, _, _ = make_inputs(variant)
    h, statistics = gated_residual(variant, projections)
    assert statistics == {}
    assert mx.array_equal(h, gated_residual(variant.without_statistics, projections)[0])


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("layout", GATE_UP_LAYOUTS)
def test_chunked_results_are_the_same(monkeypatch, layout, experts):
    row = ACTIVATIONS["silu"]
    variant = Variant(row, layout, "sensitivity", row.boundaries, diagnose=True, experts=experts)
    projections, weights, dh = make_inputs(variant)
    if experts:
        dh = dh[:, None]
    run, arrays = as_function(variant, projections, weights)
    results = []
    for size in (1 << 20, 4 * 12 * 5):
        set_sizes(monkeypatch, chunk_bytes=size)
        h, statistics = run(*arrays)
        gradients = mx.vjp(lambda *a: run(*a)[0], arrays, [dh])[1]
        results.append([h, *(statistics[name] for name in sorted(statistics)), *gradients])
    assert len(results[0]) == 1 + (4 if experts else 3) + len(arrays)
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(np.array(want)).max())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("precise", [True, False])
def test_gradients_have_the_dtypes_of_their_arrays(dtype, precise):
    variant = Variant(ACTIVATIONS["silu"], precise=precise)
    projections, weights, dh = make_inputs(variant, dtype=dtype)
    run, arrays = as_function(variant, projections, weights)
    h, gradients = mx.vjp(lambda *a: run(*a)[0], arrays, [dh])
    assert h[0].dtype == dtype
    assert [g.dtype for g in gradients] == [a.dtype for a in arrays]
    exact = replace(variant, precise=True)
    run, floats = as_function(exact, projections, weights)
    floats = [a.astype(mx.float32) for a in floats]
    h32, gradients32 = mx.vjp(lambda *a: run(*a)[0], floats, [dh.astype(mx.float32)])
    ulp = 2.0**-10 if dtype == mx.float16 else 2.0**-7
    for got, want in zip([*h, *gradients], [*h32, *gradients32], strict=True):
        got, want = np.array(got.astype(mx.float32)), np.array(want)
        assert np.abs(got - want).max() <= 6 * ulp * np.abs(want).max()


class MLP(nn.Module):
    def __init__(self, dims, features):
        super().__init__()
        self.gate_proj = nn.Linear(dims, features, bias=False)
        self.up_proj = nn.Linear(dims, features, bias=False)
        self.down_proj = nn.Linear(features, dims, bias=False)

    def __call__(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Model(nn.Module):
    def __init__(self, dims, features):
        super().__init__()
        self.layers = [MLP(dims, features)]

    def __call__(self, x):
        return self.layers[0](x)


def build(dims=24, features=40, rank=4, theirs=False):
    mx.random.seed(0)
    model = Model(dims, features)
    if theirs:
        model.freeze()
        for name in ("gate_proj", "up_proj", "down_proj"):
            mlp = model.layers[0]
            mlp[name] = LoRALinear.from_base(mlp[name], r=rank, scale=2.0)
    else:
        adapt(model, NALoRAConfig(rank=rank, scale=2.0, num_layers=-1))
    rng = np.random.default_rng(0)
    for _, module in model.named_modules():
        if "lora_b" in module:
            for name in ("lora_a", "lora_b"):
                module[name] = mx.array(0.1 * rng.standard_normal(module[name].shape).astype(np.float32))
    mx.eval(model.parameters())
    return model


def loss_of(model, forward):
    def loss(parameters, x, dy):
        model.update(parameters)
        return (forward(x) * dy).sum()

    return mx.value_and_grad(loss, argnums=(0, 1))


@pytest.mark.parametrize("chunk", [4 * 40 * 3, 1 << 20], ids=["chunks", "whole"])
@pytest.mark.parametrize("way", ["eager", "compiled", "checkpointed", "both"])
def test_gradients_under_compile_and_checkpoint(monkeypatch, way, chunk):
    """Compare gradients of all parameters and of x with mlx-lm's LoRA, eager and without checkpointing."""
    set_sizes(monkeypatch, chunk_bytes=chunk)
    x, dy = mx.random.normal((2, 9, 24)), mx.random.normal((2, 9, 24))
    theirs, ours = build(theirs=True), build()
    want = loss_of(theirs, theirs)(theirs.trainable_parameters(), x, dy)
    forward = ours
    if way in ("checkpointed", "both"):

        def forward(x):
            def inner(parameters, x):
                ours.update(parameters)
                return ours(x)

            return mx.checkpoint(inner)(ours.trainable_parameters(), x)

    f = loss_of(ours, forward)
    if way in ("compiled", "both"):
        f = mx.compile(f)
    got = f(ours.trainable_parameters(), x, dy)
    flat = [dict(nn.utils.tree_flatten(tree)) for tree in (got, want)]
    assert flat[0].keys() == flat[1].keys()
    for name, value in flat[1].items():
        value = np.array(value)
        np.testing.assert_allclose(flat[0][name], value, rtol=1e-5, atol=2e-6 * np.abs(value).max())


def test_less_memory_than_mlx_lm():
    """Compare the peak memory of one compiled forward and backward, above what was in use before."""
    peaks = {}
    x, dy = mx.random.normal((1, 2048, 64)), mx.random.normal((1, 2048, 64))
    for theirs in (True, False):
        model = build(64, 4864, 16, theirs)
        f, parameters = mx.compile(loss_of(model, model)), model.trainable_parameters()
        mx.eval(f(parameters, x, dy))
        found = []
        for _ in range(3):  # the lowest, because MLX runs further ahead on a busy machine
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(f(parameters, x, dy))
            found.append(mx.get_peak_memory() - before)
        peaks[theirs] = min(found)
    assert peaks[False] <= 0.75 * peaks[True]


def test_runs_in_another_thread(monkeypatch):
    """An MLX stream belongs to one thread. Chunks in another thread, as in a server, need their own streams."""
    set_sizes(monkeypatch, chunk_bytes=4 * 12 * 5)
    variant = Variant(ACTIVATIONS["silu"])
    projections, weights, _ = make_inputs(variant)
    want = np.array(gated_residual(variant, projections, weights)[0])
    got = []
    device = mx.default_device()

    def work():
        mx.set_default_device(device)
        got.append(np.array(gated_residual(variant, projections, weights)[0]))

    mx.eval([a for p in projections for a in (p.base, *p.lora_arrays)])
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    np.testing.assert_array_equal(got[0], want)


def test_routed_gradient():
    """`low` gets the whole gradient and `routed` the masked one; the value is added once."""
    rng = np.random.default_rng(0)
    base, low, b, dy = (
        mx.array(rng.standard_normal(s).astype(np.float32)) for s in ((5, 7), (5, 3), (3, 7), (5, 7))
    )
    mask = mx.array((np.arange(7) % 2).astype(np.float32))

    def run(base, low, b, routed):
        return LowRank(base, 0.5, low, b, routed, mask).output()

    (y,), (to_base, to_low, to_b, to_routed) = mx.vjp(run, [base, low, b, low], [dy])
    n = {
        k: np.array(v).astype(np.float64) for k, v in dict(base=base, low=low, b=b, dy=dy, mask=mask).items()
    }
    np.testing.assert_allclose(y, n["base"] + 0.5 * n["low"] @ n["b"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_base, n["dy"])
    np.testing.assert_allclose(to_low, 0.5 * n["dy"] @ n["b"].T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_b, 0.5 * n["low"].T @ n["dy"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_routed, 0.5 * (n["dy"] * n["mask"]) @ n["b"].T, rtol=1e-5, atol=1e-6)


# --- memory traffic ------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return importlib.import_module("benchmark_kernel")


def traffic(benchmark, dtype, rank, name):
    return benchmark.count_traffic(benchmark.Case(896, 4864, 2048, rank, dtype), name)


@pytest.mark.parametrize("name", ["ours", "ours, with statistics", "ours, with route"])
@pytest.mark.parametrize("rank", [8, 16])
def test_bfloat16_traffic_is_at_most_two_fifths_of_mlx_lm(benchmark, rank, name):
    """In bfloat16, with B per tile, sums and small arrays included. mlx-lm computes low-rank products in float32."""
    theirs, ours = (traffic(benchmark, mx.bfloat16, rank, one) for one in ("mlx-lm", name))
    assert ours.bytes <= 0.4 * theirs.bytes
    assert (ours.kept, theirs.kept) == (2, 4)


def test_float32_traffic_in_passes(benchmark):
    """In float32, mlx-lm needs 30 passes over [N, F] and the gated residual 12."""
    a_pass = 2048 * 4864 * 4
    theirs, ours = (traffic(benchmark, mx.float32, 8, one).bytes / a_pass for one in ("mlx-lm", "ours"))
    assert 30 <= theirs < 30.1
    # Plus B once per tile of 64 rows, for two branches, forward and backward, and x A once per 256 channels.
    assert 12 <= ours < 12.1 + 4 * 8 / 64 + 4 * 8 / 256


# --- choice of kernels -------------------------------------------------------------------------------------------


def test_backend_without_a_gpu(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    assert backend.backend() == "reference"
    for choice, message in (
        ("metal", "no such device"),
        ("fastest", "choose from auto, reference, metal, cuda"),
    ):
        monkeypatch.setenv(backend.ENVIRONMENT, choice)
        with pytest.raises(InputError, match=f"NALORA_KERNEL={choice}: .*{message}"):
            backend.backend()


@pytest.fixture
def on_metal(monkeypatch):
    """Pretend that there is a Metal device, with no kernels checked."""
    monkeypatch.setattr(backend, "backend", lambda: "metal")
    for name in ("verified", "disabled_backends", "reported"):
        monkeypatch.setattr(backend, name, set())


def test_only_verified_kernels_are_used(on_metal):
    variant = Variant(ACTIVATIONS["silu"])
    projections, _, _ = make_inputs(variant)
    key = backend.KernelKey("metal", variant, mx.float32, mx.float32, 4)
    assert backend.kernel_key("metal", variant, projections) == key
    with pytest.warns(UserWarning, match="kernel of silu in .*float32 was not checked when") as warned:
        assert [backend.backend_for(variant, projections) for _ in range(3)] == ["reference"] * 3
    assert len(warned) == 1
    backend.verified.add(key)
    assert backend.backend_for(variant, projections) == "metal"
    backend.disabled_backends.add("metal")
    assert backend.backend_for(variant, projections) == "reference"


def test_adapt_verifies_every_kernel_that_the_model_uses(on_metal, monkeypatch):
    monkeypatch.setattr(selfcheck, "find_error", lambda key: None)
    operation = importlib.import_module("nalora_mlx.ops.kernels.gated_residual")
    monkeypatch.setattr(operation, "run_kernel", lambda _, *rest: operation.run_reference(*rest))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(build_model(), NALoRAConfig(rank=4, num_layers=-1))
    assert backend.verified
    assert not backend.reported


def test_kernel_key_of_an_operation():
    variant = Variant(ACTIVATIONS["silu"])
    projections, _, _ = make_inputs(variant)
    wide = tuple(p._replace(low=mx.zeros((37, 17)), b=mx.zeros((17, 12))) for p in projections)
    assert backend.kernel_key("metal", variant, wide) == ("metal", variant, mx.float32, None, 0)
    unsorted = tuple(p._replace(experts=mx.zeros(37, mx.int32), is_sorted=False) for p in projections)
    assert backend.kernel_key("metal", variant, unsorted) is None
    sparse = Variant(FAMILIES["gelu_topk"][0])
    assert backend.kernel_key("metal", sparse, projections) is None


@pytest.mark.parametrize("layout", GATE_UP_LAYOUTS)
def test_no_kernel_for_small_arrays(layout):
    """Metal puts inputs of fewer than eight elements in another address space: bases, and the gradient of h."""
    variant = Variant(ACTIVATIONS["silu"], layout)
    for features, runs in ((7, False), (8, True)):
        width = 2 * features if variant.is_joint else features
        projections = (LowRank(mx.zeros((1, width))),) * (1 if variant.is_joint else 2)
        assert (backend.kernel_key("metal", variant, projections) is not None) == runs


def test_adapt_reports_an_unknown_backend(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "fastest")
    with pytest.raises(InputError, match="NALORA_KERNEL=fastest: choose from"):
        adapt(Model(24, 40), NALoRAConfig(rank=4, scale=2.0, num_layers=-1))


def test_variants_differ_by_activation_constants():
    from nalora_mlx.ops import activation_families

    assert Variant(activation_families.swiglu_oai(1.7, 7.0)) == Variant(
        activation_families.swiglu_oai(1.7, 7.0)
    )
    assert Variant(activation_families.swiglu_oai(1.7, 7.0)) != Variant(
        activation_families.swiglu_oai(1.7, 5.0)
    )
