"""Events of a training run, and the listeners that receive them."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from nalora_mlx.core.errors import first_line

# Receives {"event": KIND, ...}; KIND is start, reference, step, validating, metrics, notice, saving, saved or end.
Listener = Callable[[dict[str, Any]], None]


class Events:
    """Sends events to listeners. A listener that raises is dropped, and the run goes on."""

    def __init__(self, listeners: Sequence[Listener] = ()):
        self.listeners = list(listeners)

    def send(self, event: str, **content: Any) -> None:
        """Send one event to all listeners."""
        for listener in list(self.listeners):
            try:
                listener({"event": event, **content})
            except Exception as error:
                self.listeners.remove(listener)
                name = getattr(listener, "name", None) or getattr(
                    listener, "__name__", type(listener).__name__
                )
                # Printed rather than sent: the display itself may be what failed.
                print(
                    f"note: {name} failed ({type(error).__name__}: {first_line(error)}); the run goes on without it",
                    file=sys.stderr,
                )
