"""The data of a run, read and checked in full before training starts.

Unusable rows are problems, and a run with problems does not start. Rows that are merely odd are notices. Both are
sentences that name the rows as file:line and say what to do.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nalora_mlx.core.config import PreferenceConfig, RunConfig
from nalora_mlx.core.data_entries import ROWS_IN_MEMORY, data_entries
from nalora_mlx.core.errors import InputError, counted, listed
from nalora_mlx.core.parsing import nearest
from nalora_mlx.data.chats.chat_encoder import ChatEncoder
from nalora_mlx.data.chats.placeholders import ImageTexts
from nalora_mlx.data.findings import Finding, Findings
from nalora_mlx.data.image_checks import check_images
from nalora_mlx.data.preference_tokenization import accepted_rows, tokenize_preferences
from nalora_mlx.data.rows.formats import Features, Row, parse_rows, refused_images
from nalora_mlx.data.rows.images import MARKER
from nalora_mlx.data.rows.survey import Survey
from nalora_mlx.data.sources.files import Remarks
from nalora_mlx.data.sources.loading import SPLITS, Source, hub_entry_splits, numbered, open_source
from nalora_mlx.data.splits import choose_training_rows, digest
from nalora_mlx.data.tokenization import Split, tokenize_rows

MOST_LEFT_OUT = 0.1  # of the rows of a data set on the Hub; beyond that, its rows are probably misunderstood
ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython", "environment")


@dataclass
class RunData:
    """The valid rows of a run, and what was found about the others.

    Attributes:
        mask_prompt: whether prompts are masked.
        last_turn_only: whether only the last assistant turn of a chat is trained on.
        preferences: the train mode.
        sources: for each dataset, the rows of each split.
        problems: what makes rows unusable.
        notices: what is odd about rows.
    """

    mask_prompt: bool
    last_turn_only: bool = False
    preferences: PreferenceConfig = field(default_factory=PreferenceConfig)
    sources: list[dict[str, list[Row]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def has_images(self) -> bool:
        """Whether a row has images."""
        return any(row.images for splits in self.sources for rows in splits.values() for row in rows)


def images_refused(data: RunData) -> list[str]:
    """Return a problem for each row with images, for models that do not see."""
    rows = (row for splits in data.sources for rows in splits.values() for row in rows)
    return [refused_images(row.source) for row in rows if row.images]


def read_rows(
    config: RunConfig,
    names: Sequence[str],
    all_needed: bool = True,
    compare_with_test: bool = False,
    rows: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    unsplit: str = "train",
) -> RunData:
    """Read the splits of a run, and check what can be checked without a tokenizer.

    Without validation rows, a part of the training rows is held out (`valid_fraction`), if `names` has both splits.

    Args:
        config: where the data is, and the keys of its rows.
        names: of the splits.
        all_needed: require a test set if it is among the names; the training set is always required.
        compare_with_test: look for training and validation rows in the test set too, even if `names` lacks it.
        rows: the rows by split, if `data` is `ROWS_IN_MEMORY`.
        unsplit: the split that the rows of a file without splits belong to.

    Raises:
        InputError: there is no such file, directory or dataset, or a required split is empty.
    """
    remarks = Remarks()
    found = RunData(
        config.mask_prompt,
        config.last_turn_only,
        config,
        problems=remarks.problems,
        notices=remarks.notices,
    )
    accepted = accepted_rows(config)
    entries = _entries(config)
    for entry in entries:
        source = _open(config, entry, names, remarks, rows, unsplit)
        features = _features(config, entry, source)
        parsed: dict[str, list[Row]] = {}
        for name, contents in source.splits.items():
            survey = Survey()
            findings = Findings()
            parsed[name], problems = parse_rows(contents, features, survey, accepted)
            total = len(parsed[name]) + len(problems)
            parsed[name], bad_images = check_images(parsed[name], source.directory, findings)
            if config.prefers and source.is_remote and len(problems) <= MOST_LEFT_OUT * total:
                found.notices += _left_out(problems, name, total)
                problems = []
            found.problems += problems + bad_images
            found.notices += survey.notices(name)
            found.notices += _odd_rows(parsed[name], name, total, findings)
            if source.texts or config.chunk:
                parsed[name] = [replace(row, chunk=not row.messages) for row in parsed[name]]
        found.sources.append(parsed)
    for name in names:
        needed = name == "train" or (all_needed and name == "test")
        if needed and not found.problems and not any(splits[name] for splits in found.sources):
            if rows is not None:
                raise InputError(f"data: no rows for {name}; give some, as in data={{'{name}': [...]}}")
            paths = " ".join(entry["path"] for entry in entries)
            raise InputError(f"--data {paths}: no rows for {name}; add rows to {name}.jsonl")
    test = _test_rows(config, entries) if compare_with_test and "test" not in names else []
    found.notices += duplicate_notices([*found.sources, {"test": test}])
    if "train" in names and not found.problems:
        found.notices += choose_training_rows(found.sources, entries, config.valid_fraction, config.seed)
    return found


def read_run(config: RunConfig, rows: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> RunData:
    """Read the splits that a run trains, validates and tests on, before anything slow is imported.

    Args:
        config: settings of the run.
        rows: the rows by split, if `data` is `ROWS_IN_MEMORY`.

    Raises:
        InputError: lists the rows that cannot be used.
    """
    names = [name for name in SPLITS if (config.test if name == "test" else config.train)]
    found = read_rows(config, names, compare_with_test=config.train, rows=rows)
    if found.problems:
        raise InputError(listed(found.problems))
    return found


def _left_out(problems: Sequence[str], name: str, total: int) -> list[str]:
    """Return a notice of rows that cannot be compared, in a data set that the user cannot correct."""
    if not problems:
        return []
    verbs = "cannot be compared and is" if len(problems) == 1 else "cannot be compared and are"
    return [f"{name}: {len(problems):,} of {counted(total, 'row')} {verbs} left out: {listed(problems)}"]


def _entries(config: RunConfig) -> list[dict[str, Any]]:
    """Return the sources of a run as mappings with path and ratio."""
    if not config.hf_dataset:
        return data_entries(config.data)
    return config.hf_dataset if isinstance(config.hf_dataset, list) else [config.hf_dataset]


def _open(
    config: RunConfig,
    entry: Mapping[str, Any],
    names: Sequence[str],
    remarks: Remarks,
    rows: Mapping[str, Sequence[Mapping[str, Any]]] | None,
    unsplit: str,
) -> Source:
    if rows is not None:
        return Source({name: numbered(rows.get(name, ()), name) for name in names}, directory=Path.cwd())
    if entry["path"] == ROWS_IN_MEMORY:
        raise InputError("the run was trained on rows given in Python; give them again: finetune(data=...)")
    if config.hf_dataset:
        return Source(hub_entry_splits(entry, names))
    return open_source(entry["path"], names, remarks, unsplit)


def _features(config: RunConfig, entry: Mapping[str, Any], source: Source) -> Features:
    """Return the keys of a source's rows. Those of text files do not depend on the settings."""
    return Features(mask_prompt=config.mask_prompt) if source.texts else Features.from_config(config, entry)


def _test_rows(config: RunConfig, entries: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the test rows of local files. A run that does not use them ignores what is wrong with them."""
    rows: list[Row] = []
    for entry in [] if config.hf_dataset else entries:
        if not os.path.exists(os.path.expanduser(entry["path"])):
            continue
        with suppress(InputError):
            source = open_source(entry["path"], ["test"], Remarks())
            for contents in source.splits.values():
                parsed, _ = parse_rows(
                    contents, _features(config, entry, source), accepted=accepted_rows(config)
                )
                rows += check_images(parsed, source.directory, Findings())[0]
    return rows


def _odd_rows(rows: Sequence[Row], name: str, total: int, findings: Findings) -> list[str]:
    """Return notices of odd rows among `total` rows of a split, with the findings that are there already."""
    unknown_roles: list[str] = []
    has_images = any(row.images for row in rows)
    for row in rows:
        if has_images and not row.images and any(MARKER in message["content"] for message in row.messages):
            findings.add(Finding.NO_IMAGE, row.source)
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


def duplicate_notices(datasets: Sequence[Mapping[str, Sequence[Row]]]) -> list[str]:
    """Return notices of rows in more than one split, whose loss looks better than it is."""
    if len({name for splits in datasets for name, rows in splits.items() if rows}) < 2:
        return []
    first_seen: dict[bytes, tuple[str, str]] = {}
    duplicates: dict[tuple[str, str], list[str]] = {}
    for splits in datasets:
        for name, rows in splits.items():
            for row in rows:
                first, first_source = first_seen.setdefault(digest(row), (name, row.source))
                if first != name:
                    duplicates.setdefault((first, name), []).append(f"{row.source} is {first_source}")
    return [
        f"{name}: {counted(len(pairs), 'row')} {'is' if len(pairs) == 1 else 'are'} in {first} too "
        f"({listed(pairs, ', ')}); their loss says little; remove them from one of the two"
        for (first, name), pairs in duplicates.items()
    ]


def tokenize(
    data: RunData, tokenizer: Any, max_seq_length: int, images: ImageTexts | None = None
) -> dict[str, Split]:
    """Tokenize all splits; each holds what is wrong with its rows in `errors`, and what is odd in `notices`.

    A training row of weight n stands n times in its split, but is tokenized once. `images` says what images become in
    the text of a chat; None for models that do not see.
    """
    splits: dict[str, Split] = {}
    encoder = ChatEncoder(tokenizer, data.mask_prompt, data.last_turn_only, images)
    for dataset in data.sources:
        for name, rows in dataset.items():
            split = splits.setdefault(name, Split([]))
            if data.preferences.prefers:
                tokenized = tokenize_preferences(
                    rows, tokenizer, data.preferences, data.mask_prompt, max_seq_length, name
                )
            else:
                tokenized = tokenize_rows(rows, encoder, max_seq_length, name)
            weights = {row.source: row.weight for row in rows if name == "train" and row.weight != 1}
            for sequence in tokenized.sequences:
                split.sequences += [sequence] * weights.get(sequence.source, 1)
            for source in {sequence.source for sequence in tokenized.sequences} & weights.keys():
                split.rows += weights[source] - 1
            split.rows += tokenized.rows
            split.notices += tokenized.notices
            split.errors += tokenized.errors
    return splits
