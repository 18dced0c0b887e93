"""Tables and plots of the study's results.

    python scripts/study_tables.py docs/study/tune.jsonl                     best rates, losses against LoRA's
    python scripts/study_tables.py docs/study/confirm.jsonl --plots docs/images

Differences are paired: the same model, task and seed, so the same rows in the same order. Intervals are 95 % bootstrap
intervals of the mean over seeds (10000 resamples); a star says that the interval which allows for the number of
methods in the table (level 1 - 0.05 / methods) leaves out zero. Losses are relative to LoRA's mean, so that tasks
can be averaged; lower is better. Shares are percentage points; higher is better.
"""

import argparse
import itertools
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from study import finished, mean_losses
from study_methods import METHODS

Record = dict[str, Any]
BASELINE = "lora"
RESAMPLES = 10000


def interval(differences: list[float], level: float) -> tuple[float, float]:
    """Bootstrap interval of the mean."""
    values = np.array(differences)
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def at_best_rates(records: list[Record]) -> list[Record]:
    """The runs of each model, task and method at its best rate; all, where there is only one."""
    means = mean_losses(records)
    best = {place: min(rates, key=lambda rate: rates[rate]) for place, rates in means.items()}
    return [r for r in records if r["rate"] == best[r["model"], r["task"], r["method"]]]


class Pairs:
    """Runs by model, task, method and seed, and differences to the baseline."""

    def __init__(self, records: list[Record], split: str):
        self.split = split
        self.of = {(r["model"], r["task"], r["method"], r["seed"]): r for r in records}
        self.models = list(dict.fromkeys(r["model"] for r in records))
        self.tasks = list(dict.fromkeys(r["task"] for r in records))
        found = {r["method"] for r in records}
        self.methods = [name for name in METHODS if name in found]

    def seeds(self, model: str, task: str, method: str) -> list[int]:
        """Seeds with which both the method and the baseline ran."""
        return sorted(
            seed
            for m, t, name, seed in self.of
            if (m, t, name) == (model, task, method) and (m, t, BASELINE, seed) in self.of
        )

    def value(self, model: str, task: str, method: str, seed: int, measure: str) -> float:
        """A measure of a run."""
        record = self.of[model, task, method, seed]
        return record[measure] if measure in ("kl", "rise") else record[self.split].get(measure, math.nan)

    def differences(self, model: str, task: str, method: str, measure: str) -> dict[int, float]:
        """By seed: percent of the baseline's mean loss (or KL), or percentage points."""
        seeds = self.seeds(model, task, method)
        base = {seed: self.value(model, task, BASELINE, seed, measure) for seed in seeds}
        unit = statistics.mean(base.values()) if measure in ("loss", "kl") and base else 1.0
        return {
            seed: 100 * (self.value(model, task, method, seed, measure) - base[seed]) / unit for seed in seeds
        }


def cell(differences: list[float], methods: int, lower_is_better: bool) -> str:
    """Mean, interval, wins."""
    if not differences or any(math.isnan(d) for d in differences):
        return "-"
    mean = statistics.mean(differences)
    if len(differences) < 3:
        return f"{mean:+.2f}"
    low, high = interval(differences, 0.95)
    wide_low, wide_high = interval(differences, 1 - 0.05 / max(methods, 1))
    star = "*" if wide_low > 0 or wide_high < 0 else ""
    wins = sum(d < 0 if lower_is_better else d > 0 for d in differences)
    return f"{mean:+.2f}{star} [{low:+.2f}, {high:+.2f}] {wins}/{len(differences)}"


def header(title: str, columns: list[tuple[str, str]], *more: str) -> list[str]:
    """The first lines of a table with a column for each model and task."""
    heads = [*(f"{Path(model).name}, {task}" for model, task in columns), *more]
    return [title, "", f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]


def table(pairs: Pairs, measure: str, title: str) -> str:
    """One row a method, one column a model and task, and their mean."""
    lower = measure in ("loss", "kl", "rise")
    methods = [name for name in pairs.methods if name != BASELINE]
    columns = [
        (model, task)
        for model in pairs.models
        for task in pairs.tasks
        if any(
            not math.isnan(d)
            for name in methods
            for d in pairs.differences(model, task, name, measure).values()
        )
    ]
    if not columns:
        return ""
    lines = header(title, columns, "mean")
    base = []
    for model, task in columns:
        runs = [
            r for r in pairs.of.values() if (r["model"], r["task"], r["method"]) == (model, task, BASELINE)
        ]
        base.append(
            f"{statistics.mean(r[measure] if measure in r else r[pairs.split][measure] for r in runs):.4g}"
        )
    lines.append(f"| {BASELINE} itself | {' | '.join(base)} | |")
    for name in methods:
        cells, by_seed = [], defaultdict(list)
        for model, task in columns:
            differences = pairs.differences(model, task, name, measure)
            cells.append(cell(list(differences.values()), len(methods), lower))
            for seed, d in differences.items():
                by_seed[seed].append(d)
        # A seed counts if it ran everywhere.
        means = [statistics.mean(d) for d in by_seed.values() if len(d) == len(columns)]
        lines.append(f"| {name} | {' | '.join(cells)} | {cell(means, len(methods), lower)} |")
    return "\n".join(lines)


def rates(records: list[Record]) -> str:
    """The best rate of each method, and the grid that it was found in."""
    means = mean_losses(records)
    columns = list(dict.fromkeys((model, task) for model, task, _ in means))
    lines = header("Best learning rate (of those tried)", columns)
    for name in METHODS:
        cells = []
        for model, task in columns:
            tried = means.get((model, task, name), {})
            best = min(tried, key=lambda rate: tried[rate]) if tried else 0
            cells.append(f"{best:.2g} ({', '.join(f'{r:.2g}' for r in sorted(tried))})" if tried else "-")
        if set(cells) != {"-"}:
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def equal_loss(pairs: Pairs) -> str:
    """KL to the base model on unrelated text where both have come to the same validation loss."""
    methods = [name for name in pairs.methods if name != BASELINE]
    columns = list(dict.fromkeys((model, task) for model, task, *_ in pairs.of))
    lines = header("KL to the base model at equal validation loss, percent of LoRA's", columns)
    for name in methods:
        cells = []
        for model, task in columns:
            found = []
            for seed in pairs.seeds(model, task, name):
                curves = [pairs.of[model, task, n, seed]["curve"] for n in (name, BASELINE)]
                level = max(min(point["loss"] for point in curve) for curve in curves)
                ours, theirs = (kl_at(curve, level) for curve in curves)
                found.append(100 * (ours - theirs) / theirs)
            cells.append(cell(found, len(methods), True))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kl_at(curve: list[dict[str, float]], level: float) -> float:
    """KL at which the loss first comes down to a level, between two evaluations by a straight line."""
    for before, after in itertools.pairwise(curve):
        if after["loss"] <= level:
            share = (before["loss"] - level) / (before["loss"] - after["loss"])
            return before["kl"] + share * (after["kl"] - before["kl"])
    return curve[-1]["kl"]


# --- plots --------------------------------------------------------------------------------------------------

COLOURS = ("#1b1b1b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLES = ("-", "--", "-.", ":")


def plot(records: list[Record], directory: Path) -> None:
    """Loss, forgetting and selection misalignment over the steps; importance by layer."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "study"
    groups: dict[tuple[str, str], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        groups[r["model"], r["task"]][r["method"]].append(r)
    figure, grid = pyplot.subplots(
        len(groups), 4, figsize=(14, 2.6 * len(groups)), squeeze=False, layout="constrained"
    )
    for axes, ((model, task), methods) in zip(grid, groups.items(), strict=True):
        for i, name in enumerate(name for name in METHODS if name in {r["method"] for r in records}):
            runs = methods.get(name)
            if not runs:
                continue
            look = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)], "label": name}
            steps = [point["step"] for point in runs[0]["curve"]]
            for panel, key in zip(axes[:2], ("loss", "kl"), strict=True):
                panel.plot(steps, np.mean([[p[key] for p in r["curve"]] for r in runs], axis=0), **look)
            seen = [[p["misalignment"] for p in r["curve"] if p.get("misalignment")] for r in runs]
            if seen[0] and None not in seen[0][0]:
                axes[2].plot(steps[-len(seen[0]) :], np.mean(seen, axis=(0, 2)), **look)
            if runs[0]["importance"]:
                by_layer(axes[3], runs, look)
        axes[0].set(yscale="log", title=f"{Path(model).name}, {task}", ylabel="validation loss")
        axes[1].set(ylabel="KL to the base model")
        axes[2].set(ylabel="selection misalignment")
        axes[3].set(ylabel="importance / its mean")
        axes[0].legend(fontsize=7)
    for panel in grid[-1, :3]:
        panel.set_xlabel("step")
    grid[-1, 3].set_xlabel("layer")
    figure.savefig(directory / "study.svg", metadata={"Date": None})


def by_layer(panel: Any, runs: list[Record], look: dict[str, str]) -> None:
    """The median channel of each layer at the end, and bars from the 10th to the 90th percentile."""
    spread = np.array(
        [[[v[k] / v["mean"] for k in ("p10", "p50", "p90")] for v in r["importance"].values()] for r in runs]
    )
    low, middle, high = spread.mean(axis=0).T
    panel.errorbar(np.arange(len(middle)), middle, [middle - low, high - middle], capsize=2, **look)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="files of study.py")
    parser.add_argument("--plots", type=Path, help="directory for the plots")
    args = parser.parse_args()
    if missing := [str(path) for path in args.results if not path.exists()]:
        parser.error(f"{missing[0]}: no such file; scripts/study.py writes it")
    records = [r for path in args.results for r in finished(path).values() if not r.get("diverged")]
    split = "test" if all("test" in r for r in records) else "valid"
    chosen = at_best_rates(records)
    pairs = Pairs(chosen, split)
    parts = [
        rates(records),
        table(pairs, "loss", f"Loss on the {split} rows, percent of LoRA's"),
        table(pairs, "exact", f"Answers generated exactly, {split} rows, percentage points"),
        table(pairs, "accuracy", f"Answers right by likelihood, {split} rows, percentage points"),
        table(pairs, "kl", "KL to the base model on unrelated text at the end, percent of LoRA's"),
        equal_loss(pairs),
    ]
    print("\n\n".join(part for part in parts if part))
    if args.plots:
        plot(chosen, args.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
