"""Compare the training form of a recurrent layer with mlx-lm's own: time, memory and operations of a training step.

    python scripts/benchmark_recurrence.py
    python scripts/benchmark_recurrence.py --lengths 128 1024 4096 --own-lengths 64 128 256 --dtype bfloat16

The layer has the shape of a gated delta net of Qwen3.5-4B: 2,560 features, 16 key heads and 32 value heads of 128. Its
weights and inputs are random. A step is the forward and the gradient of the input, for a loss linear in the output.
"""

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5

from nalora_mlx.models.recurrences import TrainingForms

CONFIG = {
    "model_type": "qwen3_5",
    "hidden_size": 2560,
    "intermediate_size": 256,  # of the MLP, which is not measured
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
}
OWN, FORM = "mlx-lm's own", "training form"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--own-lengths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rows", type=int, default=1, help="sequences in a batch (default: 1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls (default: 3)")
    args = parser.parse_args()
    mx.random.seed(0)
    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(CONFIG))
    model.set_dtype(getattr(mx, args.dtype))
    mx.eval(model.parameters())
    model.freeze()
    model.train()
    forms = TrainingForms(model)
    layer = model.layers[0].linear_attn
    agreement = "; ".join(forms.notices) or "forms agree"
    print(f"{mx.default_device()}, {args.dtype}, {args.rows} rows; {agreement}")
    found: dict[str, dict[int, dict[str, float]]] = {OWN: {}, FORM: {}}
    contenders = ((OWN, args.own_lengths, nullcontext), (FORM, args.lengths, forms.installed))
    for name, lengths, context in contenders:
        for length in lengths:
            with context():
                result = found[name][length] = measure(layer, args.rows, length, args.dtype, args.repeats)
            print(
                f"{name:14} {length:5} tokens: {result['seconds']:8.3f} s, {1e-9 * result['bytes']:7.3f} GB, "
                f"{result['operations']:.0f} operations",
                flush=True,
            )
        print(
            f"{name:14} per token: {1e-6 * slope(found[name], 'bytes') / args.rows:.3f} MB, "
            f"{slope(found[name], 'operations'):.2f} operations"
        )
    for length in sorted(found[OWN].keys() & found[FORM].keys()):
        ratios = {key: found[FORM][length][key] / found[OWN][length][key] for key in ("seconds", "bytes")}
        print(f"ratio at {length} tokens: time {ratios['seconds']:.3f}, memory {ratios['bytes']:.3f}")


def measure(layer: nn.Module, rows: int, length: int, dtype: str, repeats: int) -> dict[str, float]:
    """Return the median seconds, the peak memory above inputs and weights, and the operations of the graph."""
    features = layer.hidden_size
    x, weights = (mx.random.normal((rows, length, features)).astype(getattr(mx, dtype)) for _ in range(2))
    mx.eval(x, weights)

    def loss(x: mx.array) -> mx.array:
        return (layer(x) * weights).sum()

    gradient: Callable[[mx.array], Any] = mx.compile(mx.value_and_grad(loss))
    operations = count_operations(partial(mx.value_and_grad(loss), x))
    mx.eval(gradient(x))
    mx.clear_cache()
    mx.reset_peak_memory()
    resident = mx.get_active_memory()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(gradient(x))
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "bytes": mx.get_peak_memory() - resident,
        "operations": operations,
    }


def count_operations(function: Callable[[], Any]) -> int:
    """Return the number of operations in a function's graph, including views, before compilation."""
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, *function())
        return len(re.findall(r"\{ \d+ \[label =", Path(file.name).read_text()))


def slope(results: dict[int, dict[str, float]], key: str) -> float:
    """Return the growth per token between the two longest lengths."""
    *_, before, last = sorted(results)
    return (results[last][key] - results[before][key]) / (last - before)


if __name__ == "__main__":
    main()
