"""Compare the gated residual kernel with mlx-lm's LoRA: time, peak memory, memory traffic and FLOPs.

    python scripts/benchmark_kernel.py --tokens 512 --output kernel.jsonl       # on MLX's default device
    python scripts/benchmark_kernel.py --mlp --models qwen2.5-0.5b --ranks 16   # including the MLP's own products
    python scripts/benchmark_kernel.py --count                                  # memory traffic only
    python scripts/benchmark_kernel.py --predict                                # the table in docs/kernels.md

One measurement is a compiled forward and backward pass, from the outputs of the frozen projections to all gradients, as
in a training step. All contenders run in one process and take turns, so a change in machine speed affects them equally.
The script prints medians, and medians of the pairwise ratios to mlx-lm. Memory traffic on a GPU is counted from the
compiled graph, without the frozen products, so any machine will do. --output appends raw results as JSON lines.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from compiled_graph import KernelStub, Traffic, graph_traffic
from mlx_lm.models.activations import swiglu

from nalora_mlx.ops.activations import ACTIVATIONS
from nalora_mlx.ops.fast_math import vectorized
from nalora_mlx.ops.kernels import fused, gated_residual, selfcheck
from nalora_mlx.ops.kernels.backend import backend
from nalora_mlx.ops.kernels.fused import Variant
from nalora_mlx.ops.kernels.low_rank import LowRank, project

SCALE = 20.0
MODELS = {  # hidden size D, intermediate size F
    "qwen2.5-0.5b": (896, 4864),
    "qwen3-0.6b": (1024, 3072),
    "llama-3.2-1b": (2048, 8192),
    "llama-3.2-3b": (3072, 8192),
    "qwen3-8b": (4096, 12288),
}
RANKS = (8, 16, 32, 64)
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
CHIPS = {  # Apple's memory bandwidth in GB/s; estimated float32 TFLOP/s: cores x 128 lanes x 2 x clock
    "M1": (68, 2.6),
    "M2 Max": (400, 13.6),
    "M4": (120, 4.3),
    "M4 Max": (546, 17.0),
}
MLP_PRODUCTS = 6  # products of [N, D] with [D, F]: gate, up, down, and the gradients of their inputs
EFFICIENCY = 0.7  # share of peak FLOP/s that a large product reaches; the kernel's loop reaches half of that
THEIRS, OURS, WITH_STATISTICS, WITH_ROUTE = "mlx-lm", "ours", "ours, with statistics", "ours, with route"
CONTENDERS = (THEIRS, OURS, WITH_STATISTICS, WITH_ROUTE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS)[1:])
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, or float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mlp", action="store_true", help="include the MLP's frozen products")
    parser.add_argument("--output", type=Path, help="append raw results to this file")
    parser.add_argument("--count", action="store_true", help="only count memory traffic, for all dtypes")
    parser.add_argument("--predict", action="store_true", help="only print predicted gains on Apple's chips")
    args = parser.parse_args()
    if args.predict:
        print(prediction_table())
        return 0
    if args.count:
        print(traffic_table(args))
        return 0
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    print(
        f"{args.tokens} tokens, {dtype}, {backend()} on {mx.default_device()}; pairs are mlx-lm / ours, "
        "ratios are ours / mlx-lm\n"
    )
    times = ["forward, ms", "backward, ms", "time ratio", "with statistics", "with route"]
    memory = ["peak, MB", "ratio", "GFLOP", "GB moved on a GPU", "ratio"]
    print(table_header(["model", "rank", *times, *memory]))
    for model in args.models:
        for rank in args.ranks:
            case = Case(*MODELS[model], args.tokens, rank, DTYPES[dtype], args.mlp)
            results = measure(case, args.repeats)
            print(table_row(model, rank, results), flush=True)
            if args.output:
                settings = {"model": model, "rank": rank, "tokens": args.tokens, "dtype": dtype}
                with args.output.open("a") as file:
                    for result in results:
                        file.write(json.dumps({**settings, "mlp": args.mlp, **result}) + "\n")
    return 0


# --- contenders ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The sizes and dtype of one measurement.

    Attributes:
        dims: hidden size D.
        features: intermediate size F.
        tokens: N.
        rank: of all adapters.
        dtype: of the model.
        mlp: whether to include the frozen products of the MLP.
    """

    dims: int
    features: int
    tokens: int
    rank: int
    dtype: mx.Dtype
    mlp: bool = False

    def arrays(self, name: str) -> list[mx.array]:
        """Return all arrays to differentiate, followed by the gradient of the output. They are not evaluated.

        A and B are in float32 for every contender. mlx-lm also computes x A in float32; ours is in `low_dtype`.
        """
        n, d, f, r = self.tokens, self.dims, self.features, self.rank
        keys = iter(mx.random.split(mx.random.key(0), 8))

        def normal(*shape: int, dtype: mx.Dtype = mx.float32, std: float = 0.02) -> mx.array:
            return (std * mx.random.normal(shape, key=next(keys))).astype(dtype)

        if self.mlp:
            adapters = [normal(*s) for s in ((d, r), (r, f), (d, r), (r, f), (f, r), (r, d))]
            return [normal(n, d, dtype=self.dtype, std=1), *adapters, normal(n, d, dtype=self.dtype, std=1)]
        low_dtype = mx.float32 if name == THEIRS else self.low_dtype
        bases = [normal(n, f, dtype=self.dtype, std=1) for _ in range(2)]
        lows = [normal(n, r, dtype=low_dtype, std=1) for _ in range(2)]
        bs = [normal(r, f) for _ in range(2)]
        return [*bases, *lows, *bs, normal(n, f, dtype=self.dtype, std=1)]

    @property
    def low_dtype(self) -> mx.Dtype:
        """Return the dtype of our low-rank products."""
        return mx.float32 if self.dtype == mx.float16 else self.dtype

    def flops(self, name: str) -> int:
        """Return the FLOPs of all matrix products, forward and backward, without the small elementwise part."""
        n, d, f, r = self.tokens, self.dims, self.features, self.rank
        low_rank = 4 * n * f * r  # gate and up
        # The kernel computes z and u again in the backward pass.
        recomputed = low_rank if name != THEIRS and r <= fused.MAX_RANK else 0
        routed = low_rank // 2 if name == WITH_ROUTE else 0
        mlp = MLP_PRODUCTS * 2 * n * d * f + 3 * (4 * n * d * r + 2 * n * (f + d) * r) if self.mlp else 0
        return 3 * low_rank + recomputed + routed + mlp

    def forward(self, name: str) -> Callable[..., tuple[mx.array, dict[str, mx.array]]]:
        """Return a contender's function: arrays -> output and channel statistics."""
        silu = ACTIVATIONS["silu"]
        variant = Variant(silu)
        if name == WITH_STATISTICS:
            variant = Variant(silu, "separate", "derivative", silu.boundaries)
        weights = mx.ones((self.tokens,))
        route = (mx.arange(self.features) % 2).astype(mx.float32) if name == WITH_ROUTE else None
        mx.eval(weights, *([] if route is None else [route]))
        selfcheck.verify_kernels(variant, self.dtype, self.low_dtype, self.rank)

        def fused_product(gate: LowRank, up: LowRank) -> tuple[mx.array, dict[str, mx.array]]:
            return gated_residual.gated_residual(variant, (gate, up), weights)

        def low_rank(base: mx.array, low: mx.array, b: mx.array, route: mx.array | None = None) -> LowRank:
            routed = None if route is None else low
            return LowRank(base, SCALE, low, b.astype(self.low_dtype), routed, route)

        def add_lora(base: mx.array, low: mx.array, b: mx.array) -> mx.array:
            return base + (SCALE * (low @ b)).astype(base.dtype)

        if not self.mlp:
            if name == THEIRS:
                return lambda g0, u0, ag, au, bg, bu: (swiglu(add_lora(g0, ag, bg), add_lora(u0, au, bu)), {})
            return lambda g0, u0, ag, au, bg, bu: fused_product(
                low_rank(g0, ag, bg, route), low_rank(u0, au, bu)
            )

        shapes = [(self.features, self.dims)] * 2 + [(self.dims, self.features)]
        frozen = [(0.02 * mx.random.normal(shape)).astype(self.dtype) for shape in shapes]
        mx.eval(frozen)  # otherwise every step would draw them again
        gate, up, down = ((lambda x, w=w: x @ w.T) for w in frozen)

        def their_lora(
            linear: Callable[[mx.array], mx.array], x: mx.array, a: mx.array, b: mx.array
        ) -> mx.array:
            return add_lora(linear(x), x @ a, b)

        def our_lora(
            linear: Callable[[mx.array], mx.array],
            x: mx.array,
            a: mx.array,
            b: mx.array,
            route: mx.array | None = None,
        ) -> LowRank:
            if self.low_dtype != self.dtype:
                return low_rank(linear(x), x.astype(self.low_dtype) @ a, b, route)
            return low_rank(*project(linear, x, a.astype(self.dtype)), b, route)

        def their_mlp(x, ag, bg, au, bu, ad, bd):  # type: ignore[no-untyped-def]
            h = swiglu(their_lora(gate, x, ag, bg), their_lora(up, x, au, bu))
            return their_lora(down, h, ad, bd), {}

        def our_mlp(x, ag, bg, au, bu, ad, bd):  # type: ignore[no-untyped-def]
            h, stats = fused_product(our_lora(gate, x, ag, bg, route), our_lora(up, x, au, bu))
            return our_lora(down, h, ad, bd).output(), stats

        return their_mlp if name == THEIRS else our_mlp


# --- measurements -------------------------------------------------------------------------------------------


def measure(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Measure the time and peak memory of all contenders in turn, `repeats` times each."""
    runs = {}
    for name in CONTENDERS:
        arrays = case.arrays(name)
        mx.eval(arrays)
        forward = case.forward(name)

        def loss(*a, forward=forward):  # type: ignore[no-untyped-def]
            y, stats = forward(*a[:-1])
            return (y * a[-1]).astype(mx.float32).sum(), stats

        step = mx.compile(mx.value_and_grad(loss, argnums=list(range(len(arrays) - 1))))
        forward_only = mx.compile(forward)
        # Compile under the same context as the trainers: ours uses the vectorized form, mlx-lm has none.
        with nullcontext() if name == THEIRS else vectorized():
            mx.eval(step(*arrays), forward_only(*arrays[:-1]))
        traffic = count_traffic(case, name)
        properties = {"name": name, "flops": case.flops(name), "bytes": traffic.bytes, "kept": traffic.kept}
        runs[name] = properties, forward_only, step, arrays
    results = []
    for repeat in range(repeats):
        for properties, forward_only, step, arrays in runs.values():
            forward_ms, _ = time_and_peak(lambda: forward_only(*arrays[:-1]))  # noqa: B023
            ms, peak = time_and_peak(lambda: step(*arrays))  # noqa: B023
            times = {"ms": ms, "forward_ms": forward_ms, "backward_ms": ms - forward_ms}
            results.append({**properties, "repeat": repeat, **times, "peak_mb": peak / 1e6})
    return results


def time_and_peak(function: Callable[[], Any]) -> tuple[float, int]:
    """Return the milliseconds a function takes, and its peak memory in bytes above what was in use before."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    mx.eval(function())
    return 1e3 * (time.perf_counter() - start), mx.get_peak_memory() - before


def table_header(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def table_row(model: str, rank: int, results: list[dict[str, Any]]) -> str:
    """Return a table row with medians and with medians of the pairwise ratios to mlx-lm."""

    def values(name: str, key: str) -> list[float]:
        return [r[key] for r in results if r["name"] == name]

    def ratio(key: str, name: str = OURS) -> str:
        pairs = zip(values(name, key), values(THEIRS, key), strict=True)
        return f"{statistics.median(a / b for a, b in pairs):.2f}"

    def pair(key: str, unit: float = 1, digits: int = 0) -> str:
        medians = (statistics.median(values(name, key)) / unit for name in (THEIRS, OURS))
        return " / ".join(f"{median:.{digits}f}" for median in medians)

    cells = [model, str(rank), pair("forward_ms", digits=1), pair("backward_ms", digits=1)]
    cells += [ratio("ms", name) for name in (OURS, WITH_STATISTICS, WITH_ROUTE)]
    cells += [pair("peak_mb"), ratio("peak_mb"), pair("flops", 1e9, 1), pair("bytes", 1e9, 2), ratio("bytes")]
    return f"| {' | '.join(cells)} |"


# --- memory traffic -----------------------------------------------------------------------------------------


def count_traffic(case: Case, name: str) -> Traffic:
    """Count what a contender's gated residual reads and writes on a GPU, forward and backward.

    The count comes from the graph that MLX compiles, with a stub in place of the Metal kernels, so no GPU is needed.
    """
    case = replace(case, mlp=False)
    arrays, stub = case.arrays(name), KernelStub()
    original = gated_residual.backend_for, fused._kernel
    gated_residual.backend_for, fused._kernel = lambda *_: "metal", lambda *_: stub
    try:
        forward = case.forward(name)

        def forward_and_backward(*a):  # type: ignore[no-untyped-def]
            stats = {}

            def output(*inputs):  # type: ignore[no-untyped-def]
                y, found = forward(*inputs)
                stats.update(found)
                return y

            (y,), gradients = mx.vjp(output, list(a[:-1]), [a[-1]])
            return y, *stats.values(), *gradients

        outputs = mx.compile(forward_and_backward)(*arrays)
    finally:
        gated_residual.backend_for, fused._kernel = original
    return graph_traffic(outputs, arrays, stub, (case.tokens, case.features), case.dtype)


def traffic_table(args: argparse.Namespace) -> str:
    """Return a table of the megabytes each contender moves and the [N, F] arrays it keeps for the backward pass."""
    columns = ["model", "dtype", "rank", "contender", "MB moved", "of mlx-lm's", "[N, F] kept"]
    lines = [table_header(columns)]
    for model in args.models:
        for dtype in DTYPES if args.dtype is None else [args.dtype]:
            for rank in args.ranks:
                case = Case(*MODELS[model], args.tokens, rank, DTYPES[dtype], args.mlp)
                traffic = {name: count_traffic(case, name) for name in CONTENDERS}
                for name, one in traffic.items():
                    share = one.bytes / traffic[THEIRS].bytes
                    lines.append(
                        f"| {model} | {dtype} | {rank} | {name} | {one.bytes / 1e6:.0f} | {share:.2f} | {one.kept} |"
                    )
    return "\n".join(lines)


def prediction_table(tokens: int = 2048, dtype: mx.Dtype = mx.bfloat16) -> str:
    """Return a table of the time an MLP's forward and backward could save on each chip, by the roofline model."""
    lines = [table_header(["chip", "model", "products, ms", *(f"gain at r = {rank}" for rank in RANKS)])]
    for chip, (bandwidth, tflops) in CHIPS.items():
        for model, (d, f) in list(MODELS.items())[1:]:
            products = MLP_PRODUCTS * 2 * tokens * d * f / (EFFICIENCY * tflops * 1e12)
            gains = []
            for rank in RANKS:
                case = Case(d, f, tokens, rank, dtype)
                theirs, ours = (
                    count_traffic(case, name).bytes / (bandwidth * 1e9) for name in (THEIRS, OURS)
                )
                if rank <= fused.MAX_RANK:  # each kernel takes the longer of its loop and its memory traffic
                    loop = 4 * tokens * f * rank / (EFFICIENCY / 2 * tflops * 1e12)
                    one_pass = tokens * f * dtype.size / (bandwidth * 1e9)  # over an [N, F] array
                    ours += max(0.0, loop - 3 * one_pass) + max(0.0, loop - 5 * one_pass)
                gains.append(f"{1 - (products + ours) / (products + theirs):.0%}")
            lines.append(f"| {chip} | {model} | {1e3 * products:.1f} | {' | '.join(gains)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
