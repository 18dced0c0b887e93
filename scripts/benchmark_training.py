"""Compare the training cost of our trainer with mlx_lm.lora and PEFT, on the same model, data and machine.

    python scripts/benchmark_training.py --model demo/model --data DATA                    masked prompts
    python scripts/benchmark_training.py --model demo/model --data DATA --no-mask-prompt   every token supervised
    python scripts/benchmark_training.py --model qwen3-0.6b --layers 2 --fixed 4x256       identical batches
    python scripts/benchmark_training.py --model demo/model --sweep length --layers 4      cost by sequence length

Each measurement trains with one trainer in a new process. Time is taken between reports, every ten iterations by
default, and includes everything the trainer does in between. The first iterations, which compile most graphs, are not
counted. The trainers take turns, in a different order each round, so a change in machine speed affects them equally.
The script prints medians, and medians of the ratios to mlx_lm.lora in each round. Each trainer makes its own batches
unless --fixed is given, so compare the time per supervised token. As both trainers do by default, all linear layers in
the last 16 layers get an adapter of rank 8. --output appends raw results as JSON lines.
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

BASELINE = "mlx_lm.lora"
TRAINERS = (BASELINE, "lora", "na-lora", "peft")
SWEEPS = {
    "length": (128, 256, 512, 1024, 2048, 4096),
    "rank": (4, 8, 16, 32, 64, 128),
    "layers": (1, 2, 4, 8, -1),
}
TARGETS = {  # largest ratios to mlx_lm.lora: time per supervised token, peak memory above the weights
    "masked prompts": (0.5, 0.5),
    "every token": (0.8, None),
    "fixed batches": (0.95, 0.6),
}
NA_LORA_TARGET = 1.03  # largest ratio of the time with na-lora to that with lora
LEARNING_RATE = 1e-5
VOCABULARY = 151936
SHAPES = {  # random models: hidden size, intermediate size, heads, key-value heads, head size, layers
    "qwen3-0.6b": ("qwen3", 1024, 3072, 16, 8, 128, 28),
    "llama-3.2-1b": ("llama", 2048, 8192, 32, 8, 64, 16),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        required=True,
        help=f"directory of a float32 model, or {' or '.join(SHAPES)} (random weights)",
    )
    parser.add_argument("--layers", type=int, help="number of layers to keep (default: all)")
    parser.add_argument("--data", help="directory with train.jsonl")
    parser.add_argument(
        "--fixed", metavar="BxL", help="give all trainers the same batches of B random rows with L tokens"
    )
    parser.add_argument(
        "--no-mask-prompt", dest="mask_prompt", action="store_false", help="supervise every token"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--iters", type=int, default=20, help="measured iterations (default: 20)")
    parser.add_argument("--warmup", type=int, default=10, help="iterations before measuring (default: 10)")
    parser.add_argument("--report", type=int, default=10, help="iterations between reports (default: 10)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-layers", type=int, default=16, help="number of layers to adapt (default: 16)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--sweep", choices=SWEEPS, help="measure at several lengths, ranks or numbers of layers"
    )
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS[:3]))
    parser.add_argument("--plot", type=Path, help="write a plot of process memory by iteration to this file")
    parser.add_argument("--output", type=Path, help="append raw results to this file")
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
    for point in sweep_points(args):
        rounds = [measure_round(args, repeat, point) for repeat in range(args.repeats)]
        point_results = [result for one in rounds for result in one]
        if point_results and point:
            print(f"\n{', '.join(f'{name} {value}' for name, value in point.items())}")
        print(table(point_results, args))
        results += point_results
    if args.plot:
        plot(results, args.plot)
    return 0


def sweep_points(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the settings to change at each point of the sweep. Without a sweep, return one point without changes."""
    if not args.sweep:
        return [{}]
    values = SWEEPS[args.sweep]
    if args.sweep == "length":
        return [{"fixed": f"1x{value}"} for value in values]
    setting = {"rank": "rank", "layers": "num_layers"}[args.sweep]
    return [{setting: value} for value in values]


def measure_round(args: argparse.Namespace, repeat: int, point: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure each trainer once, each in its own process. The order rotates from round to round."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in point.items()]
    results = []
    start = repeat % len(args.trainers)
    for trainer in args.trainers[start:] + args.trainers[:start]:
        command = [sys.executable, __file__, *sys.argv[1:], *flags, "--worker", trainer, str(repeat)]
        done = subprocess.run(command, capture_output=True, text=True, env=worker_environment(trainer))
        if done.returncode:
            raise RuntimeError(f"{trainer}: {done.stderr}")
        record = {"trainer": trainer, "repeat": repeat, **point, **json.loads(done.stdout.splitlines()[-1])}
        results.append(record)
        if args.output:
            with args.output.open("a") as file:
                file.write(json.dumps(record | {"settings": recorded_settings(args)}) + "\n")
        print(
            f"{repeat + 1}/{args.repeats} {trainer:<12}{record['ms_per_token']:9.2f} ms per supervised token,"
            f"{record['seconds_per_step']:7.3f} s per step,{record['process_peak_gb']:7.3f} GB peak memory",
            file=sys.stderr,
            flush=True,
        )
    return results


def worker_environment(trainer: str) -> dict[str, str]:
    """Return the environment of a worker: without LD_PRELOAD for PyTorch, which is faster with its own BLAS."""
    return {k: v for k, v in os.environ.items() if trainer != "peft" or k != "LD_PRELOAD"}


def recorded_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the command-line settings to record, with paths reduced to their last component."""
    names = {name: Path(value).name for name in ("model", "data") if (value := getattr(args, name))}
    left_out = ("output", "plot", "worker", "trainers")
    return {name: value for name, value in vars(args).items() if name not in left_out} | names


# --- output -------------------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Return a table of medians with ratios to the first trainer, followed by the comparison with the targets."""
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
            values = [r[key] for r in results if r["trainer"] == trainer]
            if None in values:
                cells.append("-")
                continue
            ratio = median_ratio(results, key, trainer, trainers[0])
            cells.append(f"{statistics.median(values):.3g}" + (f" ({ratio:.2f})" if ratio else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    kind = "fixed batches" if args.fixed else "masked prompts" if args.mask_prompt else "every token"
    if BASELINE in trainers and not args.sweep:
        for key, target in zip(("ms_per_token", "above_weights_gb"), TARGETS[kind], strict=True):
            ratio = median_ratio(results, key, "na-lora", BASELINE)
            if ratio and target:
                lines.append(f"{kind}, na-lora / {BASELINE}, {key}: {compare(ratio, target, digits=2)}")
    if (ratio := median_ratio(results, "ms_per_token", "na-lora", "lora")) is not None:
        lines.append(f"na-lora / lora, ms_per_token: {compare(ratio, NA_LORA_TARGET, digits=3)}")
    return "\n".join(lines)


def compare(ratio: float, target: float, digits: int) -> str:
    return f"{ratio:.{digits}f} (target {target}: {'met' if ratio <= target else 'missed'})"


def median_ratio(results: list[dict[str, Any]], key: str, trainer: str, baseline: str) -> float | None:
    """Return the median over rounds of the ratio of two trainers, or None if no round has both values."""
    values = {(r["trainer"], r["repeat"]): r[key] for r in results}
    repeats = sorted({r["repeat"] for r in results})
    pairs = [(values.get((trainer, repeat)), values.get((baseline, repeat))) for repeat in repeats]
    ratios = [a / b for a, b in pairs if a is not None and b]
    return statistics.median(ratios) if ratios else None


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot the process memory by iteration, one line per measurement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for r in results:
        iterations, gigabytes = zip(*r["memory"], strict=True)
        axes.plot(iterations, gigabytes, label=r["trainer"])
    axes.set(xlabel="iteration", ylabel="process memory, GB", ylim=(0, None))
    axes.legend()
    figure.savefig(path)


# --- measurements -------------------------------------------------------------------------------------------


class Recorder:
    """Records the time, the number of supervised tokens and the process memory at each report."""

    def __init__(self) -> None:
        self.times, self.tokens = [time.perf_counter()], [0]
        self.memory: list[tuple[int, float]] = []

    def start(self) -> None:
        """Start the clock, after the model and the data are loaded."""
        self.times[0] = time.perf_counter()

    def record(self, iteration: int, tokens: int) -> None:
        """Record a report, given the numbers of iterations and supervised tokens so far."""
        self.times.append(time.perf_counter())
        self.tokens.append(tokens)
        self.memory.append((iteration, resident_gb()))


def resident_gb() -> float:
    """Return the current memory of this process, or its peak on macOS."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9
    return process_peak_gb()


def process_peak_gb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def measure(args: argparse.Namespace, trainer: str, seed: int) -> dict[str, Any]:
    """Train in this process and return times and memory peaks."""
    run = {BASELINE: run_mlx_lm, "lora": run_ours, "na-lora": run_ours, "peft": run_peft}[trainer]
    recorder = Recorder()
    result = run(args, trainer, seed, args.warmup + args.iters, recorder)
    times, counts = recorder.times, recorder.tokens
    first = args.warmup // args.report
    seconds, tokens = times[-1] - times[first], counts[-1] - counts[first]
    return {
        "ms_per_token": 1e3 * seconds / tokens,
        "seconds_per_step": seconds / args.iters,
        "tokens": tokens,
        "reports": [[round(t - times[0], 3), count] for t, count in zip(times, counts, strict=True)],
        "process_peak_gb": process_peak_gb(),
        "memory": recorder.memory,
        **result,
    }


def random_model_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return the config of a model with random weights and the shapes of the model it is named after."""
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
    """Load or create the model with --layers layers. Return it with its tokenizer, None for a random model."""
    import mlx.core as mx

    mx.random.seed(0)
    if args.model in SHAPES:
        settings = random_model_config(args)
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


def load_examples(args: argparse.Namespace, tokenizer: Any, seed: int) -> list[Any]:
    """Return the tokenized rows of the data set, or with --fixed random rows with all tokens supervised."""
    import numpy as np

    from nalora_mlx.data.rows.formats import Features
    from nalora_mlx.data.sources.loading import load_local
    from nalora_mlx.data.tokenization import Example, tokenize_split

    if args.fixed:
        rows, length = map(int, args.fixed.split("x"))
        rng = np.random.default_rng(seed)
        tokens = rng.integers(1, 40000, (rows * (args.warmup + args.iters), length + 1), dtype=np.int32)
        return [Example(row, np.arange(length + 1) > 0, "") for row in tokens]
    rows = load_local(Path(args.data), ["train"])["train"]
    return tokenize_split(rows, tokenizer, Features(mask_prompt=args.mask_prompt), 2048).sequences


def batch_size(args: argparse.Namespace) -> int:
    return int(args.fixed.split("x")[0]) if args.fixed else args.batch_size


class Counters:
    """Counts padding, batch positions and compiled graphs of a trainer on MLX."""

    def __init__(self) -> None:
        self.padding = self.positions = self.compiled = 0

    def add_batch(self, positions: int, tokens: int) -> None:
        self.positions += positions
        self.padding += positions - tokens

    def result(self, weights: int) -> dict[str, Any]:
        """Return the counts and MLX's memory peak above the size of the weights in bytes."""
        import mlx.core as mx

        return {
            "above_weights_gb": (mx.get_peak_memory() - weights) / 1e9,
            "weights_gb": weights / 1e9,
            "padding": self.padding / max(self.positions, 1),
            "compiled": self.compiled,
        }


def run_mlx_lm(args: argparse.Namespace, _: str, seed: int, iters: int, recorder: Recorder) -> dict[str, Any]:
    """Train with mlx-lm's trainer, with its own batches unless they are fixed."""
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
    counters = Counters()

    def loss(*arguments):  # called once per compiled graph
        counters.compiled += 1
        return trainer.default_loss(*arguments)

    def batches(**settings):
        for batch, lengths in trainer.iterate_batches(**settings):
            counters.add_batch(batch.size, int(mx.minimum(lengths[:, 1], batch.shape[1]).sum()))
            yield batch, lengths

    def fixed_batches(**_):
        rows, size = load_examples(args, tokenizer, seed), batch_size(args)
        for start in range(0, len(rows), size):
            tokens = np.stack([row.tokens for row in rows[start : start + size]])
            yield mx.array(tokens), mx.array([(0, tokens.shape[1] - 1)] * size)

    # mlx-lm trains on, and counts, the first padding token after each row. Do not count it here.
    extra_tokens = 0 if args.fixed else batch_size(args)

    class Callback(trainer.TrainingCallback):
        def on_train_loss_report(self, info):
            recorder.record(info["iteration"], info["trained_tokens"] - extra_tokens * info["iteration"])

    train_set: Any = []
    if not args.fixed:
        config = types.SimpleNamespace(mask_prompt=args.mask_prompt)
        train_set = CacheDataset(load_local_dataset(Path(args.data), tokenizer, config)[0])
    settings = trainer.TrainingArgs(
        batch_size=batch_size(args),
        iters=iters,
        steps_per_report=args.report,
        steps_per_save=10**9,
        max_seq_length=10**6 if args.fixed else 2048,
        adapter_file=str(Path(tempfile.mkdtemp()) / "adapters.safetensors"),
    )
    mx.reset_peak_memory()
    recorder.start()
    trainer.train(
        model,
        optim.Adam(LEARNING_RATE),
        train_set,
        args=settings,
        loss=loss,
        iterate_batches=fixed_batches if args.fixed else batches,
        training_callback=Callback(),
    )
    return counters.result(weights)


def run_ours(
    args: argparse.Namespace, method: str, seed: int, iters: int, recorder: Recorder
) -> dict[str, Any]:
    """Train with our trainer, with method "lora" or "na-lora"."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten

    from nalora_mlx import NALoRAConfig, TrainingConfig, adapt, train
    from nalora_mlx.data import batches
    from nalora_mlx.training.step import TrainingStep

    model, tokenizer = load_model(args)
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    examples = load_examples(args, tokenizer, seed)
    off: dict[str, Any] = (
        {"mask": "off", "step_scaling": False, "selection_limit": 0.0} if method == "lora" else {}
    )
    adapt(model, NALoRAConfig(rank=args.rank, num_layers=args.num_layers, **off))
    counters = Counters()
    collate, backward = batches.collate, TrainingStep._backward

    def counting_collate(*arguments: Any, **keywords: Any) -> Any:
        batch = collate(*arguments, **keywords)
        counters.add_batch(batch.token_mask.size, int(batch.token_mask.sum()))
        return batch

    def counting_backward(*arguments: Any) -> Any:  # called once per compiled graph
        counters.compiled += 1
        return backward(*arguments)

    batches.collate, TrainingStep._backward = counting_collate, counting_backward  # type: ignore[method-assign]

    def listen(event: dict[str, Any]) -> None:
        if event.get("split") == "train":
            recorder.record(event["step"], event["tokens"])

    mx.reset_peak_memory()
    recorder.start()
    settings = TrainingConfig(
        batch_size=batch_size(args),
        iters=iters,
        steps_per_report=args.report,
        seed=seed,
        max_seq_length=10**6,
    )
    train(model, examples, config=settings, optimizer=optim.Adam(LEARNING_RATE), listeners=[listen])
    return counters.result(weights)


def run_peft(args: argparse.Namespace, _: str, seed: int, iters: int, recorder: Recorder) -> dict[str, Any]:
    """Train with Transformers and PEFT on PyTorch's CPU backend. Random rows, padded to the longest in the batch."""
    import torch
    from mlx_lm.tokenizer_utils import load as load_tokenizer
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    if args.model in SHAPES:
        settings = random_model_config(args)
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
    examples = load_examples(args, tokenizer, seed)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], LEARNING_RATE)
    rng, size = random.Random(seed), batch_size(args)
    counters, trained_tokens = Counters(), 0
    recorder.start()
    for iteration in range(1, iters + 1):
        rows = [examples[rng.randrange(len(examples))] for _ in range(size)]
        longest = max(len(row.tokens) for row in rows)
        tokens, labels = torch.zeros(size, longest, dtype=torch.long), torch.full((size, longest), -100)
        attention_mask = torch.zeros(size, longest, dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row.tokens)
            tokens[i, :n], attention_mask[i, :n] = torch.tensor(row.tokens), 1
            labels[i, :n] = torch.where(torch.tensor(row.loss_mask), tokens[i, :n], -100)
        loss = adapted(input_ids=tokens, attention_mask=attention_mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trained_tokens += int((labels[:, 1:] >= 0).sum())
        counters.add_batch(attention_mask.numel(), int(attention_mask.sum()))
        if iteration % args.report == 0:
            recorder.record(iteration, trained_tokens)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    return {
        "above_weights_gb": None,  # PyTorch does not track memory on a CPU
        "weights_gb": weights,
        "padding": counters.padding / counters.positions,
        "compiled": None,
    }


if __name__ == "__main__":
    sys.exit(main())
