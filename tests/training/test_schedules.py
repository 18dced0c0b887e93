"""Schedules: as mlx-lm builds them, refused if wrong, and compared with the run that uses them."""

import math

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from nalora_mlx.core.config import RunConfig, TrainingConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.tokenization import Split
from nalora_mlx.training.optimizers import configured_optimizer
from nalora_mlx.training.schedules import length_notices, run_iterations, schedule_notices
from tests.conftest import build_examples

COSINE = {"name": "cosine_decay", "arguments": [1e-2, 100]}


def rates(settings, updates):
    """Return the learning rate of each update, as an mlx optimizer takes them."""
    optimizer = configured_optimizer(RunConfig(optimizer="sgd", lr_schedule=settings))
    parameters, found = {"one": mx.zeros(1)}, []
    for _ in range(updates):
        optimizer.apply_gradients({"one": mx.ones(1)}, parameters)
        found.append(optimizer.learning_rate.item())
    return np.array(found)


@pytest.mark.parametrize(
    ("changes", "updates", "expected"),
    [
        ({"warmup": 8}, 8, "warmup takes 8 optimizer updates, and the run has 8: the learning rate ends at 0.00875"),
        ({"warmup": 8}, 9, "cosine_decay takes 109 optimizer updates, and the run has 9: it ends at 0.01"),
        ({"warmup": 8}, 1, "the learning rate is 0 throughout: warmup takes 8 optimizer updates, and the run has 1"),
        ({"arguments": [0, 100]}, 50, "the learning rate is 0 throughout"),
        ({}, 49, "cosine_decay takes 100 optimizer updates, and the run has 49: it ends at 0.0053"),
        ({}, 50, None),
        ({}, 105, None),
        ({}, 120, "the learning rate is 0 from optimizer update 101 on, and the run has 120: the last 20 change"),
        ({"warmup": 9}, 120, "the learning rate is 0 from optimizer update 111 on, and the run has 120: "),
        ({"arguments": [1e-2, 100, 1e-3]}, 120, None),
        ({"arguments": [1e-2, 100, 1e-3]}, 300, "the learning rate stays at 0.001 from optimizer update 101 on, and"),
        ({"name": "linear_schedule", "arguments": [1e-4, 1e-2, 10]}, 12, None),
        ({"name": "exponential_decay", "arguments": [1e-2, 0.9]}, 12, None),
        ({"name": "step_decay", "arguments": [1e-2, 0.9, 3]}, 12, None),
    ],
)  # fmt: skip
def test_schedules_that_do_not_suit_the_run(changes, updates, expected):
    settings = COSINE | changes
    found = schedule_notices(settings, updates)
    assert len(found) == (expected is not None)
    if expected is None:
        return
    assert found[0].startswith(f"lr_schedule: {expected}")
    actual = rates(settings, updates)
    if "throughout" in expected:
        assert (actual == 0).all()
    if "is 0 from" in expected:
        start = int(expected.split("update ")[1].split(" on")[0]) - 1
        assert (actual[start:] == 0).all()
        assert actual[start - 1] > 0
    if "ends at" in expected:
        assert found[0].endswith(f"{actual[-1]:g}")


def test_updates_are_counted_and_not_iterations():
    config = RunConfig(train=True, iters=400, grad_accumulation_steps=4, lr_schedule=COSINE | {"warmup": 100})
    examples = {"train": Split(build_examples(8)), "valid": Split([])}
    (notice,) = length_notices(config, examples)
    assert "warmup takes 100 optimizer updates, and the run has 100 (400 iterations, 4 per update)" in notice
    config = RunConfig(train=True, epochs=2.0, batch_size=2, lr_schedule=COSINE)  # 4 batches per epoch
    (notice,) = length_notices(config, examples)
    assert "and the run has 8: " in notice
    assert length_notices(config, {"train": Split([]), "valid": Split([])}) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"iters": 7}, 7),
        ({"epochs": 1e-9}, 1),
        ({"epochs": 0.5}, 2),
        ({"epochs": 0.51}, 3),
        ({"epochs": 3}, 12),
    ],
)
def test_the_length_of_a_run(settings, expected):
    assert run_iterations(build_examples(8), TrainingConfig(batch_size=2, **settings)) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cosine"}, r"name is 'cosine'; did you mean 'cosine_decay'\?"),
        ({"name": "join_schedules"}, "name is 'join_schedules'"),
        ({"arguments": None}, "arguments is None; it takes a list of numbers"),
        ({"arguments": ["1", 2]}, "arguments is .*; it takes a list of numbers"),
        (
            {"arguments": [1e-5]},
            ".* missing 1 required positional argument: 'decay_steps'; check the arguments",
        ),
        ({"arguments": [1e-5, 0]}, "decay_steps must be greater than 0"),
        ({"warmup": -1}, "warmup is -1; it must be a number, and not negative"),
        ({"warmup": True}, "warmup is True"),
        ({"warmup_init": math.nan}, "warmup_init is nan"),
        ({"steps": 3}, "unknown key 'steps'"),
    ],
)
def test_errors_name_the_schedule_and_not_the_optimizer(settings, message):
    with pytest.raises(InputError, match=f"^lr_schedule: {message}"):
        configured_optimizer(RunConfig(lr_schedule=COSINE | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arguments": [-1e-5, 10]}, "is -1e-05 at optimizer update 1 of 10"),
        (
            {"name": "linear_schedule", "arguments": [1e-5, -1e-5, 10]},
            "is -2e-06 at optimizer update 7 of 10",
        ),
        ({"name": "exponential_decay", "arguments": [1e-5, 1e6]}, "is inf at optimizer update 8 of 10"),
    ],
)
def test_rates_that_become_negative_or_infinite_are_refused(settings, message):
    with pytest.raises(InputError, match=f"lr_schedule: the learning rate {message}"):
        schedule_notices(COSINE | settings, 10)


def test_long_runs_are_checked_quickly():
    assert "is 0 from optimizer update 101 on" in schedule_notices(COSINE, 10**9)[0]
    assert isinstance(configured_optimizer(RunConfig(lr_schedule=COSINE)), optim.Adam)
