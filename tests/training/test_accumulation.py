"""Prefetched accumulation windows equal those prepared one by one, and the thread ends with the run."""

import threading
import time
from contextlib import closing
from itertools import islice

import numpy as np
import pytest

from nalora_mlx.data.batches import training_batches
from nalora_mlx.training.accumulation import prefetch, windows
from tests.conftest import build_examples

EXAMPLES = build_examples(11)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("start", [0, 5])
def test_prefetched_windows_equal_unprefetched_ones(packing, start):
    def batches():
        return training_batches(EXAMPLES, 3, 7, packing, start=start)

    prefetched = list(prefetch(windows(batches(), 10, 4)))
    assert [len(window) for window in prefetched] == [4, 4, 2]
    expected = list(islice(batches(), 10))
    for batch, other in zip((b for window in prefetched for b in window), expected, strict=True):
        assert batch.rows == other.rows
        for name in ("inputs", "targets", "loss_mask", "token_mask"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(other, name))


def test_the_next_window_is_prepared_while_one_is_in_use():
    prepared = []

    def prepare():
        for number in range(3):
            prepared.append((number, threading.current_thread()))
            yield [number]

    with closing(prefetch(prepare())) as items:
        assert next(items) == [0]
        deadline = time.monotonic() + 10
        while len(prepared) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert [number for number, _ in prepared] == [0, 1]  # one window ahead, and no more
        assert threading.current_thread() not in [thread for _, thread in prepared]


def test_an_error_is_raised_where_its_window_is_requested():
    def broken():
        yield ["good"]
        raise KeyError("row 7")

    threads = threading.active_count()
    items = prefetch(broken())
    assert next(items) == ["good"]
    with pytest.raises(KeyError, match="row 7"):
        next(items)
    assert threading.active_count() == threads


def first_window(ending=None):
    with closing(prefetch(windows(training_batches(EXAMPLES, 2, 0), 1000, 2))) as prefetched:
        for window in prefetched:
            if ending is not None:
                raise ending
            return window


@pytest.mark.parametrize("ending", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_with_the_run(ending):
    threads = threading.active_count()
    with pytest.raises(ending):
        first_window(ending)
    assert threading.active_count() == threads
    assert len(first_window()) == 2
    assert threading.active_count() == threads
