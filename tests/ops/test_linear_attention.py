"""Linear attention in chunks, and Mamba-2 as a case of it, against float64 loops and mlx-lm."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.bailing_moe_linear import recurrent_gla
from mlx_lm.models.ssm import ssm_attn

from nalora_mlx.ops.recurrence import chunks
from nalora_mlx.ops.recurrence.linear_attention import linear_attention, state_space_duality
from tests.conftest import set_sizes

torch = pytest.importorskip("torch", reason="needs PyTorch: see CONTRIBUTING.md")

G, H, DK, DV = 2, 6, 8, 5


def random_inputs(batch, tokens, seed=0):
    """Return q, k, v, log_decay, state, beta as float64."""
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=(batch, tokens, G, DK)),
        rng.normal(size=(batch, tokens, G, DK)),
        rng.normal(size=(batch, tokens, H, DV)),
        -rng.exponential(scale=rng.choice([0.01, 0.3, 5.0], size=(batch, tokens, H))),
        rng.normal(size=(batch, H, DV, DK)),
        rng.uniform(size=(batch, tokens, H)),
    ]


def loop(q, k, v, log_decay, state, beta):
    """Compute the recurrence one token at a time."""
    q, k = (x.repeat_interleave(H // G, dim=2) for x in (q, k))
    outputs = []
    tokens = zip(*(x.unbind(1) for x in (q, k, v, torch.exp(log_decay), beta)), strict=True)
    for q_t, k_t, v_t, decay, beta_t in tokens:
        update = (beta_t[..., None] * v_t)[..., None] * k_t[..., None, :]
        state = decay[..., None, None] * state + update
        outputs.append((state * q_t[..., None, :]).sum(-1))
    return torch.stack(outputs, dim=1), state


def chunked(q, k, v, log_decay, state, beta, starts=None):
    return linear_attention(q, k, v, log_decay, state, starts, beta)


def weights(outputs):
    """Return fixed weights of the outputs in a loss; bfloat16 represents them."""
    return [np.round(64 * np.cos(np.arange(np.prod(y.shape)))).reshape(y.shape) / 64 for y in outputs]


def loop_and_gradients(inputs):
    inputs = [torch.tensor(x, requires_grad=True) for x in inputs]
    outputs = loop(*inputs)
    sum((y * torch.tensor(w)).sum() for y, w in zip(outputs, weights(outputs), strict=True)).backward()
    return [x.detach().numpy() for x in outputs], [x.grad.numpy() for x in inputs]


def outputs_and_gradients(function, inputs, wrap=lambda f: f):
    """Return the outputs of an MLX function, and the gradients of a weighted sum of them."""

    def loss(*inputs):
        outputs = function(*inputs)
        terms = [
            (y * mx.array(w, dtype=mx.float32)).sum() for y, w in zip(outputs, weights(outputs), strict=True)
        ]
        return sum(terms), outputs

    (_, outputs), gradients = wrap(mx.value_and_grad(loss, argnums=tuple(range(len(inputs)))))(*inputs)
    return outputs, gradients


def float32(arrays):
    return [mx.array(x, dtype=mx.float32) for x in arrays]


def assert_close(got, expected, tolerance=1e-5):
    for index, (x, y) in enumerate(zip(got, expected, strict=True)):
        x = np.array(x.astype(mx.float32)) if isinstance(x, mx.array) else x
        y = np.array(y.astype(mx.float32)) if isinstance(y, mx.array) else y
        assert x.shape == y.shape
        assert np.abs(x - y).max() <= tolerance * max(np.abs(y).max(), 1e-30), index


@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65, 1000])
def test_outputs_state_and_gradients_are_those_of_the_loop(tokens, monkeypatch):
    set_sizes(monkeypatch, group_positions=500)  # three groups of 1000 tokens
    inputs = random_inputs(2, tokens)
    expected, expected_gradients = loop_and_gradients(inputs)
    outputs, gradients = outputs_and_gradients(chunked, float32(inputs))
    assert_close(outputs, expected)
    assert_close(gradients, expected_gradients)


def test_extreme_decays(monkeypatch):
    set_sizes(monkeypatch, group_positions=128)
    inputs = random_inputs(1, 300)
    values = [-1e-3, 0.0, -15.0, -88.0, -104.0, -1e30, -np.inf]
    chance = [0.5, 0.3, 0.12, 0.02, 0.02, 0.02, 0.02]
    inputs[3] = np.random.default_rng(1).choice(values, size=inputs[3].shape, p=chance)
    inputs[3][..., 0] = 0  # a head that forgets nothing
    inputs[3][..., 1] = -np.inf  # and one that forgets everything
    expected, expected_gradients = loop_and_gradients(inputs)
    outputs, gradients = outputs_and_gradients(chunked, float32(inputs))
    assert_close(outputs, expected)
    assert_close(gradients, expected_gradients)


def test_a_head_is_as_accurate_beside_others():
    """Errors are relative to the head's own outputs, also where its decays are far from those of other heads."""
    inputs = random_inputs(1, 130)
    inputs[3] = np.broadcast_to([0, -1e-4, -0.1, -3, -30, -90], inputs[3].shape).copy()
    inputs[3][:, 70] = -40
    (expected, _), _ = loop_and_gradients(inputs)
    y = np.array(chunked(*float32(inputs))[0])
    error = np.abs(y - expected).max(axis=(0, 1, 3)) / np.abs(expected).max(axis=(0, 1, 3))
    assert error.max() < 1e-5


def test_bfloat16():
    dtypes = [mx.bfloat16] * 3 + [mx.float32] * 2 + [mx.bfloat16]
    inputs = [x.astype(dtype) for x, dtype in zip(float32(random_inputs(2, 100)), dtypes, strict=True)]
    rounded = [np.array(x.astype(mx.float32)).astype(np.float64) for x in inputs]
    expected, expected_gradients = loop_and_gradients(rounded)
    outputs, gradients = outputs_and_gradients(chunked, inputs)
    assert [y.dtype for y in outputs] == [mx.bfloat16, mx.float32]
    assert [x.dtype for x in gradients] == dtypes
    assert_close(outputs[:1], expected[:1], 2**-8)
    assert_close(outputs[1:], expected[1:])
    for got, exact, dtype in zip(gradients, expected_gradients, dtypes, strict=True):
        assert_close([got], [exact], 2**-8 if dtype == mx.bfloat16 else 1e-5)


def test_packed_rows_are_rows_alone(monkeypatch):
    """Neither outputs nor gradients depend on other rows."""
    set_sizes(monkeypatch, group_positions=128)
    ends = [0, 5, 69, 70, 140, 200]
    q, k, v, log_decay, state, beta = float32(random_inputs(1, ends[-1]))
    starts = mx.array(np.isin(np.arange(ends[-1]), ends))[None]
    arrays = [q, k, v, log_decay, beta]

    def packed(q, k, v, log_decay, beta):
        y, last = chunked(q, k, v, log_decay, state, beta, starts)
        return y[:, begin:end], last

    def alone(q, k, v, log_decay, beta):
        return chunked(q, k, v, log_decay, mx.zeros_like(state), beta)

    for begin, end in pairwise(ends):
        outputs, gradients = outputs_and_gradients(lambda *x: packed(*x)[:1], arrays)
        row = [x[:, begin:end] for x in arrays]
        expected, expected_gradients = outputs_and_gradients(lambda *x: alone(*x)[:1], row)
        assert_close(outputs, expected)
        assert_close([x[:, begin:end] for x in gradients], expected_gradients)
        for x in gradients:
            assert not mx.any(x[:, :begin])
            assert not mx.any(x[:, end:])
    assert_close([packed(*arrays)[1]], [alone(*row)[1]])  # the last state


def test_a_given_state_ends_at_a_start():
    inputs = float32(random_inputs(1, 10))
    starts = mx.arange(10)[None] == 0
    got = chunked(*inputs, starts)
    assert_close(got, chunked(*inputs[:4], None, inputs[5]), 0)


@pytest.mark.parametrize("wrap", [mx.compile, mx.checkpoint], ids=["compiled", "checkpointed"])
def test_compiled_or_checkpointed(wrap, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 2)  # few sizes of blocks, or compiling takes long
    set_sizes(monkeypatch, group_positions=4)
    inputs = float32(random_inputs(1, 7))
    expected, expected_gradients = outputs_and_gradients(chunked, inputs)
    if wrap is mx.compile:
        outputs, gradients = outputs_and_gradients(chunked, inputs, wrap)
    else:
        outputs, gradients = outputs_and_gradients(wrap(chunked), inputs)
    assert_close(outputs, expected, 1e-6)
    assert_close(gradients, expected_gradients, 2e-6)


def test_a_decay_of_each_head_and_no_beta():
    q, k, v, log_decay, state, beta = float32(random_inputs(2, 70))
    constant = log_decay[0, 0]
    got = outputs_and_gradients(lambda q, decay: linear_attention(q, k, v, decay), [q, constant])
    full = lambda q, decay: chunked(  # noqa: E731
        q, k, v, mx.broadcast_to(decay, log_decay.shape), mx.zeros_like(state), mx.ones_like(beta)
    )
    expected = outputs_and_gradients(full, [q, constant])
    assert_close(got[0], expected[0], 0)
    assert_close(got[1], expected[1], 1e-6)


def test_mlx_lm_recurrent_gla():
    rng = np.random.default_rng(0)
    q, k, v = float32(rng.normal(size=(3, 2, H, 70, DK)))
    g, state = float32([-rng.uniform(size=H), rng.normal(size=(2, H, DK, DK))])

    def ours(q, k, v, state):
        q, k, v = (x.swapaxes(1, 2) for x in (q * 0.5, k, v))
        y, state = linear_attention(q, k, v, g, state.swapaxes(-1, -2))
        return y.swapaxes(1, 2), state.swapaxes(-1, -2)

    theirs = lambda q, k, v, state: recurrent_gla(q, k, v, g, 0.5, state)  # noqa: E731
    expected = outputs_and_gradients(theirs, [q, k, v, state])
    got = outputs_and_gradients(ours, [q, k, v, state])
    assert_close(got[0], expected[0])
    assert_close(got[1], expected[1])


def mamba2_inputs(tokens, dtype=mx.float32):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, tokens, H, DV))
    a_log, d, dt_bias = rng.uniform(-1, 2, size=H), rng.normal(size=H), rng.normal(size=H) - 2
    b, c = rng.normal(size=(2, 2, tokens, G, DK))
    arrays = float32([x, a_log, b, c, d, rng.normal(size=(2, tokens, H)), dt_bias])
    return [x.astype(dtype) for x in arrays] + float32([rng.normal(size=(2, H, DV, DK))])


@pytest.mark.parametrize("limits", [(0.001, 100.0), (0.05, 0.2), (0.0, float("inf"))])
def test_mlx_lm_ssm_attn(limits):
    inputs = mamba2_inputs(270)
    expected = outputs_and_gradients(lambda *x: ssm_attn(*x, limits), inputs)
    got = outputs_and_gradients(lambda *x: state_space_duality(*x, limits), inputs)
    assert_close(got[0], expected[0])
    assert_close(got[1], expected[1])


@pytest.mark.parametrize("given", ["mask", "mask and lengths", "lengths"])
def test_mlx_lm_ssm_attn_with_padding(given):
    inputs = mamba2_inputs(70)
    lengths = mx.array([70, 33])
    mask = mx.arange(70) < lengths[:, None]
    if given == "mask":  # without lengths, mlx-lm has padding on the left
        mask = mask[:, ::-1]
    options = {"mask": mask} if given == "mask" else {"mask": mask, "lengths": lengths}
    ours = {"lengths": lengths} if given == "lengths" else options

    def masked(function, options):
        def apply(*inputs):
            y, state = function(*inputs, **options)
            return mx.where(mask[..., None, None], y, 0), state

        return apply

    expected = outputs_and_gradients(masked(ssm_attn, options), inputs)
    got = outputs_and_gradients(masked(state_space_duality, ours), inputs)
    assert_close(got[0], expected[0])
    assert_close(got[1], expected[1])


@pytest.mark.parametrize("kept", [(), (1, 4, 6), (0,)])
def test_dtypes_are_those_of_mlx_lm(kept):
    """Half precision but for some inputs."""
    inputs = mamba2_inputs(9)
    inputs = [x if index in kept else x.astype(mx.bfloat16) for index, x in enumerate(inputs)]
    for state in (inputs[7], None):
        expected = ssm_attn(*inputs[:7], state)
        got = state_space_duality(*inputs[:7], state)
        assert [x.dtype for x in got] == [x.dtype for x in expected]
        assert_close(got, expected, 2e-2)


def test_mamba2_starts_anew_at_packed_rows():
    x, a_log, b, c, d, dt, dt_bias, state = mamba2_inputs(90)
    starts = mx.broadcast_to(mx.arange(90) == 40, (2, 90))
    y, last = state_space_duality(x, a_log, b, c, d, dt, dt_bias, state, starts=starts)
    first, _ = state_space_duality(x[:, :40], a_log, b[:, :40], c[:, :40], d, dt[:, :40], dt_bias, state)
    second = state_space_duality(x[:, 40:], a_log, b[:, 40:], c[:, 40:], d, dt[:, 40:], dt_bias)
    assert_close([y[:, :40], y[:, 40:], last], [first, *second], 1e-6)


def test_the_graph_grows_by_few_nodes_per_token(tmp_path):
    def nodes(tokens):
        inputs = float32(random_inputs(1, tokens))
        mx.eval(inputs)
        mx.export_to_dot(str(tmp_path / "graph.dot"), *outputs_and_gradients(chunked, inputs)[1])
        return (tmp_path / "graph.dot").read_text().count("shape=rectangle")

    assert nodes(4096) - nodes(2048) < 1.5 * 2048
