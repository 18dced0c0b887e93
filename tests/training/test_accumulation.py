"""Windows that are made ahead are those that would be made one by one, and their thread ends with the run."""

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
def test_they_are_the_same_in_the_same_order(packing, start):
    def batches():
        return training_batches(EXAMPLES, 3, 7, packing, start=start)

    made = list(prefetch(windows(batches(), 10, 4)))
    assert [len(window) for window in made] == [4, 4, 2]
    wanted = list(islice(batches(), 10))
    for batch, other in zip((b for window in made for b in window), wanted, strict=True):
        assert batch.rows == other.rows
        for name in ("inputs", "targets", "supervised", "real"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(other, name))


def test_the_next_one_is_made_while_one_is_in_use():
    made = []

    def slow():
        for number in range(3):
            made.append((number, threading.current_thread()))
            yield [number]

    with closing(prefetch(slow())) as windows:
        assert next(windows) == [0]
        deadline = time.monotonic() + 10
        while len(made) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert [number for number, _ in made] == [0, 1]  # one prefetch, and no more
        assert threading.current_thread() not in [thread for _, thread in made]


def test_what_goes_wrong_is_raised_where_the_window_is_asked_for():
    def broken():
        yield ["good"]
        raise KeyError("row 7")

    threads = threading.active_count()
    made = prefetch(broken())
    assert next(made) == ["good"]
    with pytest.raises(KeyError, match="row 7"):
        next(made)
    assert threading.active_count() == threads


def first_window(ending=None):
    with closing(prefetch(windows(training_batches(EXAMPLES, 2, 0), 1000, 2))) as made:
        for window in made:
            if ending is not None:
                raise ending
            return window


@pytest.mark.parametrize("ending", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_with_its_run(ending):
    threads = threading.active_count()
    with pytest.raises(ending):
        first_window(ending)
    assert threading.active_count() == threads
    assert len(first_window()) == 2
    assert threading.active_count() == threads
