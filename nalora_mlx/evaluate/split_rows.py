"""The rows of a test set, and the metrics that their answers get, before a model is loaded."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.data_entries import ROWS_IN_MEMORY, data_entries
from nalora_mlx.core.errors import InputError, counted, listed, places
from nalora_mlx.data.checks import RunData, read_rows
from nalora_mlx.evaluate.metrics import (
    BUILT_IN,
    Metric,
    choose_metrics,
    default_metrics,
    regex_metric,
    schema_metric,
)
from nalora_mlx.evaluate.questions import expected_answers
from nalora_mlx.evaluate.settings import NONE, EvaluationSettings
from nalora_mlx.evaluate.user_metrics import check, load_user_metric


def read_test_rows(
    config: RunConfig, given: str | None, notify: Callable[[str], None]
) -> tuple[RunData, str]:
    """Return the rows of a split, and its name.

    A file that the user names is the split itself. Of the data of a run, the rows are those that the run would take:
    without a test set they are its validation rows, which it may have held out of its training rows.

    Args:
        config: names the data.
        given: name of the split; None for the test set.
        notify: called with notices.

    Raises:
        InputError: there are none, or some cannot be used.
    """
    entries = [] if config.hf_dataset else data_entries(config.data)
    if any(entry["path"] == ROWS_IN_MEMORY for entry in entries):
        raise InputError("--data is missing; the run was trained on rows given in Python")
    own, split = "data" not in config.given, given or "test"
    data = _read(config, split, own)
    if own and given is None and not data.problems and not _has_rows(data, split):
        split = "valid"
        data = _read(config, split, own)
        notify("the run has no test set: evaluating on its validation rows")
    if data.problems:
        text = listed(data.problems)
        if "--mask-prompt" in text and "mask_prompt" not in config.given:
            text += " (the adapter's run has --mask-prompt; give --no-mask-prompt)"
        raise InputError(text)
    for notice in data.notices:
        notify(notice)
    if not _has_rows(data, split):
        paths = " ".join(entry["path"] for entry in entries) or "hf_dataset"
        if (
            not own
            and entries
            and all(os.path.isfile(os.path.expanduser(entry["path"])) for entry in entries)
        ):
            raise InputError(f"--data {paths}: has no rows for {split}; give a file with rows")
        raise InputError(
            f"--data {paths}: no rows for {split}; add rows to {split}.jsonl, choose another split with --split, or "
            "give the file of the rows itself"
        )
    return data, split


def _read(config: RunConfig, split: str, own: bool) -> RunData:
    """Return the rows of a split alone. `own` says whether the data is that of the adapter's run."""
    if not own:
        data = read_rows(replace(config, valid_fraction=0.0), [split], all_needed=False, unsplit=split)
    elif split == "test":
        data = read_rows(config, [split], all_needed=False)
    else:
        data = read_rows(config, ["train", "valid"])
    data.sources = [{split: splits[split]} for splits in data.sources]
    return data


def _has_rows(data: RunData, split: str) -> bool:
    return any(splits[split] for splits in data.sources)


def named_metrics(settings: EvaluationSettings) -> list[Metric]:
    """Return the metrics that flags name, before anything slow begins."""
    named = [name for name in settings.metric or () if name != NONE]
    unknown = [name for name in named if name not in BUILT_IN and ":" not in name]
    choose_metrics(unknown)  # raises for the first
    found = [
        BUILT_IN[name] if name in BUILT_IN else replace(load_user_metric(name), name=name.rpartition("/")[2])
        for name in dict.fromkeys(named)
    ]  # results are shared, and hold no directories
    if settings.regex is not None:
        found.append(regex_metric(settings.regex))
    if settings.json_schema is not None:
        found.append(schema_metric(Path(settings.json_schema).expanduser()))
    names = [metric.name for metric in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--metric: two metrics are called {twice[0]}; rename one of them")
    return found


def with_defaults(
    metrics: list[Metric],
    data: RunData,
    settings: EvaluationSettings,
    split: str,
    notify: Callable[[str], None],
) -> list[Metric]:
    """Add the metrics that suit the rows, if none is named; try those of the user on the expected answers."""
    rows = expected_answers(data, split)
    if not settings.metric:
        expected = [row["expected"] for row in rows if row["expected"] is not None]
        if len(expected) == len(rows):
            metrics = choose_metrics(default_metrics(expected)) + metrics
        elif expected:
            open_rows = [row["source"] for row in rows if row["expected"] is None]
            notify(
                f"{counted(len(open_rows), 'row')} of {split} have no answer ({places(open_rows, 3)}), so no "
                "answers are compared; remove them, or name metrics that need none"
            )
    for metric in metrics:
        if metric.needs_expected:
            check(metric, rows)
    return metrics
