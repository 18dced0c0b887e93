"""Packing: several rows in one sequence, so that little of a batch is padding."""

import bisect
from collections.abc import Sequence

import numpy as np

from nalora_mlx.data.padding import padded_length
from nalora_mlx.data.preferences import TokenizedRow


def epoch_packs(
    examples: Sequence[TokenizedRow], batch_size: int, seed: int, epoch: int, capacity: int | None = None
) -> list[list[list[int]]]:
    """Return one epoch's batches of packs, each pack a list of row indices. Every row is in exactly one pack.

    Best fit, longest first:

    1. Shuffle the rows, then sort them by length, longest first. Rows of equal length stay shuffled.
    2. Put each row into the pack with the least free space that still holds it, or else into a new pack. A pack holds
       `capacity` inputs, or as many as the longest row, rounded up.
    3. Shuffle the packs and cut them into batches; the last batch may be smaller.

    The result depends only on the arguments, and the number of packs is the same in every epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = sorted(rng.permutation(len(examples)), key=lambda row: -examples[row].inputs)
    capacity = capacity or padded_length(examples)
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free space, index of the pack), ascending; full packs are not listed
    for row in order:
        needed = examples[row].inputs
        at = bisect.bisect_left(free, (needed, -1))
        if at < len(free):
            space, pack = free.pop(at)
        else:
            space, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(int(row))
        if space > needed:
            bisect.insort(free, (space - needed, pack))
    shuffled = [packs[i] for i in rng.permutation(len(packs))]
    return [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
