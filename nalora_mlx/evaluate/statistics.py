"""How sure a mean, and a difference of two models on the same rows, are: 95 % intervals and McNemar's test.

Rows are resampled, not tokens, because the tokens of a row depend on one another. A mean with token weights is a ratio,
sum(values) / sum(weights). There are two kinds of intervals:

- The symmetric studentized bootstrap (Hall, 1988, "On symmetric bootstrap confidence intervals"): value ± q * error,
  where q is the 95 % quantile of |value* - value| / error* over the resamples, and the errors are the standard errors
  of a ratio. With 20 rows it covers 95 to 97 % of differences of losses and ROUGE-L, where percentiles cover 90-93 %;
  of means, 92 to 95 %, but only 90 % of very skewed ones (lognormal with sigma 1). It is infinite if more than one in
  20 resamples has rows without spread, as with 3 rows, or if only 3 of many rows differ from 0. If few rows differ, but
  more, it covers too little without bounds: 84 % with 20 rows of which two differ on average.
- For values with known bounds, percentiles of resamples to which a pseudo-row at each bound is added first. For shares
  this is Laplace's rule; for differences of right and wrong, the two pseudo-rows of Bonett and Price (2012, "Adjusted
  Wald confidence interval for a difference of binomial proportions based on paired data"). Without them 20 right
  answers of 20 would seem to be certain.

scripts/coverage_of_intervals.py measures how often they cover the truth, and compares them with other methods.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nalora_mlx.core.errors import counted

LEVEL = 0.95
NORMAL = 1.959964  # the quantile of the normal distribution that belongs to LEVEL
RESAMPLES = 10_000
# With more rows the normal distribution serves as well: the quantile of the resamples has a standard error of 1 %.
MOST_RESAMPLED = 2_000
CHUNK = 1_000_000  # rows drawn at a time: 8 MB for each array
NO_SPREAD = 1e-12  # share of the sum of squares that rounding leaves
# With five rows that differ, all in the same direction, the sign test still has p = 2 * 0.5^5 = 0.06.
FEWEST_DIFFERENT = 6
MOST_ADVISED = 1_000_000  # rows


class Interval(NamedTuple):
    """An estimate and its 95 % interval; from -inf to inf if there are too few rows for one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        difference: of the means, tuned - base.
        better: number of rows on which the tuned model is better.
        worse: number of rows on which it is worse.
        p: of McNemar's test; None unless the values are right or wrong.
        rows: number of rows.
        lower_is_better: whether a negative difference is an improvement, as for a loss.
    """

    difference: Interval
    better: int
    worse: int
    p: float | None
    rows: int
    lower_is_better: bool

    @property
    def told(self) -> str:
        """Return "better" or "worse" if the tuned model is, or "" if no difference can be told.

        A difference is told if its interval excludes 0, at least FEWEST_DIFFERENT rows differ, and p < 0.05 if there
        is a p.
        """
        _, low, high = self.difference
        too_few = self.better + self.worse < FEWEST_DIFFERENT
        if low <= 0 <= high or too_few or (self.p is not None and self.p >= 1 - LEVEL):
            return ""
        return "better" if (low > 0) != self.lower_is_better else "worse"


def mean_interval(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
) -> Interval:
    """Return a mean over rows and its 95 % interval. The order of the rows does not matter.

    Args:
        values: of each row; with weights, the sum over the row's tokens. [N]
        weights: number of tokens of each row; None weighs every row the same. [N]
        bounds: lowest and highest mean that a row can have, as (0, 1) for a score; None if unknown. With bounds the
            interval is finite for every N; without, it is infinite for 3 rows or fewer.
        seed: of the resamples.

    Raises:
        ValueError: there are no rows, or a value or weight is not finite, a weight not positive, or a mean out of
            bounds; names the first such row.
    """
    sums, weights = _rows(values, weights, "values")
    if bounds is not None:
        _check_bounds(sums / weights, bounds, "values")
        return _bounded_interval(sums, weights, *bounds, seed)
    return _studentized_interval(sums, weights, seed)


def compare(
    base: ArrayLike,
    tuned: ArrayLike,
    weights: ArrayLike | None = None,
    binary: bool = False,
    lower_is_better: bool = False,
    seed: int = 0,
    *,
    bounds: tuple[float, float] | None = None,
) -> Comparison:
    """Compare a tuned model with its base model on the same rows. The order of the rows does not matter.

    If all differences are exactly the same, as with an adapter that changes nothing, the interval has no width; but not
    that of values with bounds.

    Args:
        base: the base model's value of each row; with weights, the sum over the row's tokens. [N]
        tuned: the tuned model's values. [N]
        weights: number of tokens of each row; None weighs every row the same. [N]
        binary: values are 1 if right and 0 if wrong.
        lower_is_better: as for a loss.
        seed: of the resamples.
        bounds: lowest and highest mean that a row can have, as (0, 1) for a score. They are used if too few rows differ
            for an interval without them.

    Raises:
        ValueError: as in `mean_interval`; or the numbers of rows differ, or a binary value is neither 0 nor 1 or has a
            weight.
    """
    (before, divisors), (after, _) = _rows(base, weights, "base"), _rows(tuned, weights, "tuned")
    if len(before) != len(after):
        raise ValueError(f"base has {counted(len(before), 'row')}, tuned {len(after):,}")
    if binary and weights is not None:
        raise ValueError("right and wrong answers have no weights")
    if binary:
        bounds = (0, 1)
    for name, values in (("base", before), ("tuned", after)):
        if bounds is not None:
            _check_bounds(values / divisors, bounds, name)
        known = np.isin(values, (0, 1))
        if binary and not known.all():
            row = int(np.argmin(known))
            raise ValueError(f"{name}[{row}] is {values[row]:g}: right is 1, and wrong is 0")
    differences = after - before
    higher, lower = int((differences > 0).sum()), int((differences < 0).sum())
    better, worse = (lower, higher) if lower_is_better else (higher, lower)
    difference = _difference_interval(differences, divisors, binary, bounds, seed)
    return Comparison(
        difference,
        better,
        worse,
        mcnemar(better, worse) if binary else None,
        len(differences),
        lower_is_better,
    )


def mcnemar(better: int, worse: int) -> float:
    """Return the p-value of McNemar's exact two-sided test, which asks whether two kinds of rows are equally frequent.

    Args:
        better: number of rows that only the tuned model answers right.
        worse: number of rows that only the base model answers right.
    """
    fewer, total = min(better, worse), better + worse
    # The binomial probabilities from the largest one on down, as shares of it.
    share = tail = 1.0
    for count in range(fewer, 0, -1):
        share *= count / (total - count + 1)
        tail += share
        if share < 1e-17 * tail:
            break
    ways = math.lgamma(total + 1) - math.lgamma(fewer + 1) - math.lgamma(total - fewer + 1)
    return min(1.0, 2 * tail * math.exp(ways - total * math.log(2)))


def words(comparison: Comparison, unit: str = "") -> str:
    """Say in one sentence whether the tuned model is better, by how much, and else how many rows might tell.

    "better by 0.12 (0.05 to 0.19)" counts improvements as positive. The interval of "no difference can be told with 40
    rows (-0.02 to 0.05)" is that of tuned - base. Twice the rows whose interval would end at 0 show a difference of the
    observed size in four of five cases.

    Args:
        comparison: from `compare`.
        unit: of the values, after the difference, as "nats per token"; may be empty.
    """
    value, low, high = comparison.difference
    unit = f" {unit}" if unit else ""
    if comparison.told:
        low, high = sorted((abs(low), abs(high)))
        digits = _digits(high - low, low)
        return f"{comparison.told} by {abs(value):.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"
    rows, different = counted(comparison.rows, "row"), comparison.better + comparison.worse
    text = f"no difference can be told with {rows}"
    if different < min(FEWEST_DIFFERENT, comparison.rows):
        text += f", of which {f'only {different}' if different else 'none'} differ{'s' * (different < 2)}"
    text += f", and it takes {FEWEST_DIFFERENT}" if 0 < different < FEWEST_DIFFERENT else ""
    if high - low > 0 and math.isfinite(high - low):
        digits = _digits(high - low)
        text += f" ({low:z.{digits}f} to {high:z.{digits}f}{unit})"
    if comparison.p is not None and not low <= 0 <= high and comparison.p >= 1 - LEVEL:
        text += f", p = {comparison.p:.2g} in McNemar's test"
    needed = _rows_needed(comparison)
    return f"{text}; about {needed:,} rows would show one of this size" if needed else text


def _rows(values: ArrayLike, weights: ArrayLike | None, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return values and weights as float64 arrays; check them."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} has shape {values.shape}, not one value for each row")
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"{name}[{row}] is {values[row]}: its row has no finite value")
    if weights is None:
        return values, np.ones(len(values))
    weights = np.asarray(weights, np.float64)
    if weights.shape != values.shape:
        raise ValueError(f"{name} has shape {values.shape}, weights {weights.shape}")
    good = np.isfinite(weights) & (weights > 0)
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(f"weights[{row}] is {weights[row]:g}, not a positive number")
    return values, weights


def _check_bounds(means: np.ndarray, bounds: tuple[float, float], name: str) -> None:
    good = (means >= bounds[0]) & (means <= bounds[1])
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(
            f"the mean of {name}[{row}] is {means[row]:g}, out of {bounds[0]:g} to {bounds[1]:g}"
        )


def _difference_interval(
    differences: np.ndarray,
    weights: np.ndarray,
    binary: bool,
    bounds: tuple[float, float] | None,
    seed: int,
) -> Interval:
    if not binary:
        found = _studentized_interval(differences, weights, seed)
        if bounds is None or 0 < found.high - found.low < math.inf:
            return found
    assert bounds is not None
    span = bounds[1] - bounds[0]
    return _bounded_interval(differences, weights, -span, span, seed)


def _studentized_interval(values: np.ndarray, weights: np.ndarray, seed: int) -> Interval:
    """Return the symmetric studentized bootstrap interval of sum(values) / sum(weights)."""
    values, weights = _in_order(values, weights)
    rows, total = len(values), float(weights.sum())
    value = float(values.sum()) / total
    if rows == 1:
        return Interval(value, -math.inf, math.inf)
    residuals = values - value * weights
    squares = float(residuals @ residuals)
    if squares <= NO_SPREAD**2 * float(values @ values):
        return Interval(value, value, value)
    quantile = NORMAL
    if rows <= MOST_RESAMPLED:
        columns = (residuals, weights, residuals**2, residuals * weights, weights**2)
        sums, totals, second, mixed, of_weights = _resample(np.stack(columns, axis=1), seed).T
        change = sums / totals  # value* - value
        spread = (
            second - 2 * change * mixed + change**2 * of_weights
        )  # sum of squares of the resample's residuals
        flat = spread <= NO_SPREAD * squares
        # The totals of change and its standard error cancel.
        ratios = np.abs(sums) / np.sqrt(np.where(flat, 1, spread) * rows / (rows - 1))
        ratios[flat] = math.inf
        place = math.ceil(LEVEL * (RESAMPLES + 1)) - 1
        quantile = float(np.partition(ratios, place)[place])
    half = quantile * math.sqrt(squares * rows / (rows - 1)) / total
    return Interval(value, value - half, value + half)


def _bounded_interval(
    values: np.ndarray, weights: np.ndarray, lowest: float, highest: float, seed: int
) -> Interval:
    """Return the percentile bootstrap interval of sum(values) / sum(weights) with a pseudo-row at each bound."""
    values, weights = _in_order(values, weights)
    value, weight = float(values.sum()) / float(weights.sum()), float(weights.mean())
    values = np.append(values, [lowest * weight, highest * weight])
    weights = np.append(weights, [weight, weight])
    if len(values) - 2 <= MOST_RESAMPLED:
        sums, totals = _resample(np.stack((values, weights), axis=1), seed).T
        low, high = np.quantile(sums / totals, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    else:
        total = weights.sum()
        center = values.sum() / total
        half = NORMAL * np.linalg.norm(values - center * weights) / total
        low, high = max(lowest, center - half), min(highest, center + half)
    return Interval(value, float(low), float(high))


def _in_order(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort rows, so that their order changes neither sums nor resamples."""
    order = np.lexsort((weights, values))
    return values[order], weights[order]


def _resample(columns: np.ndarray, seed: int) -> np.ndarray:
    """Return the sums over rows of each resample; [N, K] -> [RESAMPLES, K]."""
    rows = len(columns)
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK // rows)
    sums = []
    for start in range(0, RESAMPLES, chunk):
        resamples = min(chunk, RESAMPLES - start)
        drawn = generator.integers(rows, size=(resamples, rows))
        drawn += rows * np.arange(resamples)[:, None]
        times = np.bincount(drawn.ravel(), minlength=resamples * rows)  # how often each row is drawn
        sums.append(times.reshape(resamples, rows).astype(np.float64) @ columns)
    return np.concatenate(sums)


def _rows_needed(comparison: Comparison) -> int | None:
    """Return a round number of rows that would show the observed difference; None if unknown or too many."""
    value, low, high = comparison.difference
    rows, different = comparison.rows, comparison.better + comparison.worse
    width = (high - low) / 2
    if rows < FEWEST_DIFFERENT or not value or not width or not math.isfinite(width):
        return None
    # Twice, for a power of 80 %: ((1.96 + 0.84) / 1.96)^2 = 2.04. At least twice the rows that did not suffice.
    needed = rows * max(2 * max(1, width / abs(value)) ** 2, FEWEST_DIFFERENT / different)
    if needed >= MOST_ADVISED:
        return None
    digit = 10 ** math.floor(math.log10(needed))
    unit = max(1, digit // 10 if needed < 2 * digit else digit)
    return math.ceil(needed / unit) * unit


def _digits(width: float, smallest: float = math.inf) -> int:
    """Return the digits after the point that show two digits of a width, and that `smallest` is not 0."""
    digits = max(0, 1 - math.floor(math.log10(width))) if width > 0 else 3
    return max(digits, -math.floor(math.log10(smallest))) if 0 < smallest < math.inf else digits
