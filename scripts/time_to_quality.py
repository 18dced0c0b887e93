"""Measure how long trainers take to reach a validation loss: same model, rows, machine and wall clock.

    python scripts/time_to_quality.py --model demo/model --data DATA --seconds 120 --output study-runs/time.jsonl \
      --runs mlx_lm.lora lora na-lora peft mlx_lm.lora@1e-4 na-lora:quick
    python scripts/time_to_quality.py --tables study-runs/time.jsonl --plot docs/images/time.svg

A run is a trainer with its defaults, TRAINER@RATE with a learning rate, TRAINER@RATE+bias_correction with Adam's bias
correction as well, or na-lora:PRESET or lora:PRESET. Trainers:

- mlx_lm.lora: mlx-lm's trainer and its defaults.
- lora, na-lora: ours. Defaults: those of mlx_lm.lora, with our batches.
- peft: Transformers and PEFT on PyTorch. Defaults: those of LoraConfig (rank 8, alpha 8, query and value projections)
  and of the Trainer (AdamW at 5e-5, batches of 8), at a constant rate. With a rate, the adapters of the others, and
  their batches. PyTorch's Adam always corrects bias.

Each run is a process of its own. Its clock counts everything from the first batch on, compilation included, but not
the evaluations, which all compute the same loss of the same rows, more often at first. Prompts are masked. Runs take
turns, in a rotating order. Each appends one line of JSON to the output; runs that are in the file are skipped.
"""

import argparse
import contextlib
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from benchmark_training import worker_environment

BASELINE = "mlx_lm.lora"
TRAINERS = (BASELINE, "lora", "na-lora", "peft")
RANK, SCALE, LAYERS, BATCH = 8, 20.0, 16, 4  # mlx_lm.lora's defaults
DEFAULT_RATE = 1e-5
PEFT_RATE, PEFT_BATCH = 5e-5, 8  # the Trainer's defaults
REPORT = 2  # iterations of the others between looks at the clock
EVALUATION_BATCH = 16
Curve = list[tuple[float, int, float]]  # seconds, iterations, validation loss


class Run(NamedTuple):
    """What one run does: its trainer, and what it has other than the trainer's defaults."""

    trainer: str
    rate: float | None = None
    bias_correction: bool = False
    preset: str | None = None


class TimeIsUp(Exception):
    """Ends a run whose trainer has no other way to stop."""


class Clock:
    """Evaluates at times that grow as squares, the last at the end, and says when the time is up.

    Args:
        seconds: training time of the run.
        points: number of evaluations during it.
        evaluate: returns the validation loss.
    """

    def __init__(self, seconds: float, points: int, evaluate: Callable[[], float]):
        self.seconds, self.points, self.evaluate = seconds, points, evaluate
        self.curve: Curve = []
        self.started = self.paused = 0.0
        self.due = 1  # number of the next evaluation

    def start(self) -> None:
        """Evaluate once, and start."""
        self.curve.append((0.0, 0, self.evaluate()))
        self.started = time.perf_counter()

    def tick(self, iteration: int) -> bool:
        """Evaluate if it is time for it; return whether the time is up."""
        now = time.perf_counter() - self.started - self.paused
        if now >= self.seconds * (self.due / self.points) ** 2:
            self.due = math.floor(self.points * math.sqrt(now / self.seconds)) + 1
            start = time.perf_counter()
            self.curve.append((round(now, 3), iteration, self.evaluate()))
            self.paused += time.perf_counter() - start
        return now >= self.seconds


def parse_run(text: str) -> Run:
    """Return what a run does, from its name."""
    trainer, _, given = text.partition("@")
    trainer, _, preset = trainer.partition(":")
    given, _, variant = given.partition("+")
    try:
        rate = float(given) if given else None
    except ValueError:
        trainer = ""
    if (
        trainer not in TRAINERS
        or variant not in ("", "bias_correction")
        or (variant and not rate)
        or (preset and (given or trainer not in TRAINERS[1:3]))
    ):
        raise argparse.ArgumentTypeError(
            f"{text} is no run; give TRAINER, TRAINER@RATE, TRAINER@RATE+bias_correction or na-lora:PRESET"
        )
    return Run(trainer, rate, bool(variant), preset or None)


# --- runs ---------------------------------------------------------------------------------------------------


def load_rows(args: argparse.Namespace, tokenizer: Any, split: str) -> list[Any]:
    """Return the tokenized rows of a split, with masked prompts."""
    from nalora_mlx.data.rows.formats import Features
    from nalora_mlx.data.sources.loading import load_local
    from nalora_mlx.data.tokenization import tokenize_split

    rows = load_local(Path(args.data), [split])[split]
    return tokenize_split(rows, tokenizer, Features(mask_prompt=True), 2048).sequences


def mlx_loss(model: Any, rows: list[Any]) -> Callable[[], float]:
    """Return a function that computes the loss of rows with an MLX model."""
    from study_tasks import score

    from nalora_mlx.models.output_head import find_output_head

    head = find_output_head(model)
    assert head is not None

    def evaluate() -> float:
        model.eval()
        loss = score(head, rows, [])["loss"]
        model.train()
        return loss

    return evaluate


def run_mlx_lm(args: argparse.Namespace, run: Run, seed: int) -> Clock:
    """Train with mlx_lm.lora's trainer."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm import load
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.datasets import CacheDataset, load_local_dataset
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, tokenizer, *_ = load(args.model)
    np.random.seed(seed)
    mx.random.seed(seed)
    model.freeze()
    linear_to_lora_layers(model, LAYERS, {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    clock = Clock(
        args.seconds, args.points, mlx_loss(model, load_rows(args, tokenizer, "valid")[: args.rows])
    )
    rows = load_local_dataset(Path(args.data), tokenizer, types.SimpleNamespace(mask_prompt=True))[0]

    class Callback(trainer.TrainingCallback):
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            if clock.tick(info["iteration"]):
                raise TimeIsUp

    settings = trainer.TrainingArgs(
        batch_size=BATCH,
        iters=10**6,
        steps_per_report=REPORT,
        steps_per_save=10**9,
        adapter_file=str(Path(tempfile.mkdtemp()) / "adapters.safetensors"),
    )
    clock.start()
    with contextlib.suppress(TimeIsUp):
        trainer.train(
            model,
            optim.Adam(run.rate or DEFAULT_RATE, bias_correction=run.bias_correction),
            CacheDataset(rows),
            args=settings,
            training_callback=Callback(),
        )
    return clock


def run_ours(args: argparse.Namespace, run: Run, seed: int) -> Clock:
    """Train with our trainer."""
    import mlx.core as mx
    from mlx_lm import load

    from nalora_mlx import adapt, train
    from nalora_mlx.core.config import load_run_config
    from nalora_mlx.training.optimizers import configured_optimizer

    flags: dict[str, Any] = {"fine_tune_type": run.trainer, "seed": seed, "iters": 10**6}
    if run.rate:
        flags["learning_rate"] = run.rate
    if run.bias_correction:
        flags["optimizer_config"] = {"adam": {"bias_correction": True}}
    if run.preset:
        flags["preset"] = run.preset
    config = load_run_config(None, flags)
    model, tokenizer, *_ = load(args.model)
    mx.random.seed(seed)
    adapt(model, config.lora_config())
    clock = Clock(
        args.seconds, args.points, mlx_loss(model, load_rows(args, tokenizer, "valid")[: args.rows])
    )
    rows, iterations = load_rows(args, tokenizer, "train"), itertools.count()

    def is_time_up() -> bool:  # asked before each iteration
        mx.eval(model.trainable_parameters())
        iteration = next(iterations)
        return iteration > 0 and clock.tick(iteration)

    clock.start()
    train(model, rows, config=config, optimizer=configured_optimizer(config), stop=is_time_up)
    return clock


def run_peft(args: argparse.Namespace, run: Run, seed: int) -> Clock:
    """Train with Transformers and PEFT: random rows, padded to the longest in the batch."""
    import torch
    from mlx_lm.tokenizer_utils import load as load_tokenizer
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer: Any = load_tokenizer(Path(args.model))
    count = len(model.model.layers)
    adapters: dict[str, Any] = {}
    if run.rate:
        adapters = {
            "r": RANK,
            "lora_alpha": SCALE * RANK,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "layers_to_transform": list(range(count - LAYERS, count)),
        }
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **adapters)).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, run.rate) if run.rate else torch.optim.AdamW(trained, PEFT_RATE)
    size = BATCH if run.rate else PEFT_BATCH
    rows, valid = load_rows(args, tokenizer, "train"), load_rows(args, tokenizer, "valid")[: args.rows]

    def loss_of(batch: list[Any], reduction: str) -> Any:
        longest = max(len(row.tokens) for row in batch)
        tokens = torch.zeros(len(batch), longest, dtype=torch.long)
        labels, mask = torch.full_like(tokens, -100), torch.zeros_like(tokens)
        for i, row in enumerate(batch):
            n = len(row.tokens)
            tokens[i, :n], mask[i, :n] = torch.tensor(row.tokens), 1
            labels[i, :n] = torch.where(torch.tensor(row.loss_mask), tokens[i, :n], -100)
        if reduction == "mean":
            return adapted(input_ids=tokens, attention_mask=mask, labels=labels).loss
        logits = adapted(input_ids=tokens, attention_mask=mask).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )

    def evaluate() -> float:
        adapted.eval()
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(valid), EVALUATION_BATCH):
                total += float(loss_of(valid[start : start + EVALUATION_BATCH], "sum"))
        adapted.train()
        return total / sum(int(row.loss_mask.sum()) for row in valid)

    clock, rng, iteration = Clock(args.seconds, args.points, evaluate), random.Random(seed), 0
    clock.start()
    while True:
        loss_of([rows[rng.randrange(len(rows))] for _ in range(size)], "mean").backward()
        optimizer.step()
        optimizer.zero_grad()
        iteration += 1
        if iteration % REPORT == 0 and clock.tick(iteration):
            return clock


def measure(args: argparse.Namespace, text: str, seed: int) -> dict[str, Any]:
    """Do one run in this process; return its record."""
    run = parse_run(text)
    trainers = {BASELINE: run_mlx_lm, "peft": run_peft}
    clock = trainers.get(run.trainer, run_ours)(args, run, seed)
    curve = [(seconds, iteration, float(f"{loss:.5g}")) for seconds, iteration, loss in clock.curve]
    return {"run": text, "seed": seed, "curve": curve}


def run_all(args: argparse.Namespace) -> None:
    """Do all runs that are not in the output yet."""
    task = Path(args.data).name
    done = {(r["task"], r["run"], r["seed"]) for r in read_records(args.output)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(args.seeds):
        start = i * len(args.runs) // max(1, len(args.seeds))
        for text in args.runs[start:] + args.runs[:start]:
            if (task, text, seed) in done:
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", text, str(seed)]
            environment = worker_environment(parse_run(text).trainer)
            result = subprocess.run(command, capture_output=True, text=True, env=environment)
            if result.returncode:
                raise SystemExit(f"error: {text}: {result.stderr}")
            record = {"task": task, "seconds": args.seconds, **json.loads(result.stdout.splitlines()[-1])}
            with args.output.open("a") as file:
                file.write(json.dumps(record) + "\n")
            seconds, iterations, loss = record["curve"][-1]
            print(
                f"{task} {text} seed {seed}: {loss:.4f} after {iterations} iterations, {seconds:.0f} s",
                flush=True,
            )


# --- tables -------------------------------------------------------------------------------------------------


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a result file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def seconds_until(curve: Curve, loss: float) -> float:
    """Return when a curve first reaches a loss, interpolated between evaluations; infinity if never."""
    for (t0, _, l0), (t1, _, l1) in itertools.pairwise(curve):
        if l0 <= loss:
            return t0
        if l1 <= loss:
            return t0 + (t1 - t0) * (l0 - loss) / (l0 - l1)
    return math.inf


def interval(values: list[float], digits: int) -> str:
    """Format the median of some values, with the smallest and the largest."""
    shown = [
        f"{x:.{digits}f}" if math.isfinite(x) else "never"
        for x in (statistics.median(values), min(values), max(values))
    ]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def tables(records: list[dict[str, Any]]) -> str:
    """Return a table for each task: the loss at the end, and the time to mlx_lm.lora's losses as shares of its time."""
    by_task: dict[str, dict[str, dict[int, Curve]]] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        by_task[r["task"]][r["run"]][r["seed"]] = r["curve"]
    parts = []
    for task, runs in by_task.items():
        references = [
            name
            for name, curves in runs.items()
            if name.partition("@")[0] == BASELINE
            and all(curve[-1][2] < curve[0][2] for curve in curves.values())  # not diverged
        ]
        columns = "".join(f" | time until {name}'s last loss" for name in references)
        lines = [
            f"{task}",
            "",
            f"| | iterations | loss at the end{columns} |",
            "|---|---|---|" + "---|" * len(references),
        ]
        for name, curves in runs.items():
            iterations = statistics.median(curve[-1][1] for curve in curves.values())
            cells = [f"{iterations:.0f}", interval([curve[-1][2] for curve in curves.values()], 3)]
            for reference in references:
                base = runs[reference]
                ratios = [
                    seconds_until(curves[seed], base[seed][-1][2]) / base[seed][-1][0]
                    for seed in curves.keys() & base.keys()
                ]
                cells.append(interval(ratios, 2) if ratios else "-")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


COLORS = dict(zip(TRAINERS, ("#1b1b1b", "#0072b2", "#d55e00", "#009e73"), strict=True))


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Plot the loss over the seconds, a panel for each task: the median of the seeds, and their range."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "time"
    tasks = list(dict.fromkeys(r["task"] for r in records))
    figure, (axes,) = pyplot.subplots(
        1, len(tasks), figsize=(6.5 * len(tasks), 4.5), squeeze=False, layout="constrained"
    )
    for panel, task in zip(axes, tasks, strict=True):
        found = [r for r in records if r["task"] == task]
        for name in dict.fromkeys(r["run"] for r in found):
            run = parse_run(name)
            curves = [np.array(r["curve"]) for r in found if r["run"] == name]
            seconds = np.linspace(0, min(curve[-1, 0] for curve in curves), 60)
            losses = [np.interp(seconds, curve[:, 0], curve[:, 2]) for curve in curves]
            style = "-" if run.preset else "--" if run.rate else ":"
            panel.plot(
                seconds,
                np.median(losses, axis=0),
                style,
                color=COLORS[run.trainer],
                linewidth=2.5 if run.preset == "quick" else 1.2,
                label=name,
            )
            panel.fill_between(
                seconds, np.min(losses, axis=0), np.max(losses, axis=0), color=COLORS[run.trainer], alpha=0.1
            )
        panel.set(yscale="log", title=task, xlabel="seconds", ylabel="validation loss")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:.1f}")
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="demo/model", help="directory of a float32 model (default: demo/model)"
    )
    parser.add_argument("--data", help="directory with train.jsonl and valid.jsonl")
    parser.add_argument("--runs", nargs="+", default=list(TRAINERS), help="see above")
    parser.add_argument("--seconds", type=float, default=120, help="training time of a run (default: 120)")
    parser.add_argument("--points", type=int, default=8, help="evaluations of a run (default: 8)")
    parser.add_argument("--rows", type=int, default=100, help="validation rows (default: 100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="append raw results to this file, as JSON lines")
    parser.add_argument(
        "--tables", type=Path, nargs="+", help="print the tables of these results, and do no runs"
    )
    parser.add_argument("--plot", type=Path, help="with --tables: file to write a plot to")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tables:
        records = [record for path in args.tables for record in read_records(path)]
        print(tables(records))
        if args.plot:
            plot(records, args.plot)
        return 0
    if args.plot:
        parser.error("--plot needs --tables, with the results to plot")
    if not args.data or not args.output:
        parser.error("give --data and --output, or --tables")
    try:
        for text in args.runs:
            parse_run(text)
    except argparse.ArgumentTypeError as error:
        parser.error(f"--runs: {error}")
    if args.worker:
        print(json.dumps(measure(args, args.worker[0], int(args.worker[1]))))
        return 0
    run_all(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
