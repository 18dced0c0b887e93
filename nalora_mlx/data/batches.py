"""Batches: rows of similar length, or packs of rows, padded to one length."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nalora_mlx.data.answer_batches import BatchAnswers, are_preferences, collate_answers
from nalora_mlx.data.media import RowMedia
from nalora_mlx.data.media_batches import collate_media
from nalora_mlx.data.packing import epoch_packs
from nalora_mlx.data.padding import PaddedShapes, fit_shapes, padded_length, rounded_length
from nalora_mlx.data.preferences import PreferenceExample, TokenizedRow
from nalora_mlx.data.tokenization import Lane

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
        token_mask: float32, how many tokens an input stands for: 0 for padding, mostly 1.
        rows: indices into the split's examples.
        segment_ids: int32, which inputs of a sequence attend to each other, from 1; 0 for padding. None if not packed.
        branches, positions: int32, see `Lane`; None without branches.
        remote_tokens: supervised tokens of the batch that other workers hold.
        loss_capacity: size of the arrays of `loss_positions`, see `PaddedShapes.loss_capacity`; grows if too small.
        images: of each sequence; empty without any.
        media: what they add, see `data.media_batches.collate_media`; None until `with_media` reads it.
        answers: of preference rows; None in supervised training.
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
    branches: np.ndarray | None = None
    positions: np.ndarray | None = None
    answers: BatchAnswers | None = None

    def with_media(self) -> "Batch":
        """Return the batch with what its images add, read from files or processed now."""
        if self.media is not None or not any(self.images):
            return self
        return replace(self, media=collate_media(self.images, self.inputs.shape[1]))

    @property
    def supervised_tokens(self) -> int:
        """Supervised tokens in the whole batch."""
        return int(self.loss_mask.sum()) + self.remote_tokens

    @property
    def loss_counts(self) -> tuple[int, ...]:
        """What the terms of the loss are means over, in the whole batch: supervised tokens, or rows and SFT tokens."""
        return (
            (self.supervised_tokens,) if self.answers is None else (len(self.rows), self.answers.sft_tokens)
        )

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


def sorted_batches(examples: Sequence[TokenizedRow], batch_size: int) -> list[list[int]]:
    """Return row indices sorted by length and cut into batches; the last batch may be smaller."""
    order = sorted(range(len(examples)), key=lambda row: examples[row].inputs)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def epoch_batches(
    examples: Sequence[TokenizedRow], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Return one epoch's batches as row indices. Every row is in exactly one batch.

    1. Shuffle the rows, then sort them by rounded length. Rows that pad to the same length stay shuffled. For KTO,
       sort good and bad answers by themselves and mix them evenly, because their lengths may differ.
    2. Cut the sorted rows into batches; the last batch may be smaller.
    3. Shuffle the batches.

    The result depends only on the arguments, so a run can resume at any position.
    """
    rng = np.random.default_rng([seed, epoch])
    order = _mixed(
        examples, sorted(rng.permutation(len(examples)), key=lambda row: rounded_length(examples[row].inputs))
    )
    batches = [[int(row) for row in order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _mixed(examples: Sequence[TokenizedRow], order: Sequence[int]) -> list[int]:
    """Return rows of both labels mixed evenly, each label in the given order."""
    of_label: dict[bool, list[int]] = {}
    for row in order:
        of_label.setdefault(getattr(examples[row], "desirable", True), []).append(row)
    places = [((i + 0.5) / len(rows), row) for rows in of_label.values() for i, row in enumerate(rows)]
    return [row for _, row in sorted(places, key=lambda place: place[0])]


def batches_per_epoch(examples: Sequence[TokenizedRow], batch_size: int, packing: bool = False) -> int:
    """Return the number of batches in an epoch."""
    if packing:
        return len(epoch_packs(examples, batch_size, 0, 0))
    return math.ceil(len(examples) / batch_size)


# --- streams of batches -------------------------------------------------------------------------------------


def training_batches(
    examples: Sequence[TokenizedRow],
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


def first_epoch(
    examples: Sequence[TokenizedRow], batch_size: int, seed: int, packing: bool = False, share: slice = ALL
) -> Iterator[Batch]:
    """Return the batches of the first epoch of `training_batches`, made one by one."""
    batches = training_batches(examples, batch_size, seed, packing, share)
    return itertools.islice(batches, batches_per_epoch(examples, batch_size, packing))


def evaluation_rows(
    examples: Sequence[TokenizedRow], batch_size: int, num_batches: int, seed: int
) -> list[TokenizedRow]:
    """Return the rows of `evaluation_batches`, in their order in `examples`."""
    if not 0 <= num_batches * batch_size < len(examples):
        return list(examples)
    rows = np.sort(np.random.default_rng(seed).permutation(len(examples))[: num_batches * batch_size])
    return [examples[row] for row in rows]


def evaluation_batches(
    examples: Sequence[TokenizedRow], batch_size: int, num_batches: int, seed: int, share: slice = ALL
) -> list[Batch]:
    """Return a fixed set of batches, the same at every call; all rows if `num_batches` is -1.

    A subset of the rows is drawn with the seed, then sorted by length.
    """
    chosen = evaluation_rows(examples, batch_size, num_batches, seed)
    shapes = row_shapes(chosen) if chosen else None
    return [collate(chosen, rows, share, shapes) for rows in sorted_batches(chosen, batch_size)]


# --- arrays -------------------------------------------------------------------------------------------------


def row_shapes(examples: Sequence[TokenizedRow]) -> PaddedShapes:
    """Return the shapes of batches with one row per sequence."""
    lanes = [(example.inputs, int(lane.loss_mask.sum())) for example in examples for lane in example.lanes]
    inputs, supervised = zip(*lanes, strict=True)
    found = _mismatched_rows(examples)
    return replace(fit_shapes(inputs, supervised), mismatched=row_shapes(found) if found else None)


def pack_shapes(examples: Sequence[TokenizedRow], packs: Packs, length: int) -> PaddedShapes:
    """Return the shapes of batches of packs, all padded to one length."""
    supervised = [sum(examples[row].supervised_tokens for row in pack) for pack in packs]
    shapes, mismatched = fit_shapes([length] * len(packs), supervised), None
    if found := _mismatched_rows(examples):
        longest = padded_length(found)
        mismatched = pack_shapes(found, [pack for (pack,) in epoch_packs(found, 1, 0, 0)], longest)
    return replace(shapes, mismatched=mismatched)


def collate(
    examples: Sequence[TokenizedRow],
    rows: Sequence[int],
    share: slice = ALL,
    shapes: PaddedShapes | None = None,
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
    examples: Sequence[TokenizedRow],
    packs: Packs,
    length: int,
    share: slice = ALL,
    shapes: PaddedShapes | None = None,
) -> Batch:
    """Make a batch of packs, each padded to `length`; for the other arguments see `collate`."""
    shapes = shapes or pack_shapes(examples, packs, length)
    return _collate(examples, packs, length, share, shapes, packed=True)


def _collate(
    examples: Sequence[TokenizedRow],
    packs: Packs,
    length: int,
    share: slice,
    shapes: PaddedShapes,
    packed: bool = False,
) -> Batch:
    own = packs[share]
    sequences = [lanes for pack in own for lanes in zip(*(examples[row].lanes for row in pack), strict=True)]
    sequences = sequences or [()]  # a worker without rows
    placed = list(_places(sequences))
    shape = (len(sequences), length)

    def fill(name: str, dtype: Any) -> np.ndarray:
        """Return an array of all lanes as one array [B, L]; lanes without it count as 1 everywhere."""
        array = np.zeros(shape, dtype)
        for at, lane in placed:
            values = getattr(lane, name)
            array[at] = 1 if values is None else values
        return array

    loss_mask = fill("loss_mask", np.float32)
    rows = tuple(int(row) for pack in packs for row in pack)
    own_tokens = int(loss_mask.sum())
    branched = any(lane.branches is not None for _, lane in placed)
    separated = packed or any(lane.segments is not None for _, lane in placed)
    preferences: Any = examples if are_preferences(examples) else None
    return Batch(
        fill("inputs", np.int32),
        fill("targets", np.int32),
        loss_mask,
        fill("token_weights", np.float32),
        rows,
        _segment_ids(placed, shape) if separated else None,
        remote_tokens=sum(examples[row].supervised_tokens for row in rows) - own_tokens,
        loss_capacity=shapes.loss_capacity(own_tokens, len(sequences), length),
        branches=fill("branches", np.int32) if branched else None,
        positions=fill("positions", np.int32) if branched else None,
        answers=preferences
        and collate_answers(
            preferences, own, rows, shape, _mismatched(preferences, own, shapes.mismatched, packed)
        ),
    )


def _places(sequences: Sequence[Sequence[Lane]]) -> Iterator[tuple[tuple[int, slice], Lane]]:
    """Yield each lane with its place in the arrays of a batch."""
    for i, lanes in enumerate(sequences):
        start = 0
        for lane in lanes:
            yield (i, slice(start, start := start + len(lane.inputs))), lane


def _segment_ids(placed: Sequence[tuple[tuple[int, slice], Lane]], shape: tuple[int, int]) -> np.ndarray:
    """Return the numbers of the segments of each sequence, from 1; [B, L]."""
    segment_ids = np.zeros(shape, np.int32)
    for at, lane in placed:
        segment_ids[at] = segment_ids[at[0]].max() + (1 if lane.segments is None else lane.segments)
    return segment_ids


def _mismatched_rows(examples: Sequence[TokenizedRow]) -> list[PreferenceExample]:
    """Return rows of the mismatched answers, with their log-probabilities under the reference."""
    return [
        PreferenceExample((row.mismatched,), reference=row.reference[len(row.answers) :])
        for row in examples
        if isinstance(row, PreferenceExample) and row.mismatched is not None
    ]


def _mismatched(
    examples: Sequence[PreferenceExample], packs: Packs, shapes: PaddedShapes | None, packed: bool
) -> Batch | None:
    """Return the batch of the mismatched answers of a worker's rows."""
    found = _mismatched_rows([examples[row] for pack in packs for row in pack])
    if not found:
        return None
    if not packed or shapes is None:
        return collate(found, range(len(found)), shapes=shapes)
    (own,) = epoch_packs(found, len(found), 0, 0, shapes.lengths[-1])
    return collate_packs(found, own, shapes.lengths[-1], shapes=shapes)
