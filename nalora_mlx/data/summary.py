"""Summaries of tokenized rows for the terminal and for run.json: counts, lengths, and what is supervised."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from nalora_mlx.core.errors import counted
from nalora_mlx.core.terminal import drawable
from nalora_mlx.data.answer_batches import are_preferences
from nalora_mlx.data.preferences import TokenizedRow, separate_sequences
from nalora_mlx.data.tokenization import Example, Split

MAX_BARS = 8  # of a histogram
REPEATED = 4  # tokens of an image, from which on they are not all shown
LONG_TAIL = 8  # medians from which on the longest row is much longer than most


def length_statistics(examples: Sequence[TokenizedRow]) -> dict[str, int]:
    """Return counts of sequences, tokens and supervised tokens, and quantiles of the sequences' lengths.

    Each answer of a preference row is a sequence, with its prompt.
    """
    sequences = separate_sequences(examples)
    lengths = np.array([len(sequence.tokens) for sequence in sequences])
    shortest, median, p95, longest = np.quantile(lengths, (0, 0.5, 0.95, 1)).astype(int).tolist()
    return {
        "sequences": len(lengths),
        "tokens": int(lengths.sum()),
        "supervised": int(sum(sequence.loss_mask.sum() for sequence in sequences)),
        "shortest": shortest,
        "median": median,
        "p95": p95,
        "longest": longest,
    }


def summary(name: str, split: Split) -> str:
    """Return one line about a split: rows, sequences if they are more, images, tokens, what is supervised, lengths."""
    found = length_statistics(split.sequences)
    sequences = found["sequences"]
    if are_preferences(split.sequences):
        parts = f" with {counted(sequences, 'answer')}"
        if sequences == len(split.sequences):  # one each, with a label
            parts += f", {sum(example.desirable for example in split.sequences):,} of them good"
    else:
        parts = f" in {counted(sequences, 'sequence')}" if sequences > split.rows else ""
    shortest, longest = found["shortest"], found["longest"]
    lengths = (
        f"{shortest:,} to {longest:,}, median {found['median']:,}" if longest > shortest else f"{longest:,}"
    )
    if images := sum(len(example.images) for example in split.sequences):
        parts += f" with {counted(images, 'image')}"
    return (
        f"{name}: {counted(split.rows, 'row')}{parts}, {counted(found['tokens'], 'token')}, "
        f"{found['supervised'] / found['tokens']:.0%} supervised; lengths {lengths}"
    )


def histogram(examples: Sequence[TokenizedRow], width: int = 40) -> list[str]:
    """Return lines that draw how many sequences have which lengths in tokens; none if one line would hold them all.

    Ranges are equally wide, or each is twice as wide as the one before if the longest row is much longer than most.
    Empty ones are left out.
    """
    lengths = np.array([len(sequence.tokens) for sequence in separate_sequences(examples)])
    counts = [
        (low, high, int(((lengths >= low) & (lengths <= high)).sum())) for low, high in _ranges(lengths)
    ]
    filled = [row for row in counts if row[2]]
    if len(filled) < 2:
        return []
    full, thin = drawable("█", "#"), drawable("▏", "|")
    digits, most = len(f"{filled[-1][1]:,}"), max(number for *_, number in filled)
    has_ranges = any(low < high for low, high, _ in filled)
    lines = []
    for low, high, number in filled:
        begin = f"{low:>{digits},} to " if low < high else " " * (digits + 4) * has_ranges
        lines.append(f"  {begin}{high:>{digits},} {full * round(width * number / most) or thin} {number:,}")
    return lines


def _ranges(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Return up to MAX_BARS ranges [low, high] that hold all lengths. They end at round numbers."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    if longest > LONG_TAIL * np.median(lengths):
        first, last = (shortest - 1).bit_length(), (longest - 1).bit_length()
        kept = range(first, last + 1)[-MAX_BARS:]
        ends = [2 ** (first - 1) if kept[0] == first > 0 else 0, *(2**power for power in kept)]
    else:
        steps = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
        step = next(step for step in steps if (longest - 1) // step - (shortest - 1) // step < MAX_BARS)
        ends = list(range((shortest - 1) // step * step, longest + step, step))
    return [(low + 1, high) for low, high in itertools.pairwise(ends)]


def titled_sequences(example: TokenizedRow) -> dict[str, Example]:
    """Return the sequences of a row by what to call them: its source, and the answer of a preference row."""
    if isinstance(example, Example):
        return {example.source: example}
    return {f"{example.source} ({what})": sequence for what, sequence in example.sequences.items()}


def mask_pieces(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return the text of a row in pieces, each with whether it is supervised. The tokens of an image are counted."""
    mask = example.loss_mask
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(mask)]
    show = partial(_with_counts, tokenizer) if example.images else tokenizer.decode
    return [(show(example.tokens[a:b].tolist()), bool(mask[a])) for a, b in itertools.pairwise(edges)]


def _with_counts(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return a text in which a token that is repeated at least REPEATED times stands once, with their number."""
    text, rest = "", list[int]()
    for token, run in itertools.groupby(tokens):
        if (count := len(list(run))) < REPEATED:
            rest += [token] * count
            continue
        text, rest = f"{text}{tokenizer.decode(rest)}{tokenizer.decode([token])} ({count:,} times)", []
    return text + tokenizer.decode(rest)
