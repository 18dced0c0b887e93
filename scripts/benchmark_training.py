"""Training cost against mlx_lm.lora and against PEFT: same model, same data, same machine, interleaved, in one run.

    python scripts/benchmark_training.py --model demo/model --data DATA                    as a user would train
    python scripts/benchmark_training.py --model demo/model --data DATA --no-mask-prompt   every token supervised
    python scripts/benchmark_training.py --model qwen3-0.6b --layers 2 --fixed 4x256       identical batches
    python scripts/benchmark_training.py --model demo/model --sweep length --layers 4      how the cost grows

Each measurement is a process of its own that trains for some iterations with one trainer. Time is what passes between
two reports, every ten iterations as both trainers do by default, with all that a trainer does on the way; the first
iterations, in which most compiling happens, are not counted. Trainers take turns, in another order each round, so that
a machine whose speed drifts slows all alike; medians are printed, and ratios to mlx_lm.lora round by round. Batches
are each trainer's own unless --fixed gives both the same, so the fair unit is the supervised token. All linear layers
of the last 16 layers get an adapter of rank 8, as both do by default. Raw results go to the output as JSON lines.
"""

import argparse
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

PEER = "mlx_lm.lora"
TRAINERS = (PEER, "lora", "na-lora", "peft")
SWEEPS = {
    "length": (128, 256, 512, 1024, 2048, 4096),
    "rank": (4, 8, 16, 32, 64, 128),
    "layers": (1, 2, 4, 8, -1),
}
TARGETS = {  # of the ratio to mlx_lm.lora: time per supervised token, peak above the weights
    "masked prompts": (0.5, 0.5),
    "every token": (0.8, None),
    "fixed batches": (0.95, 0.6),
}
NA_OVER_LORA = 1.03
LEARNING_RATE = 1e-5
VOCABULARY = 151936
SHAPES = {  # random models: hidden size, intermediate size, heads, key-value heads, head size, layers
    "qwen3-0.6b": ("qwen3", 1024, 3072, 16, 8, 128, 28),
    "llama-3.2-1b": ("llama", 2048, 8192, 32, 8, 64, 16),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", required=True, help=f"directory of a float32 model, or {' or '.join(SHAPES)} (random)"
    )
    parser.add_argument("--layers", type=int, help="cut the model to its first layers")
    parser.add_argument("--data", help="directory with train.jsonl")
    parser.add_argument(
        "--fixed", metavar="BxL", help="the same batches of B random rows of L tokens for all"
    )
    parser.add_argument(
        "--no-mask-prompt", dest="mask_prompt", action="store_false", help="every token is supervised"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--iters", type=int, default=20, help="counted iterations (default: 20)")
    parser.add_argument("--warmup", type=int, default=10, help="iterations before those (default: 10)")
    parser.add_argument("--report", type=int, default=10, help="iterations between two reports (default: 10)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-layers", type=int, default=16, help="layers that are adapted")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--sweep", choices=SWEEPS, help="measure at several lengths, ranks or adapted layers")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS[:3]))
    parser.add_argument(
        "--plot", type=Path, help="draw the process's memory over the iterations to this file"
    )
    parser.add_argument("--output", type=Path, help="file for the raw results, appended to")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args, args.worker[0], int(args.worker[1]))))
        return 0
    if args.iters % args.report or args.warmup % args.report:
        parser.error("--iters and --warmup must be multiples of --report")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    results: list[dict[str, Any]] = []
    for changes in changed(args):
        given = [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()]
        some = [r for repeat in range(args.repeats) for r in one_round(args, repeat, given, changes)]
        if some and changes:
            print(f"\n{', '.join(f'{name} {value}' for name, value in changes.items())}")
        print(table(some, args))
        results += some
    if args.plot:
        plot(results, args.plot)
    return 0


def changed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings of each point of a sweep; none without one."""
    if not args.sweep:
        return [{}]
    values = SWEEPS[args.sweep]
    if args.sweep == "length":
        return [{"fixed": f"1x{value}"} for value in values]
    return [{{"rank": "rank", "layers": "num_layers"}[args.sweep]: value} for value in values]


def one_round(
    args: argparse.Namespace, repeat: int, given: list[str], changes: dict[str, Any]
) -> list[dict[str, Any]]:
    """One measurement of each trainer, in an order of the round's own."""
    results = []
    start = repeat % len(args.trainers)
    for trainer in args.trainers[start:] + args.trainers[:start]:
        command = [sys.executable, __file__, *sys.argv[1:], *given, "--worker", trainer, str(repeat)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment_of(trainer))
        if done.returncode:
            raise RuntimeError(f"{trainer}: {done.stderr}")
        record = {"trainer": trainer, "repeat": repeat, **changes, **json.loads(done.stdout.splitlines()[-1])}
        results.append(record)
        if args.output:
            with args.output.open("a") as file:
                file.write(json.dumps(record | {"settings": settings_of(args)}) + "\n")
        print(
            f"{repeat + 1}/{args.repeats} {trainer:<12}{record['ms_per_token']:9.2f} ms per supervised token,"
            f"{record['seconds_per_step']:7.3f} s per step,{record['process_peak_gb']:7.3f} GB in the process",
            file=sys.stderr,
            flush=True,
        )
    return results


def environment_of(trainer: str) -> dict[str, str]:
    """PyTorch brings its own BLAS; with the one that is put in front of MLX's it is six times slower."""
    return {k: v for k, v in os.environ.items() if trainer != "peft" or k != "LD_PRELOAD"}


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, in the terms of the command line; of paths the last part, the rest is this machine's."""
    names = {name: Path(value).name for name in ("model", "data") if (value := getattr(args, name))}
    left_out = ("output", "plot", "worker", "trainers")
    return {name: value for name, value in vars(args).items() if name not in left_out} | names


# --- what is printed ----------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Medians with the ratios to the first trainer, taken round by round, and what was aimed at."""
    measures = {
        "ms per supervised token": "ms_per_token",
        "seconds per step": "seconds_per_step",
        "peak above weights, GB": "above_weights_gb",
        "process peak, GB": "process_peak_gb",
        "padding, share of a batch": "padding",
        "compiled graphs": "compiled",
    }
    trainers = args.trainers
    lines = [f"| | {' | '.join(trainers)} |", f"|---|{'---|' * len(trainers)}"]
    for name, key in measures.items():
        cells = []
        for trainer in trainers:
            mine = [r[key] for r in results if r["trainer"] == trainer]
            ratio = ratio_of(results, key, trainer, trainers[0])
            cells.append(
                "-"
                if None in mine
                else f"{statistics.median(mine):.3g}" + (f" ({ratio:.2f})" if ratio else "")
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    kind = "fixed batches" if args.fixed else "masked prompts" if args.mask_prompt else "every token"
    if PEER in trainers and not args.sweep:
        for key, target in zip(("ms_per_token", "above_weights_gb"), TARGETS[kind], strict=True):
            ratio = ratio_of(results, key, "na-lora", PEER)
            if ratio and target:
                lines.append(
                    f"{kind}, na-lora over {PEER}, {key}: {ratio:.2f}, aimed at {target}: {verdict(ratio, target)}"
                )
    if (ratio := ratio_of(results, "ms_per_token", "na-lora", "lora")) is not None:
        lines.append(
            f"na-lora over lora, time: {ratio:.3f}, aimed at {NA_OVER_LORA}: {verdict(ratio, NA_OVER_LORA)}"
        )
    return "\n".join(lines)


def verdict(ratio: float, target: float) -> str:
    return "met" if ratio <= target else "missed"


def ratio_of(results: list[dict[str, Any]], key: str, trainer: str, base: str) -> float | None:
    """Median of the ratios of two trainers, round by round; None where there is none."""
    of = {(r["trainer"], r["repeat"]): r[key] for r in results}
    pairs = [(of.get((trainer, r)), of.get((base, r))) for r in sorted({r["repeat"] for r in results})]
    ratios = [a / b for a, b in pairs if a is not None and b]
    return statistics.median(ratios) if ratios else None


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Memory of the process over the iterations, a line for each measurement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for r in results:
        axes.plot([at for at, _ in r["memory"]], [size for _, size in r["memory"]], label=r["trainer"])
    axes.set(xlabel="iteration", ylabel="memory of the process, GB", ylim=(0, None))
    axes.legend()
    figure.savefig(path)


# --- what is measured ---------------------------------------------------------------------------------------


class Clock:
    """Time, supervised tokens and memory at each report."""

    def __init__(self) -> None:
        self.times, self.tokens = [time.perf_counter()], [0]
        self.memory: list[tuple[int, float]] = []

    def tick(self, iteration: int, tokens: int) -> None:
        """Take a report: iterations and supervised tokens done."""
        self.times.append(time.perf_counter())
        self.tokens.append(tokens)
        self.memory.append((iteration, resident_gb()))


def resident_gb() -> float:
    """Memory of this process now; on macOS the largest so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9
    return process_peak_gb()


def process_peak_gb() -> float:
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    )


def measure(args: argparse.Namespace, trainer: str, seed: int) -> dict[str, Any]:
    """Train in this process; times and peaks."""
    work = {PEER: mlx_lm, "lora": ours, "na-lora": ours, "peft": peft}[trainer]
    clock = Clock()
    found = work(args, trainer, seed, args.warmup + args.iters, clock)
    first = args.warmup // args.report
    seconds, tokens = clock.times[-1] - clock.times[first], clock.tokens[-1] - clock.tokens[first]
    return {
        "ms_per_token": 1e3 * seconds / tokens,
        "seconds_per_step": seconds / args.iters,
        "tokens": tokens,
        "reports": [
            [round(at - clock.times[0], 3), t] for at, t in zip(clock.times, clock.tokens, strict=True)
        ],
        "process_peak_gb": process_peak_gb(),
        "memory": clock.memory,
        **found,
    }


def random_shape(args: argparse.Namespace) -> dict[str, Any]:
    """The config.json of a random model, as large as the one it is named after."""
    kind, hidden, intermediate, heads, kv_heads, head, layers = SHAPES[args.model]
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "num_hidden_layers": args.layers or layers,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    }


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model, cut to its first layers, and its tokenizer; a random model has none."""
    import mlx.core as mx

    mx.random.seed(0)
    if args.model in SHAPES:
        settings = random_shape(args)
        module = importlib.import_module(f"mlx_lm.models.{settings['model_type']}")
        model = module.Model(module.ModelArgs.from_dict(settings))
        tokenizer = None
    else:
        from mlx_lm import load

        model, tokenizer = load(args.model)
        if args.layers:
            model.model.layers = model.model.layers[: args.layers]
    mx.eval(model.parameters())
    return model, tokenizer


def examples_of(args: argparse.Namespace, tokenizer: Any, seed: int) -> list[Any]:
    """The rows: of the data, or random ones that are all supervised."""
    import numpy as np

    from nalora_mlx.data import Example, Features, tokenize_split
    from nalora_mlx.rows import load_local

    if args.fixed:
        rows, length = map(int, args.fixed.split("x"))
        rng = np.random.default_rng(seed)
        tokens = rng.integers(1, 40000, (rows * (args.warmup + args.iters), length + 1), dtype=np.int32)
        return [Example(row, np.arange(length + 1) > 0, "") for row in tokens]
    rows = load_local(Path(args.data), ["train"])["train"]
    return tokenize_split(rows, tokenizer, Features(mask_prompt=args.mask_prompt), 2048).examples


def batch_size(args: argparse.Namespace) -> int:
    return int(args.fixed.split("x")[0]) if args.fixed else args.batch_size


def mlx_result(model: Any, padding: list[int], compiled: int, weights: int) -> dict[str, Any]:
    import mlx.core as mx

    return {
        "above_weights_gb": (mx.get_peak_memory() - weights) / 1e9,
        "weights_gb": weights / 1e9,
        "padding": padding[0] / max(padding[1], 1),
        "compiled": compiled,
    }


def mlx_lm(args: argparse.Namespace, _: str, seed: int, total: int, clock: Clock) -> dict[str, Any]:
    """mlx-lm's own trainer, with its own batches unless they are fixed."""
    import mlx.core as mx
    import mlx.optimizers as optim
    import numpy as np
    from mlx.utils import tree_flatten
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.datasets import CacheDataset, load_local_dataset
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, tokenizer = load_model(args)
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    model.freeze()
    linear_to_lora_layers(
        model,
        min(args.num_layers, len(model.layers)) if args.num_layers > 0 else len(model.layers),
        {"rank": args.rank, "scale": 20.0, "dropout": 0.0},
    )
    np.random.seed(seed)
    padding, compiled = [0, 0], [0]

    def loss(*arguments):  # runs once for each graph that is compiled
        compiled[0] += 1
        return trainer.default_loss(*arguments)

    def batches(**settings):
        for batch, lengths in trainer.iterate_batches(**settings):
            padding[0] += batch.size - int(mx.minimum(lengths[:, 1], batch.shape[1]).sum())
            padding[1] += batch.size
            yield batch, lengths

    def fixed(**_):
        rows, size = examples_of(args, tokenizer, seed), batch_size(args)
        for start in range(0, len(rows), size):
            tokens = np.stack([row.tokens for row in rows[start : start + size]])
            yield mx.array(tokens), mx.array([(0, tokens.shape[1] - 1)] * size)

    # It counts, and trains, the first token of padding after each row; only the rows' own are taken here.
    beyond = 0 if args.fixed else batch_size(args)

    class Callback(trainer.TrainingCallback):
        def on_train_loss_report(self, info):
            clock.tick(info["iteration"], info["trained_tokens"] - beyond * info["iteration"])

    train_set: Any = []
    if not args.fixed:
        config = types.SimpleNamespace(mask_prompt=args.mask_prompt)
        train_set = CacheDataset(load_local_dataset(Path(args.data), tokenizer, config)[0])
    settings = trainer.TrainingArgs(
        batch_size=batch_size(args),
        iters=total,
        steps_per_report=args.report,
        steps_per_save=10**9,
        max_seq_length=10**6 if args.fixed else 2048,
        adapter_file=str(Path(tempfile.mkdtemp()) / "adapters.safetensors"),
    )
    mx.reset_peak_memory()
    clock.times[0] = time.perf_counter()
    trainer.train(
        model,
        optim.Adam(LEARNING_RATE),
        train_set,
        args=settings,
        loss=loss,
        iterate_batches=fixed if args.fixed else batches,
        training_callback=Callback(),
    )
    return mlx_result(model, padding, compiled[0], weights)


def ours(args: argparse.Namespace, method: str, seed: int, total: int, clock: Clock) -> dict[str, Any]:
    """Our trainer, with or without the mechanisms of NA-LoRA."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten

    from nalora_mlx import NALoRAConfig, TrainingConfig, adapt, batches, train
    from nalora_mlx.step import TrainingStep

    model, tokenizer = load_model(args)
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    examples = examples_of(args, tokenizer, seed)
    off: dict[str, Any] = {"mask": "off", "step_scaling": False} if method == "lora" else {}
    adapt(model, NALoRAConfig(rank=args.rank, num_layers=args.num_layers, **off))
    padding, compiled = [0, 0], [0]
    collate, backward = batches.collate, TrainingStep._backward

    def counted_collate(*arguments: Any, **more: Any) -> Any:
        batch = collate(*arguments, **more)
        padding[0] += int(batch.real.size - batch.real.sum())
        padding[1] += batch.real.size
        return batch

    def counted_backward(*arguments: Any) -> Any:  # runs once for each graph that is compiled
        compiled[0] += 1
        return backward(*arguments)

    batches.collate, TrainingStep._backward = counted_collate, counted_backward  # type: ignore[method-assign]

    def listen(event: dict[str, Any]) -> None:
        if event.get("split") == "train":
            clock.tick(event["step"], event["tokens"])

    mx.reset_peak_memory()
    clock.times[0] = time.perf_counter()
    settings = TrainingConfig(
        batch_size=batch_size(args),
        iters=total,
        steps_per_report=args.report,
        seed=seed,
        max_seq_length=10**6,
    )
    train(model, examples, config=settings, optimizer=optim.Adam(LEARNING_RATE), listeners=[listen])
    return mlx_result(model, padding, compiled[0], weights)


def peft(args: argparse.Namespace, _: str, seed: int, total: int, clock: Clock) -> dict[str, Any]:
    """Transformers and PEFT on PyTorch's CPU backend: rows in random order, padded to the longest of a batch."""
    import torch
    from mlx_lm.tokenizer_utils import load as load_tokenizer
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    if args.model in SHAPES:
        settings = random_shape(args)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
        tokenizer = None
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = load_tokenizer(Path(args.model))
    if args.layers:
        model.model.layers = model.model.layers[: args.layers]
    linears = {
        name.rpartition(".")[2]
        for name, module in model.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    count = len(model.model.layers)
    first = count - (min(args.num_layers, count) if args.num_layers > 0 else count)
    adapters = LoraConfig(
        r=args.rank,
        lora_alpha=20 * args.rank,
        target_modules=sorted(linears),
        layers_to_transform=list(range(first, count)),
    )
    adapted = get_peft_model(model, adapters).train()
    examples = examples_of(args, tokenizer, seed)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], LEARNING_RATE)
    order, size, seen, padding = random.Random(seed), batch_size(args), 0, [0, 0]
    clock.times[0] = time.perf_counter()
    for iteration in range(1, total + 1):
        rows = [examples[order.randrange(len(examples))] for _ in range(size)]
        longest = max(len(row.tokens) for row in rows)
        tokens, labels = torch.zeros(size, longest, dtype=torch.long), torch.full((size, longest), -100)
        real = torch.zeros(size, longest, dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row.tokens)
            tokens[i, :n], real[i, :n] = torch.tensor(row.tokens), 1
            labels[i, :n] = torch.where(torch.tensor(row.supervised), tokens[i, :n], -100)
        loss = adapted(input_ids=tokens, attention_mask=real, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen += int((labels[:, 1:] >= 0).sum())
        padding[0] += int(real.numel() - real.sum())
        padding[1] += real.numel()
        if iteration % args.report == 0:
            clock.tick(iteration, seen)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    return {
        "above_weights_gb": None,  # PyTorch does not count what it allocates on a CPU
        "weights_gb": weights,
        "padding": padding[0] / padding[1],
        "compiled": None,
    }


if __name__ == "__main__":
    sys.exit(main())
