"""Compare NA-LoRA with LoRA on the sums of the digits example.

    bash scripts/digits.sh --prepare
    bash scripts/environment.sh python scripts/digits_study.py --output docs/study/digits.jsonl

1. Each method trains with seeds 0 and 1 at several learning rates, a factor of two apart. The grid grows until the rate
   with the lowest validation loss is not at its edge.
2. Each method trains at its best rate with seeds 100 to 104, and is evaluated on the test rows, once.
3. A table shows the means and the mean differences, paired by seed, with 95 % intervals of Student's t.

Each run appends a line of JSON to the output; runs that are in it already are skipped. A seed decides the initial
adapters and the order of the rows, and is the same for both methods.

Only the last layers get adapters. What the layers below compute for a row never changes, so it is computed once, and
the runs train a model of the upper layers alone. All else is the project's own training.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from study_methods import METHODS

from nalora_mlx import NALoRAConfig, TrainingConfig, adapt, train
from nalora_mlx.core.config import RunConfig
from nalora_mlx.data.batches import collate, sorted_batches
from nalora_mlx.data.checks import read_rows, tokenize
from nalora_mlx.data.media import RowMedia
from nalora_mlx.data.tokenization import Example
from nalora_mlx.models.output_head import find_output_head
from nalora_mlx.models.vision.features import ImageEncoder
from nalora_mlx.models.vision.loading import open_processor, open_vision_model

BASELINE = "lora"
SPLITS = ("train", "valid", "test")
ROWS = {"train": 320, "valid": 100, "test": 300}
LAYERS = 8
RANK, SCALE = 4, 2.0
ITERS, BATCH = 40, 8
TUNING_SEEDS, SEEDS = (0, 1), (100, 101, 102, 103, 104)
START = 2e-3  # middle of the initial grid of learning rates
T_95 = 2.7764  # Student's t, two-sided, four degrees of freedom


@dataclass(frozen=True)
class Setting:
    """The settings of a run: a key of METHODS, the learning rate, the seed, and whether it reads the test rows."""

    method: str
    rate: float
    seed: int
    final: bool


# --- the upper layers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HiddenStates:
    """What the frozen layers make of a row, [n, D]; takes the place of image features, at all positions."""

    states: np.ndarray

    def load(self) -> dict[str, np.ndarray]:
        return {"features": self.states}


class Study:
    """The rows with their hidden states, and the model of the upper layers."""

    def __init__(self, name: str, data: str):
        self.name = name
        config = RunConfig(model=name, data=data, train=True, test=True, mask_prompt=True)
        model, model_config = open_vision_model(name)
        processor = open_processor(name, model_config)
        splits = tokenize(read_rows(config, SPLITS), processor.tokenizer, config.max_seq_length, processor)
        self.examples = {}
        with tempfile.TemporaryDirectory() as directory:
            encoder = ImageEncoder(model, processor, Path(directory))
            for split in SPLITS:
                rows = encoder.attach(splits[split].sequences[: ROWS[split]])
                self.examples[split] = with_hidden_states(model, rows)

    def upper_layers(self) -> nn.Module:
        """Return a new model of the upper layers, which reads hidden states."""
        model, _ = open_vision_model(self.name, lazy=True)
        model.language_model.layers = model.language_model.layers[-LAYERS:]
        return model


def with_hidden_states(model: nn.Module, rows: list[Example]) -> list[Example]:
    """Return rows whose media are the hidden states below the upper layers."""
    result: dict[int, Example] = {}
    tower = model.language_model
    for indices in sorted_batches(rows, 25):
        batch = collate(rows, indices).with_media()
        index = mx.array(batch.media["index"])
        text = tower.embed_tokens(mx.array(batch.inputs))
        hidden = mx.where(
            (index >= 0)[..., None], mx.array(batch.media["features"])[mx.maximum(index, 0)], text
        )
        for layer in tower.layers[:-LAYERS]:
            hidden = layer(hidden, "causal")
        for i, states in zip(indices, np.array(hidden), strict=True):
            count = rows[i].inputs
            media = RowMedia(np.arange(count, dtype=np.int32), (HiddenStates(states[:count]),))
            result[i] = replace(rows[i], media=media)
    return [result[i] for i in range(len(rows))]


# --- one run ------------------------------------------------------------------------------------------------


def run(study: Study, setting: Setting) -> dict[str, Any]:
    """Train and evaluate once. Return the record of the run."""
    start = time.perf_counter()
    model = study.upper_layers()
    mx.random.seed(setting.seed)
    method = METHODS[setting.method]
    keys = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    adapt(model, NALoRAConfig(rank=RANK, scale=SCALE, keys=tuple(keys), num_layers=-1, **dict(method.na)))
    warmup = ITERS // 10
    schedules = [
        optim.linear_schedule(setting.rate / warmup, setting.rate, warmup),
        optim.cosine_decay(setting.rate, ITERS - warmup, setting.rate / 10),
    ]
    optimizer = optim.Adam(optim.join_schedules(schedules, [warmup]), bias_correction=True)
    training = TrainingConfig(
        batch_size=BATCH, iters=ITERS, steps_per_report=ITERS, steps_per_eval=ITERS, seed=setting.seed
    )
    record: dict[str, Any] = asdict(setting)
    try:
        train(model, study.examples["train"], [], config=training, optimizer=optimizer, listeners=[])
    except FloatingPointError:  # the learning rate is too high
        return record | {"valid": {"loss": math.inf, "exact": 0.0}}
    for split in ("valid", "test") if setting.final else ("valid",):
        record[split] = score(model, study.examples[split])
    return record | {"seconds": round(time.perf_counter() - start, 1)}


def score(model: nn.Module, rows: list[Example]) -> dict[str, float]:
    """Return the loss per supervised token, and the share of rows whose greedy answer is exactly right."""
    model.eval()
    head = find_output_head(model)
    assert head is not None
    loss = tokens = exact = 0.0
    for indices in sorted_batches(rows, 25):
        batch = collate(rows, indices).with_media()
        count = batch.supervised_tokens
        media = {name: mx.array(array) for name, array in batch.media.items()}
        positions, targets = (mx.array(a[:count]) for a in batch.loss_positions()[:2])  # without fillers
        hidden = head.hidden(mx.array(batch.inputs), media=media)
        logits = head.logits(hidden.reshape(-1, hidden.shape[-1])[positions]).astype(mx.float32)
        loss += mx.sum(nn.losses.cross_entropy(logits, targets)).item()
        tokens += count
        # Greedy decoding gives the answer if and only if each of its tokens is the best one after those before it.
        wrong = np.array(positions)[np.array(mx.argmax(logits, axis=-1) != targets)]
        exact += len(indices) - len(set(wrong // batch.inputs.shape[1]))
    return {"loss": loss / tokens, "exact": exact / len(rows)}


# --- all runs -----------------------------------------------------------------------------------------------


class Results:
    """The records of finished runs, in a file of JSON lines."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.records = [json.loads(line) for line in lines]

    def find(self, setting: Setting) -> dict[str, Any] | None:
        wanted = asdict(setting).items()
        return next((r for r in self.records if wanted <= {k: r[k] for k in asdict(setting)}.items()), None)

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded(record)) + "\n")


def rounded(value: Any) -> Any:
    """Round floats to six digits. Replace infinity, which JSON does not have, by 1e9."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{min(value, 1e9):.6g}") if isinstance(value, float) else value


def complete(study: Study, results: Results, settings: Iterable[Setting]) -> list[dict[str, Any]]:
    """Return the records of the settings, in their order, and run those that are missing."""
    records = []
    for setting in settings:
        record = results.find(setting)
        if record is None:
            record = run(study, setting)
            results.add(record)
            print(json.dumps(rounded(record)), file=sys.stderr, flush=True)
        records.append(record)
    return records


def best_rate(study: Study, results: Results, method: str) -> float:
    """Return the learning rate with the lowest validation loss, averaged over the tuning seeds."""
    rates = [START / 2, START, START * 2]
    while True:
        losses = {}
        for rate in rates:
            records = complete(study, results, [Setting(method, rate, seed, False) for seed in TUNING_SEEDS])
            losses[rate] = statistics.mean(r["valid"]["loss"] for r in records)
        best = min(losses, key=losses.__getitem__)
        if best == rates[0]:
            rates.insert(0, best / 2)
        elif best == rates[-1]:
            rates.append(best * 2)
        else:
            return best


def table(results: Results, rates: dict[str, float]) -> str:
    """Return a table of the final runs: means, and mean differences to the baseline with their 95 % intervals."""
    lines = ["| | rate | test loss | exactly right |", "|---|---|---|---|"]
    values: dict[str, dict[str, list[float]]] = {}
    for method, rate in rates.items():
        records = [results.find(Setting(method, rate, seed, True)) for seed in SEEDS]
        values[method] = {name: [r["test"][name] for r in records if r] for name in ("loss", "exact")}
        means = {name: statistics.mean(v) for name, v in values[method].items()}
        lines.append(f"| {method} | {rate:g} | {means['loss']:.4f} | {means['exact']:.1%} |")
    for method in rates:
        if method != BASELINE:
            loss, exact = (
                interval(paired(values[method][name], values[BASELINE][name]), unit)
                for name, unit in (("loss", 1.0), ("exact", 100.0))
            )
            lines.append(f"| {method} - {BASELINE} | | {loss} | {exact} points |")
    return "\n".join(lines)


def paired(ours: list[float], theirs: list[float]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def interval(differences: list[float], unit: float) -> str:
    """Return the mean difference and its 95 % interval of Student's t."""
    mean = statistics.mean(differences)
    half = T_95 * statistics.stdev(differences) / math.sqrt(len(differences))
    digits = 4 if unit == 1 else 1
    return (
        f"{unit * mean:+.{digits}f} [{unit * (mean - half):+.{digits}f}, {unit * (mean + half):+.{digits}f}]"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/digits/model")
    parser.add_argument("--data", default="demo/digits/data/sum")
    parser.add_argument(
        "--output", type=Path, required=True, help="file of results; is continued if it exists"
    )
    args = parser.parse_args()
    for path in (args.model, args.data):
        if not Path(path).is_dir():
            parser.error(f"{path} does not exist; run bash scripts/digits.sh first")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = Results(args.output)
    study = Study(args.model, args.data)
    rates = {method: best_rate(study, results, method) for method in (BASELINE, "na-lora")}
    settings = [Setting(method, rates[method], seed, True) for seed in SEEDS for method in rates]
    complete(study, results, settings)
    print(table(results, rates))
    return 0


if __name__ == "__main__":
    sys.exit(main())
