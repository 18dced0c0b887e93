"""Compare the cost of our preference training with DPO of mlx-lm-lora, on the same pairs of answers.

    python scripts/benchmark_preference.py --model demo/model --data openbookqa                 short rows
    python scripts/benchmark_preference.py --model demo/model --data openbookqa --questions 5   longer rows
    python scripts/benchmark_preference.py --model demo/model --data openbookqa --contenders na-lora orpo simpo kto

mlx-lm-lora is not among our requirements: `pip install mlx-lm-lora==5.10.2`, or install it with --no-deps --target DIR
and pass --site DIR. Without it, only ours are measured.

Each measurement trains in a new process. The contenders take turns, in a different order each round. The script first
checks that both programs compute the same loss of the same batch with the same adapters. All read the same tokens: the
newline that mlx-lm-lora keeps after the last token of each answer is cut off.

Time is that of steps that compile no graph, divided by the tokens of their rows (each answer with its prompt, without
padding). The time with compiling is listed separately; so is that of the log-probabilities of the reference, once for
each batch (the median batch), and added to a step, as if training lasted one epoch. CPU time
is that of all threads. Peak memory is MLX's, with the weights (two models in mlx-lm-lora). The script prints medians,
and medians of the ratios to the first contender in each round. --output appends raw results as JSON lines.

Rows are pairs (`prompt`, `chosen`, `rejected`), or questions with choices in the form of LLM-Adapters, of which pairs
are made: the right choice is preferred to a wrong one. A prompt has --questions questions, and with several the answers
repeat them.
"""

import argparse
import importlib.util
import itertools
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THEIRS, THEIR_MODULE = "mlx-lm-lora", "mlx_lm_lora"
CHECK = "check"  # the worker that compares losses
TIME_TARGET, PEAK_TARGET = 0.6, 0.5  # largest ratios to mlx-lm-lora
TOLERANCE = 1e-4  # of the losses
LEARNING_RATE, SCALE, BETA = 1e-5, 10.0, 0.1  # the defaults of mlx-lm-lora
LONGEST = 2048
QUESTION = re.compile(
    r"question: (.*?)\n\nAnswer1: (.*?) Answer2: (.*?) Answer3: (.*?) Answer4: (.*?)\n\n", re.DOTALL
)
MEASURES = {  # lines of the table, and what they divide by
    "ms per token": "ms_per_token",
    "CPU ms per token": "cpu_ms_per_token",
    "ms per token, reference included": "ms_per_token_with_reference",
    "ms per token, compiling included": "ms_per_token_with_compiling",
    "seconds per step": "seconds_per_step",
    "reference, s per batch": "reference_seconds_per_batch",
    "peak, GB": "peak_gb",
    "peak above one copy of the weights, GB": "above_weights_gb",
    "process peak, GB": "process_peak_gb",
    "inputs of the forward per token": "inputs_per_token",
    "compiled graphs": "compiled",
}


@dataclass(frozen=True)
class Ours:
    """Settings of one of our contenders.

    Attributes:
        mode: train mode.
        na: whether to train with NA-LoRA, or with plain LoRA.
        reference: how its log-probabilities are computed.
        baseline: False leaves out z of KTO.
    """

    mode: str = "dpo"
    na: bool = True
    reference: str = "precomputed"
    baseline: bool = True


OURS = {
    "lora": Ours(na=False),
    "na-lora": Ours(),
    "lora-on-the-fly": Ours(na=False, reference="on-the-fly"),
    "na-lora-on-the-fly": Ours(reference="on-the-fly"),
    "orpo": Ours("orpo"),
    "simpo": Ours("simpo"),
    "kto": Ours("kto"),
    "kto-on-the-fly": Ours("kto", reference="on-the-fly"),
    "kto-without-z": Ours("kto", baseline=False),
}
DEFAULT = (THEIRS, "lora", "na-lora", "lora-on-the-fly", "na-lora-on-the-fly")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a float32 model")
    parser.add_argument("--layers", type=int, help="number of layers to keep (default: all)")
    parser.add_argument("--data", required=True, help="directory with train.jsonl")
    parser.add_argument("--questions", type=int, default=1, help="questions in a prompt (default: 1)")
    parser.add_argument("--pairs", type=int, default=16, help="number of pairs to train on (default: 16)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--iters", type=int, default=10, help="measured iterations (default: 10)")
    parser.add_argument("--warmup", type=int, default=10, help="iterations before measuring (default: 10)")
    parser.add_argument("--report", type=int, default=10, help="iterations between reports (default: 10)")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs in a batch (default: 4)")
    parser.add_argument("--num-layers", type=int, default=16, help="number of layers to adapt (default: 16)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--contenders", nargs="+", choices=(THEIRS, *OURS), default=list(DEFAULT))
    parser.add_argument("--site", help="directory with mlx-lm-lora, if it is not installed")
    parser.add_argument("--output", type=Path, help="append raw results to this file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args, args.worker[0], int(args.worker[1]))))
        return 0
    if args.iters % args.report or args.warmup % args.report:
        parser.error("--iters and --warmup must be multiples of --report")
    if THEIRS in args.contenders and not has_theirs(args.site):
        print(f"{THEIRS} is not installed, see --help; only ours are measured", file=sys.stderr)
        args.contenders.remove(THEIRS)
    if THEIRS in args.contenders:
        losses = run_worker(args, CHECK, 0)
        print(json.dumps(losses), file=sys.stderr)
        same = all(losses[name] == losses[f"their_{name}"] for name in ("tokens", "answer_tokens"))
        if not same or abs(losses["loss"] - losses["their_loss"]) > TOLERANCE * losses["their_loss"]:
            print("the two programs compute different losses of the same batch", file=sys.stderr)
            return 1
    results = []
    for repeat in range(args.repeats):
        start = repeat % len(args.contenders)
        for name in args.contenders[start:] + args.contenders[:start]:
            results.append({"contender": name, "repeat": repeat, **run_worker(args, name, repeat)})
            show(results[-1], args)
    print(table(results, args.contenders))
    return 0


def has_theirs(site: str | None) -> bool:
    """Return whether mlx-lm-lora can be imported."""
    return (
        (Path(site or "") / THEIR_MODULE).is_dir() if site else bool(importlib.util.find_spec(THEIR_MODULE))
    )


def run_worker(args: argparse.Namespace, name: str, repeat: int) -> dict[str, Any]:
    """Measure one contender in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, str(repeat)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def show(record: dict[str, Any], args: argparse.Namespace) -> None:
    """Print a result in a line, and append it to --output."""
    if args.output:
        names = {"model": Path(args.model).name, "data": Path(args.data).name}
        left_out = ("output", "worker", "contenders", "site")
        settings = {name: value for name, value in vars(args).items() if name not in left_out}
        with args.output.open("a") as file:
            file.write(json.dumps(record | {"settings": settings | names}) + "\n")
    print(
        f"{record['repeat'] + 1}/{args.repeats} {record['contender']:<20}{record['ms_per_token']:8.2f} ms per token,"
        f"{record['seconds_per_step']:7.2f} s per step,{record['peak_gb']:7.3f} GB peak",
        file=sys.stderr,
        flush=True,
    )


def table(results: list[dict[str, Any]], contenders: list[str]) -> str:
    """Return a table of medians with ratios to the first contender, and the comparison with the targets."""
    lines = [f"| | {' | '.join(contenders)} |", f"|---|{'---|' * len(contenders)}"]
    for label, key in MEASURES.items():
        cells = []
        for name in contenders:
            values = [r[key] for r in results if r["contender"] == name]
            ratio = median_ratio(results, key, name, contenders[0])
            cells.append(f"{statistics.median(values):.3g}" + (f" ({ratio:.2f})" if ratio else ""))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    if contenders[0] == THEIRS:
        for name in contenders[1:]:
            for key, target in (("ms_per_token", TIME_TARGET), ("peak_gb", PEAK_TARGET)):
                ratio = median_ratio(results, key, name, THEIRS) or 0.0
                met = "met" if ratio <= target else "missed"
                lines.append(f"{name} / {THEIRS}, {key}: {ratio:.2f} (target {target}: {met})")
    return "\n".join(lines)


def median_ratio(results: list[dict[str, Any]], key: str, name: str, baseline: str) -> float | None:
    """Return the median over rounds of the ratio to a baseline; None for the baseline, or if that is 0."""
    values = {(r["contender"], r["repeat"]): r[key] for r in results}
    rounds = [repeat for contender, repeat in values if contender == name and values.get((baseline, repeat))]
    ratios = [values[name, repeat] / values[baseline, repeat] for repeat in rounds]
    return statistics.median(ratios) if ratios and name != baseline else None


# --- rows ---------------------------------------------------------------------------------------------------


def read_pairs(directory: str, questions: int, count: int) -> list[dict[str, str]]:
    """Return the pairs to train on, made from questions with choices unless the file has pairs."""
    with (Path(directory) / "train.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    if "chosen" in rows[0]:
        return rows[:count]
    return [question_pair(rows[questions * i : questions * (i + 1)]) for i in range(count)]


def question_pair(rows: list[dict[str, str]]) -> dict[str, str]:
    """Return a pair that asks some questions. With several, the answers repeat them."""
    prompt, chosen, rejected = [], [], []
    for row in rows:
        found = QUESTION.search(row["prompt"])
        assert found is not None, row["prompt"]
        question, *choices = found.groups()
        right = int(row["answer"].removeprefix("answer")) - 1
        before = f"{question} " if len(rows) > 1 else ""
        prompt.append("\n".join([question, *(f"- {choice}" for choice in choices)]))
        chosen.append(before + choices[right])
        rejected.append(before + choices[(right + 1) % len(choices)])
    return {"prompt": "\n\n".join(prompt), "chosen": "\n".join(chosen), "rejected": "\n".join(rejected)}


# --- measuring ----------------------------------------------------------------------------------------------


class Recorder:
    """Records the steps of a training loop: when each began, its tokens, its inputs, and the graphs it compiled."""

    def __init__(self) -> None:
        self.marks: list[
            tuple[float, float]
        ] = []  # wall and CPU seconds at the start of each step, and the end
        self.sizes: list[tuple[int, int]] = []  # tokens of each step's rows, and inputs of its forward
        self.compiled_in: list[int] = []  # the step in which each graph was compiled
        self.reference_times: list[float] = []  # the start, and the end of each batch

    def begin_step(self, tokens: int, inputs: int) -> None:
        """Record the start of a step."""
        self.mark()
        self.sizes.append((tokens, inputs))

    def add_graph(self) -> None:
        """Record that the current step compiles a graph."""
        self.compiled_in.append(len(self.sizes) - 1)

    def mark(self) -> None:
        """Record the time at which a step starts, or the last one ends."""
        self.marks.append((time.perf_counter(), time.process_time()))

    def result(self, warmup: int) -> dict[str, Any]:
        """Return means over the steps after the first `warmup`."""
        steps = [
            (after[0] - before[0], after[1] - before[1], *size)
            for (before, after), size in zip(itertools.pairwise(self.marks), self.sizes, strict=True)
        ][warmup:]
        counted = [step for i, step in enumerate(steps, warmup) if i not in self.compiled_in] or steps
        wall, cpu, tokens, inputs = (sum(values) for values in zip(*counted, strict=True))
        reference = self.reference_times
        batches = [end - start for start, end in itertools.pairwise(reference)]
        per_batch = statistics.median(batches) if batches else 0.0
        all_wall, _, all_tokens, _ = (sum(values) for values in zip(*steps, strict=True))
        return {
            "ms_per_token": 1e3 * wall / tokens,
            "cpu_ms_per_token": 1e3 * cpu / tokens,
            "ms_per_token_with_reference": 1e3 * (wall / len(counted) + per_batch) * len(counted) / tokens,
            "ms_per_token_with_compiling": 1e3 * all_wall / all_tokens,
            "seconds_per_step": wall / len(counted),
            "reference_seconds_per_batch": per_batch,
            "reference_seconds": sum(batches),
            "tokens_per_step": tokens / len(counted),
            "inputs_per_token": inputs / tokens,
            "compiled": len(self.compiled_in),
            "steps": [[round(value, 3) for value in step] for step in steps],
        }


def measure(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train in this process and return times and memory peaks."""
    if args.site:
        sys.path.append(args.site)
    if name == CHECK:
        return compare_losses(args)
    import mlx.core as mx

    mx.random.seed(seed)
    recorder = Recorder()
    weights = (run_theirs if name == THEIRS else run_ours)(args, name, seed, recorder)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return {
        **recorder.result(args.warmup),
        "peak_gb": mx.get_peak_memory() / 1e9,
        "above_weights_gb": (mx.get_peak_memory() - weights) / 1e9,
        "process_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
    }


def size_of(model: Any) -> int:
    """Return the bytes of a model's weights."""
    from mlx.utils import tree_flatten

    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def cut_layers(model: Any, layers: int | None) -> Any:
    """Return the model with its first layers."""
    if layers:
        model.model.layers = model.model.layers[:layers]
    return model


# --- mlx-lm-lora --------------------------------------------------------------------------------------------


def open_theirs(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return model, reference model and rows, as mlx-lm-lora's own command makes them."""
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm_lora.trainer.datasets import CacheDataset, DPODataset  # type: ignore[import-not-found]

    model, tokenizer = load(args.model)
    cut_layers(model, args.layers).freeze()
    linear_to_lora_layers(model, args.num_layers, {"rank": args.rank, "dropout": 0.0, "scale": SCALE})
    reference = cut_layers(load(args.model)[0], args.layers).freeze()
    rows = DPODataset(read_pairs(args.data, args.questions, args.pairs), tokenizer)
    for answers in (rows._chosen_data, rows._rejected_data):
        for tokens in answers:
            del tokens[tokens.index(tokenizer.eos_token_id, len(tokens) - 2) + 1 :]
    return model, reference, CacheDataset(rows)


def run_theirs(args: argparse.Namespace, _: str, seed: int, recorder: Recorder) -> int:
    """Train with train_dpo of mlx-lm-lora; return the size of its model's weights."""
    import mlx.core as mx
    import mlx.optimizers as optim
    import numpy as np
    from mlx_lm_lora.trainer import dpo_trainer  # type: ignore[import-not-found]

    # On a CPU, MLX does not report the size of the memory that a device can keep resident, which train_dpo asks for.
    device = {"max_recommended_working_set_size": 0, **mx.device_info()}
    mx.device_info = lambda *_: device
    model, reference, rows = open_theirs(args)
    weights = size_of(reference)
    np.random.seed(seed)
    batches, loss = dpo_trainer.iterate_dpo_batches, dpo_trainer.dpo_loss

    def recorded_batches(*arguments: Any, **keywords: Any) -> Iterator[Any]:  # called once per iteration
        for chosen, rejected, *masks in batches(*arguments, **keywords):
            inputs = sum(answers.shape[0] * (answers.shape[1] - 1) for answers in (chosen, rejected))
            recorder.begin_step(count_tokens(*masks), inputs)
            yield chosen, rejected, *masks

    def recorded_loss(**arguments: Any) -> Any:  # called once per compiled graph
        recorder.add_graph()
        return loss(**arguments)

    dpo_trainer.iterate_dpo_batches = recorded_batches
    settings = dpo_trainer.DPOTrainingArgs(
        batch_size=args.batch_size,
        iters=args.warmup + args.iters,
        steps_per_report=args.report,
        steps_per_save=10**9,
        max_seq_length=LONGEST,
        beta=BETA,
        adapter_file=str(Path(tempfile.mkdtemp()) / "adapters.safetensors"),
    )
    mx.reset_peak_memory()
    dpo_trainer.train_dpo(
        model, reference, optim.Adam(LEARNING_RATE), rows, args=settings, loss_fn=recorded_loss
    )
    recorder.mark()
    return weights


def count_tokens(*masks: Any) -> int:
    """Return the number of inputs of padded rows, given the masks of their answers."""
    import numpy as np

    return sum(int(np.flatnonzero(row)[-1]) for mask in masks for row in np.array(mask))


# --- ours ---------------------------------------------------------------------------------------------------


def open_ours(args: argparse.Namespace, settings: Ours) -> tuple[Any, Any, Any]:
    """Return the adapted model, its rows, and the settings of a run."""
    from mlx_lm import load

    from nalora_mlx import NALoRAConfig, TrainingConfig, adapt
    from nalora_mlx.data.preference_tokenization import tokenize_preference_rows

    model, tokenizer = load(args.model)
    cut_layers(model, args.layers)
    answers = 2 if settings.mode == "kto" else 1  # rows of a pair
    config = TrainingConfig(
        batch_size=args.batch_size * answers,
        iters=args.warmup + args.iters,
        steps_per_report=args.report,
        max_seq_length=LONGEST,
        train_mode=settings.mode,
        reference=settings.reference,
    )
    pairs = read_pairs(args.data, args.questions, args.pairs)
    rows = tokenize_preference_rows(pairs, tokenizer, config, False, LONGEST).sequences
    off: dict[str, Any] = (
        {} if settings.na else {"mask": "off", "step_scaling": False, "selection_limit": 0.0}
    )
    adapt(model, NALoRAConfig(rank=args.rank, num_layers=args.num_layers, scale=SCALE, **off))
    return model, rows, config


def run_ours(args: argparse.Namespace, name: str, seed: int, recorder: Recorder) -> int:
    """Train with our trainer; return the size of its model's weights."""
    import mlx.core as mx
    import mlx.optimizers as optim

    from nalora_mlx import train
    from nalora_mlx.training.preferences.reference import Reference
    from nalora_mlx.training.step import TrainingStep

    model, rows, config = open_ours(args, OURS[name])
    weights = size_of(model)
    config.seed = seed
    call, backward = TrainingStep.__call__, TrainingStep._backward

    def recorded_call(step: Any, batch: Any, *arguments: Any) -> Any:
        tokens = sum(answer.inputs for row in batch.rows for answer in rows[row].answers)
        recorder.begin_step(tokens, batch.inputs.size)
        return call(step, batch, *arguments)

    def recorded_backward(*arguments: Any) -> Any:  # called once per compiled graph
        recorder.add_graph()
        return backward(*arguments)

    TrainingStep.__call__, TrainingStep._backward = recorded_call, recorded_backward  # type: ignore
    if not OURS[name].baseline:
        Reference._baseline = lambda *_: mx.array(0.0)  # type: ignore[method-assign]

    def listen(event: dict[str, Any]) -> None:
        if event["event"] in ("start", "reference"):
            recorder.reference_times.append(time.perf_counter())

    mx.reset_peak_memory()
    train(model, rows, config=config, optimizer=optim.Adam(LEARNING_RATE), listeners=[listen])
    recorder.mark()
    return weights


def compare_losses(args: argparse.Namespace) -> dict[str, float]:
    """Return loss and tokens of the same batch in both programs, with the same adapters, which are not zero."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten
    from mlx_lm_lora.trainer import dpo_trainer

    from nalora_mlx.data.batches import collate
    from nalora_mlx.training.distributed import workers
    from nalora_mlx.training.loss import batch_arrays
    from nalora_mlx.training.preferences.layout import choose_layout
    from nalora_mlx.training.preferences.loss import PreferenceLoss
    from nalora_mlx.training.preferences.reference import with_log_probabilities

    mx.random.seed(0)
    model, reference, dataset = open_theirs(args)
    size = min(args.batch_size, len(dataset))
    chosen, rejected, *masks = next(dpo_trainer.iterate_dpo_batches(dataset, size, LONGEST))
    weights = {
        name: array + 0.02 * mx.random.normal(array.shape)
        for name, array in tree_flatten(model.trainable_parameters())
    }
    model.load_weights(list(weights.items()), strict=False)
    log_p = [
        dpo_trainer.get_token_scores(one, tokens, mask).sum(-1)
        for one in (model, reference)
        for tokens, mask in zip((chosen, rejected), masks, strict=True)
    ]
    theirs = dpo_trainer.dpo_loss(*log_p, *masks, beta=BETA, delta=0.0)[0].item()

    model, rows, config = open_ours(args, OURS["lora"])
    loss = PreferenceLoss(model, config)
    order = sorted(range(len(dataset)), key=lambda i: len(dataset[i]["chosen"]))[:size]
    rows = choose_layout(loss, [rows[i] for i in order], config)
    rows = with_log_probabilities(loss, rows, config, workers())
    model.load_weights(list(weights.items()), strict=False)
    value, _ = loss.evaluate(batch_arrays(collate(rows, range(size))))
    return {
        "loss": value.item() / size,
        "their_loss": theirs,
        "tokens": sum(answer.inputs for row in rows for answer in row.answers),
        "their_tokens": count_tokens(*masks),
        "answer_tokens": sum(row.supervised_tokens for row in rows),
        "their_answer_tokens": int(sum(np.array(mask)[:, 1:].sum() for mask in masks)),
    }


if __name__ == "__main__":
    sys.exit(main())
