"""Kill training processes at random moments, resume each, and compare the result with a run that was not killed.

python scripts/crash_test.py [--kills 50] [--jobs 2] [--seed 0]

The model is a tiny random one that the script makes; the runs are those of `nalora lora`, in processes of their own.
Every other kill waits for a save to begin and falls into it, and every other run is killed a second time, after its
resume. After each kill, every checkpoint on the disk must be what it was written as, all of it; after the last resume,
adapters, best adapters, optimizer state and losses must be those of the uninterrupted run, bit for bit. Exit status 0
only if all of them are.
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
CLOCK = ("tokens_per_second", "iterations_per_second", "seconds", "peak_memory_gb")


def make_model(directory: Path) -> None:
    """A tiny llama with random weights and a tokenizer of words."""
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
    draw = random.Random(1)
    directory.mkdir()
    for name, rows in (("train", 23), ("valid", 6)):
        texts = [[f"w{draw.randrange(252)}" for _ in range(draw.randint(4, 14))] for _ in range(2 * rows)]
        (directory / f"{name}.jsonl").write_text(
            "".join(
                json.dumps({"prompt": " ".join(a), "completion": " ".join(b)}) + "\n"
                for a, b in zip(texts[::2], texts[1::2], strict=True)
            )
        )


@dataclass
class Bench:
    """Where things are."""

    model: Path
    data: Path
    runs: Path

    def start(self, output: Path, *flags: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "nalora_mlx.lora",
            "--model",
            str(self.model),
            "--data",
            str(self.data),
        ]
        # mlx may not use more threads in one run than in another: every process gets the same environment.
        return subprocess.Popen(
            [*command, "--adapter-path", str(output), *FLAGS, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, output: Path, *flags: str) -> None:
        process = self.start(output, *flags)
        text, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"exit status {process.returncode}:\n{text}")


def result(output: Path) -> dict[str, object]:
    """All that must be equal: bytes of arrays, and every loss that was told."""
    last = output / "checkpoints" / f"step-{ITERATIONS:07d}"
    files = [output / "adapters.safetensors", output / "best" / "adapters.safetensors"]
    files += sorted(last.glob("*.safetensors"))
    found: dict[str, object] = {str(path.relative_to(output)): path.read_bytes() for path in files}
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found["metrics.jsonl"] = [{k: v for k, v in r.items() if k not in CLOCK} for r in records]
    found["checkpoints"] = sorted(path.name for path in (output / "checkpoints").iterdir())
    return found


def saving(output: Path) -> bool:
    """Whether a checkpoint is being written, or was when the process died."""
    try:
        return any(name.startswith(".step-") for name in os.listdir(output / "checkpoints"))
    except FileNotFoundError:
        return False


def check_readable(output: Path) -> None:
    """Every file that has its name must be whole; a checkpoint's arrays must be those that its state tells of."""
    from nalora_mlx.checkpoint import read_arrays, read_json
    from nalora_mlx.identity import fingerprint
    from nalora_mlx.resume import read_state

    steps = sorted((output / "checkpoints").glob("step-*"))
    for directory in (output, output / "best", *steps):
        for path in directory.glob("[!.]*.json"):
            read_json(path)
        arrays = {path.name: read_arrays(path) for path in directory.glob("[!.]*.safetensors")}
        for name, content in arrays.items():
            for array in content.values():
                array.tolist()  # every byte of it
            assert content, f"{directory / name} is empty"
        if directory in steps:
            state = read_state(directory)
            assert {name: fingerprint(arrays[name]) for name in state.arrays} == state.arrays, directory
            best = directory / "best.safetensors"
            found = hashlib.sha256(best.read_bytes()).hexdigest() if best.exists() else None
            assert found == state.best, best


def kill(
    bench: Bench, output: Path, draw: random.Random, seconds: float, while_saving: bool, *flags: str
) -> str:
    """Start a run, or resume it, and kill it at a random moment; what it was doing, or "over" if it was done before."""
    old = (output / "metrics.jsonl").stat().st_mtime_ns if flags else 0
    process = bench.start(output, *flags)
    wait = draw.uniform(0, seconds)
    saves = draw.randint(1, ITERATIONS // 2 - 1)
    seen, in_save, began = 0, False, None
    while process.poll() is None:
        if began is None and changed(output / "metrics.jsonl", old):
            began = time.monotonic()
        if while_saving:
            now = saving(output)
            seen += now and not in_save
            in_save = now
            if seen >= saves and now:
                time.sleep(draw.uniform(0, 0.004))
                break
        elif began is not None and time.monotonic() - began > wait:
            break
        time.sleep(0.0002 if while_saving else 0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode != -signal.SIGKILL:
        return "over"
    return "saving" if saving(output) else "training"


def changed(path: Path, since: int) -> bool:
    """Whether a file is there and was written after a time in nanoseconds."""
    try:
        return path.stat().st_mtime_ns > since
    except FileNotFoundError:
        return False


def resume(output: Path) -> list[str]:
    """The flag with which a run goes on, if it has a checkpoint."""
    return ["--resume"] if any((output / "checkpoints").glob("step-*")) else []


def trial(bench: Bench, number: int, seed: int, seconds: float, wanted: dict[str, object]) -> tuple[str, str]:
    """One or two kills and the resume; what the process was doing, and what differs from the uninterrupted run."""
    draw = random.Random(1000 * seed + number)
    output = bench.runs / f"run-{number:03d}"
    while (doing := kill(bench, output, draw, seconds, number % 2 == 1)) == "over":  # that is no kill
        shutil.rmtree(output)
    try:
        check_readable(output)
        if number % 4 >= 2 and (flags := resume(output)):
            second = kill(bench, output, draw, seconds / 2, number % 2 == 1, *flags)
            doing += f" and again, {second}"
            check_readable(output)
        bench.finish(output, *resume(output))
        got = result(output)
        wrong = [name for name in wanted if got.get(name) != wanted[name]]
    except Exception as error:
        return doing, f"{type(error).__name__}: {error}"
    if not wrong:
        shutil.rmtree(output)
    return doing, ", ".join(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill and resume training runs, and compare.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="crash-test-"))
    bench = Bench(place / "model", place / "data", place / "runs")
    make_model(bench.model)
    make_data(bench.data)
    whole = place / "whole"
    bench.finish(whole)
    wanted = result(whole)
    check_readable(whole)
    records = wanted["metrics.jsonl"]
    assert isinstance(records, list)
    state = json.loads((whole / "checkpoints" / f"step-{ITERATIONS:07d}" / "training_state.json").read_text())
    seconds = state["progress"]["seconds"]
    print(f"uninterrupted: {ITERATIONS} iterations in {seconds:.1f} s, {len(records)} records", flush=True)
    counts: dict[str, int] = {}
    failures = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        trials = [pool.submit(trial, bench, i, args.seed, seconds, wanted) for i in range(args.kills)]
        for number, future in enumerate(trials):
            doing, wrong = future.result()
            counts[doing] = counts.get(doing, 0) + 1
            failures += bool(wrong)
            print(
                f"kill {number:3d} while {doing}: {'differs: ' + wrong if wrong else 'bit-identical'}",
                flush=True,
            )
    what = ", ".join(f"{count} while {doing}" for doing, count in sorted(counts.items()))
    print(f"{args.kills - failures} of {args.kills} bit-identical ({what})")
    if failures:
        print(f"the runs that differ are in {bench.runs}")
        return 1
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
