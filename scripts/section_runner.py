"""Run the sections of a check, each in a process of its own with its own time limit. For gpu_check.py and mac_check.py.

A section prints each result as a line of JSON, `[name, value]`. If it fails or takes too long, what it found so far is
kept, and the others run.
"""

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHORTEST = 5.0  # seconds; a section does not start with less time left


@dataclass
class Section:
    """One process, and what it found.

    Attributes:
        name: in the results.
        command: program and arguments.
        limit: seconds it may take.
        environment: variables to set.
        found: results by name.
        errors: end of what it wrote to standard error.
        status: "ok", "failed", "too slow" or "not run".
        seconds: time it took.
    """

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    errors: str = ""
    status: str = "not run"
    seconds: float = 0.0

    @property
    def wrong(self) -> list[str]:
        """Names of results that show an error."""
        results = ((name, value) for name, value in self.found.items() if isinstance(value, dict))
        return [name for name, value in results if value.get("error") or value.get("ok") is False]

    @property
    def passed(self) -> bool:
        """Whether it ended well and found nothing wrong."""
        return self.status == "ok" and not self.wrong

    def record(self) -> dict[str, Any]:
        """Return what to write about it."""
        record = {"status": self.status, "seconds": round(self.seconds, 1), "results": self.found}
        if self.errors and self.status != "ok":
            record["errors"] = self.errors
        return record


class _Process:
    """A section's process and its output."""

    def __init__(self, section: Section):
        self.section, self.buffer, self.is_open = section, "", True
        self.started = time.monotonic()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, **section.environment}
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in `end`
        self.process = subprocess.Popen(
            section.command,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.stdout = self.process.stdout
        os.set_blocking(self.stdout.fileno(), False)

    def read(self) -> None:
        """Take the results that it printed since the last call."""
        text = self.stdout.read()
        if text == "":
            self.is_open = False
        *lines, self.buffer = (self.buffer + (text or "")).split("\n")
        for line in lines:
            if line.startswith("["):
                name, value = json.loads(line)
                self.section.found[name] = value

    def ended(self, deadline: float) -> bool:
        """Return whether it has ended. Ends it once its time is up."""
        section, now = self.section, time.monotonic()
        if self.process.poll() is not None and not self.is_open:
            section.status = "ok" if self.process.returncode == 0 else "failed"
        elif now > min(self.started + section.limit, deadline):
            os.killpg(self.process.pid, signal.SIGKILL)  # with the programs that it started
            self.process.wait()
            section.status = "too slow"
        else:
            return False
        section.seconds = now - self.started
        with self.log as log:
            log.seek(0)
            section.errors = log.read()[-3000:]
        return True


def run_sections(
    sections: Sequence[Section],
    seconds: float,
    at_once: int = 1,
    ended: Callable[[Section], None] = lambda _: None,
) -> None:
    """Run sections in order, some of them at the same time, until the time is up.

    Args:
        sections: the most important first.
        seconds: time for all of them.
        at_once: number of processes at the same time.
        ended: called when a section ends, and for each that did not start.
    """
    deadline = time.monotonic() + seconds
    waiting, running = list(sections), dict[Any, _Process]()
    with selectors.DefaultSelector() as selector:
        while waiting or running:
            while waiting and len(running) < at_once:
                section = waiting.pop(0)
                if deadline - time.monotonic() < SHORTEST:
                    ended(section)
                    continue
                process = _Process(section)
                running[process.stdout] = process
                selector.register(process.stdout, selectors.EVENT_READ)
            open_outputs = selector.get_map()
            if open_outputs:
                for key, _ in selector.select(timeout=0.25):
                    running[key.fileobj].read()
                    if not running[key.fileobj].is_open:
                        selector.unregister(key.fileobj)
            else:
                time.sleep(0.05)
            for stdout, process in list(running.items()):
                if process.ended(deadline):
                    if process.is_open:
                        selector.unregister(stdout)
                    stdout.close()
                    del running[stdout]
                    ended(process.section)


def package_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
