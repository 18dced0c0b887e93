"""The shapes that batches are padded to, fitted to the rows of a run.

Each new shape is compiled, which takes a good part of a step's time, and its graph stays in memory (about 18 MB on a
CPU). So a run uses as few distinct lengths as possible while keeping padding low, and for each length mostly one number
of loss positions.
"""

import bisect
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nalora_mlx.data.preferences import TokenizedRow

PAD_TO = 8  # lengths are multiples of this
SHORT = 256  # up to this length there are eight lengths between two powers of two, above it four
MAX_PADDING = 0.05  # share of padding that is accepted to have fewer lengths
EXTRA_PADDING = 0.01  # if all lengths together pad more than that: the share that fewer lengths may add
DEVIATIONS = 2.5  # standard deviations above the mean that the usual loss capacity allows for


def rounded_length(length: int) -> int:
    """Round a length up to one that may occur, a multiple of PAD_TO."""
    step = max(PAD_TO, (1 << (length - 1).bit_length()) // (16 if length <= SHORT else 8))
    return step * math.ceil(length / step)


def padded_length(examples: Iterable[TokenizedRow]) -> int:
    """Return the rounded length of the longest row."""
    return rounded_length(max(example.inputs for example in examples))


@dataclass(frozen=True)
class PaddedShapes:
    """The shapes that batches are padded to.

    Attributes:
        lengths: padded lengths, ascending.
        supervised: for each length, mean and standard deviation of the supervised tokens of its sequences.
        mismatched: the shapes of the mismatched answers of KTO; None without.
    """

    lengths: tuple[int, ...]
    supervised: tuple[tuple[float, float], ...]
    mismatched: "PaddedShapes | None" = None

    def length_for(self, inputs: int) -> int:
        """Return the padded length of a batch whose longest sequence has `inputs` tokens."""
        return self.lengths[bisect.bisect_left(self.lengths, inputs)]

    def loss_capacity(self, supervised: int, sequences: int, length: int) -> int:
        """Return how many loss positions to allocate for a batch with `supervised` tokens.

        More positions cost a row of logits each, and each new capacity costs another graph.

        1. Start from what batches of this size usually need: the mean plus DEVIATIONS standard deviations.
        2. Double it until the batch fits, or halve it as long as the batch fits.
        3. Round up to a multiple of PAD_TO, at most all positions of the batch.
        """
        mean, deviation = self.supervised[bisect.bisect_left(self.lengths, length)]
        capacity = max(sequences * mean + DEVIATIONS * math.sqrt(sequences) * deviation, 1.0)
        while capacity < supervised:
            capacity *= 2
        while capacity / 2 >= max(supervised, 1):
            capacity /= 2
        return min(PAD_TO * math.ceil(capacity / PAD_TO), sequences * length)


def fit_shapes(inputs: Sequence[int], supervised: Sequence[int]) -> PaddedShapes:
    """Fit shapes to sequences, given the number of inputs and of supervised tokens of each.

    1. Round the lengths up. The distinct ones are the candidates.
    2. Allow a share of padding of MAX_PADDING, or what all candidates together need plus EXTRA_PADDING.
    3. Choose the fewest candidates within it; of equally many, those with the least padding.
    4. For each chosen length, take mean and standard deviation of the supervised tokens of its sequences.
    """
    rounded = np.array([rounded_length(n) for n in inputs])
    candidates, counts = np.unique(rounded, return_counts=True)
    tokens = sum(inputs)
    least_padding = 1 - tokens / int(rounded.sum())
    max_positions = tokens / (1 - max(MAX_PADDING, least_padding + EXTRA_PADDING))
    lengths = _fewest_lengths(candidates, counts, max_positions)
    by_length = defaultdict(list)
    for length, count in zip(inputs, supervised, strict=True):
        by_length[lengths[bisect.bisect_left(lengths, length)]].append(count)
    statistics = ((float(np.mean(by_length[n])), float(np.std(by_length[n]))) for n in lengths)
    return PaddedShapes(tuple(lengths), tuple(statistics))


def _fewest_lengths(candidates: np.ndarray, counts: np.ndarray, max_positions: float) -> list[int]:
    """Choose the fewest lengths that pad all sequences to at most `max_positions` in total.

    Args:
        candidates: lengths, ascending; the last one is always chosen.
        counts: sequences of each length.
        max_positions: limit for the sum of the padded lengths.

    Dynamic programming:

    1. Let best_k[j] be the fewest positions for the sequences of the first j candidates with k lengths, of which
       candidate j is the longest. best_0[0] = 0.
    2. best_k[j] = min over i < j of best_{k-1}[i] + candidate j for each sequence of the candidates i + 1 to j.
    3. Raise k until best_k of all candidates is within the limit, and follow the choices of i back.
    """
    number = len(candidates)
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    i, j = np.arange(number + 1)[:, None], np.arange(1, number + 1)
    added = np.where(i < j, (cumulative[1:] - cumulative[:, None]) * candidates, np.inf)  # [i, j]
    best = np.concatenate([[0.0], np.full(number, np.inf)])
    choices: list[np.ndarray] = []  # for each k, the best i of each j
    while best[-1] > max_positions and len(choices) < number:
        total = best[:, None] + added
        choices.append(total.argmin(axis=0))
        best = np.concatenate([[np.inf], total.min(axis=0)])
    lengths, last = [], number
    for choice in reversed(choices):
        lengths.append(int(candidates[last - 1]))
        last = int(choice[last - 1])
    return lengths[::-1]
