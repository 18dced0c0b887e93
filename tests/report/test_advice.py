"""What a report says about losses: synthetic curves with a known fault, and sound ones without."""

from pathlib import Path

import numpy as np
import pytest

from nalora_mlx.report.advice import advise
from nalora_mlx.report.run_data import SCALARS, RunData

T = np.linspace(0, 1, 101)


def run(train=(), valid=(), iterations=1000, skipped=0):
    """Return a run with these losses, evenly spaced; the first validation is before training."""
    train, valid = np.array(train, dtype=float), np.array(valid, dtype=float)
    steps = np.linspace(0, iterations, len(train) + 1)[1:]
    columns = {name: np.full(len(train), np.nan) for name in SCALARS}
    at = np.linspace(0, iterations, max(1, len(valid))).astype(int)[: len(valid)].astype(float)
    return RunData(
        "name",
        Path("dir/name"),
        {**columns, "step": steps, "loss": train},
        {"step": at, "loss": valid},
        skipped=skipped,
    )


def falling(noise=0.0, seed=0, reports=101):
    """Return a training loss that falls from 2.5 to 0.5 and stays there."""
    t = np.linspace(0, 1, reports)
    return 0.5 + 2 * np.exp(-8 * t) + noise * np.random.default_rng(seed).normal(size=reports)


def titles(found):
    return [(advice.level, advice.title) for advice in found]


@pytest.mark.parametrize("noise", [0, 0.1, 0.4])
@pytest.mark.parametrize("reports", [12, 100, 2000])
@pytest.mark.parametrize("seed", range(3))
def test_a_sound_run_gets_no_warning(noise, reports, seed):
    """Noise of small batches is neither a jump nor overfitting."""
    valid = [2.5, 0.9, 0.62, 0.55, 0.52, 0.51, 0.515, 0.51]
    found = advise(run(falling(noise, seed, reports), valid))
    assert titles(found) == [("good", "No sign of overfitting")]


def test_overfitting_names_the_iteration_and_the_better_adapter():
    found = advise(run(2 * np.exp(-4 * T), [2.5, 1.2, 0.8, 0.7, 0.9, 1.2]))
    assert titles(found) == [("warning", "Overfitting after iteration 600")]
    for text in ("best at iteration 600 (0.70)", "rose to 1.20", "name/best", "fewer iterations"):
        assert text in found[0].text


def test_rise_of_both_losses_is_not_called_overfitting():
    found = advise(run(1 + (T - 0.4) ** 2, [2, 1.2, 1.0, 1.1, 1.25, 1.4]))
    assert titles(found) == [("warning", "Worse after iteration 400")]
    assert "learning rate looks too high" in found[0].text


def test_divergence():
    loss = np.where(T < 0.6, falling(0.05), 7.5)
    found = advise(run(loss, [2.5, 0.8, 0.6, 7.4, 7.6]))
    assert titles(found) == [("warning", "Training diverged")]
    assert "learning rate looks too high" in found[0].text
    assert "to 7.50 after iteration" in found[0].text


def test_divergence_from_the_start():
    found = advise(run(2.5 + 5 * (1 - np.exp(-10 * T)), [2.5, 7.0, 7.4]))
    assert titles(found) == [("warning", "Training diverged"), ("warning", "Training did not help")]


def test_jump_that_recovers():
    loss = falling(0.02)
    loss[50:58] += 3
    found = advise(run(loss, [2.5, 0.8, 0.55, 0.53, 0.525]))
    assert titles(found) == [("note", "The training loss jumped"), ("good", "No sign of overfitting")]


@pytest.mark.parametrize(("skipped", "level"), [(1, "note"), (200, "warning")])
def test_skipped_updates(skipped, level):
    found = advise(run(falling(), [2.5, 0.55, 0.52, 0.51, 0.51], skipped=skipped))
    assert (found[0].level, found[0].title.split(" were ")[0].split(" was ")[0]) == (
        level,
        f"{skipped} update{'s' * (skipped > 1)}",
    )
    assert "NaN or infinite" in found[0].text


def test_training_that_did_not_help():
    found = advise(run(falling(), [0.5, 0.8, 0.75, 0.7]))
    assert titles(found) == [("warning", "Training did not help")]
    assert "was 0.50 before training and is 0.70" in found[0].text


@pytest.mark.parametrize("valid", [[2.5, 2.0, 1.6, 1.28, 1.02], [2.5, 1.0]])
def test_loss_that_still_falls(valid):
    """With few validations, the training loss decides."""
    found = advise(run(2.5 * np.exp(-T), valid))
    assert titles(found) == [("note", "The loss was still falling at the end")]
    assert "--iters" in found[0].text


def test_loss_that_no_longer_falls():
    assert titles(advise(run(falling(), [2.5, 0.5]))) == [("good", "No sign of overfitting")]


def test_no_validation():
    found = advise(run(falling()))
    assert titles(found) == [("note", "No validation")]
    assert "valid.jsonl" in found[0].text


def test_nothing_to_say_at_the_start():
    assert advise(run([], [2.5])) == []
    assert advise(run()) == []
    assert [advice.title for advice in advise(run([2.0], [np.nan, np.nan]))] == ["No validation"]
