"""What a report says in words and numbers: the summary, captions, and tables of settings, data and machine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nalora_mlx.report.data import RunData, short_layers

MOST_ROWS = 40  # of a table of losses
# A statistic by its name in metrics.jsonl: group, what it is, unit
PARTS = {"mean": "mean over channels", "p10": "10th percentile", "p50": "median", "p90": "90th percentile"}
QUANTITIES = {
    "importance": ("Importance", "importance |φ'|"),
    "mask": ("Mask", "mask m"),
    "step_scale": ("Step scale", "step scale g"),
    "multiplier": ("Step multiplier", "step multiplier q"),
}


@dataclass
class Cell:
    """A number of the summary, what to know with it, and whether it is the best of all runs."""

    value: str
    note: str = ""
    best: bool = False


def number(value: float | None, digits: int = 4) -> str:
    """A number for people: a few digits, "-" where there is none."""
    if value is None or not np.isfinite(value):
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def summary(runs: list[RunData]) -> list[tuple[str, list[Cell]]]:
    """Lines of the summary: what it is called, and a cell for each run."""
    lines: list[tuple[str, list[Cell]]] = []

    def add(name: str, cell: Callable[[RunData], Cell | None]) -> None:
        cells = [cell(run) for run in runs]
        if any(cells):
            lines.append((name, [each or Cell("-") for each in cells]))

    bests = [run.best[1] for run in runs if run.best]

    def best(run: RunData) -> Cell | None:
        if run.best is None:
            return None
        step, loss = run.best
        wins = len(runs) > 1 and len(bests) > 1 and loss == min(bests)
        return Cell(number(loss), f"at iteration {step:,}", wins)

    def first_valid(run: RunData) -> Cell | None:
        if not len(run.valid["loss"]) or run.valid["step"][0] != 0:
            return None
        return Cell(number(run.valid["loss"][0]), "validation, at iteration 0")

    def last(run: RunData) -> Cell | None:
        return Cell(number(run.train["loss"][-1]), "last report") if len(run.train["loss"]) else None

    def speed(run: RunData) -> Cell | None:
        values = run.train["tokens_per_second"]
        return None if _empty(values) else Cell(f"{np.nanmedian(values):,.0f}", "tokens/s, median")

    def memory(run: RunData) -> Cell | None:
        values = run.train["peak_memory_gb"]
        return None if _empty(values) else Cell(f"{number(float(np.nanmax(values)), 3)} GB")

    def misalignment(run: RunData) -> Cell | None:
        grid = run.grids.get("misalignment")
        if grid is None or _empty(grid.values[:, -1]):
            return None
        return Cell(f"{np.nanmean(grid.values[:, -1]):.3f}", "mean of the layers, at the end")

    add("Best validation loss", best)
    add("Loss before", first_valid)
    add("Training loss", last)
    add("Test loss", lambda run: None if run.test_loss is None else Cell(number(run.test_loss)))
    add("Iterations", lambda run: Cell(f"{run.last_step:,}", f"{run.tokens:,} tokens trained on"))
    add("Speed", speed)
    add("Peak memory", memory)
    add("Selection misalignment", misalignment)
    add("Updates not applied", lambda run: Cell(f"{run.skipped:,}") if run.skipped else None)
    return lines


def loss_caption(runs: list[RunData]) -> str:
    """What the loss chart shows, in sentences, for those who do not see it."""
    parts = []
    for run in runs:
        who = f"{run.name}: " if len(runs) > 1 else ""
        losses = run.train["loss"][~np.isnan(run.train["loss"])]
        said = []
        if len(losses):
            said.append(f"training loss from {number(losses[0])} to {number(losses[-1])}")
        if run.best:
            said.append(f"best validation loss {number(run.best[1])} at iteration {run.best[0]:,}")
        parts.append(f"{who}{', '.join(said)}.")
    return _sentence(" ".join(parts), runs)


def scalar_caption(runs: list[RunData], key: str, unit: str) -> str:
    """Lowest, highest and last value of a scalar of each run."""
    parts = []
    for run in runs:
        values = run.train[key][~np.isnan(run.train[key])]
        if len(values):
            who = f"{run.name}: " if len(runs) > 1 else ""
            parts.append(
                f"{who}from {number(values.min(), 3)} to {number(values.max(), 3)}{unit}, "
                f"{number(values[-1], 3)} at the end."
            )
    return _sentence(" ".join(parts), runs)


def loss_table(run: RunData, split: str) -> dict[str, Any] | None:
    """Losses of a split as a table, some forty of them."""
    columns = run.train if split == "train" else run.valid
    if not len(columns["step"]):
        return None
    places = np.unique(np.linspace(0, len(columns["step"]) - 1, MOST_ROWS).astype(int))
    name = {"train": "training", "valid": "validation"}[split]
    return {
        "title": f"{run.name}: {name} loss",
        "head": ["iteration", f"{name} loss"],
        "rows": [[f"{int(columns['step'][i]):,}", number(columns["loss"][i])] for i in places],
    }


def layer_table(run: RunData) -> dict[str, Any]:
    """Every layer's statistics at the last report."""
    names = [name for name in run.grids if not name.startswith("mask.") or name == "mask.mean"]
    rows = [
        [f"layer {layer}", *(number(run.grids[name].values[i, -1], 3) for name in names)]
        for i, layer in enumerate(short_layers(run.layers))
    ]
    return {
        "title": f"{run.name}: all layers at the end, as a table",
        "head": ["", *(label(name)[1] for name in names)],
        "rows": rows,
    }


def label(statistic: str) -> tuple[str, str, str]:
    """Group, full label and unit of a statistic by its name in metrics.jsonl."""
    name, _, part = statistic.partition(".")
    if name in QUANTITIES:
        group, unit = QUANTITIES[name]
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


def settings_table(runs: list[RunData]) -> dict[str, Any]:
    """All settings, a column for each run; lines that differ are marked and come first."""
    names = [
        name
        for name in dict.fromkeys(name for run in runs for name in run.settings)
        if any(run.settings.get(name) not in (None, {}) for run in runs)
    ]
    rows = [_fact(name, [_shown(run.settings.get(name)) for run in runs]) for name in names]
    rows.sort(key=lambda row: not row["differs"])
    return {"title": "Settings", "head": _head(runs), "rows": rows}


def data_table(runs: list[RunData]) -> dict[str, Any]:
    """Rows, tokens, supervised share and lengths of each split."""
    rows = []
    for split in dict.fromkeys(split for run in runs for split in run.data):
        rows.append(_fact(split, [_split(run.data.get(split)) for run in runs]))
    return {"title": "Data", "head": _head(runs), "rows": rows}


def environment_table(runs: list[RunData]) -> dict[str, Any]:
    """Versions and machine."""
    names = dict.fromkeys(name for run in runs for name in run.environment)
    rows = [_fact(name, [_shown(run.environment.get(name)) for run in runs]) for name in names]
    return {"title": "Environment", "head": _head(runs), "rows": rows}


def _sentence(text: str, runs: list[RunData]) -> str:
    """Of several runs it begins with a name, which stays as it is."""
    return text[:1].upper() + text[1:] if len(runs) == 1 else text


def _empty(values: np.ndarray) -> bool:
    return not len(values) or bool(np.isnan(values).all())


def _head(runs: list[RunData]) -> list[str]:
    return ["", *(run.name for run in runs)]


def _fact(name: str, cells: list[str]) -> dict[str, Any]:
    return {"name": name.replace("_", " "), "cells": cells, "differs": len(set(cells)) > 1}


def _shown(value: Any) -> str:
    if value is None or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, dict):
        inner = {n: f"({_shown(v)})" if isinstance(v, list | dict) else _shown(v) for n, v in value.items()}
        return ", ".join(f"{name}: {item}" for name, item in inner.items())
    return str(value)


def _split(found: dict[str, Any] | None) -> str:
    if not found:
        return "-"
    text = f"{found['rows']:,} rows"
    if "tokens" in found:
        text += (
            f", {found['tokens']:,} tokens, {found['supervised'] / max(1, found['tokens']):.0%} of them supervised; "
            f"lengths {found['shortest']:,} to {found['longest']:,}, half of them up to {found['median']:,}, "
            f"95 % up to {found['p95']:,}"
        )
    return text
