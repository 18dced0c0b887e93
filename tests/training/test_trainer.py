"""The trainer against mlx-lm's modules, against NumPy, and against itself with other execution settings."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import mixtral
from mlx_lm.tuner.utils import linear_to_lora_layers
from scipy.special import expit

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.adapters.forward_pass import recompute_activations
from nalora_mlx.adapters.merge import fuse_model
from nalora_mlx.core.config import PLAIN_LORA, TrainingConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.data import batches as batching
from nalora_mlx.data.packing import epoch_packs
from nalora_mlx.training.diagnostics import describe_layers, measure_misalignment
from nalora_mlx.training.distributed import Workers
from nalora_mlx.training.evaluation import evaluate
from nalora_mlx.training.step import TrainingStep
from nalora_mlx.training.trainer import train
from tests.conftest import VOCABULARY, build_examples, build_model, masked_config, random_adapters, set_sizes
from tests.training.test_importance import reference as importance_reference

OFF = {"mask": "off", "step_scaling": False}
BOUNDARY = 1.2784645427610737  # of SiLU's partition: its derivative is 0 at minus this


def adapted(model=None, **settings):
    """Return the tiny llama, or another model, with adapters that always start the same."""
    model = model or build_model()
    mx.random.seed(11)
    adapt(model, masked_config(**({"num_layers": -1, "rank": 4, "scale": 4.0} | settings)))
    mx.eval(model.parameters())
    return model


def weights(model):
    return {name: np.array(a) for name, a in adapter_weights(model).items()}


def relative_error(actual, expected):
    """Return ||actual - expected|| / ||expected|| over all arrays."""
    assert actual.keys() == expected.keys()
    squares = sum(float(((actual[k] - expected[k]) ** 2).sum()) for k in expected)
    return np.sqrt(squares / sum(float((expected[k] ** 2).sum()) for k in expected))


def run(model, examples, optimizer=None, listeners=(), **settings):
    config = TrainingConfig(**({"iters": 8, "batch_size": 3, "steps_per_report": 4} | settings))
    return train(model, examples, (), config, optimizer or optim.Adam(1e-2), listeners=listeners)


# --- equality with plain LoRA -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: optim.Adam(3e-3), id="adam", marks=pytest.mark.slow),
        pytest.param(lambda: optim.AdamW(3e-3, weight_decay=0.1), id="adamw"),
    ],
)
def test_without_mechanisms_training_equals_mlx_lms_lora(build):
    """Compare 20 steps with a training loop over mlx-lm's LoRALinear on the same batches, in float32 and float64.

    Rounding takes mlx-lm's own float32 run about 1e-4 away from float64, a tenth or ten times as far with another
    model. On average over some models, ours must stay about as close.
    """

    def loss(model, inputs, targets, mask):
        return (nn.losses.cross_entropy(model(inputs), targets) * mask).sum() / mask.sum()

    def train_with_mlx_lm(seed, start, dtype):
        model = build_model(seed)
        model.freeze()
        linear_to_lora_layers(model, 3, {"rank": 4, "scale": 4.0, "dropout": 0.0})
        model.load_weights([(name, mx.array(array)) for name, array in start.items()], strict=False)
        model.set_dtype(dtype)
        optimizer, step = build(), nn.value_and_grad(model, loss)
        batches = batching.training_batches(build_examples(20, seed), 3, 0)
        for _ in range(20):
            batch = next(batches)
            mask = mx.array(batch.loss_mask).astype(dtype)
            _, gradients = step(model, mx.array(batch.inputs), mx.array(batch.targets), mask)
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)
        return weights(model)

    ratios = []
    for seed in range(8):
        ours = adapted(build_model(seed), **OFF)
        start = weights(ours)
        run(ours, build_examples(20, seed), build(), iters=20)
        exact = train_with_mlx_lm(seed, start, mx.float64)
        moved = {name: exact[name] - start[name] for name in exact}

        def error(result, exact=exact, moved=moved):
            return relative_error({name: moved[name] + result[name] - exact[name] for name in moved}, moved)

        ratios.append(error(weights(ours)) / error(train_with_mlx_lm(seed, start, mx.float32)))
    assert np.exp(np.mean(np.log(ratios))) < 2


# --- the mechanisms -----------------------------------------------------------------------------------------

METHODS = {
    "soft": {},
    "hard": {"mask": "hard", "keep_fraction": 0.25, "preserve": "none", "step_scaling": False},
    "sensitivity": {"statistic": "sensitivity", "preserve": "mean"},
    "both branches": {"branches": ("gate", "up"), "preserve": "function"},
    "step scaling": {"mask": "off", "gamma": (0.2, 1.0, 0.6)},
}


def gate_inputs(model, batches, projections=("gate_proj", "up_proj")):
    """Record the gate pre-activations and up branches of an mlx-lm model; per layer, [real tokens, F] each."""
    records, outputs = [], {}

    class Recorder(nn.Module):
        def __init__(self, inner, where):
            super().__init__()
            self.inner = inner
            self._where = where

        def __call__(self, x):
            y = self.inner(x)
            outputs[self._where].append(y)
            return y

    for i, layer in enumerate(model.model.layers):
        for name in projections:
            outputs[i, name] = []
            layer.mlp[name] = Recorder(layer.mlp[name], (i, name))
    for batch in batches:
        model(mx.array(batch.inputs))
        real = batch.token_mask.astype(bool)
        records.append({key: np.array(y.pop(), dtype=np.float64)[real] for key, y in outputs.items()})
    return [
        tuple(np.concatenate([r[i, name] for r in records]) for name in projections)
        for i in range(len(model.model.layers))
    ]


def merged_copy(model):
    """Return an mlx-lm model with the adapters of this one merged into its weights."""
    copy = build_model()
    adapt(copy, masked_config(num_layers=-1, rank=4, scale=4.0))
    copy.load_weights(list(adapter_weights(model).items()), strict=False)
    fuse_model(copy)
    return copy


def observation(z, u, statistic):
    """Sum a layer's statistics over tokens in float64, from their definitions."""
    response = np.abs(expit(z) * (1 + z * expit(-z)))
    if statistic == "sensitivity":
        response = response * np.abs(u)
    return {
        "tokens": np.float64(len(z)),
        "responsiveness": response.sum(0),
        "above_boundary": np.stack([(z >= -BOUNDARY).sum(0), (z >= BOUNDARY).sum(0)]).astype(np.float64),
    }


def take_steps(settings, optimizer, steps=1, accumulate=1, checkpointing=False, compiled=True, adapters=None):
    """Run TrainingStep; return the model, the step, and the expected statistics per layer and update."""
    examples = build_examples(18, seed=3)
    model = adapted(**settings)
    random_adapters(model, size=0.02) if adapters is None else model.load_weights(adapters, strict=False)
    config = masked_config(**settings)
    step = TrainingStep(model, optimizer, config, compiled)
    batches = batching.training_batches(examples, 3, 0)
    recorded = []
    model.train()
    for _ in range(steps):
        window = [next(batches) for _ in range(accumulate)]
        recorded.append(gate_inputs(merged_copy(model), window))
        accumulated, tokens = None, sum(b.supervised_tokens for b in window)
        for i, batch in enumerate(window, 1):
            with recompute_activations(list(model.layers) if checkpointing else []):
                total, accumulated = step(batch, tokens, accumulated, i == len(window))
            mx.eval(step.state, total, accumulated)
    observed = [[observation(z, u, config.statistic) for z, u in layers] for layers in recorded]
    return model, step, list(zip(*observed, strict=True))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_column_moves_by_q_times_the_unscaled_step(name):
    settings = METHODS[name] | {"mask_warmup": 0}
    start = adapted(**settings)
    before = weights(start)
    initial = list(adapter_weights(start).items())
    plain, _, _ = take_steps(settings | OFF, optim.Adam(1e-2), adapters=initial)
    scaled, _, observed = take_steps(settings, optim.Adam(1e-2), adapters=initial)
    parameters = masked_config(**settings)
    moved_plain, moved = weights(plain), weights(scaled)
    scaled_paths = set()
    for layer, statistics in enumerate(observed):
        shape = statistics[0]["responsiveness"].shape
        q = importance_reference(list(statistics), parameters, shape)[-1][3]
        for branch in parameters.branches:
            path = f"model.layers.{layer}.mlp.{branch}_proj.lora_b"
            scaled_paths.add(path)
            step, plain_step = moved[path] - before[path], moved_plain[path] - before[path]
            np.testing.assert_allclose(step, q * plain_step, rtol=1e-5, atol=0)
            frozen = q == 0
            np.testing.assert_array_equal(moved[path][:, frozen], before[path][:, frozen])
            if name == "hard":
                assert frozen.sum() == 36  # a quarter of 48 channels is kept
                assert (step[:, ~frozen] != 0).all()
    for path in moved:
        if path not in scaled_paths:
            np.testing.assert_array_equal(moved[path], moved_plain[path])


def test_weight_decay_acts_on_every_column():
    settings = METHODS["hard"] | {"mask_warmup": 0}
    start = adapted(**settings)
    random_adapters(start, size=0.5)
    before, initial = weights(start), list(adapter_weights(start).items())
    model, _, observed = take_steps(settings, optim.AdamW(1e-2, weight_decay=0.3), adapters=initial)
    after = weights(model)
    for layer, statistics in enumerate(observed):
        q = importance_reference(list(statistics), masked_config(**settings), (48,))[-1][3]
        path = f"model.layers.{layer}.mlp.gate_proj.lora_b"
        np.testing.assert_allclose(
            after[path][:, q == 0], before[path][:, q == 0] * (1 - 1e-2 * 0.3), rtol=1e-6
        )


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_importance_state_equals_float64_from_an_unmodified_model(accumulate, checkpointing, compiled):
    """After some updates, against an mlx-lm model with the merged weights on the same padded batches."""
    settings = {"statistic": "derivative", "mask_warmup": 1}
    _, step, observed = take_steps(settings, optim.Adam(5e-3), 4, accumulate, checkpointing, compiled)
    parameters = masked_config(**settings)
    layers = step.importance["layers"]
    for layer, statistics in enumerate(observed):
        s, occupancy, mask, _ = importance_reference(list(statistics), parameters, (48,))[-1]
        state = layers[f"model.layers.{layer}.mlp"]
        correction = 1 - parameters.beta**4
        assert state.updates.item() == 4
        np.testing.assert_allclose(np.array(state.importance) / correction, s, rtol=1e-5)
        np.testing.assert_allclose(np.array(state.mask), mask, rtol=1e-5)
        above = np.array(state.above_boundary) / correction
        np.testing.assert_allclose(above[1], occupancy[2], atol=1e-6)
        np.testing.assert_allclose(above[0], occupancy[1] + occupancy[2], atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"route": True}, {"mask": "hard"}], ids=str)
def test_eager_compiled_and_checkpointed_agree(settings):
    results = []
    for compiled, checkpointing in ((False, False), (True, False), (True, True), (False, True)):
        model, _, _ = take_steps(
            settings | {"mask_warmup": 1}, optim.SGD(0.05), 4, 2, checkpointing, compiled
        )
        results.append(weights(model))
    for other in results[1:]:
        assert relative_error(other, results[0]) < 1e-5


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_misalignment_equals_its_definition(packed):
    """On the first row. Measuring compiles nothing, and does not change parameters, optimizer or importance."""
    # Without adapters in the attention, the first MLP has the same input in the base model.
    model, step, _ = take_steps(
        {"keys": ("mlp.gate_proj", "mlp.up_proj"), "dropout": 0.5}, optim.Adam(1e-2), 1
    )
    examples = build_examples(18, seed=3)
    batch = next(batching.training_batches(examples, 3, 0, packing=packed))
    count = 1 if batch.segment_ids is None else batch.segment_ids[0].max()
    before = dict(tree_flatten([model.parameters(), step.state_tree()]))
    graphs = step.graph_of_shape.cache_info().currsize
    measure_misalignment(step, batch)
    assert step.graph_of_shape.cache_info().currsize == graphs
    assert model.training
    for key, array in tree_flatten([model.parameters(), step.state_tree()]):
        assert key.endswith("misalignment") or mx.array_equal(array, before[key]), key
    first = [batching.collate(examples, [row]) for row in batch.rows[:count]]
    base, tuned = gate_inputs(build_model(), first), gate_inputs(merged_copy(model), first)
    (z0, _), (z, u) = base[0], tuned[0]
    feature = np.abs((z - z0) * expit(z0) * u).sum()
    selection = np.abs(z * (expit(z) - expit(z0)) * u).sum()
    measured = describe_layers(step)["model.layers.0.mlp"]["misalignment"]
    assert measured == pytest.approx(selection / (feature + selection), rel=1e-5)


def test_a_nan_misalignment_is_dropped():
    model, step, _ = take_steps({}, optim.Adam(1e-2))
    batch = batching.collate(build_examples(2), [0, 1])
    measure_misalignment(step, batch)
    before = {path: row["misalignment"] for path, row in describe_layers(step).items()}
    assert all(0 < value < 1 for value in before.values())
    model.model.embed_tokens.weight = mx.full(model.model.embed_tokens.weight.shape, float("nan"))
    measure_misalignment(step, batch)
    assert {path: row["misalignment"] for path, row in describe_layers(step).items()} == before


def test_layers_without_misalignment_need_no_sum_over_workers():
    """With several workers, a sum over no arrays would raise an error."""
    model = adapted()
    step = TrainingStep(model, optim.Adam(1e-2), masked_config())
    stacks = step.state["importance"]["stacks"]
    for stack, state in stacks.items():
        stacks[stack] = state._replace(misalignment=None)  # as for a plain sigmoid gate
    step.workers = Workers(0, 2)
    measure_misalignment(step, batching.collate(build_examples(2), [0, 1]))
    assert all("misalignment" not in row for row in describe_layers(step).values())


def test_route_masks_only_the_gradient_of_lora_a():
    """With a hard mask m, the gradient of A_g is x^T ((dz * m) B^T). The other gradients are as without route."""
    settings = {"mask": "hard", "keep_fraction": 0.25, "mask_warmup": 0}
    examples = build_examples(18, seed=3)
    batch = next(batching.training_batches(examples, 3, 0))
    mask = np.zeros(48)
    mask[::4] = 1
    gradients = {}
    for route in (False, True):
        model = adapted(**settings, route=route)
        random_adapters(model, size=0.05)
        step = TrainingStep(
            model, optim.SGD(1.0), masked_config(**settings, route=route, beta=0.0), compiled=False
        )
        layers = step.importance["layers"].items()
        masked = {path: state._replace(mask=mx.array(mask.astype(np.float32))) for path, state in layers}
        step.set_layers(masked)
        captured = {}

        def capture(window, _probe, captured=captured, stacks=step.weights.stacks):
            captured.update({k: np.array(v) for k, v in stacks.unstack(window.gradients).items()})

        step._update = capture
        step(batch, batch.supervised_tokens, None, True)
        gradients[route] = captured
    for name, plain in gradients[False].items():
        routed = gradients[True][name]
        if name.endswith("gate_proj.lora_a"):
            assert not np.allclose(routed, plain)
        else:
            np.testing.assert_allclose(routed, plain, rtol=1e-5, atol=1e-6 * np.abs(plain).max())
    # Get x and dz of the first layer by adding zeros to the output of its gate projection.
    model = adapted(**settings)
    random_adapters(model, size=0.05)
    gate = model.model.layers[0].mlp["gate_proj"]
    b = np.array(gate.lora_b, dtype=np.float64)
    recorded = {}

    def loss(shift):
        plain = merged_copy(model)
        inner = plain.model.layers[0].mlp
        weight = inner.gate_proj.weight

        class Gate(nn.Module):
            def __call__(self, x):
                recorded["x"] = mx.stop_gradient(x)
                return x @ weight.T + shift

        inner.gate_proj = Gate()
        ce = nn.losses.cross_entropy(plain(mx.array(batch.inputs)), mx.array(batch.targets))
        return (ce * mx.array(batch.loss_mask)).sum() / batch.supervised_tokens

    dz = np.array(mx.grad(loss)(mx.zeros((*batch.inputs.shape, 48))), dtype=np.float64).reshape(-1, 48)
    x = np.array(recorded["x"], dtype=np.float64).reshape(-1, 32)
    expected = x.T @ ((dz * mask) @ (gate.scale * b).T)
    routed = gradients[True]["model.layers.0.mlp.gate_proj.lora_a"]
    assert np.abs(routed - expected).max() < 1e-5 * np.abs(expected).max()


# --- where mlx-lm's trainer is wrong ------------------------------------------------------------------------


def test_accumulation_weights_tokens_not_batches():
    """Two accumulated batches of 3 rows give the update of one batch of 6, although their lengths differ."""
    examples = build_examples(6, low=4, high=24, seed=5)
    results = []
    for size, accumulate in ((6, 1), (3, 2), (1, 6)):
        model = adapted()
        run(
            model,
            examples,
            optim.SGD(0.1),
            iters=accumulate,
            batch_size=size,
            grad_accumulation_steps=accumulate,
        )
        results.append(weights(model))
    for other in results[1:]:
        assert relative_error(other, results[0]) < 1e-6


def test_the_last_partial_batch_and_window_are_used():
    events = []
    model = adapted(**OFF)
    result = run(
        model,
        build_examples(7),
        iters=7,
        batch_size=3,
        grad_accumulation_steps=4,
        listeners=[events.append],
        steps_per_report=1,
    )
    assert result.iterations == 7
    assert result.updates == 2
    total = sum(int(e.loss_mask.sum()) for e in build_examples(7))
    tokens = [e["tokens"] for e in events if e["event"] == "metrics"]
    assert tokens[2] == total  # the third batch, of one row, completes the epoch
    assert tokens[5] == 2 * total


def test_epochs_are_passes_over_the_rows():
    assert run(adapted(), build_examples(7), epochs=2).iterations == 6
    packed = len(epoch_packs(build_examples(7), 1, 0, 0))
    assert packed < 7
    assert run(adapted(), build_examples(7), epochs=2, batch_size=1, packing=True).iterations == 2 * packed


def test_dropout_is_the_same_when_recomputed():
    """mlx's own dropout draws a new mask when a checkpointed layer is recomputed, so gradients are wrong."""
    results = []
    for checkpointing in (False, True):
        model = adapted(dropout=0.4)
        run(model, build_examples(), optim.SGD(0.1), grad_checkpoint=checkpointing, iters=4, seed=3)
        results.append(weights(model))
    assert relative_error(results[1], results[0]) < 1e-5
    other = adapted(dropout=0.4)
    run(other, build_examples(), optim.SGD(0.1), iters=4, seed=4)
    assert relative_error(weights(other), results[0]) > 1e-4


def test_checkpointing_is_undone_and_handles_layers_of_several_classes():
    class Other(type(build_model().model.layers[0])):
        def __call__(self, x, mask=None, cache=None):
            return super().__call__(x, mask, cache)

    model = build_model()
    model.model.layers[1].__class__ = Other
    calls = {cls: cls.__call__ for cls in (Other, type(model.model.layers[0]))}
    adapt(model, masked_config(num_layers=-1))
    random_adapters(model)
    batch = next(batching.training_batches(build_examples(), 3, 0))

    def loss(model):
        return mx.square(model(mx.array(batch.inputs))).mean()

    expected = nn.value_and_grad(model, loss)(model)[1]
    with recompute_activations(list(model.layers)):
        assert Other.__call__ is not calls[Other]
        recomputed = nn.value_and_grad(model, loss)(model)[1]
    for cls, call in calls.items():
        assert cls.__call__ is call
    for (name, a), (_, b) in zip(tree_flatten(recomputed), tree_flatten(expected), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=2e-4, atol=1e-7, err_msg=name)


def test_evaluation_is_the_mean_over_supervised_tokens(model):
    examples = build_examples(7)
    batches = batching.evaluation_batches(examples, 3, -1, 0)
    loss, tokens, _ = evaluate(model, batches)
    total = 0.0
    for example in examples:
        logits = np.array(model(mx.array(example.tokens[None, :-1])), dtype=np.float64)[0]
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        losses = log_z - logits[np.arange(len(logits)), example.tokens[1:]]
        total += losses[example.loss_mask[1:]].sum()
    assert tokens == sum(int(e.loss_mask.sum()) for e in examples)
    assert loss == pytest.approx(total / tokens, rel=1e-6)


def test_a_step_without_supervised_tokens_changes_nothing():
    model = adapted(**OFF)
    step = TrainingStep(model, optim.SGD(1.0))
    before = weights(model)
    zeros = np.zeros((2, 8), np.int32)
    batch = batching.Batch(zeros, zeros, np.zeros((2, 8), np.float32), np.zeros((2, 8), np.float32), (0, 1))
    total, _ = step(batch, 0, None, True)
    assert total.item() == 0
    for name, array in weights(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_an_adapted_head_gets_its_gradient():
    """With adapters on the tied embedding, tiles would drop the gradient of the head, so they are not used."""
    keys = ("mlp.gate_proj", "model.embed_tokens")
    model = adapted(keys=keys)
    random_adapters(model)
    step = TrainingStep(model, optim.SGD(1.0), PLAIN_LORA, compiled=False)
    assert step.loss.head is not None
    assert not step.loss.head_is_frozen
    assert TrainingStep(adapted(), optim.SGD(1.0)).loss.head_is_frozen
    batch = next(batching.training_batches(build_examples(), 3, 0))

    def full(model):
        losses = nn.losses.cross_entropy(model(mx.array(batch.inputs)), mx.array(batch.targets))
        return (losses * mx.array(batch.loss_mask)).sum() / batch.supervised_tokens

    expected = dict(tree_flatten(nn.value_and_grad(model, full)(model)[1]))
    before = weights(model)
    step(batch, batch.supervised_tokens, None, True)
    for name, after in weights(model).items():
        gradient, step_taken = np.array(expected[name]), before[name] - after
        assert np.abs(step_taken - gradient).max() < 1e-5 * np.abs(gradient).max(), name


def test_logits_are_computed_in_tiles(monkeypatch):
    """The head runs on supervised positions only, in tiles of positions and of vocabulary entries."""
    from nalora_mlx.ops import cross_entropy

    monkeypatch.setattr(cross_entropy, "COLUMN_MULTIPLE", 1)
    set_sizes(monkeypatch, head_rows=16, head_columns=7)
    step = TrainingStep(adapted(), optim.SGD(1.0), compiled=False)
    shapes, logits_for = [], step.loss.head.logits_for

    def recording(hidden, which):
        shapes.append(logits_for(hidden, which).shape)
        return logits_for(hidden, which)

    monkeypatch.setattr(step.loss.head, "logits_for", recording)
    batch = next(batching.training_batches(build_examples(40, low=30, high=40), 8, 0))
    step(batch, batch.supervised_tokens, None, True)
    assert max(rows for rows, _ in shapes) == 16
    width = 7
    assert {columns for _, columns in shapes} == {width, VOCABULARY % width, 16, shapes[-1][1]}
    scored = sum(rows for rows, columns in shapes if columns == VOCABULARY % width)
    # Each tile is computed for the loss and again for its gradient.
    assert 2 * batch.supervised_tokens <= scored < 1.3 * 2 * batch.supervised_tokens


# --- the run as a whole -------------------------------------------------------------------------------------


def test_a_run_learns_saves_and_reports(tmp_path):
    model = adapted()
    events = []
    examples = build_examples(9, seed=2)
    config = TrainingConfig(
        iters=30, batch_size=3, steps_per_eval=10, steps_per_report=10, save_every=20, val_batches=2
    )
    result = train(model, examples, examples, config, optim.Adam(2e-2), tmp_path / "run", [events.append])
    assert result.valid_loss < 0.7 * result.first_valid_loss
    assert result.best_valid_loss == min(
        e["loss"] for e in events if e.get("split") == "valid" and e["step"] > 0
    )
    files = sorted(str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert files == [
        "adapter_config.json",
        "adapters.safetensors",
        "best/adapter_config.json",
        "best/adapters.safetensors",
        *(
            f"checkpoints/step-00000{step}/{name}"
            for step in (20, 30)
            for name in (
                "adapter_config.json",
                "adapters.safetensors",
                "best.safetensors",
                "training_state.json",
                "training_state.safetensors",
            )
        ),
    ]
    saved = mx.load(str(tmp_path / "run" / "adapters.safetensors"))
    for name, array in weights(model).items():
        np.testing.assert_array_equal(np.array(saved[name]), array)
    adapter_config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert adapter_config["fine_tune_type"] == "lora"
    assert "mlp.gate_proj" in adapter_config["lora_parameters"]["keys"]
    steps = [e["step"] for e in events if e.get("split") == "valid"]
    assert steps == [0, 10, 20, 30]
    layer = next(e for e in events if e.get("split") == "train")["layers"]["model.layers.0.mlp"]
    assert {"mask", "multiplier", "importance", "occupancy", "misalignment"} <= set(layer)
    assert sum(layer["occupancy"].values()) == pytest.approx(1, abs=1e-5)


def test_the_same_seed_gives_the_same_bits():
    results = []
    for _ in range(2):
        model = adapted(dropout=0.1)
        run(model, build_examples(), iters=6)
        results.append(weights(model))
    for name in results[0]:
        np.testing.assert_array_equal(results[0][name], results[1][name])


def test_a_diverging_run_stops_with_advice():
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        run(adapted(), build_examples(), optim.SGD(1e30), iters=20)


def test_bad_settings_and_models_are_refused(model):
    model.freeze()
    with pytest.raises(InputError, match="call adapt first"):
        train(model, build_examples())
    with pytest.raises(InputError, match=r"batch_size is 0; .*iters is -1"):
        train(adapted(), build_examples(), config=TrainingConfig(batch_size=0, iters=-1))
    with pytest.raises(InputError, match="training set is empty"):
        train(adapted(), [])


# --- experts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [7, 40], ids=["unsorted", "sorted"])
def test_the_importance_of_experts_follows_the_routing(length):
    """Per expert and channel, against float64 from the routing and weights of an mlx-lm model, without padding."""
    from tests.adapters.test_adapters import MIXTRAL

    args = MIXTRAL | {"num_local_experts": 8}
    plain, model = build_model(module=mixtral, args=args), build_model(module=mixtral, args=args)
    config = masked_config(num_layers=-1, rank=2, beta=0.9)
    adapt(model, config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 60, (2, length + 1)).astype(np.int32)
    real = np.ones((2, length), np.float32)
    real[1, length // 2 :] = 0
    recorded = []

    class Recorder(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __call__(self, x, indices):
            recorded.append((np.array(x, np.float64), np.array(indices)))
            return self.inner(x, indices)

    for layer in plain.model.layers:
        layer.block_sparse_moe.switch_mlp = Recorder(layer.block_sparse_moe.switch_mlp)
    plain(mx.array(tokens[:, :-1]))
    step = TrainingStep(model, optim.SGD(0.0), config)
    batch = batching.Batch(tokens[:, :-1], tokens[:, 1:], real, real, (0, 1))
    total, _ = step(batch, batch.supervised_tokens, None, True)
    mx.eval(step.state, total)
    idle = 0
    assert len(recorded) == len(plain.model.layers)
    for layer, (x, chosen) in enumerate(recorded):
        weight = np.array(
            plain.model.layers[layer].block_sparse_moe.switch_mlp.inner.gate_proj.weight, np.float64
        )
        x, chosen, keep = x.reshape(-1, 32), chosen.reshape(-1, 2), real.reshape(-1) > 0
        state = step.importance["layers"][f"model.layers.{layer}.block_sparse_moe.switch_mlp"]
        for expert in range(8):
            rows = x[keep & (chosen == expert).any(axis=1)]
            assert state.updates[expert].item() == (len(rows) > 0)
            z = rows @ weight[expert].T
            expected = np.abs(expit(z) * (1 + z * expit(-z))).mean(axis=0) if len(rows) else np.zeros(48)
            idle += len(rows) == 0
            np.testing.assert_allclose(
                np.array(state.importance[expert]) / (1 - 0.9), expected, rtol=2e-5, atol=1e-6
            )
    assert idle > 0 or length > 7
