"""The selective scan in chunks against a loop over tokens in float64, and against mlx-lm's layers."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import jamba, mamba

from nalora_mlx.ops import fast_math
from nalora_mlx.ops.recurrence.selective_scan import selective_scan
from tests.conftest import set_sizes

torch = pytest.importorskip("torch", reason="needs PyTorch: see CONTRIBUTING.md")

E, N = 6, 4
NAMES = ("y", "last state", "dx", "ddelta", "dA", "dB", "dC", "dD", "dstate")


def make_inputs(batch=2, T=70, seed=0):
    """Return x, delta, A, B, C, D and the state: float32 numbers in float64."""
    random = np.random.default_rng(seed)
    arrays = [
        random.normal(size=(batch, T, E)),
        random.exponential(0.3, size=(batch, T, E)),
        -np.exp(2 * random.normal(size=(E, N))),
        random.normal(size=(batch, T, N)),
        random.normal(size=(batch, T, N)),
        random.normal(size=E),
        random.normal(size=(batch, E, N)),
    ]
    return [x.astype(np.float32).astype(np.float64) for x in arrays]


def weights(inputs):
    """Return the gradients of the outputs and of the last state; they are exact in bfloat16."""
    random = np.random.default_rng(1)
    return [np.round(8 * random.normal(size=x.shape)) / 8 for x in (inputs[0], inputs[6])]


def loop(x, delta, A, B, C, D, state, starts=None):
    outputs = []
    for t in range(x.shape[1]):
        state = state * torch.exp(delta[:, t, :, None] * A)
        if starts is not None:
            state = torch.where(starts[:, t, None, None], 0, state)
        state = state + (delta[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1) + D * x[:, t])
    return torch.stack(outputs, 1), state


def exact(inputs, starts=None):
    """Return the outputs, the last state and all gradients in float64."""
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    outputs = loop(*tensors, None if starts is None else torch.tensor(starts))
    loss = sum((x * torch.tensor(w)).sum() for x, w in zip(outputs, weights(inputs), strict=True))
    return [x.detach().numpy() for x in (*outputs, *torch.autograd.grad(loss, tensors))]


def computed(inputs, starts=None, dtype=mx.float32, wrap=lambda f: f, recompute=False):
    """Return the same arrays, as the scan in chunks computes them from x, delta, B and C of a dtype."""
    arrays = [mx.array(x.astype(np.float32)) for x in inputs]
    arrays = [x.astype(dtype) if i in (0, 1, 3, 4) else x for i, x in enumerate(arrays)]
    starts = None if starts is None else mx.array(starts)
    scale = [mx.array(w.astype(np.float32)) for w in weights(inputs)]

    def scan(*arrays):
        return selective_scan(*arrays, starts=starts)

    def loss(*arrays):
        outputs = (mx.checkpoint(scan) if recompute else scan)(*arrays)
        return sum((x * w).sum() for x, w in zip(outputs, scale, strict=True)), outputs

    (_, outputs), gradients = wrap(mx.value_and_grad(loss, argnums=tuple(range(7))))(*arrays)
    return [*outputs, *gradients]


def assert_equal(got, want, tolerance=1e-5, names=NAMES):
    for name, a, b in zip(names, got, want, strict=True):
        a, b = (np.array(x.astype(mx.float32)) if isinstance(x, mx.array) else x for x in (a, b))
        scale = max(np.abs(b).max(), 1e-30)
        assert a.shape == b.shape, name
        assert np.abs(a - b).max() <= tolerance * scale, f"{name}: {np.abs(a - b).max() / scale:.1e}"


@pytest.fixture(params=["one group", "groups", "short groups"])
def groups(request, monkeypatch):
    """Let a group have all tokens, 50 of two rows, or 3."""
    elements = {"groups": 100 * E * N, "short groups": 6 * E * N}
    if request.param in elements:
        set_sizes(monkeypatch, scan_elements=elements[request.param])


@pytest.mark.parametrize("T", [1, 7, 63, 64, 65])
def test_scan_equals_loop_in_float64(T, groups):
    inputs = make_inputs(T=T)
    assert_equal(computed(inputs), exact(inputs))


def test_long_sequence_equals_loop_in_float64(monkeypatch):
    set_sizes(monkeypatch, scan_elements=600 * E * N)
    inputs = make_inputs(T=1000)
    assert_equal(computed(inputs), exact(inputs))


def test_slow_decays_keep_their_accuracy_with_vectorized_functions():
    """An error of 1e-7 in each decay would be 1e-4 in a state that is the sum of 2000 tokens."""
    inputs = make_inputs(batch=1, T=2000)
    inputs[1] *= 1e-3
    inputs[2] = np.maximum(inputs[2], -1)
    with fast_math.vectorized():
        got = computed(inputs, wrap=mx.compile)
    assert_equal(got, exact(inputs))


@pytest.mark.parametrize("decays", ["none", "underflow", "mixed"])
@pytest.mark.parametrize("vectorized", [False, True])
def test_extreme_decays(decays, vectorized, groups):
    inputs = make_inputs(T=130)
    delta = inputs[1]
    values = {"none": [0.0], "underflow": [1e3], "mixed": [0.0, 1e3, 1e8, 50.0, 5.0, 1e-3]}[decays]
    delta[:] = np.random.default_rng(2).choice(np.float32(values), size=delta.shape)
    inputs[0] /= np.maximum(delta, 1)  # inputs of a like size
    inputs = [x.astype(np.float32).astype(np.float64) for x in inputs]
    if vectorized:
        with fast_math.vectorized():
            got = computed(inputs)
    else:
        got = computed(inputs)
    assert_equal(got, exact(inputs))


def test_rates_of_zero():
    inputs = make_inputs()
    inputs[2][:, ::2] = -0.0
    starts = np.zeros((2, 70), bool)
    starts[0, [0, 33, 34]] = starts[1, 16] = True
    assert_equal(computed(inputs), exact(inputs))
    assert_equal(computed(inputs, starts), exact(inputs, starts))


def test_half_precision_inputs_keep_a_state_in_float32(groups):
    inputs = make_inputs(T=130)
    for i in (0, 1, 3, 4):
        inputs[i] = np.array(mx.array(inputs[i]).astype(mx.bfloat16).astype(mx.float32)).astype(np.float64)
    half = {"y", "dx", "ddelta", "dB", "dC"}
    for name, a, b in zip(NAMES, computed(inputs, dtype=mx.bfloat16), exact(inputs), strict=True):
        assert a.dtype == (mx.bfloat16 if name in half else mx.float32), name
        assert_equal([a], [b], 2**-8 if name in half else 1e-5, [name])


def test_starts_equal_the_loop(groups):
    inputs = make_inputs(T=100)
    starts = np.random.default_rng(3).uniform(size=(2, 100)) < 0.08
    inputs[1][starts] = 0  # the state is dropped although the token's own step is 0
    assert_equal(computed(inputs, starts), exact(inputs, starts))


def test_packed_rows_equal_rows_alone(groups):
    lengths = 5, 41, 1, 1, 53
    inputs = make_inputs(batch=1, T=sum(lengths))
    ends = np.cumsum(lengths)
    starts = np.zeros((1, sum(lengths)), bool)
    starts[:, [0, *ends[:-1]]] = True
    x, delta, A, B, C, D, _ = (mx.array(x.astype(np.float32)) for x in inputs)
    dy = mx.array(weights(inputs)[0].astype(np.float32))
    sequences = [x, delta, B, C]

    def results(arrays, dy, starts=None):
        def outputs(x, delta, B, C):
            return selective_scan(x, delta, A, B, C, D, starts=starts)[:1]

        y, gradients = mx.vjp(outputs, arrays, [dy])
        return [*y, *gradients]

    packed = results(sequences, dy, mx.array(starts))
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        alone = results([z[:, start:end] for z in sequences], dy[:, start:end])
        names = ("y", "dx", "ddelta", "dB", "dC")
        assert_equal([z[:, start:end] for z in packed], alone, 2e-6, names)


def test_no_gradient_crosses_a_start(groups):
    inputs = [mx.array(x.astype(np.float32)) for x in make_inputs(batch=1, T=50)]
    starts = mx.arange(50)[None] == 30

    def later_outputs(x, delta, B, C, state):
        return selective_scan(x, delta, inputs[2], B, C, inputs[5], state, starts)[0][:, 30:].sum()

    gradients = mx.grad(later_outputs, argnums=(0, 1, 2, 3, 4))(*(inputs[i] for i in (0, 1, 3, 4, 6)))
    for gradient in gradients[:4]:
        assert mx.abs(gradient[:, :30]).max().item() == 0
        assert mx.abs(gradient[:, 30:]).min().item() > 0
    assert mx.abs(gradients[4]).max().item() == 0


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_and_checkpointed(compiled, recompute, monkeypatch):
    set_sizes(monkeypatch, scan_elements=32 * E * N)
    inputs = make_inputs(T=40)
    starts = np.random.default_rng(3).uniform(size=(2, 40)) < 0.08
    got = computed(inputs, starts, wrap=mx.compile if compiled else lambda f: f, recompute=recompute)
    assert_equal(got, exact(inputs, starts))


def test_state_and_skip_connection_are_optional():
    x, delta, A, B, C, D, state = (mx.array(x.astype(np.float32)) for x in make_inputs())
    got = selective_scan(x, delta, A, B, C)
    assert_equal(got, selective_scan(x, delta, A, B, C, mx.zeros_like(D), mx.zeros_like(state)), 0, NAMES[:2])


def mamba_layer():
    args = mamba.ModelArgs(
        model_type="mamba", vocab_size=8, hidden_size=8, intermediate_size=16, state_size=N, num_hidden_layers=1,
        conv_kernel=4, use_bias=False, use_conv_bias=True, time_step_rank=3,
    )  # fmt: skip
    layer = mamba.MambaBlock(args)

    def steps(x, A, state):
        outputs = []
        for t in range(x.shape[1]):
            y, state = layer.ssm_step(x[:, t], A, state)
            outputs.append(y)
        return mx.stack(outputs, axis=1), state

    return layer, steps, (lambda x: x,) * 3


def jamba_layer():
    args = jamba.ModelArgs(
        model_type="jamba", hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2,
        mamba_d_conv=4, mamba_d_state=N, mamba_expand=2, num_experts=1, num_experts_per_tok=1, rms_norm_eps=1e-6,
        max_position_embeddings=64, vocab_size=8, mamba_dt_rank=3,
    )  # fmt: skip
    layer = jamba.JambaMambaMixer(args)
    return layer, layer.ssm_step, (layer.dt_layernorm, layer.b_layernorm, layer.c_layernorm)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("make_layer", [mamba_layer, jamba_layer])
def test_layers_of_mlx_lm(make_layer, with_state):
    mx.random.seed(0)
    layer, steps, norms = make_layer()
    layer.D = mx.random.normal(layer.D.shape)
    A = -mx.exp(layer.A_log)
    x = mx.random.normal((2, 30, 16))
    state = mx.random.normal((2, 16, N)) if with_state else None
    delta, B, C = (
        norm(part) for norm, part in zip(norms, mx.split(layer.x_proj(x), [3, 3 + N], axis=-1), strict=True)
    )
    delta = nn.softplus(layer.dt_proj(delta))
    got = selective_scan(x, delta, A, B, C, layer.D, state)
    assert_equal(got, steps(x, A, state), 2e-6, NAMES[:2])


def test_the_graph_grows_by_less_than_one_node_per_token(tmp_path):
    def nodes(T):
        inputs = make_inputs(1, T)
        mx.export_to_dot(str(tmp_path / "graph.dot"), *computed(inputs))
        return (tmp_path / "graph.dot").read_text().count("shape=rectangle")

    assert nodes(4096) - nodes(2048) < 2048


def test_memory_grows_by_inputs_and_gradients_only(monkeypatch):
    """The states of all tokens would be as large as 16 inputs."""
    set_sizes(monkeypatch, scan_elements=64 * 256 * 16)

    def peak(T):
        mx.random.seed(0)
        x, delta, dy = (mx.random.uniform(shape=(1, T, 256)) for _ in range(3))
        B, C = (mx.random.normal((1, T, 16)) for _ in range(2))
        A = -mx.ones((256, 16))
        mx.eval(x, delta, dy, B, C, A)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.vjp(lambda *arrays: selective_scan(*arrays)[0], [x, delta, A, B, C], [dy]))
        return mx.get_peak_memory() - before

    assert peak(2048) - peak(1024) < 6 * (1024 * 256 * 4)
