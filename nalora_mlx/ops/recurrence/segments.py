"""The row boundaries of a packed batch, where recurrences reset their state."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx

_current: ContextVar[mx.array | None] = ContextVar("segment_ids", default=None)


@contextmanager
def packed_rows(segment_ids: mx.array | None) -> Iterator[None]:
    """Make recurrences reset their state wherever `segment_ids`, [B, L], change. None: each sequence is one row.

    Keep the context open for the backward pass, where checkpointed layers are recomputed.
    """
    token = _current.set(segment_ids)
    try:
        yield
    finally:
        _current.reset(token)


def current_segment_ids() -> mx.array | None:
    """Return the segment ids [B, L] of the current batch; None if it is not packed."""
    return _current.get()


def row_starts() -> mx.array | None:
    """Return [B, L], True at the first position of each packed row; None if the batch is not packed."""
    ids = _current.get()
    if ids is None:
        return None
    changes = ids[:, 1:] != ids[:, :-1]
    return mx.concatenate([mx.ones((ids.shape[0], 1), mx.bool_), changes], axis=1)
