"""Data-parallel workers that mlx.launch starts: their shares of a batch, and sums over all of them."""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from nalora_mlx.core.errors import InputError


@dataclass(frozen=True)
class Workers:
    """The workers of a run, seen from one of them. Rank 0 alone writes files and prints."""

    rank: int = 0
    size: int = 1

    @property
    def share(self) -> slice:
        """This worker's sequences of a batch: every size-th one."""
        return slice(self.rank, None, self.size)

    def sum(self, tree: Any) -> Any:
        """Sum each array of a tree over all workers, in float32, and return it in its own dtype.

        All arrays travel in one message, because several messages might leave the workers in different orders. Every
        worker gets the same bits. The tree must have the same structure and shapes on all workers; None stays None.
        """
        if self.size == 1:
            return tree
        arrays = [array for _, array in tree_flatten(tree) if array is not None]
        joined = mx.concatenate([array.astype(mx.float32).reshape(-1) for array in arrays])
        summed = mx.distributed.all_sum(joined)
        ends = accumulate(array.size for array in arrays)

        def part(array: mx.array | None) -> mx.array | None:
            if array is None:
                return None
            end = next(ends)
            return summed[end - array.size : end].reshape(array.shape).astype(array.dtype)

        return tree_map(part, tree)

    def any(self, condition: bool) -> bool:
        """Return whether the condition holds on any worker. Several workers wait for one another."""
        return condition if self.size == 1 else bool(self.sum(mx.array(float(condition))).item())

    def agree(self, content: Mapping[str, Iterable[Any]]) -> None:
        """Raise InputError unless all workers have the same content.

        Args:
            content: what to compare, by the name for the error: bytes or contiguous NumPy arrays.
        """
        if self.size == 1:
            return
        sums = [reduce(lambda total, part: zlib.crc32(part, total), parts, 0) for parts in content.values()]
        mine = mx.array(sums, mx.uint32)
        gathered = mx.distributed.all_gather(mine[None])  # [workers, names]
        same = np.array(mx.all(gathered == mx.min(gathered, axis=0), axis=0))
        different = [name for name, equal in zip(content, same, strict=True) if not equal]
        if different:
            raise InputError(
                f"the workers have different {' and '.join(different)}; start all of them with the same"
            )


ALONE = Workers()


def workers() -> Workers:
    """Return the workers that mlx.launch started, or this process alone."""
    world = mx.distributed.init()
    return Workers(world.rank(), world.size())
