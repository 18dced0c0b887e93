"""Length-sorted or packed batches: every row once an epoch, little padding, the same rows at every validation."""

import bisect
from collections.abc import Sequence

import numpy as np

from nalora_mlx.data.padding import padded_length
from nalora_mlx.data.tokenization import Example


def epoch_packs(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """The batches of one epoch in their order, each of packs that are filled up to the longest row's length.

    Rows are taken from the longest to the shortest, those of one length drawn anew for each epoch, and each goes
    where the least room is left. A pure function of its arguments, as `epoch_batches` is; the number of packs is the
    same in every epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = sorted(rng.permutation(len(examples)), key=lambda row: -examples[row].inputs)
    length = padded_length(examples)
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # left in each pack, with its number, in rising order
    for row in order:
        needed = examples[row].inputs
        at = bisect.bisect_left(room, (needed, -1))
        left, pack = room.pop(at) if at < len(room) else (length, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(int(row))
        if left > needed:
            bisect.insort(room, (left - needed, pack))
    shuffled = [packs[i] for i in rng.permutation(len(packs))]
    return [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
