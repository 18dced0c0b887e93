"""The limit on the change of the selection, against mlx-lm's models with merged weights, in float64."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma, llama, mixtral, phi3

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.core.config import NALoRAConfig, TrainingConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.batches import Batch
from nalora_mlx.training import selection_limit
from nalora_mlx.training.distributed import Workers
from nalora_mlx.training.selection_limit import PROBE_TOKENS
from nalora_mlx.training.step import TrainingStep
from nalora_mlx.training.trainer import train
from tests.adapters.test_adapters import MIXTRAL
from tests.conftest import VOCABULARY, build_examples, build_model, llama_args, random_adapters
from tests.float64_reference import TRUTH

OFF = {"mask": "off", "step_scaling": False}
NONE = 1e9  # a limit that no update reaches
MODELS = {
    "silu": (llama, llama_args(), "silu"),
    "gelu": (gemma, llama_args(model_type="gemma", head_dim=8), "gelu"),
    "joint": (phi3, llama_args(model_type="phi3", tie_word_embeddings=False), "silu"),
    "experts": (mixtral, MIXTRAL | {"num_local_experts": 8}, "silu"),
}


def adapted(name="silu", **settings):
    module, args, _ = MODELS[name]
    model = build_model(module=module, args=args)
    mx.random.seed(11)
    adapt(model, NALoRAConfig(**({"num_layers": -1, "rank": 4, "scale": 4.0, **OFF} | settings)))
    random_adapters(model)
    model.train()
    return model


def make_batch(length=40, real=(40, 30), seed=0):
    tokens = np.random.default_rng(seed).integers(1, VOCABULARY, (len(real), length + 1)).astype(np.int32)
    mask = (np.arange(length) < np.array(real)[:, None]).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, mask, tuple(range(len(real))))


def parameters(model):
    return {name: np.array(a, np.float64) for name, a in tree_flatten(model.trainable_parameters())}


def update(model, limit, batch=None, optimizer=None, **settings):
    """Take one step; return the parameters before and after it, and the change of the selection."""
    batch = batch or make_batch()
    before = parameters(model)
    config = NALoRAConfig(**({"num_layers": -1, "rank": 4, "scale": 4.0, **OFF} | settings))
    config = NALoRAConfig(**vars(config) | {"selection_limit": limit})
    step = TrainingStep(model, optimizer or optim.Adam(0.02, bias_correction=True), config)
    loss, _ = step(batch, batch.supervised_tokens, None, True)
    mx.eval(step.state, loss)
    return before, parameters(model), step.importance["selection_change"].item()


class Recorder(nn.Module):
    """Records the inputs of a module."""

    def __init__(self, inner, record):
        super().__init__()
        self.inner, self.record = inner, record

    def __call__(self, *inputs):
        self.record.append([np.array(x, np.float64) for x in inputs])
        return self.inner(*inputs)


def true_selection(name, adapters, tokens):
    """Return rho(z) of each layer of mlx-lm's model with merged weights: {(token, place, expert): [F]}.

    The place is that among the token's experts in ascending order; a dense MLP is expert 0.
    """
    module, args, activation = MODELS[name]
    model = build_model(module=module, args=args)
    for path in {key.rpartition(".")[0] for key in adapters}:
        a, b = adapters[f"{path}.lora_a"], adapters[f"{path}.lora_b"]
        delta = 4.0 * (b @ a if a.ndim == 3 else (a @ b).T)
        weight = dict(tree_flatten(model.parameters()))[f"{path}.weight"]
        merged = mx.array((np.array(weight, np.float64) + delta).astype(np.float32))
        model.load_weights([(f"{path}.weight", merged)], strict=False)
    records = []
    for layer in model.layers:
        record = []
        records.append(record)
        if name == "experts":
            layer.block_sparse_moe.switch_mlp = Recorder(layer.block_sparse_moe.switch_mlp, record)
        else:
            layer.mlp = Recorder(layer.mlp, record)
    mx.eval(model(mx.array(tokens)))
    selections = []
    for layer, [(x, *routing)] in zip(model.layers, records, strict=True):
        if name == "experts":
            gate = np.array(layer.block_sparse_moe.switch_mlp.inner.gate_proj.weight, np.float64)
        elif name == "joint":
            gate = np.split(np.array(layer.mlp.inner.gate_up_proj.weight, np.float64), 2)[0]
        else:
            gate = np.array(layer.mlp.inner.gate_proj.weight, np.float64)
        x = x.reshape(-1, x.shape[-1])
        chosen = routing[0].reshape(len(x), -1).astype(int) if routing else np.zeros((len(x), 1), int)
        gate = gate if gate.ndim == 3 else gate[None]
        rho = TRUTH[activation][2]
        selections.append(
            {
                (i, place, e): rho(gate[e] @ x[i])
                for i, experts in enumerate(chosen)
                for place, e in enumerate(sorted(experts))
            }
        )
    return selections


def true_change(name, before, after, tokens):
    changes = [
        np.abs(new[key] - old[key]).mean()
        for old, new in zip(
            true_selection(name, before, tokens), true_selection(name, after, tokens), strict=True
        )
        for key in old.keys() & new.keys()
    ]
    return np.mean(changes)


@pytest.mark.parametrize("length", [7, 90])
@pytest.mark.parametrize("name", MODELS)
def test_change_equals_that_of_the_merged_models(name, length):
    """Measured on at most 64 tokens at the end of the first row, without its padding."""
    batch = make_batch(length, (min(length, 80) - 2, length))
    before, after, change = update(adapted(name), NONE, batch)
    real = int(batch.token_mask[0].sum())
    tokens = batch.inputs[:1, max(0, real - PROBE_TOKENS) : real]
    assert change > 0.01
    assert change == pytest.approx(true_change(name, before, after, tokens), rel=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_long_update_is_shortened_in_its_direction(name):
    before, whole, change = update(adapted(name), NONE, optimizer=optim.Adam(0.001))
    limit = change / 3
    _, shortened, same = update(adapted(name), limit, optimizer=optim.Adam(0.001))
    assert same == pytest.approx(change, rel=1e-5)
    for key, old in before.items():
        np.testing.assert_allclose(shortened[key] - old, (whole[key] - old) / 3, rtol=1e-3, atol=1e-6)
    reached = true_change(name, before, shortened, make_batch().inputs[:1])
    assert reached == pytest.approx(limit, rel=0.25)  # exact only for small changes


def test_a_short_update_stays_bit_for_bit():
    results = []
    for limit in (0.0, NONE):
        config = TrainingConfig(batch_size=3, iters=6, steps_per_report=3)
        model = adapted(selection_limit=limit)
        train(model, build_examples(), config=config, optimizer=optim.AdamW(1e-2, weight_decay=0.1))
        results.append(parameters(model))
    for key, plain in results[0].items():
        assert np.array_equal(plain, results[1][key]), key


def test_decoupled_weight_decay_is_shortened_too():
    """A shortened update is what a lower learning rate would do."""

    def optimizer(rate):
        return optim.AdamW(rate, weight_decay=0.5, bias_correction=True)

    _, _, change = update(adapted(), NONE, optimizer=optimizer(0.02))
    _, shortened, _ = update(adapted(), change / 4, optimizer=optimizer(0.02))
    _, slower, _ = update(adapted(), NONE, optimizer=optimizer(0.005))
    for key, expected in slower.items():
        np.testing.assert_allclose(shortened[key], expected, rtol=1e-4, atol=1e-6)


def test_dropout_does_not_count():
    """With a learning rate of 0 nothing changes, though each forward drops other elements."""
    _, _, change = update(adapted(dropout=0.5), NONE, optimizer=optim.SGD(0.0), dropout=0.5)
    assert change == 0


def test_padding_may_hold_anything():
    batch = make_batch(20, (12, 20))
    changes = []
    for token in (0, VOCABULARY - 1):
        batch.inputs[0, 13:] = token  # a view of the targets, too
        changes.append(update(adapted(), NONE, batch, optimizer=optim.SGD(1e-3))[2])
    assert changes[0] == pytest.approx(changes[1], rel=1e-5)
    assert changes[0] > 0


def test_the_limit_holds_in_a_run_whose_rate_is_too_high():
    changes = []
    for limit in (0.0, 0.02):
        model = adapted(selection_limit=limit)
        examples = build_examples(60, high=12)
        tokens = examples[0].tokens[None, :-1]
        path = [parameters(model)]
        for i in range(6):
            config = TrainingConfig(batch_size=4, iters=1, seed=i)
            train(model, examples, config=config, optimizer=optim.Adam(0.1, bias_correction=True))
            path.append(parameters(model))
        changes.append([true_change("silu", *pair, tokens) for pair in itertools.pairwise(path)])
    assert min(changes[0]) > 0.04
    assert max(changes[1]) < 0.03


def test_an_update_with_nan_is_skipped():
    model = adapted()
    before, after, _ = update(model, 0.02, optimizer=optim.SGD(float("nan")))
    for key, old in before.items():
        assert np.array_equal(old, after[key])


def test_an_update_after_which_the_model_computes_nan_is_skipped():
    """The new weights are finite, but what the model computes with them is not. Nothing else is kept of it, either."""
    model = adapted()
    config = NALoRAConfig(num_layers=-1, rank=4, scale=4.0, **OFF, selection_limit=0.02)
    optimizer = optim.SGD(1e15)
    step, batch, before = TrainingStep(model, optimizer, config), make_batch(), parameters(model)
    for rate, moves in ((1e15, False), (1e-3, True)):
        optimizer.learning_rate = rate
        loss, _ = step(batch, batch.supervised_tokens, None, True, (0, 1))
        mx.eval(step.state, loss)
        assert bool(step.health.finite) is moves
        assert np.isfinite(step.importance["selection_change"].item())
        assert all(np.array_equal(before[key], new) for key, new in parameters(model).items()) is not moves


def test_workers_shorten_alike(monkeypatch):
    """The sum of changes and the number of tokens are added over workers before they are divided."""
    batches = [make_batch(seed=seed) for seed in (1, 2)]
    alone = [update(adapted(), NONE, batch, optimizer=optim.SGD(1e-3))[2] for batch in batches]
    sent = []

    def total(self, tree):
        sent.append(tree)
        return tree

    monkeypatch.setattr(Workers, "sum", total)
    update(adapted(), NONE, batches[0], optimizer=optim.SGD(1e-3))
    change, count = sent[-1]
    assert alone[0] != alone[1]
    assert count.size == change.size == 1


def test_an_accumulated_update_is_limited_once():
    examples = build_examples(12, high=12)
    results = []
    for accumulation, size in ((1, 4), (2, 2)):
        model = adapted(selection_limit=0.01)
        config = TrainingConfig(batch_size=size, iters=accumulation, grad_accumulation_steps=accumulation)
        before = parameters(model)
        train(model, examples[:4], config=config, optimizer=optim.SGD(0.02))
        after = parameters(model)
        results.append(true_change("silu", before, after, examples[0].tokens[None, :-1]))
        moved = max(np.abs(after[key] - before[key]).max() for key in before)
        assert moved > 0
    assert max(results) < 0.02
    assert max(results) / min(results) < 1.5


def test_updates_between_measured_ones_are_shortened_alike():
    assert [i for i in range(1, 41) if selection_limit.is_measured(i)] == [*range(1, 21), 24, 32, 40]
    model = adapted()
    config = NALoRAConfig(num_layers=-1, rank=4, scale=4.0, **OFF, selection_limit=1e-3)
    step, batch = TrainingStep(model, optim.SGD(1e-2), config), make_batch()
    lengths, changes = [], []
    for iteration in (20, 21, 22, 24):
        before = parameters(model)
        loss, _ = step(batch, batch.supervised_tokens, None, True, (0, iteration))
        mx.eval(step.state, loss)
        after = parameters(model)
        changes.append(step.importance["selection_change"].item())
        lengths.append(np.sqrt(sum(((after[key] - before[key]) ** 2).sum() for key in before)))
    assert changes[0] == changes[1] == changes[2] != changes[3]
    assert lengths == pytest.approx([lengths[0]] * 4, rel=0.1)


def test_a_model_without_selection_weights_has_no_limit(monkeypatch):
    monkeypatch.setattr(selection_limit, "has_selection", lambda mlp: False)
    model = adapted(selection_limit=0.01)
    step = TrainingStep(model, optim.Adam(1e-3), NALoRAConfig(selection_limit=0.01))
    assert step.limit is None
    assert any("selection_limit has no effect" in notice for notice in step.notices())
    plain = TrainingStep(adapted(), optim.Adam(1e-3), NALoRAConfig(**OFF, selection_limit=0))
    assert not any("selection_limit" in notice for notice in plain.notices())


@pytest.mark.parametrize("limit", [-0.1, float("inf"), float("nan")])
def test_bad_limits_are_refused(limit):
    with pytest.raises(InputError, match="selection_limit is"):
        NALoRAConfig(selection_limit=limit)
