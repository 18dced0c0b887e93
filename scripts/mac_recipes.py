"""Calculate which models fit which Macs, and write the table in docs/memory.md.

Usage: python scripts/mac_recipes.py [--check | --verify]

No model weights are loaded.

1. The size of weights, adapters and optimizer state is calculated from shapes.
2. The planner measures the memory per row, in float32 on this machine, on a random model with all adapted layers but an
   eighth of the width and of the heads. This memory is proportional to the width, so it is scaled up by eight.
3. The memory per row is multiplied by a factor for bfloat16.

--check fails if the row of the smallest model is out of date. --verify compares the calculation with the planner's
prediction for a full-size model.
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
from nalora_mlx.ops.device_sizes import SIZES  # noqa: E402
from nalora_mlx.training.memory_model import BatchShape, PeakMemory, PeakProfiler  # noqa: E402
from nalora_mlx.training.run import recomputed_layers  # noqa: E402
from nalora_mlx.training.step import TrainingStep  # noqa: E402

PAGE = ROOT / "docs" / "memory.md"
TABLE = re.compile(r"(?<=<!-- scripts/mac_recipes.py -->\n).*?(?=<!-- end -->)", re.S)
GIB = 2**30
# Memory in GB -> the GPU memory limit that macOS recommends: two thirds, or three quarters from 64 GB.
MACS = {16: 16 * GIB * 2 // 3, 32: 32 * GIB * 2 // 3, 64: 64 * GIB * 3 // 4}
MARGIN = 0.9  # share of that limit to use, because nothing here was measured on a Mac
LENGTH = 1024  # tokens per row
MAX_ROWS = 4  # rows per batch
ADAPTED_LAYERS = 16
BFLOAT16_SHARE = 0.6  # memory per row relative to float32: most of it halves, some stays float32
WIDTH_DIVISOR = 8  # the measured model has an eighth of the width
HEAD_BYTES = (
    18 * 4 * SIZES["cpu"].head_elements
)  # memory of the output head, which does not grow with the model
TOLERANCE = 0.1  # of --check, because memory use varies slightly between versions of mlx


@dataclass(frozen=True)
class Shape:
    """The sizes in the published config of a Qwen3 model."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    tied: bool

    def config(self, divisor: int = 1, layers: int | None = None, vocabulary: int = 151936) -> dict[str, Any]:
        """Return the mlx-lm config, with the width and the number of heads divided by `divisor`."""
        return {
            "model_type": "qwen3",
            "hidden_size": self.hidden // divisor,
            "num_hidden_layers": layers or self.layers,
            "intermediate_size": self.intermediate // divisor,
            "num_attention_heads": self.heads // divisor,
            "num_key_value_heads": 8 // divisor,
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
    """Create a model without evaluating its arrays, so that it takes no memory."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    if bits < 16:
        nn.quantize(model, group_size=64, bits=bits)
    return model


def nbytes(tree: Any) -> int:
    """Return the size of all arrays in bytes, without evaluating them."""
    return sum(array.nbytes for _, array in tree_flatten(tree))


def fixed_bytes(shape: Shape, bits: int, dtype: mx.Dtype) -> int:
    """Return the memory that does not depend on the batch.

    It holds the weights, the output head's arrays, and the adapters with their gradients, two Adam moments and updated
    values.
    """
    model = build(shape.config(), bits, dtype)
    adapt_lazily(model)
    return nbytes(model.parameters()) + 4 * nbytes(model.trainable_parameters()) + HEAD_BYTES


def adapt_lazily(model: nn.Module) -> None:
    """Attach plain LoRA without evaluating anything. `adapt` would run each gated MLP to verify it."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    layers = min(ADAPTED_LAYERS, len(model.layers))
    linear_to_lora_layers(model, layers, {"rank": 8, "scale": 20.0, "dropout": 0.0})


def planned_peak(
    config: dict[str, Any], dtype: mx.Dtype, checkpoint: bool, shape: BatchShape, layers: int = -1
) -> PeakMemory:
    """Return the planner's peak for a model with random weights."""
    gc.collect()  # the previous model is part of reference cycles
    mx.random.seed(0)
    model = build(config, dtype=dtype)
    mx.eval(model.parameters())
    report = adapt(model, NALoRAConfig(num_layers=layers))
    step = TrainingStep(model, optim.Adam(1e-5), report.config)
    recomputed = recomputed_layers(model, TrainingConfig(grad_checkpoint=checkpoint))
    return PeakProfiler(step, recomputed).profile(shape)


@cache
def row_bytes(name: str, checkpoint: bool) -> float:
    """Return the memory per row of LENGTH tokens in the full-size model, in float32."""
    print(f"measuring {name}", file=sys.stderr)
    layers = min(ADAPTED_LAYERS, SHAPES[name].layers)
    config = SHAPES[name].config(WIDTH_DIVISOR, layers, vocabulary=1000)
    peak = planned_peak(config, mx.float32, checkpoint, BatchShape(2, LENGTH, 2 * LENGTH))
    return WIDTH_DIVISOR * (peak.per_token * LENGTH + peak.per_square * LENGTH**2)


def table() -> str:
    """Return the table: for each Mac the models that fit, with the largest batch."""
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
    """Return the last cells of a table row, or None if not even one row fits.

    Gradient checkpointing is used only if a full batch does not fit without it.
    """
    base = fixed_bytes(SHAPES[name], bits, mx.bfloat16)
    for checkpoint in (False, True):
        per_row = BFLOAT16_SHARE * row_bytes(name, checkpoint)
        rows = min(MAX_ROWS, int((budget - base) // per_row))
        if rows == MAX_ROWS or (checkpoint and rows > 0):
            flags = []
            if checkpoint:
                flags.append("--grad-checkpoint")
            if rows < MAX_ROWS:
                flags.append(f"--batch-size {rows}")
            flags_cell = f"`{' '.join(flags)}`" if flags else "none"
            weights = "bfloat16" if bits == 16 else f"{bits} bits"
            peak = (base + rows * per_row) / 1e9
            return f"{name} | {weights} | {rows} x {LENGTH} | {flags_cell} | {peak:.1f} GB"
    return None


def verify() -> None:
    """Print the calculated peak and the planner's for a full-size Qwen3-0.6B with random float32 weights."""
    name = "Qwen3-0.6B"
    for checkpoint in (False, True):
        calculated = fixed_bytes(SHAPES[name], 16, mx.float32) + 2 * row_bytes(name, checkpoint)
        shape = BatchShape(2, LENGTH, 2 * LENGTH)
        peak = planned_peak(SHAPES[name].config(), mx.float32, checkpoint, shape, ADAPTED_LAYERS)
        planned = peak.at(2, LENGTH)
        print(
            f"checkpoint {checkpoint}: calculated {calculated / 1e9:.2f} GB, planner {planned / 1e9:.2f} GB, "
            f"ratio {calculated / planned:.2f}"
        )


def check(page: str) -> None:
    """Exit with an error if the row of the smallest model has changed, allowing for TOLERANCE in the peak."""
    written = TABLE.search(page)[0]  # type: ignore[index]
    row = re.search(r"\| (Qwen3-0.6B \| bfloat16 .*) \|\n", written)[1]  # type: ignore[index]
    new_row = recipe("Qwen3-0.6B", 16, int(MARGIN * MACS[16])) or ""
    peak, new_peak = (float(line.split()[-2]) for line in (row, new_row))
    same = row.rsplit("|", 1)[0] == new_row.rsplit("|", 1)[0] and abs(peak / new_peak - 1) <= TOLERANCE
    sys.exit(0 if same else f"{PAGE.relative_to(ROOT)} is out of date: {row} is now {new_row}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Update the table in docs/memory.md (takes some minutes).")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="only check whether the table is up to date")
    mode.add_argument(
        "--verify", action="store_true", help="only compare with the planner on a full-size model"
    )
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    if args.verify:
        verify()
    elif args.check:
        check(PAGE.read_text())
    else:
        new_table = table()
        PAGE.write_text(TABLE.sub(lambda _: new_table, PAGE.read_text()))
        print(f"wrote {PAGE.relative_to(ROOT)}")
