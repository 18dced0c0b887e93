"""Check our kernels and our training step on a GPU, and compare their cost with mlx_lm.lora's.

    python scripts/gpu_check.py --output gpu_check.json
    python scripts/gpu_check.py --quick --device cpu        tiny sizes, to test the script

Weights and token ids are random, so the script needs no files. It prints a summary; --output writes all measurements as
one JSON document, after each section. Each section runs in a process of its own, with a limit of its own: if one fails
or takes too long, what it found so far is kept, and the others run.

Checks of kernels, the comparison of a training step with the CPU's, and a first iteration of each trainer run at the
same time, because MLX compiles slowly for CUDA. The kernels that they compile are kept on disk for the measurements,
which run alone.
"""

import argparse
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CASES = (("qwen3-0.6b", 2, 2048), ("qwen3-0.6b", 4, 512), ("smollm2-135m", 2, 2048), ("smollm2-135m", 4, 512))
KERNEL_PROCESSES = 6
TARGETS = {
    "masked prompts": 0.6,
    "identical batches": 0.95,
}  # largest ratios of the time per supervised token
CACHE = "MLX_PTX_CACHE_DIR"  # where MLX keeps the kernels that it compiled for CUDA
GRAPHS = "MLX_CUDA_GRAPH_CACHE_SIZE"


@dataclass
class Section:
    """One process, and what it found.

    Attributes:
        name: in the results.
        worker: arguments of the worker.
        limit: seconds it may take.
        environment: variables to set.
        found: results by name.
        errors: end of what it wrote to standard error.
        status: "ok", "failed" or "too slow".
    """

    name: str
    worker: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    errors: str = ""
    status: str = "not run"
    seconds: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, help="write everything that was measured to this file, as JSON"
    )
    parser.add_argument("--budget", type=float, default=400, help="seconds for the whole run (default: 400)")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--sections", nargs="+", help="run only sections whose name starts with one of these")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return 0
    started = time.monotonic()
    done: list[Section] = []
    with tempfile.TemporaryDirectory() as directory:
        compiled = Path(os.environ.get(CACHE, f"{directory}/compiled"))
        for group in groups(args, compiled, Path(directory)):
            left = args.budget - (time.monotonic() - started)
            run_together(group, args, left)
            merge_caches(group, compiled)
            done += group
            document = {
                "seconds": round(time.monotonic() - started, 1),
                "sections": {section.name: as_json(section) for section in done},
            }
            if args.output:
                args.output.write_text(json.dumps(document, indent=1) + "\n")
            for section in group:
                print(report(section), flush=True)
    print(json.dumps(document["sections"]) if not args.output else f"\neverything is in {args.output}")
    return 0 if all(section.status == "ok" and not wrong(section) for section in done) else 1


def groups(args: argparse.Namespace, compiled: Path, directory: Path) -> list[list[Section]]:
    """Return the sections, in groups that run at the same time, the most important first.

    Args:
        args: flags.
        compiled: where kernels that MLX compiled are kept.
        directory: where each of the sections that run at the same time keeps its own.
    """
    parts = 1 if args.quick else KERNEL_PROCESSES
    together = [Section(f"kernels {i + 1}", ["kernels", str(i), str(parts)], 150) for i in range(parts)]
    # With TF32, a GPU rounds the inputs of float32 products to eleven bits.
    together.append(Section("correctness", ["correctness"], 120, {"MLX_ENABLE_TF32": "0"}))
    together.append(Section("recurrences", ["recurrences"], 120, {"MLX_ENABLE_TF32": "0"}))
    for case in [] if args.quick else CASES:
        for who in ("theirs", "ours"):
            together.append(Section(f"prepare {named(case)} {who}", ["prepare", *map(str, case), who], 150))
    for number, section in enumerate(together):  # apart, because MLX does not write these files atomically
        section.environment[CACHE] = str(directory / str(number))
        if compiled.is_dir():
            shutil.copytree(compiled, directory / str(number))
    long, short, *others = CASES[:1] * 2 if args.quick else CASES
    alone = [
        Section(f"speed {named(long)}", ["speed", *map(str, long)], 75),
        Section("bandwidth", ["bandwidth"], 45),
        Section(f"breakdown {named(long)}", ["breakdown", *map(str, long)], 110),
    ]
    for case in [] if args.quick else [short, *others]:
        alone.append(Section(f"speed {named(case)}", ["speed", *map(str, case)], 60))
    alone.append(Section("hybrid", ["hybrid"], 240))
    if not args.quick:
        name, worker = f"speed {named(long)}, MLX's own number of CUDA graphs", ["speed", *map(str, long)]
        alone.append(Section(name, worker, 60, {GRAPHS: "400"}))
    for section in alone:
        section.environment[CACHE] = str(compiled)
    for section in (*together, *alone):
        # MLX keeps 400 CUDA graphs, fewer than two trainers need, and fails once it has made twice as many.
        section.environment.setdefault(GRAPHS, "8192")
    chosen = [[Section("machine", ["machine"], 60)], together, *([section] for section in alone)]
    if args.sections:
        prefixes = tuple(args.sections)
        chosen = [[section for section in group if section.name.startswith(prefixes)] for group in chosen]
    return [group for group in chosen if group]


def named(case: tuple[str, int, int]) -> str:
    return f"{case[0]} {case[1]}x{case[2]}"


def work(args: argparse.Namespace) -> None:
    """Run one section in this process, and print each result as a line of JSON."""
    import mlx.core as mx

    if args.device == "cpu":
        mx.set_default_device(mx.cpu)
    import gpu_check_sections as sections

    def emit(name: str, value: Any) -> None:
        print(json.dumps([name, value]), flush=True)

    name, *rest = args.worker
    if name == "kernels":
        sections.kernels(args.quick, emit, int(rest[0]), int(rest[1]))
    elif name in ("prepare", "speed", "breakdown"):
        rows, length = (2, 24) if args.quick else (int(rest[1]), int(rest[2]))
        theirs = name == "prepare" and rest[3] == "theirs"
        # A few layers have the same kernels as all of them, and what mlx_lm.lora keeps of each layer is large.
        case = sections.Case(rest[0], rows, length, args.quick, layers=4 if theirs else None)
        if name == "prepare":
            sections.prepare(args.quick, emit, case, theirs)
        else:
            getattr(sections, name)(args.quick, emit, case)
    elif name in ("recurrences", "hybrid"):
        import gpu_check_recurrences

        getattr(gpu_check_recurrences, name)(args.quick, emit)
    else:
        getattr(sections, name)(args.quick, emit)


# --- processes ------------------------------------------------------------------------------------------------


def run_together(group: Sequence[Section], args: argparse.Namespace, left: float) -> None:
    """Run sections at the same time, each until its limit or until the time is up."""
    started = time.monotonic()
    flags = ["--device", args.device, *(["--quick"] if args.quick else [])]
    processes: dict[subprocess.Popen[str], Section] = {}
    logs = {}
    selector = selectors.DefaultSelector()
    if left < 10:
        return
    for section in group:
        command = [sys.executable, __file__, *flags, "--worker", *section.worker]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, **section.environment}
        logs[section.name] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed below
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=logs[section.name], text=True, env=environment
        )
        processes[process] = section
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        selector.register(process.stdout, selectors.EVENT_READ, process)
    buffers = dict.fromkeys(processes, "")
    while processes:
        for key, _ in selector.select(timeout=0.5):
            process = key.data
            text = process.stdout.read()
            if text == "":
                selector.unregister(process.stdout)
                continue
            *lines, buffers[process] = (buffers[process] + (text or "")).split("\n")
            for line in lines:
                if line.startswith("["):
                    name, value = json.loads(line)
                    processes[process].found[name] = value
        for process, section in list(processes.items()):
            section.seconds = time.monotonic() - started
            reading = process.stdout in {key.fileobj for key in selector.get_map().values()}
            if process.poll() is not None and not reading:
                section.status = "ok" if process.returncode == 0 else "failed"
            elif section.seconds > min(section.limit, left):
                process.kill()
                process.wait()
                if reading:
                    selector.unregister(process.stdout)
                section.status = "too slow"
            else:
                continue
            with logs[section.name] as log:
                log.seek(0)
                section.errors = log.read()[-3000:]
            del processes[process]


def merge_caches(group: Sequence[Section], target: Path) -> None:
    """Copy the kernels that MLX compiled in each process to one folder."""
    for section in group:
        source = Path(section.environment.get(CACHE, ""))
        if source != target and section.environment.get(CACHE) and source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)


# --- output ---------------------------------------------------------------------------------------------------


def as_json(section: Section) -> dict[str, Any]:
    """Return what to write about a section."""
    record = {"status": section.status, "seconds": round(section.seconds, 1), "results": section.found}
    if section.errors and section.status != "ok":
        record["errors"] = section.errors
    return record


def wrong(section: Section) -> list[str]:
    """Return the names of results that show an error."""
    results = ((name, value) for name, value in section.found.items() if isinstance(value, dict))
    return [name for name, value in results if value.get("error") or value.get("ok") is False]


def report(section: Section) -> str:
    """Return a short summary of a section."""
    lines = [f"== {section.name}: {section.status}, {section.seconds:.0f} s"]
    if section.status == "failed":
        lines += section.errors.strip().splitlines()[-6:]
    bad = wrong(section)
    lines += [f"   WRONG  {name}: {section.found[name]}" for name in bad]
    kind = section.worker[0]
    if kind == "machine":
        lines += [f"   {name}: {value}" for name, value in section.found.items()]
    elif kind == "kernels":
        checked = [v for v in section.found.values() if isinstance(v, dict)]
        slowest = max((v["seconds"] for v in checked), default=0.0)
        lines.append(
            f"   {len(checked) - len(bad)} of {len(checked)} kernels are right; slowest check {slowest:.1f} s"
        )
    elif kind == "speed":
        for name, target in TARGETS.items():
            if name in section.found:
                lines += speed_lines(name, target, section.found[name])
    else:
        lines += [f"   {name}: {rounded(value)}" for name, value in section.found.items()]
    return "\n".join(lines)


def speed_lines(kind: str, target: float, result: dict[str, Any]) -> list[str]:
    """Return the comparison with mlx_lm.lora on one kind of batch."""
    theirs = result["mlx_lm.lora"]
    own = result["na-lora"]
    verdict = "met" if own["time_ratio"] <= target else "missed"
    return [
        f"   {kind}: mlx_lm.lora {theirs['ms_per_step']:.1f} ms per step, {theirs['peak_above_weights_gb']:.2f} GB",
        f"     na-lora: {own['ms_per_step']:.1f} ms, {own['peak_above_weights_gb']:.2f} GB; ratios: "
        f"time {own['time_ratio']:.2f} (target {target}: {verdict}), peak {own['peak_ratio']:.2f}",
    ]


def rounded(value: Any) -> Any:
    """Return a value with every float rounded to three significant digits."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
