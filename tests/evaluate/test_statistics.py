"""Intervals, McNemar's test, and what is said about them, against enumeration, SciPy, simulation and hand."""

import math
from itertools import product

import numpy as np
import pytest
import scipy.stats

from nalora_mlx.evaluate import statistics
from nalora_mlx.evaluate.statistics import Comparison, Interval, compare, mcnemar, mean_interval, words

# Where 10,000 resamples find a quantile, as levels of the exact distribution: 4 standard errors around it.
SYMMETRIC_LEVELS = (0.94, 0.96)
LOW_LEVELS, HIGH_LEVELS = (0.018, 0.032), (0.968, 0.982)


def quantile(values, level):
    return sorted(values)[math.ceil(level * len(values)) - 1]


def ratio(values, weights):
    return sum(values) / sum(weights)


def standard_error(values, weights):
    mean, n = ratio(values, weights), len(values)
    return math.sqrt(
        n / (n - 1) * sum((v - mean * w) ** 2 for v, w in zip(values, weights, strict=True))
    ) / sum(weights)


def every_resample(values, weights):
    for rows in product(range(len(values)), repeat=len(values)):
        yield [values[i] for i in rows], [weights[i] for i in rows]


def all_ratios(values, weights):
    """Return |value* - value| / error* of every possible resample."""
    mean, ratios = ratio(values, weights), []
    for drawn in every_resample(values, weights):
        error = standard_error(*drawn)
        ratios.append(abs(ratio(*drawn) - mean) / error if error > 1e-9 else math.inf)
    return ratios


@pytest.mark.parametrize("weights", [None, [12, 3, 40, 7, 25, 9]])
def test_symmetric_interval_is_that_of_every_possible_resample(weights):
    values = [2.1, 0.4, 9.5, 1.3, 3.0, 5.2]
    divisors = weights or [1] * 6
    ratios, error = all_ratios(values, divisors), standard_error(values, divisors)
    value, low, high = mean_interval(values, weights)
    assert value == pytest.approx(ratio(values, divisors))
    assert high - value == pytest.approx(value - low)
    least, most = (quantile(ratios, level) for level in SYMMETRIC_LEVELS)
    assert least * error - 1e-9 <= high - value <= most * error + 1e-9
    base = [7.0, 1.0, 3.0, 2.0, 8.0, 4.0]
    paired = compare(base, [b + v for b, v in zip(base, values, strict=True)], weights).difference
    assert paired == pytest.approx((value, low, high))


@pytest.mark.parametrize("weights", [None, [4, 1, 2, 3]])
def test_bounded_interval_has_two_pseudo_rows(weights):
    divisors = weights or [1] * 4
    shares = [1.0, 0.5, 1.0, 0.25]
    values = [share * w for share, w in zip(shares, divisors, strict=True)]
    mean_weight = sum(divisors) / 4
    rows = [*values, 0, mean_weight], [*divisors, mean_weight, mean_weight]
    means = [ratio(*drawn) for drawn in every_resample(*rows)]
    value, low, high = mean_interval(values, weights, bounds=(0, 1))
    assert value == pytest.approx(ratio(values, divisors))
    assert quantile(means, LOW_LEVELS[0]) - 1e-9 <= low <= quantile(means, LOW_LEVELS[1]) + 1e-9
    assert quantile(means, HIGH_LEVELS[0]) - 1e-9 <= high <= quantile(means, HIGH_LEVELS[1]) + 1e-9


def test_right_and_wrong_differences_have_two_pseudo_rows():
    base, tuned = [0, 0, 1, 1], [1, 1, 1, 0]
    means = [ratio(*drawn) for drawn in every_resample([1, 1, 0, -1, 1, -1], [1] * 6)]
    value, low, high = compare(base, tuned, binary=True).difference
    assert value == 0.25
    assert quantile(means, LOW_LEVELS[0]) - 1e-9 <= low <= quantile(means, LOW_LEVELS[1]) + 1e-9
    assert quantile(means, HIGH_LEVELS[0]) - 1e-9 <= high <= quantile(means, HIGH_LEVELS[1]) + 1e-9


def test_percentiles_agree_with_scipy():
    values = np.random.default_rng(3).beta(2, 1, 60)
    expected = scipy.stats.bootstrap(
        (np.append(values, [0, 1]),), np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    found = mean_interval(values, bounds=(0, 1))
    assert found[1:] == pytest.approx(expected, abs=0.04 * (expected.high - expected.low))


def test_many_rows_take_the_normal_distribution():
    base = np.repeat([0, 0, 1, 1], [2000, 700, 500, 1800])
    tuned = np.repeat([0, 1, 0, 1], [2000, 700, 500, 1800])
    # Bonett and Price (2012)
    n, better, worse = 5002, 701 / 5002, 501 / 5002
    center = better - worse
    half = scipy.stats.norm.ppf(0.975) * math.sqrt((better + worse - center**2) / n)
    found = compare(base, tuned, binary=True)
    assert found.difference == pytest.approx((0.04, center - half, center + half))
    values = np.random.default_rng(0).lognormal(0, 1, 4000)
    expected = 1.959964 * values.std(ddof=1) / math.sqrt(4000)
    assert mean_interval(values).high - values.mean() == pytest.approx(expected)


def test_more_rows_do_not_jump(monkeypatch):
    generator = np.random.default_rng(5)
    tokens = np.ceil(generator.lognormal(4, 0.8, 2000))
    losses = generator.lognormal(0, 0.5, 2000) * tokens
    resampled = [mean_interval(losses, tokens), mean_interval(np.clip(losses, 0, tokens), tokens, (0, 1))]
    monkeypatch.setattr(statistics, "MOST_RESAMPLED", 1999)
    normal = [mean_interval(losses, tokens), mean_interval(np.clip(losses, 0, tokens), tokens, (0, 1))]
    for one, other in zip(resampled, normal, strict=True):
        assert one == pytest.approx(other, abs=0.04 * (other.high - other.low))
        assert one != other


def loss_differences(generator, n):
    return generator.lognormal(0, 0.8, n) * np.expm1(generator.normal(-0.1, 0.4, n))


def token_loss_differences(generator, n):
    tokens = np.ceil(generator.lognormal(4, 0.8, n))
    base = generator.lognormal(0, 0.5, n) * tokens
    return compare(base, base * np.exp(generator.normal(-0.1, 0.25, n)), tokens).difference


def right_and_wrong(generator, n):
    row = math.sqrt(0.6) * generator.normal(size=n)
    return [
        row + math.sqrt(0.4) * generator.normal(size=n) < limit for limit in scipy.stats.norm.ppf([0.8, 0.85])
    ]


def covers(interval, truth):
    return interval.low <= truth <= interval.high


COVERAGE = {
    "loss": (
        lambda g: compare(np.zeros(20), loss_differences(g, 20)).difference,
        math.exp(0.32) * math.expm1(-0.02),
    ),
    "loss per token": (
        lambda g: token_loss_differences(g, 25),
        math.exp(0.125) * math.expm1(-0.1 + 0.25**2 / 2),
    ),
    "right and wrong": (lambda g: compare(*right_and_wrong(g, 20), binary=True).difference, 0.05),
    "seldom wrong": (lambda g: mean_interval(g.random(30) < 0.97, bounds=(0, 1)), 0.97),
}


@pytest.mark.parametrize(("draw", "truth"), COVERAGE.values(), ids=COVERAGE)
def test_intervals_cover_the_truth(draw, truth, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 600)
    generator = np.random.default_rng(1)
    count = 1000
    covered = sum(covers(draw(generator), truth) for _ in range(count)) / count
    # Percentiles of the rows alone would cover 88, 90, 89 and 59 %.
    assert covered > 0.95 - 3 * math.sqrt(0.95 * 0.05 / count)


def test_no_effect_is_seldom_told(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 600)
    generator = np.random.default_rng(2)
    told = 0
    for _ in range(500):
        changed = generator.random(40) < 0.3
        told += bool(compare(np.zeros(40), changed * generator.uniform(-1, 1, 40), bounds=(-1, 1)).told)
        told += bool(compare(generator.random(40) < 0.5, generator.random(40) < 0.5, binary=True).told)
    assert told / 1000 < 0.05 + 3 * math.sqrt(0.95 * 0.05 / 1000)


def test_an_effect_is_told():
    generator = np.random.default_rng(2)
    base, change = generator.lognormal(0, 1, 60), generator.normal(0.2, 0.3, 60)
    up, down = compare(base, base + change), compare(base + change, base)
    assert (up.told, down.told) == ("better", "worse")
    assert (up.better, up.worse) == (down.worse, down.better) == ((change > 0).sum(), (change < 0).sum())
    loss = compare(base + change, base, lower_is_better=True)
    assert loss.told == "better"
    assert loss.difference.high < 0
    assert (loss.better, loss.worse) == (up.better, up.worse)
    assert loss.p is None
    pairs = [0] * 40, [1] * 30 + [0] * 10
    assert compare(*pairs, binary=True).told == "better"
    assert compare(*pairs, binary=True).p == pytest.approx(2 * 0.5**30)


def test_three_conditions_of_a_difference():
    excludes, includes = Interval(0.2, 0.01, 0.4), Interval(0.2, -0.01, 0.4)
    assert Comparison(excludes, 8, 1, 0.039, 40, False).told == "better"
    assert Comparison(excludes, 8, 1, 0.039, 40, True).told == "worse"
    assert Comparison(Interval(-0.2, -0.4, -0.01), 8, 1, 0.039, 40, False).told == "worse"
    assert Comparison(includes, 8, 1, 0.039, 40, False).told == ""
    assert Comparison(excludes, 7, 1, 0.07, 40, False).told == ""
    assert Comparison(excludes, 6, 0, None, 40, False).told == "better"
    assert Comparison(excludes, 5, 0, None, 40, False).told == ""
    assert Comparison(Interval(0.2, 0.0, 0.4), 8, 1, 0.01, 40, False).told == ""


def test_nothing_changes():
    losses = np.random.default_rng(0).lognormal(0, 1, 30)
    same = compare(losses, losses, np.arange(1, 31))
    assert same.difference == (0, 0, 0)
    assert (same.better, same.worse, same.told) == (0, 0, "")
    answers = losses > 1
    for found in (compare(answers, answers, binary=True), compare(answers, answers, bounds=(0, 1))):
        assert found.difference.value == 0
        # One of the two pseudo-rows, more or less, about twice: 2 / 32 or 3 / 32.
        assert -0.1 < found.difference.low < -0.06 < 0.06 < found.difference.high < 0.1
        assert found.told == ""
    assert compare(answers, answers, binary=True).p == 1
    assert mean_interval([0.1] * 7) == pytest.approx((0.1, 0.1, 0.1))


def test_too_few_rows_have_no_interval():
    endless = (-math.inf, math.inf)
    assert mean_interval([3.0]) == (3, *endless)
    assert mean_interval([1.0, 2.0, 4.0])[1:] == endless
    assert math.isfinite(mean_interval([1.0, 2.0, 4.0, 5.0]).high)
    assert compare([1.0], [2.0]).told == ""
    few = compare(np.zeros(40), np.repeat([0.5, 0.8, 0], [1, 1, 38]))
    assert few.difference == (pytest.approx(0.0325), *endless)
    assert few.told == ""
    assert mean_interval([1], bounds=(0, 1)) == (1, 0, 1)
    assert compare([0], [1], binary=True).difference == (1, -1, 1)


def test_scores_use_their_bounds_if_there_is_no_other_interval():
    base, tuned = np.zeros(20), np.repeat([1, 0.9, 0], [18, 1, 1])
    assert compare(base, tuned).difference.high == math.inf
    value, low, high = compare(base, tuned, bounds=(0, 1)).difference
    assert value == pytest.approx(0.945)
    assert 0.5 < low < 0.75 < 0.95 < high <= 1
    assert (
        compare(base, base + 1, bounds=(0, 1)).difference == compare(base, base + 1, binary=True).difference
    )
    dense = np.random.default_rng(0).random((2, 20))
    assert compare(*dense, bounds=(0, 1)) == compare(*dense)


def test_all_right_is_not_certain():
    value, low, high = mean_interval([1] * 20, bounds=(0, 1))
    assert (value, high) == (1, 1)
    assert 0.8 < low < 0.9  # 0.83 of Clopper and Pearson
    many = mean_interval([1] * 3000, bounds=(0, 1))
    assert 0.998 < many.low < many.high == 1


def test_resamples_depend_on_the_seed_but_not_on_the_order_of_rows():
    generator = np.random.default_rng(0)
    base, tuned, tokens = generator.lognormal(0, 1, (3, 50))
    order = generator.permutation(50)
    found = compare(base, tuned, tokens)
    assert compare(base, tuned, tokens) == found
    assert compare(base[order], tuned[order], tokens[order]) == found
    assert compare(base, tuned, tokens, seed=1) != found
    scores = generator.random(50)
    assert mean_interval(scores[order], bounds=(0, 1)) == mean_interval(scores, bounds=(0, 1))
    assert mean_interval(scores, bounds=(0, 1), seed=1) != mean_interval(scores, bounds=(0, 1))


def test_resamples_do_not_depend_on_chunks(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = mean_interval(values)
    monkeypatch.setattr(statistics, "CHUNK", 7777)
    parts = mean_interval(values)
    assert parts == pytest.approx(whole, rel=0.05)
    assert parts.value == whole.value


@pytest.mark.parametrize("total", [1, 2, 3, 7, 20, 41, 100, 1001])
def test_mcnemar_is_the_binomial_test(total):
    for better in {*range(min(total, 50) + 1), total // 3, total // 2, total - 1, total}:
        expected = scipy.stats.binomtest(better, total).pvalue
        assert mcnemar(better, total - better) == pytest.approx(expected, rel=1e-11)
        assert mcnemar(total - better, better) == mcnemar(better, total - better)


@pytest.mark.parametrize(
    ("better", "worse"), [(499_000, 501_000), (1_000_000, 999_000), (300_000, 310_000), (100, 1_000_000)]
)
def test_mcnemar_of_large_counts(better, worse):
    expected = scipy.stats.binomtest(better, better + worse).pvalue
    assert mcnemar(better, worse) == pytest.approx(expected, rel=1e-6)


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(1, 0) == 1
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(1, 6) == pytest.approx(2 * 8 / 128)
    assert mcnemar(0, 1_000_000) == 0


NAN, INF = math.nan, math.inf
ERRORS = {
    "base[1] is nan: its row has no finite value": lambda: compare([1, NAN], [1, 2]),
    "tuned[0] is inf: its row has no finite value": lambda: compare([1, 2], [INF, NAN]),
    "values[2] is nan: its row has no finite value": lambda: mean_interval([1, 2, NAN]),
    "weights[1] is 0, not a positive number": lambda: mean_interval([1, 2], [1, 0]),
    "weights[0] is nan, not a positive number": lambda: compare([1, 2], [1, 2], [NAN, 1]),
    "values has shape (2,), weights (1,)": lambda: mean_interval([1, 2], [1]),
    "values has shape (0,), not one value for each row": lambda: mean_interval([]),
    "base has 2 rows, tuned 3": lambda: compare([1, 2], [1, 2, 3]),
    "the mean of values[1] is 1.5, out of 0 to 1": lambda: mean_interval([1, 3], [2, 2], bounds=(0, 1)),
    "the mean of tuned[0] is -1, out of 0 to 1": lambda: compare([1], [-1], bounds=(0, 1)),
    "tuned[1] is 0.5: right is 1, and wrong is 0": lambda: compare([1, 0], [1, 0.5], binary=True),
    "right and wrong answers have no weights": lambda: compare([1, 0], [1, 0], [2, 2], binary=True),
}


@pytest.mark.parametrize(("message", "call"), ERRORS.items())
def test_bad_values_are_named(message, call):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message


WORDS = [
    (Comparison(Interval(0.12, 0.05, 0.19), 20, 5, None, 40, False), "", "better by 0.12 (0.05 to 0.19)"),
    (
        Comparison(Interval(-0.1234, -0.186, -0.0512), 30, 9, None, 40, True),
        "nats per token",
        "better by 0.12 nats per token (0.05 to 0.19)",
    ),
    (
        Comparison(Interval(-12.3, -19, -5.1), 3, 30, None, 40, False),
        "points",
        "worse by 12 points (5 to 19)",
    ),
    (Comparison(Interval(0.6, 0.004, 1.2), 30, 3, None, 40, False), "", "better by 0.600 (0.004 to 1.200)"),
    (
        Comparison(Interval(0.015, -0.02, 0.05), 20, 20, None, 40, False),
        "",
        "no difference can be told with 40 rows (-0.020 to 0.050); about 500 rows would show one of this size",
    ),
    (
        Comparison(Interval(0.03, 0.002, 0.058), 30, 16, 0.054, 1000, False),
        "points",
        "no difference can be told with 1,000 rows (0.002 to 0.058 points), p = 0.054 in McNemar's test; "
        "about 2,000 rows would show one of this size",
    ),
    (
        Comparison(Interval(0.075, -0.03, 0.18), 3, 0, 0.25, 40, False),
        "",
        "no difference can be told with 40 rows, of which only 3 differ, and it takes 6 (-0.03 to 0.18); "
        "about 160 rows would show one of this size",
    ),
    (
        Comparison(Interval(0.01, -INF, INF), 1, 0, None, 40, False),
        "",
        "no difference can be told with 40 rows, of which only 1 differs, and it takes 6",
    ),
    (
        Comparison(Interval(0, 0, 0), 0, 0, None, 40, True),
        "",
        "no difference can be told with 40 rows, of which none differs",
    ),
    (
        Comparison(Interval(0.2, -0.004, 0.42), 10, 3, 0.09, 40, False),
        "",
        "no difference can be told with 40 rows (0.00 to 0.42); about 90 rows would show one of this size",
    ),
    (
        Comparison(Interval(0.2, -0.02, 0.42), 1, 0, None, 40, False),
        "",
        "no difference can be told with 40 rows, of which only 1 differs, and it takes 6 (-0.02 to 0.42); "
        "about 300 rows would show one of this size",
    ),
    (
        Comparison(Interval(2, -INF, INF), 1, 0, None, 1, True),
        "",
        "no difference can be told with 1 row, and it takes 6",
    ),
    (
        Comparison(Interval(1e-4, -1, 1), 20, 20, None, 40, True),
        "",
        "no difference can be told with 40 rows (-1.0 to 1.0)",
    ),
]


@pytest.mark.parametrize(("comparison", "unit", "expected"), WORDS)
def test_words(comparison, unit, expected):
    assert words(comparison, unit) == expected


def test_advised_rows_show_the_difference(monkeypatch):
    """As many rows as advised tell the difference in about four of five cases."""
    monkeypatch.setattr(statistics, "RESAMPLES", 600)
    generator = np.random.default_rng(0)
    # With 40 rows, the interval of 0.2 +- 1 is 0.2 +- 0.31; 40 * 2 * (0.31 / 0.2)^2 = 192.
    half = 1.96 / math.sqrt(40)
    text = words(Comparison(Interval(0.2, 0.2 - half, 0.2 + half), 22, 18, None, 40, False))
    assert text.endswith("about 200 rows would show one of this size")
    told = sum(bool(compare(np.zeros(200), generator.normal(0.2, 1, 200)).told) for _ in range(300))
    assert 0.7 < told / 300 < 0.9
