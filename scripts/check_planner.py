"""Compare the memory planner's predictions with measured peaks on random configurations.

    python scripts/check_planner.py --count 20 --seed 1
    python scripts/check_planner.py --model demo/model    # also use a real model, cut to a few layers
    python scripts/check_planner.py --bounds --count 40   # the upper bounds, which must not be below the peaks

Each configuration draws a model (architecture, width, depth, vocabulary), a method, rank, batch size, length, share of
supervised tokens and checkpointing. One process trains for a few iterations and reads MLX's peak memory. A second
process runs the planner, which measures its own trial steps. The last ratio in the table, "extrap.", is that of the
extrapolation from small trials, which is all the planner can do for runs that may not fit. --output appends the results
as JSON lines.

With --bounds, the second process computes the upper bounds that are found without running a step: from shapes, and from
the traced graph. Configurations then also draw recurrent models.
"""

import argparse
import importlib
import json
import random
import statistics
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
    parser.add_argument("--bounds", action="store_true", help="compare the upper bounds with the peaks")
    parser.add_argument("--output", type=Path, help="append results to this file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        setup = json.loads(args.worker[1])
        work = {"measure": measure, "predict": predict, "bound": bound}[args.worker[0]]
        print(json.dumps(work(setup)))
        return 0
    if args.bounds:
        return compare_bounds(args)
    results = []
    print(
        f"{'':>5}{'model':<34}{'method':<18}{'batch':<14}{'predicted':>10}{'measured':>10}"
        f"{'ratio':>7}{'extrap.':>8}{'s':>6}"
    )
    for number in range(args.seed, args.seed + args.count):
        record = run_workers(number, args, ("measure", "predict"))
        record["ratio"] = record["predicted"] / record["measured"]
        record["extrapolated_ratio"] = record["extrapolated"] / record["measured"]
        results.append(record)
        print(table_row(record), flush=True)
    ratios = sorted(r["ratio"] for r in results)
    within = sum(abs(ratio - 1) <= TOLERANCE for ratio in ratios)
    print(
        f"\n{within} of {len(results)} within {TOLERANCE:.0%} of the measured peak; "
        f"ratios from {ratios[0]:.2f} to {ratios[-1]:.2f}"
    )
    return 0 if within == len(results) else 1


def run_workers(number: int, args: argparse.Namespace, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Return the results for one configuration, each kind of work done in a process of its own."""
    setup = random_setup(number, args)
    record = {"number": number, **setup}
    for kind in kinds:
        command = [sys.executable, __file__, "--worker", kind, json.dumps(setup)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{setup}\n{done.stderr}")
        record |= json.loads(done.stdout.splitlines()[-1])
    if args.output:
        with args.output.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return record


def compare_bounds(args: argparse.Namespace) -> int:
    """Print the upper bounds next to the measured peaks; return 1 if one is below its peak."""
    print(
        f"{'':>5}{'model':<34}{'method':<18}{'batch':<14}{'measured':>10}{'traced':>8}{'s':>6}{'shapes':>8}"
    )
    ratios = dict[str, list[float]](traced=[], shapes=[])
    for number in range(args.seed, args.seed + args.count):
        r = run_workers(number, args, ("measure", "bound"))
        for name, found in ratios.items():
            found.append(r[name] / r["measured"])
        print(
            f"{describe(r)}{r['measured'] / 1e6:>7.0f} MB{ratios['traced'][-1]:>8.2f}{r['tracing_s']:>6.1f}"
            f"{ratios['shapes'][-1]:>8.2f}",
            flush=True,
        )
    for name, found in ratios.items():
        finite = [ratio for ratio in found if ratio < float("inf")]
        print(
            f"from {name}: {len(finite)} of {len(found)} finite, {sum(ratio < 1 for ratio in finite)} below the peak; "
            f"bound / peak from {min(finite):.2f} to {max(finite):.2f}, median {statistics.median(finite):.2f}"
        )
    return int(min(ratio for found in ratios.values() for ratio in found) < 1)


def describe(r: dict[str, Any]) -> str:
    """Return the columns that describe a configuration."""
    model = r.get("path") or f"{r['module']} {r['layers']} x {r['width']}, {r['vocabulary'] // 1000}k"
    method = f"{r['method']} r{r['rank']}" + (f", ckpt {r['every']}" if r["every"] else "")
    batch = f"{r['rows']} x {r['length']}{' p' if r['packing'] else ''}{' a' if r['accumulate'] > 1 else ''}"
    return f"{r['number']:>3}  {model[-33:]:<34}{method:<18}{batch:<14}"


def table_row(r: dict[str, Any]) -> str:
    return (
        f"{describe(r)}{r['predicted'] / 1e6:>7.0f} MB"
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
    elif args.bounds and number % 4 == 1:
        setup |= {"module": rng.choice(["qwen3_5", "mamba2", "mamba", "jamba", "rwkv7"]), "layers": 4}
        setup |= {"packing": False, "length": min(setup["length"], 512)}
    if setup["module"] in ("mixtral", "jamba") and setup["method"] == "dora":
        setup["method"] = "lora"  # DoRA does not support experts
    return setup


def prepare(setup: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    """Return the adapted model, the training settings and the rows of a configuration."""
    import mlx.core as mx
    import numpy as np

    from nalora_mlx import NALoRAConfig, TrainingConfig, adapt
    from nalora_mlx.adapters.attach import adapt_dora
    from nalora_mlx.data.tokenization import Example

    mx.random.seed(0)
    if "path" in setup:
        model = load_real_model(setup)
    elif setup["module"] in ("qwen3_5", "mamba2", "mamba", "jamba", "rwkv7"):
        model = build_recurrent_model(setup)
    else:
        model = build_random_model(setup)
    mx.eval(model.parameters())
    plain = (
        {} if setup["method"] == "na-lora" else {"mask": "off", "step_scaling": False, "selection_limit": 0.0}
    )
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


def build_recurrent_model(setup: dict[str, Any]) -> Any:
    """Build a small model with recurrent layers."""
    module = importlib.import_module(f"mlx_lm.models.{setup['module']}")
    width, heads = setup["width"], setup["heads"]
    common = {
        "model_type": setup["module"],
        "hidden_size": width,
        "num_hidden_layers": setup["layers"],
        "intermediate_size": 8 * round(width * setup["factor"] / 8),
        "num_attention_heads": heads,
        "num_key_value_heads": setup["kv_heads"],
        "vocab_size": setup["vocabulary"],
        "rms_norm_eps": 1e-5,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    }
    state = {"state_size": 16, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True}
    special = {
        "qwen3_5": {
            "head_dim": width // heads,
            "linear_num_key_heads": heads,
            "linear_num_value_heads": 2 * heads,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 2,
            "rope_parameters": {
                "type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
                "mrope_section": [2, 1, 1],
            },
        },
        "mamba2": {
            **state,
            "num_heads": heads,
            "head_dim": 2 * width // heads,
            "time_step_rank": "auto",
            "time_step_limit": (0.001, 100.0),
            "n_groups": 1,
            "intermediate_size": 2 * width,
        },
        "mamba": {**state, "intermediate_size": 2 * width, "time_step_rank": "auto", "use_bcdt_rms": False},
        "jamba": {
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_conv": 4,
            "mamba_d_state": 16,
            "mamba_expand": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        "rwkv7": {"norm_eps": 1e-5, "head_dim": 32, "a_low_rank_dim": 16, "v_low_rank_dim": 16}
        | {"gate_low_rank_dim": 32, "decay_low_rank_dim": 16},
    }[setup["module"]]
    config = common | special
    if setup["module"] == "qwen3_5":
        config = {"model_type": "qwen3_5", "text_config": config | {"model_type": "qwen3_5_text"}}
    return module.Model(module.ModelArgs.from_dict(config))


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
    from nalora_mlx.training.loss import SupervisedLoss

    model, config, examples = prepare(setup)
    loss = SupervisedLoss(
        model
    )  # compares recurrences, which may take more memory than training on a short batch
    mx.reset_peak_memory()
    start = time.perf_counter()
    train(model, examples, config=config, loss=loss)
    return {"measured": mx.get_peak_memory(), "training_s": time.perf_counter() - start}


def bound(setup: dict[str, Any]) -> dict[str, Any]:
    """Return the upper bounds."""
    import mlx.optimizers as optim

    from nalora_mlx.training.memory_bound import bound_from_shapes
    from nalora_mlx.training.memory_plan import largest_batch, planning_step, upper_bound_bytes

    model, config, examples = prepare(setup)
    shape = largest_batch(examples, config)
    step = planning_step(model, config, optim.Adam(1e-5))
    start = time.perf_counter()
    traced = upper_bound_bytes(step, shape, config)
    return {
        "traced": traced,
        "tracing_s": time.perf_counter() - start,
        "shapes": bound_from_shapes(step.loss, shape),
    }


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
