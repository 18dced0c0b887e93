"""Data-parallel workers that mlx.launch starts: which sequences each one has, and sums over all of them."""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from nalora_mlx.core.errors import InputError


@dataclass(frozen=True)
class Workers:
    """All workers of a run, as one of them sees them; rank 0 alone writes files and speaks."""

    rank: int = 0
    size: int = 1

    @property
    def share(self) -> slice:
        """This worker's sequences of a batch: every size-th."""
        return slice(self.rank, None, self.size)

    def sum(self, tree: Any) -> Any:
        """Sum each array of a tree over all workers, in float32 and returned in its own dtype.

        All arrays go in one message: several of them might leave the workers in different orders. The result has
        the same bits on every worker. The tree must have the same structure and shapes on all.
        """
        if self.size == 1:
            return tree
        arrays = [array for _, array in tree_flatten(tree)]
        joined = mx.concatenate([array.astype(mx.float32).reshape(-1) for array in arrays])
        summed = mx.distributed.all_sum(joined)
        ends = iter(_ends([array.size for array in arrays]))

        def part(array: mx.array) -> mx.array:
            end = next(ends)
            return summed[end - array.size : end].reshape(array.shape).astype(array.dtype)

        return tree_map(part, tree)

    def agree(self, content: Mapping[str, Iterable[Any]]) -> None:
        """Raise InputError unless every worker has the same content: by name, bytes or contiguous NumPy arrays."""
        if self.size == 1:
            return
        sums = [reduce(lambda total, part: zlib.crc32(part, total), parts, 0) for parts in content.values()]
        mine = mx.array(sums, mx.uint32)
        all_of_them = mx.distributed.all_gather(mine[None])  # [workers, names]
        same = np.array(mx.all(all_of_them == mx.min(all_of_them, axis=0), axis=0))
        different = [name for name, equal in zip(content, same, strict=True) if not equal]
        if different:
            raise InputError(
                f"the workers differ in their {' and '.join(different)}; give all of them the same"
            )


ALONE = Workers()


def _ends(sizes: list[int]) -> list[int]:
    ends, total = [], 0
    for size in sizes:
        total += size
        ends.append(total)
    return ends


def workers() -> Workers:
    """The workers that mlx.launch has started, or this process alone."""
    world = mx.distributed.init()
    return Workers(world.rank(), world.size())
