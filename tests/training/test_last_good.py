"""An update that breaks the weights is undone: what a run saves always has a finite loss."""

import math

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.core.config import NALoRAConfig, TrainingConfig
from nalora_mlx.data.batches import collate, evaluation_batches
from nalora_mlx.data.tokenization import Example
from nalora_mlx.runs import checkpoints
from nalora_mlx.training.evaluation import evaluate
from nalora_mlx.training.last_good import LastGoodWeights
from nalora_mlx.training.step import TrainingStep
from nalora_mlx.training.trainer import train
from tests.conftest import VOCABULARY, build_examples, build_model, llama_args

HUGE = 1e6  # a learning rate after which the weights are finite and activations in float16 are not
POISON = VOCABULARY - 1  # a token whose embedding is NaN
FULL = {"fine_tune_type": "full", "num_layers": 1}


def adapted(poisoned=False, keys=None):
    model = build_model(args=llama_args(tie_word_embeddings=False), dtype=mx.float16, gain=1.0)
    if poisoned:
        weight = np.array(model.model.embed_tokens.weight)
        weight[POISON] = np.nan
        model.model.embed_tokens.weight = mx.array(weight)
    mx.random.seed(11)
    adapt(model, NALoRAConfig(num_layers=-1, rank=2, scale=1.0, selection_limit=0, keys=keys))
    mx.eval(model.parameters())
    return model


def last_layer():
    model = build_model(gain=1.0)
    model.freeze()
    model.layers[-1].unfreeze()
    return model


def spiking(*updates, rate=1e-3, huge=HUGE):
    """Return SGD with a huge learning rate in these updates, counted from 1."""

    def schedule(step):
        return sum((mx.where(step == update - 1, huge, 0) for update in updates), mx.array(rate))

    return optim.SGD(schedule)


def run(model, optimizer, output=None, examples=None, valid=(), adapter_config=None, resume=None, **settings):
    """Train; return the result, or the error that ended the run, and the texts of its notices."""
    events = []
    config = TrainingConfig(**({"iters": 8, "batch_size": 2, "save_every": 100} | settings))
    examples = examples or build_examples()
    try:
        result = train(
            model, examples, valid, config, optimizer, output, [events.append], adapter_config, resume
        )
    except FloatingPointError as error:
        result = str(error)
    return result, [event["text"] for event in events if event["event"] == "notice"]


def copies(arrays):
    return {name: np.array(array) for name, array in arrays.items()}


def saved(directory):
    return copies(mx.load(str(directory / "adapters.safetensors")))


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def loss_of(model):
    return evaluate(model, evaluation_batches(build_examples(), 4, -1, 0))[0]


def test_a_run_whose_every_update_breaks_the_weights_saves_those_before(tmp_path):
    model = adapted()
    start = copies(adapter_weights(model))
    error, notices = run(model, optim.SGD(HUGE), tmp_path / "a")
    assert "updates in a row were skipped" in error
    assert "the loss is nan, and the weights are at fault, not the rows" in error
    assert "row:" not in error + "".join(notices)
    assert "lower the learning rate" in error
    (checkpoint,) = checkpoints.steps(tmp_path / "a" / "checkpoints").values()
    for directory in (tmp_path / "a", checkpoint):
        assert_equal(saved(directory), start)
    assert math.isfinite(loss_of(model))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_broken_update_is_undone_and_the_run_goes_on(accumulate, tmp_path):
    """The state after it is that before it: as if the run had ended one update earlier."""
    settings = {"grad_accumulation_steps": accumulate, "steps_per_report": 1}
    result, notices = run(adapted(), spiking(3), iters=6 * accumulate, **settings)
    assert (result.updates, result.skipped) == (4, 2)  # the broken one, and the one that showed it
    assert notices == [
        f"iteration {4 * accumulate}: the loss is nan, and the weights are at fault, not the rows: an update broke "
        "them, and is undone; lower the learning rate, or clip the gradient"
    ]
    assert math.isfinite(result.train_loss)
    before, stopped = adapted(), adapted()
    run(before, spiking(), iters=2 * accumulate, **settings)
    result, notices = run(stopped, spiking(3), tmp_path / "a", iters=3 * accumulate, **settings)
    assert (result.updates, result.skipped, result.stopped) == (2, 1, None)  # shown when it was to be saved
    assert len(notices) == 1
    assert_equal(copies(adapter_weights(stopped)), copies(adapter_weights(before)))
    assert_equal(saved(tmp_path / "a"), copies(adapter_weights(before)))


@pytest.mark.parametrize("every", [{"save_every": 1}, {"steps_per_eval": 1}], ids=["save", "validation"])
def test_what_is_saved_at_any_time_has_a_finite_loss(every, tmp_path):
    """Also the best adapter, with a single broken update that no later batch has shown yet."""
    result, _ = run(adapted(), spiking(2), tmp_path / "a", valid=build_examples(4, seed=5), **every)
    assert (result.updates, result.skipped) == (7, 1)
    assert math.isfinite(result.best_valid_loss)
    directories = [tmp_path / "a", tmp_path / "a" / "best"]
    for directory in directories + list(checkpoints.steps(tmp_path / "a" / "checkpoints").values()):
        model = adapted()
        model.load_weights(str(directory / "adapters.safetensors"), strict=False)
        assert math.isfinite(loss_of(model)), directory


def test_resuming_after_an_undone_update_gives_the_same_bits(tmp_path):
    whole, resumed = adapted(), adapted()
    optimizer = spiking(3, rate=0.1)
    run(whole, optimizer, tmp_path / "a", save_every=4, iters=9, grad_clip=1.0)
    resume = tmp_path / "a" / "checkpoints" / "step-0000004"
    state = (resume / "training_state.json").read_text()
    assert '"skipped": 2' in state
    result, notices = run(
        resumed, spiking(3, rate=0.1), tmp_path / "b", resume=resume, save_every=4, iters=9, grad_clip=1.0
    )
    assert (result.iterations, result.skipped) == (9, 2)
    assert notices == []
    assert_equal(copies(adapter_weights(resumed)), copies(adapter_weights(whole)))
    one, other = (
        mx.load(str(tmp_path / d / "checkpoints/step-0000009/training_state.safetensors")) for d in "ab"
    )
    assert_equal(copies(one), copies(other))


def test_full_fine_tuning_ends_with_its_last_checkpoint(tmp_path):
    """It keeps no second copy of all weights in memory."""
    model = last_layer()
    assert LastGoodWeights(TrainingStep(model, optim.SGD(0.0))).current() is None
    error, notices = run(model, spiking(6, huge=1e17), tmp_path / "a", adapter_config=FULL, save_every=4)
    assert error == (
        "iteration 7: the loss is nan, and the weights are at fault, not the rows: the update broke them, and is not "
        "saved; the last complete checkpoint is iteration 4; lower the learning rate, or clip the gradient"
    )
    assert notices == []
    good = last_layer()
    run(good, spiking(), tmp_path / "b", adapter_config=FULL, iters=4)
    assert list(checkpoints.steps(tmp_path / "a" / "checkpoints")) == [4]
    assert_equal(saved(tmp_path / "a"), saved(tmp_path / "b"))


@pytest.mark.parametrize("broken", [False, True], ids=["rows", "weights"])
def test_rows_and_weights_are_told_apart(broken):
    """Right after an update, when neither has given a finite loss yet. The check itself changes no weights."""
    model = adapted(poisoned=True)
    step = TrainingStep(model, optim.SGD(HUGE if broken else 1e-3), NALoRAConfig(selection_limit=0))
    good, examples = LastGoodWeights(step), build_examples(6)
    tokens = [np.minimum(row.tokens, POISON - 1) for row in examples]
    examples = [Example(t, row.loss_mask, row.source) for t, row in zip(tokens, examples, strict=True)]
    poisoned = [Example(np.full_like(row.tokens, POISON), row.loss_mask, "p:1") for row in examples]
    batch, bad = collate(examples, [0, 1]), collate(poisoned, [0, 1])
    start, before = copies(adapter_weights(model)), good.current()
    total, _ = step(batch, batch.supervised_tokens, None, True)
    mx.eval(step.state, total)
    good.show(before, batch)
    good.shown = False
    after = copies(adapter_weights(model))
    assert good.are_at_fault(collate(examples, [2, 3]) if broken else bad) is broken
    assert_equal(copies(adapter_weights(model)), after)
    assert good.shown is not broken
    assert any((after[name] != start[name]).any() for name in start)
    assert good.restore()
    assert_equal(copies(adapter_weights(model)), start)


def test_weights_that_break_only_other_rows_are_at_fault():
    """The last good batch still has a finite loss, but this one had it too before the update."""
    model = adapted(keys=("model.embed_tokens",))
    good = LastGoodWeights(TrainingStep(model, optim.SGD(1e-3)))
    first, second = (
        collate([Example(np.full(6, token, np.int32), np.arange(6) > 1, "r:1")], [0]) for token in (3, 4)
    )
    good.show(good.current(), first)
    embedding = model.model.embed_tokens
    embedding.lora_a = embedding.lora_a.at[4].add(1e30)
    embedding.lora_b = mx.ones(embedding.lora_b.shape)
    good.shown = False
    assert good.give_finite_loss()
    good.shown = False
    assert good.are_at_fault(second)


def test_weights_that_break_some_rows_are_at_fault_when_these_come():
    """Other rows have given a finite loss of the broken weights. The run returns to the weights of its last save."""
    model = adapted(keys=("model.embed_tokens",))
    good = LastGoodWeights(TrainingStep(model, optim.SGD(1e-3)))
    start = copies(adapter_weights(model))
    first, second = (
        collate([Example(np.full(6, token, np.int32), np.arange(6) > 1, "r:1")], [0]) for token in (3, 4)
    )
    embedding = model.model.embed_tokens
    embedding.lora_a = embedding.lora_a.at[4].add(1e30)
    embedding.lora_b = mx.ones(embedding.lora_b.shape)
    good.show(good.current(), first)
    assert good.are_at_fault(second)
    assert good.restore()
    assert_equal(copies(adapter_weights(model)), start)
