"""`nalora report`: one page and pictures of a run, or of several compared."""

import argparse
import fcntl
import importlib.util
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from nalora_mlx.cli import Parser
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.signals import Stopped
from nalora_mlx.report.palette import MOST_RUNS

PAGE = "report.html"
NEEDED = ("matplotlib", "plotly", "jinja2")


def build_parser(prog: str) -> Parser:
    """Take the runs, where to write, and what to ask the models."""
    parser = Parser(
        prog=prog, description="Write an HTML page and PNG pictures of a run, or of several compared."
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="directory that nalora lora trained into")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="where to write (default: RUN/report; of several runs ./report)",
    )
    add("--watch", action="store_true", help="write anew while a run goes on; the page refreshes itself")
    add("--every", type=float, default=10.0, metavar="SECONDS", help="with --watch: how often (default: 10)")
    add("--model", help="base model, to show its answers and those of the runs")
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="with --model: a message to answer; repeatable (default: the first prompts of the validation rows)",
    )
    add("--max-tokens", type=int, default=128, metavar="N", help="longest answer in tokens (default: 128)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Read, draw, write; with --watch until the runs are over."""
    _check(args)
    from nalora_mlx.core.paths import check_paths
    from nalora_mlx.report.data import read_runs
    from nalora_mlx.runs.directory import REPORT

    paths = [path.expanduser() for path in args.runs]
    output = (args.output or (paths[0] if len(paths) == 1 else Path()) / REPORT).expanduser()
    _check_output(output)
    check_paths(args.model)
    if args.watch:
        _watch(paths, output, args.every)
    runs = read_runs(paths)
    written = write(runs, output)
    if args.model:
        written = write(runs, output, _answers(args, runs))
    print(f"{output / PAGE} ({(output / PAGE).stat().st_size / 1e6:.1f} MB), {', '.join(written)}")


def write(
    runs: list[Any], output: Path, answers: list[dict[str, Any]] | None = None, refresh: float | None = None
) -> list[str]:
    """Write the page and the pictures, each whole or not at all; names of the pictures."""
    from nalora_mlx.core.storage import bytes_writer, write_file
    from nalora_mlx.report.page import page
    from nalora_mlx.report.pictures import pictures

    drawn = pictures(runs)
    for name, content in drawn.items():
        write_file(output / name, bytes_writer(content))
    write_file(output / PAGE, bytes_writer(page(runs, answers, refresh).encode()))
    return list(drawn)


def _check(args: argparse.Namespace) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"nalora report needs {', '.join(missing)}: pip install 'nalora-mlx[report]'")
    if len(args.runs) > MOST_RUNS:
        raise InputError(
            f"{len(args.runs)} runs; at most {MOST_RUNS} can be told apart in a chart, leave some out"
        )
    if args.prompt and not args.model:
        raise InputError("--prompt needs --model: who is asked")
    if not 1 <= args.every <= 3600:
        raise InputError(f"--every {args.every:g}: must be from 1 to 3600 seconds")
    if args.max_tokens < 1:
        raise InputError(f"--max-tokens {args.max_tokens}: must be at least 1")


def _check_output(output: Path) -> None:
    """Refuse a place that cannot be written, or whose page is not one of ours."""
    from nalora_mlx.core.storage import check_writable
    from nalora_mlx.report.page import GENERATOR

    check_writable(output)
    page = output / PAGE
    if page.exists():
        with page.open(encoding="utf-8", errors="replace") as file:
            if f'content="{GENERATOR} ' not in file.read(1000):
                raise InputError(f"{page} is not a report of ours; choose another --output")


def _watch(paths: list[Path], output: Path, every: float) -> None:
    """Write anew until the runs are over; once the watch is stopped, the page loads itself no more."""
    from nalora_mlx.report.data import NoReportYet, read_runs

    said = None
    try:
        while True:
            over = not _running(paths)
            try:
                runs = read_runs(paths)
                write(runs, output, refresh=every)
                news = f"iteration {max(run.last_step for run in runs)}: {output / PAGE}"
            except NoReportYet:
                over, news = False, f"waiting for the first report in {', '.join(map(str, paths))}"
            except (InputError, OSError) as error:  # a file that was replaced meanwhile: it is read again
                news = f"note: {error}"
            if over:
                return
            if news != said:
                print(news, flush=True)
            said = news
            time.sleep(every)
    except (KeyboardInterrupt, Stopped):
        with suppress(InputError, OSError):
            write(read_runs(paths), output)
        raise


def _running(paths: list[Path]) -> bool:
    """Whether a training process still has one of the directories."""
    for path in paths:
        if not path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:  # shared, so that two who look do not see each other
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass  # a file system without locks
        finally:
            os.close(descriptor)
    return False


def _answers(args: argparse.Namespace, runs: list[Any]) -> list[dict[str, Any]]:
    from nalora_mlx.core.paths import check_paths
    from nalora_mlx.report.answers import answers

    for run in runs:
        check_paths(args.model, str(run.path))
    prompts = [{"messages": [{"role": "user", "content": prompt}]} for prompt in args.prompt]
    prompts = prompts or next((run.samples for run in runs if run.samples), [])
    if not prompts:
        raise InputError("the run has kept no prompts of its data; give --prompt TEXT")
    return answers(args.model, [(run.name, run.path) for run in runs], prompts, args.max_tokens)


if __name__ == "__main__":
    import sys

    from nalora_mlx.__main__ import main

    sys.exit(main(["report", *sys.argv[1:]]))
