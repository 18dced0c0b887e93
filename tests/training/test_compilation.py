"""Exceptions while mx.compile traces: the model, the optimizer and mx.random stay usable."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.data.batches import training_batches
from nalora_mlx.training import diagnostics
from nalora_mlx.training.loss import batch_arrays
from nalora_mlx.training.step import TrainingStep
from tests.conftest import build_examples, build_model, llama_args


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt, which pytest would take for its own."""


def prepared():
    """Return a training step and a batch; both are always the same."""
    model = build_model(args=llama_args(num_hidden_layers=2))
    mx.random.seed(11)
    result = adapt(model, NALoRAConfig(num_layers=-1, rank=4, dropout=0.1))
    model.train()
    batch = next(iter(training_batches(build_examples(4), 2, 0)))
    return TrainingStep(model, optim.Adam(1e-2), result.config), batch


def arrays(step):
    return {name: np.array(array) for name, array in tree_flatten([step.state, mx.random.state[0]])}


def run(step, batch):
    loss, _ = step(batch, batch.supervised_tokens, None, True)
    mx.eval(step.state, loss)
    return float(loss)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def fail_after(monkeypatch, owner, name):
    """Let a method do its work and then raise."""
    original = getattr(owner, name)

    def fail(*arguments, **more):
        original(*arguments, **more)
        raise Interrupted

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("name", ["_loss_and_gradients", "_backward", "_update"])
def test_an_interrupted_first_trace_changes_nothing(name, monkeypatch):
    (step, batch), (other, _) = prepared(), prepared()
    before = arrays(step)
    with monkeypatch.context() as patch:
        fail_after(patch, step, name)
        with pytest.raises(Interrupted):
            run(step, batch)
    assert_equal(arrays(step), before)
    assert run(step, batch) == run(other, batch)
    assert_equal(arrays(step), arrays(other))


def test_an_interrupted_trace_of_another_shape_changes_nothing(monkeypatch):
    (step, batch), (other, _) = prepared(), prepared()
    longer = next(iter(training_batches(build_examples(4), 3, 0)))
    assert run(step, batch) == run(other, batch)
    before = arrays(step)
    with monkeypatch.context() as patch:
        fail_after(patch, step, "_backward")
        with pytest.raises(Interrupted):
            run(step, longer)
    assert_equal(arrays(step), before)
    assert run(step, longer) == run(other, longer)
    assert_equal(arrays(step), arrays(other))


def test_an_interrupted_trace_of_the_validation_loss_changes_nothing(monkeypatch):
    step, batch = prepared()
    before, inputs = arrays(step), batch_arrays(batch)
    with monkeypatch.context() as patch:
        fail_after(patch, step.loss.head, "hidden")
        with pytest.raises(Interrupted):
            step.loss.evaluate(inputs)
    assert_equal(arrays(step), before)
    assert np.isfinite(step.loss.evaluate(inputs)[0].item())


def test_an_interrupted_measurement_leaves_the_model_in_training_mode(monkeypatch):
    step, batch = prepared()
    fail_after(monkeypatch, step.loss, "forward")
    with pytest.raises(Interrupted):
        diagnostics.measure_misalignment(step, batch)
    assert step.model.training
    assert all(module.training for module in step.model.modules())
