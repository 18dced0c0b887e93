"""Keep the machine awake."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def keep_awake() -> Iterator[None]:
    """Keep a Mac from going to sleep while the context is open; do nothing on other systems."""
    process = None
    if sys.platform == "darwin":
        # In its own session, Ctrl-C does not reach it. Without streams, it does not keep our output's pipe open.
        streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        command = ["caffeinate", "-i", "-w", str(os.getpid())]
        with suppress(OSError):
            process = subprocess.Popen(command, start_new_session=True, **streams)
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            process.wait()
