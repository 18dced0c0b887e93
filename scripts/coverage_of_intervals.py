"""Measure how often 95 % intervals of means and of paired differences cover the truth, by simulation.

    python scripts/coverage_of_intervals.py --output docs/study/intervals.jsonl

Prints a table of coverage in percent, and of the intervals' median width as a share of that of Student's t. `chosen` is
what nalora_mlx/evaluate/statistics.py does: pseudo-rows for right and wrong and for means of scores; else the symmetric
studentized bootstrap, and pseudo-rows for differences of scores if that is infinite. An interval without width covers
only if it hits the truth, and an infinite one always. `infinite` is the share of infinite symmetric intervals, and
`false` the share of chosen ones that exclude 0, although the differences have random signs, so that there is no effect.

The resamples of 50 simulations are the same rows, drawn anew for the next 50; so all sums are products of matrices.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

SIZES = (20, 40, 100, 400)
RESAMPLES = 1000
TOGETHER = 50  # simulations that share resamples
T, PERCENTILE, EXPANDED, BCA = "Student's t", "percentile", "expanded percentile", "BCa"
STUDENTIZED, SYMMETRIC, PSEUDO, CHOSEN = "studentized", "symmetric studentized", "pseudo-rows", "chosen"
METHODS = (T, PERCENTILE, EXPANDED, BCA, STUDENTIZED, SYMMETRIC, PSEUDO, CHOSEN)
INFINITE = 1e6  # widths beyond it
Rows = tuple[np.ndarray, np.ndarray]  # values and weights; [simulations, N] each
Intervals = tuple[np.ndarray, np.ndarray]  # low and high; [simulations] each


class Case(NamedTuple):
    """A distribution of rows."""

    draw: Callable[[np.random.Generator, tuple[int, int]], Rows]
    bounds: tuple[float, float] | None = None  # of pseudo-rows
    paired: bool = True  # differences, whose signs may be exchanged
    truth: float | None = None  # None: measured with many rows
    scores: bool = False  # differences of scores, which use pseudo-rows only where there is no other interval


def unweighted(values: np.ndarray) -> Rows:
    return values.astype(np.float64), np.ones(values.shape)


def normal(generator, shape):
    return unweighted(0.3 * generator.normal(size=shape) - 0.1)


def lognormal(sigma):
    return lambda generator, shape: unweighted(generator.lognormal(0, sigma, shape))


def token_losses(generator, shape):
    """Rows of 60 tokens in the median; longer rows have a slightly lower loss per token."""
    tokens = np.maximum(1, np.round(generator.lognormal(math.log(60), 0.8, shape)))
    return generator.lognormal(0, 0.5, shape) * (tokens / 60) ** -0.1 * tokens, tokens


def independent_token_losses(generator, shape):
    """The same, but the loss per token does not depend on the row's length."""
    losses, tokens = token_losses(generator, shape)
    return losses * (tokens / 60) ** 0.1, tokens


def token_loss_differences(generator, shape):
    losses, tokens = token_losses(generator, shape)
    return losses * np.expm1(generator.normal(-0.1, 0.25, shape)), tokens


def loss_differences(generator, shape):
    """Skewed: the difference is a share of the row's loss."""
    return unweighted(generator.lognormal(0, 0.8, shape) * np.expm1(generator.normal(-0.1, 0.4, shape)))


def scores(right, wrong):
    """Scores like F1, of which the given shares are 1 and 0."""

    def draw(generator, shape):
        kind, partial = generator.random(shape), generator.beta(3, 2, shape)
        return unweighted(np.where(kind < right, 1, np.where(kind < right + wrong, 0, partial)))

    return draw


def score_differences(unchanged):
    def draw(generator, shape):
        change = scores(0.3, 0.2)(generator, shape)[0] - scores(0.2, 0.3)(generator, shape)[0]
        return unweighted(np.where(generator.random(shape) < unchanged, 0, change))

    return draw


def rouge_differences(generator, shape):
    """Of two scores around 0.3 and 0.4 that are correlated."""
    row = 0.8 * generator.normal(size=shape)
    base, tuned = (1 / (1 + np.exp(0.6 * generator.normal(size=shape) - row - m)) for m in (-0.8, -0.4))
    return unweighted(tuned - base)


def accuracy(share):
    return lambda generator, shape: unweighted(generator.random(shape) < share)


def accuracy_differences(base, tuned, correlation):
    """Right and wrong answers of two models, by a threshold on a normal difficulty that they partly share."""

    def draw(generator, shape):
        row = math.sqrt(correlation) * generator.normal(size=shape)
        own = math.sqrt(1 - correlation)
        before, after = (
            (row + own * generator.normal(size=shape) < stats.norm.ppf(share)).astype(np.float64)
            for share in (base, tuned)
        )
        return unweighted(after - before)

    return draw


CASES = {
    "mean, normal": Case(normal, paired=False, truth=-0.1),
    "mean, lognormal 0.5": Case(lognormal(0.5), paired=False, truth=math.exp(0.125)),
    "mean, lognormal 1": Case(lognormal(1), paired=False, truth=math.exp(0.5)),
    "mean, loss per token": Case(token_losses, paired=False),
    "mean, loss per token of any length": Case(independent_token_losses, paired=False, truth=math.exp(0.125)),
    "difference, normal": Case(normal, truth=-0.1),
    "difference, loss": Case(loss_differences),
    "difference, loss per token": Case(token_loss_differences),
    "difference, ROUGE-L": Case(rouge_differences),
    "difference, F1, 50 % zeros": Case(score_differences(0.5), (-1, 1), scores=True),
    "difference, F1, 75 % zeros": Case(score_differences(0.75), (-1, 1), scores=True),
    "difference, F1, 90 % zeros": Case(score_differences(0.9), (-1, 1), scores=True),
    "mean, F1, 50 % ones": Case(scores(0.5, 0.2), (0, 1), paired=False),
    "mean, F1, 90 % ones": Case(scores(0.9, 0.02), (0, 1), paired=False),
}
CASES |= {
    f"share, {share}": Case(accuracy(share), (0, 1), paired=False, truth=share)
    for share in (0.02, 0.1, 0.5, 0.9, 0.98)
}
CASES |= {
    f"right/wrong, {base} to {tuned}, correlation {correlation}": Case(
        accuracy_differences(base, tuned, correlation), (-1, 1), truth=tuned - base
    )
    for base, tuned in ((0, 0.9), (0.5, 0.55), (0.8, 0.85), (0.02, 0.05))
    for correlation in ((0, 0.6) if base else (0,))
}


def resample(generator: np.random.Generator, rows: int) -> np.ndarray:
    """Return how often each row is drawn in each resample; [RESAMPLES, N]."""
    drawn = generator.integers(rows, size=(RESAMPLES, rows)) + rows * np.arange(RESAMPLES)[:, None]
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * rows).reshape(RESAMPLES, rows).astype(float)


def quantile(in_order: np.ndarray, level: np.ndarray | float) -> np.ndarray:
    """Return a quantile of each column at its own level."""
    place = np.broadcast_to(level, in_order.shape[1:]) * (RESAMPLES - 1)
    below = np.clip(place.astype(int), 0, RESAMPLES - 2)
    part, columns = place - below, np.arange(in_order.shape[1])
    return in_order[below, columns] * (1 - part) + in_order[below + 1, columns] * part


def intervals(
    generator: np.random.Generator, values: np.ndarray, weights: np.ndarray
) -> dict[str, Intervals]:
    """Return the intervals of all methods that need no bounds."""
    rows = values.shape[1]
    total = weights.sum(axis=1)
    value = values.sum(axis=1) / total
    residuals = values - value[:, None] * weights
    squares = (residuals**2).sum(axis=1)
    error = np.sqrt(squares * rows / (rows - 1)) / total
    times = resample(generator, rows)
    sums, totals = times @ residuals.T, times @ weights.T
    change = sums / totals
    spread = times @ (residuals**2).T - 2 * change * (times @ (residuals * weights).T)
    spread += change**2 * (times @ (weights**2).T)
    flat = spread <= 1e-12 * squares
    ratios = sums / np.sqrt(np.where(flat, 1, spread) * rows / (rows - 1))
    ratios = np.where(flat, np.copysign(1e9, sums), ratios)  # stands for infinity
    estimates = np.sort(value + change, axis=0)
    t = stats.t.ppf(0.975, rows - 1)
    found = {T: (value - t * error, value + t * error)}
    found[PERCENTILE] = (quantile(estimates, 0.025), quantile(estimates, 0.975))
    level = stats.norm.cdf(-math.sqrt(rows / (rows - 1)) * t)
    found[EXPANDED] = (quantile(estimates, level), quantile(estimates, 1 - level))
    below = ((change < 0) + 0.5 * (change == 0)).mean(axis=0)
    bias = stats.norm.ppf(np.clip(below, 1 / RESAMPLES, 1 - 1 / RESAMPLES))
    acceleration = (residuals**3).sum(axis=1) / (6 * np.where(squares > 0, squares, 1) ** 1.5)
    levels = [stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))) for z in (-1.96, 1.96)]
    found[BCA] = (quantile(estimates, levels[0]), quantile(estimates, levels[1]))
    in_order = np.sort(ratios, axis=0)
    found[STUDENTIZED] = (
        value - quantile(in_order, 0.975) * error,
        value - quantile(in_order, 0.025) * error,
    )
    half = np.sort(np.abs(ratios), axis=0)[math.ceil(0.95 * (RESAMPLES + 1)) - 1] * error
    found[SYMMETRIC] = (value - half, value + half)
    return found


def with_pseudo_rows(
    generator: np.random.Generator, values: np.ndarray, weights: np.ndarray, bounds: tuple[float, float]
) -> Intervals:
    weight = weights.mean(axis=1, keepdims=True)
    values = np.hstack((values, bounds[0] * weight, bounds[1] * weight))
    weights = np.hstack((weights, weight, weight))
    times = resample(generator, values.shape[1])
    low, high = np.quantile((times @ values.T) / (times @ weights.T), [0.025, 0.975], axis=0)
    return low, high


def all_intervals(
    generator: np.random.Generator, case: Case, values: np.ndarray, weights: np.ndarray
) -> dict[str, Intervals]:
    found = intervals(generator, values, weights)
    found[CHOSEN] = found[SYMMETRIC]
    if case.bounds:
        found[CHOSEN] = found[PSEUDO] = with_pseudo_rows(generator, values, weights, case.bounds)
    if case.scores:
        low, high = found[SYMMETRIC]
        none = (high - low > INFINITE) | (high == low)
        low, high = (np.where(none, found[PSEUDO][i], found[SYMMETRIC][i]) for i in range(2))
        found[CHOSEN] = low, high
    return found


def true_value(case: Case, seed: int) -> float:
    if case.truth is not None:
        return case.truth
    generator = np.random.default_rng(seed)
    many = [case.draw(generator, (2000, 400)) for _ in range(5)]
    return sum(values.sum() for values, _ in many) / sum(weights.sum() for _, weights in many)


def measure(case: Case, truth: float, rows: int, simulations: int, seed: int) -> dict[str, dict[str, float]]:
    """Return the coverage, the median width and more of each method."""
    generator = np.random.default_rng((seed, rows))
    covered: dict[str, list[np.ndarray]] = {name: [] for name in METHODS}
    widths: dict[str, list[np.ndarray]] = {name: [] for name in METHODS}
    false, infinite = [], []
    for _ in range(simulations // TOGETHER):
        values, weights = case.draw(generator, (TOGETHER, rows))
        found = all_intervals(generator, case, values, weights)
        infinite.append(found[SYMMETRIC][1] - found[SYMMETRIC][0] > INFINITE)
        for name, (low, high) in found.items():
            covered[name].append((low <= truth + 1e-9) & (truth - 1e-9 <= high))
            widths[name].append(high - low)
        if case.paired:
            signs = generator.choice((-1.0, 1.0), size=values.shape)
            low, high = all_intervals(generator, case, values * signs, weights)[CHOSEN]
            false.append((low > 0) | (high < 0))
    usual = float(np.median(widths[T])) or math.nan
    measured = {
        name: {
            "coverage": round(float(np.mean(covered[name])), 4),
            "width": round(float(np.median(widths[name])) / usual, 3),
        }
        for name in METHODS
        if covered[name]
    }
    measured[SYMMETRIC]["infinite"] = round(float(np.mean(infinite)), 4)
    if case.paired:
        measured[CHOSEN]["false"] = round(float(np.mean(false)), 4)
    return measured


HEAD = f"| case | rows | {' | '.join(METHODS)} | infinite | false |\n|---|--:|{'--:|' * (len(METHODS) + 2)}"


def table_row(case: str, rows: int, found: dict[str, dict[str, float]]) -> str:
    cells = [
        f"{100 * found[name]['coverage']:.1f} ({_ratio(found[name]['width'])})" if name in found else ""
        for name in METHODS
    ]
    shares = (found[SYMMETRIC]["infinite"], found[CHOSEN].get("false"))
    cells += ["" if share is None else f"{100 * share:.1f}" for share in shares]
    return f"| {case} | {rows} | {' | '.join(cells)} |"


def _ratio(width: float) -> str:
    return "-" if math.isnan(width) else "∞" if width > INFINITE else f"{width:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulations", type=int, default=2000, help="of each case (default: 2000)")
    parser.add_argument("--only", default="", help="part of the names of the cases to simulate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSONL file for the results")
    args = parser.parse_args()
    print(HEAD)
    lines = []
    for name, case in CASES.items():
        if args.only not in name:
            continue
        truth = true_value(case, args.seed)
        for rows in SIZES:
            methods = measure(case, truth, rows, args.simulations, args.seed)
            print(table_row(name, rows, methods), flush=True)
            record = {"case": name, "rows": rows, "methods": methods}
            lines.append(json.dumps(record).replace("NaN", "null") + "\n")
    if args.output:
        args.output.write_text("".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
