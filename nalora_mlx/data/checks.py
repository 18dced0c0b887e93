"""The data of a run, read and checked in full before training starts.

Unusable rows are problems, and a run with problems does not start. Rows that are merely odd are notices. Both are
sentences that name the rows as file:line and say what to do.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.parsing import nearest
from nalora_mlx.data.findings import Finding, Findings
from nalora_mlx.data.formats import Features, Row, parse_rows
from nalora_mlx.data.sources import RawRow, load_hub, load_hub_entry, read_directory, read_lines
from nalora_mlx.data.tokenization import Split, tokenize_rows

ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython", "environment")


@dataclass
class RunData:
    """The valid rows of a run, and what was found about the others.

    Attributes:
        mask_prompt: whether prompts are masked.
        sources: for each dataset, the rows of each split.
        problems: what makes rows unusable.
        notices: what is odd about rows.
    """

    mask_prompt: bool
    sources: list[dict[str, list[Row]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def read_rows(
    config: RunConfig, names: Sequence[str], all_needed: bool = True, compare_with_test: bool = False
) -> RunData:
    """Read the splits of a run, and check what can be checked without a tokenizer.

    Args:
        config: where the data is, and the keys of its rows.
        names: of the splits.
        all_needed: require a test set if it is among the names; the training set is always required.
        compare_with_test: look for training and validation rows in test.jsonl too, even if `names` lacks it.

    Raises:
        InputError: there is no such directory or dataset, or a required split is empty.
    """
    found = RunData(config.mask_prompt)
    datasets: list[tuple[Features, dict[str, list[RawRow]]]] = []
    if config.hf_dataset:
        entries = config.hf_dataset if isinstance(config.hf_dataset, list) else [config.hf_dataset]
        for entry in entries:
            splits = load_hub_entry(entry, names)
            datasets.append((Features.from_config(config, entry), splits))
    else:
        splits, found.problems = _load(config.data, names)
        datasets.append((Features.from_config(config), splits))
    for name in names:
        needed = name == "train" or (all_needed and name == "test")
        if needed and not found.problems and not any(splits[name] for _, splits in datasets):
            raise InputError(f"--data {config.data}: no rows for {name}; add rows to {name}.jsonl")
    for features, splits in datasets:
        parsed: dict[str, list[Row]] = {}
        for name, contents in splits.items():
            parsed[name], problems = parse_rows(contents, features)
            found.problems += problems
            found.notices += _odd_rows(parsed[name], name, len(contents))
        found.sources.append(parsed)
    test: dict[str, list[RawRow]] = {}
    if compare_with_test and "test" not in names and not config.hf_dataset:
        path = Path(config.data).expanduser() / "test.jsonl"
        test = {"test": read_lines(path)[0]} if path.is_file() else {}
    found.notices += duplicate_notices([splits | test for _, splits in datasets])
    return found


def _load(data: str, names: Sequence[str]) -> tuple[dict[str, list[RawRow]], list[str]]:
    """Return the splits of --data, a directory or a Hugging Face dataset, and what is wrong with lines of files."""
    directory = Path(data).expanduser()
    if directory.is_dir():
        return read_directory(directory, names)
    if directory.exists() or data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise InputError(
            f"--data {data}: no such directory; give one with train.jsonl (and valid.jsonl, test.jsonl)"
        )
    return load_hub(data, names), []


def _odd_rows(rows: Sequence[Row], name: str, total: int) -> list[str]:
    """Return notices of empty answers and unknown roles, among `total` rows of a split."""
    findings, unknown_roles = Findings(), []
    for row in rows:
        if any(_is_empty_answer(message) for message in row.messages):
            findings.add(Finding.EMPTY_ANSWER, row.source)
        if unknown := [message["role"] for message in row.messages if message["role"] not in ROLES]:
            findings.add(Finding.UNKNOWN_ROLE, row.source)
            unknown_roles += unknown
    role = next(iter(unknown_roles), "")
    return findings.notices(name, total, role=role, known_roles=nearest(role, ROLES).removeprefix("; "))


def _is_empty_answer(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return (
        message["role"] == "assistant"
        and not message.get("tool_calls")
        and isinstance(content, str)
        and not content.strip()
    )


def duplicate_notices(datasets: Sequence[Mapping[str, Sequence[RawRow]]]) -> list[str]:
    """Return notices of rows in more than one split, whose loss looks better than it is."""
    first_seen: dict[bytes, tuple[str, str]] = {}
    duplicates: dict[tuple[str, str], list[str]] = {}
    for splits in datasets:
        for name, rows in splits.items():
            for source, content in rows:
                digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
                first, first_source = first_seen.setdefault(digest, (name, source))
                if first != name:
                    duplicates.setdefault((first, name), []).append(f"{source} is {first_source}")
    return [
        f"{name}: {len(pairs)} rows are in {first} too ({listed(pairs, ', ')}); "
        f"their loss says little; remove them from one of the two"
        for (first, name), pairs in duplicates.items()
    ]


def tokenize(data: RunData, tokenizer: Any, max_seq_length: int) -> dict[str, Split]:
    """Tokenize all splits; each holds what is wrong with its rows in `errors`, and what is odd in `notices`."""
    splits: dict[str, Split] = {}
    for dataset in data.sources:
        for name, rows in dataset.items():
            split = splits.setdefault(name, Split([]))
            tokenized = tokenize_rows(rows, tokenizer, data.mask_prompt, max_seq_length, name)
            split.sequences += tokenized.sequences
            split.notices += tokenized.notices
            split.errors += tokenized.errors
    return splits
