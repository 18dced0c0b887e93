"""Calculate which models fit which Macs, and write the table into docs/memory.md.

Usage: python scripts/mac_recipes.py [--check | --verify]

No model is loaded. Weights are counted from shapes. What a row needs beside them is measured by the planner, on this
machine and in float32, on a model of random weights with all adapted layers, but an eighth as wide, heads included: it
grows with the width, and is carried over to the whole one, and to bfloat16 by a share. --verify compares the result
with the planner's own on a whole model; --check says whether the page is up to date, by the smallest model.
"""

import argparse
import gc
import importlib
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from nalora_mlx.adapters.attach import adapt  # noqa: E402
from nalora_mlx.core.config import NALoRAConfig, TrainingConfig  # noqa: E402
from nalora_mlx.ops.cross_entropy import TILE_BYTES  # noqa: E402
from nalora_mlx.training.memory_model import Peak, Planner, Size  # noqa: E402
from nalora_mlx.training.run import recomputed_layers  # noqa: E402
from nalora_mlx.training.step import TrainingStep  # noqa: E402

PAGE = ROOT / "docs" / "memory.md"
PLACE = re.compile(r"(?<=<!-- scripts/mac_recipes.py -->\n).*?(?=<!-- end -->)", re.S)
GIB = 2**30
# Of its memory macOS recommends a GPU to use about two thirds, and three quarters from 64 GB on.
MACS = {16: 16 * GIB * 2 // 3, 32: 32 * GIB * 2 // 3, 64: 64 * GIB * 3 // 4}
MARGIN = 0.9  # of that: a calculation is none of a Mac's own trials
LENGTH, ROWS, ADAPTED = 1024, 4, 16  # of the recipes: tokens in a row, most rows in a batch, adapted layers
HALF = 0.6  # of what float32 needs for a row: bfloat16 halves most of it, and some is float32 in any case
PART = 8  # of the width: what is measured is an eighth as wide
HEAD = 18 * TILE_BYTES  # what the head makes; it does not grow with the model
TOLERANCE = 0.1  # of --check, for another version of mlx may need a little more or less


@dataclass(frozen=True)
class Shape:
    """What the published config of a Qwen3 model says."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    tied: bool

    def config(self, part: int = 1, layers: int | None = None, vocabulary: int = 151936) -> dict[str, Any]:
        """Settings of mlx-lm's module, of a model that is a part as wide."""
        return {
            "model_type": "qwen3",
            "hidden_size": self.hidden // part,
            "num_hidden_layers": layers or self.layers,
            "intermediate_size": self.intermediate // part,
            "num_attention_heads": self.heads // part,
            "num_key_value_heads": 8 // part,
            "head_dim": 128,
            "vocab_size": vocabulary,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": self.tied,
        }


SHAPES = {
    "Qwen3-0.6B": Shape(1024, 28, 3072, 16, True),
    "Qwen3-1.7B": Shape(2048, 28, 6144, 16, True),
    "Qwen3-4B": Shape(2560, 36, 9728, 32, True),
    "Qwen3-8B": Shape(4096, 36, 12288, 32, False),
    "Qwen3-14B": Shape(5120, 40, 17408, 40, False),
    "Qwen3-32B": Shape(5120, 64, 25600, 64, False),
}


def build(config: dict[str, Any], bits: int = 16, dtype: mx.Dtype = mx.bfloat16) -> nn.Module:
    """A model whose arrays are not computed yet, so that it takes no memory."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    if bits < 16:
        nn.quantize(model, group_size=64, bits=bits)
    return model


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, which need not have been computed."""
    return sum(array.nbytes for _, array in tree_flatten(tree))


def fixed(shape: Shape, bits: int, dtype: mx.Dtype) -> int:
    """Weights, adapters, their gradients, two moments of Adam, and the updated values: what does not grow."""
    model = build(shape.config(), bits, dtype)
    adapt_lazily(model)
    return nbytes(model.parameters()) + 4 * nbytes(model.trainable_parameters()) + HEAD


def adapt_lazily(model: nn.Module) -> None:
    """Count adapters as plain LoRA does, which computes nothing; `adapt` would try each gated MLP."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    linear_to_lora_layers(model, min(ADAPTED, len(model.layers)), {"rank": 8, "scale": 20.0, "dropout": 0.0})


def measured(config: dict[str, Any], dtype: mx.Dtype, checkpoint: bool, size: Size, layers: int = -1) -> Peak:
    """What the planner finds for a model of random weights."""
    gc.collect()  # a model that was measured before is in the circles of its training step
    mx.random.seed(0)
    model = build(config, dtype=dtype)
    mx.eval(model.parameters())
    report = adapt(model, NALoRAConfig(num_layers=layers))
    step = TrainingStep(model, optim.Adam(1e-5), report.config)
    return Planner(step, recomputed_layers(model, TrainingConfig(grad_checkpoint=checkpoint))).peak(size)


@cache
def row_bytes(name: str, checkpoint: bool) -> float:
    """Bytes that a row of LENGTH tokens needs in the whole model, in float32."""
    print(f"measuring {name}", file=sys.stderr)
    config = SHAPES[name].config(PART, min(ADAPTED, SHAPES[name].layers), vocabulary=1000)
    found = measured(config, mx.float32, checkpoint, Size(2, LENGTH, 2 * LENGTH))
    return PART * (found.per_token * LENGTH + found.per_square * LENGTH**2)


def table() -> str:
    """Recipes for each Mac: the models that fit, with as many rows as they take."""
    lines = [
        "| Mac | budget | model | weights | rows x tokens | flags | calculated peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for memory, budget in MACS.items():
        for name in SHAPES:
            for bits in (16, 4):
                if (line := recipe(name, bits, int(MARGIN * budget))) is not None:
                    lines.append(f"| {memory} GB | {budget / 1e9:.1f} GB | {line} |")
    return "\n".join(lines) + "\n"


def recipe(name: str, bits: int, budget: int) -> str | None:
    """One line: without recomputation if that takes a whole batch, else with it; None if nothing fits."""
    base = fixed(SHAPES[name], bits, mx.bfloat16)
    for checkpoint in (False, True):
        each = HALF * row_bytes(name, checkpoint)
        rows = min(ROWS, int((budget - base) // each))
        if rows == ROWS or (checkpoint and rows > 0):
            flags = ["--grad-checkpoint"] * checkpoint
            flags += [f"--batch-size {rows}"] * (rows < ROWS)
            said = f"`{' '.join(flags)}`" if flags else "none"
            kind = "bfloat16" if bits == 16 else f"{bits} bits"
            peak = (base + rows * each) / 1e9
            return f"{name} | {kind} | {rows} x {LENGTH} | {said} | {peak:.1f} GB"
    return None


def verify() -> None:
    """A whole Qwen3-0.6B of random float32 weights: calculated, and as the planner finds it."""
    name = "Qwen3-0.6B"
    for checkpoint in (False, True):
        ours = fixed(SHAPES[name], 16, mx.float32) + 2 * row_bytes(name, checkpoint)
        size = Size(2, LENGTH, 2 * LENGTH)
        theirs = measured(SHAPES[name].config(), mx.float32, checkpoint, size, ADAPTED).of(2, LENGTH)
        print(
            f"checkpoint {checkpoint}: calculated {ours / 1e9:.2f} GB, the planner {theirs / 1e9:.2f} GB, "
            f"ratio {ours / theirs:.2f}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write docs/memory.md anew, which takes some minutes.")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    only.add_argument("--verify", action="store_true", help="only hold the calculation against whole models")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    if args.verify:
        verify()
        sys.exit()
    text = PAGE.read_text()
    if args.check:
        written = PLACE.search(text)[0]  # type: ignore[index]
        row = re.search(r"\| (Qwen3-0.6B \| bfloat16 .*) \|\n", written)[1]  # type: ignore[index]
        now = recipe("Qwen3-0.6B", 16, int(MARGIN * MACS[16])) or ""
        then, today = (float(said.split()[-2]) for said in (row, now))
        same = row.rsplit("|", 1)[0] == now.rsplit("|", 1)[0] and abs(then / today - 1) <= TOLERANCE
        sys.exit(0 if same else f"{PAGE.relative_to(ROOT)} is out of date: {row} is now {now}")
    made = table()
    PAGE.write_text(PLACE.sub(lambda _: made, PAGE.read_text()))
    print(f"wrote {PAGE.relative_to(ROOT)}")
