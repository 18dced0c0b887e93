"""Predict what a training step costs on a GPU, ours and mlx_lm.lora's, without a GPU.

Traces the step of a model shape as the GPU would run it, counts operations, kernel launches, bytes and floating-point
operations, and predicts time and peak memory for chips. docs/step-cost.md has the assumptions.

    bash scripts/environment.sh python scripts/step_cost.py qwen3-0.6b --rows 4 --length 512 --chips "M4 Max" H200
    bash scripts/environment.sh python scripts/step_cost.py qwen3-0.6b --sizes
    bash scripts/environment.sh python scripts/step_cost.py --table
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from step_cost_fusion import fuse
from step_cost_model import CHIPS, Chip, Total, total_cost
from step_cost_trace import LORA, NA_LORA, SHAPES, THEIRS, TRAINERS, Step, trace_step

from nalora_mlx.ops.device_sizes import SIZES
from nalora_mlx.training.graph_memory import TaskSize, peak_bytes

GB = 1e9
# How much MLX 0.32 starts before it waits: operations and elements of a command buffer or CUDA graph.
IN_FLIGHT = {"metal": TaskSize(50, 50 * 2**20), "cuda": TaskSize(100, 1000 * 2**20)}
PAGE = Path(__file__).resolve().parents[1] / "docs/step-cost.md"
TABLE_BEGIN, TABLE_END = "<!-- predicted -->\n", "<!-- end -->\n"
TABLE_ROWS = (  # shape, bits of the weights, batch
    ("smollm2-135m", 16, (4, 160)),
    *(
        (shape, bits, batch)
        for shape in ("qwen3-0.6b", "qwen3-4b", "qwen3.5-4b", "llama-3.2-1b", "llama-3.2-3b")
        for bits in (16, 4)
        for batch in ((4, 512), (1, 2048))
    ),
)
TABLE_CHIPS = ("M2 Pro", "M4 Max", "M5 Max", "RTX 4090", "H200")
# mlx-lm runs these recurrences one token at a time in training, about a hundred operations per token and layer.
LOOPS = ("qwen3.5-4b",)


class Prediction(NamedTuple):
    """What a step costs.

    Attributes:
        total: operations and their cost.
        peak: bytes above the frozen weights.
        weights: bytes of the frozen weights.
    """

    total: Total
    peak: int
    weights: int

    def fits(self, chip: Chip) -> bool:
        """Return whether the step fits in the memory that MLX may use."""
        return self.peak + self.weights <= GB * chip.memory


@lru_cache(maxsize=64)
def predict(step: Step) -> Prediction:
    """Trace a step and count what it costs."""
    traced = trace_step(step)
    total = total_cost([fuse(graph) for graph in traced.graphs], step.backend)
    peak = max(peak_bytes(graph, IN_FLIGHT[step.backend]) for graph in traced.graphs)
    return Prediction(total, peak + traced.state, traced.weights)


def summary(step: Step, chips: Sequence[str]) -> dict[str, Any]:
    """Return the counts of a step, and its predicted milliseconds on chips of its backend."""
    one = predict(step)
    launches, moved = Counter[str](), Counter[str]()
    for cost in one.total.costs:
        launches[cost.kind] += cost.launches
        moved[cost.kind] += cost.bytes
    return {
        "trainer": step.trainer,
        "backend": step.backend,
        "operations": one.total.operations,
        "launches": one.total.launches,
        "gigabytes": one.total.bytes / GB,
        "teraflops": one.total.flops / 1e12,
        "peak_above_weights_gb": one.peak / GB,
        "weights_gb": one.weights / GB,
        "launches_by_kind": dict(launches.most_common(12)),
        "gigabytes_by_kind": {kind: size / GB for kind, size in moved.most_common(12)},
        "milliseconds": {
            name: 1e3 * one.total.seconds(CHIPS[name]) if one.fits(CHIPS[name]) else None
            for name in chips
            if CHIPS[name].backend == step.backend
        },
    }


# --- tables -----------------------------------------------------------------------------------------------------------


def side_by_side(step: Step, chips: Sequence[str]) -> list[dict[str, Any]]:
    """Return the summaries of all trainers on the backends that the chips have."""
    backends = dict.fromkeys(CHIPS[name].backend for name in chips)
    return [
        summary(replace(step, trainer=trainer, backend=backend), chips)
        for backend in backends
        for trainer in TRAINERS
        if trainer != THEIRS or step.shape not in LOOPS
    ]


def print_summaries(rows: list[dict[str, Any]]) -> None:
    """Print counts and predicted times as a table."""
    print(
        f"{'trainer':17} {'backend':7} {'operations':>10} {'launches':>9} {'GB':>8} {'TFLOP':>7} {'peak GB':>8}  ms"
    )
    for row in rows:
        times = ", ".join(f"{name} {milliseconds(ms)}" for name, ms in row["milliseconds"].items())
        print(
            f"{row['trainer']:17} {row['backend']:7} {row['operations']:10,} {row['launches']:9,} "
            f"{row['gigabytes']:8.1f} {row['teraflops']:7.2f} {row['peak_above_weights_gb']:8.2f}  {times}"
        )
    print("Predicted, not measured. Peaks are above the frozen weights.")


def milliseconds(ms: float | None) -> str:
    """Return a time as text; "too large" for a step that does not fit."""
    return "too large" if ms is None else f"{ms:,.0f}"


def table_row(shape: str, bits: int, batch: tuple[int, int], share: float = 1.0) -> str:
    """Return a row of the table in docs/step-cost.md."""
    step = Step(NA_LORA, shape, *batch, share, bits=bits)
    cells = []
    for backend in ("metal", "cuda"):
        found = {t: predict(replace(step, trainer=t, backend=backend)) for t in _table_trainers(shape)}
        if backend == "metal":
            cells.append(" / ".join(f"{one.total.launches:,}" for one in found.values()))
            cells.append(" / ".join(f"{one.peak / GB:.1f}" for one in found.values()))
        for name in TABLE_CHIPS:
            if CHIPS[name].backend == backend:
                times = [
                    1e3 * o.total.seconds(CHIPS[name]) if o.fits(CHIPS[name]) else None
                    for o in found.values()
                ]
                cells.append(" / ".join(map(milliseconds, times)))
    weights = "bfloat16" if bits == 16 else f"{bits}-bit"
    return f"| {shape}, {weights}, {batch[0]} x {batch[1]} | " + " | ".join(cells) + " |"


def _table_trainers(shape: str) -> tuple[str, ...]:
    return (NA_LORA,) if shape in LOOPS else (NA_LORA, THEIRS)


def table() -> Iterator[str]:
    """Yield the lines of the table in docs/step-cost.md: ours / mlx_lm.lora."""
    yield (
        "| model and batch | launches | peak GB | " + " | ".join(f"{name}, ms" for name in TABLE_CHIPS) + " |"
    )
    yield "|---" * (3 + len(TABLE_CHIPS)) + "|"
    for shape, bits, batch in TABLE_ROWS:
        print(f"{shape}, {bits} bits, {batch[0]} x {batch[1]}", file=sys.stderr)
        yield table_row(shape, bits, batch)


def write_table() -> None:
    """Replace the table in docs/step-cost.md."""
    before, rest = PAGE.read_text(encoding="utf-8").split(TABLE_BEGIN)
    after = rest.split(TABLE_END)[1]
    lines = "".join(f"{line}\n" for line in table())
    PAGE.write_text(f"{before}{TABLE_BEGIN}{lines}{TABLE_END}{after}", encoding="utf-8")


def compare_sizes(step: Step, chips: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the summary of our step with other sizes of its pieces."""
    for backend in dict.fromkeys(CHIPS[name].backend for name in chips):
        sizes = SIZES[backend]
        variants: dict[str, Step] = {"as chosen": replace(step, backend=backend)}
        for rows, columns in ((512, 2048), (1024, 4096), (2048, 8192), (2048, 16384), (4096, 8192)):
            changed = sizes._replace(head_rows=rows, head_elements=rows * columns, head_columns=columns)
            variants[f"head tiles {rows} x {columns}"] = replace(step, backend=backend, sizes=changed)
        for queries in (128, 256, 512, 1024, 1 << 20):
            changed = sizes._replace(attention_queries=queries, score_bytes=0, fused_attention=False)
            name = f"attention in blocks of {queries}" if queries < 1 << 20 else "attention in one block"
            variants[name] = replace(step, backend=backend, sizes=changed)
        variants["mlx's attention"] = replace(step, backend=backend, attention="mlx")
        if step.shape in LOOPS:
            for positions in (256, 512, 1024, 2048, 4096):
                changed = sizes._replace(group_positions=positions)
                variants[f"recurrences in groups of {positions}"] = replace(
                    step, backend=backend, sizes=changed
                )
        for name, variant in variants.items():
            yield summary(variant, chips) | {"trainer": name}


# --- command ----------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shape",
        nargs="?",
        default="qwen3-0.6b",
        help=f"a model shape ({', '.join(SHAPES)}), or a file with a model's config as JSON",
    )
    parser.add_argument("--rows", type=int, default=4, help="rows of the batch")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument(
        "--supervised", type=float, default=1.0, help="share of the tokens that are supervised"
    )
    parser.add_argument("--bits", type=int, default=16, choices=(4, 8, 16), help="of the frozen weights")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument(
        "--num-layers", type=int, default=-1, help="layers to adapt, the last ones; -1 for all"
    )
    parser.add_argument(
        "--chips", nargs="+", default=["M2 Pro", "M4 Max", "H200"], metavar="CHIP", help="to predict"
    )
    parser.add_argument("--json", action="store_true", help="print JSON with the costs by kind of operation")
    parser.add_argument(
        "--sizes", action="store_true", help="compare sizes of our pieces instead of trainers"
    )
    parser.add_argument("--table", action="store_true", help="write the table of docs/step-cost.md")
    args = parser.parse_args()
    if args.table:
        write_table()
        return 0
    unknown = [name for name in args.chips if name not in CHIPS]
    if unknown:
        parser.error(f"unknown chips: {', '.join(unknown)}; choose from {', '.join(CHIPS)}")
    if args.shape not in SHAPES:
        try:
            with open(args.shape, encoding="utf-8") as file:
                SHAPES[args.shape] = json.load(file)
        except (OSError, ValueError) as error:
            parser.error(f"{args.shape}: no known shape, and no JSON file ({error})")
    step = Step(
        LORA,
        args.shape,
        args.rows,
        args.length,
        args.supervised,
        bits=args.bits,
        layers=args.num_layers,
        rank=args.rank,
    )
    if args.sizes:
        rows = list(compare_sizes(replace(step, trainer=NA_LORA), args.chips))
    else:
        rows = side_by_side(step, args.chips)
    if args.json:
        json.dump(rows, sys.stdout, indent=1)
    else:
        print_summaries(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
