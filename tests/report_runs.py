"""Synthetic directories of runs, of any length, whose numbers are known."""

import json
from pathlib import Path

import numpy as np


def write_run(path: Path, reports: int = 40, layers: int = 4, every: int = 1, seed: int = 0, **na) -> Path:
    """A run of `reports` reports; its best validation is 0.25, in the middle. Loss falls as 2 exp(-3 t/T) + 0.5."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = []
    for t in range(reports + 1):
        share = t / reports
        if t % max(1, reports // 10) == 0:
            loss = 0.25 if t == reports // 2 else 1 + abs(share - 0.5)
            best = 0.25 if t >= reports // 2 else 1 + 0.5 - share
            rows.append(
                {
                    "split": "valid",
                    "step": t * every,
                    "loss": loss,
                    "tokens": 9,
                    "seconds": 0.1,
                    "best_loss": best,
                }
            )
        if t:
            rows.append(
                {
                    "split": "train",
                    "step": t * every,
                    "loss": 2 * np.exp(-3 * share) + 0.5 + 0.05 * rng.normal(),
                    "tokens": 1000 * t,
                    "tokens_per_second": 1500 + 50 * rng.normal(),
                    "iterations_per_second": 1.5,
                    "learning_rate": 1e-4 * (1 - share),
                    "gradient_norm": abs(rng.normal()),
                    "skipped": 0,
                    "peak_memory_gb": 12.5,
                    "layers": {f"model.layers.{i}.mlp": layer(i, share) for i in range(layers)},
                }
            )
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": {"rank": 8, "scale": 20.0}}
    config["na_lora"] = {"mask": "soft", "beta": 0.9, **na}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def layer(i: int, share: float) -> dict:
    def spread(middle):
        return {"mean": middle, "p10": 0.5 * middle, "p50": 0.9 * middle, "p90": 1.5 * middle}

    return {
        "mask": spread(1.0),
        "multiplier": spread(1 + 0.01 * i),
        "importance": spread(0.5 + 0.05 * i - 0.1 * share),
        "occupancy": {"suppressed": 0.1, "transition": 0.7, "homogeneous": 0.2},
        "misalignment": 0.1 * share + 0.02 * i,
    }
