"""Accumulation windows: the batches of one optimizer update, prepared while the previous window trains."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from nalora_mlx.data.batches import Batch

Window = list[Batch]


def windows(batches: Iterator[Batch], iterations: int, size: int) -> Iterator[Window]:
    """Cut the batches of a run into accumulation windows; the last one may be shorter."""
    done = 0
    while done < iterations:
        window = list(islice(batches, min(size, iterations - done)))
        done += len(window)
        yield window


def prefetch(items: Iterator[Window]) -> Generator[Window, None, None]:
    """Yield the same windows, each prepared in a thread while the previous one is in use.

    An exception raised while a window is prepared is raised when that window is requested. Close the generator to end
    the thread.
    """
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item
