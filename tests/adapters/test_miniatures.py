"""Every model of mlx-lm, in miniature.

Gated MLPs are found, adapting changes no output, gradients equal those of mlx-lm's LoRA, the mask acts, and adapters
merge.
"""

import copy
import importlib
import pkgutil
import re
import sys
import types

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm.models
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from nalora_mlx.adapters.attach import adapt, gated_mlps
from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.adapters.merge import fuse_model
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.batches import Batch
from nalora_mlx.ops import cross_entropy
from nalora_mlx.ops.cross_entropy import tiled_cross_entropy_sum
from nalora_mlx.training.loss import SupervisedLoss, batch_arrays
from nalora_mlx.training.step import TrainingStep
from tests.conftest import build_model, random_adapters, set_sizes
from tests.miniatures.klear_to_llama import MINIATURES as FIRST
from tests.miniatures.llama4_to_youtu import MINIATURES as SECOND

ZOO = FIRST | SECOND
NAMES = sorted(ZOO)
# One model type per layout of gated MLPs, activation and kind of layer. Beyond `adapt` itself, the others are slow.
REPRESENTATIVE = {
    *(
        "afm7",
        "apertus",
        "cohere2",
        "dbrx",
        "deepseek_v3",
        "exaone",
        "gemma",
        "gemma2",
        "gemma3n",
        "gemma4_text",
    ),
    *("glm4", "gpt_oss", "granitemoehybrid", "internlm2", "jamba", "kimi_k3", "lfm2", "llama", "mixtral"),
    *(
        "nemotron_h",
        "openelm",
        "phi3",
        "plamo2",
        "qwen",
        "qwen2",
        "qwen3_moe",
        "qwen3_next",
        "step3p5",
        "talkie",
    ),
}
CASES = [pytest.param(name, marks=() if name in REPRESENTATIVE else pytest.mark.slow) for name in NAMES]
# The only gated MLPs that NA-LoRA does not act on. Their miniatures state the reasons.
PLAIN = {
    "bitnet: model.layers.*.mlp",
    "phi3small: model.layers.*.mlp",
    "prism_hadamard_qwen35: language_model.model.layers.0.mlp",
    "prism_hadamard_qwen35: language_model.model.layers.1.mlp",
}
# Models that MLX cannot run on a Linux CPU. Their rows have the reasons.
NO_FORWARD = {"bitnet", "muse_spark", "olmo"}
NO_BACKWARD = NO_FORWARD - {"olmo"} | {"deepseek_v41", "recurrent_gemma"}
NO_FREEZE = {"recurrent_gemma"}


def load_module(name):
    sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))  # olmo requires it, but does not use it
    return importlib.import_module(f"mlx_lm.models.{name}")


def model_modules():
    """Return the names of mlx-lm's modules that define a model."""
    names = [info.name for info in pkgutil.iter_modules(mlx_lm.models.__path__)]
    return [name for name in names if hasattr(load_module(name), "Model")]


def test_every_model_of_mlx_lm_is_in_the_zoo():
    assert sorted(model_modules()) == NAMES


def build(name, gain=1.5):
    model = build_model(module=load_module(name), args=copy.deepcopy(ZOO[name].config), gain=gain)
    for path, array in tree_flatten(model.parameters()):
        # Parameters that are zero until a checkpoint is loaded would make gradients zero or NaN.
        if array.size > 1 and mx.issubdtype(array.dtype, mx.floating) and not mx.any(array).item():
            filled = 0.1 * mx.random.normal(array.shape, key=mx.random.key(len(path))).astype(array.dtype)
            model.load_weights([(path, filled)], strict=False)
    return model


TOKENS = np.random.default_rng(0).integers(1, 60, (2, 18)).astype(np.int32)


def logits(model):
    out = np.array(model(mx.array(TOKENS[:, :-1])).astype(mx.float32))
    return out[np.isfinite(out)]  # phi3small gives -inf to unused token ids


def relative(got, want):
    return np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)


def matches(pattern, path):
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), path)


def tree(model):
    return sorted((path, type(module).__name__) for path, module in model.named_modules())


def usable(name):
    row = ZOO[name]
    if row.no_forward or row.no_freeze:
        pytest.skip(row.no_forward or row.no_freeze)
    return row


@pytest.mark.parametrize("name", NAMES)
def test_gated_mlps_are_found_and_outputs_do_not_change(name):
    row = usable(name)
    model = build(name)
    before, before_tree = logits(model), tree(model)
    report = adapt(model, NALoRAConfig(num_layers=-1, rank=2))
    expected = []
    for kind in row.gated:
        if kind.plain:
            continue
        found = [g for g in report.gated if matches(kind.paths, g.path) and g.activation == kind.activation]
        assert len(found) == kind.count, (kind, report.gated, report.skipped)
        assert {g.experts for g in found} == {kind.experts}
        assert all(g.layout.startswith(kind.gate) for g in found)
        if kind.gate == kind.up:
            assert all(("gate | up" in g.layout) == kind.gate_first for g in found)
        expected += [g.path for g in found]
    assert sorted(expected) == sorted(g.path for g in report.gated)
    assert relative(logits(model), before) < 1e-5
    random_adapters(model, size=0.05)
    adapted = logits(model)
    assert relative(adapted, before) > 1e-5
    fuse_model(model)
    assert relative(logits(model), adapted) < 2e-5  # kimi_k3 amplifies rounding: 3e-6 to 1.4e-5 by seed
    assert tree(model) == before_tree


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_mlx_lm(name):
    row = usable(name)
    if row.no_backward:
        pytest.skip(row.no_backward)
    ours, theirs = build(name), build(name)
    report = adapt(ours, NALoRAConfig(num_layers=-1, rank=2, scale=2.0))
    theirs.freeze()
    settings = {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": list(report.config.keys)}
    linear_to_lora_layers(theirs, -1, settings)
    random_adapters(ours, size=0.05)
    theirs.load_weights(list(adapter_weights(ours).items()), strict=False)

    def gradients(model):
        def loss(model):
            out = model(mx.array(TOKENS[:, :-1])).astype(mx.float32)
            return nn.losses.cross_entropy(out, mx.array(TOKENS[:, 1:])).mean()

        return dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))

    got, want = gradients(ours), gradients(theirs)
    assert got.keys() == want.keys()
    largest = max(np.abs(np.array(a)).max() for a in want.values())
    for path in want:
        a, b = np.array(got[path]), np.array(want[path])
        # Relative to the array's own size, but not below float32's accuracy for the largest gradient.
        assert np.abs(a - b).max() < 1e-5 * max(np.abs(b).max(), 1e-2 * largest), path


KEEP_FRACTION = 0.25


@pytest.mark.parametrize("name", CASES)
def test_a_hard_mask_freezes_the_channels_that_it_drops(name):
    row = usable(name)
    if row.no_backward:
        pytest.skip(row.no_backward)
    model = build(name)
    config = NALoRAConfig(
        num_layers=-1, rank=2, mask="hard", keep_fraction=KEEP_FRACTION, mask_warmup=0, preserve="none"
    )
    report = adapt(model, config)
    random_adapters(model, size=0.05)
    before = {path: np.array(a) for path, a in adapter_weights(model).items()}
    step = TrainingStep(model, optim.SGD(1.0), report.config, compiled=False)
    model.train()
    token_mask = np.ones((2, 17), np.float32)
    token_mask[1, 12:] = 0
    batch = Batch(TOKENS[:, :-1], TOKENS[:, 1:], token_mask, token_mask, (0, 1))
    loss, _ = step(batch, int(token_mask.sum()), None, True)
    mx.eval(step.state, loss)
    assert np.isfinite(loss.item())
    after = {path: np.array(a) for path, a in adapter_weights(model).items()}
    for mlp in gated_mlps(model):
        state = step.importance["layers"][mlp.path]
        mask = np.array(state.mask)
        assert_keeps_the_most_important(mask, np.array(state.importance), np.array(state.updates) > 0)
        ((path, factors),) = mlp.step_factors(mx.array(mask)).items()
        assert path == f"{mlp.path}.{mlp.layout.gate}.lora_b"
        frozen = np.broadcast_to(np.array(factors) == 0, after[path].shape)
        np.testing.assert_array_equal(after[path][frozen], before[path][frozen])
        assert frozen.any()
        assert (after[path] != before[path])[~frozen].any()


def assert_keeps_the_most_important(mask, importance, had_tokens):
    """Check a hard mask [..., F]: a fixed share of the channels, those of highest importance; all without tokens."""
    channels = mask.shape[-1]
    kept = np.where(had_tokens, max(1, round(KEEP_FRACTION * channels)), channels)
    np.testing.assert_array_equal((mask == 1).sum(axis=-1), kept)
    np.testing.assert_array_equal((mask == 0).sum(axis=-1), channels - kept)
    assert had_tokens.any()
    lowest_kept = np.where(mask == 1, importance, np.inf).min(axis=-1)
    highest_dropped = np.where(mask == 0, importance, -np.inf).max(axis=-1)
    assert (lowest_kept >= highest_dropped).all()


# Not split: its backbone outputs several hidden streams.
NO_HEAD = {"gemma3n"}
# All logits at once: phi3small's head addresses vocabulary entries by index, and talkie's is not a module.
WHOLE = {"phi3small", "talkie"}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_supervised_positions_equals_that_of_all_logits(name, monkeypatch):
    """Logits for supervised positions only, in tiles, give the loss (to 1e-6) and gradients of all logits."""
    row = usable(name)
    if row.no_backward:
        pytest.skip(row.no_backward)
    model = build(name)
    scored = SupervisedLoss(model)
    assert (scored.head is None) == (name in NO_HEAD)
    assert (scored.head is None or scored.head.projection is None) == (name in NO_HEAD | WHOLE)
    monkeypatch.setattr(cross_entropy, "COLUMN_MULTIPLE", 1)
    set_sizes(monkeypatch, head_rows=5, head_columns=13)
    adapt(model, NALoRAConfig(num_layers=-1, rank=2))
    random_adapters(model, size=0.05)
    supervised = (np.random.default_rng(1).random((2, 17)) < 0.4).astype(np.float32)
    batch = Batch(TOKENS[:, :-1], TOKENS[:, 1:], supervised, np.ones_like(supervised), (0, 1))
    arrays = [mx.array(a) for a in batch.loss_positions()]

    def full_loss(model):
        out = model(mx.array(batch.inputs)).astype(mx.float32)
        losses = nn.losses.cross_entropy(out, mx.array(batch.targets))
        return mx.where(mx.array(supervised) > 0, losses, 0).sum()

    def tiled_loss(model):
        if name in NO_HEAD | WHOLE:
            return scored(batch_arrays(batch))[0]
        hidden = scored.head.hidden(mx.array(batch.inputs))
        hidden = hidden.reshape(-1, hidden.shape[-1])[arrays[0]]
        head = scored.head
        return tiled_cross_entropy_sum(head.logits_for, head.vocabulary, hidden, *arrays[1:])

    want, want_gradients = nn.value_and_grad(model, full_loss)(model)
    got, got_gradients = nn.value_and_grad(model, tiled_loss)(model)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert scored(batch_arrays(batch))[0].item() == pytest.approx(want.item(), rel=1e-6)
    want_gradients, got_gradients = dict(tree_flatten(want_gradients)), dict(tree_flatten(got_gradients))
    largest = max(np.abs(np.array(a)).max() for a in want_gradients.values())
    for path, a in want_gradients.items():
        assert np.abs(np.array(got_gradients[path]) - np.array(a)).max() < 1e-5 * largest, path


def test_the_exceptions_are_those_listed_above():
    assert {f"{name}: {kind.paths}" for name, row in ZOO.items() for kind in row.gated if kind.plain} == PLAIN
    assert {name for name, row in ZOO.items() if row.no_forward} == NO_FORWARD
    assert {name for name, row in ZOO.items() if row.no_backward} == NO_BACKWARD
    assert {name for name, row in ZOO.items() if row.no_freeze} == NO_FREEZE


def test_a_model_without_linear_layers_is_an_error():
    with pytest.raises(InputError, match="have no module that a LoRA adapter fits"):
        adapt(build("bitnet"), NALoRAConfig(num_layers=-1))


@pytest.mark.parametrize("name", ["phi3small", "prism_hadamard_qwen35", "olmo"])
def test_skipped_gated_mlps_have_a_reason(name):
    model = build(name)
    report = adapt(model, NALoRAConfig(num_layers=-1))
    kinds = ZOO[name].gated
    skipped = {s.path: s.reason for s in report.skipped}
    found = [path for kind in kinds for path in skipped if matches(kind.paths, path)]
    assert len(found) == sum(kind.count for kind in kinds), report.skipped
    assert all(reason.startswith(("stays plain LoRA: ", "untouched: ")) for reason in skipped.values())


@pytest.mark.parametrize("name", CASES)
def test_adapters_load_in_mlx_lm(name, tmp_path):
    """mlx-lm creates the same adapters, by name and shape, from the saved keys."""
    usable(name)
    ours, theirs = build(name), build(name)
    report = adapt(ours, NALoRAConfig(num_layers=-1, rank=2))
    assert_same_adapters(ours, theirs, report)


def assert_same_adapters(ours, theirs, report):
    theirs.freeze()
    settings = {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": list(report.config.keys)}
    linear_to_lora_layers(theirs, report.config.num_layers, settings)
    shapes = {path: array.shape for path, array in tree_flatten(theirs.trainable_parameters())}
    assert {path: array.shape for path, array in adapter_weights(ours).items()} == shapes


MODES = [(b, "affine") for b in (2, 3, 4, 6, 8)] + [(4, "mxfp4"), (4, "nvfp4"), (8, "mxfp8")]


@pytest.mark.parametrize(("bits", "mode"), MODES)
@pytest.mark.parametrize("name", ["qwen2", "mixtral", "phi3", "gpt_oss", "lfm2"])
def test_quantized_bases(name, bits, mode):
    """In every mode, with one layer in other bits: found, outputs do not change, and the update survives merging."""
    model = build(name)
    group = 16 if mode == "nvfp4" else 32

    def choose(path, module):
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 32:
            return False
        if mode == "affine" and ".1." in path and path.endswith(("up_proj", "w3")):
            return {"group_size": 32, "bits": 8, "mode": "affine"}
        return True

    nn.quantize(model, group, bits, mode=mode, class_predicate=choose)
    before = logits(model)
    report = adapt(model, NALoRAConfig(num_layers=-1, rank=2))
    assert len(report.gated) == sum(kind.count for kind in ZOO[name].gated), report.skipped
    assert relative(logits(model), before) < 1e-5
    random_adapters(model, size=0.02)
    adapted = logits(model)
    fuse_model(model)
    # On average, since a router near a tie may send a token to another expert.
    assert np.square(logits(model) - adapted).mean() < 0.15**2 * np.square(adapted - before).mean()


def test_statistics_of_a_module_called_several_times_are_its_mean():
    """nanbeige runs its layers several times, so shares of tokens must still be at most 1."""
    config = NALoRAConfig(num_layers=-1, rank=2, beta=0.0)
    model = build("nanbeige")
    assert ZOO["nanbeige"].config["num_loops"] > 1
    adapt(model, config)
    step = TrainingStep(model, optim.SGD(0.0), config, compiled=False)
    real = np.ones((2, 17), np.float32)
    step(Batch(TOKENS[:, :-1], TOKENS[:, 1:], real, real, (0, 1)), 34, None, True)
    for state in step.importance["layers"].values():
        assert np.array(state.above_boundary).min() >= 0
        assert np.array(state.above_boundary).max() <= 1 + 1e-6
