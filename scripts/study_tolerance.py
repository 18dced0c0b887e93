"""Make tables of how much methods lose when the learning rate is too high.

    python scripts/study_tolerance.py docs/study/tolerance.jsonl --plot docs/images/tolerance.svg

The results are those of `study.py confirm --multiples 1 2 4`: each method at its best rate, at twice and at four times
that. A run that ends with a higher loss than the untrained model, or with NaN, has diverged; it counts as the untrained
model, to which a user would go back.

- Regret: log of the loss relative to LoRA's mean loss at its best rate, in percent. 0 is LoRA, tuned.
- Difference to LoRA: of the regrets at the same multiple, paired by seed; below zero is better. Brackets show the 95 %
  bootstrap interval of the mean over seeds. A star marks an interval that excludes zero at level 1 - 0.05 / methods.
  The last numbers count the seeds with a better result, and the diverged runs.
"""

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study import read_results
from study_methods import METHODS
from study_tables import BASELINE, COLORS, STYLES, cell, header

Record = dict[str, Any]
Pair = tuple[str, str]  # model, task


class Regrets:
    """Regrets by pair of model and task, method, multiple of the best rate, and seed.

    Args:
        records: test results.

    Attributes:
        values: regrets in percent.
        diverged: whether the run diverged, by the same keys.
    """

    def __init__(self, records: Sequence[Record]):
        lowest: dict[tuple[Pair, str], float] = defaultdict(lambda: math.inf)
        untrained: dict[Pair, float] = {}
        for r in records:
            pair = r["model"], r["task"]
            lowest[pair, r["method"]] = min(lowest[pair, r["method"]], r["rate"])
            if "untrained" in r:
                untrained[pair] = r["untrained"]
        losses, self.diverged = {}, {}
        for r in records:
            pair = r["model"], r["task"]
            key = (pair, r["method"], round(r["rate"] / lowest[pair, r["method"]]), r["seed"])
            loss = r["test"]["loss"]
            self.diverged[key] = not loss <= untrained[pair]
            losses[key] = untrained[pair] if self.diverged[key] else loss
        self.pairs = list(dict.fromkeys(pair for pair, *_ in losses))
        self.multiples = sorted({multiple for _, _, multiple, _ in losses})
        self.methods = [name for name in METHODS if any(method == name for _, method, *_ in losses)]
        self.reference = {
            pair: statistics.mean(
                loss for key, loss in losses.items() if key[:3] == (pair, BASELINE, self.multiples[0])
            )
            for pair in self.pairs
        }
        self.values = {key: 100 * math.log(loss / self.reference[key[0]]) for key, loss in losses.items()}

    def of(self, pair: Pair, method: str, multiple: int) -> dict[int, float]:
        """Return regrets by seed."""
        return {key[3]: value for key, value in self.values.items() if key[:3] == (pair, method, multiple)}

    def count_diverged(self, pair: Pair, method: str, multiple: int) -> int:
        """Return how many runs diverged."""
        return sum(value for key, value in self.diverged.items() if key[:3] == (pair, method, multiple))

    def differences(self, pair: Pair, method: str, multiple: int) -> dict[int, float]:
        """Return the differences to LoRA's regret by seed."""
        base, own = self.of(pair, BASELINE, multiple), self.of(pair, method, multiple)
        return {seed: own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())}


def regret_table(regrets: Regrets) -> str:
    """Return the mean regret of each method at each multiple, with its diverged runs."""
    columns = [(pair, multiple) for pair in regrets.pairs for multiple in regrets.multiples]
    lines = header("Regret in percent (diverged runs)", [])
    names = [f"{Path(model).name}, {task}, {multiple}x" for (model, task), multiple in columns]
    lines[2:] = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for method in regrets.methods:
        cells = []
        for pair, multiple in columns:
            found = regrets.of(pair, method, multiple)
            diverged = regrets.count_diverged(pair, method, multiple)
            mean = f"{statistics.mean(found.values()):+.1f}" if found else "-"
            cells.append(mean + (f" ({diverged}/{len(found)})" if diverged else ""))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference_table(regrets: Regrets, multiple: int) -> str:
    """Return the differences to LoRA at a multiple of the best rate, with their mean over the pairs."""
    methods = [name for name in regrets.methods if name != BASELINE]
    lines = header(f"Difference to LoRA at {multiple}x the best rate, in percent", regrets.pairs, "mean")
    for method in methods:
        cells, by_seed = [], defaultdict(list)
        for pair in regrets.pairs:
            differences = regrets.differences(pair, method, multiple)
            diverged = regrets.count_diverged(pair, method, multiple)
            text = cell(list(differences.values()), len(methods), True)
            cells.append(text + (f", {diverged} diverged" if diverged else ""))
            for seed, difference in differences.items():
                by_seed[seed].append(difference)
        complete = max(map(len, by_seed.values()), default=0)
        means = [statistics.mean(d) for d in by_seed.values() if len(d) == complete]
        lines.append(f"| {method} | {' | '.join(cells)} | {cell(means, len(methods), True)} |")
    return "\n".join(lines)


def plot(regrets: Regrets, path: Path) -> None:
    """Plot the mean loss at each multiple relative to LoRA's best, a panel for each model and task."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "tolerance"
    figure, (axes,) = pyplot.subplots(
        1, len(regrets.pairs), figsize=(3.5 * len(regrets.pairs), 3.5), squeeze=False, layout="constrained"
    )
    for panel, pair in zip(axes, regrets.pairs, strict=True):
        for i, method in enumerate(regrets.methods):
            found = {m: regrets.of(pair, method, m) for m in regrets.multiples}
            means = {m: math.exp(statistics.mean(r.values()) / 100) for m, r in found.items() if r}
            style = {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i % len(STYLES)]}
            panel.plot(list(means), list(means.values()), label=method, **style)
        panel.set(title=f"{Path(pair[0]).name}, {pair[1]}", xlabel="learning rate / the method's best")
        panel.set(xscale="log", yscale="log" if panel.get_ylim()[1] > 2 else "linear")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xticks(regrets.multiples, [f"{m}x" for m in regrets.multiples], minor=False)
        panel.set_xticks([], minor=True)
    axes[0].set_ylabel("test loss / LoRA's at its best rate")
    axes[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="output files of study.py confirm --multiples")
    parser.add_argument("--plot", type=Path, help="file to write a plot to")
    args = parser.parse_args()
    if missing := [str(path) for path in args.results if not path.exists()]:
        parser.error(f"{missing[0]}: no such file; run scripts/study.py to create it")
    regrets = Regrets([r for path in args.results for r in read_results(path).values()])
    tables = [regret_table(regrets), *(difference_table(regrets, m) for m in regrets.multiples)]
    print("\n\n".join(tables))
    if args.plot:
        plot(regrets, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
