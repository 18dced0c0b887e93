"""The commands that the end of a training shows: their flags, and that they can be copied."""

import io
import re
import shlex

import pytest
from rich.console import Console

from nalora_mlx.cli import command
from nalora_mlx.core.config import RunConfig
from nalora_mlx.runs.display import Display
from nalora_mlx.runs.next_steps import next_steps
from nalora_mlx.runs.progress import TrainResult


def result(last=2.0, best=2.0, **changes):
    return TrainResult(
        8,
        8,
        100,
        9.0,
        2.0,
        first_valid_loss=3.0,
        valid_loss=last,
        best_valid_loss=best,
        best_iteration=4,
        **changes,
    )


def commands(config, *args):
    return [shlex.join(words) for _, words in next_steps(config, *args)]


def test_the_next_steps_name_model_and_adapter():
    config = RunConfig(model="org/a", adapter_path="my adapters")
    model = "--model org/a --adapter-path 'my adapters'"
    assert commands(config, result()) == [
        f"nalora chat {model}",
        f"nalora chat {model} --compare",
        "nalora report 'my adapters' --open",
        f"nalora evaluate {model}",
        f"nalora fuse {model}",
    ]
    text = {"text": "It was a dark\n  and stormy night"}
    assert commands(RunConfig(trust_remote_code=True), result(), [text])[0] == (
        "nalora generate --model Qwen/Qwen3-0.6b --adapter-path adapters --trust-remote-code "
        "--prompt 'It was a dark and stormy night'"
    )
    assert commands(config, result(), [{"messages": []}])[0] == f"nalora chat {model}"
    tested = RunConfig(model="org/a", adapter_path="my adapters", test=True)
    assert commands(tested, result(None, None))[3] == f"nalora evaluate {model}"
    assert not any("evaluate" in line for line in commands(config, result(None, None)))


def test_every_next_step_is_a_command_with_these_flags():
    config = RunConfig(trust_remote_code=True)
    for prompts in ([], [{"text": "a"}]):
        for _, (program, name, *flags) in next_steps(config, result(), prompts):
            assert program == "nalora"
            command(name).build_parser(name).parse_args(flags)


@pytest.mark.parametrize(
    ("last", "best", "path"),
    [(2.0, 2.0, "a"), (2.0, 1.99, "a"), (2.0, 1.9, "a/best"), (None, 1.9, "a/best"), (2.0, None, "a")],
)
def test_a_clearly_better_adapter_is_suggested(last, best, path):
    found = commands(RunConfig(model="m", adapter_path="a"), result(last, best))
    assert found[0] == f"nalora chat --model m --adapter-path {path}"
    assert found[2] == "nalora report a --open"


@pytest.mark.parametrize("width", [80, 140])
def test_commands_can_be_copied_from_a_terminal(width):
    """Whatever the width, a shell reads them as they are meant."""
    config = RunConfig(model="an organization/Some-Model-4B-Instruct-2507-4bit-DWQ", adapter_path="runs/it's")
    steps = next_steps(config, result())
    out = io.StringIO()
    with Display(Console(file=out, width=width, force_terminal=True, color_system=None)) as display:
        display.next_steps(steps)
    lines = out.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    names = [line.split()[0] for line in lines if re.match(r"  \w", line)]
    assert names == [name for name, _ in steps]
    script = re.sub(r"(?m)^  \w+ +", "", out.getvalue().partition("next:")[2])
    assert [shlex.split(line) for line in script.replace("\\\n", " ").strip().splitlines()] == [
        words for _, words in steps
    ]
    if width == 80:
        assert "\\\n" in script


def test_piped_commands_stay_on_one_line():
    out = io.StringIO()
    with Display(Console(file=out, width=40)) as display:
        display.next_steps(next_steps(RunConfig(model="m" * 60), result()))
    assert (
        out.getvalue().splitlines()[2]
        == f"  chat      nalora chat --model {'m' * 60} --adapter-path adapters"
    )
