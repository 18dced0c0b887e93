"""A run's batches in accumulation windows, each collated while the one before it is trained on."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from nalora_mlx.data.batches import Batch

Window = list[Batch]  # the batches of one optimizer update


def windows(batches: Iterator[Batch], iterations: int, size: int) -> Iterator[Window]:
    """Cut the batches of a run into accumulation windows; the last one may be shorter."""
    done = 0
    while done < iterations:
        window = list(islice(batches, min(size, iterations - done)))
        done += len(window)
        yield window


def prefetch(items: Iterator[Window]) -> Generator[Window, None, None]:
    """The same windows in the same order, each made in a thread while the one before it is in use.

    What making one raises is raised where it is asked for. Close it, so that the thread ends.
    """
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item
