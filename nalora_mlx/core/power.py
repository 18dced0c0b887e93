"""Keep the machine awake."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def keep_awake() -> Iterator[None]:
    """Keep a Mac from going to sleep while the context is open; do nothing on other systems."""
    process = None
    if sys.platform == "darwin":
        with suppress(OSError):
            process = subprocess.Popen(["caffeinate", "-i", "-w", str(os.getpid())])
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
