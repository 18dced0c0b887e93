"""Captions of charts, and tables of losses, layers, settings, data and environment."""

from typing import Any

import numpy as np

from nalora_mlx.report.formatting import format_number
from nalora_mlx.report.run_data import RunData, short_layers
from nalora_mlx.runs.preferences import TRL_NAMES

MAX_LOSS_ROWS = 40
FIRST_SETTINGS = (
    *(
        "model",
        "data",
        "hf_dataset",
        "train_mode",
        "preference_beta",
        "dpo_loss",
        "fine_tune_type",
        "rank",
        "scale",
        "num_layers",
        "iters",
        "batch_size",
    ),
    *(
        "grad_accumulation_steps",
        "learning_rate",
        "lr_schedule",
        "optimizer",
        "max_seq_length",
        "mask_prompt",
        "seed",
    ),
)
PARTS = {"mean": "mean over channels", "p10": "10th percentile", "p50": "median", "p90": "90th percentile"}
# Statistics of channels, by their name in metrics.jsonl: group and unit.
CHANNEL_STATISTICS = {
    "importance": ("Importance", "importance |φ'|"),
    "mask": ("Mask", "mask m"),
    "step_scale": ("Step scale", "step scale g"),
    "multiplier": ("Step multiplier", "step multiplier q"),
}


def statistic_label(statistic: str) -> tuple[str, str, str]:
    """Return the group, label and unit of a statistic by its name in metrics.jsonl."""
    name, _, part = statistic.partition(".")
    if name in CHANNEL_STATISTICS:
        group, unit = CHANNEL_STATISTICS[name]
        return group, f"{group}, {PARTS.get(part, part)}", unit
    if name == "occupancy":
        return "Partition", f"Tokens in the {part} region", "share of tokens"
    if name == "misalignment":
        return "Selection", "Selection misalignment", "SM"
    if name == "sparsity":
        return "Mask", "Mask sparsity, share of channels below 0.1", "share of channels"
    if name == "effective":
        return "Mask", "Channels in effect, share of all", "share of channels"
    return "Other", statistic, statistic


# --- captions ----------------------------------------------------------------------------------------


def loss_caption(runs: list[RunData]) -> str:
    """Describe the loss chart in sentences."""
    sentences = []
    for run in runs:
        losses = run.train["loss"][~np.isnan(run.train["loss"])]
        parts = []
        if len(losses):
            parts.append(f"training loss from {format_number(losses[0])} to {format_number(losses[-1])}")
        if run.best_validation:
            step, loss = run.best_validation
            place = f"at iteration {step:,}" if step else "before training, which did not lower it"
            parts.append(f"best validation loss {format_number(loss)} {place}")
        sentences.append((run, f"{', '.join(parts)}."))
    text = join_sentences(sentences, len(runs) > 1)
    meaning = "how surprised the model is by the right text"
    if any(run.prefers for run in runs):
        meaning = "how far the model is from preferring the good answers"
    return f"{text} The loss measures {meaning}; lower is better."


def scalar_caption(runs: list[RunData], key: str, unit: str) -> str:
    """Give the lowest, highest and last value of a scalar in sentences."""
    sentences = []
    for run in runs:
        values = run.train[key][~np.isnan(run.train[key])]
        if len(values):
            low, high, last = (format_number(value, 3) for value in (values.min(), values.max(), values[-1]))
            sentences.append((run, f"from {low} to {high}{unit}, {last} at the end."))
    return join_sentences(sentences, len(runs) > 1)


def join_sentences(sentences: list[tuple[RunData, str]], several: bool) -> str:
    """Join the runs' sentences. If there are several runs, each sentence begins with the run's name."""
    if several:
        return " ".join(f"{run.name}: {sentence}" for run, sentence in sentences)
    text = " ".join(sentence for _, sentence in sentences)
    return text[:1].upper() + text[1:]


# --- tables ------------------------------------------------------------------------------------------


def loss_table(run: RunData, split: str) -> dict[str, Any] | None:
    """Return a table of a split's losses with at most MAX_LOSS_ROWS rows; None without losses."""
    columns = run.train if split == "train" else run.valid
    if not len(columns["step"]):
        return None
    rows = np.unique(np.linspace(0, len(columns["step"]) - 1, MAX_LOSS_ROWS).astype(int))
    measures = [key for key in TRL_NAMES if key in columns and not np.isnan(columns[key]).all()]
    name = {"train": "training", "valid": "validation"}[split]
    return {
        "title": f"{run.name}: {name} loss",
        "head": ["iteration", f"{name} loss", *(key.replace("_", " ") for key in measures)],
        "rows": [
            [f"{int(columns['step'][i]):,}", *(format_number(columns[key][i]) for key in ("loss", *measures))]
            for i in rows
        ],
    }


def na_sentence(runs: list[RunData]) -> str:
    """Say what NA-LoRA did, in a sentence or two."""
    text = (
        "NA-LoRA watches how strongly each channel of the model's MLPs responds, and holds back the steps of "
        "channels that hardly do."
    )
    grids = [(run, run.grids["effective"].values[:, -1]) for run in runs if "effective" in run.grids]
    shares = [(run, np.nanmean(share)) for run, share in grids if not np.isnan(share).all()]
    if len(runs) == 1 and shares:
        text += f" At the end, training acted on {shares[0][1]:.0%} of the channels of a layer, on average."
    return text


def layer_table(run: RunData) -> dict[str, Any]:
    """Return a table of every layer's statistics at the last report."""
    names = [name for name in run.grids if not name.startswith("mask.") or name == "mask.mean"]
    rows = [
        [f"layer {layer}", *(format_number(run.grids[name].values[i, -1], 3) for name in names)]
        for i, layer in enumerate(short_layers(run.layers))
    ]
    return {
        "title": f"{run.name}: all layers at the end, as a table",
        "head": ["", *(statistic_label(name)[1] for name in names)],
        "rows": rows,
    }


def settings_table(runs: list[RunData]) -> dict[str, Any]:
    """Return all settings, a column for each run: first those that differ, which are marked, then the main ones."""
    names = [
        name
        for name in dict.fromkeys(name for run in runs for name in run.settings)
        if any(run.settings.get(name) not in (None, {}) for run in runs)
    ]
    rows = [_row(name, [_format_value(run.settings.get(name)) for run in runs]) for name in names]
    first = [name.replace("_", " ") for name in FIRST_SETTINGS]
    rows.sort(
        key=lambda row: (not row["differs"], first.index(row["name"]) if row["name"] in first else len(first))
    )
    return {"title": "Settings", "head": _head(runs), "rows": rows}


def differing_settings(runs: list[RunData]) -> dict[str, Any] | None:
    """Return the settings in which runs differ; None for one run, or without a difference."""
    table = settings_table(runs)
    rows = [row for row in table["rows"] if row["differs"]]
    return {**table, "title": "What differs", "rows": rows} if rows else None


def data_table(runs: list[RunData]) -> dict[str, Any]:
    """Return rows, tokens, supervised share and lengths of each split."""
    splits = dict.fromkeys(split for run in runs for split in run.data)
    rows = [_row(split, [_format_split(run.data.get(split)) for run in runs]) for split in splits]
    return {"title": "Data", "head": _head(runs), "rows": rows}


def environment_table(runs: list[RunData]) -> dict[str, Any]:
    """Return versions and machine."""
    names = dict.fromkeys(name for run in runs for name in run.environment)
    rows = [_row(name, [_format_value(run.environment.get(name)) for run in runs]) for name in names]
    return {"title": "Environment", "head": _head(runs), "rows": rows}


def _head(runs: list[RunData]) -> list[str]:
    return ["", *(run.name for run in runs)]


def _row(name: str, cells: list[str]) -> dict[str, Any]:
    return {"name": name.replace("_", " "), "cells": cells, "differs": len(set(cells)) > 1}


def _format_value(value: Any) -> str:
    if value is None or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_format_value, value))
    if isinstance(value, dict):
        items = {
            name: f"({_format_value(item)})" if isinstance(item, list | dict) else _format_value(item)
            for name, item in value.items()
        }
        return ", ".join(f"{name}: {text}" for name, text in items.items())
    return str(value)


def _format_split(split: dict[str, Any] | None) -> str:
    if not split:
        return "-"
    text = f"{split['rows']:,} rows"
    if "tokens" in split:
        text += (
            f", {split['tokens']:,} tokens, {split['supervised'] / max(1, split['tokens']):.0%} supervised; "
            f"lengths {split['shortest']:,} to {split['longest']:,}, median {split['median']:,}, "
            f"95th percentile {split['p95']:,}"
        )
    return text
