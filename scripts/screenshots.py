"""Take the screenshots in docs/images: HTML reports of two training runs, and commands in a terminal.

    python scripts/screenshots.py --model MODEL RUN RUN
    python scripts/screenshots.py --model MODEL RUN RUN --only terminal-training terminal-compare

The reports show the first run in light mode, in dark mode, on a phone and as a card, and a comparison of both runs. The
runs need answers: samples.json, which nalora lora writes. The terminals run the commands in TERMINALS: one trains on
examples/bakery (three minutes), the other chats with the first run's adapter. Requires the extras report and browser,
and Chromium with chromedriver.
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
# name -> number of runs, width, dark mode, id of the element at the top (None: top of the page), height
REPORTS = {
    "report-light": (1, 1280, False, None, 1290),
    "report-dark": (1, 1280, True, "loss", 1180),
    "report-layers": (1, 1280, False, "fold-na", 1560),
    "report-compare": (2, 1280, False, None, 1500),
    "report-phone": (1, 390, False, None, 1480),
}
CARD = "report-card"  # card.png of the first run's report
COLUMNS = 92  # of the terminal
# name -> command, lines to type at its prompts, regular expression for the screen at which to take the screenshot
TERMINALS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "terminal-training": (
        "nalora lora --config examples/bakery/config.yaml --model SmolLM2-135M-Instruct",
        (),
        r"merge +nalora fuse .* adapters",
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
    """Write the reports to a temporary directory, run the terminal commands, and take all screenshots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    parser.add_argument("--model", required=True, help="base model of the runs, for the terminals")
    parser.add_argument("--output", type=Path, default=IMAGES, help="directory for the screenshots")
    names = [*REPORTS, CARD, *TERMINALS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        pages = {}
        for count in {
            REPORTS[name][0] if name in REPORTS else 1 for name in args.only if name not in TERMINALS
        }:
            output = Path(directory) / str(count)
            command = [sys.executable, "-m", "nalora_mlx.report", *args.runs[:count], "--output", output]
            subprocess.run(list(map(str, command)), check=True)
            pages[count] = output / "report.html"
        for name in args.only:
            if name in TERMINALS:
                pages[name] = Path(directory) / f"{name}.html"
                pages[name].write_text(terminal_page(args.model, args.runs[0], *TERMINALS[name]))
        browser = start_browser()
        try:
            for name in args.only:
                if name in TERMINALS:
                    image = capture_terminal(browser, pages[name])
                elif name == CARD:
                    image = (pages[1].parent / "card.png").read_bytes()
                else:
                    count, width, dark, top, height = REPORTS[name]
                    image = capture_report(browser, pages[count], width, dark, top, height)
                (args.output / f"{name}.png").write_bytes(image)
                print(f"{args.output / name}.png: {len(image) // 1000} kB")
        finally:
            browser.quit()


def start_browser() -> Any:
    """Start headless Chromium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), "")
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(flag)
    # The BLAS that is preloaded for mlx must not be loaded into the browser.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"), env=environment))


def capture_report(
    browser: Any, page: Path, width: int, dark: bool, element: str | None, height: int
) -> bytes:
    """Return a PNG of a report, from an element or the top of the page on."""
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    while not browser.execute_script("return document.documentElement.dataset.drawn"):
        time.sleep(0.1)
    browser.execute_script("document.querySelector('nav').style.position = 'static'")
    top = 0
    if element is not None:
        browser.execute_script(
            "const fold = document.getElementById(arguments[0]).closest('details'); if (fold) fold.open = true",
            element,
        )
        time.sleep(1)  # its charts are drawn
        top = browser.execute_script(
            "const at = document.getElementById(arguments[0]);"
            "return (at.closest('figure') || at).getBoundingClientRect().top + scrollY - 20",
            element,
        )
    return with_palette(capture(browser, top, width, height))


def with_palette(png: bytes) -> bytes:
    """Reduce a PNG to 256 colors, which makes it half as large."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def capture(browser: Any, top: float, width: float, height: float) -> bytes:
    """Return a PNG of a part of the open page."""
    clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
    result = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return base64.b64decode(result["data"])


# --- terminals ----------------------------------------------------------------------------------------------


def terminal_page(model: str, run: Path, command: str, inputs: tuple[str, ...], until: str) -> str:
    """Run a command in a pseudo-terminal until its screen matches a pattern, and return the screen as HTML."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        (directory / "examples").symlink_to(ROOT / "examples")
        (directory / "SmolLM2-135M-Instruct").symlink_to(Path(model).resolve())
        if "--adapter-path" in command:
            (directory / "adapters").symlink_to(run.resolve())
        rows = run_until(command, inputs, until, directory)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor")
    console.print(Text.from_ansi("\n".join([f"$ {command}", *rows])))
    return console.export_html(theme=SVG_EXPORT_THEME, inline_styles=True, code_format=PAGE)


def run_until(command: str, inputs: tuple[str, ...], until: str, directory: Path) -> list[str]:
    """Run a command in a pseudo-terminal until its screen matches a pattern, then kill it if it has not ended.

    Types one of the input lines at each prompt.

    Returns:
        The rows of the screen, with ANSI colors.

    Raises:
        SystemExit: If the command exits earlier.
    """
    program, *flags = command.split()
    process, leader = pty.fork()
    if process == 0:
        os.chdir(directory)
        size = {"COLUMNS": str(COLUMNS), "LINES": "50", "TERM": "xterm-256color"}
        os.execve(Path(sys.executable).parent / program, [program, *flags], {**os.environ, **size})
    output, remaining = b"", list(inputs)
    try:
        while True:
            ended = False
            try:
                output += os.read(leader, 65536)
            except OSError:
                ended = True
            if not ended and select.select([leader], [], [], 0.1)[0]:
                continue  # the screen is still being drawn
            rows = screen_rows(output.decode())
            plain = Text.from_ansi("\n".join(rows)).plain.rstrip()
            if remaining and plain.endswith(PROMPT):
                os.write(leader, f"{remaining.pop(0)}\n".encode())
            elif not remaining and re.search(until, plain):
                return rows
            if ended:
                raise SystemExit(f"{command} exited early:\n{output.decode()}")
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(leader)


def screen_rows(output: str) -> list[str]:
    """Return the rows a terminal shows. Supports the escape codes of rich and readline: cursor up, erase, colors."""
    rows, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|[\n]|[^\x1b\n]+", output):
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


def capture_terminal(browser: Any, page: Path) -> bytes:
    """Return a PNG of a terminal, at 1.5 times its size."""
    size = {"width": 1200, "height": 900, "deviceScaleFactor": 1.5, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    box = browser.execute_script(
        "const box = document.querySelector('pre').getBoundingClientRect(); return [box.width, box.height]"
    )
    return capture(browser, 0, *box)


if __name__ == "__main__":
    main()
