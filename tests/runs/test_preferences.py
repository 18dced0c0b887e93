"""What a preference run shows and records: measures and objective in words, terminal lines, end, and run.json."""

import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from nalora_mlx.core.config import RunConfig
from nalora_mlx.runs.next_steps import has_better_adapter
from nalora_mlx.runs.preferences import describe_measures, describe_objective, measures
from nalora_mlx.runs.progress import Progress
from nalora_mlx.runs.record import record
from nalora_mlx.runs.status import improves
from tests.runs.test_display import START, report, screen, show, status, validation

MEASURES = {"accuracy": 0.75, "chosen_reward": 0.5, "rejected_reward": -0.25, "chosen_logp": -1.0}


def preference_report(step, loss, **changes):
    return report(step, loss) | MEASURES | changes


def preference_validation(step, loss, accuracy, best_loss, best_accuracy, **changes):
    more = {"accuracy": accuracy, "best_accuracy": best_accuracy, "first_loss": 0.7, "first_accuracy": 0.5}
    return validation(step, loss, best_loss) | MEASURES | more | {"kl": 0.125} | changes


def lines(events, **more):
    out = io.StringIO()
    show(events, Console(file=out, width=40, **more))
    return out.getvalue().splitlines()


# --- words --------------------------------------------------------------------------------------------------


def test_measures_have_the_margin_if_both_rewards_are_known():
    assert measures(MEASURES) == MEASURES | {"margin": 0.75}
    assert describe_measures(MEASURES) == ["accuracy 0.75", "margin 0.750"]
    # A batch of KTO without rejected answers, and supervised training.
    assert describe_measures({"accuracy": 1.0, "chosen_reward": 0.5, "kl": 0.1}) == [
        "accuracy 1.00",
        "KL 0.10",
    ]
    assert describe_measures({"rejected_reward": 0.5}) == []
    assert describe_measures({"loss": 1.0}) == []
    assert describe_measures({"accuracy": 0.0, "chosen_reward": math.nan, "rejected_reward": 0.0}) == [
        "accuracy 0.00",
        "margin nan",
    ]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"train_mode": "sft"}, None),
        ({}, None),
        ({"train_mode": "dpo"}, "DPO (sigmoid loss, beta 0.1)"),
        (
            {"train_mode": "dpo", "dpo_loss": "ipo", "preference_beta": 0.25},
            "DPO (ipo loss, beta 0.25)",
        ),
        (
            {"train_mode": "dpo", "length_normalized": True, "label_smoothing": 0.1},
            "DPO (sigmoid loss, beta 0.1, length-normalized, label smoothing 0.1)",
        ),
        ({"train_mode": "orpo"}, "ORPO (beta 0.1)"),
        ({"train_mode": "simpo"}, "SimPO (beta 2, margin 1)"),
        ({"train_mode": "kto", "undesirable_weight": 1.5}, "KTO (beta 0.1, weights 1 and 1.5)"),
    ],
)
def test_the_objective_has_the_settings_that_matter(settings, text):
    assert describe_objective({"model": "m", "simpo_margin": 1.0, **settings}) == text


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("sft", set()),
        (
            "dpo",
            {
                "train_mode",
                "preference_beta",
                "dpo_loss",
                "label_smoothing",
                "length_normalized",
                "reference",
            },
        ),
        ("orpo", {"train_mode", "preference_beta"}),
        ("kto", {"train_mode", "preference_beta", "desirable_weight", "undesirable_weight", "reference"}),
        ("simpo", {"train_mode", "preference_beta", "label_smoothing", "simpo_margin"}),
    ],
)
def test_run_json_has_the_preference_settings_with_an_effect(mode, names):
    settings = record(RunConfig(train_mode=mode, train=True), {})["settings"]
    plain = record(RunConfig(train=True), {})["settings"]
    assert settings.keys() - plain.keys() == names
    assert plain.keys() <= settings.keys()
    assert settings.get("preference_beta") == {"sft": None, "simpo": 2.0}.get(mode, 0.1)


# --- terminal -----------------------------------------------------------------------------------------------


def test_plain_lines_of_a_preference_run():
    events = [
        START,
        {"event": "reference", "batch": 1, "batches": 3},
        {"event": "reference", "batch": 2, "batches": 3},
        {"event": "reference", "batch": 3, "batches": 3},
        preference_validation(0, 0.7, 0.5, None, None),
        preference_report(10, 0.6),
        preference_validation(10, 0.5, 0.8, 0.5, 0.8),
        # A lower loss is not the best if the accuracy is lower; among equal accuracies, it is.
        preference_validation(20, 0.4, 0.75, 0.5, 0.8),
        preference_validation(30, 0.45, 0.8, 0.45, 0.8),
        preference_validation(35, 0.45, 0.75, 0.45, 0.8),
        # A batch of KTO may have rows of one label only.
        preference_report(40, 0.6, rejected_reward=None),
    ]
    assert lines(events) == [
        "computing the log-probabilities of the reference on 3 batches",
        "iteration   0/100: validation loss 0.7000, accuracy 0.50, margin 0.750, KL 0.12, 2.0 s",
        "iteration  10/100: loss 0.6000, accuracy 0.75, margin 0.750, lr 1.00e-05, 1234 tokens/s, 3.20 GB, "
        "0:03:00 left",
        "iteration  10/100: validation loss 0.5000, accuracy 0.80, margin 0.750, KL 0.12 (best), 2.0 s",
        "iteration  20/100: validation loss 0.4000, accuracy 0.75, margin 0.750, KL 0.12, 2.0 s",
        "iteration  30/100: validation loss 0.4500, accuracy 0.80, margin 0.750, KL 0.12 (best), 2.0 s",
        "iteration  35/100: validation loss 0.4500, accuracy 0.75, margin 0.750, KL 0.12, 2.0 s",
        "iteration  40/100: loss 0.6000, accuracy 0.75, lr 1.00e-05, 1234 tokens/s, 3.20 GB, 0:02:00 left",
    ]
    assert lines([START, {"event": "reference", "batch": 1, "batches": 1}]) == []


@pytest.mark.parametrize(
    ("loss", "accuracy", "remark"),
    [
        (0.2, 0.4, " (not better than before training, accuracy 0.50)"),
        (0.8, 0.5, " (not better than before training, loss 0.7000)"),
        (0.6, 0.5, " (best)"),
        (0.8, 0.6, " (best)"),
        (math.nan, 0.6, " (not better than before training, accuracy 0.50)"),
    ],
)
def test_accuracy_decides_what_is_better_than_before_training(loss, accuracy, remark):
    (line,) = lines([START, preference_validation(10, loss, accuracy, loss, accuracy)])
    assert line.split("KL 0.12")[1] == f"{remark}, 2.0 s"


def test_improves():
    assert improves(1.0, None, 0.1, None)
    assert improves(2.0, 1.0, 0.6, 0.5)
    assert not improves(0.5, 1.0, 0.4, 0.5)
    assert improves(0.5, 1.0, 0.5, 0.5)
    assert not improves(1.0, 1.0, 0.5, 0.5)
    assert not improves(math.nan, 1.0, 0.9, 0.5)
    assert improves(0.5, 1.0)
    assert not improves(1.5, 1.0)


def test_the_status_shows_the_measures():
    events = [
        preference_report(10, 0.6),
        preference_validation(10, 0.5, 0.8, 0.5, 0.8),
    ]
    rows = [" ".join(line.split()) for line in status(events, width=80).splitlines()]
    assert rows[:4] == [
        "loss 0.6000 ▁",
        "accuracy 0.75, margin 0.750",
        "validation accuracy 0.80 the best so far from 0.50",
        "loss 0.5000, margin 0.750, KL 0.12",
    ]
    text = status([*events, preference_validation(20, 0.4, 0.75, 0.5, 0.8)])
    assert re.search(r"validation +accuracy 0\.75  best 0\.80 at iteration 10", text)
    text = status([*events, preference_validation(20, 0.4, 0.45, 0.5, 0.8)], width=80)
    assert re.search(r"validation +accuracy 0\.45  not better than before training, accuracy 0\.50", text)
    assert re.search(
        r"accuracy 0\.50  before training", status([preference_validation(0, 0.7, 0.5, None, None)])
    )


def test_a_terminal_shows_the_progress_of_the_reference():
    shown = []
    for done in (2, 3):
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, width=80, color_system=None)
        events = [{"event": "reference", "batch": i, "batches": 3} for i in range(1, done + 1)]
        show([START, *events], console)
        shown.append([line.split() for line in screen(out.getvalue())])
    assert [line[0] for line in shown[0]] == ["training", "reference"]
    assert shown[0][1][2] == "2/3"
    assert [line[0] for line in shown[1]] == ["training"]


# --- the end ------------------------------------------------------------------------------------------------


def result(*validations):
    """Return the result of a run with these validations, (loss, accuracy) each, the first one before training."""
    progress = Progress()
    for iteration, (loss, accuracy) in enumerate(validations):
        progress.iteration = 10 * iteration
        progress.record_validation(loss, accuracy)
    return progress.result(None)


def test_the_end_gives_accuracy_and_loss():
    assert result((0.7, 0.5), (0.2, 0.97)).describe_validation(Path("a/best")) == [
        "validation accuracy 0.50 before training, 0.97 after (the best)",
        "validation loss 0.7000 before training, 0.2000 after",
    ]
    # The best one is not that of the lowest loss.
    assert result((0.7, 0.5), (0.3, 0.9), (0.1, 0.8)).describe_validation(Path("a/best")) == [
        "validation accuracy 0.50 before training, 0.80 after (best 0.90 and a loss of 0.3000 at iteration 10: a/best)",
        "validation loss 0.7000 before training, 0.1000 after",
    ]
    assert result((math.nan, 0.5), (0.3, 0.9), (math.nan, 0.8)).describe_validation(Path("a/best"))[1] == (
        "validation loss NaN or infinite before training, NaN or infinite after"
    )


@pytest.mark.parametrize(
    ("last", "helped"), [((0.2, 0.4), False), ((0.9, 0.6), True), ((0.6, 0.5), True), ((0.7, 0.5), False)]
)
def test_training_that_lowers_the_accuracy_did_not_help(last, helped):
    found = result((0.7, 0.5), last).describe_validation(Path("a/best"))
    assert len(found) == 3 - helped
    if not helped:
        assert found[0] == f"validation accuracy 0.50 before training, {last[1]:.2f} after"
        assert found[2].startswith(
            f"note: training did not help: the best adapter, in a/best, has a validation accuracy of {last[1]:.2f} "
            f"and a loss of {last[0]:.4f}, so the model is better without it"
        )


def test_the_summary_names_the_accuracy():
    assert result((0.7, 0.5), (0.25, 1.0)).summary == "validation accuracy 0.50 -> 1.00, loss 0.7 -> 0.25"
    assert result((0.7, None), (0.25, None)).summary == "validation loss 0.7 -> 0.25"
    assert Progress(train_loss=0.5).result(None).summary == "training loss 0.5"


@pytest.mark.parametrize(
    ("best", "last", "better"),
    [
        ((0.3, 0.9), (0.1, 0.85), True),
        ((0.3, 0.9), (0.1, 0.89), False),  # chance
        ((0.1, 0.9), (0.3, 0.9), True),
        ((0.3, 0.9), (math.nan, 0.9), True),
    ],
)
def test_a_clearly_more_accurate_adapter_is_suggested(best, last, better):
    assert has_better_adapter(result((0.7, 0.5), best, last)) == better
