"""The gated delta rule in chunks against a loop over tokens in float64, and the building blocks of such recurrences."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from nalora_mlx.ops.recurrence import chunks, gated_delta
from nalora_mlx.ops.recurrence.chunks import (
    decayed_products,
    delta_recurrence,
    invert_unit_lower,
    matrix_recurrence,
)
from nalora_mlx.ops.recurrence.gated_delta import gated_delta_rule
from tests.conftest import set_sizes

NAMES = ("y", "last state", "dq", "dk", "dv", "dlog_decay", "dbeta", "dstate")
DECAYS = ("one per head", "one per channel")


def make_inputs(B=2, T=70, Hk=2, Hv=4, Dk=8, Dv=6, decays="one per head", seed=0):
    """Return q, k, v, log_decay, beta and the state as float32 arrays in float64."""
    random = np.random.default_rng(seed)
    q, k = random.normal(size=(2, B, T, Hk, Dk))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = random.normal(size=(B, T, Hv, Dv))
    log_decay = -np.exp(2 * random.normal(size=(B, T, Hv, Dk) if decays == DECAYS[1] else (B, T, Hv)) - 2)
    beta = random.uniform(size=(B, T, Hv))
    state = random.normal(size=(B, Hv, Dv, Dk))
    return [x.astype(np.float32).astype(np.float64) for x in (q, k, v, log_decay, beta, state)]


def weights(inputs):
    """Return the gradients of the outputs and of the last state; they are exact in bfloat16."""
    random = np.random.default_rng(1)
    return [np.round(8 * random.normal(size=x.shape)) / 8 for x in (inputs[2], inputs[5])]


def loop(q, k, v, log_decay, beta, state, starts=None):
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    outputs = []
    for t in range(q.shape[1]):
        state = state * torch.exp(log_decay[:, t])[:, :, None]
        if starts is not None:
            state = torch.where(starts[:, t, None, None, None], 0, state)
        u = beta[:, t, :, None] * (v[:, t] - (state * k[:, t, :, None]).sum(-1))
        state = state + u[..., None] * k[:, t, :, None]
        outputs.append((state * q[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1), state


def exact(inputs, starts=None):
    """Return the outputs, the last state and all gradients in float64."""
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    outputs = loop(*tensors, starts=None if starts is None else torch.tensor(starts))
    loss = sum((x * torch.tensor(w)).sum() for x, w in zip(outputs, weights(inputs), strict=True))
    return [x.detach().numpy() for x in (*outputs, *torch.autograd.grad(loss, tensors))]


def computed(inputs, starts=None, dtype=mx.float32):
    """Return the same arrays, as the rule in chunks computes them from q, k, v and beta of a dtype."""
    q, k, v, log_decay, beta, state = (mx.array(x.astype(np.float32)) for x in inputs)
    arrays = [*(x.astype(dtype) for x in (q, k, v)), log_decay, beta.astype(dtype), state]
    starts = None if starts is None else mx.array(starts)

    scale = [mx.array(w.astype(np.float32)) for w in weights(inputs)]

    def loss(*arrays):
        outputs = gated_delta_rule(*arrays, starts=starts)
        return sum((x * w).sum() for x, w in zip(outputs, scale, strict=True)), outputs

    (_, outputs), gradients = mx.value_and_grad(loss, argnums=range(6))(*arrays)
    return [*outputs, *gradients]


def assert_equal(got, want, tolerance=1e-5, names=NAMES):
    for name, a, b in zip(names, got, want, strict=True):
        a = np.array(a.astype(mx.float32)) if isinstance(a, mx.array) else a
        scale = max(np.abs(b).max(), chunks.SMALLEST)
        assert a.shape == b.shape, name
        assert np.abs(a - b).max() <= tolerance * scale, f"{name}: {np.abs(a - b).max() / scale:.1e}"


def set_group_positions(monkeypatch, positions):
    set_sizes(monkeypatch, group_positions=positions)


@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("T", [1, 7, 63, 64, 65, 1000])
def test_rule_equals_loop_in_float64(T, decays):
    inputs = make_inputs(T=T, decays=decays) if T < 1000 else make_inputs(2, T, 1, 2, 4, 4, decays)
    assert_equal(computed(inputs), exact(inputs))


@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("gates", ["zero", "one", "underflow", "mixed"])
def test_extreme_decays(gates, decays):
    inputs = make_inputs(T=130, decays=decays)
    log_decay = inputs[3]
    values = {
        "zero": [-np.inf],
        "one": [0],
        "underflow": [-500],
        "mixed": [-np.inf, 0, -500, -90, -20, -1e-3],
    }
    log_decay[:] = np.random.default_rng(2).choice(values[gates], size=log_decay.shape)
    if gates == "mixed":  # between them, decays of a trained model
        log_decay[:, 1::3] = make_inputs(T=130, decays=decays)[3][:, 1::3]
    assert_equal(computed(inputs), exact(inputs))


@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("step", [0, 1, 2, "mixed"])
def test_extreme_steps(step, decays):
    """With beta = 2 an eigenvalue is -1."""
    inputs = make_inputs(T=130, decays=decays)
    inputs[4][:] = (
        np.random.default_rng(2).choice([0, 1, 2], size=inputs[4].shape) if step == "mixed" else step
    )
    assert_equal(computed(inputs), exact(inputs))


@pytest.mark.parametrize(("beta", "tolerance"), [(0.999, 1e-5), (1, 1e-5), (2, 1e-3)])
def test_nearly_parallel_keys(beta, tolerance):
    """With beta = 2, 64 terms of alternating signs cancel in each chunk, and the error depends on the BLAS.

    OpenBLAS's kernels with AVX-512 give 2e-5, those with AVX2 3e-4.
    """
    inputs = make_inputs(T=130)
    k = inputs[1]
    k[:] = (k[:, :1] + 1e-3 * k).astype(np.float32)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    inputs[3] *= 1e-3
    inputs[4][:] = beta
    inputs = [x.astype(np.float32).astype(np.float64) for x in inputs]
    assert_equal(computed(inputs), exact(inputs), tolerance)


@pytest.mark.parametrize("decays", DECAYS)
def test_half_precision_inputs_keep_a_state_in_float32(decays):
    inputs = make_inputs(T=130, decays=decays)
    for i in (0, 1, 2, 4):
        inputs[i] = np.array(mx.array(inputs[i]).astype(mx.bfloat16).astype(mx.float32)).astype(np.float64)
    got, want = computed(inputs, dtype=mx.bfloat16), exact(inputs)
    half = {"y", "dq", "dk", "dv", "dbeta"}
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.dtype == (mx.bfloat16 if name in half else mx.float32), name
        assert_equal([a], [b], 2**-8 if name in half else 1e-5, [name])


@pytest.mark.parametrize("decays", DECAYS)
def test_packed_rows_equal_rows_alone(decays, monkeypatch):
    set_group_positions(monkeypatch, 64)
    lengths = 5, 70, 1, 1, 53
    inputs = make_inputs(B=1, T=sum(lengths), decays=decays)
    ends = np.cumsum(lengths)
    starts = np.zeros((1, sum(lengths)), bool)
    starts[0, ends - lengths] = True
    assert_equal(computed(inputs, starts), exact(inputs, starts))
    got = computed(inputs, starts)
    assert not np.array(got[-1]).any()  # the first row does not see the state before it
    for end, length in zip(ends, lengths, strict=True):
        row = [x[:, end - length : end] for x in inputs[:5]]
        alone = gated_delta_rule(*(mx.array(x.astype(np.float32)) for x in row))
        assert_equal([got[0][:, end - length : end]], [np.array(alone[0])], 1e-6, ["y"])
    changed = [x.copy() for x in inputs]
    for x in changed[:5]:
        x[:, 5:75] *= 0.5
    same = np.array(computed(changed, starts)[0] == got[0])
    assert same[:, np.r_[0:5, 75 : sum(lengths)]].all()
    assert not same[:, 5:75].all()


@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("transform", [mx.checkpoint, mx.compile], ids=["checkpoint", "compile"])
def test_groups_and_transformations(transform, decays, monkeypatch):
    set_group_positions(monkeypatch, 64)  # two rows of 32 tokens
    monkeypatch.setattr(chunks, "CHUNK", 16)
    inputs = make_inputs(T=60, decays=decays)
    want = exact(inputs)
    q, k, v, log_decay, beta, state = (mx.array(x.astype(np.float32)) for x in inputs)
    rule = mx.checkpoint(gated_delta_rule)
    scale = [mx.array(w.astype(np.float32)) for w in weights(inputs)]
    gradients = transform(lambda *a: mx.vjp(rule, list(a), scale)[1])(q, k, v, log_decay, beta, state)
    assert_equal(gradients, want[2:], names=NAMES[2:])


def test_only_the_last_state_is_used():
    """Then the gradient of the outputs is an array of zeros, and `mx.compile` merges what is made of them."""
    arrays = [mx.array(x.astype(np.float32)) for x in make_inputs()]

    def gradient(*arrays):
        return mx.grad(lambda *a: gated_delta_rule(*a)[1].sum(), argnums=range(6))(*arrays)

    compiled = mx.compile(gradient)(*arrays)
    assert_equal(compiled[1:], [np.array(x) for x in gradient(*arrays)][1:], 1e-6, NAMES[3:])
    assert not np.array(compiled[0]).any()


def test_memory_of_a_backward_is_that_of_one_group(monkeypatch):
    set_sizes(monkeypatch, group_positions=128)

    def peak(T):
        arrays = [mx.array(x.astype(np.float32)) for x in make_inputs(1, T, 2, 4, 64, 64)]
        gradient = mx.compile(mx.grad(lambda *a: gated_delta_rule(*a)[0].sum(), argnums=range(5)))
        mx.eval(arrays, gradient(*arrays))
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(gradient(*arrays))
        return mx.get_peak_memory() - before

    inputs_and_outputs = 4 * (2 * 2 * 64 + 2 * 4 * 64 + 2 * 4)  # bytes of a token
    assert (peak(1536) - peak(512)) / 1024 < 1.3 * inputs_and_outputs


def test_memory_of_products_with_decays_of_channels():
    """Gradients are summed up size by size; held until the end, they take far more."""
    arrays = [-mx.ones((16, 64, 32)) for _ in range(3)]
    gradient = mx.grad(lambda *a: decayed_products(*a).sum(), argnums=range(3))
    limit = mx.set_memory_limit(1)  # do not start operations before earlier ones finish
    try:
        mx.eval(arrays, gradient(*arrays))
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(gradient(*arrays))
        assert mx.get_peak_memory() - before < 20 * arrays[0].nbytes
    finally:
        mx.set_memory_limit(limit)


@pytest.mark.parametrize(("decays", "limit"), [(DECAYS[0], 2), (DECAYS[1], 2.6)])
def test_operations_are_few_for_each_token(decays, limit, tmp_path):
    def operations(T):
        arrays = [mx.array(x.astype(np.float32)) for x in make_inputs(1, T, decays=decays)]
        gradients = mx.grad(lambda *a: gated_delta_rule(*a)[0].sum(), argnums=range(5))(*arrays)
        mx.export_to_dot(str(tmp_path / "graph.dot"), *gradients)
        return (tmp_path / "graph.dot").read_text().count("shape=rectangle")

    assert operations(3072) - operations(1536) < limit * 1536  # with views, before `mx.compile`


def test_inverse_of_unit_lower_triangular_matrices():
    random = np.random.default_rng(0)
    for C in (1, 2, 16, 64):
        lower = (0.3 * random.normal(size=(2, 3, C, C))).astype(np.float32)  # what is not below counts as 0
        scale = random.normal(size=lower.shape).astype(np.float32)
        exact_lower = torch.tensor(lower.astype(np.float64), requires_grad=True)
        inverse = torch.linalg.inv(torch.eye(C) + exact_lower.tril(-1))
        (inverse * torch.tensor(scale)).sum().backward()
        outputs, gradients = mx.vjp(invert_unit_lower, [mx.array(lower)], [mx.array(scale)])
        assert_equal(outputs, [inverse.detach().numpy()], names=["inverse"])
        assert_equal(gradients, [exact_lower.grad.numpy()], names=["gradient"])


@pytest.mark.parametrize(("own_decay", "diagonal"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("channels", [1, 5])
def test_decayed_products(channels, own_decay, diagonal):
    C, D = 16, 5
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 3, C, D)).astype(np.float32).astype(np.float64)
    log_decay = -np.exp(random.normal(size=(3, C, channels))).astype(np.float32).astype(np.float64)
    log_decay[0, 3] = -np.inf
    scale = random.normal(size=(3, C, C))
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, y, log_decay)]
    rows = []
    for i in range(C):
        for j in range(C):
            decay = torch.exp(tensors[2][:, j + 1 : i + 1 if own_decay else i].sum(1))
            product = (tensors[0][:, i] * tensors[1][:, j] * decay).sum(-1)
            rows.append(product if i > j or (i == j and diagonal) else 0 * product)
    want = torch.stack(rows, -1).reshape(3, C, C)
    gradients = torch.autograd.grad((want * torch.tensor(scale)).sum(), tensors)
    arrays = [mx.array(np.maximum(a, chunks.LOG_ZERO).astype(np.float32)) for a in (x, y, log_decay)]

    def products(*arrays):
        return decayed_products(*arrays, own_decay, diagonal)

    got = mx.vjp(products, arrays, [mx.array(scale.astype(np.float32))])
    names = ("products", "dx", "dy", "dlog_decay")
    assert_equal([*got[0], *got[1]], [a.detach().numpy() for a in (want, *gradients)], names=names)


def recurrence_arrays(*shapes):
    random = np.random.default_rng(0)
    return [0.5 * random.normal(size=shape) for shape in shapes]


def assert_recurrence(function, loop, arrays):
    """Compare outputs and gradients of a recurrence with those of a loop in float64."""
    tensors = [torch.tensor(x.astype(np.float32).astype(np.float64), requires_grad=True) for x in arrays]
    want = loop(*tensors)
    scale = recurrence_arrays(*(x.shape for x in want))
    gradients = torch.autograd.grad([*want], tensors, [torch.tensor(x) for x in scale])
    got = mx.vjp(function, *([mx.array(x.astype(np.float32)) for x in a] for a in (arrays, scale)))
    want = [x.detach().numpy() for x in (*want, *gradients)]
    assert_equal([*got[0], *got[1]], want, names=[f"{i}" for i in range(len(want))])


def test_matrix_recurrence():
    def loop(f, z, state):
        states = []
        for n in range(f.shape[-3]):
            states.append(state)
            state = f[:, n] @ state + z[:, n]
        return torch.stack(states, 1), state

    for N in (1, 5):
        assert_recurrence(matrix_recurrence, loop, recurrence_arrays((2, N, 4, 4), (2, N, 4, 3), (2, 4, 3)))


@pytest.mark.parametrize("channels", [1, 4])
def test_delta_recurrence(channels):
    def loop(u, w, k, decay, state):
        d, states = [], []
        for n in range(u.shape[-3]):
            states.append(state)
            d.append(u[:, n] - w[:, n] @ state)
            state = decay[:, n] * state + k[:, n].mT @ d[-1]
        return torch.stack(d, 1), torch.stack(states, 1), state

    for N in (1, 5):
        shapes = (2, N, 6, 3), (2, N, 6, 4), (2, N, 6, 4), (2, N, channels, 1), (2, 4, 3)
        assert_recurrence(delta_recurrence, loop, recurrence_arrays(*shapes))


def right(*arrays):
    q, k, v, gates, beta, state = arrays
    assert all(x.dtype == mx.float32 for x in arrays)
    return gated_delta._in_chunks(q, k, v, mx.log(gates), beta, state)


def wrong(*arrays):
    y, state = right(*arrays)
    return y, 1.01 * state


def wrong_gradient(q, k, *others):
    return right(q, mx.stop_gradient(k), *others)


def not_finite(*arrays):
    y, state = right(*arrays)
    return y, state * mx.array(np.nan)


def raises(*arrays):
    raise RuntimeError("no such kernel")


@pytest.fixture
def kernel(monkeypatch):
    """Return a function that puts another in the place of MLX's kernel, and the list of its calls."""
    monkeypatch.setattr(gated_delta, "KERNEL_HEADS", {(2, 4)})
    monkeypatch.setattr(gated_delta, "KERNEL_CHANNELS", 8)
    monkeypatch.setattr(gated_delta, "CHECKED_TOKENS", 70)
    monkeypatch.setattr(gated_delta, "backend", lambda: "metal")
    monkeypatch.setattr(gated_delta, "_gpu_has_matrix_units", lambda: True)
    monkeypatch.setattr(gated_delta, "_usable", {})
    calls = []

    def install(function):
        def update(*arrays, initial_state):
            calls.append(arrays[0].shape[1])
            return function(*arrays, initial_state)

        monkeypatch.setattr(mx.fast, "gated_delta_update", update)
        return calls

    return install


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_kernel_that_passes_its_check_is_used(kernel, dtype, monkeypatch):
    set_sizes(monkeypatch, group_positions=64)
    inputs = make_inputs(B=1, T=90, Dv=8)
    calls = kernel(right)
    got = computed(inputs, dtype=dtype)
    assert set(calls) == {70, 64, 26}
    assert got[0].dtype == dtype
    assert_equal(got, exact(inputs), 1e-5 if dtype == mx.float32 else 0.05)
    assert gated_delta._usable == {(2, 4): True}
    calls.clear()
    computed(inputs)
    assert set(calls) == {64, 26}


@pytest.mark.skipif(not hasattr(mx.fast, "gated_delta_update"), reason="this MLX has no such kernel")
def test_arguments_of_the_kernel(kernel):
    """On a CPU, MLX computes the same with a loop over tokens."""
    original = mx.fast.gated_delta_update
    calls = kernel(lambda *arrays: original(*arrays[:-1], initial_state=arrays[-1]))
    inputs = make_inputs(B=2, T=20, Dv=8)
    assert_equal(computed(inputs), exact(inputs))
    assert set(calls) == {70, 20}


@pytest.mark.parametrize("function", [wrong, wrong_gradient, not_finite, raises])
def test_kernel_that_fails_its_check_is_not_used(kernel, function):
    inputs = make_inputs(B=1, T=40, Dv=8)
    calls = kernel(function)
    with pytest.warns(UserWarning, match="failed its self-check"):
        assert_equal(computed(inputs), exact(inputs))
    assert calls.pop() == 70
    calls.clear()
    assert_equal(computed(inputs), exact(inputs))  # without another warning
    assert not calls


def test_kernel_is_checked_while_a_function_is_compiled(kernel):
    inputs = make_inputs(B=1, T=40, Dv=8)
    arrays = [mx.array(x.astype(np.float32)) for x in inputs]
    calls = kernel(right)
    gradient = mx.compile(lambda *a: mx.vjp(gated_delta_rule, list(a), cotangents)[1])
    cotangents = [mx.array(w.astype(np.float32)) for w in weights(inputs)]
    assert_equal(gradient(*arrays), exact(inputs)[2:], names=NAMES[2:])
    assert set(calls) == {70, 40}


def test_kernel_is_used_where_it_applies(kernel, monkeypatch):
    calls = kernel(right)
    starts = np.zeros((1, 40), bool)
    computed(make_inputs(B=1, T=40, Dv=8), starts)
    computed(make_inputs(B=1, T=40, Dv=8, decays=DECAYS[1]))
    computed(make_inputs(B=1, T=40, Dv=6))
    computed(make_inputs(B=1, T=40, Hv=2, Dv=8))
    monkeypatch.setattr(gated_delta, "_gpu_has_matrix_units", lambda: False)
    computed(make_inputs(B=1, T=40, Dv=8))
    monkeypatch.setattr(gated_delta, "_gpu_has_matrix_units", lambda: True)
    monkeypatch.setattr(gated_delta, "backend", lambda: "reference")
    computed(make_inputs(B=1, T=40, Dv=8))
    assert not calls


@pytest.mark.parametrize(
    ("architecture", "macos", "expected"),
    [
        ("applegpu_g13s", "26.2", False),
        ("applegpu_g16s", "26.2", False),
        ("applegpu_g17s", "26.2.1", True),
        ("applegpu_g17p", "26.2", False),
        ("applegpu_g18p", "27.0", True),
        ("applegpu_g17d", "26.1", False),
        ("", "", False),
    ],
)
def test_gpus_with_matrix_units(architecture, macos, expected, monkeypatch):
    monkeypatch.setattr(gated_delta.platform, "mac_ver", lambda: (macos, ("", "", ""), "arm64"))
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    assert gated_delta._gpu_has_matrix_units() == expected
