"""Ctrl-C and SIGTERM, once and twice, on a run in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nalora_mlx import checkpoint
from nalora_mlx.resume import read_state


def start(model_directory, data_directory, output, *flags):
    """A run that has begun to train."""
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", output]
    process = subprocess.Popen(
        [sys.executable, "-m", "nalora_mlx.lora", "--train", *map(str, where), "--iters", "100000", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A shell starts what it puts into the background with SIGINT ignored, and that would be inherited.
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
        (signal.SIGHUP, 129, "hung up"),
    ],
)
def test_once_saves_and_says_how_to_go_on(number, status, word, model_directory, data_directory, tmp_path):
    output = tmp_path / "a"
    process = start(model_directory, data_directory, output, "--grad-accumulation-steps", "4")
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == status
    (line,) = errors.splitlines()
    assert line.startswith(f"nalora lora: {word}: stopped at iteration ")
    assert line.endswith(f"saved in {output}; the same command with --resume goes on from there")
    assert "finishing this update and saving; once more ends the run at once" in said
    (step,) = checkpoint.steps(output / "checkpoints")
    assert f"stopped at iteration {step}," in line
    assert step % 4 == 0  # an update was finished
    progress = read_state(output / "checkpoints" / f"step-{step:07d}").progress
    assert progress.updates == step // 4
    steps = [json.loads(text).get("step") for text in (output / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) <= step


def test_twice_ends_at_once_and_the_last_checkpoint_is_whole(model_directory, data_directory, tmp_path):
    """The update that runs would take very long; the checkpoint is that of an earlier one."""
    output = tmp_path / "a"
    flags = ["--grad-accumulation-steps", "5", "--save-every", "5", "--steps-per-report", "5"]
    process = start(model_directory, data_directory, output, *flags)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    (before,) = checkpoint.steps(output / "checkpoints")
    flags[1] = "50000"
    resumed = start(
        model_directory,
        data_directory,
        output,
        *flags,
        "--steps-per-report",
        "10",
        "--resume",
        "--resume-anyway",
    )
    resumed.send_signal(signal.SIGINT)
    assert "finishing this update" in resumed.stdout.readline() + resumed.stdout.readline()
    time.sleep(0.2)
    assert resumed.poll() is None
    tic = time.monotonic()
    resumed.send_signal(signal.SIGINT)
    _, errors = resumed.communicate(timeout=60)
    assert resumed.returncode == 130
    assert time.monotonic() - tic < 10
    assert errors == (
        f"nalora lora: interrupted: ended at once; the checkpoint of iteration {before} is whole; "
        "the same command with --resume goes on from there\n"
    )
    assert list(checkpoint.steps(output / "checkpoints")) == [before]
    read_state(output / "checkpoints" / f"step-{before:07d}")


def test_a_signal_before_training_ends_the_command(model_directory, data_directory, tmp_path):
    """While the validation before the first update runs, there is nothing to save."""
    output = tmp_path / "a"
    code = (
        "import os, signal, sys\n"
        "from nalora_mlx import run\n"
        "evaluate = run.evaluate\n"
        "run.evaluate = lambda *a: (os.kill(os.getpid(), signal.SIGTERM), evaluate(*a))[1]\n"
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


def test_what_is_ignored_stays_so(model_directory, data_directory, tmp_path):
    """nohup: the run goes on when its terminal closes."""
    from nalora_mlx.signals import stoppable

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
