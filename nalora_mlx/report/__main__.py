"""`nalora report`: write an HTML page and PNG plots of a run, or of several compared."""

import argparse
import importlib.util
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.cli import Parser, add_chat_flags
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.signals import Stopped
from nalora_mlx.report.style import MAX_RUNS

if TYPE_CHECKING:
    from nalora_mlx.report.run_data import RunData

PAGE = "report.html"
REQUIRED_PACKAGES = ("matplotlib", "plotly", "jinja2")


def build_parser(prog: str) -> Parser:
    """Build the parser: the runs, the output, and prompts for the models."""
    parser = Parser(prog=prog, description="Write an HTML page and PNG plots of a run, or compare several.")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="directory that nalora lora trained into")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="directory to write (default: RUN/report, or ./report for several runs)",
    )
    add("--watch", action="store_true", help="update the report during the run; the page reloads itself")
    add(
        "--every",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="with --watch: update interval (default: 10)",
    )
    add("--model", help="base model, to compare its answers with those of the runs")
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="with --model: message to answer; repeatable (default: the first prompts of the validation rows)",
    )
    add("--max-tokens", type=int, default=128, metavar="N", help="maximum tokens of an answer (default: 128)")
    add_chat_flags(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the report. With --watch, update it until the runs end, then write it once more."""
    _check_flags(args)
    from nalora_mlx.core.paths import check_paths
    from nalora_mlx.report.run_data import read_runs
    from nalora_mlx.runs.directory import REPORT

    paths = [path.expanduser() for path in args.runs]
    output = (args.output or (paths[0] if len(paths) == 1 else Path()) / REPORT).expanduser()
    _check_output(output)
    check_paths(args.model)
    if args.watch:
        _watch(paths, output, args.every)
    runs = read_runs(paths)
    plots = write_report(runs, output)
    if args.model:
        plots = write_report(runs, output, _ask_models(args, runs))
    page = output / PAGE
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB), {', '.join(plots)}")


def write_report(
    runs: "list[RunData]",
    output: Path,
    answers: list[dict[str, Any]] | None = None,
    refresh: float | None = None,
) -> list[str]:
    """Write the page and the plots, each file atomically; return the names of the plots."""
    from nalora_mlx.core.storage import bytes_writer, write_file
    from nalora_mlx.report.page import render_page
    from nalora_mlx.report.plots import draw_plots

    plots = draw_plots(runs)
    for name, png in plots.items():
        write_file(output / name, bytes_writer(png))
    write_file(output / PAGE, bytes_writer(render_page(runs, answers, refresh).encode()))
    return list(plots)


def _check_flags(args: argparse.Namespace) -> None:
    missing = [name for name in REQUIRED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"nalora report needs {', '.join(missing)}: pip install 'nalora-mlx[report]'")
    if len(args.runs) > MAX_RUNS:
        raise InputError(f"{len(args.runs)} runs given; a report compares at most {MAX_RUNS}")
    for flag, given in (
        ("--prompt", args.prompt),
        ("--chat-template", args.chat_template),
        ("--chat-template-args", args.chat_template_args),
    ):
        if given and not args.model:
            raise InputError(f"{flag} needs --model, the model to ask")
    if not 1 <= args.every <= 3600:
        raise InputError(f"--every {args.every:g}: must be from 1 to 3600 seconds")
    if args.max_tokens < 1:
        raise InputError(f"--max-tokens {args.max_tokens}: must be at least 1")


def _check_output(output: Path) -> None:
    """Raise InputError if the output cannot be written, or contains a page that is not a report."""
    from nalora_mlx.core.storage import check_writable
    from nalora_mlx.report.page import GENERATOR

    check_writable(output)
    page = output / PAGE
    if page.exists():
        with page.open(encoding="utf-8", errors="replace") as file:
            if f'content="{GENERATOR} ' not in file.read(1000):
                raise InputError(f"{page} was not written by nalora report; choose another --output")


def _watch(paths: list[Path], output: Path, every: float) -> None:
    """Update the report until the runs end. If interrupted, leave a page that no longer reloads itself."""
    from nalora_mlx.report.run_data import NoReportYet, read_runs

    last_message = None
    try:
        while True:
            ended = not _any_running(paths)
            try:
                runs = read_runs(paths)
                write_report(runs, output, refresh=every)
                message = f"iteration {max(run.last_step for run in runs)}: {output / PAGE}"
            except NoReportYet:
                ended, message = False, f"waiting for the first report in {', '.join(map(str, paths))}"
            except (InputError, OSError) as error:  # a file was replaced while reading: try again later
                message = f"note: {error}"
            if ended:
                return
            if message != last_message:
                print(message, flush=True)
            last_message = message
            time.sleep(every)
    except (KeyboardInterrupt, Stopped):
        with suppress(InputError, OSError):
            write_report(read_runs(paths), output)
        raise


def _any_running(paths: list[Path]) -> bool:
    """Return whether a training process still holds the lock of one of the directories."""
    from nalora_mlx.core.locks import is_locked

    return any(is_locked(path) for path in paths)


def _ask_models(args: argparse.Namespace, runs: "list[RunData]") -> list[dict[str, Any]]:
    """Return the answers of the base model and of each run to the prompts."""
    from nalora_mlx.core.paths import check_paths
    from nalora_mlx.report.answers import answers

    for run in runs:
        check_paths(args.model, str(run.path))
    prompts = [{"messages": [{"role": "user", "content": prompt}]} for prompt in args.prompt]
    prompts = prompts or next((run.samples for run in runs if run.samples), [])
    if not prompts:
        raise InputError("the run has not saved any prompts of its data; give --prompt TEXT")
    return answers(
        args.model,
        [(run.name, run.path) for run in runs],
        prompts,
        args.max_tokens,
        args.chat_template,
        args.chat_template_args,
    )


if __name__ == "__main__":
    import sys

    from nalora_mlx.__main__ import main

    sys.exit(main(["report", *sys.argv[1:]]))
