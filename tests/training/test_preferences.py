"""Preference losses on batches: against float64, and equal however rows are laid out, packed and accumulated."""

import math
from dataclasses import replace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from scipy.special import expit, log_softmax

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.forward_pass import recompute_activations
from nalora_mlx.core.config import TrainingConfig
from nalora_mlx.data.batches import collate, collate_packs, evaluation_batches
from nalora_mlx.data.preferences import JOINED, SEPARATE, SHARED, laid_out
from nalora_mlx.training.diagnostics import measure_misalignment
from nalora_mlx.training.distributed import ALONE
from nalora_mlx.training.evaluation import evaluate
from nalora_mlx.training.last_good import LastGoodWeights
from nalora_mlx.training.preferences import run as preference_run
from nalora_mlx.training.preferences.loss import PreferenceLoss
from nalora_mlx.training.preferences.reference import Reference, row_log_probabilities
from nalora_mlx.training.preferences.run import PreferenceRun
from nalora_mlx.training.step import TrainingStep
from tests.adapters.test_miniatures import build
from tests.conftest import VOCABULARY, build_model, llama_args, masked_config, random_adapters, set_sizes
from tests.preference_rows import MODES, preference_rows

LENGTH = 96  # of packs


def adapted(name="llama", **settings):
    model = build(name)
    mx.random.seed(3)
    adapt(model, masked_config(**({"num_layers": -1, "rank": 2, "scale": 2.0} | settings)))
    random_adapters(model, size=0.05)
    return model


# --- equality -----------------------------------------------------------------------------------------------


def window_results(model, config, window, checkpointing=False, compiled=False):
    """Return the loss and the measures of a window, and its gradients and statistics by name."""
    loss = PreferenceLoss(model, config)
    step = TrainingStep(model, optim.SGD(1.0), masked_config(), compiled, loss=loss)
    captured = {}

    def capture(sums, _probe):
        captured.update({name: np.array(array) for name, array in tree_flatten(sums) if array is not None})

    step._update = capture
    model.train()
    counts = [sum(of_term) for of_term in zip(*(batch.loss_counts for batch in window), strict=True)]
    more = Reference(loss, config, ALONE).window_arrays(window)
    accumulated, total, measures = None, 0.0, 0.0
    for i, (batch, arrays) in enumerate(zip(window, more, strict=True), 1):
        with recompute_activations(list(model.layers) if checkpointing else []):
            value, accumulated = step(batch, counts, accumulated, i == len(window), more=arrays)
        mx.eval(value, step.state)
        total, measures = total + value.item(), measures + np.array(step.measures)
    return total, measures, captured


def assert_equal_windows(got, want):
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)
    assert got[2].keys() == want[2].keys()
    largest = max(np.abs(a).max() for name, a in want[2].items() if name.startswith("0."))
    assert largest > 0
    for name, array in want[2].items():
        size = largest if name.startswith("0.") else np.abs(array).max()
        assert np.abs(got[2][name] - array).max() <= 1e-5 * size, name


LAYOUTS = {"llama": (SHARED, JOINED), "mixtral": (SHARED, JOINED), "gemma3_text": (SHARED, JOINED)}
LAYOUTS |= {"qwen3_5": (JOINED,), "gpt2": ()}
PARTS = [("llama", mode) for mode in MODES] + [
    ("mixtral", "dpo"),
    ("mixtral", "kto"),
    ("gemma3_text", "orpo"),
    ("qwen3_5", "orpo"),
    ("qwen3_5", "kto"),
    ("gpt2", "dpo"),
]


@pytest.mark.parametrize(("name", "mode"), PARTS, ids=lambda part: part.replace(" ", "_"))
def test_layouts_packing_and_accumulation_change_nothing(name, mode):
    """Loss, measures, gradients and importance statistics equal those of four rows in one batch, each in sequences of
    its own. The first row shares nothing, as its prompt is one token long."""
    model, config = adapted(name), TrainingConfig(**MODES[mode])
    rows = preference_rows(mode, known=True)
    want = window_results(model, config, [collate(rows, range(4))])
    windows = [[collate(rows, [i]) for i in range(4)]] if mode in ("dpo", "kto", "orpo") else []
    windows.append([collate(rows, [0, 3]), collate(rows, [1, 2])])
    layouts = (SEPARATE,) if mode == "kto" and LAYOUTS[name] else LAYOUTS[name]
    for layout in layouts:
        other = laid_out(rows, layout)
        if layout == SHARED:
            windows += [[collate(other, [0]), collate(other, [1, 2, 3])]]
        windows += [[collate_packs(other, [[3, 0], [1, 2]], LENGTH)]]
    for window in windows:
        assert_equal_windows(window_results(model, config, window), want)
    again = window_results(model, config, windows[-1], checkpointing=True)
    assert_equal_windows(again, want)


def test_compiled_and_eager_agree_on_shared_prompts():
    """Updates and masks, with and without recomputing activations."""
    config = TrainingConfig(train_mode="dpo")
    rows, found = laid_out(preference_rows("dpo", known=True), SHARED), []
    for compiled, checkpointing in ((False, False), (True, False), (True, True)):
        model = adapted()
        before = dict(tree_flatten(model.trainable_parameters()))
        loss = PreferenceLoss(model, config)
        step = TrainingStep(model, optim.SGD(0.1), masked_config(mask_warmup=0), compiled, loss=loss)
        for batch in (collate(rows, [1, 2]), collate_packs(rows, [[3, 0], [1, 2]], LENGTH)):
            with recompute_activations(list(model.layers) if checkpointing else []):
                total, _ = step(batch, batch.loss_counts, None, True)
            mx.eval(step.state, total)
        masks = [state.mask for state in step.importance["layers"].values()]
        moved = [a - before[name] for name, a in tree_flatten(model.trainable_parameters())]
        found.append(np.concatenate([np.array(a).reshape(-1) for a in masks + moved]))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-6 * np.abs(found[0]).max())


def test_windows_of_attention_end_where_they_do_for_an_answer_alone():
    """With a window that is shorter than the prompts."""
    model = build("gemma3_text")
    assert model.args.sliding_window < 24
    adapt(model, masked_config(num_layers=-1, rank=2, scale=2.0))
    random_adapters(model, size=0.05)
    rows, config = preference_rows("simpo", prompt=(24, 30)), TrainingConfig(train_mode="simpo")
    want = window_results(model, config, [collate(rows, range(4))])
    shared = laid_out(rows, SHARED)
    assert_equal_windows(window_results(model, config, [collate(shared, range(4))]), want)


def test_misalignment_of_shared_prompts_equals_that_of_separate_answers():
    rows, found = preference_rows("dpo", 1, prompt=(9, 10)), []
    for window in (
        collate(laid_out(rows, SHARED), [0]),
        collate_packs(laid_out(rows, JOINED), [[0]], 64),
    ):
        step = TrainingStep(model := adapted(), optim.SGD(1.0), masked_config())
        assert model is step.model
        measure_misalignment(step, window)
        found.append([np.array(state.misalignment) for state in step.importance["layers"].values()])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


# --- against float64 ------------------------------------------------------------------------------------------


def log_p(model, example):
    """Return log-probabilities of the targets of one answer alone, from the model's own logits in float64."""
    logits = np.array(model(mx.array(example.tokens[None, :-1])).astype(mx.float32), np.float64)[0]
    return log_softmax(logits, axis=-1)[np.arange(len(logits)), example.tokens[1:]]


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def expected(model, reference, rows, config, mode):
    """Return the mean loss and the measures of rows by their definitions, in float64."""
    beta = config.preference_beta or (2.0 if mode == "simpo" else 0.1)
    answers = [[(log_p(model, a), log_p(reference, a), a.loss_mask[1:]) for a in row.answers] for row in rows]
    sums = np.array([[[p[m].sum(), r[m].sum(), m.sum()] for p, r, m in row] for row in answers])
    policy, before, lengths = sums[..., 0], sums[..., 1], sums[..., 2]
    ratio, per_token = policy - before, policy / lengths
    measures = {}
    if mode == "kto":
        others = [row.mismatched for row in rows]
        gaps = [(log_p(model, a) - log_p(reference, a))[a.loss_mask[1:]].sum() for a in others]
        z = max(0.0, float(np.mean(gaps)))
        good = np.array([row.desirable for row in rows])
        sign = np.where(good, 1, -1)
        weight = np.where(good, config.desirable_weight, config.undesirable_weight)
        losses = weight * (1 - expit(beta * sign * (ratio[:, 0] - z)))
        right = sign * (ratio[:, 0] - z)
        measures = {
            "accuracy": np.mean((right > 0) + 0.5 * (right == 0)),
            "chosen_reward": beta * ratio[good, 0].mean(),
            "rejected_reward": beta * ratio[~good, 0].mean(),
            "chosen_logp": per_token[good, 0].mean(),
            "rejected_logp": per_token[~good, 0].mean(),
        }
        return losses.mean(), measures
    compared = per_token if mode.startswith(("orpo", "simpo")) else ratio
    if mode in ("ipo", "dpo per token"):
        compared = ratio / lengths
    d = compared[:, 0] - compared[:, 1]
    if mode.startswith("orpo"):
        odds = compared - np.log(-np.expm1(compared))
        losses = -beta * log_sigmoid(odds[:, 0] - odds[:, 1])
        tokens = [p[0][0][row.sft_mask[1:]] for p, row in zip(answers, rows, strict=True)]
        supervised = -np.concatenate(tokens).mean()
    elif mode == "ipo":
        losses = (d - 1 / (2 * beta)) ** 2
    elif mode == "hinge":
        losses = np.maximum(0, 1 - beta * d)
    elif mode == "simpo":
        losses = -log_sigmoid(beta * d - config.simpo_margin)
    else:
        e = config.label_smoothing
        losses = -(1 - e) * log_sigmoid(beta * d) - e * log_sigmoid(-beta * d)
    right = (d > 0) + 0.5 * (d == 0)
    longer, shorter = lengths[:, 0] > lengths[:, 1], lengths[:, 0] < lengths[:, 1]
    measures = {
        "accuracy": right.mean(),
        "chosen_reward": beta * compared[:, 0].mean(),
        "rejected_reward": beta * compared[:, 1].mean(),
        "chosen_logp": per_token[:, 0].mean(),
        "rejected_logp": per_token[:, 1].mean(),
        "accuracy_longer": right[longer].mean(),
        "accuracy_shorter": right[shorter].mean(),
    }
    return losses.mean() + (supervised if mode.startswith("orpo") else 0), measures


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.replace(" ", "_"))
@pytest.mark.parametrize("layout", [SEPARATE, SHARED])
def test_evaluation_equals_float64(mode, layout):
    """On nine rows in batches of four, with the reference computed in each iteration and before."""
    if mode == "kto" and layout == SHARED:
        pytest.skip("single answers share nothing")
    base, model = build("llama"), adapted()
    config = TrainingConfig(**MODES[mode], batch_size=4, reference="on-the-fly")
    rows = laid_out(preference_rows(mode, 9, seed=2), layout)
    want, measures = expected(model, base, rows, config, mode)
    loss = PreferenceLoss(model, config)
    reference = Reference(loss, config, ALONE)
    # The adapters before training: those that change nothing.
    reference.start = {
        name: mx.zeros_like(array) if name.endswith("lora_b") else array
        for name, array in reference.start.items()
    }
    with reference.installed():
        values = row_log_probabilities(loss, rows, evaluation_batches(rows, 4, -1, 0), ALONE)
    known = [replace(row, reference=tuple(of_row)) for row, of_row in zip(rows, values.tolist(), strict=True)]
    for of_split in (rows, known) if config.has_reference else (rows,):
        batches = evaluation_batches(of_split, 4, -1, 0)
        assert [len(batch.rows) for batch in batches] == [4, 4, 1]
        found = evaluate(model, batches, loss=loss, more=reference.window_arrays(batches))
        assert found.loss == pytest.approx(want, rel=2e-5)
        assert found.measures == pytest.approx(measures, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("before", [-100.0, 5.0])
def test_ktos_estimate_of_the_divergence_is_not_negative(before):
    """The mean over the mismatched answers of the whole window, or 0."""
    model, config = adapted(), TrainingConfig(train_mode="kto")
    rows = [replace(row, reference=(-9.0, before)) for row in preference_rows("kto", 5)]
    gaps = [log_p(model, row.mismatched)[row.mismatched.loss_mask[1:]].sum() - before for row in rows]
    window = [collate(rows, [0, 3, 4]), collate(rows, [1, 2])]
    more = Reference(PreferenceLoss(model, config), config, ALONE).window_arrays(window)
    assert (np.mean(gaps) < 0) == (before > 0)
    for arrays in more:
        assert arrays["baseline"].item() == pytest.approx(max(0.0, np.mean(gaps)), rel=1e-5)


def test_equal_rewards_count_as_one_half():
    """Before training, all rewards are exactly 0 and the loss is exactly log 2, whatever the batch."""
    model = build("llama")
    adapt(model, masked_config(num_layers=-1, rank=2))
    config = TrainingConfig(train_mode="dpo")
    loss, rows = PreferenceLoss(model, config), preference_rows("dpo", 5)
    batches = evaluation_batches(rows, 2, -1, 0)
    values = row_log_probabilities(loss, rows, batches, ALONE)
    rows = [replace(row, reference=tuple(found)) for row, found in zip(rows, values.tolist(), strict=True)]
    for batch in evaluation_batches(rows, 2, -1, 0):
        found = evaluate(model, [batch], loss=loss)
        assert np.float32(found.loss) == np.float32(math.log(2))
        assert (found.measures["accuracy"], found.measures["chosen_reward"]) == (0.5, 0.0)


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "whole"])
@pytest.mark.parametrize("layout", [SEPARATE, SHARED, "packed"])
def test_divergence_equals_float64(tiled, layout, monkeypatch):
    """KL(model || reference) per token, over the answers' tokens; only the first ones are probed."""
    args = llama_args(tie_word_embeddings=False)
    base, model = build_model(args=args), build_model(args=args)
    if tiled:
        set_sizes(monkeypatch, head_rows=8, head_columns=7)
        monkeypatch.setattr("nalora_mlx.ops.cross_entropy.COLUMN_MULTIPLE", 1)
    keys = None if tiled else ("lm_head", "mlp.gate_proj", "mlp.up_proj")  # a trained head has no tiles
    adapt(model, masked_config(num_layers=-1, rank=2, scale=2.0, keys=keys))
    rows = laid_out(
        preference_rows("dpo", 4, vocabulary=VOCABULARY), SHARED if layout == SHARED else SEPARATE
    )
    config = TrainingConfig(train_mode="dpo")
    preferences = PreferenceRun(PreferenceLoss(model, config), config, ALONE)
    assert preferences.loss.has_tiles == tiled
    random_adapters(model, size=0.3)
    pack = collate_packs(laid_out(rows, JOINED), [[3, 0], [1, 2]], LENGTH)
    batch = pack if layout == "packed" else collate(rows, range(4))

    def distributions(one, example):
        logits = np.array(one(mx.array(example.tokens[None, :-1])), np.float64)[0]
        return log_softmax(logits[example.loss_mask[1:]], axis=-1)

    order = [3, 0, 1, 2] if layout == "packed" else range(4)
    pairs = [(distributions(model, a), distributions(base, a)) for row in order for a in rows[row].answers]
    divergences = np.concatenate([(np.exp(p) * (p - q)).sum(-1) for p, q in pairs])
    trained = model.trainable_parameters()
    found = preferences.divergence(batch)["kl"]
    assert found == pytest.approx(divergences.mean(), rel=1e-4)
    assert found > 0.01
    for (name, array), (_, after) in zip(
        tree_flatten(trained), tree_flatten(model.trainable_parameters()), strict=True
    ):
        assert mx.array_equal(array, after), name
    monkeypatch.setattr(preference_run, "PROBED_TOKENS", 10)
    assert preferences.divergence(batch)["kl"] == pytest.approx(divergences[:10].mean(), rel=1e-4)


def test_logits_are_computed_in_tiles(monkeypatch):
    """Those of the answers' tokens only, not of the prompts'."""
    set_sizes(monkeypatch, head_rows=16, head_columns=7)
    monkeypatch.setattr("nalora_mlx.ops.cross_entropy.COLUMN_MULTIPLE", 1)
    model, config = adapted(), TrainingConfig(train_mode="dpo", reference="on-the-fly")
    loss = PreferenceLoss(model, config)
    loss.compiled = False
    loss.log_probabilities = loss.compile(lambda arrays: loss._answers(arrays, False)[0])
    shapes, logits_for = [], loss.head.logits_for

    def recording(hidden, which):
        shapes.append(logits_for(hidden, which).shape)
        return logits_for(hidden, which)

    monkeypatch.setattr(loss.head, "logits_for", recording)
    rows = laid_out(preference_rows("dpo", 8, prompt=(30, 40), answer=(6, 12)), SHARED)
    batch = collate(rows, range(8))
    (more,) = Reference(loss, config, ALONE).window_arrays([batch])
    reference_pass = len(shapes)
    assert reference_pass
    step = TrainingStep(model, optim.SGD(1.0), masked_config(), compiled=False, loss=loss)
    step(batch, batch.loss_counts, None, True, more=more)
    assert len(shapes) > 2 * reference_pass
    assert max(count for count, _ in shapes) <= 16
    assert max(columns for _, columns in shapes) <= 16
    answers = sum(example.supervised_tokens for example in rows)
    last = model.args.vocab_size % 7
    scored = sum(count for count, columns in shapes if columns == last)
    assert 3 * answers <= scored < 1.3 * 3 * answers  # the reference, the loss, and its gradient


# --- NaN ------------------------------------------------------------------------------------------------------

POISON = 40  # a token whose embedding is NaN


def poisoned_model():
    model = build_model(args=llama_args(num_hidden_layers=2, tie_word_embeddings=False))
    weight = np.array(model.model.embed_tokens.weight)
    weight[POISON] = np.nan
    model.model.embed_tokens.weight = mx.array(weight)
    adapt(model, masked_config(num_layers=-1, rank=2, scale=2.0))
    return model


@pytest.mark.parametrize("reference", ["precomputed", "on-the-fly"])
def test_a_broken_mismatched_answer_breaks_only_its_own_row(reference):
    """Not the whole window by way of KTO's baseline."""
    rows = preference_rows("kto", 4, known=reference == "precomputed")
    broken = rows[2].mismatched.tokens.copy()
    broken[0] = POISON
    rows[2] = replace(rows[2], mismatched=replace(rows[2].mismatched, tokens=broken))
    model, config = poisoned_model(), TrainingConfig(train_mode="kto", reference=reference)
    loss = PreferenceLoss(model, config)
    window = [collate(rows, [0, 1]), collate(rows, [2, 3])]
    more = Reference(loss, config, ALONE).window_arrays(window)
    assert all(math.isfinite(arrays["baseline"].item()) for arrays in more)
    assert math.isfinite(evaluate(model, window, loss=loss, more=more).loss)


def test_a_broken_row_is_not_taken_for_broken_weights():
    """Also if only the reference computes NaN for it, which the weights cannot help."""
    rows = preference_rows("dpo", 4)
    model, config = poisoned_model(), TrainingConfig(train_mode="dpo", reference="on-the-fly")
    loss = PreferenceLoss(model, config)
    reference = Reference(loss, config, ALONE)
    step = TrainingStep(model, optim.SGD(1e-3), masked_config(), loss=loss)
    good = LastGoodWeights(step, reference.window_arrays)
    first, second = collate(rows, [0, 1]), collate(rows, [2, 3])
    good.show(good.current(), first)
    assert good.give_finite_loss()
    reference.start = {name: array + math.nan for name, array in reference.start.items()}
    good.shown = True
    assert not good.are_at_fault(second)
