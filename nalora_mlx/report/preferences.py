"""Charts of preference runs: what they show, and their captions."""

from typing import NamedTuple

import numpy as np

from nalora_mlx.core.config import KTO
from nalora_mlx.report.formatting import format_number, format_share
from nalora_mlx.report.run_data import RunData
from nalora_mlx.report.tables import join_sentences


class PreferenceChart(NamedTuple):
    """A chart of measures, in training and validation."""

    title: str
    axis: str
    format: str  # of a number in the tooltip
    measures: dict[str, str]  # key in metrics.jsonl -> name of the line, if there are several
    meaning: str


CHARTS = {  # by id
    "accuracy": PreferenceChart(
        "Accuracy",
        "share",
        ".1%",
        {"accuracy": ""},
        "Share of pairs whose chosen answer has the higher reward; one half is chance.",
    ),
    "margin": PreferenceChart(
        "Reward margin",
        "reward margin",
        ".4g",
        {"margin": ""},
        "Reward of the chosen answers minus that of the rejected ones, on average; higher is clearer.",
    ),
    "logps": PreferenceChart(
        "Log-probability of the answers",
        "nats per token",
        ".4g",
        {"chosen_logp": "chosen", "rejected_logp": "rejected"},
        "The rejected answers become less likely. If the chosen ones do, too, the model says neither.",
    ),
    "kl": PreferenceChart(
        "Distance from before training",
        "KL divergence (nats per token)",
        ".4g",
        {"kl": ""},
        "How much the probabilities of next tokens differ from those before training, on validation answers.",
    ),
}
MEANING_OF_LABELS = (
    "Share of answers that the model judges as their labels say; one half is chance."  # in KTO
)


def has_measure(columns: dict[str, np.ndarray], key: str) -> bool:
    """Return whether a measure is known at any step."""
    return key in columns and not bool(np.isnan(columns[key]).all())


def preference_charts(runs: list[RunData]) -> dict[str, PreferenceChart]:
    """Return the charts for which there is data, by id."""
    columns = [each for run in runs for each in (run.train, run.valid)]
    return {
        name: chart
        for name, chart in CHARTS.items()
        if any(has_measure(each, key) for each in columns for key in chart.measures)
    }


def loss_axis(runs: list[RunData]) -> str:
    """Return the title of the axis of losses. Those of preference training are not per token."""
    return "loss" if any(run.prefers for run in runs) else "loss (nats per token)"


def caption(runs: list[RunData], name: str) -> str:
    """Describe a chart in sentences: the measures before and after training, and what they mean."""
    chart, sentences = CHARTS[name], []
    for run in runs:
        parts = []
        for key, label in chart.measures.items():
            splits = ((run.valid, "validation"), (run.train, "training"))
            known = [(columns[key], where) for columns, where in splits if has_measure(columns, key)]
            if not known:
                continue
            values, where = known[0]
            values = values[~np.isnan(values)]
            show = format_share if key == "accuracy" else lambda value: format_number(value, 3)
            change = f"from {show(values[0])} to {show(values[-1])}" if len(values) > 1 else show(values[0])
            parts.append(f"{f'{label} ' if label else ''}{change} in {where}")
        if parts:
            sentences.append((run, f"{', '.join(parts)}.{_by_length(run) if name == 'accuracy' else ''}"))
    labels = name == "accuracy" and all(run.preferences.train_mode == KTO for run in runs)
    return f"{join_sentences(sentences, len(runs) > 1)} {MEANING_OF_LABELS if labels else chart.meaning}"


def _by_length(run: RunData) -> str:
    """Give the last accuracy on pairs with a longer chosen answer, and on those with a shorter one, in a sentence."""
    keys = ("accuracy_longer", "accuracy_shorter")
    if not all(has_measure(run.valid, key) for key in keys):
        return ""
    longer, shorter = (format_share(run.valid[key][-1]) for key in keys)
    return f" At the end, {longer} where the chosen answer is the longer one and {shorter} where it is the shorter one."
