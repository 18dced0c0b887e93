"""Recurrent and hybrid models train with training forms as with mlx-lm's own functions: loss, gradients, packing."""

import importlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.forward_pass import recompute_activations
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.models import recurrences
from nalora_mlx.models.packed_rows import packed_caches
from nalora_mlx.models.recurrences import TrainingForms, find_difference, find_patches
from nalora_mlx.models.training_forms import TrainingForm, gated_delta_update
from tests.adapters.test_miniatures import ZOO, build
from tests.conftest import random_adapters

# Model type -> what is replaced while it is trained.
REPLACED = {
    "qwen3_5": {"qwen3_5.gated_delta_update"},
    "qwen3_5_moe": {"qwen3_5.gated_delta_update"},
    "qwen3_next": {"qwen3_next.gated_delta_update"},
    "olmo_hybrid": {"olmo_hybrid.gated_delta_update"},
    "prism_hadamard_qwen35": {"qwen3_5.gated_delta_update"},
    "bailing_moe_v3": {"bailing_moe_v3.gated_delta_update"},
    "kimi_linear": {"kimi_linear.gated_delta_update"},
    "kimi_k3": {"kimi_k3.gated_delta_update"},
    "mamba": {"mamba.MambaBlock._process_sequence"},
    "jamba": {"jamba.JambaMambaMixer.ssm_step"},
    "rwkv7": {"rwkv7.Rwkv7TimeMixing._wkv7", "rwkv7.TokenShift.__call__"},
    "bailing_moe_linear": {"bailing_moe_linear.recurrent_gla"},
    "bailing_hybrid": {"bailing_hybrid.recurrent_gla"},
    "mamba2": {"mamba2.ssm_update"},
    "falcon_h1": {"falcon_h1.ssm_update"},
    "granitemoehybrid": {"granitemoehybrid.ssm_update"},
    "nemotron_h": {"nemotron_h.ssm_update"},
    "plamo2": {"plamo2.ssm_update"},
}
FAMILIES = ["qwen3_5", "kimi_linear", "mamba2", "mamba", "jamba", "rwkv7", "bailing_moe_linear"]
DECAYS = {"A_log": (-5, 0), "w_lora.lora.2.bias": (-5, 3)}  # parameter that sets the decays -> its range
RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(1, 60, (2, 71))  # 70 inputs, more than a chunk
# Two packed sequences, with rows that start and end within chunks, and rows shorter than a convolution.
PACKS = [[RANDOM.integers(1, 60, length + 1) for length in lengths] for lengths in ((61, 70, 3), (2, 66))]
PADDED_LENGTH = 144


def loss_and_gradients(model, inputs, targets, mask=1.0, **arguments):
    """Return the sum of the masked losses and the gradients of all adapters."""

    def loss(model):
        logits = model(mx.array(inputs), **arguments).astype(mx.float32)
        return (nn.losses.cross_entropy(logits, mx.array(targets)) * mx.array(mask)).sum()

    value, gradients = nn.value_and_grad(model, loss)(model)
    return value, dict(tree_flatten(gradients))


def assert_same(got, want, tolerance=1e-5):
    """Compare losses and gradients, each gradient relative to its largest entry or to 1% of the largest of all."""
    (loss, gradients), (expected_loss, expected) = got, want
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    assert gradients.keys() == expected.keys()
    largest = max(mx.abs(array).max().item() for array in expected.values())
    assert largest > 0
    for path, array in expected.items():
        size = max(mx.abs(array).max().item(), 1e-2 * largest)
        assert mx.abs(gradients[path] - array).max().item() < tolerance * size, path


def adapted(name):
    """Return a miniature in training mode, with random adapters on all of its layers.

    Its heads and channels forget within one to a hundred tokens. Its weights are small, because large ones make the
    gradients so sensitive that rounding the embeddings alone changes them by 1e-5.
    """
    model = build(name, gain=0.75)
    for path, array in tree_flatten(model.parameters()):
        for end, (low, high) in DECAYS.items():
            if path.endswith(end):
                spread = mx.linspace(low, high, array.size).reshape(array.shape).astype(array.dtype)
                model.load_weights([(path, spread)], strict=False)
    adapt(model, NALoRAConfig(num_layers=-1, rank=2, scale=2.0))
    random_adapters(model)
    return model.train()


def generate(model):
    """Return the logits of a prompt, of one more token, and of a sequence without a cache, in evaluation mode."""
    model.eval()
    cache, tokens = make_prompt_cache(model), mx.array(TOKENS)
    outputs = [model(tokens[:, :9], cache=cache), model(tokens[:, 9:10], cache=cache), model(tokens[:, :20])]
    mx.eval(outputs)
    model.train()
    return outputs


class Case:
    """A model with its training forms, and what mlx-lm's own functions compute, one token at a time."""

    def __init__(self, name):
        self.name, self.model = name, adapted(name)
        self.want = loss_and_gradients(self.model, TOKENS[:, :-1], TOKENS[:, 1:])
        mx.eval(self.want)
        self.generated = generate(self.model)
        self.before = attributes(name)
        self.forms = TrainingForms(self.model)

    def got(self):
        with self.forms.installed():
            return loss_and_gradients(self.model, TOKENS[:, :-1], TOKENS[:, 1:])


def attributes(name):
    """Return the current values of the attributes that are replaced while this model is trained."""
    found = {"Conv1d": nn.Conv1d.__call__}
    for replaced in REPLACED[name]:
        module, *path = replaced.split(".")
        owner = importlib.import_module(f"mlx_lm.models.{module}")
        for attribute in path:
            owner = getattr(owner, attribute)
        found[replaced] = owner
    return found


@pytest.fixture(scope="module", autouse=True)
def without_compilation():
    """Disable compilation, because MLX starts a C++ compiler for each compiled function of mlx-lm."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module", params=sorted(REPLACED))
def case(request):
    return Case(request.param)


def test_forms_replace_the_functions_that_the_model_calls(case):
    assert not case.forms.notices
    replaced = {patch.name.removeprefix("mlx_lm.models.") for patch in case.forms.patches}
    assert replaced >= REPLACED[case.name]
    with case.forms.installed():
        inside = attributes(case.name)
    assert all(inside[name] is not case.before[name] for name in REPLACED[case.name])


def test_loss_and_gradients_equal_those_of_mlx_lm(case):
    assert_same(case.got(), case.want)


def test_the_graph_has_less_than_three_nodes_per_token(case, tmp_path):
    def nodes(length):
        tokens = np.resize(TOKENS, (1, length + 1))
        with case.forms.installed():
            loss, gradients = loss_and_gradients(case.model, tokens[:, :-1], tokens[:, 1:])
        mx.export_to_dot(str(tmp_path / "graph.dot"), loss, *gradients.values())
        return (tmp_path / "graph.dot").read_text().count("[label =")

    assert (nodes(256) - nodes(128)) / 128 < 3


def test_packed_rows_equal_rows_alone(case):
    """Compares loss and gradients, with activations recomputed in the backward."""
    inputs, targets = np.zeros((2, len(PACKS), PADDED_LENGTH), np.int32)
    mask, segment_ids = np.zeros((2, len(PACKS), PADDED_LENGTH), np.int32)
    want = []
    for i, rows in enumerate(PACKS):
        start = 0
        for number, row in enumerate(rows, 1):
            end = start + len(row) - 1
            inputs[i, start:end], targets[i, start:end] = row[:-1], row[1:]
            mask[i, start:end], segment_ids[i, start:end] = 1, number
            start = end
            want.append(loss_and_gradients(case.model, row[None, :-1], row[None, 1:]))
    losses, gradients = zip(*want, strict=True)
    want = sum(losses), {path: sum(g[path] for g in gradients) for path in gradients[0]}
    ids = mx.array(segment_ids)
    caches = packed_caches(case.model, ids)
    with case.forms.installed(ids), recompute_activations(list(case.model.layers)):
        got = loss_and_gradients(case.model, inputs, targets, mask, cache=caches)
        assert_same(got, want)


def test_recomputed_activations_give_the_same_gradients(case):
    with recompute_activations(list(case.model.layers)):
        assert_same(case.got(), case.want)


def test_the_model_is_unchanged_afterwards(case):
    with pytest.raises(ZeroDivisionError), case.forms.installed(mx.ones((1, 4))):
        raise ZeroDivisionError
    assert attributes(case.name) == case.before
    for got, want in zip(generate(case.model), case.generated, strict=True):
        assert mx.array_equal(got, want)


def test_residuals_that_later_layers_read_have_gradients_when_layers_are_recomputed(monkeypatch):
    """With one block per layer, the last layer of Kimi K3 reads the outputs of all other layers."""
    monkeypatch.setitem(ZOO["kimi_k3"].config["text_config"], "attn_res_block_size", 1)
    model = adapted("kimi_k3")
    arguments = TOKENS[:, :8], TOKENS[:, 1:9]
    want = loss_and_gradients(model, *arguments)
    with recompute_activations(list(model.layers)):
        assert_same(loss_and_gradients(model, *arguments), want)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "qwen3_5" else pytest.mark.slow) for name in FAMILIES]
)
def test_compiled_and_checkpointed_steps_give_the_same_gradients(name):
    mx.enable_compile()
    model = adapted(name)
    want = loss_and_gradients(model, TOKENS[:, :-1], TOKENS[:, 1:])
    mx.eval(want)
    forms = TrainingForms(model)

    def step(inputs, targets):
        with recompute_activations(list(model.layers)), forms.installed():
            return loss_and_gradients(model, inputs, targets)

    compiled = mx.compile(step, inputs=[model.state], outputs=[model.state])
    assert_same(compiled(mx.array(TOKENS[:, :-1]), mx.array(TOKENS[:, 1:])), want)
    mx.disable_compile()


# Models without experts, which need float32 on a CPU.
@pytest.mark.parametrize("name", ["qwen3_5", "mamba2", "mamba", "rwkv7"])
def test_half_precision_stays_half_precision(name):
    model = adapted(name)
    model.set_dtype(mx.bfloat16)
    tokens = mx.array(TOKENS[:, :-1])
    want = model(tokens)
    forms = TrainingForms(model)
    assert not forms.notices
    with forms.installed():
        got = model(tokens)
    assert got.dtype == want.dtype == mx.bfloat16
    # Both results are in bfloat16 and rounded many times.
    assert mx.abs(got - want).mean().item() < 2e-2 * mx.abs(want).mean().item()


def larger_output(*args, **kwargs):
    y, state = gated_delta_update(*args, **kwargs)
    return 1.02 * y, state


def no_gradient_of_beta(q, k, v, a, b, *args, **kwargs):
    return gated_delta_update(q, k, v, a, mx.stop_gradient(b), *args, **kwargs)


def failing(*args, **kwargs):
    raise ValueError("no such shape")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(larger_output, "differ by"), (no_gradient_of_beta, "differ by"), (failing, "no such shape")],
)
def test_a_wrong_form_is_not_used(wrong, reason, monkeypatch):
    form = TrainingForm("mlx_lm.models.gated_delta", "gated_delta_update", wrong)
    monkeypatch.setattr(recurrences, "TRAINING_FORMS", (form,))
    model = adapted("olmo_hybrid")
    forms = TrainingForms(model)
    (notice,) = forms.notices
    assert notice.startswith("mlx_lm.models.olmo_hybrid.gated_delta_update keeps")
    assert reason in notice
    assert forms.patches == []


@pytest.mark.parametrize(
    ("name", "kernel"), [("deepseek_v41", "_sinkhorn_kernel"), ("kimi_k3", "_attn_res_kernel")]
)
def test_metal_kernels_without_a_gradient_are_not_used(name, kernel, monkeypatch):
    module = importlib.import_module(f"mlx_lm.models.{name}")
    monkeypatch.setattr(module, kernel, failing)  # the kernel is None except on a Mac
    with TrainingForms(build(name)).installed():
        assert getattr(module, kernel) is None
    assert getattr(module, kernel) is failing


def test_gradients_of_deepseek_v41_are_slopes_of_the_loss():
    """mlx-lm's own model fails, because it differentiates with respect to expert indices."""
    model = adapted("deepseek_v41")
    forms = TrainingForms(model)
    inputs, targets = TOKENS[:, :9], TOKENS[:, 1:10]
    with pytest.raises(ValueError, match="indices"):
        loss_and_gradients(model, inputs, targets)
    with forms.installed():
        _, gradients = loss_and_gradients(model, inputs, targets)
        for path, gradient in gradients.items():
            if path.endswith("mlp.shared_experts.down_proj.lora_b"):  # of both layers
                array = dict(tree_flatten(model.trainable_parameters()))[path]
                direction = gradient / mx.linalg.norm(gradient)
                losses = []
                for step in (1e-2, -1e-2):
                    model.load_weights([(path, array + step * direction)], strict=False)
                    losses.append(loss_and_gradients(model, inputs, targets)[0].item())
                model.load_weights([(path, array)], strict=False)
                slope = (losses[0] - losses[1]) / 2e-2
                assert slope == pytest.approx(mx.linalg.norm(gradient).item(), rel=2e-2)


def test_models_in_files_of_their_own_have_no_training_forms():
    """mlx-lm runs such a file without adding it to sys.modules."""
    custom = type("Layer", (nn.Linear,), {"__module__": "custom_model"})(2, 2)
    assert find_patches(custom) == []


def test_decays_in_float32_keep_the_dtype_of_the_original():
    model = adapted("mamba")
    model.set_dtype(mx.bfloat16)
    for layer in model.layers:
        layer.mixer.A_log = layer.mixer.A_log.astype(mx.float32)
    want = model(mx.array(TOKENS))
    with TrainingForms(model).installed():
        assert model(mx.array(TOKENS)).dtype == want.dtype == mx.float32


def test_an_original_that_does_not_run_on_the_cpu_is_compared_elsewhere():
    failures = iter([ValueError("no compiler")])

    def original(x):
        for failure in failures:
            raise failure
        return x**2, x

    x = mx.arange(1.0, 5.0)
    assert find_difference(original, lambda x: (x * x, x), [x], {}) is None
    assert "differ by" in find_difference(original, lambda x: (x * mx.stop_gradient(x), x), [x], {})
