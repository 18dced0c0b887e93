"""Make tables and plots from the study's results.

    python scripts/study_tables.py docs/study/small-tune.jsonl
    python scripts/study_tables.py docs/study/small.jsonl --plots docs/images

Each method is compared with LoRA in pairs of runs with the same model, task and seed, and so with the same rows in the
same order. Loss and KL differences are in percent of LoRA's mean, which allows averaging over tasks; lower is better.
Differences of shares are in percentage points; higher is better. Brackets show the 95 % bootstrap interval of the mean
over seeds (10000 resamples). A star marks differences whose interval excludes zero at level 1 - 0.05 / methods, a
Bonferroni correction for the number of methods in the table. The last number counts the seeds with a better result.
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
from study import best_rate, mean_losses, read_results
from study_methods import METHODS

Record = dict[str, Any]
BASELINE = "lora"
RESAMPLES = 10000


def bootstrap_interval(differences: list[float], level: float) -> tuple[float, float]:
    """Return the bootstrap interval of the mean."""
    values = np.array(differences)
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def at_best_rates(records: list[Record]) -> list[Record]:
    """Return the runs at the best learning rate of each model, task and method."""
    best = {combination: best_rate(losses) for combination, losses in mean_losses(records).items()}
    return [r for r in records if r["rate"] == best[r["model"], r["task"], r["method"]]]


class PairedRuns:
    """Runs by model, task, method and seed, and their differences to the baseline."""

    def __init__(self, records: list[Record], split: str):
        self.split = split
        self.runs = {(r["model"], r["task"], r["method"], r["seed"]): r for r in records}
        self.models = list(dict.fromkeys(r["model"] for r in records))
        self.tasks = list(dict.fromkeys(r["task"] for r in records))
        present = {r["method"] for r in records}
        self.methods = [name for name in METHODS if name in present]

    def seeds(self, model: str, task: str, method: str) -> list[int]:
        """Return the seeds that both the method and the baseline were run with."""
        return sorted(
            seed
            for m, t, name, seed in self.runs
            if (m, t, name) == (model, task, method) and (m, t, BASELINE, seed) in self.runs
        )

    def value(self, model: str, task: str, method: str, seed: int, measure: str) -> float:
        """Return a measure of a run, NaN if it has none."""
        record = self.runs[model, task, method, seed]
        return record[measure] if measure in ("kl", "rise") else record[self.split].get(measure, math.nan)

    def differences(self, model: str, task: str, method: str, measure: str) -> dict[int, float]:
        """Return by seed the difference to the baseline, in percent of its mean (loss, KL) or percentage points."""
        seeds = self.seeds(model, task, method)
        base = {seed: self.value(model, task, BASELINE, seed, measure) for seed in seeds}
        unit = statistics.mean(base.values()) if measure in ("loss", "kl") and base else 1.0
        return {
            seed: 100 * (self.value(model, task, method, seed, measure) - base[seed]) / unit for seed in seeds
        }


def cell(differences: list[float], methods: int, lower_is_better: bool) -> str:
    """Format the mean, the interval and the number of wins."""
    if not differences or any(math.isnan(d) for d in differences):
        return "-"
    mean = statistics.mean(differences)
    if len(differences) < 3:
        return f"{mean:+.2f}"
    low, high = bootstrap_interval(differences, 0.95)
    wide_low, wide_high = bootstrap_interval(differences, 1 - 0.05 / max(methods, 1))
    star = "*" if wide_low > 0 or wide_high < 0 else ""
    wins = sum(d < 0 if lower_is_better else d > 0 for d in differences)
    return f"{mean:+.2f}{star} [{low:+.2f}, {high:+.2f}] {wins}/{len(differences)}"


def header(title: str, columns: list[tuple[str, str]], *more: str) -> list[str]:
    """Return the first lines of a table with a column for each model and task."""
    names = [*(f"{Path(model).name}, {task}" for model, task in columns), *more]
    return [title, "", f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]


def table(pairs: PairedRuns, measure: str, title: str) -> str:
    """Return a table with a row for each method and a column for each model and task, or "" without values."""
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
    baseline = []
    for model, task in columns:
        runs = [
            r for r in pairs.runs.values() if (r["model"], r["task"], r["method"]) == (model, task, BASELINE)
        ]
        mean = statistics.mean(r[measure] if measure in r else r[pairs.split][measure] for r in runs)
        baseline.append(f"{mean:.4g}")
    lines.append(f"| {BASELINE} (absolute) | {' | '.join(baseline)} | |")
    for name in methods:
        cells, by_seed = [], defaultdict(list)
        for model, task in columns:
            differences = pairs.differences(model, task, name, measure)
            cells.append(cell(list(differences.values()), len(methods), lower))
            for seed, d in differences.items():
                by_seed[seed].append(d)
        # Average over the columns, for seeds that were run in all of them.
        means = [statistics.mean(d) for d in by_seed.values() if len(d) == len(columns)]
        lines.append(f"| {name} | {' | '.join(cells)} | {cell(means, len(methods), lower)} |")
    return "\n".join(lines)


def rate_table(records: list[Record]) -> str:
    """Return a table of the best learning rate of each method, with the rates that were tried."""
    means = mean_losses(records)
    columns = list(dict.fromkeys((model, task) for model, task, _ in means))
    lines = header("Best learning rate (rates tried)", columns)
    for name in METHODS:
        cells = []
        for model, task in columns:
            losses = means.get((model, task, name))
            if losses is None:
                cells.append("-")
            else:
                tried = ", ".join(f"{rate:.2g}" for rate in sorted(losses))
                cells.append(f"{best_rate(losses):.2g} ({tried})")
        if set(cells) != {"-"}:
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def equal_loss_table(pairs: PairedRuns) -> str:
    """Return a table of the KL to the base model at the lowest validation loss that both runs of a pair reach."""
    methods = [name for name in pairs.methods if name != BASELINE]
    columns = list(dict.fromkeys((model, task) for model, task, *_ in pairs.runs))
    lines = header("KL to the base model at equal validation loss, difference to LoRA in percent", columns)
    for name in methods:
        cells = []
        for model, task in columns:
            differences = []
            for seed in pairs.seeds(model, task, name):
                curves = [pairs.runs[model, task, n, seed]["curve"] for n in (name, BASELINE)]
                loss = max(min(point["loss"] for point in curve) for curve in curves)
                kl, baseline_kl = (kl_at(curve, loss) for curve in curves)
                differences.append(100 * (kl - baseline_kl) / baseline_kl)
            cells.append(cell(differences, len(methods), True))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kl_at(curve: list[dict[str, float]], loss: float) -> float:
    """Return the KL when the loss first falls to a value, interpolated linearly between evaluations."""
    for before, after in itertools.pairwise(curve):
        if after["loss"] <= loss:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before["kl"] + share * (after["kl"] - before["kl"])
    return curve[-1]["kl"]


# --- plots --------------------------------------------------------------------------------------------------

COLORS = ("#1b1b1b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLES = ("-", "--", "-.", ":")


def plot(records: list[Record], directory: Path) -> None:
    """Write study.svg: loss, KL and selection misalignment by step, and importance by layer."""
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
            style = {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i % len(STYLES)], "label": name}
            steps = [point["step"] for point in runs[0]["curve"]]
            for panel, key in zip(axes[:2], ("loss", "kl"), strict=True):
                panel.plot(steps, np.mean([[p[key] for p in r["curve"]] for r in runs], axis=0), **style)
            misalignment = [[p["misalignment"] for p in r["curve"] if p.get("misalignment")] for r in runs]
            if misalignment[0] and None not in misalignment[0][0]:
                axes[2].plot(steps[-len(misalignment[0]) :], np.mean(misalignment, axis=(0, 2)), **style)
            if runs[0]["importance"]:
                plot_importance(axes[3], runs, style)
        axes[0].set(yscale="log", title=f"{Path(model).name}, {task}", ylabel="validation loss")
        axes[1].set(ylabel="KL to the base model")
        axes[2].set(ylabel="selection misalignment")
        axes[3].set(ylabel="importance / its mean")
        axes[0].legend(fontsize=7)
    for panel in grid[-1, :3]:
        panel.set_xlabel("step")
    grid[-1, 3].set_xlabel("layer")
    figure.savefig(directory / "study.svg", metadata={"Date": None})


def plot_importance(panel: Any, runs: list[Record], style: dict[str, str]) -> None:
    """Plot the median importance of each layer's channels, with bars from the 10th to the 90th percentile."""
    percentiles = np.array(
        [[[v[k] / v["mean"] for k in ("p10", "p50", "p90")] for v in r["importance"].values()] for r in runs]
    )
    low, median, high = percentiles.mean(axis=0).T
    panel.errorbar(np.arange(len(median)), median, [median - low, high - median], capsize=2, **style)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="output files of study.py")
    parser.add_argument("--plots", type=Path, help="directory to write the plots to")
    args = parser.parse_args()
    if missing := [str(path) for path in args.results if not path.exists()]:
        parser.error(f"{missing[0]}: no such file; run scripts/study.py to create it")
    records = [r for path in args.results for r in read_results(path).values() if not r.get("diverged")]
    split = "test" if all("test" in r for r in records) else "valid"
    best_runs = at_best_rates(records)
    pairs = PairedRuns(best_runs, split)
    tables = [
        rate_table(records),
        table(pairs, "loss", f"Loss on the {split} split, difference to LoRA in percent"),
        table(
            pairs, "exact", f"Exact generations on the {split} split, difference to LoRA in percentage points"
        ),
        table(
            pairs,
            "accuracy",
            f"Accuracy of choices on the {split} split, difference to LoRA in percentage points",
        ),
        table(
            pairs,
            "kl",
            "KL to the base model on unrelated text after training, difference to LoRA in percent",
        ),
        equal_loss_table(pairs),
    ]
    print("\n\n".join(one for one in tables if one))
    if args.plots:
        plot(best_runs, args.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
