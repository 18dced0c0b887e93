"""Check this project on a Mac: kernels, training steps, memory, speed, resume. Writes one JSON file to send.

    bash scripts/mac_check.sh
    bash scripts/mac_check.sh --quick        tiny sizes, to test the script, also on other machines

Weights and token ids are random, so no model is needed. Each section runs in a process of its own, with a limit of its
own: if one fails or takes too long, that is recorded, and the others run. The file is written after each section. It
has no paths, and no names of this machine or its user.
"""

import argparse
import getpass
import json
import os
import platform
import re
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from section_runner import ROOT, Section, run_sections

FORMAT = 1  # of the file
BUDGET = 870.0  # seconds
VALIDATION = {"MTL_DEBUG_LAYER": "1", "MTL_SHADER_VALIDATION": "1"}
EXACT = {"MLX_ENABLE_TF32": "0"}  # with TF32, a GPU rounds the inputs of float32 products to eleven bits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("mac_check.json"), help="file to write")
    parser.add_argument(
        "--quick", action="store_true", help="use tiny sizes, to test this script on any machine"
    )
    parser.add_argument("--sections", nargs="+", help="run only sections whose name starts with one of these")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.quick)
        return 0
    if platform.system() != "Darwin" and not args.quick:
        print("mac_check.sh: this is not a Mac; --quick tests the script here", file=sys.stderr)
        return 2
    started = time.monotonic()
    done: list[Section] = []
    args.output.touch()  # fails now, not after fifteen minutes

    def ended(section: Section) -> None:
        done.append(section)
        write(args.output, done, time.monotonic() - started)
        print(report(section), flush=True)

    from nalora_mlx.core.power import keep_awake

    print(f"at most {BUDGET / 60:.0f} minutes; please leave the Mac alone meanwhile", flush=True)
    with keep_awake():
        run_sections(sections(args), BUDGET, 1, ended)
    failed = [section.name for section in done if not section.passed]
    print(f"\n{len(done) - len(failed)} of {len(done)} sections passed. Please send {args.output}")
    return 1 if failed else 0


def sections(args: argparse.Namespace) -> list[Section]:
    """Return all sections, the most important first."""
    flags = ["--quick"] if args.quick else []

    def section(name: str, limit: float, worker: str = "", **environment: str) -> Section:
        command = [sys.executable, __file__, *flags, "--worker", worker or name]
        return Section(name, command, limit, dict(environment))

    chosen = [
        section("machine", 60),
        section("machine with exact products", 60, "machine", **EXACT),
        section("doctor, first time", 150, "doctor"),
        section("doctor, second time", 90, "doctor"),
        section("forty iterations", 120, "forty_iterations", **EXACT),
        section("device tests", 300, "device_tests"),
        section("4-bit model, plan and peak", 150, "plan_and_peak"),
        section("4-bit model, speed", 240, "speed_of_4_bit"),
        section("kills and resumes", 150, "kills_and_resumes"),
        section("start-up", 90, "start_up"),
        section("doctor, with validation of shaders", 150, "doctor", **VALIDATION),
        section("accuracy", 60),
        section("bandwidth", 60),
        section("recurrences", 90, "recurrences", **EXACT),
        section("operations of recurrences", 60, "primitives", **EXACT),
        section("speed of a small model", 90, "speed_of_small"),
    ]
    if args.sections:
        chosen = [one for one in chosen if one.name.startswith(tuple(args.sections))]
    return chosen


def work(name: str, quick: bool) -> None:
    """Run one section in this process, and print each result as a line of JSON."""

    def emit(result: str, value: Any) -> None:
        print(json.dumps([result, value]), flush=True)

    if name in ("accuracy", "bandwidth"):
        import gpu_check_kernels as module
    elif name in ("recurrences", "primitives"):
        import gpu_check_recurrences as module  # type: ignore[no-redef]
    else:
        import mac_check_sections as module  # type: ignore[no-redef]
    getattr(module, name)(quick, emit)


# --- output ---------------------------------------------------------------------------------------------------


def write(path: Path, done: list[Section], seconds: float) -> None:
    """Write what was found so far."""
    document = {
        "format": FORMAT,
        "seconds": round(seconds, 1),
        "sections": {section.name: section.record() for section in done},
    }
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(anonymous(document), indent=1) + "\n")
    temporary.replace(path)


def anonymous(value: Any) -> Any:
    """Return a value without paths and names of this machine and its user."""
    if isinstance(value, dict):
        return {anonymous(key): anonymous(item) for key, item in value.items()}
    if isinstance(value, list):
        return [anonymous(item) for item in value]
    if not isinstance(value, str):
        return value
    for path, name in _paths():
        value = value.replace(path, name)
    for word in sorted(_names(), key=len, reverse=True):
        value = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "NAME", value, flags=re.IGNORECASE)
    return value


def _paths() -> list[tuple[str, str]]:
    """Return paths to replace, the longest first, and what to write for them."""
    places = {
        str(ROOT): "PROJECT",
        sys.prefix: "PYTHON",
        sys.base_prefix: "PYTHON",
        os.path.realpath(tempfile.gettempdir()): "TEMPORARY",
        tempfile.gettempdir(): "TEMPORARY",
        str(Path.home()): "HOME",
    }
    return sorted(((p, n) for p, n in places.items() if len(p) > 4), key=lambda pair: -len(pair[0]))


def _names() -> set[str]:
    """Return names of this machine and its user, as far as they are no common words."""
    host = socket.gethostname()
    names = {host, host.partition(".")[0], platform.node(), getpass.getuser(), Path.home().name}
    return {name for name in names if len(name) > 2 and name.lower() not in ("localhost", "root", "user")}


def report(section: Section) -> str:
    """Return a short summary of a section."""
    status = section.status if section.passed or section.status != "ok" else "WRONG"
    lines = [f"{status:<9}{section.seconds:5.0f} s  {section.name}"]
    for name, value in section.found.items():
        if name in section.wrong:
            lines.append(f"           WRONG: {name}: {shortened(value)}")
        elif isinstance(value, dict) and "summary" in value:
            lines.append(f"           {value['summary']}")
    if section.status == "failed":
        lines += [f"           {line}" for line in section.errors.strip().splitlines()[-2:]]
    return "\n".join(lines)


def shortened(value: Any, most: int = 300) -> str:
    text = json.dumps(value)
    return text if len(text) <= most else text[:most] + " ..."


if __name__ == "__main__":
    sys.exit(main())
