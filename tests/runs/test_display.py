"""The display of a run: the exact plain lines, and the final screen of a terminal."""

import io
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nalora_mlx.core.terminal import has_colors, marked_text
from nalora_mlx.runs.display import Display
from nalora_mlx.runs.progress import Progress
from nalora_mlx.runs.status import Status, duration, sparkline, trend

START = {"event": "start", "iterations": 100, "done": 0}


def report(step, loss, **changes):
    event = {
        "event": "metrics",
        "split": "train",
        "step": step,
        "loss": loss,
        "tokens": 40 * step,
        "tokens_per_second": 1234.4,
        "iterations_per_second": 0.5,
        "learning_rate": 1e-5,
        "peak_memory_gb": 3.2,
        "layers": {"a": {"misalignment": 0.1}, "b": {"misalignment": 0.3}, "c": {"mask": 1.0}},
    }
    return event | changes


def validation(step, loss, best):
    event = {"event": "metrics", "split": "valid", "step": step, "loss": loss, "best_loss": best}
    return event | {"tokens": 100, "seconds": 2.04}


EVENTS = [
    START,
    {"event": "validating", "batch": 1, "batches": 2},
    {"event": "validating", "batch": 2, "batches": 2},
    validation(0, 3.0, None),
    {"event": "step", "step": 1, "iterations": 100},
    report(10, 2.5),
    validation(10, 2.25, 2.25),
    report(20, 2.0, learning_rate=None, layers={}),
    validation(20, 2.5, 2.25),
    {"event": "saved", "step": 20, "path": "adapters/checkpoints/step-0000020"},
    {"event": "notice", "text": "[bold] is not markup"},
]
LINES = """\
validating the model on 2 batches
iteration   0/100: validation loss 3.0000, 2.0 s
iteration  10/100: loss 2.5000, lr 1.00e-05, 1234 tokens/s, 3.20 GB, 0:03:00 left
iteration  10/100: validation loss 2.2500 (best), 2.0 s
iteration  20/100: loss 2.0000, 1234 tokens/s, 3.20 GB, 0:02:40 left
iteration  20/100: validation loss 2.5000, 2.0 s
iteration 20: saved to adapters/checkpoints/step-0000020
note: [bold] is not markup
"""


def show(events, console, limit=16e9):
    with Display(console) as display:
        display.status.memory_limit = limit and int(limit)
        for event in events:
            display(event)
    return display


def test_plain_lines_when_piped():
    out = io.StringIO()
    show(EVENTS, Console(file=out, width=40))
    assert out.getvalue() == LINES


def screen(text):
    """Return the lines that a terminal shows at the end; interprets the escape sequences that rich uses."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part[0] == "\x1b":
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] not in "\x1b\r":
            lines[row] += part
    return [line.rstrip() for line in lines if line.strip()]


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from tests.runs.test_display import EVENTS, show
show(EVENTS, None)
"""


def on_a_terminal(**environment):
    """Return the output of a program that shows the events on a terminal with 100 columns."""
    leader, follower = pty.openpty()
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")}
    settings = {**kept, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(tests=os.getcwd())],
        stdout=follower,
        stderr=follower,
        env=settings,
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # end of output, on Linux
            piece = b""
        if not piece:
            break
        seen += piece
    os.close(leader)
    assert process.wait() == 0, seen.decode()
    return seen.decode()


def test_a_terminal_shows_the_bar_and_the_status():
    seen = on_a_terminal()
    lines = screen(seen)
    assert lines[:5] == [
        "iteration   0/100: validation loss 3.0000, 2.0 s",
        "iteration  10/100: validation loss 2.2500 (best), 2.0 s",
        "iteration  20/100: validation loss 2.5000, 2.0 s",
        "iteration 20: saved to adapters/checkpoints/step-0000020",
        "note: [bold] is not markup",
    ]
    assert re.fullmatch(r"training [━╸╺ ]+ 1/100( \S+ left)?", lines[5])
    assert [" ".join(line.split()) for line in lines[6:]] == [
        "loss 2.0000 █▁ from 2.5000",
        "validation 2.5000 best 2.2500 at iteration 10",
        "learning rate none",
        "speed 1,234 tokens/s, 2.0 s per iteration",
        "memory 3.20 of 16.0 GB (20%)",
    ]
    assert "\x1b[36m" in seen  # cyan
    assert "\x1b[?25h" in seen[seen.rindex("\x1b[?25l") :]  # the cursor is shown again


def test_no_color_is_respected():
    seen = on_a_terminal(NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38|48)[0-9;]*m", seen)
    colored = screen(on_a_terminal())
    assert [line for line in screen(seen) if "training" not in line] == [
        line for line in colored if "training" not in line
    ]
    assert not has_colors(Console(force_terminal=True, color_system="standard", no_color=True))
    assert has_colors(Console(force_terminal=True, color_system="standard", no_color=False))
    assert not has_colors(Console(file=io.StringIO()))


def test_a_dumb_terminal_gets_plain_lines():
    assert on_a_terminal(TERM="dumb").replace("\r\n", "\n") == LINES


def test_supervised_tokens_have_brackets_without_colors():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", no_color=True)
    with Display(console) as display:
        display.masks("a.jsonl:1", [("who ? ", False), ("the cat", True)])
    assert "⟦the cat⟧" in out.getvalue()
    assert marked_text("a", [("x", True)], colors=True).plain == "a\nx"


# --- parts --------------------------------------------------------------------------------------------------


def status(events, limit=10e9, width=100):
    console = Console(file=io.StringIO(), width=width)
    made = Status(limit and int(limit))
    for event in events:
        made.add(event)
    console.print(made)
    return console.file.getvalue()


def test_the_status_shows_trend_best_loss_and_full_memory():
    falling = [report(i, 3 - 0.1 * i) for i in range(1, 11)]
    text = status([*falling, validation(10, 2.0, 2.0) | {"first_loss": 3.5}])
    assert re.search(r"loss +2\.0000  [█▇▆▅▄▃▂▁]{10}  falling  from 2\.9000", text)
    assert re.search(r"validation +2\.0000  the best so far  from 3\.5000", text)
    first = status([validation(0, 3.0, None), *falling])
    assert re.search(r"validation +3\.0000  before training *$", first, re.M), first
    assert "misalignment" not in text
    assert "nearly full" not in text
    later = status([*falling, validation(10, 2.0, 2.0), validation(15, 2.4, 2.0)])
    assert re.search(r"validation +2\.4000  best 2\.0000 at iteration 10", later)
    assert "rising" in status([report(i, 1 + 0.1 * i) for i in range(10)])
    assert re.search(
        r"memory +9\.50 of 10\.0 GB \(95%, nearly full\)", status([report(1, 2.0, peak_memory_gb=9.5)])
    )
    assert re.search(r"memory +3\.20 GB$", status([report(1, 2.0)], limit=None).rstrip())
    assert re.search(
        r"speed +1,234 tokens/s, 3\.00 iterations/s", status([report(1, 2.0, iterations_per_second=3.0)])
    )


@pytest.mark.parametrize("width", [70, 80, 140, 300])
def test_the_status_fits_into_any_terminal(width):
    """All reports of a long run are in the line of blocks, from the first to the last."""
    events = [report(i, 3 * 0.99**i, learning_rate=1e-5) for i in range(1, 301)] + [validation(300, 2.0, 2.0)]
    lines = status(events, width=width).splitlines()
    assert max(map(len, lines)) <= width
    blocks = re.search("[█▇▆▅▄▃▂▁]+", lines[0])[0]
    assert blocks[0] == "█"
    assert blocks[-1] == "▁"
    assert len(blocks) == {70: 23, 80: 33, 140: 60, 300: 60}[width]
    assert lines[0].rstrip().endswith("  falling  from 2.9700")
    assert len(lines) == 5  # nothing is wrapped


def test_no_validation_is_called_best_that_is_worse_than_before_training():
    before = {"first_loss": 3.0}
    events = [
        START,
        validation(0, 3.0, None) | before,
        validation(4, 43.5, 43.5) | before,
        validation(8, 3.0, 3.0) | before,
        validation(12, 2.5, 2.5) | before,
        validation(16, math.nan, 2.5) | before,
    ]
    out = io.StringIO()
    show(events, Console(file=out, width=40))
    assert out.getvalue().splitlines() == [
        "iteration   0/100: validation loss 3.0000, 2.0 s",
        "iteration   4/100: validation loss 43.5000 (not better than before training, 3.0000), 2.0 s",
        "iteration   8/100: validation loss 3.0000 (not better than before training, 3.0000), 2.0 s",
        "iteration  12/100: validation loss 2.5000 (best), 2.0 s",
        "iteration  16/100: validation loss nan (not better than before training, 3.0000), 2.0 s",
    ]
    text = status(events[1:3])
    assert re.search(r"validation +43\.5000  not better than before training, 3\.0000", text)
    assert "best" not in text
    assert "the best so far" in status(events[1:5])


@pytest.mark.parametrize(
    ("first", "best", "helped"), [(3.0, 2.5, True), (3.0, 3.0, False), (3.0, 43.5, False), (None, 43.5, True)]
)
def test_the_end_says_if_training_did_not_help(first, best, helped):
    progress = Progress()
    progress.record_validation(math.nan if first is None else first)
    progress.iteration = 4
    progress.record_validation(best)
    before = "NaN or infinite" if first is None else f"{first:.4f}"
    lines = progress.result(None).describe_validation(Path("a/best"))
    assert lines[0].startswith(f"validation loss {before} before training, {best:.4f} after")
    assert lines[0].endswith(" (the best)") == helped
    assert len(lines) == 2 - helped
    if not helped:
        assert lines[1].startswith("note: training did not help: the best adapter, in a/best, has")
        assert f"{best:.4f}, so the model is better without it; lower the learning rate" in lines[1]
    assert Progress().result(None).describe_validation(Path("a/best")) == []


def test_the_end_says_where_a_better_adapter_is():
    progress = Progress()
    for iteration, loss in ((0, 3.0), (4, 2.0), (8, 2.5)):
        progress.iteration = iteration
        progress.record_validation(loss)
    assert progress.result(None).describe_validation(Path("a/best")) == [
        "validation loss 3.0000 before training, 2.5000 after (best 2.0000 at iteration 4: a/best)"
    ]


def test_sparkline_trend_and_duration():
    powers = [2.0**i for i in range(8)]
    assert sparkline(powers, 20) == "▁▂▃▄▅▆▇█"  # a log scale
    assert sparkline(powers[::-1], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline(powers, 4) == "▁▃▆█"  # means of pairs: 1.5, 6, 24, 96
    assert sparkline([9, *[1, 0.9, 0.7, 0.5]], 9) == "█▃▂▂▁"  # a first loss of ten times the others
    assert sparkline([1, math.nan, 2, math.inf], 9) == "▁ █ "
    assert sparkline([1, math.nan, 2, 2], 2) == "▁█"  # what is known of a group counts
    assert sparkline([3, 3], 9) == "▁▁"
    assert sparkline([0, 0], 9) == "▁▁"
    assert sparkline([0, 1], 9) == "▁█"
    assert sparkline([], 9) == ""
    assert sparkline(list(range(1, 1001)), 60)[-1] == "█"
    assert trend([1.0] * 9) == ""
    assert trend([1.0] * 5 + [1.009] * 5) == "level"
    assert trend([1.0] * 5 + [1.02] * 5) == "rising"
    assert trend([1.0] * 5 + [0.9] * 5) == "falling"
    assert trend([1.0] * 9 + [math.inf]) == ""
    assert [duration(s) for s in (0, 59.6, 3661)] == ["0:00:00", "0:01:00", "1:01:01"]


# --- after training -----------------------------------------------------------------------------------------


def test_a_sample_is_shown_to_a_person_only():
    sample = {
        "prompt": "[who]?\n\nyou",
        "before": "the " * 40,
        "after": "a\n" * 9,
        "expected": "b",
        "complete": True,
    }
    out, piped = io.StringIO(), io.StringIO()
    for file, terminal in ((out, True), (piped, False)):
        with Display(Console(file=file, width=80, force_terminal=terminal, color_system=None)) as display:
            display.sample(sample | {"before_complete": False})
    assert piped.getvalue() == ""
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[1:4] == ["prompt    [who]?", "          you", "before    the" + " the" * 16]
    assert any(line.endswith("the ...") for line in lines)
    assert lines[-7:] == ["after     a", *["          a"] * 4, "          a ...", "expected  b"]
    out = io.StringIO()
    with Display(Console(file=out, width=80, force_terminal=True, color_system=None)) as display:
        display.sample(sample | {"before": None, "after": "word " * 500, "expected": None})
    assert "before" not in out.getvalue()
    assert re.search(r"word \.\.\. *$", out.getvalue())
    assert out.getvalue().count("word") == 79
    out = io.StringIO()
    with Display(Console(file=out, width=80, force_terminal=True, color_system=None)) as display:
        display.sample(sample | {"after": "b", "expected": "b\n"})
    assert "expected" not in out.getvalue()


def test_what_follows_the_training_is_below_the_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with Display(console) as display:
        for event in (START, {"event": "step", "step": 100}, report(100, 2.0), {"event": "end"}):
            display(event)
        display.note("the end")
    lines = screen(out.getvalue())
    assert lines[-1] == "the end"
    assert re.fullmatch("training ━+ 100/100", lines[0])  # no time is left


def test_notices_of_several_splits_are_merged():
    out = io.StringIO()
    with Display(Console(file=out, width=40)) as display:
        display.notices(
            [
                "train: 3 of 9 rows are cut (the longest has 30) (a.jsonl:1, :7); raise it",
                "train: nothing reads the keys 'id' (9 rows, a.jsonl:1); remove them",
                "valid: 1 of 4 rows is cut (the longest has 20) (b.jsonl:1); raise it",
                "valid: nothing reads the keys 'id' (4 rows, b.jsonl:1); remove them",
                "valid: nothing reads the keys 'no' (4 rows, b.jsonl:1); remove them",
                "something else",
                "something else",
            ]
        )
    assert out.getvalue().splitlines() == [
        "note: train: 3 of 9 rows are cut (the longest has 30) (a.jsonl:1, :7); raise it; "
        "also valid: 1 of 4 rows (b.jsonl:1)",
        "note: train: nothing reads the keys 'id' (9 rows, a.jsonl:1); remove them; "
        "also valid (4 rows, b.jsonl:1)",
        "note: valid: nothing reads the keys 'no' (4 rows, b.jsonl:1); remove them",
        "note: something else",
        "note: something else",
    ]


# --- time and closed terminals ------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [1, 60, 400])
def test_the_time_left_is_shown_for_slow_steps(seconds):
    """Even if a step takes minutes."""
    now = 0.0
    console = Console(file=io.StringIO(), force_terminal=True, width=100, get_time=lambda: now)
    with Display(console) as display:
        display(START)
        display.progress.get_time = lambda: now
        for step in (1, 2, 3):
            now += seconds
            display({"event": "step", "step": step, "iterations": 100})
        assert display.progress.tasks[0].time_remaining == 97 * seconds


def test_a_closed_terminal_does_not_end_the_run():
    class Gone(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    with Display() as display:
        display.console.file = Gone()
        display(START)
        display(report(10, 2.0))
        display.note("x")
    assert display.console.quiet


def test_a_closed_pipe_does_not_fail_the_flush_at_exit():
    code = (
        "import sys; from nalora_mlx.core.terminal import LastingConsole; "
        "input(); LastingConsole().print('one'); sys.stdout.write('two')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    errors = process.stderr.read()
    assert (process.wait(60), errors) == (0, b"")
