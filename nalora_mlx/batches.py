"""Length-sorted batches: every row once an epoch, little padding, the same rows at every validation."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nalora_mlx.data import Example

PAD_TO = 8  # lengths are padded to multiples of this, which keeps shapes few and little of a batch wasted


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length; NumPy arrays [B, L].

    Attributes:
        inputs: token ids that the model reads.
        targets: the token ids that follow them.
        supervised: float32, 1 where the target is scored.
        real: float32, 1 where the input is a token of a row and not padding.
        rows: indices into the split's examples.
    """

    inputs: np.ndarray
    targets: np.ndarray
    supervised: np.ndarray
    real: np.ndarray
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Supervised tokens in the batch."""
        return int(self.supervised.sum())

    def scored(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the loss is: positions in the flattened [B L], their targets, and weights, 1 or 0; [S] each.

        S is the count of supervised tokens rounded up by at most an eighth, so that few sizes occur; weight 0 fills.
        """
        positions = np.flatnonzero(self.supervised).astype(np.int32)
        step = max(8, 1 << max(0, int(positions.size).bit_length() - 3))
        size = step * max(1, math.ceil(positions.size / step))
        rows = np.zeros(size, np.int32)
        rows[: positions.size] = positions
        weights = np.zeros(size, np.float32)
        weights[: positions.size] = 1
        return rows, self.targets.reshape(-1)[rows], weights


def collate(examples: Sequence[Example], rows: Sequence[int], pad_to: int = PAD_TO) -> Batch:
    """Pad rows to the longest one's inputs, rounded up to a multiple of pad_to."""
    length = pad_to * math.ceil(max(examples[row].inputs for row in rows) / pad_to)
    inputs = np.zeros((len(rows), length), np.int32)
    targets = np.zeros((len(rows), length), np.int32)
    supervised = np.zeros((len(rows), length), np.float32)
    real = np.zeros((len(rows), length), np.float32)
    for i, row in enumerate(rows):
        example = examples[row]
        n = example.inputs
        inputs[i, :n] = example.tokens[:-1]
        targets[i, :n] = example.tokens[1:]
        supervised[i, :n] = example.supervised[1:]
        real[i, :n] = 1
    return Batch(inputs, targets, supervised, real, tuple(int(row) for row in rows))


def sorted_batches(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Row indices by length, cut into batches; every row is in exactly one, the last batch may be smaller."""
    order = sorted(range(len(examples)), key=lambda row: examples[row].inputs)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def epoch_batches(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch in their order: rows of like length together, drawn anew for each epoch.

    A pure function of (examples, batch_size, seed, epoch), so that any position can be found again.
    """
    rng = np.random.default_rng([seed, epoch])
    # Rows that pad to the same length are interchangeable: shuffle them, then sort by that length alone.
    shuffled = rng.permutation(len(examples))
    order = sorted(shuffled, key=lambda row: math.ceil(examples[row].inputs / PAD_TO))
    batches = [[int(r) for r in order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def training_batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches without end, epoch after epoch; each epoch holds every row once."""
    epoch = 0
    while True:
        for rows in epoch_batches(examples, batch_size, seed, epoch):
            yield collate(examples, rows)
        epoch += 1


def evaluation_batches(
    examples: Sequence[Example], batch_size: int, num_batches: int, seed: int
) -> list[Batch]:
    """A fixed set of batches, the same at every call; -1 takes all rows.

    When a part is asked for, the rows are drawn once with the seed and then sorted by length.
    """
    chosen: Sequence[Example] = examples
    if 0 <= num_batches * batch_size < len(examples):
        rows = np.sort(np.random.default_rng(seed).permutation(len(examples))[: num_batches * batch_size])
        chosen = [examples[row] for row in rows]
    return [collate(chosen, rows) for rows in sorted_batches(chosen, batch_size)]


def batches_per_epoch(examples: Sequence[Example], batch_size: int) -> int:
    """How many batches one epoch has."""
    return math.ceil(len(examples) / batch_size)
