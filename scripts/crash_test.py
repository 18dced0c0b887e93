"""Kill training runs at random moments, resume them, and compare the results with an uninterrupted run.

python scripts/crash_test.py [--kills 50] [--jobs 2] [--seed 0]

Each run is a `nalora lora` process that trains a tiny random model.

1. Half of the runs are killed during a save, the others at a random time.
2. After each kill, every checkpoint on disk must be complete and match its recorded fingerprints.
3. Half of the runs are resumed and killed once more.
4. The run is resumed and finishes. Adapters, best adapters, optimizer state and losses must be bit-identical to those
   of the uninterrupted run.

The exit status is 0 only if all runs pass.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ITERATIONS = 40
FLAGS = [
    *("--train", "--mask-prompt", "--batch-size", "2", "--iters", str(ITERATIONS), "--val-batches", "-1"),
    *("--steps-per-eval", "4", "--steps-per-report", "3", "--save-every", "2", "--keep-last", "3"),
    *("--learning-rate", "4e-3", "--rank", "16", "--scale", "4", "--dropout", "0.1"),
    *("--grad-accumulation-steps", "2", "--mask-warmup", "3"),
]
# Fields of metrics.jsonl that differ from run to run.
NOT_REPRODUCIBLE = ("tokens_per_second", "iterations_per_second", "seconds", "peak_memory_gb")


def make_model(directory: Path) -> None:
    """Write a tiny Llama with random weights and a word tokenizer."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<|im_start|>", "<|im_end|>", "<pad>", *(f"w{i}" for i in range(252))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}",
    ).save_pretrained(directory)
    settings = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(words),
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(settings))
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (directory / "config.json").write_text(json.dumps(settings))


def make_data(directory: Path) -> None:
    rng = random.Random(1)
    directory.mkdir()
    for name, rows in (("train", 23), ("valid", 6)):
        texts = [[f"w{rng.randrange(252)}" for _ in range(rng.randint(4, 14))] for _ in range(2 * rows)]
        (directory / f"{name}.jsonl").write_text(
            "".join(
                json.dumps({"prompt": " ".join(a), "completion": " ".join(b)}) + "\n"
                for a, b in zip(texts[::2], texts[1::2], strict=True)
            )
        )


@dataclass
class Trainer:
    """Starts training processes.

    Attributes:
        model: directory of the model.
        data: directory of the data.
        runs: directory for the adapters of all runs.
    """

    model: Path
    data: Path
    runs: Path

    def start(self, output: Path, *flags: str) -> subprocess.Popen[str]:
        """Start a training process. All processes have the same environment, so mlx uses as many threads in each."""
        paths = ["--model", str(self.model), "--data", str(self.data), "--adapter-path", str(output)]
        return subprocess.Popen(
            [sys.executable, "-m", "nalora_mlx.lora", *paths, *FLAGS, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, output: Path, *flags: str) -> None:
        """Train to the end."""
        process = self.start(output, *flags)
        text, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"exit status {process.returncode}:\n{text}")


def read_results(output: Path) -> dict[str, object]:
    """Return everything that must be reproduced exactly: arrays, metrics and the list of checkpoints."""
    last = output / "checkpoints" / f"step-{ITERATIONS:07d}"
    files = [output / "adapters.safetensors", output / "best" / "adapters.safetensors"]
    files += sorted(last.glob("*.safetensors"))
    results: dict[str, object] = {str(path.relative_to(output)): path.read_bytes() for path in files}
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    results["metrics.jsonl"] = [{k: v for k, v in r.items() if k not in NOT_REPRODUCIBLE} for r in records]
    results["checkpoints"] = sorted(path.name for path in (output / "checkpoints").iterdir())
    return results


def is_saving(output: Path) -> bool:
    """Return whether a checkpoint is being written, or was when the process was killed."""
    try:
        return any(name.startswith(".step-") for name in os.listdir(output / "checkpoints"))
    except FileNotFoundError:
        return False


def check_files(output: Path) -> None:
    """Check that all files are complete and that the arrays of checkpoints match their recorded fingerprints."""
    from nalora_mlx.core.storage import read_arrays, read_json
    from nalora_mlx.runs.fingerprint import fingerprint
    from nalora_mlx.runs.resume import read_state

    steps = sorted((output / "checkpoints").glob("step-*"))
    for directory in (output, output / "best", *steps):
        for path in directory.glob("[!.]*.json"):
            read_json(path)
        arrays = {path.name: read_arrays(path) for path in directory.glob("[!.]*.safetensors")}
        for name, content in arrays.items():
            for array in content.values():
                array.tolist()  # reads every byte
            assert content, f"{directory / name} is empty"
        if directory in steps:
            state = read_state(directory)
            assert {name: fingerprint(arrays[name]) for name in state.arrays} == state.arrays, directory
            best = directory / "best.safetensors"
            digest = hashlib.sha256(best.read_bytes()).hexdigest() if best.exists() else None
            assert digest == state.best, best


def start_and_kill(
    trainer: Trainer, output: Path, rng: random.Random, seconds: float, while_saving: bool, *flags: str
) -> str:
    """Start or resume a run and kill it at a random moment.

    Args:
        trainer: starts the process.
        output: adapter directory of the run.
        rng: determines the moment.
        seconds: latest time of the kill, from the first new metrics record on.
        while_saving: kill during a save instead.
        flags: ["--resume"] to resume.

    Returns:
        "saving" or "training", which is what the process was doing, or "over" if it ended before it was killed.
    """
    last_write = (output / "metrics.jsonl").stat().st_mtime_ns if flags else 0
    process = trainer.start(output, *flags)
    delay = rng.uniform(0, seconds)
    kill_at_save = rng.randint(1, ITERATIONS // 2 - 1)
    saves, was_saving, started = 0, False, None
    while process.poll() is None:
        if started is None and modified_since(output / "metrics.jsonl", last_write):
            started = time.monotonic()
        if while_saving:
            saving = is_saving(output)
            saves += saving and not was_saving
            was_saving = saving
            if saves >= kill_at_save and saving:
                time.sleep(rng.uniform(0, 0.004))
                break
        elif started is not None and time.monotonic() - started > delay:
            break
        time.sleep(0.0002 if while_saving else 0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode != -signal.SIGKILL:
        return "over"
    return "saving" if is_saving(output) else "training"


def modified_since(path: Path, since: int) -> bool:
    """Return whether a file exists and was modified after a time in nanoseconds."""
    try:
        return path.stat().st_mtime_ns > since
    except FileNotFoundError:
        return False


def resume_flags(output: Path) -> list[str]:
    """Return --resume if the run has a checkpoint."""
    return ["--resume"] if any((output / "checkpoints").glob("step-*")) else []


def trial(
    trainer: Trainer, number: int, seed: int, seconds: float, expected: dict[str, object]
) -> tuple[str, str]:
    """Kill a run once or twice, resume it, and compare its results.

    Returns:
        What the process was doing when killed, and the names of results that differ, or an error message.
    """
    rng = random.Random(1000 * seed + number)
    output = trainer.runs / f"run-{number:03d}"
    while_saving = number % 2 == 1
    while (doing := start_and_kill(trainer, output, rng, seconds, while_saving)) == "over":
        shutil.rmtree(output)
    try:
        check_files(output)
        if number % 4 >= 2 and (flags := resume_flags(output)):
            second = start_and_kill(trainer, output, rng, seconds / 2, while_saving, *flags)
            doing += f" and again, {second}"
            check_files(output)
        trainer.run(output, *resume_flags(output))
        results = read_results(output)
        different = [name for name in expected if results.get(name) != expected[name]]
    except Exception as error:
        return doing, f"{type(error).__name__}: {error}"
    if not different:
        shutil.rmtree(output)
    return doing, ", ".join(different)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill and resume training runs, and compare the results.")
    parser.add_argument("--kills", type=int, default=50, help="number of runs to kill (default: 50)")
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel runs (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="crash-test-"))
    trainer = Trainer(directory / "model", directory / "data", directory / "runs")
    make_model(trainer.model)
    make_data(trainer.data)
    uninterrupted = directory / "uninterrupted"
    trainer.run(uninterrupted)
    expected = read_results(uninterrupted)
    check_files(uninterrupted)
    records = expected["metrics.jsonl"]
    assert isinstance(records, list)
    last = uninterrupted / "checkpoints" / f"step-{ITERATIONS:07d}"
    seconds = json.loads((last / "training_state.json").read_text())["progress"]["seconds"]
    print(f"uninterrupted: {ITERATIONS} iterations in {seconds:.1f} s, {len(records)} records", flush=True)
    counts: dict[str, int] = {}
    failures = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        trials = [pool.submit(trial, trainer, i, args.seed, seconds, expected) for i in range(args.kills)]
        for number, future in enumerate(trials):
            doing, different = future.result()
            counts[doing] = counts.get(doing, 0) + 1
            failures += bool(different)
            verdict = f"differs: {different}" if different else "bit-identical"
            print(f"kill {number:3d} while {doing}: {verdict}", flush=True)
    summary = ", ".join(f"{count} while {doing}" for doing, count in sorted(counts.items()))
    print(f"{args.kills - failures} of {args.kills} bit-identical ({summary})")
    if failures:
        print(f"the runs that differ are in {trainer.runs}")
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
