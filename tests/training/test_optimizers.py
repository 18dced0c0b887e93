"""Scaled steps of every mlx optimizer: the step is scaled, and nothing else changes."""

import copy

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from nalora_mlx.core.errors import InputError
from nalora_mlx.training.optimizers import apply_scaled, build_optimizer

# name -> (constructor, decoupled weight decay; None if the decay depends on the parameter)
ROWS = {
    "adam": (lambda: optim.Adam(1e-2), 0.0),
    "adam_corrected": (lambda: optim.Adam(1e-2, bias_correction=True), 0.0),
    "adamw": (lambda: optim.AdamW(1e-2, weight_decay=0.1), 0.1),
    "sgd": (lambda: optim.SGD(1e-2), 0.0),
    "sgd_momentum_decay": (lambda: optim.SGD(1e-2, momentum=0.9, weight_decay=0.1), 0.0),
    "muon": (lambda: optim.Muon(1e-2, weight_decay=0.1), 0.0),
    "adafactor": (lambda: optim.Adafactor(1e-2, relative_step=False), 0.0),
    "adafactor_decay": (lambda: optim.Adafactor(1e-2, relative_step=False, weight_decay=0.1), None),
    "adafactor_relative": (lambda: optim.Adafactor(), 0.0),
    "lion": (lambda: optim.Lion(1e-3, weight_decay=0.1), 0.1),
    "rmsprop": (lambda: optim.RMSprop(1e-2), 0.0),
    "adagrad": (lambda: optim.Adagrad(1e-2), 0.0),
    "adadelta": (lambda: optim.AdaDelta(1e-2), 0.0),
    "adamax": (lambda: optim.Adamax(1e-2), 0.0),
    "scheduled": (lambda: optim.AdamW(optim.cosine_decay(1e-2, 10)), 0.01),
}
SHAPE = (4, 6)
PATH = "layers.1.mlp.gate_proj.lora_b"


UP = "layers.1.mlp.up_proj.lora_b"


def named(gate, up):
    return {PATH: gate, UP: up}


def gate(parameters):
    return parameters[PATH]


def up(parameters):
    return parameters[UP]


def setup(name, steps=3):
    """Return an optimizer after some steps, the parameters, and the gradients of the next step."""
    rng = np.random.default_rng(0)

    def draw():
        return mx.array(rng.normal(size=SHAPE).astype(np.float32))

    optimizer = ROWS[name][0]()
    parameters = named(draw(), draw())
    for _ in range(steps):
        parameters = optimizer.apply_gradients(named(draw(), draw()), parameters)
    mx.eval(parameters, optimizer.state)
    return optimizer, parameters, named(draw(), draw())


def duplicate(optimizer, name):
    """Return another optimizer with the same state."""
    result = ROWS[name][0]()
    result.state = copy.deepcopy(optimizer.state)
    result._initialized = True
    return result


Q = np.array([0.0, 0.25, 0.5, 1.0, 2.0, 3.5], dtype=np.float32)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_steps_are_scaled_column_by_column(name):
    optimizer, parameters, gradients = setup(name)
    plain_optimizer = duplicate(optimizer, name)
    plain = plain_optimizer.apply_gradients(gradients, parameters)
    new = apply_scaled(optimizer, gradients, parameters, {PATH: mx.array(Q)[None]})
    old = np.array(gate(parameters), dtype=np.float64)
    decay = ROWS[name][1]
    if decay is None:  # Adafactor: its rate is the learning rate times the RMS of the parameter
        rate = 1e-2 * max(1e-3, float(np.sqrt((old**2).mean())))
        decayed = old * (1 - 0.1 * rate)
    else:
        decayed = old * (1 - float(optimizer.learning_rate) * decay) if decay else old
    step = np.array(gate(plain), dtype=np.float64) - decayed
    np.testing.assert_allclose(np.array(gate(new)), decayed + Q * step, rtol=3e-6, atol=3e-7)
    # The unscaled parameter and the optimizer's own state are as without scaling.
    assert mx.array_equal(up(new), up(plain))
    flat, flat_plain = (dict(tree_flatten(o.state)) for o in (optimizer, plain_optimizer))
    assert flat.keys() == flat_plain.keys()
    for key in flat:
        assert mx.array_equal(flat[key], flat_plain[key]), key


@pytest.mark.parametrize("name", sorted(n for n in ROWS if not n.startswith("adafactor")))
def test_a_factor_of_one_changes_no_bit(name):
    optimizer, parameters, gradients = setup(name)
    plain = duplicate(optimizer, name).apply_gradients(gradients, parameters)
    new = apply_scaled(optimizer, gradients, parameters, {PATH: mx.ones((1, SHAPE[1]))})
    assert mx.array_equal(gate(new), gate(plain))


@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop"])
def test_a_factor_of_zero_freezes_a_column_even_with_nan_gradients(name):
    optimizer, parameters, gradients = setup(name)
    bad = gate(gradients) + mx.where(mx.arange(6) < 1, float("nan"), 0.0)
    gradients[PATH] = bad
    new = apply_scaled(optimizer, gradients, parameters, {PATH: mx.array(Q)[None]})
    assert mx.array_equal(gate(new)[:, 0], gate(parameters)[:, 0])
    assert mx.isfinite(gate(new)[:, 1:]).all().item()


def test_decoupled_decay_acts_on_frozen_columns():
    optimizer, parameters, gradients = setup("adamw")
    new = apply_scaled(optimizer, gradients, parameters, {PATH: mx.array(Q)[None]})
    np.testing.assert_allclose(
        np.array(gate(new))[:, 0], np.array(gate(parameters))[:, 0] * (1 - 1e-2 * 0.1), rtol=1e-6
    )


def test_small_steps_on_large_parameters_are_not_rounded_away():
    """The step is computed from zero, not as a difference of nearly equal numbers."""
    optimizer = optim.Adam(1e-6)
    parameters = {"b": mx.full((1, 2), 100.0)}
    gradients = {"b": mx.ones((1, 2))}
    optimizer.init(parameters)
    new = apply_scaled(optimizer, gradients, parameters, {"b": mx.array([[1000.0, 1.0]])})
    # The step of 3.2e-6 is below half an ulp of 100, but a thousand times that is not.
    assert np.array(new["b"])[0, 0] == pytest.approx(100 - 3.162e-3, abs=8e-6)


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match=r"optimizer_config\.adam: .*beta"):
        build_optimizer("adam", 1e-3, None, {"beta": 1})
    with pytest.raises(InputError, match="lr_schedule"):
        build_optimizer("adam", 1e-3, {"name": "no_such_schedule", "arguments": [1]}, {})
    with pytest.raises(InputError, match="lr_schedule"):
        build_optimizer("adam", 1e-3, {"name": "cosine_decay"}, {})
    schedule = {"name": "cosine_decay", "arguments": [1e-4, 10], "warm_up": 5}
    with pytest.raises(InputError, match=r"unknown key 'warm_up'; did you mean 'warmup'"):
        build_optimizer("adam", 1e-3, schedule, {})


def test_schedules_count_updates():
    schedule = {"name": "cosine_decay", "warmup": 2, "arguments": [1e-2, 10]}
    optimizer = build_optimizer("adam", 1e-5, schedule, {})
    rates = []
    for _ in range(4):
        optimizer.apply_gradients({"b": mx.ones(2)}, {"b": mx.ones(2)})
        rates.append(float(optimizer.learning_rate))
    assert rates[0] == 0
    assert rates[1] == pytest.approx(5e-3)
    assert rates[2] == pytest.approx(1e-2)
