"""Locks that let only one run at a time write to a directory.

The lock is an advisory `flock` on the directory itself. The system releases it when the process ends, however it ends,
and no lock file is left behind.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.storage import make_directory

TIMEOUT = 0.5  # seconds; `is_locked` holds the lock for an instant
POLL_INTERVAL = 0.025


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Make a directory if it is missing, and hold its lock.

    Raises:
        InputError: another process holds the lock.
    """
    make_directory(directory)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise InputError(f"{directory}: another run is writing there; choose another directory")
            time.sleep(POLL_INTERVAL)
        yield
    finally:
        os.close(descriptor)


def is_locked(directory: Path) -> bool:
    """Return whether a process holds the lock of a directory; False if the directory does not exist."""
    if not directory.is_dir():
        return False
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)  # shared, so that several processes can look at once
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    """Lock an open directory without waiting. Return False if another process holds the lock."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # the file system has no locks
    return True
