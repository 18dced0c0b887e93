"""The results of an evaluation as JSON: what was measured of base and tuned model, compared row by row."""

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from nalora_mlx import __version__
from nalora_mlx.evaluate.measurement import Measured, Sums, TestSet
from nalora_mlx.evaluate.questions import Question, known_choices
from nalora_mlx.evaluate.statistics import Comparison, Interval, compare, mean_interval, words
from nalora_mlx.runs.evaluation_rows import (
    CHOICE,
    GENERAL,
    GENERAL_LOSS,
    KL,
    LOSS,
    NATS,
    SCORE,
    SHARE,
    TASKS,
    TEST,
)
from nalora_mlx.runs.evaluations import FORMAT

if TYPE_CHECKING:
    from nalora_mlx.evaluate.tasks import TaskMetric


def document(
    model: str, data: str | None, split: str, rows: int, total: int, test: TestSet
) -> dict[str, Any]:
    """Return the beginning of a result: what was measured, and on what.

    Args:
        model: name of the base model.
        data: name of the test set; None without one.
        split: name.
        rows: number of test rows that are measured on.
        total: number of rows in the split.
        test: the test set.
    """
    return {
        "format": FORMAT,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "version": __version__,
        "model": model,
        "data": data,
        "split": split,
        "rows": rows,
        "of": total,
        "max_tokens": test.max_tokens,
        "passages": len({example.source for example in test.general}),
        "adapters": [],
    }


def measures(
    test: TestSet, base: Measured, tuned: Measured | None = None, dropped: Sequence[str] = (), seed: int = 0
) -> list[dict[str, Any]]:
    """Return the measures of a base model, compared with a tuned model if there is one.

    Args:
        test: what was measured on.
        base, tuned: what was found.
        dropped: names of metrics that failed on a row.
        seed: of the resampling.
    """
    found = []
    if base.losses is not None:
        other = None if tuned is None else tuned.losses
        found.append(_loss(LOSS, "loss", TEST, base.losses, other, seed))
    metrics = [metric for metric in test.metrics if metric.name in base.values and metric.name not in dropped]
    models = [base] if tuned is None else [base, tuned]
    for metric in metrics:
        values = [model.values[metric.name] for model in models]
        found.append(_score(metric.name, metric.title, TEST, values, metric.is_binary, seed))
    if base.choices is not None:
        values = [model.choices for model in models if model.choices is not None]
        found.append(_score(CHOICE, "most likely choice", TEST, values, True, seed))
    if base.general is not None:
        other = None if tuned is None else tuned.general
        found.append(_loss(GENERAL_LOSS, "loss", GENERAL, base.general, other, seed))
    if tuned is not None and tuned.divergences is not None:
        sums = tuned.divergences
        interval = mean_interval(sums.values, sums.tokens, seed=seed)
        found.append(_entry(KL, "KL(base || tuned)", GENERAL, NATS, [None, interval]))
    return found


def _loss(name: str, title: str, part: str, base: Sums, tuned: Sums | None, seed: int) -> dict[str, Any]:
    intervals = [mean_interval(sums.values, sums.tokens, seed=seed) for sums in (base, tuned) if sums]
    comparison = None
    if tuned is not None:
        comparison = compare(base.values, tuned.values, base.tokens, lower_is_better=True, seed=seed)
    return _entry(name, title, part, NATS, intervals, comparison)


def _score(
    name: str,
    title: str,
    part: str,
    values: Sequence[np.ndarray],
    binary: bool,
    seed: int,
    lower_is_better: bool = False,
) -> dict[str, Any]:
    inside = all(((of_model >= 0) & (of_model <= 1)).all() for of_model in values)
    bounds = (0.0, 1.0) if inside else None
    intervals = [mean_interval(of_model, None, bounds, seed) for of_model in values]
    comparison = None
    if len(values) > 1:
        comparison = compare(
            values[0],
            values[1],
            binary=binary,
            lower_is_better=lower_is_better,
            seed=seed,
            bounds=bounds,
        )
    return _entry(name, title, part, SHARE if binary else SCORE, intervals, comparison)


def task_measures(found: Sequence["TaskMetric"], model: int | None, seed: int) -> list[dict[str, Any]]:
    """Return the metrics of standard tasks of the base model, compared with a tuned model if there is one.

    Args:
        found: of all models, the base first.
        model: index of the tuned model; None for the base alone.
        seed: of the resampling.
    """
    entries, chosen = [], [0] if model is None else [0, model]
    for metric in found:
        title = f"{metric.task} {metric.metric}"
        if metric.documents is None:
            intervals = [Interval(metric.values[i], math.nan, math.nan) for i in chosen]
            entries.append(_entry(title, title, TASKS, SCORE, intervals))
            continue
        binary, lower = bool(np.isin(metric.documents, (0, 1)).all()), metric.higher_is_better is False
        values = [metric.documents[i] for i in chosen]
        entries.append(_score(title, title, TASKS, values, binary, seed, lower))
    return entries


def _entry(
    name: str,
    title: str,
    part: str,
    unit: str,
    intervals: Sequence[Interval | None],
    comparison: Comparison | None = None,
) -> dict[str, Any]:
    """Return a measure. `intervals` are those of the base model and of the tuned one, if there is one."""
    base, tuned = [*intervals, None][:2]
    entry: dict[str, Any] = {
        "name": name,
        "title": title,
        "part": part,
        "unit": unit,
        "base": _numbers(base),
        "tuned": _numbers(tuned),
    }
    if comparison is not None:
        entry |= {
            "difference": _numbers(comparison.difference),
            "better": comparison.better,
            "worse": comparison.worse,
            "rows": comparison.rows,
            "p": comparison.p,
            "lower_is_better": comparison.lower_is_better,
            "told": comparison.told,
            "words": _words(comparison, unit),
        }
    return entry


def _words(comparison: Comparison, unit: str) -> str:
    """Return a comparison in words; shares are in percentage points, as in tables."""
    if unit == SHARE:
        points = Interval(*(100 * number for number in comparison.difference))
        return words(replace(comparison, difference=points), "points")
    return words(comparison, unit if unit == NATS else "")


def _numbers(interval: Interval | None) -> list[float | None] | None:
    """Return value, low and high for JSON, which has no infinity."""
    if interval is None:
        return None
    return [float(number) if math.isfinite(number) else None for number in interval]


# --- rows ---------------------------------------------------------------------------------------------------


def answer_records(test: TestSet, base: Measured, tuned: Measured | None = None) -> list[dict[str, Any]]:
    """Return the answers to each question with their values, as JSON. Sources are without directories."""
    models = {"base": base} | ({} if tuned is None else {"tuned": tuned})
    records = []
    for i, question in enumerate(test.questions if base.answers else ()):
        record: dict[str, Any] = _asked(question)
        for name, model in models.items():
            answer = model.answers[i]
            record[name] = {
                "text": answer.text,
                "complete": answer.complete,
                "values": {metric: float(values[i]) for metric, values in model.values.items()},
            }
        records.append(record)
    return records


def _asked(question: Question) -> dict[str, Any]:
    return {
        "source": question.source.rsplit("/", 1)[-1],
        "prompt": question.text,
        "expected": question.expected,
    }


def changed(records: Sequence[dict[str, Any]], metric: str) -> dict[str, list[int]]:
    """Return the indices of the answers that became better and worse by a metric, the largest changes first."""
    changes = [
        (record["tuned"]["values"][metric] - record["base"]["values"][metric], i)
        for i, record in enumerate(records)
        if metric in record["base"]["values"]
    ]
    return {
        "better": [i for change, i in sorted(changes, key=lambda pair: (-pair[0], pair[1])) if change > 0],
        "worse": [i for change, i in sorted(changes) if change < 0],
    }


def choice_records(test: TestSet, base: Measured, tuned: Measured) -> list[dict[str, Any]]:
    """Return the choices of each question, and which is the most likely one for each model, as JSON."""
    records = []
    for i, question in enumerate(known_choices(test.questions)):
        assert base.chosen is not None
        assert tuned.chosen is not None
        chosen = {"base": int(base.chosen[i]), "tuned": int(tuned.chosen[i])}
        records.append(
            _asked(question) | {"choices": list(question.texts), "correct": question.correct} | chosen
        )
    return records


def changed_choices(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the questions whose most likely choice became right, and those for which it became wrong."""
    found: dict[str, list[dict[str, Any]]] = {"better": [], "worse": []}
    for record in records:
        before, after = (record[who] == record["correct"] for who in ("base", "tuned"))
        if before != after:
            found["better" if after else "worse"].append(record)
    return found


# --- forgetting ---------------------------------------------------------------------------------------------


def forgetting(entries: Sequence[dict[str, Any]], limit: float) -> str | None:
    """Return a warning if a tuned model lost more on general text than a limit, in nats per token; None if not."""
    entry = next((entry for entry in entries if entry["name"] == GENERAL_LOSS), None)
    if entry is None or entry.get("difference") is None:
        return None
    rise = entry["difference"][0]
    if rise <= limit:
        return None
    return (
        f"the tuned model lost {rise:.2f} nats per token on general text, more than {limit:g} (--max-forgetting): its "
        f"perplexity there is {math.exp(min(rise, 50)):.2f} times that of the base; train for fewer iterations, at a "
        "lower learning rate, or mix general rows into the data"
    )
