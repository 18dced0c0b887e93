"""`nalora report`: write an HTML page and PNG plots of a run, or of several compared."""

import argparse
import importlib.util
import os
import time
import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nalora_mlx.arguments import Parser, add_model
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.optional_dependencies import install_command
from nalora_mlx.core.signals import Stopped
from nalora_mlx.report.style import MAX_RUNS

if TYPE_CHECKING:
    from nalora_mlx.report.run_data import RunData

PAGE = "report.html"
REQUIRED_PACKAGES = ("matplotlib", "plotly", "jinja2")


def build_parser(prog: str) -> Parser:
    """Build the parser: the runs, the output, and what to do with it."""
    parser = Parser(
        prog=prog,
        usage="RUN ... [options]",
        description="Write an HTML page and PNG plots of a run, or compare several.",
        examples="""
        write adapters/report/report.html, and open it in the browser
          nalora report adapters --open
        follow a run while it trains
          nalora report adapters --watch
        compare two runs
          nalora report runs/lora runs/na-lora --output comparison
        """,
    )
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
    add_model(parser, "base model, for runs that kept no answers (older ones, --no-samples)")
    add("--open", action="store_true", help="open the page in the browser")
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
        _watch(paths, output, args.every, args.open)
    runs = read_runs(paths)
    if args.model:
        from nalora_mlx.report.missing_answers import add_answers

        add_answers(args.model, runs, lambda text: print(text, flush=True))
    images = write_report(runs, output)
    page = output / PAGE
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB), {', '.join(images)}")
    if args.open and not args.watch:
        _open_in_browser(page)


def write_report(runs: "list[RunData]", output: Path, refresh: float | None = None) -> list[str]:
    """Write the page and the images, each file atomically; return the names of the images."""
    from nalora_mlx.core.storage import bytes_writer, write_file
    from nalora_mlx.report.card import CARD, draw_card
    from nalora_mlx.report.page import render_page
    from nalora_mlx.report.plots import draw_plots

    images = {CARD: draw_card(runs), **draw_plots(runs)}
    for name, png in images.items():
        write_file(output / name, bytes_writer(png))
    write_file(output / PAGE, bytes_writer(render_page(runs, refresh, CARD).encode()))
    return list(images)


def _check_flags(args: argparse.Namespace) -> None:
    missing = [name for name in REQUIRED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"nalora report needs {', '.join(missing)}: {install_command('report')}")
    if len(args.runs) > MAX_RUNS:
        raise InputError(f"{len(args.runs)} runs given; a report compares at most {MAX_RUNS}")
    if not 1 <= args.every <= 3600:
        raise InputError(f"--every {args.every:g}: must be from 1 to 3600 seconds")


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


def _watch(paths: list[Path], output: Path, every: float, show: bool) -> None:
    """Update the report until the runs end. If interrupted, leave a page that no longer reloads itself."""
    from nalora_mlx.report.run_data import NoReportYet, read_runs

    last_message = None
    try:
        while True:
            ended = not _any_running(paths)
            try:
                runs = read_runs(paths)
                write_report(runs, output, refresh=every)
                if show:
                    _open_in_browser(output / PAGE)
                    show = False
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


def _open_in_browser(page: Path) -> None:
    """Open a page in the browser, if there is one: not over SSH, and not in a browser that runs in the terminal."""
    try:
        browser = webbrowser.get()
        if type(browser) is not webbrowser.GenericBrowser or "BROWSER" in os.environ:
            browser.open(page.resolve().as_uri())
    except (webbrowser.Error, OSError):
        pass


if __name__ == "__main__":
    import sys

    from nalora_mlx.__main__ import main

    sys.exit(main(["report", *sys.argv[1:]]))
