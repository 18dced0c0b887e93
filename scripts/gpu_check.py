"""Check our kernels and our training step on a GPU, and compare their cost with mlx_lm.lora's.

    python scripts/gpu_check.py --output gpu_check.json
    python scripts/gpu_check.py --quick --device cpu        tiny sizes, to test the script

Weights and token ids are random, so the script needs no files. It prints a summary; --output writes all measurements as
one JSON document, after each section. Each section runs in a process of its own, with a limit of its own: if one fails
or takes too long, what it found so far is kept, and the others run.

1. Checks, and a first iteration of each trainer, run six at a time, because MLX compiles slowly for CUDA: 54 to 90 s
   for the first step of a model. The kernels that they compile are kept on disk.
2. The measurements run alone, the most important first. They start with compiled kernels, in about a second.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from section_runner import Section, run_sections

CASES = (("qwen3-0.6b", 2, 2048), ("qwen3-0.6b", 4, 512), ("smollm2-135m", 2, 2048), ("smollm2-135m", 4, 512))
AT_ONCE = 6  # with more, each compiles so slowly that it reaches its limit
KERNEL_PARTS = 2
# Largest accepted ratios of the time per supervised token.
TARGETS = {"masked prompts": 0.6, "identical batches": 0.95}
CACHE = "MLX_PTX_CACHE_DIR"  # where MLX keeps the kernels that it compiled for CUDA
GRAPHS = "MLX_CUDA_GRAPH_CACHE_SIZE"
EXACT = {"MLX_ENABLE_TF32": "0"}  # with TF32, a GPU rounds the inputs of float32 products to eleven bits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, help="write everything that was measured to this file, as JSON"
    )
    parser.add_argument("--budget", type=float, default=460, help="seconds for the whole run (default: 460)")
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

    def ended(section: Section) -> None:
        done.append(section)
        if args.output:
            args.output.write_text(json.dumps(document(), indent=1) + "\n")
        print(report(section), flush=True)

    def document() -> dict[str, Any]:
        seconds = round(time.monotonic() - started, 1)
        return {"seconds": seconds, "sections": {section.name: section.record() for section in done}}

    with tempfile.TemporaryDirectory() as directory:
        compiled = Path(os.environ.get(CACHE, f"{directory}/compiled"))
        together, alone = sections(args, compiled, Path(directory))
        run_sections(together, args.budget, AT_ONCE, ended)
        merge_caches(together, compiled)
        run_sections(alone, args.budget - (time.monotonic() - started), 1, ended)
    print(json.dumps(document()["sections"]) if not args.output else f"\neverything is in {args.output}")
    return 0 if all(section.passed for section in done) else 1


def sections(
    args: argparse.Namespace, compiled: Path, directory: Path
) -> tuple[list[Section], list[Section]]:
    """Return the sections that may run at the same time, and those that run alone, the most important first.

    Args:
        args: flags.
        compiled: where kernels that MLX compiled are kept.
        directory: where each of the sections that run at the same time keeps its own.
    """
    flags = ["--device", args.device, *(["--quick"] if args.quick else [])]

    def section(name: str, limit: float, *worker: str, **environment: str) -> Section:
        command = [sys.executable, __file__, *flags, "--worker", *(worker or (name,))]
        # MLX keeps 400 CUDA graphs, fewer than two trainers need, and fails once it has made twice as many.
        return Section(name, command, limit, {GRAPHS: "8192", **environment})

    long, short, *others = CASES[:1] * 2 if args.quick else CASES
    parts = 1 if args.quick else KERNEL_PARTS
    first = section("machine", 60)
    # What compiles longest starts first, and the measurements below need what the first two compile.
    together = [
        *(
            section(f"prepare {named(long)} {who}", 200, "prepare", *map(str, long), who)
            for who in ("na-lora", "mlx_lm.lora")
        ),
        section("correctness", 200, **EXACT),
        *(section(f"kernels {i + 1}", 200, "kernels", str(i), str(parts)) for i in range(parts)),
        section("accuracy", 90),
        section("primitives", 120, **EXACT),
        section("recurrences", 150, **EXACT),
        section("prepare_hybrid", 150),
    ]
    for number, one in enumerate(together):  # apart, because MLX does not write these files atomically
        one.environment[CACHE] = str(directory / str(number))
        if compiled.is_dir():
            shutil.copytree(compiled, directory / str(number))
    alone = [section(f"speed {named(long)}", 75, "speed", *map(str, long)), section("bandwidth", 45)]
    for case in [] if args.quick else [short, *others]:
        alone.append(section(f"speed {named(case)}", 60, "speed", *map(str, case)))
    alone += [
        section(f"breakdown {named(long)}", 120, "breakdown", *map(str, long)),
        section("hybrid", 150),
    ]
    for one in alone:
        one.environment[CACHE] = str(compiled)
    chosen = [first, *together], alone
    if args.sections:
        prefixes = tuple(args.sections)
        chosen = tuple([one for one in group if one.name.startswith(prefixes)] for group in chosen)
    return chosen


def named(case: tuple[str, int, int]) -> str:
    return f"{case[0]} {case[1]}x{case[2]}"


def work(args: argparse.Namespace) -> None:
    """Run one section in this process, and print each result as a line of JSON."""
    import mlx.core as mx

    if args.device == "cpu":
        mx.set_default_device(mx.cpu)

    def emit(name: str, value: Any) -> None:
        print(json.dumps([name, value]), flush=True)

    name, *rest = args.worker
    if name in ("kernels", "accuracy", "bandwidth"):
        import gpu_check_kernels

        getattr(gpu_check_kernels, name)(args.quick, emit, *map(int, rest))
    elif name in ("primitives", "recurrences", "prepare_hybrid", "hybrid"):
        import gpu_check_recurrences

        getattr(gpu_check_recurrences, name)(args.quick, emit)
    elif name in ("machine", "correctness"):
        import gpu_check_sections

        getattr(gpu_check_sections, name)(args.quick, emit)
    else:
        import gpu_check_sections
        from contenders import THEIRS, Case

        shape, rows, length, *trainer = rest
        sizes = (2, 24) if args.quick else (int(rows), int(length))
        # A few layers have the same kernels as all of them, and what mlx_lm.lora keeps of each layer is large.
        case = Case(shape, *sizes, args.quick, layers=4 if trainer == [THEIRS] else None)
        getattr(gpu_check_sections, name)(args.quick, emit, case, *trainer)


def merge_caches(group: list[Section], target: Path) -> None:
    """Copy the kernels that MLX compiled in each process to one folder."""
    for section in group:
        source = Path(section.environment.get(CACHE, ""))
        if source != target and section.environment.get(CACHE) and source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)


# --- output ---------------------------------------------------------------------------------------------------


def report(section: Section) -> str:
    """Return a short summary of a section."""
    lines = [f"== {section.name}: {section.status}, {section.seconds:.0f} s"]
    if section.status == "failed":
        lines += section.errors.strip().splitlines()[-6:]
    bad = section.wrong
    lines += [f"   WRONG  {name}: {section.found[name]}" for name in bad]
    kind = section.name.split()[0]
    if kind == "machine":
        lines += [f"   {name}: {value}" for name, value in section.found.items()]
    elif kind == "kernels":
        checked = [v for v in section.found.values() if isinstance(v, dict)]
        slowest = max((v["seconds"] for v in checked), default=0.0)
        lines.append(
            f"   {len(checked) - len(bad)} of {len(checked)} kernels are right; slowest check {slowest:.1f} s"
        )
    elif kind in ("accuracy", "primitives", "recurrences", "correctness"):
        count = sum(isinstance(value, dict) for value in section.found.values())
        lines.append(f"   {count - len(bad)} of {count} agree")
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
