"""Which checkpoint is best, and which others cannot be told from it."""

from types import SimpleNamespace

import numpy as np

from nalora_mlx.evaluate.checkpoints import CheckpointRace
from nalora_mlx.evaluate.measurement import Measured, Sums
from nalora_mlx.evaluate.statistics import compare

ROWS = 30


def measured(loss, seed):
    """Return losses of rows around a mean; rows differ in their number of tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 9, ROWS)
    values = tokens * (loss + 0.2 * rng.normal(size=ROWS))
    return Measured(losses=Sums(tuple(map(str, range(ROWS))), values, tokens))


def race(losses):
    evaluation = SimpleNamespace(
        base=measured(3.0, 0),
        settings=SimpleNamespace(metric=None, answers=False, seed=0),
        measurer=SimpleNamespace(dropped={}),
        test_set=SimpleNamespace(metrics=[]),
    )
    found = CheckpointRace(evaluation)
    for seed, (step, loss) in enumerate(losses.items()):
        tokens = evaluation.base.losses.tokens
        values = tokens * (loss + 0.2 * np.random.default_rng(seed + 1).normal(size=ROWS))
        found.add(step, Measured(losses=Sums(evaluation.base.losses.sources, values, tokens)))
    return found


def test_each_step_is_compared_with_the_best():
    found = race({10: 2.0, 20: 1.0, 30: 1.01, 40: 1.5})
    assert found.best == 20
    best = found.measured[20].losses
    for step in (10, 30, 40):
        values = found.measured[step].losses.values
        expected = compare(best.values, values, best.tokens, lower_is_better=True)
        assert found.against_best(step) == found.against_best(step) == expected
    assert [found.against_best(step).told for step in (10, 30, 40)] == ["worse", "", "worse"]
    assert found.verdict() == "step 20 has the best loss; it cannot be told from that of 30"
    assert [entry["against_best"] for entry in found.content()["checkpoints"]] == [
        "worse",
        "best",
        "",
        "worse",
    ]


def test_the_best_may_change_with_later_steps():
    found = race({10: 2.0, 20: 1.99})
    assert found.against_best(10).told == ""
    values = 0.5 * found.evaluation.base.losses.values
    found.add(
        30,
        Measured(losses=Sums(found.evaluation.base.losses.sources, values, found.measured[10].losses.tokens)),
    )
    assert found.best == 30
    assert found.against_best(10).told == "worse"


def test_no_step_may_be_better_than_the_base():
    found = race({10: 4.0, 20: 3.5})
    assert found.best == 0
    assert found.verdict() == "no checkpoint has a better loss than the base model"
