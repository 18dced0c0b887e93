"""The text and numbers of a report: summary, captions, and tables of losses, layers, settings, data and environment."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nalora_mlx.report.run_data import RunData, short_layers

MAX_LOSS_ROWS = 40
PARTS = {"mean": "mean over channels", "p10": "10th percentile", "p50": "median", "p90": "90th percentile"}
# Statistics of channels, by their name in metrics.jsonl: group and unit.
CHANNEL_STATISTICS = {
    "importance": ("Importance", "importance |φ'|"),
    "mask": ("Mask", "mask m"),
    "step_scale": ("Step scale", "step scale g"),
    "multiplier": ("Step multiplier", "step multiplier q"),
}


@dataclass
class Cell:
    """A value in the summary, with a note, and whether it is the best of all runs."""

    value: str
    note: str = ""
    best: bool = False


def format_number(value: float | None, digits: int = 4) -> str:
    """Format a number with a few significant digits; "-" if there is none."""
    if value is None or not np.isfinite(value):
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.{digits}g}"


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


# --- summary -----------------------------------------------------------------------------------------


def summary(runs: list[RunData]) -> list[tuple[str, list[Cell]]]:
    """Return the lines of the summary: a name, and a cell for each run."""
    lowest = min((run.best_validation[1] for run in runs if run.best_validation), default=None)
    compared = sum(run.best_validation is not None for run in runs) > 1

    def best_validation(run: RunData) -> Cell | None:
        if run.best_validation is None:
            return None
        step, loss = run.best_validation
        place = f"at iteration {step:,}" if step else "before training: no later one is lower"
        return Cell(format_number(loss), place, compared and loss == lowest)

    lines: list[tuple[str, Callable[[RunData], Cell | None]]] = [
        ("Best validation loss", best_validation),
        ("Loss before", _loss_before),
        ("Training loss", _training_loss),
        ("Test loss", _test_loss),
        ("Iterations", lambda run: Cell(f"{run.last_step:,}", f"trained on {run.tokens:,} tokens")),
        ("Speed", _speed),
        ("Peak memory", _peak_memory),
        ("Selection misalignment", _misalignment),
        ("Skipped updates", lambda run: Cell(f"{run.skipped:,}") if run.skipped else None),
    ]
    rows = [(name, [make_cell(run) for run in runs]) for name, make_cell in lines]
    return [(name, [cell or Cell("-") for cell in cells]) for name, cells in rows if any(cells)]


def _loss_before(run: RunData) -> Cell | None:
    if not len(run.valid["loss"]) or run.valid["step"][0] != 0:
        return None
    return Cell(format_number(run.valid["loss"][0]), "validation, at iteration 0")


def _training_loss(run: RunData) -> Cell | None:
    losses = run.train["loss"]
    return Cell(format_number(losses[-1]), "last report") if len(losses) else None


def _test_loss(run: RunData) -> Cell | None:
    return None if run.test_loss is None else Cell(format_number(run.test_loss))


def _speed(run: RunData) -> Cell | None:
    values = run.train["tokens_per_second"]
    return None if _all_nan(values) else Cell(f"{np.nanmedian(values):,.0f}", "tokens/s, median")


def _peak_memory(run: RunData) -> Cell | None:
    values = run.train["peak_memory_gb"]
    return None if _all_nan(values) else Cell(f"{format_number(float(np.nanmax(values)), 3)} GB")


def _misalignment(run: RunData) -> Cell | None:
    grid = run.grids.get("misalignment")
    if grid is None or _all_nan(grid.values[:, -1]):
        return None
    return Cell(f"{np.nanmean(grid.values[:, -1]):.3f}", "mean over layers, at the end")


def _all_nan(values: np.ndarray) -> bool:
    return not len(values) or bool(np.isnan(values).all())


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
    return _join_sentences(sentences, len(runs) > 1)


def scalar_caption(runs: list[RunData], key: str, unit: str) -> str:
    """Give the lowest, highest and last value of a scalar in sentences."""
    sentences = []
    for run in runs:
        values = run.train[key][~np.isnan(run.train[key])]
        if len(values):
            low, high, last = (format_number(value, 3) for value in (values.min(), values.max(), values[-1]))
            sentences.append((run, f"from {low} to {high}{unit}, {last} at the end."))
    return _join_sentences(sentences, len(runs) > 1)


def _join_sentences(sentences: list[tuple[RunData, str]], several: bool) -> str:
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
    name = {"train": "training", "valid": "validation"}[split]
    return {
        "title": f"{run.name}: {name} loss",
        "head": ["iteration", f"{name} loss"],
        "rows": [[f"{int(columns['step'][i]):,}", format_number(columns["loss"][i])] for i in rows],
    }


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
    """Return all settings, a column for each run; rows that differ are marked and come first."""
    names = [
        name
        for name in dict.fromkeys(name for run in runs for name in run.settings)
        if any(run.settings.get(name) not in (None, {}) for run in runs)
    ]
    rows = [_row(name, [_format_value(run.settings.get(name)) for run in runs]) for name in names]
    rows.sort(key=lambda row: not row["differs"])
    return {"title": "Settings", "head": _head(runs), "rows": rows}


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
