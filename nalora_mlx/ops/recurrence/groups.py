"""The share of their usual size that groups of tokens have, which the memory planner's trials lower."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_share: ContextVar[float] = ContextVar("group_share", default=1.0)


@contextmanager
def smaller_groups(share: float) -> Iterator[None]:
    """Compute recurrences in groups of this share of their usual size, at least one chunk, with the same results."""
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


def group_share() -> float:
    """Return the share that `smaller_groups` sets, or 1."""
    return _share.get()
