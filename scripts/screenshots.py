"""Take the pictures of docs/images: what a person sees of two runs that are there, and in a terminal.

    python scripts/screenshots.py --model MODEL RUN RUN
    python scripts/screenshots.py --model MODEL RUN RUN --only terminal-training terminal-compare

The report of the first run in light, in dark and on a phone, and that of both compared. Then the commands of TERMINALS
under a pseudo-terminal: examples/bakery is trained once more (three minutes), and the first run answers in the chat.
It needs the extras report and browser, and Chromium with its driver.
"""

import argparse
import base64
import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
# name: number of runs, width, dark, where the picture begins (an element's id), its height
PICTURES = {
    "report-light": (1, 1280, False, None, 1500),
    "report-dark": (1, 1280, True, "na", 1560),
    "report-channels": (1, 1280, False, "channels-0", 410),
    "report-answers": (1, 1280, False, "answers", 700),
    "report-compare": (2, 1280, False, None, 1330),
    "report-compare-layers": (2, 1280, True, "na", 900),
    "report-phone": (1, 390, False, None, 1500),
}
COLUMNS = 92  # of the terminal
# name: a command, the lines that are typed at its prompts, and what is on the screen when the picture is taken
TERMINALS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "terminal-training": (
        "nalora lora --config examples/bakery/config.yaml --model SmolLM2-135M-Instruct",
        (),
        r" 4[0-9]/48 ",
    ),
    "terminal-compare": (
        "nalora chat --model SmolLM2-135M-Instruct --adapter-path adapters",
        ("/compare", "Two rye loaves for Tom, Friday at 9?"),
        r"tuned(?s:.)*\n>$",
    ),
}
PROMPT = "\n>"
PAGE = """<!doctype html><meta charset="utf-8"><body style="margin:0;background:#292929">
<pre style="display:inline-block;margin:0;padding:14px 18px;color:#c5c8c6;background:#292929;\
font:14px/1.25 'DejaVu Sans Mono',Menlo,monospace">{code}</pre>"""


def main() -> None:
    """Write the reports into a temporary directory, and take a picture of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    parser.add_argument(
        "--model", required=True, help="base model of the runs, which answers before and after"
    )
    parser.add_argument("--output", type=Path, default=IMAGES)
    parser.add_argument("--only", nargs="+", choices=[*PICTURES, *TERMINALS], default=[*PICTURES, *TERMINALS])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        pages = {}
        for count in {PICTURES[name][0] for name in args.only if name in PICTURES}:
            output = Path(directory) / str(count)
            command = [sys.executable, "-m", "nalora_mlx.report", *args.runs[:count], "--output", output]
            if count == 1:
                command += ["--model", args.model, "--max-tokens", "80"]
            subprocess.run(list(map(str, command)), check=True)
            pages[count] = output / "report.html"
        for name in filter(TERMINALS.get, args.only):
            pages[name] = Path(directory) / f"{name}.html"
            pages[name].write_text(page_of_terminal(args.model, args.runs[0], *TERMINALS[name]))
        browser = start()
        try:
            for name in args.only:
                if name in TERMINALS:
                    picture = take_terminal(browser, pages[name])
                else:
                    count, *how = PICTURES[name]
                    picture = take(browser, pages[count], *how)
                (args.output / f"{name}.png").write_bytes(picture)
                print(f"{args.output / name}.png: {len(picture) // 1000} kB")
        finally:
            browser.quit()


def start() -> Any:
    """A browser without a window."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), "")
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(flag)
    # A BLAS that is preloaded for mlx is nothing for a browser.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"), env=environment))


def take(browser: Any, page: Path, width: int, dark: bool, place: str | None, height: int) -> bytes:
    """A picture of a page from a place on; PNG."""
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    while not browser.execute_script("return document.documentElement.dataset.drawn"):
        time.sleep(0.1)
    browser.execute_script("document.querySelector('nav').style.position = 'static'")
    if page.parent.name == "2":
        browser.execute_script(
            "document.getElementById('log').click()"
        )  # two losses are soon close to each other
    top = 0
    if place is not None:
        top = browser.execute_script(
            "const at = document.getElementById(arguments[0]);"
            "return (at.closest('figure') || at).getBoundingClientRect().top + scrollY - 20",
            place,
        )
    return capture(browser, top, width, height)


def capture(browser: Any, top: float, width: float, height: float) -> bytes:
    """A picture of a part of the page that is open; PNG."""
    clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return base64.b64decode(taken["data"])


# --- terminals ----------------------------------------------------------------------------------------------


def page_of_terminal(model: str, run: Path, command: str, typed: tuple[str, ...], until: str) -> str:
    """Run a command under a pseudo-terminal until its screen has a text; HTML of that screen."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "examples").symlink_to(ROOT / "examples")
        (place / "SmolLM2-135M-Instruct").symlink_to(Path(model).resolve())
        if "--adapter-path" in command:
            (place / "adapters").symlink_to(run.resolve())
        rows = screen(command, typed, until, place)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor")
    console.print(Text.from_ansi("\n".join([f"$ {command}", *rows])))
    return console.export_html(theme=SVG_EXPORT_THEME, inline_styles=True, code_format=PAGE)


def screen(command: str, typed: tuple[str, ...], until: str, directory: Path) -> list[str]:
    """The rows of a terminal when they match a pattern, with their colours; the command is ended then.

    Each line is typed when the program asks for one.

    Raises:
        SystemExit: the command ended before that.
    """
    program, *flags = command.split()
    process, leader = pty.fork()
    if process == 0:
        os.chdir(directory)
        size = {"COLUMNS": str(COLUMNS), "LINES": "50", "TERM": "xterm-256color"}
        os.execve(Path(sys.executable).parent / program, [program, *flags], {**os.environ, **size})
    seen, waiting = b"", list(typed)
    try:
        while True:
            try:
                seen += os.read(leader, 65536)
            except OSError:
                raise SystemExit(f"{command} ended early:\n{seen.decode()}") from None
            if select.select([leader], [], [], 0.1)[0]:
                continue  # in the middle of a drawing
            rows = drawn(seen.decode())
            plain = Text.from_ansi("\n".join(rows)).plain.rstrip()
            if waiting and plain.endswith(PROMPT):
                os.write(leader, f"{waiting.pop(0)}\n".encode())
            elif not waiting and re.search(until, plain):
                return rows
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(leader)


def drawn(seen: str) -> list[str]:
    """The rows that a terminal shows, as far as rich and readline move its cursor: up, and back to erase a row."""
    rows, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|[\n]|[^\x1b\n]+", seen):
        if part == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif re.fullmatch(r"\x1b\[[0-9]*A", part):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            rows[row] = ""
        elif part.endswith("m") or part[0] != "\x1b":
            rows[row] += part.replace("\r", "")
    return rows


def take_terminal(browser: Any, page: Path) -> bytes:
    """A picture of a terminal, larger than life; PNG."""
    size = {"width": 1200, "height": 900, "deviceScaleFactor": 1.5, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    box = browser.execute_script(
        "const box = document.querySelector('pre').getBoundingClientRect(); return [box.width, box.height]"
    )
    return capture(browser, 0, *box)


if __name__ == "__main__":
    main()
