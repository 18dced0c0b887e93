"""Synthetic run directories of any length, with known values."""

import json
from pathlib import Path

import numpy as np

from nalora_mlx.runs.samples import write_samples_file

CHANNELS = 8  # recorded individually in each layer
LAYER_UPDATES = 50  # reports of a run with new layer statistics; those between repeat them


def write_run(
    path: Path,
    reports: int = 40,
    layers: int | list[str] = 4,
    every: int = 1,
    seed: int = 0,
    kind: str = "na-lora",
    samples: list | None = None,
    **na,
) -> Path:
    """Write a run whose loss falls as 2 exp(-3 t/T) + 0.5, with the best validation, 0.25, halfway."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{i}.mlp" for i in range(layers)] if isinstance(layers, int) else layers
    hard = na.get("mask") == "hard"
    lines = []
    layers_json = ""
    for t in range(reports + 1):
        progress = t / reports
        if t % max(1, reports // 10) == 0:
            loss = 0.25 if t == reports // 2 else 1 + abs(progress - 0.5)
            best = 0.25 if t >= reports // 2 else 1 + 0.5 - progress
            row = {"split": "valid", "step": t * every, "loss": loss, "tokens": 9, "seconds": 0.1}
            lines.append(json.dumps({**row, "best_loss": best}))
        if t:
            row = {
                "split": "train",
                "step": t * every,
                "loss": train_loss(progress) + 0.05 * rng.normal(),
                "tokens": 1000 * t,
                "tokens_per_second": 1500 + 50 * rng.normal(),
                "iterations_per_second": 1.5,
                "learning_rate": 1e-4 * (1 - progress),
                "gradient_norm": abs(rng.normal()),
                "skipped": 0,
                "peak_memory_gb": 12.5,
            }
            if t % max(1, reports // LAYER_UPDATES) == 0 or not layers_json:
                layers_json = json.dumps({name: layer(i, progress, hard) for i, name in enumerate(names)})
            lines.append(json.dumps(row)[:-1] + f', "layers": {layers_json}}}')
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    config = {
        "fine_tune_type": "lora",
        "num_layers": len(names),
        "lora_parameters": {"rank": 8, "scale": 20.0},
    }
    settings = {"mask": "soft", "beta": 0.9, **na}
    if kind == "na-lora":
        config["na_lora"] = settings
    (path / "adapter_config.json").write_text(json.dumps(config))
    record = {
        "settings": {"fine_tune_type": kind, "na_parameters": settings, "model": "a/model", "data": "words"},
        "data": {"train": {"rows": 320}, "valid": {"rows": 40}},
    }
    (path / "run.json").write_text(json.dumps(record))
    if samples:
        write_samples_file(path, samples, 96)
    return path


def sample(prompt: str, expected: str | None, before: str | None, after: str, complete: bool = True) -> dict:
    """Return an answered prompt as samples.json has it."""
    return {
        "source": "valid.jsonl:1",
        "messages": [{"role": "user", "content": prompt}],
        "prompt": prompt,
        "expected": expected,
        "before": before,
        "before_complete": True,
        "after": after,
        "complete": complete,
    }


def train_loss(progress: float) -> float:
    """Return the training loss without noise."""
    return 2 * np.exp(-3 * progress) + 0.5


def layer(i: int, progress: float, hard: bool = False) -> dict:
    def spread(middle):
        return {"mean": middle, "p10": 0.5 * middle, "p50": 0.9 * middle, "p90": 1.5 * middle}

    return {
        "mask": {"mean": 0.5, "p10": 0, "p50": 0.5, "p90": 1} if hard else spread(1.0),
        "sparsity": 0.5 if hard else 0.02 * i + 0.1 * progress,
        "effective": 0.5 if hard else 0.9 - 0.1 * progress,
        "multiplier": spread(1 + 0.01 * i),
        "step_scale": spread(0.8 - 0.01 * i),
        "importance": spread(0.5 + 0.05 * i - 0.1 * progress),
        "channels": [channel(i, c, progress) for c in range(CHANNELS)],
        "occupancy": {"suppressed": 0.1, "transition": 0.7, "homogeneous": 0.2},
        "misalignment": 0.1 * progress + 0.02 * i,
    }


def channel(i: int, c: int, progress: float) -> float:
    """Return the importance of a channel: it falls for odd channels and rises for even ones."""
    return round(0.3 + 0.02 * i + 0.01 * c + (0.1 if c % 2 == 0 else -0.1) * progress, 4)


def write_preference_run(
    path: Path,
    accuracies: list,
    losses: list | None = None,
    reports: int = 40,
    mode: str = "dpo",
    last: dict | None = None,
    rows: int = 40,
    **measures,
) -> Path:
    """Write a preference run with these validations, evenly spaced, the first one before training.

    In training and validation, rewards are 2 and -1 times the share of the run that is done, and log-probabilities
    -2 plus it and -3 minus it. `measures` replace these in each record, and `last` in the last validation.
    """
    write_run(path, reports)
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["split"] == "train"]
    for record in train:
        record |= preference_measures(record["step"] / reports) | {"accuracy": 0.75} | measures
    valid = []
    for i, accuracy in enumerate(accuracies):
        done = i / max(1, len(accuracies) - 1)
        loss = losses[i] if losses else 0.7 - 0.1 * done
        record = {"split": "valid", "step": round(done * reports), "loss": loss, "tokens": 9, "seconds": 0.1}
        more = {"accuracy": accuracy, "kl": 0.5 * done, **measures}
        valid.append(record | preference_measures(done) | more)
    valid[-1] |= last or {}
    lines = [json.dumps(record) + "\n" for record in (*valid, *train)]
    (path / "metrics.jsonl").write_text("".join(lines))
    record = json.loads((path / "run.json").read_text())
    record["settings"] |= {"train_mode": mode, "preference_beta": 0.1}
    record["data"]["valid"]["rows"] = rows
    (path / "run.json").write_text(json.dumps(record))
    return path


def preference_measures(done: float) -> dict:
    return {
        "chosen_reward": 2 * done,
        "rejected_reward": -done,
        "chosen_logp": -2 + done,
        "rejected_logp": -3 - done,
    }
