"""Summaries of tokenized rows for the terminal and for run.json: counts, lengths, and what is supervised."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from nalora_mlx.core.terminal import drawable
from nalora_mlx.data.tokenization import Example, Split

MAX_BARS = 12  # of a histogram


def length_statistics(examples: Sequence[Example]) -> dict[str, int]:
    """Return counts of sequences, tokens and supervised tokens, and quantiles of the sequences' lengths."""
    lengths = np.array([len(example.tokens) for example in examples])
    shortest, median, p95, longest = np.quantile(lengths, (0, 0.5, 0.95, 1)).astype(int).tolist()
    return {
        "sequences": len(lengths),
        "tokens": int(lengths.sum()),
        "supervised": int(sum(example.loss_mask.sum() for example in examples)),
        "shortest": shortest,
        "median": median,
        "p95": p95,
        "longest": longest,
    }


def summary(name: str, split: Split) -> str:
    """Return one line about a split: rows, sequences if they are more, tokens, the supervised share, and lengths."""
    found = length_statistics(split.sequences)
    rows, sequences = split.rows, found["sequences"]
    return (
        f"{name}: {rows} rows{f' in {sequences} sequences' * (sequences > rows)}, {found['tokens']} tokens, "
        f"{found['supervised'] / found['tokens']:.0%} of them supervised; lengths {found['shortest']} to "
        f"{found['longest']}, half of them up to {found['median']}, 95% up to {found['p95']}"
    )


def histogram(examples: Sequence[Example], width: int = 40) -> list[str]:
    """Return lines that draw how many rows fall into each range of lengths in tokens."""
    lengths = np.array([len(example.tokens) for example in examples])
    shortest, longest = int(lengths.min()), int(lengths.max())
    step = -(-(longest - shortest + 1) // MAX_BARS)
    counts = np.bincount((lengths - shortest) // step)
    full, thin = drawable("█", "#"), drawable("▏", "|")
    lines = []
    for i, count in enumerate(counts):
        low = shortest + i * step
        bar = full * round(width * count / counts.max())
        lines.append(f"{low:>7} to {low + step - 1:<7} {bar or (thin if count else '')} {count}")
    return lines


def mask_pieces(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return the text of a row in pieces, each with whether it is supervised."""
    mask = example.loss_mask
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(mask)]
    return [
        (tokenizer.decode(example.tokens[a:b].tolist()), bool(mask[a])) for a, b in itertools.pairwise(edges)
    ]
