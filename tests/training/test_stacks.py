"""Stacks: the same training as with single arrays, with few operations."""

import re
from collections import Counter
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import mixtral
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.core.config import NALoRAConfig, NAParameters
from nalora_mlx.core.config_presets import PRESETS
from nalora_mlx.data.batches import collate
from nalora_mlx.data.tokenization import Example
from nalora_mlx.ops import fast_math
from nalora_mlx.ops.device_sizes import using_sizes
from nalora_mlx.training import stacks
from nalora_mlx.training.stacks import Stacks
from nalora_mlx.training.step import TrainingStep
from tests.conftest import build_model, llama_args, random_adapters

OPTIMIZERS = {
    "adam": partial(optim.Adam, 1e-2),
    "adamw": partial(optim.AdamW, 1e-2, weight_decay=0.1),
    "sgd": partial(optim.SGD, 1e-1, momentum=0.9, weight_decay=0.1),
    "lion": partial(optim.Lion, 1e-3),
    "scheduled": lambda: optim.Adam(optim.cosine_decay(1e-2, 20)),
}
SETTINGS = NALoRAConfig(rank=4, scale=20.0, num_layers=-1, mask_warmup=1)


def make_step(optimizer="adam", dtype=mx.float32, module=None, num_layers=3, **changes):
    """Return the training step of a small model with random adapters."""
    mx.random.seed(0)
    args = llama_args(num_hidden_layers=num_layers, **changes)
    model = build_model(args=args) if module is None else build_model(module=module, args=args)
    model.set_dtype(dtype)
    adapt(model, SETTINGS)
    random_adapters(model, size=0.05)
    return TrainingStep(model, OPTIMIZERS[optimizer](), SETTINGS)


def make_batch(seed=0, rows=2, length=24, vocabulary=64, share=1.0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, vocabulary, (rows, length + 1), dtype=np.int32)
    supervised = np.arange(length + 1) > length * (1 - share)
    return collate([Example(row, supervised, str(i)) for i, row in enumerate(tokens)], range(rows))


def trained(step, updates=4):
    """Train, and return the weights and the state of a checkpoint, by name."""
    for seed in range(updates):
        batch = make_batch(seed)
        loss, _ = step(batch, batch.supervised_tokens, None, True)
        mx.eval(step.state, loss)
    weights = dict(tree_flatten(step.model.trainable_parameters()))
    return weights | dict(tree_flatten(step.state_tree()))


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert mx.array_equal(got[name], array), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_of_single_arrays(name, monkeypatch):
    step = make_step(name)
    assert len(step.weights.stacks.members) < len(step.weights.places) / 2
    got = trained(step)
    monkeypatch.setattr(stacks, "MAX_BYTES", 0)
    step = make_step(name)
    assert len(step.weights.stacks.members) == len(step.weights.places)
    assert_equal(got, trained(step))


def test_large_stacks_are_divided(monkeypatch):
    """Layers of one importance stack may have their parameters in several stacks, or alone."""
    got = trained(make_step())
    b = "model.layers.0.mlp.gate_proj.lora_b"
    for most in (2, 1):
        step = make_step()
        monkeypatch.setattr(stacks, "MAX_STACK_BYTES", most * step.weights.current()[b].nbytes)
        step = make_step()
        assert len(step.weights.stacks.members[b]) == most
        assert_equal(trained(step), got)


def test_experts_and_half_precision_are_those_of_single_arrays(monkeypatch):
    changes = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    for make in (partial(make_step, module=mixtral, **changes), partial(make_step, dtype=mx.bfloat16)):
        got = trained(make())
        with monkeypatch.context() as patch:
            patch.setattr(stacks, "MAX_BYTES", 0)
            assert_equal(trained(make()), got)


def test_float32_products_in_a_half_precision_model_use_float32_weights():
    """The weights are cast to the dtype that each adapter computes in, which is not always that of the model."""

    class Wide(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def __call__(self, x):
            return self.layer(x.astype(mx.float32)).astype(x.dtype)

    step = make_step(dtype=mx.bfloat16)
    model = step.model
    for block in model.layers[1:2]:
        block.self_attn.o_proj = Wide(block.self_attn.o_proj)
    step = TrainingStep(model, optim.SGD(1.0), SETTINGS)
    dtypes = {
        name: step.weights.casts[stack].dtype
        for stack, names in step.weights.stacks.members.items()
        for name in names
    }
    assert dtypes.pop("model.layers.1.self_attn.o_proj.layer.lora_a") == mx.float32
    assert dtypes.pop("model.layers.1.self_attn.o_proj.layer.lora_b") == mx.float32
    assert set(dtypes.values()) == {mx.bfloat16}


def test_weights_that_others_put_into_the_model_are_used():
    step = make_step()
    trained(step, 1)
    name = "model.layers.1.mlp.gate_proj.lora_b"
    old = step.weights.current()[name]
    step.model.layers[1].mlp["gate_proj"].lora_b = old + 1
    batch = make_batch(9)
    _, window = step(batch, batch.supervised_tokens, None, False)
    gradient = step.weights.stacks.unstack(window.gradients)[name]
    step.model.layers[1].mlp["gate_proj"].lora_b = old
    _, window = step(batch, batch.supervised_tokens, None, False)
    assert not mx.array_equal(gradient, step.weights.stacks.unstack(window.gradients)[name])
    before = step.weights.current()[name]
    step.model.layers[1].mlp["gate_proj"].lora_b = old + 1
    step(batch, batch.supervised_tokens, None, True)
    assert mx.abs(step.weights.current()[name] - (old + 1)).max() < 0.1 < mx.abs(before - (old + 1)).max()


def test_a_checkpoint_has_the_names_of_single_arrays(monkeypatch):
    """Checkpoints of earlier versions, which had no stacks, can be resumed."""
    step = make_step()
    tree = step.state_tree()
    saved = trained(step)
    with monkeypatch.context() as patch:
        patch.setattr(stacks, "MAX_BYTES", 0)
        alone = make_step()
    alone.optimizer.init(dict(tree_flatten(alone.model.trainable_parameters())))
    names = {f"optimizer.{name}" for name, _ in tree_flatten(alone.optimizer.state)}
    assert {name for name in saved if name.startswith("optimizer.")} == names
    other = make_step()
    other.model.load_weights([(k, v) for k, v in saved.items() if k in other.weights.places], strict=False)
    tree = step.state_tree()
    other.load_state_tree(tree)
    assert_equal(trained(other, 2), trained(step, 2))


@pytest.mark.parametrize("frozen", ["lora_a", "lora_b"])
def test_an_adapter_of_which_one_half_is_frozen_keeps_its_scale(frozen):
    plain = NALoRAConfig(rank=4, scale=20.0, num_layers=-1, mask="off", step_scaling=False)
    batch, losses = make_batch(), []
    for half in (None, frozen):
        mx.random.seed(0)
        model = build_model()
        adapt(model, plain)
        random_adapters(model, size=0.05)
        if half:
            model.freeze(keys=[half])
        loss, _ = TrainingStep(model, optim.SGD(0.0), plain)(batch, batch.supervised_tokens, None, True)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_scaled_weights_do_not_stay_in_the_model_after_an_exception(monkeypatch):
    step = TrainingStep(make_step().model, optim.SGD(1.0), SETTINGS, compiled=False)
    before = step.weights.current()
    batch = make_batch()

    def interrupted(*arrays):
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "loss", interrupted)
    with pytest.raises((KeyboardInterrupt, AttributeError)):
        step(batch, batch.supervised_tokens, None, True)
    assert all(array is before[name] for name, array in step.weights.current().items())


def test_layers_that_the_forward_never_reaches_are_left_alone():
    args = llama_args(num_hidden_layers=2)
    model = build_model(args=args)
    model.extra = build_model(args=args | {"intermediate_size": 52}).model.layers[0]  # of another shape
    layers = [*model.layers, model.extra]
    type(model).layers = property(lambda self: self.model.layers if self is not model else layers)
    try:
        adapt(model, SETTINGS)
        step = TrainingStep(model, optim.Adam(1e-2), SETTINGS)
        assert "extra.mlp" in step.importance["layers"]
        before = step.weights.current()["extra.mlp.gate_proj.lora_a"]
        trained(step, 2)
    finally:
        type(model).layers = property(lambda self: self.model.layers)
    assert mx.array_equal(step.weights.current()["extra.mlp.gate_proj.lora_a"], before)


def test_several_optimizers_train_as_one():
    """MultiOptimizer selects parameters by their path in a tree like the model's."""

    def several():
        by_name = [lambda path, _: "lora_a" in path]
        return optim.MultiOptimizer([optim.SGD(1e-2), optim.SGD(1e-2)], by_name)

    model = make_step().model
    one = trained(TrainingStep(model, optim.SGD(1e-2), SETTINGS), 1)
    step = TrainingStep(make_step().model, several(), SETTINGS)
    two = trained(step, 1)
    for name in step.weights.places:
        assert mx.allclose(one[name], two[name], rtol=1e-5, atol=1e-6), name
    step.load_state_tree(step.state_tree())


@pytest.mark.parametrize("earlier", ["step", "mlx"])
def test_an_optimizer_that_was_used_before_keeps_its_moments(earlier):
    """By a step of ours on a model with other layers, or by mlx itself."""
    optimizer = optim.Adam(1e-2)
    model = make_step().model
    if earlier == "mlx":
        parameters = model.trainable_parameters()
        optimizer.init(parameters)
        state = dict(tree_flatten(optimizer.state))
    else:
        small = TrainingStep(make_step(num_layers=1).model, optimizer, SETTINGS)
        trained(small, 2)
        state = dict(tree_flatten(small.weights.stacks.unstack_state(optimizer.state)))
    step = TrainingStep(model, optimizer, SETTINGS)
    new = dict(tree_flatten(step.weights.stacks.unstack_state(optimizer.state)))
    assert {name for name in new if name.endswith(".m")} == {f"{name}.m" for name in step.weights.places}
    for name, array in new.items():
        if earlier == "mlx":
            assert mx.array_equal(array, state[name]), name
        elif name in state and "layers.0" in name:
            assert array.shape == state[name].shape
    trained(step, 1)


def test_gradient_of_a_stack():
    keys = {"a": 1, "b": None, "c": 1, "d": 1}
    arrays = {name: mx.random.normal((2, 3)) for name in keys}
    found = Stacks(keys)
    assert found.members == {"a": ("a", "c", "d"), "b": ("b",)}
    whole = found.stack(arrays)
    for name, array in found.unstack(whole).items():
        assert mx.array_equal(array, arrays[name])

    def function(whole):
        parts = found.unstack(whole)
        return (parts["a"] * parts["c"] + 2 * parts["b"]).sum()

    gradients = found.unstack(mx.grad(function)(whole))
    want = {"a": arrays["c"], "c": arrays["a"], "b": 2 * mx.ones((2, 3)), "d": mx.zeros((2, 3))}
    assert all(mx.array_equal(gradients[name], want[name]) for name in keys)


# --- operations -----------------------------------------------------------------------------------------------------

VIEWS = {
    "Transpose",
    "Reshape",
    "Squeeze",
    "ExpandDims",
    "Slice",
    "Split",
    "Flatten",
    "Unflatten",
    "AsStrided",
}
VIEWS |= {"CustomTransforms", "StopGradient", "Broadcast", "Full", "Depends"}


def count_launches(directory, arrays):
    path = directory / "graph.dot"
    mx.export_to_dot(str(path), *(array for _, array in tree_flatten(arrays) if isinstance(array, mx.array)))
    kinds = Counter(re.findall(r"\{ \d+ \[label =\"([^\"]*)\"", path.read_text()))
    return sum(count for kind, count in kinds.items() if kind not in VIEWS)


LIMITED = NAParameters()
MASKED = NAParameters(**PRESETS["paper"]["na_parameters"])


@pytest.mark.parametrize("parameters", [LIMITED, MASKED], ids=["limited", "masked"])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_step_has_no_more_operations_than_that_of_mlx_lm(share, parameters, tmp_path, monkeypatch):
    """Of forward, backward and update, as compiled, with the sizes for a GPU; views do not count.

    With a limit, every eighth update takes two more short forward passes.
    """
    monkeypatch.setattr(fast_math, "_use_vectorized", lambda x: False)
    args = llama_args(num_hidden_layers=8, hidden_size=64, intermediate_size=128)
    batch = make_batch(rows=4, length=64, share=share)

    model = build_model(args=args)
    model.freeze()
    linear_to_lora_layers(model, 8, {"rank": 4, "scale": 20.0, "dropout": 0.0})
    optimizer = optim.Adam(1e-5)
    state = [model.state, optimizer.state, mx.random.state]
    value_and_grad = nn.value_and_grad(model, default_loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def their_step(tokens, lengths):
        (loss, count), gradients = value_and_grad(model, tokens, lengths)
        optimizer.update(model, gradients)
        return loss, count

    mx.eval(state)
    tokens = mx.array(np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1))
    results = their_step(tokens, mx.array([[1, 64]] * 4))
    theirs = count_launches(tmp_path, [results, state])

    model = build_model(args=args)
    adapt(model, NALoRAConfig(rank=4, num_layers=-1))
    step = TrainingStep(model, optim.Adam(1e-5), parameters)
    mx.eval(step.state)
    ours = []
    for iteration in range(101, 109):
        with using_sizes("metal"):
            loss, _ = step(batch, batch.supervised_tokens, None, True, (0, iteration))
        ours.append(count_launches(tmp_path, [loss, step.state]))
        mx.eval(step.state)
    assert np.mean(ours) <= theirs
