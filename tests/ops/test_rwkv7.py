"""The recurrence of RWKV-7 in chunks against a float64 loop and mlx-lm."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.rwkv7 import _wkv7_step_ops

from nalora_mlx.ops.recurrence import chunks
from nalora_mlx.ops.recurrence.rwkv7 import rwkv7
from tests.conftest import set_sizes
from tests.ops.test_linear_attention import assert_close, float32, outputs_and_gradients, weights

torch = pytest.importorskip("torch", reason="needs PyTorch: see CONTRIBUTING.md")

H, D = 3, 8


def random_inputs(batch, tokens, seed=0):
    """Return r, log_decay, k, v, a, b, state as float64, with a and b as in the model."""
    rng = np.random.default_rng(seed)
    r, k, v, direction = rng.normal(size=(4, batch, tokens, H, D))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    log_decay = -0.606531 * rng.uniform(size=r.shape)
    return [
        r,
        log_decay,
        k,
        v,
        -direction,
        direction * rng.uniform(size=r.shape),
        rng.normal(size=(batch, H, D, D)),
    ]


def loop_and_gradients(inputs):
    """Compute the recurrence one token at a time."""
    inputs = [torch.tensor(x, requires_grad=True) for x in inputs]
    r, log_decay, k, v, a, b, state = inputs
    outputs = []
    tokens = zip(*(x.unbind(1) for x in (r, torch.exp(log_decay), k, v, a, b)), strict=True)
    for r_t, w_t, k_t, v_t, a_t, b_t in tokens:
        s_a = (state * a_t[..., None, :]).sum(-1, keepdim=True)
        state = state * w_t[..., None, :] + s_a * b_t[..., None, :] + v_t[..., None] * k_t[..., None, :]
        outputs.append((state * r_t[..., None, :]).sum(-1))
    results = [torch.stack(outputs, dim=1), state]
    sum((y * torch.tensor(w)).sum() for y, w in zip(results, weights(results), strict=True)).backward()
    return [x.detach().numpy() for x in results], [x.grad.numpy() for x in inputs]


@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65, 1000])
def test_outputs_state_and_gradients_are_those_of_the_loop(tokens, monkeypatch):
    set_sizes(monkeypatch, group_positions=334)  # several groups of 1000 tokens
    inputs = random_inputs(2, tokens)
    expected, expected_gradients = loop_and_gradients(inputs)
    outputs, gradients = outputs_and_gradients(rwkv7, float32(inputs))
    assert_close(outputs, expected)
    assert_close(gradients, expected_gradients)


def test_extreme_decays(monkeypatch):
    set_sizes(monkeypatch, group_positions=86)
    inputs = random_inputs(1, 300)
    values = [-1e-3, 0.0, -15.0, -88.0, -104.0, -1e30, -np.inf]
    chance = [0.5, 0.3, 0.12, 0.02, 0.02, 0.02, 0.02]
    inputs[1] = np.random.default_rng(1).choice(values, size=inputs[1].shape, p=chance)
    inputs[1][..., 0] = 0  # a channel that forgets nothing
    inputs[1][..., 1] = -np.inf  # and one that forgets everything
    expected, expected_gradients = loop_and_gradients(inputs)
    outputs, gradients = outputs_and_gradients(rwkv7, float32(inputs))
    assert_close(outputs, expected)
    assert_close(gradients, expected_gradients)


def test_states_can_be_overwritten():
    """With b = -a of length 1 and no decay, what the state holds in the direction of a is erased exactly."""
    inputs = random_inputs(1, 130)
    inputs[1][:] = 0
    inputs[5] = -inputs[4]
    expected, expected_gradients = loop_and_gradients(inputs)
    outputs, gradients = outputs_and_gradients(rwkv7, float32(inputs))
    assert_close(outputs, expected)
    assert_close(gradients, expected_gradients)


def test_bfloat16():
    dtypes = [mx.bfloat16, mx.float32, *[mx.bfloat16] * 4, mx.float32]
    inputs = [x.astype(dtype) for x, dtype in zip(float32(random_inputs(2, 100)), dtypes, strict=True)]
    rounded = [np.array(x.astype(mx.float32)).astype(np.float64) for x in inputs]
    expected, expected_gradients = loop_and_gradients(rounded)
    outputs, gradients = outputs_and_gradients(rwkv7, inputs)
    assert [y.dtype for y in outputs] == [mx.bfloat16, mx.float32]
    assert [x.dtype for x in gradients] == dtypes
    assert_close(outputs[:1], expected[:1], 2**-8)
    assert_close(outputs[1:], expected[1:])
    for got, exact, dtype in zip(gradients, expected_gradients, dtypes, strict=True):
        assert_close([got], [exact], 2**-8 if dtype == mx.bfloat16 else 1e-5)


def test_packed_rows_are_rows_alone(monkeypatch):
    """Neither outputs nor gradients depend on other rows."""
    set_sizes(monkeypatch, group_positions=86)
    ends = [0, 5, 69, 70, 140, 200]
    *arrays, state = float32(random_inputs(1, ends[-1]))
    starts = mx.array(np.isin(np.arange(ends[-1]), ends))[None]

    def packed(*arrays):
        y, last = rwkv7(*arrays, state, starts)
        return y[:, begin:end], last

    for begin, end in pairwise(ends):
        outputs, gradients = outputs_and_gradients(lambda *x: packed(*x)[:1], arrays)
        row = [x[:, begin:end] for x in arrays]
        expected, expected_gradients = outputs_and_gradients(lambda *x: rwkv7(*x)[:1], row)
        assert_close(outputs, expected)
        assert_close([x[:, begin:end] for x in gradients], expected_gradients)
        for x in gradients:
            assert not mx.any(x[:, :begin])
            assert not mx.any(x[:, end:])
    assert_close([packed(*arrays)[1]], [rwkv7(*row)[1]])  # the last state


@pytest.mark.parametrize("wrap", [mx.compile, mx.checkpoint], ids=["compiled", "checkpointed"])
def test_compiled_or_checkpointed(wrap, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 2)  # few sizes of blocks, or compiling takes long
    set_sizes(monkeypatch, group_positions=3)
    inputs = float32(random_inputs(1, 7))
    expected, expected_gradients = outputs_and_gradients(rwkv7, inputs)
    if wrap is mx.compile:
        outputs, gradients = outputs_and_gradients(rwkv7, inputs, wrap)
    else:
        outputs, gradients = outputs_and_gradients(wrap(rwkv7), inputs)
    assert_close(outputs, expected, 1e-6)
    assert_close(gradients, expected_gradients, 2e-6)


def test_mlx_lm_step():
    inputs = float32(random_inputs(2, 70))

    def theirs(r, log_decay, k, v, a, b, state):
        outputs = []
        for t in range(r.shape[1]):
            y, state = _wkv7_step_ops(*(x[:, t] for x in (r, mx.exp(log_decay), k, v, a, b)), state)
            outputs.append(y[..., 0])
        return mx.stack(outputs, axis=1), state

    got, expected = theirs(*inputs), rwkv7(*inputs)
    assert_close(got, expected)


def test_the_graph_grows_by_few_nodes_per_token(tmp_path):
    def nodes(tokens):
        inputs = float32(random_inputs(1, tokens))
        mx.eval(inputs)
        mx.export_to_dot(str(tmp_path / "graph.dot"), *outputs_and_gradients(rwkv7, inputs)[1])
        return (tmp_path / "graph.dot").read_text().count("shape=rectangle")

    assert nodes(4096) - nodes(2048) < 2.6 * 2048
