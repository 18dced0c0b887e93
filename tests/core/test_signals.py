"""One and two signals sent to a run in a separate process."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nalora_mlx.runs import checkpoints
from nalora_mlx.runs.resume import read_state


def start(model_directory, data_directory, output, *flags):
    """Start a run and wait until it trains."""
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", output]
    process = subprocess.Popen(
        [sys.executable, "-m", "nalora_mlx.lora", "--train", *map(str, where), "--iters", "100000", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if "iteration" in line and ": loss" in line:
            return process
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        pytest.param(signal.SIGHUP, 129, "hung up", marks=pytest.mark.slow),
    ],
)
def test_the_first_signal_saves_and_says_how_to_resume(
    number, status, word, model_directory, data_directory, tmp_path
):
    output = tmp_path / "a"
    process = start(model_directory, data_directory, output, "--grad-accumulation-steps", "4")
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == status
    (line,) = errors.splitlines()
    assert line.startswith(f"nalora lora: {word}: stopped at iteration ")
    assert line.endswith(
        f"saved in {output}; nalora lora --resume --adapter-path {output} continues from there"
    )
    assert "finishing this update and saving; once more ends the run at once" in said
    (step,) = checkpoints.steps(output / "checkpoints")
    assert f"stopped at iteration {step}," in line
    assert step % 4 == 0  # the current update was finished
    progress = read_state(output / "checkpoints" / f"step-{step:07d}").progress
    assert progress.updates == step // 4
    steps = [json.loads(text).get("step") for text in (output / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) <= step


def read_until(process, words):
    """Read the output of a run up to a line with these words."""
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(process.stderr.read())


def kill_at_once(process, output):
    """Send the second signal; return exit status, stderr and the checkpoints."""
    assert process.poll() is None
    process.send_signal(signal.SIGINT)  # so soon, it is the first one once more
    time.sleep(1)
    assert process.poll() is None
    tic = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - tic < 30  # what it is doing would take longer
    return process.returncode, errors, list(checkpoints.steps(output / "checkpoints"))


def test_the_second_signal_ends_the_run_at_once(model_directory, data_directory, tmp_path):
    """The current update would take very long. The last checkpoint is from before it."""
    output = tmp_path / "a"
    flags = ["--save-every", "5", "--steps-per-report", "5", "--keep-last", "1"]
    process = start(model_directory, data_directory, output, *flags)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    (before,) = checkpoints.steps(output / "checkpoints")
    again = ["--grad-accumulation-steps", "50000", "--resume", "--resume-anyway"]
    resumed = start(model_directory, data_directory, output, *flags, *again)
    resumed.send_signal(signal.SIGINT)
    read_until(resumed, "finishing this update")
    status, errors, steps = kill_at_once(resumed, output)
    assert status == 130
    assert errors == (
        f"nalora lora: interrupted: ended at once; the checkpoint of iteration {before} is complete; "
        f"nalora lora --resume --adapter-path {output} continues from there\n"
    )
    assert steps == [before]
    read_state(output / "checkpoints" / f"step-{before:07d}")


def patched(code, model_directory, data_directory, output, *flags):
    """Start a run in a process that first executes some code."""
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", output]
    program = f"{code}\nimport sys\nfrom nalora_mlx.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-u", "-c", program, "lora", "--train", *map(str, where), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


SLOW = """
import time
from nalora_mlx.core import storage
flush, saves = storage.flush, []
def slow(path):
    flush(path)
    if path.name == "training_state.json" and saves:
        print("in the middle of a save", flush=True)
        time.sleep(600)
    saves.extend([1] if path.name == "training_state.json" else [])
storage.flush = slow
"""


def test_a_second_signal_during_a_save_keeps_the_previous_checkpoint(
    model_directory, data_directory, tmp_path
):
    output = tmp_path / "a"
    flags = ["--iters", "100000", "--save-every", "2", "--val-batches", "1"]
    process = patched(SLOW, model_directory, data_directory, output, *flags)
    read_until(process, "in the middle of a save")
    process.send_signal(signal.SIGINT)
    read_until(process, "finishing this update")
    status, errors, steps = kill_at_once(process, output)
    assert status == 130
    assert "ended at once; the checkpoint of iteration 2 is complete" in errors
    assert steps == [2]
    read_state(output / "checkpoints" / "step-0000002")
    # The incomplete directory is not a checkpoint, and the next start removes it.
    assert any(name.name.endswith(".new") for name in (output / "checkpoints").iterdir())
    done = patched(
        "", model_directory, data_directory, output, "--iters", "4", "--val-batches", "1", "--resume"
    )
    _, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "step-0000002",
        "step-0000004",
    ]


def test_a_stop_that_cannot_save_fails(model_directory, data_directory, tmp_path):
    """The exit status is 1, not that of a run that stopped and saved."""
    code = """
import os, signal
from nalora_mlx.core import storage
from nalora_mlx.training import run
write, update = storage.write_directory, run.Run.update
def full(path, files):
    if path.name != "step-0000002":
        raise OSError(28, "No space left on device")
    write(path, files)
def stopping(self, window, iterations):
    update(self, window, iterations)
    if iterations[-1] == 3:
        os.kill(os.getpid(), signal.SIGINT)
        while not self.stop():
            pass
storage.write_directory, run.Run.update = full, stopping
"""
    process = patched(
        code, model_directory, data_directory, tmp_path / "a", "--save-every", "2", "--val-batches", "1"
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    (line,) = errors.splitlines()
    assert line.startswith("nalora lora: failed: the end of the run could not be saved in")
    assert (
        "(No space left on device); the last complete checkpoint is iteration 2; free some disk space" in line
    )
    assert list(checkpoints.steps(tmp_path / "a" / "checkpoints")) == [2]


def test_a_signal_before_training_ends_the_command(model_directory, data_directory, tmp_path):
    """During the validation before the first update, there is nothing to save."""
    output = tmp_path / "a"
    code = (
        "import os, signal, sys\n"
        "from nalora_mlx.training import validation\n"
        "evaluate = validation.evaluate\n"
        "validation.evaluate = lambda *a: (os.kill(os.getpid(), signal.SIGTERM), evaluate(*a))[1]\n"
        "from nalora_mlx.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", output]
    done = subprocess.run(
        [sys.executable, "-c", code, "lora", "--train", *map(str, where)], capture_output=True, text=True
    )
    assert done.returncode == 143, done.stderr
    assert done.stderr == "nalora lora: terminated: stopped before the first update\n"
    assert not (output / "checkpoints").exists()


def test_ignored_signals_stay_ignored():
    """A run under nohup goes on when its terminal closes."""
    from nalora_mlx.core.signals import stoppable

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable(lambda _: None, lambda _: None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert not stop()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            assert stop.number == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)
