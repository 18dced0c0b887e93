"""Batches: rows of similar length, or packs of rows, padded to one length."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nalora_mlx.data.media import RowMedia
from nalora_mlx.data.media_batches import collate_media
from nalora_mlx.data.packing import epoch_packs
from nalora_mlx.data.padding import PaddedShapes, fit_shapes, padded_length, rounded_length
from nalora_mlx.data.tokenization import Example

Packs = Sequence[Sequence[int]]  # for each sequence of a batch, the rows it holds
ALL = slice(None)  # the share of a worker that trains alone


@dataclass(frozen=True)
class Batch:
    """Sequences padded to one length: NumPy arrays [B, L]. A sequence holds one row, or several if packed.

    With several workers, the arrays hold one worker's share of the batch. `rows` and `supervised_tokens` describe the
    whole batch.

    Attributes:
        inputs: int32 token ids that the model reads.
        targets: int32 token ids that follow them.
        loss_mask: float32, 1 where the target is supervised.
        token_mask: float32, 1 where the input is a token and not padding.
        rows: indices into the split's examples.
        segment_ids: int32, the number of an input's row within its sequence, from 1; 0 for padding. None if not packed.
        remote_tokens: supervised tokens of the batch that other workers hold.
        loss_capacity: size of the arrays of `loss_positions`, see `PaddedShapes.loss_capacity`; grows if too small.
        images: of each sequence; empty without any.
        media: what they add, see `data.media_batches.collate_media`; None until `with_media` reads it.
    """

    inputs: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    token_mask: np.ndarray
    rows: tuple[int, ...]
    segment_ids: np.ndarray | None = None
    remote_tokens: int = 0
    loss_capacity: int = 0
    images: tuple[RowMedia | None, ...] = ()
    media: dict[str, Any] | None = None

    def with_media(self) -> "Batch":
        """Return the batch with what its images add, read from files or processed now."""
        if self.media is not None or not any(self.images):
            return self
        return replace(self, media=collate_media(self.images, self.inputs.shape[1]))

    @property
    def supervised_tokens(self) -> int:
        """Supervised tokens in the whole batch."""
        return int(self.loss_mask.sum()) + self.remote_tokens

    def loss_positions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the supervised positions in the flattened [B L], their targets, and weights; [S] each.

        S is `loss_capacity`. The rest is filled with position 0 at weight 0; supervised positions have weight 1.
        """
        supervised = np.flatnonzero(self.loss_mask).astype(np.int32)
        size = max(self.loss_capacity, supervised.size, 1)
        positions = np.zeros(size, np.int32)
        positions[: supervised.size] = supervised
        weights = np.zeros(size, np.float32)
        weights[: supervised.size] = 1
        return positions, self.targets.reshape(-1)[positions], weights


# --- which rows ---------------------------------------------------------------------------------------------


def sorted_batches(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Return row indices sorted by length and cut into batches; the last batch may be smaller."""
    order = sorted(range(len(examples)), key=lambda row: examples[row].inputs)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def epoch_batches(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return one epoch's batches as row indices. Every row is in exactly one batch.

    1. Shuffle the rows, then sort them by rounded length. Rows that pad to the same length stay shuffled.
    2. Cut the sorted rows into batches; the last batch may be smaller.
    3. Shuffle the batches.

    The result depends only on the arguments, so a run can resume at any position.
    """
    rng = np.random.default_rng([seed, epoch])
    order = sorted(rng.permutation(len(examples)), key=lambda row: rounded_length(examples[row].inputs))
    batches = [[int(row) for row in order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def batches_per_epoch(examples: Sequence[Example], batch_size: int, packing: bool = False) -> int:
    """Return the number of batches in an epoch."""
    if packing:
        return len(epoch_packs(examples, batch_size, 0, 0))
    return math.ceil(len(examples) / batch_size)


# --- streams of batches -------------------------------------------------------------------------------------


def training_batches(
    examples: Sequence[Example],
    batch_size: int,
    seed: int,
    packing: bool = False,
    share: slice = ALL,
    start: int = 0,
) -> Iterator[Batch]:
    """Yield batches without end. Each epoch holds every row once, in another order.

    Args:
        examples: tokenized rows.
        batch_size: sequences in a batch.
        seed: of the order.
        packing: put several rows into a sequence.
        share: one worker's sequences of each batch.
        start: number of batches to skip.
    """
    epoch, start = divmod(start, batches_per_epoch(examples, batch_size, packing))
    if packing:
        length = padded_length(examples)
        packs = list(itertools.chain.from_iterable(epoch_packs(examples, batch_size, seed, 0)))
        shapes = pack_shapes(examples, packs, length)
    else:
        shapes = row_shapes(examples)
    while True:
        if packing:
            for packs in epoch_packs(examples, batch_size, seed, epoch)[start:]:
                yield collate_packs(examples, packs, length, share, shapes)
        else:
            for rows in epoch_batches(examples, batch_size, seed, epoch)[start:]:
                yield collate(examples, rows, share, shapes).with_media()
        epoch, start = epoch + 1, 0


def evaluation_batches(
    examples: Sequence[Example], batch_size: int, num_batches: int, seed: int, share: slice = ALL
) -> list[Batch]:
    """Return a fixed set of batches, the same at every call; all rows if `num_batches` is -1.

    A subset of the rows is drawn with the seed, then sorted by length.
    """
    chosen: Sequence[Example] = examples
    if 0 <= num_batches * batch_size < len(examples):
        rows = np.sort(np.random.default_rng(seed).permutation(len(examples))[: num_batches * batch_size])
        chosen = [examples[row] for row in rows]
    shapes = row_shapes(chosen) if chosen else None
    return [collate(chosen, rows, share, shapes) for rows in sorted_batches(chosen, batch_size)]


# --- arrays -------------------------------------------------------------------------------------------------


def row_shapes(examples: Sequence[Example]) -> PaddedShapes:
    """Return the shapes of batches with one row per sequence."""
    return fit_shapes(
        [example.inputs for example in examples], [example.supervised_tokens for example in examples]
    )


def pack_shapes(examples: Sequence[Example], packs: Packs, length: int) -> PaddedShapes:
    """Return the shapes of batches of packs, all padded to one length."""
    supervised = [sum(examples[row].supervised_tokens for row in pack) for pack in packs]
    return fit_shapes([length] * len(packs), supervised)


def collate(
    examples: Sequence[Example], rows: Sequence[int], share: slice = ALL, shapes: PaddedShapes | None = None
) -> Batch:
    """Make a batch with one row per sequence.

    Args:
        examples: tokenized rows.
        rows: indices of the batch's rows.
        share: one worker's sequences; a worker without any gets one sequence of padding.
        shapes: shapes to pad to; fitted to these rows if None.
    """
    chosen = [examples[row] for row in rows]
    shapes = shapes or row_shapes(chosen)
    length = shapes.length_for(max(example.inputs for example in chosen))
    batch = _collate(examples, [[row] for row in rows], length, share, shapes)
    images = tuple(example.media for example in chosen[share])
    return replace(batch, images=images) if any(images) else batch


def collate_packs(
    examples: Sequence[Example],
    packs: Packs,
    length: int,
    share: slice = ALL,
    shapes: PaddedShapes | None = None,
) -> Batch:
    """Make a batch of packs, each padded to `length`; for the other arguments see `collate`."""
    batch = _collate(examples, packs, length, share, shapes or pack_shapes(examples, packs, length))
    segment_ids = np.zeros_like(batch.inputs)
    for i, pack in enumerate(packs[share]):
        ends = np.cumsum([examples[row].inputs for row in pack])
        segment_ids[i, : ends[-1]] = 1 + np.searchsorted(ends, np.arange(ends[-1]), side="right")
    return replace(batch, segment_ids=segment_ids)


def _collate(
    examples: Sequence[Example], packs: Packs, length: int, share: slice, shapes: PaddedShapes
) -> Batch:
    own = packs[share] or [[]]
    inputs = np.zeros((len(own), length), np.int32)
    targets = np.zeros_like(inputs)
    loss_mask = np.zeros((len(own), length), np.float32)
    token_mask = np.zeros_like(loss_mask)
    for i, pack in enumerate(own):
        start = 0
        for row in pack:
            example = examples[row]
            at = slice(start, start + example.inputs)
            inputs[i, at] = example.tokens[:-1]
            targets[i, at] = example.tokens[1:]
            loss_mask[i, at] = example.loss_mask[1:]
            token_mask[i, at] = 1
            start += example.inputs
    rows = tuple(int(row) for pack in packs for row in pack)
    own_tokens = int(loss_mask.sum())
    return Batch(
        inputs,
        targets,
        loss_mask,
        token_mask,
        rows,
        remote_tokens=sum(examples[row].supervised_tokens for row in rows) - own_tokens,
        loss_capacity=shapes.loss_capacity(own_tokens, len(own), length),
    )
