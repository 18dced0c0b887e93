"""Training cost against mlx_lm.lora: same model, same data, same machine, interleaved, in one run.

    python scripts/benchmark_training.py --model demo/model --data examples/bakery --output benchmark.jsonl

Each measurement is a process of its own that trains for some iterations with one trainer; the first ones, in which
compiling happens, are not counted. Trainers take turns (A B C, A B C, ...), so that a machine whose speed drifts
slows all alike; medians are printed, and ratios to mlx_lm.lora round by round. Batches are each trainer's own, as a
user would have them, so the fair unit is the supervised token. Raw results go to the output as JSON lines.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

TRAINERS = ("mlx_lm.lora", "lora", "na-lora")
KEYS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="local directory of a float32 or quantized model")
    parser.add_argument("--data", required=True, help="directory with train.jsonl")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--iters", type=int, default=16, help="counted iterations (default: 16)")
    parser.add_argument("--warmup", type=int, default=6, help="iterations before those (default: 6)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-layers", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--no-mask-prompt", dest="mask_prompt", action="store_false", help="every token is supervised"
    )
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--output", type=Path, help="file for the raw results, appended to")
    parser.add_argument("--worker", choices=TRAINERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args)))
        return 0
    results: list[dict[str, Any]] = []
    for repeat in range(args.repeats):
        for trainer in args.trainers:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--worker", trainer], capture_output=True, text=True
            )
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            record = {"trainer": trainer, "repeat": repeat, **json.loads(done.stdout.splitlines()[-1])}
            results.append(record)
            if args.output:
                with args.output.open("a") as file:
                    file.write(json.dumps(record | {"arguments": sys.argv[1:]}) + "\n")
            print(
                f"{repeat + 1}/{args.repeats} {trainer:<12} {record['ms_per_token']:7.2f} ms per supervised token, "
                f"{record['seconds_per_step']:.2f} s per step, {record['mlx_peak_gb'] - record['weights_gb']:.2f} GB "
                "above the weights",
                flush=True,
            )
    report(results, args.trainers)
    return 0


def report(results: list[dict[str, Any]], trainers: tuple[str, ...]) -> None:
    """Print medians, and the median of the ratios to the first trainer, taken round by round."""
    measures = {
        "ms per supervised token": lambda r: r["ms_per_token"],
        "seconds per step": lambda r: r["seconds_per_step"],
        "peak above weights, GB": lambda r: r["mlx_peak_gb"] - r["weights_gb"],
        "process peak, GB": lambda r: r["process_peak_gb"],
        "padding, share of a batch": lambda r: r["padding"],
    }
    print(f"\n| | {' | '.join(trainers)} |\n|---|{'---|' * len(trainers)}")
    for name, of in measures.items():
        cells = []
        for trainer in trainers:
            mine = [of(r) for r in results if r["trainer"] == trainer]
            base = [of(r) for r in results if r["trainer"] == trainers[0]]
            ratio = statistics.median(a / b for a, b in zip(mine, base, strict=True)) if min(base) > 0 else 0
            cells.append(f"{statistics.median(mine):.3g} ({ratio:.2f})")
        print(f"| {name} | {' | '.join(cells)} |")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train in this process; times and peaks of the counted iterations."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm import load

    model, tokenizer = load(args.model)
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    steps: list[tuple[float, int]] = []  # seconds and supervised tokens of each iteration
    padding = [0, 0]  # padded and all positions
    total = args.warmup + args.iters
    mx.random.seed(0)
    if args.worker == "mlx_lm.lora":
        _mlx_lm(args, model, tokenizer, total, steps, padding)
    else:
        _ours(args, model, tokenizer, total, steps, padding)
    counted = steps[args.warmup :]
    seconds, tokens = sum(s for s, _ in counted), sum(t for _, t in counted)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return {
        "ms_per_token": 1e3 * seconds / tokens,
        "seconds_per_step": seconds / len(counted),
        "tokens": tokens,
        "weights_gb": weights / 1e9,
        "mlx_peak_gb": mx.get_peak_memory() / 1e9,
        "process_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
        "padding": padding[0] / max(padding[1], 1),
    }


def _mlx_lm(args, model, tokenizer, total, steps, padding) -> None:
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.datasets import CacheDataset, load_local_dataset
    from mlx_lm.tuner.utils import linear_to_lora_layers

    config = types.SimpleNamespace(mask_prompt=args.mask_prompt)
    train_set, _, _ = load_local_dataset(Path(args.data), tokenizer, config)
    model.freeze()
    settings = {"rank": args.rank, "scale": 20.0, "dropout": 0.0, "keys": KEYS}
    linear_to_lora_layers(model, args.num_layers, settings)
    seen = [0]

    class Callback(trainer.TrainingCallback):
        def on_train_loss_report(self, info):
            tokens = info["trained_tokens"] - seen[0]
            seen[0] = info["trained_tokens"]
            steps.append((1 / info["iterations_per_second"], tokens))

    def batches(**settings):
        for batch, lengths in trainer.iterate_batches(**settings):
            padding[0] += batch.size - int(mx.minimum(lengths[:, 1], batch.shape[1]).sum())
            padding[1] += batch.size
            yield batch, lengths

    trainer.train(
        model,
        optim.Adam(1e-5),
        CacheDataset(train_set),
        args=trainer.TrainingArgs(
            batch_size=args.batch_size,
            iters=total,
            steps_per_report=1,
            steps_per_save=10**9,
            adapter_file=str(Path(tempfile.mkdtemp()) / "adapters.safetensors"),
        ),
        iterate_batches=batches,
        training_callback=Callback(),
    )


def _ours(args, model, tokenizer, total, steps, padding) -> None:
    import mlx.optimizers as optim

    from nalora_mlx import NALoRAConfig, TrainingConfig, adapt, run, train
    from nalora_mlx.data import Features, tokenize_split
    from nalora_mlx.rows import load_local

    rows = load_local(Path(args.data), ["train"])["train"]
    examples = tokenize_split(rows, tokenizer, Features(mask_prompt=args.mask_prompt), 2048).examples
    off = {"mask": "off", "step_scaling": False} if args.worker == "lora" else {}
    adapt(
        model, NALoRAConfig(rank=args.rank, scale=20.0, num_layers=args.num_layers, keys=tuple(KEYS), **off)
    )
    last = [0.0]
    queued: list[int] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            now = time.perf_counter()
            steps.append((now - last[0], queued.pop(0)))
            last[0] = now

    original = run.training_batches

    def batches(*settings, **more):
        for batch in original(*settings, **more):
            padding[0] += int(batch.real.size - batch.real.sum())
            padding[1] += batch.real.size
            queued.append(batch.tokens)
            yield batch

    run.training_batches = batches
    # The last iteration reports, and measures more for it than the others do: one beyond those that count.
    config = TrainingConfig(batch_size=args.batch_size, iters=total + 1, steps_per_report=total + 1)
    train(model, examples, config=config, optimizer=optim.Adam(1e-5), listeners=[listen])
    steps.pop()


if __name__ == "__main__":
    sys.exit(main())
