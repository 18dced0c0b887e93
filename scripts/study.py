"""Does NA-LoRA beat LoRA, and by which of its parts? A grid of runs with the project's trainer.

    python scripts/study.py tune --tasks orders --output study-runs/tune.jsonl            the best rate of each method
    python scripts/study.py confirm --tuned study-runs/tune.jsonl --output study-runs/confirm.jsonl
    python scripts/study_tables.py study-runs/confirm.jsonl                               tables and plots

`tune` trains every method on every model and task with a few seeds and learning rates, and adds rates until the best
one, by validation loss, is not at the edge of its grid. `confirm` trains each method at its best rate with other
seeds and reads the test split, once. Every run is one line of JSON, appended when it is done; a run that is in the
file is not done again, so that a study which was interrupted goes on where it was. docs/study.md has the protocol.

All methods have the same adapters, and the same order of rows for a seed; Adam with bias correction; warm-up, cosine.
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
from study_methods import METHODS, Method, controlled, fit
from study_models import LENGTH, rows_of, sources
from study_tasks import FORGETTING, FROM_FILES, GENERATED, SPLITS, Task, score, tokenized

from nalora_mlx import NALoRAConfig, TrainingConfig, adapt, train
from nalora_mlx.adapters.attach import adapt_dora
from nalora_mlx.models.output_head import find_output_head

# A method's grid is a part of these; neighbours are a factor of the root of 2 apart.
RATES = [float(f"{1e-4 * 2 ** (k / 2):.3g}") for k in range(-4, 22)]
ROWS = {"train": 2000, "valid": 150, "test": 300}
TEXT_ROWS = 8  # of LENGTH tokens, on which forgetting is measured
BATCH = 8
EVALUATIONS = 4
WATCHED = 8  # validation batches of those evaluations; at the end all rows count


# --- one run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """All that decides a run."""

    model: str
    task: str
    method: str
    rate: float
    seed: int
    iters: int
    rank: int
    final: bool  # whether the test split is read

    @property
    def key(self) -> str:
        """A name for it and for what is the same in all runs of this program; the same in every file."""
        constants = [BATCH, ROWS, EVALUATIONS, WATCHED, TEXT_ROWS, LENGTH]
        text = json.dumps([asdict(self), constants], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _task(model: str, task: str, data: str) -> Task:
    from mlx_lm.utils import load_tokenizer

    return tokenized(task, data, load_tokenizer(Path(model)), ROWS)


def _load(model: str) -> nn.Module:
    from mlx_lm import load

    return load(model)[0]


@cache
def _text(model: str) -> tuple[mx.array, mx.array, mx.array]:
    """Unrelated text: token ids [N, L], those that follow, and the base model's log-probabilities [N, L, V]."""
    from mlx_lm.utils import load_tokenizer

    texts = [text for path, text in sources(held_out=True) if set(path.parts) & set(FORGETTING)]
    rows = rows_of(texts, load_tokenizer(Path(model)), LENGTH)
    chosen = np.stack([rows[i].tokens for i in np.linspace(0, len(rows) - 1, TEXT_ROWS).astype(int)])
    tokens = mx.array(chosen)
    base = _load(model)
    base.eval()
    logits = base(tokens[:, :-1]).astype(mx.float32)
    known = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(known)
    return tokens[:, :-1], tokens[:, 1:], known


def forgetting(model: nn.Module, name: str) -> dict[str, float]:
    """KL(base || model) in nats a token, and the rise of the loss, on text that no task has to do with."""
    inputs, targets, known = _text(name)
    logits = model(inputs).astype(mx.float32)
    now = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    kl = mx.mean(mx.sum(mx.exp(known) * (known - now), axis=-1))
    rise = mx.mean(mx.take_along_axis(known - now, targets[..., None], axis=-1))
    return {"kl": float(kl), "rise": float(rise)}


def run(setting: Setting, data: str) -> dict[str, Any]:
    """Train and evaluate once."""
    tic = time.perf_counter()
    method, task = METHODS[setting.method], _task(setting.model, setting.task, data)
    model = _load(setting.model)
    mx.random.seed(setting.seed)
    config = NALoRAConfig(
        rank=setting.rank, scale=2.0 * method.scale(setting.rank), num_layers=-1, **dict(method.na)
    )
    (adapt_dora if method.dora else adapt)(model, config)
    if method.fitted:
        fit(model, task.splits["train"], method.fitted, BATCH, setting.seed)
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

    every = setting.iters // EVALUATIONS
    training = TrainingConfig(
        batch_size=BATCH,
        iters=setting.iters,
        steps_per_report=every,
        steps_per_eval=every,
        val_batches=WATCHED,
        seed=setting.seed,
    )
    with controlled(method.control, setting.seed):
        result = train(
            model,
            task.splits["train"],
            task.splits["valid"],
            config=training,
            optimizer=optimizer(setting, method),
            listeners=[listen],
        )
    if len(curve) != EVALUATIONS + 1 and not result.stopped:
        raise RuntimeError(f"{len(curve)} evaluations of {EVALUATIONS + 1}")
    model.eval()
    splits = ("valid", "test") if setting.final else ("valid",)
    scores = {split: score(head, task.splits[split], task.choices[split]) for split in splits}
    return {
        "key": setting.key,
        **asdict(setting),
        **scores,
        **forgetting(model, setting.model),
        "curve": curve,
        "importance": {path: row["importance"] for path, row in layers.items()},
        "seconds": round(time.perf_counter() - tic, 2),
    }


def optimizer(setting: Setting, method: Method) -> optim.Optimizer:
    """Adam; the rate warms up over a tenth of the run and then falls to a tenth as a cosine."""

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


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """Runs of a file by key; half a line at its end is left out."""
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
    """Do what is not done yet, in several processes; results in the order of the settings."""
    done = finished(args.output)
    waiting = [s for s in settings if s.key not in done]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    tic = time.perf_counter()
    # Each process has its share of the cores: small matrices gain little from a second one.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(args.jobs, mp_context=context) as pool,
        args.output.open("a") as file,
    ):
        futures = {pool.submit(run, setting, args.data): setting for setting in waiting}
        for count, future in enumerate(as_completed(futures), 1):
            setting = futures[future]
            try:
                record = future.result()
            except FloatingPointError:  # the rate is too high for it
                record = {
                    "key": setting.key,
                    **asdict(setting),
                    "valid": {"loss": math.inf},
                    "diverged": True,
                }
            file.write(json.dumps(_plain(record)) + "\n")
            file.flush()
            done[setting.key] = record
            left = (time.perf_counter() - tic) / count * (len(waiting) - count)
            print(
                f"{count}/{len(waiting)}, {left / 60:.0f} min left: {Path(setting.model).name} {setting.task} "
                f"{setting.method} {setting.rate:.2g} seed {setting.seed}: {record['valid']['loss']:.4f}",
                file=sys.stderr,
                flush=True,
            )
    return [done[s.key] for s in settings]


def _plain(value: Any) -> Any:
    """Six digits; JSON has no infinity."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else 1e9
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


Place = tuple[str, str, str]  # model, task, method


def places_of(args: argparse.Namespace) -> list[Place]:
    return [(model, task, name) for model in args.models for task in args.tasks for name in args.methods]


def mean_losses(records: list[dict[str, Any]]) -> dict[Place, dict[float, float]]:
    """Mean validation loss of each model, task and method at each rate."""
    losses: dict[Place, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        losses[r["model"], r["task"], r["method"]][r["rate"]].append(r["valid"]["loss"])
    return {
        place: {rate: statistics.mean(values) for rate, values in rates.items()}
        for place, rates in losses.items()
    }


def tune(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs at more and more rates, until the best rate of each model, task and method is not at the edge."""
    middle = min(range(len(RATES)), key=lambda i: abs(math.log(RATES[i] / args.rate)))
    grid = {place: {middle - args.spacing, middle, middle + args.spacing} for place in places_of(args)}
    waiting, records = list(grid), []
    while waiting:
        settings = [
            Setting(*place, RATES[i], seed, args.iters, args.rank, False)
            for seed in args.seeds
            for place in waiting
            for i in sorted(grid[place])
        ]
        found = run_all(settings, args)
        records += found
        means, still = mean_losses(found), []
        for place in waiting:
            at = min(sorted(grid[place]), key=lambda i: means[place][RATES[i]])
            beyond = at + (args.spacing if at == max(grid[place]) else -args.spacing)
            if at in (min(grid[place]), max(grid[place])) and 0 <= beyond < len(RATES):
                grid[place].add(beyond)
                still.append(place)
        waiting = still
    return records


def confirm(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs with other seeds at the best rates of a file of `tune`, with the test split."""
    tuned = [r for r in finished(args.tuned).values() if (r["iters"], r["rank"]) == (args.iters, args.rank)]
    means = mean_losses(tuned)
    if missing := [place for place in places_of(args) if place not in means]:
        raise SystemExit(f"error: {args.tuned} has no runs of {missing[0]}; run tune with them first")
    if used := {r["seed"] for r in tuned}.intersection(args.seeds):
        raise SystemExit(f"error: rates were chosen with seeds {sorted(used)}; give others")
    best = {place: min(means[place], key=lambda rate: means[place][rate]) for place in places_of(args)}
    return run_all(
        [
            Setting(*place, best[place], seed, args.iters, args.rank, True)
            for seed in args.seeds
            for place in places_of(args)
        ],
        args,
    )


def numbers(text: str) -> list[int]:
    """Seeds: 3, or 100-119."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("tune", "confirm"))
    parser.add_argument("--models", nargs="+", default=["study-runs/small-swiglu", "study-runs/small-geglu"])
    parser.add_argument("--tasks", nargs="+", required=True, choices=(*FROM_FILES, *GENERATED))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["lora", "na-lora"])
    parser.add_argument("--seeds", type=numbers, help="like 0-2 (default: 0-2 to tune, 100-119 to confirm)")
    parser.add_argument("--rate", type=float, default=4e-3, help="middle of the first grid (default: 4e-3)")
    parser.add_argument(
        "--spacing", type=int, default=2, help="neighbouring rates are 2^(this/2) apart (default: 2)"
    )
    parser.add_argument("--iters", type=int, default=120, help=f"batches of {BATCH} rows (default: 120)")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--tuned", type=Path, help="results of tune, for confirm")
    parser.add_argument("--output", type=Path, required=True, help="file of results, one JSON object a line")
    parser.add_argument(
        "--data", default="../shared/data", help="directory of the tasks that are not generated"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    args = parser.parse_args()
    args.seeds = args.seeds or (numbers("0-2") if args.stage == "tune" else numbers("100-119"))
    if args.stage == "confirm" and args.tuned is None:
        parser.error("confirm needs --tuned")
    if args.iters < 20 or args.iters % EVALUATIONS:
        parser.error(f"--iters is {args.iters}; it must be a multiple of {EVALUATIONS}, and at least 20")
    for model in args.models:
        if not (Path(model) / "config.json").exists():
            parser.error(f"{model} holds no model; scripts/study_models.py makes one")
    files = [
        Path(args.data) / task / f"{split}.jsonl"
        for task in args.tasks
        if task in FROM_FILES
        for split in SPLITS
    ]
    if missing := [str(file) for file in files if not file.exists()]:
        parser.error(f"--data {args.data}: {missing[0]} is missing")
    if args.tuned is not None and not args.tuned.exists():
        parser.error(f"--tuned {args.tuned}: no such file; tune writes it")
    records = tune(args) if args.stage == "tune" else confirm(args)
    for place, rates in mean_losses(records).items():
        best = min(rates, key=lambda rate: rates[rate])
        print(f"{Path(place[0]).name} {place[1]} {place[2]}: {best:.3g}, validation loss {rates[best]:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
