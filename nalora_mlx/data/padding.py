"""The few shapes that batches are padded to, fitted to the rows of a run.

Every new shape is compiled, which takes a good part of a step's time, and its graph is kept: some 18 MB on a CPU. So of
lengths as few occur as waste little, and for each length one count of scored positions with few exceptions.
"""

import bisect
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nalora_mlx.data.tokenization import Example

PAD_TO = 8  # lengths are padded to multiples of this
SHORT = 256  # up to here there are eight lengths between a power of two and the next one, beyond it four
PADDING = 0.05  # share of a batch that may be padding for the sake of fewer lengths
MORE_PADDING = 0.01  # where all lengths together waste more than that: what fewer may add
DEVIATIONS = 2.5  # above the mean, to which there is room for scored positions


def rounded_length(length: int) -> int:
    """The next of the lengths that may occur; a multiple of PAD_TO."""
    step = max(PAD_TO, (1 << (length - 1).bit_length()) // (16 if length <= SHORT else 8))
    return step * math.ceil(length / step)


@dataclass(frozen=True)
class Shapes:
    """What batches of some sequences are padded to.

    Attributes:
        lengths: that occur, rising.
        scored: for each of them mean and standard deviation of the supervised tokens of its sequences.
    """

    lengths: tuple[int, ...]
    scored: tuple[tuple[float, float], ...]

    def length(self, inputs: int) -> int:
        """The length to which sequences are padded of which the longest has so many inputs."""
        return self.lengths[bisect.bisect_left(self.lengths, inputs)]

    def loss_capacity(self, supervised: int, sequences: int, length: int) -> int:
        """Room for the scored positions of a batch: as usual for its size, or that doubled or halved until it is right.

        Every position of it costs a row of logits, and every size another graph.
        """
        mean, deviation = self.scored[bisect.bisect_left(self.lengths, length)]
        usual = sequences * mean + DEVIATIONS * math.sqrt(sequences) * deviation
        size = max(usual, 1.0)
        while size < supervised:
            size *= 2
        while size / 2 >= max(supervised, 1):
            size /= 2
        return min(PAD_TO * math.ceil(size / PAD_TO), sequences * length)


def fitted(inputs: Sequence[int], supervised: Sequence[int]) -> Shapes:
    """Shapes for sequences of so many inputs and supervised tokens each; at least one.

    Of the rounded lengths that occur the fewest whose padding stays below PADDING, or below what all of them give and
    MORE_PADDING; of as many lengths those with the least padding.
    """
    rounded = np.array([rounded_length(n) for n in inputs])
    lengths, counts = np.unique(rounded, return_counts=True)
    real = sum(inputs)
    least = 1 - real / int(rounded.sum())
    allowed = real / (1 - max(PADDING, least + MORE_PADDING))  # positions
    chosen = _fewest(lengths, counts, allowed)
    by_length = defaultdict(list)
    for one, count in zip(inputs, supervised, strict=True):
        by_length[chosen[bisect.bisect_left(chosen, one)]].append(count)
    scored = ((float(np.mean(by_length[n])), float(np.std(by_length[n]))) for n in chosen)
    return Shapes(tuple(chosen), tuple(scored))


def _fewest(lengths: np.ndarray, counts: np.ndarray, allowed: float) -> list[int]:
    """The fewest of `lengths`, rising, with which sequences padded to them have at most `allowed` positions.

    best[j], the fewest positions that the sequences up to length j take with k lengths of which j is the last, is
    min over i of best[i] with k - 1 lengths, and length j for the sequences between.
    """
    number = len(lengths)
    upto = np.concatenate([[0], np.cumsum(counts)])
    i, j = np.arange(number + 1)[:, None], np.arange(1, number + 1)
    between = np.where(i < j, (upto[1:] - upto[:, None]) * lengths, np.inf)  # [i sequences' lengths done, j]
    best = np.concatenate([[0.0], np.full(number, np.inf)])
    before: list[np.ndarray] = []
    while best[-1] > allowed and len(before) < number:
        total = best[:, None] + between
        before.append(total.argmin(axis=0))
        best = np.concatenate([[np.inf], total.min(axis=0)])
    chosen, last = [], number
    for choice in reversed(before):
        chosen.append(int(lengths[last - 1]))
        last = int(choice[last - 1])
    return chosen[::-1]


def padded_length(examples: Iterable[Example]) -> int:
    """Length of the longest row's inputs, rounded up."""
    return rounded_length(max(example.inputs for example in examples))
