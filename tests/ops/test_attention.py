"""Chunked attention: accuracy against float64 NumPy, use by models, and memory."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.base import create_causal_mask

from nalora_mlx.adapters.forward_pass import recompute_activations
from nalora_mlx.ops.attention import attention, causal_masks, lean_attention
from nalora_mlx.ops.device_sizes import SIZES
from nalora_mlx.ops.fast_math import vectorized

BLOCK = SIZES["cpu"].attention_queries
MLX_ATTENTION = mx.fast.scaled_dot_product_attention
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def truth(q, k, v, do, scale, mask):
    """Return output and gradients in float64. They are 0 for a query that sees no key."""
    q, k, v, do = (np.array(x.astype(mx.float32), np.float64) for x in (q, k, v, do))
    B, H, Lq, _ = q.shape
    group = H // k.shape[1]
    wide_k, wide_v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    s = scale * q @ wide_k.swapaxes(-1, -2)
    if isinstance(mask, str):
        mask = np.tri(Lq, k.shape[2], k.shape[2] - Lq, dtype=bool)
    visible = np.broadcast_to(True if mask is None else np.array(mask), s.shape)
    s = np.where(visible, s, -np.inf)
    e = np.exp(s - s.max(-1, keepdims=True, initial=-1e9))
    p = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
    dp = do @ wide_v.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale

    def sum_over_group(x):  # the query heads that share a key head
        return x.reshape(B, -1, group, *x.shape[2:]).sum(2)

    return (
        p @ wide_v,
        ds @ wide_k,
        sum_over_group(ds.swapaxes(-1, -2) @ q),
        sum_over_group(p.swapaxes(-1, -2) @ do),
    )


def run(function, q, k, v, do, scale, mask):
    out, gradients = mx.vjp(lambda *qkv: function(*qkv, scale=scale, mask=mask), [q, k, v], [do])
    return [*out, *gradients]


def draw(shape, dtype=mx.float32, seed=0):
    """Return random q, k, v and output gradient for sizes (B, H, K, Lq, Lk, D, E)."""
    B, H, K, Lq, Lk, D, E = shape
    keys = mx.random.split(mx.random.key(seed), 4)
    shapes = (B, H, Lq, D), (B, K, Lk, D), (B, K, Lk, E), (B, H, Lq, E)
    return [mx.random.normal(s, key=key).astype(dtype) for s, key in zip(shapes, keys, strict=True)]


def error(got, want):
    return np.abs(np.array(got.astype(mx.float32)) - want).max() / (np.abs(want).max() + 1e-30)


def distance(got, want):
    return np.linalg.norm(np.array(got.astype(mx.float32)) - want)


def masks(B, H, Lq, Lk):
    """Return masks of every shape that models use, by name."""
    rng = np.random.default_rng(1)
    segments = mx.array(np.sort(rng.integers(0, 3, (B, Lk)), axis=1))
    packed = (segments[:, None, :, None] == segments[:, None, None, :]) & create_causal_mask(Lk)
    random = rng.random((B, H, Lq, Lk)) < 0.5
    random[0, :, Lq // 2] = False  # queries that see no key
    return {
        "none": None,
        "causal": "causal",
        "window": create_causal_mask(Lk, window_size=9)[Lk - Lq :] if Lk >= Lq else mx.array(random[0, 0]),
        "packed": packed[:, :, Lk - Lq :] if Lk >= Lq else mx.array(random[:, :1]),
        "padding": mx.array(rng.random((B, 1, 1, Lk)) < 0.7),
        "every head": mx.array(random),
        "one column": mx.array(random[:, :1, :, :1]),
    }


SHAPES = {
    "one chunk": (2, 2, 2, 17, 17, 8, 8),
    "chunks": (2, 4, 4, 2 * BLOCK + 9, 2 * BLOCK + 9, 8, 8),
    "grouped": (2, 6, 2, BLOCK + 1, BLOCK + 1, 16, 16),
    "one key head, other values": (1, 4, 1, BLOCK + 5, BLOCK + 5, 8, 12),
    "more keys": (1, 4, 2, BLOCK + 3, BLOCK + 50, 8, 8),
    "fewer keys": (1, 4, 2, BLOCK + 50, 40, 8, 8),
    "one query": (2, 2, 1, 1, 30, 8, 8),
}


CASES = [
    pytest.param(shape, mask, fast, marks=() if fast or shape == "chunks" else pytest.mark.slow)
    for fast in (False, True)
    for mask in masks(1, 1, 2, 2)
    for shape in SHAPES
]


@pytest.mark.parametrize(("shape", "mask", "fast"), CASES)
def test_output_and_gradients(shape, mask, fast):
    shape = SHAPES[shape]
    mask = masks(shape[0], shape[1], shape[3], shape[4])[mask]
    arrays = draw(shape)
    want = truth(*arrays, 0.4, mask)
    with vectorized() if fast else mx.stream(mx.cpu):
        got = run(attention, *arrays, 0.4, mask)
        compiled = mx.compile(lambda *arrays: run(attention, *arrays, 0.4, mask))(*arrays)
    for eager, traced, exact in zip(got, compiled, want, strict=True):
        assert eager.shape == exact.shape
        assert error(eager, exact) < 3e-6
        assert error(traced, exact) < 3e-6


@pytest.mark.parametrize("mask", ["window", "packed"])
def test_masks_that_hide_later_keys_skip_them(mask):
    shape = SHAPES["chunks"]
    q, k, v, do = draw(shape)
    mask = masks(shape[0], shape[1], shape[3], shape[4])[mask]
    with causal_masks():
        got = run(attention, q, k, v, do, 0.4, mask)
    for array, exact in zip(got, truth(q, k, v, do, 0.4, mask), strict=True):
        assert error(array, exact) < 3e-6
    k[:, :, -1] = mx.nan  # a key that only the last chunk needs
    assert mx.isnan(attention(q, k, v, scale=0.4, mask=mask)[:, :, 0]).all()
    with causal_masks():
        assert mx.isfinite(attention(q, k, v, scale=0.4, mask=mask)[:, :, 0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["causal", "window"])
def test_errors_are_no_larger_than_those_of_mlx(dtype, mask):
    shape = (2, 6, 2, 130, 130, 32, 32)
    mask = masks(2, 6, 130, 130)[mask]
    arrays = draw(shape, DTYPES[dtype])
    want = truth(*arrays, 32**-0.5, mask)
    with vectorized():
        got, theirs = (run(f, *arrays, 32**-0.5, mask) for f in (attention, MLX_ATTENTION))
    for ours, mlx, exact in zip(got, theirs, want, strict=True):
        assert ours.dtype == DTYPES[dtype]
        assert distance(ours, exact) < 1.2 * distance(mlx, exact)


def test_mixed_dtypes_are_promoted():
    q, k, v, do = draw((1, 2, 2, 20, 20, 8, 8))
    arrays = q, k.astype(mx.bfloat16), v.astype(mx.bfloat16), do
    got, theirs = (run(f, *arrays, 0.3, "causal") for f in (attention, MLX_ATTENTION))
    assert [x.dtype for x in got] == [x.dtype for x in theirs]
    assert got[0].dtype == mx.float32


@pytest.mark.parametrize("largest", [1.0, 1e4, 1e18])
def test_large_scores_and_nan(largest):
    """Scores of any size give finite results, and NaN in an input propagates."""
    q, k, v, do = draw((1, 2, 2, 70, 70, 8, 8))
    q = q * largest
    with vectorized():
        got = run(attention, q, k, v, do, 1.0, "causal")
        assert all(mx.all(mx.isfinite(x)).item() for x in got)
        q[0, 0, 3, 2] = mx.nan
        out = attention(q, k, v, scale=1.0, mask="causal")
    assert mx.all(mx.isnan(out[0, 0, 3])).item()
    assert mx.all(mx.isfinite(out[0, 1])).item()


# --- used by models instead of MLX's ----------------------------------------------------------------------------------


def test_mlx_attention_is_restored():
    with lean_attention():
        first = mx.fast.scaled_dot_product_attention
        assert first is not MLX_ATTENTION
        with pytest.raises(ZeroDivisionError), lean_attention():
            1 / 0  # noqa: B018
        assert mx.fast.scaled_dot_product_attention is first
    assert mx.fast.scaled_dot_product_attention is MLX_ATTENTION


def test_unsupported_calls_go_to_mlx(monkeypatch):
    monkeypatch.setattr("nalora_mlx.ops.attention.attention", None)
    q, k, v, _ = draw((1, 4, 2, 20, 20, 8, 8))
    additive = mx.random.normal((20, 20))
    sinks = mx.random.normal((4,))
    calls = [
        ((q, k, v), {"mask": additive}),
        ((q, k, v), {"mask": "causal", "sinks": sinks}),
        ((q, k, v), {"stream": mx.cpu}),
    ]
    for arrays, arguments in calls:
        want = MLX_ATTENTION(*arrays, scale=0.3, **arguments)
        with lean_attention():
            got = mx.fast.scaled_dot_product_attention(*arrays, scale=0.3, **arguments)
        np.testing.assert_array_equal(np.array(got), np.array(want))
    for arrays, arguments in [
        ((q[0], k[0], v[0]), {}),
        ((q, k, v), {"mask": "triangle"}),
        ((q, k, v[:, :1]), {}),
    ]:
        with lean_attention(), pytest.raises(ValueError, match="scaled_dot_product_attention"):
            mx.fast.scaled_dot_product_attention(*arrays, scale=0.3, **arguments)


def tiny(layers=3, **changes):
    mx.random.seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"rms_norm_eps": 1e-5, "vocab_size": 64, "num_hidden_layers": layers}
    return llama.Model(llama.ModelArgs(model_type="llama", **(sizes | more | changes)))


WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("changes", [{}, WINDOWS], ids=["causal", "windows"])
def test_gradients_of_a_model_stay_the_same(changes, checkpointed):
    tokens = mx.random.randint(0, 64, (2, BLOCK + 30), key=mx.random.key(1))

    def gradients(attend):
        model = tiny(**changes)
        model.model.layers[0].freeze()

        def loss(tokens):
            return mx.mean(nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]))

        step = mx.compile(nn.value_and_grad(model, loss), inputs=model.state, outputs=model.state)
        layers = model.layers if checkpointed else []
        with recompute_activations(layers), vectorized():
            if not attend:
                return dict(tree_flatten(step(tokens)))
            with lean_attention():
                return dict(tree_flatten(step(tokens)))

    want, got = gradients(False), gradients(True)
    assert want.keys() == got.keys()
    assert any("q_proj" in name for name in got)
    for name, array in want.items():
        assert mx.abs(got[name] - array).max() <= 2e-5 * mx.abs(array).max() + 1e-7, name


@pytest.mark.parametrize(
    ("heads", "length", "mask"),
    [(8, 512, "causal"), pytest.param(512, BLOCK, None, marks=pytest.mark.slow)],
)
def test_scores_are_not_stored(heads, length, mask):
    """Peak memory grows by less than one array of scores per layer; with MLX's attention it grows by about one."""
    scores = 4 * heads * length * length

    def grown(attend):
        def peak(layers):
            def loss(x):
                for _ in range(layers):
                    x = x + attend(x, mx.sin(x), x, scale=0.3, mask=mask)
                return mx.sum(x)

            x = mx.random.normal((1, heads, length, 1))  # small compared with the scores
            step = mx.compile(mx.value_and_grad(loss))
            mx.eval(step(x))
            mx.synchronize()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            mx.eval(step(x))
            return mx.get_peak_memory() - before

        # Measured with many layers. With few, the number of operations that MLX starts early still grows.
        return (peak(24) - peak(8)) / 16 / scores

    # Up to three tries, because on a busy machine MLX starts operations before earlier ones free their memory.
    with vectorized():
        assert any(grown(attention) < 0.25 for _ in range(3))
        assert grown(MLX_ATTENTION) > 0.9
