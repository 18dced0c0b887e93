"""Take the pictures of docs/images: what a person sees of two runs that are there.

    python scripts/screenshots.py --model MODEL RUN RUN

The report of the first run in light, in dark and on a phone, and that of both compared. It needs the extras report and
browser, and Chromium with its driver.
"""

import argparse
import base64
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).parent.parent / "docs" / "images"
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


def main() -> None:
    """Write the reports into a temporary directory, and take a picture of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    parser.add_argument(
        "--model", required=True, help="base model of the runs, which answers before and after"
    )
    parser.add_argument("--output", type=Path, default=IMAGES)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        pages = {}
        for count in (1, 2):
            output = Path(directory) / str(count)
            command = [sys.executable, "-m", "nalora_mlx.report", *args.runs[:count], "--output", output]
            if count == 1:
                command += ["--model", args.model, "--max-tokens", "80"]
            subprocess.run(list(map(str, command)), check=True)
            pages[count] = output / "report.html"
        browser = start()
        try:
            for name, (count, width, dark, place, height) in PICTURES.items():
                picture = take(browser, pages[count], width, dark, place, height)
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
    clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return base64.b64decode(taken["data"])


if __name__ == "__main__":
    main()
