"""Synthetic directories of runs, of any length, whose numbers are known."""

import json
from pathlib import Path

import numpy as np

CHANNELS = 8  # of a layer, that are told one by one
SHARES = 50  # of a run, at which layers are new: what is between repeats them


def write_run(
    path: Path,
    reports: int = 40,
    layers: int | list[str] = 4,
    every: int = 1,
    seed: int = 0,
    kind: str = "na-lora",
    **na,
) -> Path:
    """A run of `reports` reports; its best validation is 0.25, in the middle. Loss falls as 2 exp(-3 t/T) + 0.5."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{i}.mlp" for i in range(layers)] if isinstance(layers, int) else layers
    hard = na.get("mask") == "hard"
    lines = []
    shown = ""
    for t in range(reports + 1):
        share = t / reports
        if t % max(1, reports // 10) == 0:
            loss = 0.25 if t == reports // 2 else 1 + abs(share - 0.5)
            best = 0.25 if t >= reports // 2 else 1 + 0.5 - share
            row = {"split": "valid", "step": t * every, "loss": loss, "tokens": 9, "seconds": 0.1}
            lines.append(json.dumps({**row, "best_loss": best}))
        if t:
            row = {
                "split": "train",
                "step": t * every,
                "loss": train_loss(share) + 0.05 * rng.normal(),
                "tokens": 1000 * t,
                "tokens_per_second": 1500 + 50 * rng.normal(),
                "iterations_per_second": 1.5,
                "learning_rate": 1e-4 * (1 - share),
                "gradient_norm": abs(rng.normal()),
                "skipped": 0,
                "peak_memory_gb": 12.5,
            }
            if t % max(1, reports // SHARES) == 0 or not shown:
                shown = json.dumps({name: layer(i, share, hard) for i, name in enumerate(names)})
            lines.append(json.dumps(row)[:-1] + f', "layers": {shown}}}')
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
    record = {"settings": {"fine_tune_type": kind, "na_parameters": settings, "model": "a/model"}}
    (path / "run.json").write_text(json.dumps(record))
    return path


def train_loss(share: float) -> float:
    """The training loss without its noise."""
    return 2 * np.exp(-3 * share) + 0.5


def layer(i: int, share: float, hard: bool = False) -> dict:
    def spread(middle):
        return {"mean": middle, "p10": 0.5 * middle, "p50": 0.9 * middle, "p90": 1.5 * middle}

    return {
        "mask": {"mean": 0.5, "p10": 0, "p50": 0.5, "p90": 1} if hard else spread(1.0),
        "sparsity": 0.5 if hard else 0.02 * i + 0.1 * share,
        "effective": 0.5 if hard else 0.9 - 0.1 * share,
        "multiplier": spread(1 + 0.01 * i),
        "step_scale": spread(0.8 - 0.01 * i),
        "importance": spread(0.5 + 0.05 * i - 0.1 * share),
        "channels": [channel(i, c, share) for c in range(CHANNELS)],
        "occupancy": {"suppressed": 0.1, "transition": 0.7, "homogeneous": 0.2},
        "misalignment": 0.1 * share + 0.02 * i,
    }


def channel(i: int, c: int, share: float) -> float:
    """Importance of a channel: odd ones fall, even ones rise."""
    return round(0.3 + 0.02 * i + 0.01 * c + (0.1 if c % 2 == 0 else -0.1) * share, 4)
