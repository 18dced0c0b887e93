"""A run's data from its settings to tokenized splits: all of it read and checked before anything is trained.

What makes a row unusable is a problem, and the run is refused; what is merely odd is a notice. Both are sentences
with the rows as file:line and what to do.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError, listed, places
from nalora_mlx.core.parsing import nearest
from nalora_mlx.data.formats import Features, row_problem
from nalora_mlx.data.sources import Row, load_hub, load_hub_entry, read_lines
from nalora_mlx.data.tokenization import Split, tokenize_rows

ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython", "environment")


@dataclass
class Rows:
    """What was read: the rows of each source by split, with the keys that they go by, and what was found."""

    sources: list[tuple[Features, dict[str, list[Row]]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def read_rows(
    config: RunConfig, names: Sequence[str], all_needed: bool = True, compare_with_test: bool = False
) -> Rows:
    """Read the splits that a run has, and check all that can be checked without a tokenizer.

    Args:
        config: where the data is, and the keys that its rows go by.
        names: of the splits.
        all_needed: whether the run needs all of them but the validation set; False: the training set alone.
        compare_with_test: look for rows that are in a test.jsonl too, even if that is not one of the splits.

    Raises:
        InputError: there is no such directory or dataset, or nothing in a split that is needed.
    """
    found = Rows()
    if config.hf_dataset:
        entries = config.hf_dataset if isinstance(config.hf_dataset, list) else [config.hf_dataset]
        for entry in entries:
            rows = load_hub_entry(entry, names)
            found.sources.append((_features(config, entry), rows))
    else:
        found.sources.append((_features(config, {}), _read(config.data, names, found.problems)))
    for name in names:
        rows_of_it = [row for _, rows in found.sources for row in rows[name]]
        needed = name == "train" or (all_needed and name == "test")
        if needed and not rows_of_it and not found.problems:
            raise InputError(
                f"--data {config.data}: no rows for {name}; add a {name}.jsonl that is not empty"
            )
    for features, rows in found.sources:
        for name, part in rows.items():
            problems, notices = check_rows(part, features, name)
            found.problems += problems
            found.notices += notices
    others: dict[str, list[Row]] = {}
    if compare_with_test and "test" not in names and not config.hf_dataset:
        test = Path(config.data).expanduser() / "test.jsonl"
        others = {"test": read_lines(test)[0] if test.is_file() else []}
    found.notices += repeated([rows | others for _, rows in found.sources])
    return found


def _features(config: RunConfig, entry: Mapping[str, Any]) -> Features:
    keys = {
        part: entry.get(f"{part}_feature", getattr(config, f"{part}_feature"))
        for part in ("prompt", "completion", "chat", "text")
    }
    return Features(**keys, mask_prompt=config.mask_prompt)


def _read(data: str, names: Sequence[str], problems: list[str]) -> dict[str, list[Row]]:
    directory = Path(data).expanduser()
    if directory.is_dir():
        splits: dict[str, list[Row]] = {}
        for name in names:
            path = directory / f"{name}.jsonl"
            splits[name], wrong = read_lines(path) if path.exists() else ([], [])
            problems += wrong
        return splits
    if directory.exists() or data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise InputError(f"--data {data}: no such directory; give one with train.jsonl (and valid, test)")
    return load_hub(data, names)


def check_rows(rows: Sequence[Row], features: Features, name: str) -> tuple[list[str], list[str]]:
    """The problems and notices of one split's rows: keys, types, roles, empty answers."""
    problems, empty, strange = [], [], []
    for source, row in rows:
        if problem := row_problem(row, features):
            problems.append(f"{source}: {problem}")
            continue
        if not all(answer.strip() for answer in _answers(row, features)):
            empty.append(source)
        strange += [(source, role) for role in _roles(row, features) if role not in ROLES]
    notices = []
    if empty:
        notices.append(
            f"{name}: {len(empty)} of {len(rows)} rows have an empty answer ({places(empty)}); "
            "the model learns to answer nothing from them; fill them or take them out"
        )
    if strange:
        role = strange[0][1]
        sources = list(dict.fromkeys(source for source, _ in strange))
        notices.append(
            f"{name}: {len(sources)} of {len(rows)} rows have roles like {role!r} ({places(sources)})"
            f"{nearest(role, ROLES)}"
        )
    return problems, notices


def _answers(row: Mapping[str, Any], features: Features) -> Iterator[str]:
    """The texts of a row that the model is to write."""
    if features.prompt in row and features.completion in row:
        yield row[features.completion]
    elif features.chat in row:
        for message in row[features.chat]:
            content = message.get("content")
            if message["role"] == "assistant" and not message.get("tool_calls") and isinstance(content, str):
                yield content


def _roles(row: Mapping[str, Any], features: Features) -> Iterator[str]:
    if not (features.prompt in row and features.completion in row) and features.chat in row:
        yield from (message["role"] for message in row[features.chat])


def repeated(sources: Sequence[Mapping[str, Sequence[Row]]]) -> list[str]:
    """Notices of rows that are in several splits, where a loss would look better than it is."""
    seen: dict[bytes, tuple[str, str]] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    for splits in sources:
        for name, rows in splits.items():
            for source, row in rows:
                content = hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).digest()
                first, where = seen.setdefault(content, (name, source))
                if first != name:
                    twice.setdefault((first, name), []).append(f"{source} is {where}")
    return [
        f"{name}: {len(pairs)} rows are in {first} too ({listed(pairs, ', ')}); "
        f"the loss on them says little; take them out of one"
        for (first, name), pairs in twice.items()
    ]


def tokenize(rows: Rows, tokenizer: Any, max_seq_length: int) -> dict[str, Split]:
    """Tokenize all splits; what is wrong with rows is in each split's errors, what is odd in its notices."""
    splits: dict[str, Split] = {}
    for features, parts in rows.sources:
        for name, part in parts.items():
            split = splits.setdefault(name, Split([]))
            good = [(source, row) for source, row in part if row_problem(row, features) is None]
            done = tokenize_rows(good, tokenizer, features, max_seq_length, name)
            split.examples.extend(done.examples)
            split.notices.extend(done.notices)
            split.errors.extend(done.errors)
    return splits
