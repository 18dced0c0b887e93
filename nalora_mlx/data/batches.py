"""Length-sorted or packed batches: every row once an epoch, little padding, the same rows at every validation."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nalora_mlx.data.packing import epoch_packs
from nalora_mlx.data.padding import Shapes, fitted, padded_length, rounded_length
from nalora_mlx.data.tokenization import Example


@dataclass(frozen=True)
class Batch:
    """Sequences padded to one length; NumPy arrays [B, L]. A sequence is one row, or several that are packed.

    With several workers the arrays hold one worker's share of the batch, rows and tokens are those of the whole.

    Attributes:
        inputs: token ids that the model reads.
        targets: the token ids that follow them.
        supervised: float32, 1 where the target is scored.
        real: float32, 1 where the input is a token of a row and not padding.
        rows: indices into the split's examples.
        segments: int32, which row of its sequence an input belongs to, from 1; 0 for padding. None if not packed.
        elsewhere: supervised tokens of the batch that other workers have.
        room: for scored positions, see `Shapes.loss_capacity`; 0 for as many as there are.
    """

    inputs: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    token_mask: np.ndarray
    rows: tuple[int, ...]
    segment_ids: np.ndarray | None = None
    remote_tokens: int = 0
    loss_capacity: int = 0

    @property
    def tokens(self) -> int:
        """Supervised tokens in the whole batch."""
        return int(self.loss_mask.sum()) + self.remote_tokens

    def scored(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the loss is: positions in the flattened [B L], their targets, and weights, 1 or 0; [S] each.

        S is `room`, so that few sizes occur; weight 0 fills.
        """
        positions = np.flatnonzero(self.loss_mask).astype(np.int32)
        size = max(self.loss_capacity, positions.size, 1)
        rows = np.zeros(size, np.int32)
        rows[: positions.size] = positions
        weights = np.zeros(size, np.float32)
        weights[: positions.size] = 1
        return rows, self.targets.reshape(-1)[rows], weights


# A sequence of a batch: the rows that stand in it one after the other. All sequences, unless a worker has a share.
Sequences = Sequence[Sequence[int]]
ALL = slice(None)


def shapes_of(examples: Iterable[Example]) -> Shapes:
    """The shapes of batches with one row a sequence."""
    sizes = [(example.inputs, int(example.loss_mask[1:].sum())) for example in examples]
    return fitted(*zip(*sizes, strict=True))


def collate(
    examples: Sequence[Example], rows: Sequence[int], share: slice = ALL, shapes: Shapes | None = None
) -> Batch:
    """One row a sequence, padded to one of the `shapes`; to that of these rows alone if None.

    `share` picks one worker's sequences; a worker without any has one of padding alone.
    """
    chosen = [examples[row] for row in rows]
    shapes = shapes or shapes_of(chosen)
    length = shapes.length(max(example.inputs for example in chosen))
    return _collate(examples, [[row] for row in rows], length, share, shapes)


def _collate(
    examples: Sequence[Example], sequences: Sequences, length: int, share: slice, shapes: Shapes
) -> Batch:
    mine = sequences[share] or [[]]
    inputs = np.zeros((len(mine), length), np.int32)
    targets = np.zeros((len(mine), length), np.int32)
    supervised = np.zeros((len(mine), length), np.float32)
    real = np.zeros((len(mine), length), np.float32)
    for i, rows in enumerate(mine):
        start = 0
        for row in rows:
            example = examples[row]
            here = slice(start, start + example.inputs)
            inputs[i, here] = example.tokens[:-1]
            targets[i, here] = example.tokens[1:]
            supervised[i, here] = example.loss_mask[1:]
            real[i, here] = 1
            start += example.inputs
    rows = tuple(int(row) for rows in sequences for row in rows)
    tokens = sum(int(examples[row].loss_mask[1:].sum()) for row in rows)
    own = int(supervised.sum())
    room = shapes.loss_capacity(own, len(mine), length)
    return Batch(inputs, targets, supervised, real, rows, remote_tokens=tokens - own, loss_capacity=room)


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
    order = sorted(shuffled, key=lambda row: rounded_length(examples[row].inputs))
    batches = [[int(r) for r in order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def training_batches(
    examples: Sequence[Example],
    batch_size: int,
    seed: int,
    packing: bool = False,
    share: slice = ALL,
    start: int = 0,
) -> Iterator[Batch]:
    """Batches without end, epoch after epoch; each epoch holds every row once.

    Args:
        examples: tokenized rows.
        batch_size: sequences in a batch.
        seed: of the drawing.
        packing: several rows a sequence.
        share: one worker's sequences of each batch.
        start: batches to leave out at the beginning.
    """
    epoch, start = divmod(start, batches_per_epoch(examples, batch_size, packing))
    length = padded_length(examples)
    if packing:
        packs = [pack for batch in epoch_packs(examples, batch_size, seed, 0) for pack in batch]
        shapes = pack_shapes(examples, packs, length)
    else:
        shapes = shapes_of(examples)
    while True:
        if packing:
            for packs in epoch_packs(examples, batch_size, seed, epoch)[start:]:
                yield collate_packs(examples, packs, length, share, shapes)
        else:
            for rows in epoch_batches(examples, batch_size, seed, epoch)[start:]:
                yield collate(examples, rows, share, shapes)
        epoch, start = epoch + 1, 0


def evaluation_batches(
    examples: Sequence[Example], batch_size: int, num_batches: int, seed: int, share: slice = ALL
) -> list[Batch]:
    """A fixed set of batches, the same at every call; -1 takes all rows.

    When a part is asked for, the rows are drawn once with the seed and then sorted by length.
    """
    chosen: Sequence[Example] = examples
    if 0 <= num_batches * batch_size < len(examples):
        rows = np.sort(np.random.default_rng(seed).permutation(len(examples))[: num_batches * batch_size])
        chosen = [examples[row] for row in rows]
    shapes = shapes_of(chosen) if chosen else None
    return [collate(chosen, rows, share, shapes) for rows in sorted_batches(chosen, batch_size)]


def batches_per_epoch(examples: Sequence[Example], batch_size: int, packing: bool = False) -> int:
    """How many batches one epoch has."""
    if packing:
        return len(epoch_packs(examples, batch_size, 0, 0))
    return math.ceil(len(examples) / batch_size)


def collate_packs(
    examples: Sequence[Example],
    packs: Sequences,
    length: int,
    share: slice = ALL,
    shapes: Shapes | None = None,
) -> Batch:
    """Several rows a sequence, each sequence padded to `length`; see `collate`."""
    batch = _collate(examples, packs, length, share, shapes or pack_shapes(examples, packs, length))
    segments = np.zeros_like(batch.inputs)
    for i, pack in enumerate(packs[share]):
        ends = np.cumsum([examples[row].inputs for row in pack])
        segments[i, : ends[-1]] = 1 + np.searchsorted(ends, np.arange(ends[-1]), side="right")
    return replace(batch, segment_ids=segments)


def pack_shapes(examples: Sequence[Example], packs: Sequences, length: int) -> Shapes:
    """The shapes of batches of packs, all of one length."""
    supervised = [sum(int(examples[row].loss_mask[1:].sum()) for row in pack) for pack in packs]
    return fitted([length] * len(packs), supervised)
