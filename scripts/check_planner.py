"""Compare the memory planner's predictions with measured peaks on random configurations.

    python scripts/check_planner.py --count 20 --seed 1
    python scripts/check_planner.py --model demo/model    # also use a real model, cut to a few layers

Each configuration draws a model (architecture, width, depth, vocabulary), a method, rank, batch size, length, share of
supervised tokens and checkpointing. One process trains for a few iterations and reads MLX's peak memory. A second
process runs the planner, which measures its own trial steps. The last ratio in the table, "extrap.", is that of the
extrapolation from small trials, which is all the planner can do for runs that may not fit. --output appends the results
as JSON lines.
"""

import argparse
import importlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOLERANCE = 0.15  # relative to the measured peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="number of configurations (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first configuration (default: 0)")
    parser.add_argument("--tokens", type=int, default=2048, help="maximum tokens per batch (default: 2048)")
    parser.add_argument("--model", help="directory of a real model to use in a third of the configurations")
    parser.add_argument("--output", type=Path, help="append results to this file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        setup = json.loads(args.worker[1])
        print(json.dumps(measure(setup) if args.worker[0] == "measure" else predict(setup)))
        return 0
    results = []
    print(
        f"{'':>5}{'model':<34}{'method':<18}{'batch':<14}{'predicted':>10}{'measured':>10}"
        f"{'ratio':>7}{'extrap.':>8}{'s':>6}"
    )
    for number in range(args.seed, args.seed + args.count):
        setup = random_setup(number, args)
        record = {"number": number, **setup}
        for kind in ("measure", "predict"):
            done = subprocess.run(
                [sys.executable, __file__, "--worker", kind, json.dumps(setup)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            record |= json.loads(done.stdout.splitlines()[-1])
        record["ratio"] = record["predicted"] / record["measured"]
        record["extrapolated_ratio"] = record["extrapolated"] / record["measured"]
        results.append(record)
        print(table_row(record), flush=True)
        if args.output:
            with args.output.open("a") as file:
                file.write(json.dumps(record) + "\n")
    ratios = sorted(r["ratio"] for r in results)
    within = sum(abs(ratio - 1) <= TOLERANCE for ratio in ratios)
    print(
        f"\n{within} of {len(results)} within {TOLERANCE:.0%} of the measured peak; "
        f"ratios from {ratios[0]:.2f} to {ratios[-1]:.2f}"
    )
    return 0 if within == len(results) else 1


def table_row(r: dict[str, Any]) -> str:
    model = r.get("path") or f"{r['module']} {r['layers']} x {r['width']}, {r['vocabulary'] // 1000}k"
    method = f"{r['method']} r{r['rank']}" + (f", ckpt {r['every']}" if r["every"] else "")
    batch = f"{r['rows']} x {r['length']}{' p' if r['packing'] else ''}{' a' if r['accumulate'] > 1 else ''}"
    return (
        f"{r['number']:>3}  {model[-33:]:<34}{method:<18}{batch:<14}{r['predicted'] / 1e6:>7.0f} MB"
        f"{r['measured'] / 1e6:>7.0f} MB{r['ratio']:>7.2f}{r['extrapolated_ratio']:>8.2f}"
        f"{r['planning_s']:>6.1f}"
    )


def random_setup(number: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the random configuration of a number."""
    rng = random.Random(number)
    heads, head_width = rng.choice([(4, 32), (4, 64), (8, 32), (8, 64), (9, 64)])
    length = rng.choice([64, 128, 256, 512, 1024, 2048])
    rows = rng.choice([1, 2, 3, 4, 6, 8, 16])
    while rows > 1 and rows * length > args.tokens:
        rows -= 1
    setup = {
        "module": rng.choice(["llama", "llama", "qwen3", "gemma3_text", "mixtral", "phi3", "cohere2"]),
        "width": heads * head_width,
        "heads": heads,
        "kv_heads": rng.choice([k for k in (1, 2, 3, 4, 8, 9) if heads % k == 0]),
        "factor": round(rng.uniform(2, 5), 2),
        "layers": rng.choice([2, 3, 4, 6]),
        "vocabulary": rng.choice([1000, 8000, 49152, 150000]),
        "method": rng.choice(["na-lora", "na-lora", "na-lora", "lora", "dora", "full"]),
        "rank": rng.choice([4, 8, 16, 64]),
        "adapted": rng.choice([-1, -1, 1, 2]),
        "every": rng.choice([0, 0, 1, 2]),
        "rows": rows,
        "length": min(length, args.tokens),
        "supervised": rng.choice([0.1, 0.3, 1.0]),
        "accumulate": rng.choice([1, 1, 1, 2]),
        "packing": rng.random() < 0.15,
    }
    if args.model and number % 3 == 0:
        setup["path"] = args.model
    return setup


def prepare(setup: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    """Return the adapted model, the training settings and the rows of a configuration."""
    import mlx.core as mx
    import numpy as np

    from nalora_mlx import NALoRAConfig, TrainingConfig, adapt
    from nalora_mlx.adapters.attach import adapt_dora
    from nalora_mlx.data.tokenization import Example

    mx.random.seed(0)
    model = load_real_model(setup) if "path" in setup else build_random_model(setup)
    mx.eval(model.parameters())
    plain = {} if setup["method"] == "na-lora" else {"mask": "off", "step_scaling": False}
    if setup["method"] == "full":
        model.freeze()
        for layer in model.layers[-setup["adapted"] :] if setup["adapted"] > 0 else model.layers:
            layer.unfreeze()
    else:
        attach = adapt_dora if setup["method"] == "dora" else adapt
        attach(model, NALoRAConfig(rank=setup["rank"], num_layers=setup["adapted"], **plain))
    config = TrainingConfig(
        batch_size=setup["rows"],
        iters=4,
        steps_per_report=2,
        grad_checkpoint=setup["every"] > 0,
        grad_checkpoint_every=max(1, setup["every"]),
        grad_accumulation_steps=setup["accumulate"],
        packing=setup["packing"],
    )
    # Random rows that all have the same padded length, with the given share of tokens supervised.
    rng = np.random.default_rng(0)
    examples = []
    for i in range(4 * setup["rows"]):
        n = setup["length"] + 1 - int(rng.integers(0, 7))
        if setup["packing"] and i > 0:
            n = int(rng.integers(setup["length"] // 4, setup["length"] // 2))
        tokens = rng.integers(1, 500, n).astype(np.int32)
        supervised = np.arange(n) >= n * (1 - setup["supervised"])
        examples.append(Example(tokens, supervised, str(i)))
    return model, config, examples


def build_random_model(setup: dict[str, Any]) -> Any:
    module = importlib.import_module(f"mlx_lm.models.{setup['module']}")
    width = setup["width"]
    return module.Model(
        module.ModelArgs.from_dict(
            {
                "model_type": setup["module"],
                "hidden_size": width,
                "num_hidden_layers": setup["layers"],
                "intermediate_size": 8 * round(width * setup["factor"] / 8),
                "num_attention_heads": setup["heads"],
                "num_key_value_heads": setup["kv_heads"],
                "head_dim": width // setup["heads"],
                "vocab_size": setup["vocabulary"],
                "rms_norm_eps": 1e-5,
                "layer_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "max_position_embeddings": 8192,
                "sliding_window": 512,
                "sliding_window_pattern": 2,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "tie_word_embeddings": True,
                "attention_bias": False,
                "mlp_bias": False,
            }
        )
    )


def load_real_model(setup: dict[str, Any]) -> Any:
    """Load a real model and keep only its first layers."""
    from mlx_lm import load

    model, _ = load(setup["path"])
    model.model.layers = model.model.layers[: setup["layers"]]
    return model


def measure(setup: dict[str, Any]) -> dict[str, Any]:
    """Train and return MLX's peak memory."""
    import mlx.core as mx

    from nalora_mlx import train

    model, config, examples = prepare(setup)
    mx.reset_peak_memory()
    start = time.perf_counter()
    train(model, examples, config=config)
    return {"measured": mx.get_peak_memory(), "training_s": time.perf_counter() - start}


def predict(setup: dict[str, Any]) -> dict[str, Any]:
    """Return the planner's prediction."""
    import mlx.core as mx
    import mlx.optimizers as optim

    from nalora_mlx.adapters.attach import adapt_result
    from nalora_mlx.core.config import PLAIN_LORA
    from nalora_mlx.training.memory_model import PeakProfiler
    from nalora_mlx.training.memory_plan import default_budget, largest_batch
    from nalora_mlx.training.run import recomputed_layers
    from nalora_mlx.training.step import TrainingStep

    model, config, examples = prepare(setup)
    weights = mx.get_active_memory()
    start = time.perf_counter()
    report = adapt_result(model)
    step = TrainingStep(model, optim.Adam(1e-5), report.config if report else PLAIN_LORA)
    shape = largest_batch(examples, config)
    profiler = PeakProfiler(step, recomputed_layers(model, config), config.grad_accumulation_steps > 1)
    peak = profiler.profile(shape, default_budget() // 2)
    seconds = time.perf_counter() - start
    extrapolated = profiler.profile(shape).at(shape.rows, shape.length)
    parts = {
        "base": peak.base,
        "per_token": peak.per_token,
        "per_square": peak.per_square,
        "update": peak.update,
    }
    return {
        "predicted": peak.at(shape.rows, shape.length),
        "extrapolated": extrapolated,
        "weights": weights,
        "planning_s": seconds,
    } | parts


if __name__ == "__main__":
    sys.exit(main())
