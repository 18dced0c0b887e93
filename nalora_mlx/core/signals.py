"""Ctrl-C, SIGTERM, a closed terminal: once asks to stop after the step that runs, twice ends the process at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS: dict[int, str] = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "hung up",
}


class Stopped(BaseException):
    """A signal ended the command: its number, and what to say of it. The exit status is 128 + number."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class StopRequest:
    """The first signal that came, or None."""

    number: int | None = None

    def __call__(self) -> bool:
        """Whether to stop after this step."""
        return self.number is not None


@contextmanager
def stoppable(first: Callable[[int], None], second: Callable[[int], None]) -> Iterator[StopRequest]:
    """Let a signal wait for the step that runs, and a second one end the process at once.

    Python looks at signals between its own operations only, which a long evaluation has none of, and it merges
    those of one kind. So the numbers come through a pipe to a thread, as they arrive.

    Args:
        first: called in that thread at the first signal.
        second: called in that thread before the process ends with status 128 + number, without any clearing up.
    """
    request = StopRequest()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while byte := os.read(reading, 1):
            number = byte[0]
            if number not in SIGNALS:
                continue
            if request.number is None:
                request.number = number
                first(number)
                continue
            try:
                second(number)
                if sys.stdout.isatty():
                    os.write(sys.stdout.fileno(), b"\x1b[?25h")  # a progress bar hides the cursor
            finally:
                os._exit(128 + number)

    # What is ignored stays so: nohup, or a job that a shell put into the background.
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda *_: None) for number in heard}
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writing)
        thread.join()
        os.close(reading)
