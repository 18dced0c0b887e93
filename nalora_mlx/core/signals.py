"""Handling of Ctrl-C, SIGTERM and SIGHUP.

In a run, the first signal stops it after the current step, and the second ends the process (`stoppable`). In commands
that have nothing to save, the first signal ends the process (`ending_at_once`).
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

SIGNALS: dict[int, str] = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "hung up",
}


SAME_PRESS = 0.5  # seconds within which a signal that comes again was sent twice, as by timeout --foreground


class Stopped(BaseException):
    """A signal ended the command. The exit status is 128 + its number."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class StopRequest:
    """The first signal received, or None."""

    number: int | None = None

    def __call__(self) -> bool:
        """Return whether to stop after the current step."""
        return self.number is not None


@contextmanager
def stoppable(first: Callable[[int], None], second: Callable[[int], None]) -> Iterator[StopRequest]:
    """Turn the first signal into a request to stop, and let the second one end the process at once.

    Args:
        first: called in another thread on the first signal.
        second: called in that thread on the second signal, before the process ends with status 128 + its number,
            without cleanup. The same signal within SAME_PRESS seconds does not count: launchers that pass signals on
            send it twice.
    """
    request, requested = StopRequest(), 0.0

    def receive(number: int) -> None:
        nonlocal requested
        if request.number is None:
            request.number, requested = number, time.monotonic()
            first(number)
        elif number != request.number or time.monotonic() - requested > SAME_PRESS:
            _end(number, second)

    with _receiving(receive):
        yield request


@contextmanager
def ending_at_once(last: Callable[[int], None]) -> Iterator[None]:
    """Let the first signal end the process at once, with status 128 + its number and without cleanup.

    Args:
        last: called in another thread before the process ends.
    """
    with _receiving(lambda number: _end(number, last)):
        yield


@contextmanager
def _receiving(receive: Callable[[int], None]) -> Iterator[None]:
    """Call a function in a thread with the number of each signal.

    Python runs signal handlers only between its own operations, never during a long MLX evaluation, and merges signals
    of the same kind. So the signal numbers go through a pipe to the thread, which receives each of them immediately.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while byte := os.read(reading, 1):
            if byte[0] in SIGNALS:
                receive(byte[0])

    # Signals that are ignored stay ignored, as under nohup or in a background job of a shell.
    handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda *_: None) for number in handled}
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writing)
        thread.join()
        os.close(reading)


def _end(number: int, last: Callable[[int], None]) -> NoReturn:
    try:
        last(number)
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\x1b[?25h")  # show the cursor, which a progress bar hides
    finally:
        os._exit(128 + number)
