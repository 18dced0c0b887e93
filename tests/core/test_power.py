"""The process that keeps a Mac awake, with a stand-in for caffeinate."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

RUN = """
import os, sys, time
from pathlib import Path
from nalora_mlx.core.power import keep_awake

sys.platform, log = "darwin", Path(sys.argv[1])
with keep_awake():
    while not log.exists() or not log.read_text().endswith("\\n"):
        time.sleep(0.01)
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.3)
        ended, _ = os.waitpid(int(log.read_text().split()[0]), os.WNOHANG)
        print("caffeinate is gone" if ended else "caffeinate runs", flush=True)
print("done", flush=True)
"""


@pytest.fixture
def run(tmp_path):
    """Start a process that keeps the machine awake, in a process group of its own; yield it and caffeinate's log."""
    fake, log = tmp_path / "caffeinate", tmp_path / "log"
    fake.write_text(f'#!/bin/sh\necho noise; echo noise >&2\necho "$$ $*" > {log}\nexec sleep 60\n')
    fake.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "ready\n"  # and no noise before it
    yield process, log
    for pid in (process.pid, int(log.read_text().split()[0])):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_caffeinate_survives_ctrl_c_and_ends_with_the_run(run):
    process, log = run
    caffeinate, *arguments = log.read_text().split()
    assert arguments == ["-i", "-w", str(process.pid)]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=30)
    assert output == "caffeinate runs\ndone\n"
    assert process.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(caffeinate), 0)


def test_caffeinate_does_not_hold_the_output_open(run):
    process, _ = run
    process.kill()
    began = time.monotonic()
    assert process.communicate(timeout=30)[0] == ""
    assert time.monotonic() - began < 10


def test_without_caffeinate_nothing_happens(monkeypatch, tmp_path):
    from nalora_mlx.core.power import keep_awake

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    with keep_awake():
        pass
