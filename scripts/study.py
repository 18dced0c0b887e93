"""Compare fine-tuning methods over models, tasks, learning rates and seeds.

    python scripts/study.py tune --tasks orders --output study-runs/tune.jsonl
    python scripts/study.py confirm --tasks orders --tuned study-runs/tune.jsonl --output study-runs/confirm.jsonl
    python scripts/study_tables.py study-runs/confirm.jsonl

1. `tune` trains every method on every model and task with a few seeds and learning rates. It extends the grid until the
   learning rate with the lowest validation loss is not at its edge.
2. `confirm` trains each method at its best learning rate with other seeds, and evaluates once on the test split.
   With --multiples, also at multiples of that rate: how much does a method lose if the rate is too high?
3. `study_tables.py` makes tables and plots from the results, and `study_tolerance.py` tables of the multiples.

Each finished run appends one line of JSON to the output. Runs that are already in the file are skipped, so an
interrupted study can be continued. All methods adapt the same layers and, for the same seed, see the rows in the same
order. The optimizer is Adam with bias correction, with warmup and cosine decay. docs/study.md describes the protocol.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from study_methods import METHODS, Method, apply_control, fit_lora_a
from study_models import LENGTH, python_sources, split_into_rows
from study_tasks import FORGETTING, FROM_FILES, GENERATED, SPLITS, Task, score, tokenize_task

from nalora_mlx import NALoRAConfig, TrainingConfig, adapt, train
from nalora_mlx.adapters.attach import adapt_dora
from nalora_mlx.models.output_head import find_output_head

# All learning rates that a grid can contain, a factor of sqrt(2) apart.
RATES = [float(f"{1e-4 * 2 ** (k / 2):.3g}") for k in range(-4, 22)]
ROWS = {"train": 2000, "valid": 150, "test": 300}
TEXT_ROWS = 8  # rows of LENGTH tokens to measure forgetting on
BATCH = 8
EVALUATIONS = 4  # evaluations during training, by default
VALIDATION_BATCHES = 8  # batches per evaluation during training; the final evaluation uses all rows


# --- one run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """The settings of a run.

    Attributes:
        model: directory of the model.
        task: name of the task.
        method: a key of METHODS.
        rate: learning rate.
        seed: seed of the adapters and of the order of rows.
        iters: number of batches.
        rank: rank of the adapters.
        final: whether to evaluate on the test split.
        evaluations: number of evaluations during training. With 0, nothing but the loss at the end is measured.
    """

    model: str
    task: str
    method: str
    rate: float
    seed: int
    iters: int
    rank: int
    final: bool
    evaluations: int = EVALUATIONS

    @property
    def key(self) -> str:
        """Return a hash of the settings and of this script's constants, which identifies the run in result files."""
        settings = asdict(self)
        constants = [BATCH, ROWS, settings.pop("evaluations"), VALIDATION_BATCHES, TEXT_ROWS, LENGTH]
        text = json.dumps([settings, constants], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _load_task(model: str, task: str, data: str) -> Task:
    from mlx_lm.utils import load_tokenizer

    return tokenize_task(task, data, load_tokenizer(Path(model)), ROWS)


def _load_model(path: str) -> nn.Module:
    from mlx_lm import load

    return load(path)[0]


@cache
def _unrelated_text(model: str) -> tuple[mx.array, mx.array, mx.array]:
    """Return inputs [N, L], targets [N, L], and the base model's log-probabilities [N, L, V] of unrelated text."""
    from mlx_lm.utils import load_tokenizer

    texts = [text for path, text in python_sources(held_out=True) if set(path.parts) & set(FORGETTING)]
    rows = split_into_rows(texts, load_tokenizer(Path(model)), LENGTH)
    tokens = mx.array(
        np.stack([rows[i].tokens for i in np.linspace(0, len(rows) - 1, TEXT_ROWS).astype(int)])
    )
    base = _load_model(model)
    base.eval()
    log_probabilities = _log_softmax(base(tokens[:, :-1]))
    mx.eval(log_probabilities)
    return tokens[:, :-1], tokens[:, 1:], log_probabilities


@cache
def _untrained_loss(model: str, task: str, data: str, split: str) -> float:
    head = find_output_head(_load_model(model))
    assert head is not None
    loaded = _load_task(model, task, data)
    return score(head, loaded.splits[split], loaded.choices[split])["loss"]


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def forgetting(model: nn.Module, name: str) -> dict[str, float]:
    """Measure forgetting on unrelated text.

    Returns:
        "kl", KL(base || model) in nats per token, and "rise", the increase of the loss.
    """
    inputs, targets, base = _unrelated_text(name)
    tuned = _log_softmax(model(inputs))
    kl = mx.mean(mx.sum(mx.exp(base) * (base - tuned), axis=-1))
    rise = mx.mean(mx.take_along_axis(base - tuned, targets[..., None], axis=-1))
    return {"kl": float(kl), "rise": float(rise)}


def run(setting: Setting, data: str) -> dict[str, Any]:
    """Train and evaluate once. Return the record of the run."""
    start = time.perf_counter()
    method, task = METHODS[setting.method], _load_task(setting.model, setting.task, data)
    model = _load_model(setting.model)
    mx.random.seed(setting.seed)
    config = NALoRAConfig(
        rank=setting.rank, scale=2.0 * method.scale(setting.rank), num_layers=-1, **dict(method.na)
    )
    (adapt_dora if method.dora else adapt)(model, config)
    if method.fitted:
        fit_lora_a(model, task.splits["train"], method.fitted, BATCH, setting.seed)
    head = find_output_head(model)
    assert head is not None
    curve: list[dict[str, Any]] = []
    layers: dict[str, Any] = {}

    def listen(event: dict[str, Any]) -> None:
        if event.get("split") == "train":
            layers.update(event["layers"])
        elif event.get("split") == "valid":
            model.eval()
            curve.append({"step": event["step"], "loss": event["loss"], **forgetting(model, setting.model)})
            model.train()
            if layers:
                curve[-1]["misalignment"] = [row.get("misalignment") for row in layers.values()]

    interval = setting.iters // max(1, setting.evaluations)
    training = TrainingConfig(
        batch_size=BATCH,
        iters=setting.iters,
        steps_per_report=interval,
        steps_per_eval=interval,
        grad_clip=method.grad_clip,
        val_batches=VALIDATION_BATCHES,
        seed=setting.seed,
    )
    with apply_control(method.control, setting.seed):
        result = train(
            model,
            task.splits["train"],
            task.splits["valid"] if setting.evaluations else (),
            config=training,
            optimizer=build_optimizer(setting, method),
            listeners=[listen],
        )
    expected = setting.evaluations + 1 if setting.evaluations else 0
    if len(curve) != expected and not result.stopped:
        raise RuntimeError(f"got {len(curve)} evaluations, expected {expected}")
    model.eval()
    splits = ("valid", "test")[0 if setting.evaluations else 1 :] if setting.final else ("valid",)
    scores = {split: score(head, task.splits[split], task.choices[split]) for split in splits}
    return {
        "key": setting.key,
        **asdict(setting),
        **scores,
        "untrained": _untrained_loss(setting.model, setting.task, data, splits[-1]),
        **forgetting(model, setting.model),
        "curve": curve,
        "importance": {path: row["importance"] for path, row in layers.items() if "importance" in row},
        "seconds": round(time.perf_counter() - start, 2),
    }


def build_optimizer(setting: Setting, method: Method) -> optim.Optimizer:
    """Return Adam with linear warmup over a tenth of the run, then cosine decay to a tenth of the learning rate."""

    def adam(rate: float) -> optim.Optimizer:
        warmup = setting.iters // 10
        schedules = [
            optim.linear_schedule(rate / warmup, rate, warmup),
            optim.cosine_decay(rate, setting.iters - warmup, rate / 10),
        ]
        return optim.Adam(optim.join_schedules(schedules, [warmup]), bias_correction=True)

    if method.b_rate == 1:
        return adam(setting.rate)
    return optim.MultiOptimizer(
        [adam(setting.rate * method.b_rate), adam(setting.rate)],
        [lambda path, _: path.endswith("lora_b")],
    )


# --- the grid -----------------------------------------------------------------------------------------------


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a result file by key, ignoring an incomplete last line."""
    if not path.exists():
        return {}
    records = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records[record["key"]] = record
    return records


def run_all(settings: list[Setting], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the settings that are not in the output yet, in parallel processes.

    Returns:
        The records of all settings, in their order.
    """
    done = read_results(args.output)
    waiting = [setting for setting in settings if setting.key not in done]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    # Divide the cores among the processes. Small matrices gain little from more threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(args.jobs, mp_context=context) as pool,
        args.output.open("a") as file,
    ):
        if file.tell() and not args.output.read_bytes().endswith(b"\n"):
            file.write("\n")  # end the incomplete line of an interrupted run
        futures = {pool.submit(run, setting, args.data): setting for setting in waiting}
        for count, future in enumerate(as_completed(futures), 1):
            setting = futures[future]
            try:
                record = future.result()
            except FloatingPointError:  # the learning rate is too high
                record = {
                    "key": setting.key,
                    **asdict(setting),
                    "valid": {"loss": math.inf},
                    "test": {"loss": math.inf},
                    "diverged": True,
                }
            file.write(json.dumps(_for_json(record)) + "\n")
            file.flush()
            done[setting.key] = record
            left = (time.perf_counter() - start) / count * (len(waiting) - count)
            loss = record.get("valid", record.get("test"))["loss"]
            print(
                f"{count}/{len(waiting)}, {left / 60:.0f} min left: {Path(setting.model).name} {setting.task} "
                f"{setting.method} {setting.rate:.2g} seed {setting.seed}: {loss:.4f}",
                file=sys.stderr,
                flush=True,
            )
    return [done[setting.key] for setting in settings]


def _for_json(value: Any) -> Any:
    """Round floats to six digits. Replace infinity and NaN, which JSON does not have, by 1e9."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else 1e9
    if isinstance(value, dict):
        return {key: _for_json(item) for key, item in value.items()}
    return [_for_json(item) for item in value] if isinstance(value, list) else value


Combination = tuple[str, str, str]  # model, task, method


def combinations(args: argparse.Namespace) -> list[Combination]:
    return [(model, task, name) for model in args.models for task in args.tasks for name in args.methods]


def mean_losses(records: list[dict[str, Any]]) -> dict[Combination, dict[float, float]]:
    """Return the mean validation loss, or else test loss, of each combination at each learning rate."""
    losses: dict[Combination, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        loss = r["valid" if "valid" in r else "test"]["loss"]
        losses[r["model"], r["task"], r["method"]][r["rate"]].append(loss)
    return {
        combination: {rate: statistics.mean(values) for rate, values in rates.items()}
        for combination, rates in losses.items()
    }


def best_rate(mean_by_rate: dict[float, float]) -> float:
    """Return the learning rate with the lowest mean loss."""
    return min(mean_by_rate, key=lambda rate: mean_by_rate[rate])


def tune(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run each combination on a grid of learning rates.

    1. Start with three rates around --rate.
    2. If the best rate of a combination is at the edge of its grid, extend the grid there and run again.
    3. Repeat until no grid is extended.

    Returns:
        The records of all runs.
    """
    middle = min(range(len(RATES)), key=lambda i: abs(math.log(RATES[i] / args.rate)))
    # combination -> indices into RATES
    grids = {c: {middle - args.spacing, middle, middle + args.spacing} for c in combinations(args)}
    waiting, records = list(grids), []
    while waiting:
        settings = [
            Setting(*combination, RATES[i], seed, args.iters, args.rank, False, args.evaluations)
            for seed in args.seeds
            for combination in waiting
            for i in sorted(grids[combination])
        ]
        results = run_all(settings, args)
        records += results
        means, extended = mean_losses(results), []
        for combination in waiting:
            grid, best = grids[combination], RATES.index(best_rate(means[combination]))
            new = best + (args.spacing if best == max(grid) else -args.spacing)
            if best in (min(grid), max(grid)) and 0 <= new < len(RATES):
                grid.add(new)
                extended.append(combination)
        waiting = extended
    return records


def confirm(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run each combination at its best rate in --tuned, and multiples of it, with other seeds, and test."""
    results = read_results(args.tuned).values()
    tuned = [r for r in results if (r["iters"], r["rank"]) == (args.iters, args.rank)]
    means = mean_losses(tuned)
    if missing := [c for c in combinations(args) if c not in means]:
        raise SystemExit(
            f"error: {args.tuned} has no runs of {', '.join(missing[0])}; run tune on them first"
        )
    if used := {r["seed"] for r in tuned}.intersection(args.seeds):
        raise SystemExit(f"error: --seeds: seeds {sorted(used)} were used to tune; choose others")
    best = {c: best_rate(means[c]) for c in combinations(args)}
    settings = [
        Setting(*c, float(f"{multiple * best[c]:.3g}"), seed, args.iters, args.rank, True, args.evaluations)
        for seed in args.seeds
        for multiple in args.multiples
        for c in combinations(args)
    ]
    return run_all(settings, args)


def parse_seeds(text: str) -> list[int]:
    """Parse "3" or "100-119"."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("tune", "confirm"))
    parser.add_argument("--models", nargs="+", default=["study-runs/small-swiglu", "study-runs/small-geglu"])
    parser.add_argument("--tasks", nargs="+", required=True, choices=(*FROM_FILES, *GENERATED))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["lora", "na-lora"])
    parser.add_argument(
        "--seeds", type=parse_seeds, help="for example 0-2 (default: 0-2 for tune, 100-119 for confirm)"
    )
    parser.add_argument("--rate", type=float, default=4e-3, help="middle of the initial grid (default: 4e-3)")
    parser.add_argument(
        "--spacing",
        type=int,
        default=2,
        help="N: neighboring rates are a factor of 2^(N/2) apart (default: 2)",
    )
    parser.add_argument("--iters", type=int, default=120, help=f"batches of {BATCH} rows (default: 120)")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument(
        "--multiples", type=float, nargs="+", default=[1.0], help="of the best rate, for confirm (default: 1)"
    )
    parser.add_argument(
        "--evaluations",
        type=int,
        default=EVALUATIONS,
        help=f"evaluations during training; 0 to measure only the loss at the end (default: {EVALUATIONS})",
    )
    parser.add_argument("--tuned", type=Path, help="results of tune, required for confirm")
    parser.add_argument(
        "--output", type=Path, required=True, help="append results to this file, as JSON lines"
    )
    parser.add_argument(
        "--data", default="../shared/data", help="directory of the tasks that are not generated"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of parallel runs")
    args = parser.parse_args()
    args.seeds = args.seeds or parse_seeds("0-2" if args.stage == "tune" else "100-119")
    if args.stage == "confirm" and args.tuned is None:
        parser.error("confirm needs --tuned")
    if args.iters < 20 or args.iters % max(1, args.evaluations):
        parser.error(f"--iters is {args.iters}; it must be a multiple of {args.evaluations} and at least 20")
    for model in args.models:
        if not (Path(model) / "config.json").exists():
            parser.error(f"--models {model}: no config.json found; scripts/study_models.py makes a model")
    files = [
        Path(args.data) / task / f"{split}.jsonl"
        for task in args.tasks
        if task in FROM_FILES
        for split in SPLITS
    ]
    if missing := [str(file) for file in files if not file.exists()]:
        parser.error(f"--data {args.data}: {missing[0]} is missing")
    if args.tuned is not None and not args.tuned.exists():
        parser.error(f"--tuned {args.tuned}: no such file; run tune first")
    records = tune(args) if args.stage == "tune" else confirm(args)
    for (model, task, method), rates in mean_losses(records).items():
        best = best_rate(rates)
        print(f"{Path(model).name} {task} {method}: best rate {best:.3g}, loss {rates[best]:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
