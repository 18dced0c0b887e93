"""Warnings of the known failures of preference training, from the measures of the validation set.

The thresholds are rules of thumb, which sound runs stay clear of.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from nalora_mlx.core.config import DPO, KTO, ORPO, PreferenceConfig
from nalora_mlx.runs.progress import Progress

COLLAPSE = 0.5  # nats per token by which the chosen answers may become less likely
RIGHT, WRONG = 0.7, 0.5  # accuracy on the pairs that a preference for length gets right, and on the others
MIN_ROWS = 20  # validated rows that tell something about lengths
DRIFT = 1.0  # nats per token of KL divergence


class Finding(NamedTuple):
    """A failure: its kind, a title, what was measured, and what to do."""

    kind: str
    title: str
    measured: str
    remedy: str


def new_warnings(
    progress: Progress, measures: Mapping[str, float], config: PreferenceConfig, rows: int
) -> list[str]:
    """Return what the measures of a validation warn of, each kind once in a run. The first validation warns of nothing.

    Args:
        progress: of the run. Keeps the measures of the first validation, and the kinds of warnings given.
        measures: means over the validation set. Some may be missing or NaN.
        config: of the run.
        rows: number of rows that were validated.
    """
    known = {name: value for name, value in measures.items() if math.isfinite(value)}
    if not progress.first_valid_measures:
        progress.first_valid_measures = known
        return []
    found = findings(config, progress.first_valid_measures, known, rows)
    new = [each for each in found if each.kind not in progress.warned]
    progress.warned += [each.kind for each in new]
    return [f"{each.measured}; {each.remedy}" for each in new]


def findings(
    config: PreferenceConfig, first: Mapping[str, float], last: Mapping[str, float], rows: int
) -> list[Finding]:
    """Return the failures that the measures of a validation show.

    - collapse: the chosen answers, too, become unlikely. The loss only asks that the rejected ones become more so.
    - length: answers are told apart by their length.
    - drift: the model is far from what it was. ORPO, which also trains as supervised training does, is meant to move.

    Args:
        config: of the run.
        first: measures before training.
        last: measures of the validation.
        rows: number of rows that were validated.
    """
    found = []
    # A higher beta keeps the model closer to what it was. ORPO's is the weight of the preference loss.
    gentler = f"{'lower' if config.train_mode == ORPO else 'raise'} --preference-beta"
    fall = first.get("chosen_logp", math.nan) - last.get("chosen_logp", math.nan)
    if fall > COLLAPSE:
        answers = "answers with label true" if config.train_mode == KTO else "chosen answers"
        others = {KTO: "raise --desirable-weight", ORPO: "train fewer iterations"}
        other = others.get(
            config.train_mode, "use --train-mode orpo, which also trains on the chosen answers"
        )
        found.append(
            Finding(
                "collapse",
                "The good answers became unlikely",
                f"the {answers} have become less likely, too, by {fall:.2f} nats per token",
                f"lower the learning rate, {gentler}, or {other}",
            )
        )
    accuracies = {name: last.get(f"accuracy_{name}", math.nan) for name in ("longer", "shorter")}
    for right, wrong, preferred in (("longer", "shorter", "long"), ("shorter", "longer", "short")):
        before = first.get(f"accuracy_{wrong}", WRONG)
        exploits = accuracies[right] >= RIGHT and accuracies[wrong] < WRONG and accuracies[wrong] <= before
        if rows >= MIN_ROWS and exploits:
            normalized = config.train_mode != DPO or config.compares_per_token
            remedy = f"add rows whose chosen answer is the {wrong} one"
            found.append(
                Finding(
                    "length",
                    "Answers are told apart by their length",
                    f"the model prefers {preferred} answers: accuracy is {accuracies[right]:.2f} where the chosen "
                    f"answer is the {right} one, and {accuracies[wrong]:.2f} where it is the {wrong} one",
                    remedy if normalized else f"{remedy}, or use --length-normalized or --train-mode simpo",
                )
            )
    divergence = last.get("kl", math.nan)
    if divergence > DRIFT and config.train_mode != ORPO:
        found.append(
            Finding(
                "drift",
                "The model has moved far",
                f"the model has moved far from what it was before training, by a KL divergence of {divergence:.2f} "
                "nats per token",
                f"lower the learning rate, or {gentler}",
            )
        )
    return found
