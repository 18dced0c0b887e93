"""The sections of mac_check.py. Each runs in a process of its own and sends results as it finds them."""

import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from section_runner import ROOT, package_version

Emit = Callable[[str, Any], None]

PRIVATE = ("uuid", "pci_bus_id")  # of device_info
PACKAGES = ("mlx", "mlx-metal", "mlx-lm", "numpy", "transformers", "nalora-mlx")
ITERATIONS = 40
MODEL = "qwen3-4b"
MODEL_LAYERS, LENGTH = 36, 512
COLORS = re.compile(r"\x1b\[[\d;]*m")
FIRST_ITERATION = re.compile(r"(iteration +1: loss| +1 +\d)")  # a line of ours, or of mlx_lm.lora's table


def machine(_quick: bool, emit: Emit) -> None:
    """Describe the machine, its versions, and the precision of its float32 products."""
    from nalora_mlx.core.machine import rounds_float32_products
    from nalora_mlx.ops.kernels.backend import backend

    info = mx.device_info()
    emit("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors")
    emit("macos", platform.mac_ver()[0])
    emit("python", platform.python_version())
    emit("versions", {name: v for name in PACKAGES if (v := package_version(name))})
    known = {key: value for key, value in info.items() if key not in PRIVATE}
    emit("device_info", {key: value for key, value in known.items() if isinstance(value, str | int | float)})
    emit("memory_bytes", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    emit("kernel_backend", backend())
    emit("float32_products_are_rounded", rounds_float32_products())
    emit("device", {"summary": f"{info.get('device_name')}, macOS {platform.mac_ver()[0]}, {backend()}"})


# --- commands -------------------------------------------------------------------------------------------------


def doctor(_quick: bool, emit: Emit) -> None:
    """Run `nalora doctor` and keep its page."""
    seconds, status, output = run_command([sys.executable, "-m", "nalora_mlx", "doctor"])
    emit("page", output.splitlines())
    agree = re.search(r"gated residual: .*", output)
    summary = f"{agree[0] if agree else 'no kernels'}; {seconds:.1f} s"
    # The status is 1 if a kernel is wrong.
    emit("doctor", {"seconds": seconds, "exit_status": status, "ok": status == 0, "summary": summary})


def device_tests(quick: bool, emit: Emit) -> None:
    """Run tests/test_metal.py; in the quick mode a part of the same checks on the CPU."""
    chosen = ["tests/test_device_checks.py", "-k", "loss"] if quick else ["tests/test_metal.py"]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *chosen,
        ]
        seconds, status, output = run_command(command)
        if not report.exists():
            emit("pytest", {"error": output[-1000:]})
            return
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {}
    for case in cases:
        for problem in (*case.findall("failure"), *case.findall("error")):
            failed[case.get("name")] = (problem.get("message") or problem.text or "")[:500]
    skipped = sum(case.find("skipped") is not None for case in cases)
    emit("failed", failed)
    emit("seconds by test", {case.get("name"): round(float(case.get("time", 0)), 2) for case in cases})
    counts = {"tests": len(cases), "failed": len(failed), "skipped": skipped, "seconds": seconds}
    summary = f"{len(cases) - len(failed) - skipped} of {len(cases)} tests passed"
    emit("outcome", counts | {"ok": status == 0 and skipped < len(cases), "summary": summary})


def kills_and_resumes(quick: bool, emit: Emit) -> None:
    """Kill four training runs at random moments, resume them, and compare with an uninterrupted run, bit for bit."""
    kills = 1 if quick else 4
    command = [sys.executable, str(ROOT / "scripts/crash_test.py"), "--kills", str(kills), "--jobs", "1"]
    seconds, status, output = run_command(command)
    lines = output.splitlines()
    emit("lines", lines[-8:])
    summary = lines[-1] if lines else "no output"
    emit("outcome", {"seconds": seconds, "exit_status": status, "ok": status == 0, "summary": summary})


def run_command(command: list[str], until: re.Pattern[str] | None = None) -> tuple[float, int | None, str]:
    """Run a command in the project's directory.

    Args:
        command: program and arguments.
        until: end the command at the first line that begins like this.

    Returns:
        Its seconds, its exit status (None if it was ended) and its output without colors.
    """
    start, lines = time.perf_counter(), list[str]()
    with subprocess.Popen(
        command, cwd=ROOT, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(COLORS.sub("", line))
            if until is not None and until.match(lines[-1]):
                seconds = time.perf_counter() - start
                process.terminate()
                process.communicate()
                return seconds, None, "".join(lines)
    return time.perf_counter() - start, process.returncode, "".join(lines)


def start_up(quick: bool, emit: Emit) -> None:
    """Time both trainers from the command to the first iteration of a tiny model, in turn."""
    import crash_test

    seconds: dict[str, list[float]] = {"nalora lora": [], "mlx_lm.lora": []}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        crash_test.make_model(directory / "model")
        crash_test.make_data(directory / "data")
        common = ["--train", "--model", str(directory / "model"), "--data", str(directory / "data")]
        common += ["--batch-size", "2", "--iters", "50", "--steps-per-report", "1", "--val-batches", "1"]
        commands = {
            "nalora lora": [sys.executable, "-u", "-m", "nalora_mlx.lora", *common],
            "mlx_lm.lora": [sys.executable, "-u", "-m", "mlx_lm", "lora", *common, "--num-layers", "2"],
        }
        for i in range(1 if quick else 3):
            for who, command in commands.items():
                place = ["--adapter-path", str(directory / f"{who} {i}")]
                took, status, output = run_command([*command, *place], FIRST_ITERATION)
                if status is not None:
                    emit(who, {"error": output[-500:]})
                    return
                seconds[who].append(took)
    medians = {who: statistics.median(times) for who, times in seconds.items()}
    summary = ", ".join(f"{who} {time:.1f} s" for who, time in medians.items())
    emit("seconds", {**seconds, "summary": f"to the first iteration: {summary}"})


# --- training -------------------------------------------------------------------------------------------------


def forty_iterations(quick: bool, emit: Emit) -> None:
    """Train a small model for forty iterations with kernels and with the reference, and compare the losses."""
    from training_runs import SETUPS, training_run

    # Rounding grows over the updates. In half precision every loss differs by about one rounding.
    for dtype, limit in ((mx.float32, 1e-3), (mx.bfloat16, 2e-2)):
        if quick and dtype != mx.float32:
            continue
        name = str(dtype).removeprefix("mlx.core.")
        losses = {}
        for kind, kernels in (("kernels", True), ("reference", False)):
            steps = 4 if quick else ITERATIONS
            start = time.perf_counter()
            losses[kind] = training_run(SETUPS["rank 8"], mx.default_device(), dtype, steps, kernels).losses
            emit(f"{name}, {kind}", {"losses": losses[kind], "seconds": time.perf_counter() - start})
        pairs = zip(losses["kernels"], losses["reference"], strict=True)
        error = max(abs(a - b) / abs(b) for a, b in pairs)
        ok = error <= limit
        summary = f"{name}: losses with kernels and without differ by at most {error:.1e} (limit {limit})"
        emit(name, {"error_of_loss": error, "limit": limit, "ok": ok, "summary": summary})


def case_for_this_machine(quick: bool) -> Any:
    """Return the 4-bit model and batch to train, as large as this machine's memory allows."""
    from contenders import Case

    from nalora_mlx.training.memory_plan import default_budget

    if quick:
        return Case(MODEL, 2, 24, True, bits=4)
    budget = default_budget()
    if budget > 10e9:
        return Case(MODEL, 2, LENGTH, layers=MODEL_LAYERS, bits=4)
    return Case(MODEL, 1, LENGTH, layers=MODEL_LAYERS if budget > 6e9 else MODEL_LAYERS // 2, bits=4)


def describe_case(case: Any) -> dict[str, Any]:
    return {
        "shape": case.shape,
        "layers": case.config["num_hidden_layers"],
        "rows": case.rows,
        "length": case.length,
    }


def plan_and_peak(quick: bool, emit: Emit) -> None:
    """Compare the planned peak memory of a 4-bit model's training with the measured one."""
    from contenders import NA_LORA, Contender, random_examples

    from nalora_mlx.core.config import TrainingConfig
    from nalora_mlx.data.batches import collate
    from nalora_mlx.training.memory_plan import default_budget, largest_batch, plan

    case = case_for_this_machine(quick)
    start = time.perf_counter()
    contender = Contender(NA_LORA, case)
    emit("model", describe_case(case) | {"seconds_to_make": time.perf_counter() - start})
    examples = random_examples(case, 1, case.rows)
    config = TrainingConfig(batch_size=case.rows)
    start = time.perf_counter()
    largest, optimizer = largest_batch(examples, config), optim.Adam(1e-5)
    planned = plan(contender.model, largest, config, optimizer, default_budget()).needed
    emit("plan", {"bytes": planned, "seconds": time.perf_counter() - start})
    del optimizer
    mx.clear_cache()
    mx.reset_peak_memory()
    batch, seconds = collate(examples, range(case.rows)), []
    for _ in range(3 if quick else 4):
        start = time.perf_counter()
        contender.iterate(batch)
        contender.finish()
        seconds.append(time.perf_counter() - start)
    measured = mx.get_peak_memory()
    ratio = planned / measured
    summary = f"planned peak {planned / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB"
    found = {"planned_bytes": planned, "measured_bytes": measured, "ratio": ratio, "seconds": seconds}
    # A tiny model's peak is a few megabytes, of which every buffer is a large share.
    emit("peak", found | {"ok": quick or abs(ratio - 1) <= 0.15, "summary": summary})


def speed_of_4_bit(quick: bool, emit: Emit) -> None:
    """Measure tokens per second of a 4-bit model: our defaults, variants of cache and sizes, and mlx_lm.lora."""
    from contenders import NA_LORA, THEIRS

    from nalora_mlx.ops.device_sizes import using_sizes

    variants: dict[str, tuple[str, AbstractContextManager[Any], bool | None]] = {
        "na-lora": (NA_LORA, nullcontext(), None),
        "mlx_lm.lora": (THEIRS, nullcontext(), None),
        "na-lora, cache cleared after each step": (NA_LORA, nullcontext(), True),
        "na-lora, a CPU's sizes": (NA_LORA, using_sizes("cpu"), None),
        "mlx_lm.lora, cache kept": (THEIRS, nullcontext(), False),
    }
    case = case_for_this_machine(quick)
    emit("model", describe_case(case))
    for name, (trainer, context, clear_cache) in variants.items():
        with context:
            emit(name, measured_speed(trainer, case, clear_cache, 1 if quick else 3, name))


def speed_of_small(quick: bool, emit: Emit) -> None:
    """Measure tokens per second of a small model in half precision, with each trainer."""
    from contenders import TRAINERS, Case

    case = Case("smollm2-135m", 2, 24, True) if quick else Case("smollm2-135m", 4, LENGTH)
    for name in TRAINERS:
        emit(name, measured_speed(name, case, None, 2 if quick else 8, name))


def measured_speed(
    trainer: str, case: Any, clear_cache: bool | None, steps: int, name: str
) -> dict[str, Any]:
    """Return the speed and the peak memory of a trainer, on prompts that are masked and on every token."""
    from contenders import SUPERVISED_SHARE, Contender, measure, random_examples

    from nalora_mlx.data.batches import collate

    contender = Contender(trainer, case, clear_cache)
    found: dict[str, Any] = {}
    for kind, share in SUPERVISED_SHARE.items():
        batch = collate(random_examples(case, share, case.rows), range(case.rows))
        start = time.perf_counter()
        contender.iterate(batch)
        contender.finish()
        first = time.perf_counter() - start
        measured = measure(contender, [batch], steps)
        found[kind] = {
            "first_iteration_seconds": first,
            "seconds_per_step": measured["seconds"],
            "tokens_per_second": case.rows * case.length / measured["seconds"],
            "supervised_tokens_per_second": batch.supervised_tokens / measured["seconds"],
            "peak_above_weights_gb": measured["peak_gb"],
        }
    speeds = ", ".join(f"{kind} {one['tokens_per_second']:.0f} tokens/s" for kind, one in found.items())
    del contender
    mx.clear_cache()
    return found | {"summary": f"{name}: {speeds}"}
