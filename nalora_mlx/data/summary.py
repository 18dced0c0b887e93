"""A run's data from its settings to tokenized splits: all of it read and checked before anything is trained.

What makes a row unusable is a problem, and the run is refused; what is merely odd is a notice. Both are sentences
with the rows as file:line and what to do.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from nalora_mlx.core.terminal import drawable
from nalora_mlx.data.tokenization import Example, Split

BARS = 12  # rows of a histogram


def summary(name: str, split: Split) -> str:
    """One line on a split: rows, tokens, the share that is supervised, and lengths."""
    lengths = np.array([len(example.tokens) for example in split.examples])
    supervised = sum(int(example.loss_mask.sum()) for example in split.examples)
    low, middle, high, top = np.quantile(lengths, (0, 0.5, 0.95, 1)).astype(int).tolist()
    return (
        f"{name}: {len(split)} rows, {lengths.sum()} tokens, {supervised / lengths.sum():.0%} of them supervised; "
        f"lengths {low} to {top}, half of them up to {middle}, 95% up to {high}"
    )


def histogram(examples: Sequence[Example], width: int = 40) -> list[str]:
    """Lines that draw how many rows have which length in tokens."""
    lengths = [len(example.tokens) for example in examples]
    step = max(1, -(-(max(lengths) - min(lengths) + 1) // BARS))
    counts = np.bincount([(length - min(lengths)) // step for length in lengths])
    full, thin = drawable("█", "#"), drawable("▏", "|")
    lines = []
    for i, count in enumerate(counts):
        low = min(lengths) + i * step
        bar = full * round(width * count / counts.max())
        lines.append(f"{low:>7} to {low + step - 1:<7} {bar or (thin if count else '')} {count}")
    return lines


def marked(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of a row in pieces, each with whether it is supervised."""
    flags = example.loss_mask
    edges = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(flags)]
    return [
        (tokenizer.decode(example.tokens[a:b].tolist()), bool(flags[a])) for a, b in itertools.pairwise(edges)
    ]
