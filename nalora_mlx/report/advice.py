"""What a run's losses say, in words: overfitting, divergence, too few iterations, and what to do about it.

The thresholds are rules of thumb. They are wide enough that the noise of small batches does not trigger them.
"""

from typing import NamedTuple

import numpy as np

from nalora_mlx.report.downsampling import running_mean
from nalora_mlx.report.formatting import format_pair, format_share
from nalora_mlx.report.result import validated_rows
from nalora_mlx.report.run_data import MEASURES, RunData
from nalora_mlx.training.preferences.warnings import findings

LEVELS = ("warning", "note", "good")
OVERFIT = 1.05  # last validation loss, relative to the best
JUMP = 0.5  # rise of the smoothed training loss above its lowest value so far: in nats, and relative to that value
NOISE = 4  # typical differences between reports that a rise must exceed
STILL_FALLING = 0.03  # fall of the validation loss at the end, per tenth of the run, relative to it
STILL_FALLING_TRAINING = 0.1  # the same for the training loss, from the fourth to the last fifth of the run
MIN_REPORTS = 10  # reports needed to judge the training loss
LESS_ACCURATE = 0.02  # fall of the validation accuracy below its best
FEW_VALIDATIONS = 3  # up to this many do not make a curve


class Advice(NamedTuple):
    """A finding and its remedy; `level` is one of LEVELS."""

    level: str
    title: str
    text: str


def advise(run: RunData) -> list[Advice]:
    """Return what a run's losses say, warnings first."""
    steps, losses = _known(run.train)
    smooth = running_mean(losses, max(3, len(losses) // 30))
    jump = _jump(steps, losses, smooth)
    diverged = any(advice.level == "warning" for advice in jump)
    validation = _validation(run, steps, smooth, diverged)
    if run.best_accuracy is not None:
        validation = [*_accuracy(run), *_failures(run)]
    found = [*_skipped(run), *jump, *validation]
    return sorted(found, key=lambda advice: LEVELS.index(advice.level))


def _known(columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and losses without the reports whose loss is NaN."""
    known = ~np.isnan(columns["loss"])
    return columns["step"][known], columns["loss"][known]


def _skipped(run: RunData) -> list[Advice]:
    if not run.skipped:
        return []
    updates = "1 update was" if run.skipped == 1 else f"{run.skipped:,} updates were"
    level = "warning" if run.skipped > 0.01 * run.last_step else "note"
    return [
        Advice(
            level,
            f"{updates} skipped",
            "The loss or the gradient was NaN or infinite. A lower learning rate or --grad-clip 1 usually helps.",
        )
    ]


def _jump(steps: np.ndarray, losses: np.ndarray, smooth: np.ndarray) -> list[Advice]:
    """Find the largest rise of the training loss above its lowest value so far."""
    if len(losses) < MIN_REPORTS:
        return []
    lowest = np.minimum.accumulate(smooth)
    rise = smooth - lowest
    at = int(rise.argmax())
    noise = float(np.median(np.abs(np.diff(losses))))
    if rise[at] <= max(JUMP, JUMP * lowest[at], NOISE * noise):
        return []
    low, high = format_pair(lowest[at], smooth[at])
    begin = int(steps[int(smooth[: at + 1].argmin())])
    if rise[-1] > 0.5 * rise[at]:
        return [
            Advice(
                "warning",
                "Training diverged",
                f"The training loss rose from {low} to {high} after iteration {begin:,} and did not recover. "
                "The learning rate looks too high: try a third of it, or a longer warmup.",
            )
        ]
    return [
        Advice(
            "note",
            "The training loss jumped",
            f"It rose from {low} to {high} after iteration {begin:,} and recovered. "
            "A lower learning rate or --grad-clip 1 makes training steadier.",
        )
    ]


def _validation(run: RunData, steps: np.ndarray, smooth: np.ndarray, diverged: bool) -> list[Advice]:
    valid_steps, losses = _known(run.valid)
    if not len(losses):
        text = "Overfitting cannot be seen without validation rows: add a valid.jsonl, or hold rows of the data back."
        return [Advice("note", "No validation", text)] if len(smooth) else []
    if len(losses) == 1:
        return []
    best = int(losses.argmin())
    if valid_steps[best] == 0:
        before, last = format_pair(losses[0], losses[-1])
        remedy = (
            "" if diverged else " Try another learning rate, and check with --show-masks what is trained on."
        )
        return [
            Advice(
                "warning",
                "Training did not help",
                f"The validation loss was {before} before training and is {last} at the end.{remedy}",
            )
        ]
    if best < len(losses) - 1 and losses[-1] > OVERFIT * losses[best]:
        return [] if diverged else [_overfit(run, valid_steps, losses, best, steps, smooth)]
    if diverged:
        return []
    if _still_falling(valid_steps, losses, smooth):
        return [
            Advice(
                "note",
                "The loss was still falling at the end",
                "More iterations will probably lower it further: raise --iters.",
            )
        ]
    return [
        Advice(
            "good", "No sign of overfitting", "The validation loss stayed close to its best until the end."
        )
    ]


def _accuracy(run: RunData) -> list[Advice]:
    """Say whether the validation accuracy of a preference run rose, and whether it stayed."""
    steps, accuracies, losses = (run.valid[key] for key in ("step", "accuracy", "loss"))
    best = run.best_index
    if best is None or len(losses) < 2:
        return []
    first, highest, last = map(format_share, (accuracies[0], accuracies[best], accuracies[-1]))
    use = f"Use the adapter in {run.path.resolve().name}/best"
    if steps[best] == 0:
        return [
            Advice(
                "warning",
                "Training did not help",
                f"The validation accuracy was {first} before training and is {last} at the end. Try another learning "
                "rate, and look at the rows: are the chosen answers better?",
            )
        ]
    iteration = f"iteration {int(steps[best]):,}"
    if accuracies[best] - accuracies[-1] > LESS_ACCURATE:
        return [
            Advice(
                "warning",
                f"Less accurate after {iteration}",
                f"The validation accuracy was best at {iteration} ({highest}) and fell to {last} at the end. {use}, or "
                "train fewer iterations.",
            )
        ]
    lowest = int(np.nanargmin(losses))
    if losses[-1] > OVERFIT * losses[lowest]:
        low, end = format_pair(losses[lowest], losses[-1])
        return [
            Advice(
                "note",
                f"Overconfident after iteration {int(steps[lowest]):,}",
                f"The validation loss rose from {low} to {end} while the accuracy stayed: the model became surer of "
                "pairs that it gets wrong, too. Train fewer iterations, or raise --preference-beta.",
            )
        ]
    return [Advice("good", "The accuracy held", "It stayed close to its best until the end.")]


def _failures(run: RunData) -> list[Advice]:
    """Return what the run warned of: the known failures of preference training, at the last validation."""
    first, last = (
        {key: run.valid[key][i] for key in MEASURES if key in run.valid and not np.isnan(run.valid[key][i])}
        for i in (0, -1)
    )
    rows = validated_rows(run) or run.data.get("valid", {}).get("rows", 0)
    found = findings(run.preferences, first, last, rows) if len(run.valid["step"]) > 1 else []
    return [
        Advice("warning", each.title, f"{_sentence(each.measured)} {_sentence(each.remedy)}")
        for each in found
    ]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _overfit(
    run: RunData,
    valid_steps: np.ndarray,
    losses: np.ndarray,
    best: int,
    steps: np.ndarray,
    smooth: np.ndarray,
) -> Advice:
    """Describe a validation loss that rose after its best: overfitting if the training loss kept falling."""
    lowest, last = format_pair(losses[best], losses[-1])
    iteration = f"{int(valid_steps[best]):,}"
    rose = f"Validation was best at iteration {iteration} ({lowest}) and rose to {last} at the end"
    use = f"Use the adapter in {run.path.resolve().name}/best (iteration {iteration}), or train fewer iterations."
    earlier = smooth[steps <= valid_steps[best]]
    if len(earlier) and smooth[-1] < earlier[-1]:
        return Advice(
            "warning",
            f"Overfitting after iteration {iteration}",
            f"{rose}, while the training loss kept falling: the model began to memorize its rows. {use}",
        )
    return Advice(
        "warning",
        f"Worse after iteration {iteration}",
        f"{rose}, and the training loss did not fall either: the learning rate looks too high. {use}",
    )


def _still_falling(valid_steps: np.ndarray, losses: np.ndarray, smooth: np.ndarray) -> bool:
    """Return whether the last validations, or the training loss if there are few, fell noticeably."""
    if len(losses) > FEW_VALIDATIONS:
        tenths = 10 * (valid_steps[-1] - valid_steps[-2]) / max(1, valid_steps[-1])
        return bool(losses[-2] - losses[-1] > STILL_FALLING * tenths * losses[-1])
    if len(smooth) < MIN_REPORTS:
        return False
    fifth = len(smooth) // 5
    earlier, last = smooth[-2 * fifth : -fifth].mean(), smooth[-fifth:].mean()
    return bool(earlier - last > STILL_FALLING_TRAINING * last)
