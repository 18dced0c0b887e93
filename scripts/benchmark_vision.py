"""Compare the training cost of our trainer with that of mlx-vlm on rows with images.

    python scripts/benchmark_vision.py --model demo/digits/model --data demo/digits/data/read
    python scripts/benchmark_vision.py --language-model demo/model --data demo/digits/data/read

The second form has random weights and the shape of SmolVLM-256M: pictures of 512 x 512 pixels, a vision tower of 12
layers, 64 image tokens. Both trainers get the same model, rows and modules to adapt (all linear layers of the language
model, rank 8), and train on the answers only. They take turns in one process, in alternating order; a line of JSON has
medians, and medians of the ratios in each round. Features of images are computed once by our trainer, before the first
step: that time is listed by itself. Peak memory is that above the model's weights.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from nalora_mlx import NALoRAConfig, TrainingConfig, adapt
from nalora_mlx.core.config import RunConfig
from nalora_mlx.data.batches import collate
from nalora_mlx.data.checks import read_rows, tokenize
from nalora_mlx.models.vision.features import ImageEncoder
from nalora_mlx.models.vision.loading import open_processor, open_vision_model
from nalora_mlx.training.run import Run

THEIRS, OURS = "mlx-vlm", "na-lora"
RANK, SCALE, RATE = 8, 2.0, 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory of a vision-language model")
    parser.add_argument(
        "--language-model", help="directory of the Llama model that random towers are put around"
    )
    parser.add_argument("--data", required=True, help="directory with train.jsonl, rows with images")
    parser.add_argument("--rows", type=int, default=2, help="rows in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="iterations of each trainer in a round")
    args = parser.parse_args()
    if bool(args.model) == bool(args.language_model):
        parser.error("give either --model or --language-model")
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model or smolvlm(Path(args.language_model), Path(temporary) / "model")
        summary = compare(str(model), args.data, args.rows, args.rounds, args.steps, Path(temporary))
    print(json.dumps(summary))
    return 0


def smolvlm(language_model: Path, output: Path) -> Path:
    """Write a model of random towers with the shape of SmolVLM-256M, and its processor."""
    from digits_model import Recipe, build_model, read_json, write_files

    output.mkdir()
    write_files(
        language_model,
        output,
        Recipe(image_size=512, patch_size=16, merged=4, hidden_size=768, heads=12, layers=12),
    )
    weights = mx.load(str(language_model / "model.safetensors"))
    model = build_model(read_json(output / "config.json"), weights, newline=0)
    mx.save_safetensors(
        str(output / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    return output


class Theirs:
    """The trainer of mlx-vlm, one iteration at a time, as its own loop runs it."""

    def __init__(self, model: str, rows: list[dict[str, Any]], batch_size: int):
        from mlx_vlm import load
        from mlx_vlm.trainer.common.utils import apply_gradient_step
        from mlx_vlm.trainer.peft.utils import get_peft_model
        from mlx_vlm.trainer.vlm.config import VLMTrainingArgs
        from mlx_vlm.trainer.vlm.sft.runtime import make_task

        self.model, processor = load(model)
        get_peft_model(self.model, rank=RANK, alpha=RANK * SCALE, dropout=0.0, verbose=False)
        settings = VLMTrainingArgs(batch_size=batch_size, train_on_completions=True, pad_to_multiple=8)
        task = make_task(self.model, settings, processor)
        self.batches = task.batches(task.prepare_dataset(rows), train=True, seed=0)
        self.optimizer = optim.Adam(learning_rate=RATE)
        self.optimizer.init(self.model.trainable_parameters())
        self.value_and_grad = nn.value_and_grad(self.model, task.loss)
        self.apply = apply_gradient_step
        self.model.train()
        self.loss = 0.0

    def iterate(self) -> float:
        """Run one iteration; return the seconds it took, without preparing the batch, which is cached."""
        batch = next(self.batches)
        began = time.perf_counter()
        loss, _, _ = self.apply(
            self.model, self.optimizer, self.value_and_grad, batch, None, update=True, accumulation_steps=1
        )
        mx.eval(self.model.state, self.optimizer.state, loss)
        self.loss = loss.item()
        return time.perf_counter() - began


class Ours:
    """Our trainer, one iteration at a time."""

    def __init__(self, model: str, data: str, count: int, batch_size: int, directory: Path):
        config = RunConfig(model=model, data=data, train=True, mask_prompt=True)
        rows = read_rows(config, ["train"])
        for source in rows.sources:
            source["train"] = source["train"][:count]
        self.model, model_config = open_vision_model(model)
        processor = open_processor(model, model_config)
        adapt(self.model, NALoRAConfig(rank=RANK, scale=SCALE, num_layers=-1))
        examples = tokenize(rows, processor.tokenizer, config.max_seq_length, processor)["train"].sequences
        began = time.perf_counter()
        self.examples = ImageEncoder(self.model, processor, directory).attach(examples)
        self.encoding = time.perf_counter() - began
        settings = TrainingConfig(batch_size=batch_size, iters=10**9, steps_per_report=10**9)
        self.optimizer = optim.Adam(learning_rate=RATE)
        self.run = Run(self.model, self.examples, [], settings, self.optimizer)
        self.model.train()
        numbers = range(0, len(self.examples) - batch_size + 1, batch_size)
        self.batches = itertools.cycle(
            [collate(self.examples, range(i, i + batch_size)).with_media() for i in numbers]
        )
        self.iterations = 0

    def iterate(self) -> float:
        """Run one iteration; return the seconds it took."""
        batch = next(self.batches)
        began = time.perf_counter()
        self.iterations += 1
        self.run.update([batch], range(self.iterations, self.iterations + 1))
        self.run.settle()
        mx.synchronize()
        return time.perf_counter() - began


def measure(trainer: Theirs | Ours, steps: int) -> dict[str, float]:
    """Return the median of the seconds per iteration, and the peak memory above what is held between iterations."""
    mx.clear_cache()
    mx.synchronize()
    trees = [trainer.model.trainable_parameters(), trainer.optimizer.state]
    state = sum(a.nbytes for _, a in tree_flatten(trees) if isinstance(a, mx.array))
    resident = mx.get_active_memory()
    mx.reset_peak_memory()
    seconds = statistics.median(trainer.iterate() for _ in range(steps))
    return {"seconds": seconds, "peak": mx.get_peak_memory() - resident + state}


def compare(model: str, data: str, rows: int, rounds: int, steps: int, directory: Path) -> dict[str, Any]:
    """Run both trainers in turn, and return medians and ratios."""
    count = 4 * rows
    lines = (Path(data) / "train.jsonl").read_text().splitlines()[:count]
    ours = Ours(model, data, count, rows, directory)
    theirs = Theirs(model, [with_paths(json.loads(line), Path(data)) for line in lines], rows)
    trainers = {THEIRS: theirs, OURS: ours}
    for trainer in trainers.values():
        for _ in range(4):
            trainer.iterate()  # compiles, and fills the cache of prepared rows
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    for i in range(rounds):
        for name in list(trainers)[:: 1 if i % 2 else -1]:
            found[name].append(measure(trainers[name], steps))
        print(f"round {i + 1} of {rounds}", file=sys.stderr)
    pairs = list(zip(found[OURS], found[THEIRS], strict=True))
    return {
        "rows": rows,
        "tokens": ours.examples[0].inputs,
        "adapted": [trained(trainer.model) for trainer in trainers.values()],
        "seconds_per_step": {name: statistics.median(r["seconds"] for r in found[name]) for name in found},
        "peak_mb": {name: max(r["peak"] for r in found[name]) / 1e6 for name in found},
        "seconds_per_image_once": ours.encoding / max(sum(len(row.images) for row in ours.examples), 1),
        "time_ratio": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
        "peak_ratio": statistics.median(a["peak"] / b["peak"] for a, b in pairs),
    }


def trained(model: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(array.size for _, array in tree_flatten(model.trainable_parameters()))


def with_paths(row: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return a row as mlx-vlm takes it: its images beside the messages, and texts as contents."""
    images, messages = [], []
    for message in row["messages"]:
        content = message["content"]
        if isinstance(content, list):
            images += [str(directory / part["image"]) for part in content if part["type"] == "image"]
            content = " ".join(part["text"] for part in content if part["type"] == "text")
        messages.append({**message, "content": content})
    return {"messages": messages, "images": images}


if __name__ == "__main__":
    sys.exit(main())
