"""Which rows train and which validate: hold-out, ratios and weights, drawn by seed and the same in every process."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nalora_mlx.core.errors import InputError, counted, listed
from nalora_mlx.core.notices import Note
from nalora_mlx.data.images import reference_digest
from nalora_mlx.data.rows.formats import Row
from nalora_mlx.data.rows.messages import TEMPLATE_KEYS

DIGEST_BYTES = 16


def choose_training_rows(
    datasets: Sequence[dict[str, list[Row]]],
    entries: Sequence[Mapping[str, Any]],
    valid_fraction: float,
    seed: int,
) -> list[str]:
    """Decide in place which training rows an epoch holds how often, as their weights; return notices.

    1. Leave out rows of weight 0.
    2. If there are no validation rows, move a part of the training rows to the validation split.
    3. Multiply the weights of each source's rows by its ratio.

    Args:
        datasets: the rows of each source by split.
        entries: the sources, for their paths and ratios.
        valid_fraction: fraction of the rows to hold out.
        seed: of both draws.

    Raises:
        InputError: all rows have weight 0.
    """
    total = sum(len(splits["train"]) for splits in datasets)
    for splits in datasets:
        splits["train"] = [row for row in splits["train"] if row.weight]
    left_out = total - sum(len(splits["train"]) for splits in datasets)
    if left_out == total:
        raise InputError(f"all {total} training rows have weight 0; give at least one of them another weight")
    notices: list[str] = []
    if left_out:
        verbs = "has weight 0 and is" if left_out == 1 else "have weight 0 and are"
        notices.append(Note(f"train: {left_out} of {counted(total, 'row')} {verbs} left out"))
    if valid_fraction and all("valid" in splits and not splits["valid"] for splits in datasets):
        notices.append(_hold_out(datasets, valid_fraction, seed))
    if len(datasets) > 1 or any(entry.get("ratio", 1) != 1 for entry in entries):
        for splits, entry in zip(datasets, entries, strict=True):
            splits["train"] = _weighted(splits["train"], entry.get("ratio", 1), seed)
        shares = [
            f"{counted(sum(row.weight for row in splits['train']), 'row')} of {entry['path']}"
            for splits, entry in zip(datasets, entries, strict=True)
        ]
        notices.append(Note(f"an epoch holds {listed(shares, ', ')}"))
    return notices


def _hold_out(datasets: Sequence[dict[str, list[Row]]], fraction: float, seed: int) -> str:
    """Move rows to the validation splits; return a notice."""
    digests = [[digest(row) for row in splits["train"]] for splits in datasets]
    chosen = held_out([item for part in digests for item in part], fraction, seed)
    total = sum(map(len, digests))
    for splits, part in zip(datasets, digests, strict=True):
        rows = splits["train"]
        splits["train"] = [row for row, item in zip(rows, part, strict=True) if item not in chosen]
        splits["valid"] = [row for row, item in zip(rows, part, strict=True) if item in chosen]
    if not chosen:
        return f"no validation set, and too few different rows to hold some out (rows: {total})"
    count = sum(len(splits["valid"]) for splits in datasets)
    return Note(
        f"no validation set: {count} of {counted(total, 'row')} held out by seed (--valid-fraction {fraction:g})"
    )


def _weighted(rows: Sequence[Row], ratio: float, seed: int) -> list[Row]:
    copies = copies_per_row([digest(row) for row in rows], ratio, seed)
    return [replace(row, weight=row.weight * count) for row, count in zip(rows, copies, strict=True) if count]


def digest(row: Row) -> bytes:
    """Return a hash of what a model reads of a row: not its source, its weights, or keys that no template reads.

    It covers the rejected chat and the label of preference rows.
    """
    images = [reference_digest(image) for image in row.images]
    rejected = None if row.rejected is None else _read_parts(row.messages[: row.answer_start] + row.rejected)
    content: tuple[Any, ...] = (
        _read_parts(row.messages),
        row.tools,
        row.text,
        rejected,
        images,
        dict(row.template_args),
    )
    if row.label is not None:  # only then, so that the rows of other runs keep their hashes
        content += (row.label,)
    text = json.dumps(content, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def _read_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what chat templates read of messages."""
    return [{key: m[key] for key in m.keys() & TEMPLATE_KEYS} for m in messages]


def _draw(purpose: str, seed: int, item: bytes) -> bytes:
    """Return a key that sorts items in a random order, which depends on nothing but their contents and the seed."""
    return hashlib.blake2b(f"{purpose} {seed} ".encode() + item).digest()


def held_out(digests: Sequence[bytes], fraction: float, seed: int) -> set[bytes]:
    """Return digests of the rows to validate on; equal rows are on the same side.

    1. Take `fraction` of the rows as the number to hold out: at least one, at most half of them.
    2. Go through the distinct rows in the order of the draw, and take those whose copies fit into that number.
    3. If none fits, take the distinct row with the fewest copies, unless they are more than half of the rows.
    """
    total = len(digests)
    left = min(max(round(fraction * total), 1), total // 2)
    copies = Counter(digests)
    order = sorted(copies, key=lambda item: _draw("valid", seed, item))
    chosen: set[bytes] = set()
    for item in order:
        if copies[item] <= left:
            chosen.add(item)
            left -= copies[item]
        if not left:
            break
    if not chosen and order:
        fewest = min(order, key=copies.__getitem__)
        if copies[fewest] <= total // 2:
            chosen.add(fewest)
    return chosen


def copies_per_row(digests: Sequence[bytes], ratio: float, seed: int) -> list[int]:
    """Return how many times an epoch holds each row of a source.

    The whole part of the ratio counts for every row. Its fraction is a number of rows, drawn without replacement; a
    source with a ratio below 1 keeps at least one row.
    """
    whole = int(ratio)
    extra = round((ratio - whole) * len(digests))
    if not whole:
        extra = max(extra, 1)
    order = sorted(range(len(digests)), key=lambda i: (_draw("ratio", seed, digests[i]), i))
    counts = [whole] * len(digests)
    for i in order[:extra]:
        counts[i] += 1
    return counts
