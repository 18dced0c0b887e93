"""The gated residual against what mlx-lm's LoRA does on the same inputs: time, peak memory, bytes and FLOPs.

    python scripts/benchmark_kernel.py --tokens 512 --output kernel.jsonl    # on whatever device MLX has
    python scripts/benchmark_kernel.py --mlp --models qwen2.5-0.5b --ranks 16   # with the MLP's own products around it
    python scripts/benchmark_kernel.py --count                               # bytes alone, from the compiled graphs
    python scripts/benchmark_kernel.py --predict                             # the table of docs/kernels.md

A measurement is one compiled forward and backward, from the frozen projections' outputs to all gradients, as in a
training step of either. Contenders take turns in one process, so that a machine whose speed drifts slows all alike;
medians are printed, and the medians of the ratios pair by pair. Bytes are counted, for a GPU and without the
frozen products, on any machine.
Raw results go to the output as JSON lines.
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
from compiled_graph import Stub, Traffic, traffic
from mlx_lm.models.activations import swiglu

from nalora_mlx.activations import ACTIVATIONS
from nalora_mlx.elementary import vectorized
from nalora_mlx.kernels import fused, gated_residual, selfcheck
from nalora_mlx.kernels.backend import backend
from nalora_mlx.kernels.fused import Variant
from nalora_mlx.kernels.low_rank import LowRank, project

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
CHIPS = {  # memory bandwidth in GB/s, as Apple gives it; float32 TFLOP/s, an estimate: cores x 128 lanes x 2 x clock
    "M1": (68, 2.6),
    "M2 Max": (400, 13.6),
    "M4": (120, 4.3),
    "M4 Max": (546, 17.0),
}
PRODUCTS = 6  # of [N, D] with [D, F]: gate, up, down, and the gradients of their inputs
REACHED = 0.7  # share of the arithmetic that a large product reaches, and half that in the kernel's own loop
THEIRS, OURS, OBSERVED, ROUTED = "mlx-lm", "ours", "ours, with statistics", "ours, with route"
CONTENDERS = (THEIRS, OURS, OBSERVED, ROUTED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS)[1:])
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, and float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mlp", action="store_true", help="with the MLP's own products before and after")
    parser.add_argument("--output", type=Path, help="file for the raw results, appended to")
    parser.add_argument("--count", action="store_true", help="count bytes instead, for all dtypes")
    parser.add_argument(
        "--predict", action="store_true", help="print what to expect of Apple's chips instead"
    )
    args = parser.parse_args()
    if args.predict:
        print(prediction())
        return 0
    if args.count:
        print(count_table(args))
        return 0
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    print(
        f"{args.tokens} tokens, {dtype}, {backend()} on {mx.default_device()}; each pair is mlx-lm / ours\n"
    )
    heads = ["model", "rank", "forward, ms", "backward, ms", "both", "with statistics", "with route"]
    print(table_head([*heads, "peak, MB", "ratio", "GFLOP", "GB moved on a GPU", "ratio"]))
    for model in args.models:
        for rank in args.ranks:
            case = Case(*MODELS[model], args.tokens, rank, DTYPES[dtype], args.mlp)
            results = measure(case, args.repeats)
            print(row(model, rank, results), flush=True)
            if args.output:
                with args.output.open("a") as file:
                    for result in results:
                        about = {"model": model, "rank": rank, "tokens": args.tokens, "dtype": dtype}
                        file.write(json.dumps({**about, "mlp": args.mlp, **result}) + "\n")
    return 0


# --- what is compared ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement."""

    dims: int
    features: int
    tokens: int
    rank: int
    dtype: mx.Dtype
    mlp: bool = False

    def arrays(self, name: str) -> list[mx.array]:
        """Everything that is differentiated, then the gradient of the output; not evaluated.

        Both keep A and B in float32. mlx-lm's products with them are of float32, and so is what these make; ours are
        of `low_dtype`.
        """
        n, d, f, r = self.tokens, self.dims, self.features, self.rank
        keys = iter(mx.random.split(mx.random.key(0), 8))

        def normal(*shape: int, dtype: mx.Dtype = mx.float32, size: float = 0.02) -> mx.array:
            return (size * mx.random.normal(shape, key=next(keys))).astype(dtype)

        if self.mlp:
            adapters = [normal(*s) for s in ((d, r), (r, f), (d, r), (r, f), (f, r), (r, d))]
            return [normal(n, d, dtype=self.dtype, size=1), *adapters, normal(n, d, dtype=self.dtype, size=1)]
        low = mx.float32 if name == THEIRS else self.low_dtype
        bases = [normal(n, f, dtype=self.dtype, size=1) for _ in range(2)]
        lows = [normal(n, r, dtype=low, size=1) for _ in range(2)]
        bs = [normal(r, f) for _ in range(2)]
        return [*bases, *lows, *bs, normal(n, f, dtype=self.dtype, size=1)]

    @property
    def low_dtype(self) -> mx.Dtype:
        """The dtype of our low-rank products."""
        return mx.float32 if self.dtype == mx.float16 else self.dtype

    def flops(self, name: str) -> int:
        """Of all products, forward and backward; the elementwise work is small beside it."""
        n, d, f, r = self.tokens, self.dims, self.features, self.rank
        once = 4 * n * f * r  # gate and up
        again = once if name != THEIRS and r <= fused.MAX_RANK else 0  # the kernel makes z and u twice
        routed = once // 2 if name == ROUTED else 0
        around = PRODUCTS * 2 * n * d * f + 3 * (4 * n * d * r + 2 * n * (f + d) * r) if self.mlp else 0
        return 3 * once + again + routed + around

    def forward(self, name: str) -> Callable[..., tuple[mx.array, dict[str, mx.array]]]:
        """One contender's function of its arrays."""
        row = ACTIVATIONS["silu"]
        observed = name == OBSERVED
        variant = Variant(row, "separate", "derivative", row.boundaries) if observed else Variant(row)
        weights = mx.ones((self.tokens,))
        route = (mx.arange(self.features) % 2).astype(mx.float32) if name == ROUTED else None
        mx.eval(weights, *([] if route is None else [route]))
        selfcheck.prepare(variant, self.dtype, self.low_dtype, self.rank)

        def product(gate: LowRank, up: LowRank) -> tuple[mx.array, dict[str, mx.array]]:
            return gated_residual.gated_residual(variant, (gate, up), weights)

        def ours(base: mx.array, low: mx.array, b: mx.array, route: mx.array | None = None) -> LowRank:
            routed = None if route is None else low
            return LowRank(base, SCALE, low, b.astype(self.low_dtype), routed, route)

        def added(base: mx.array, low: mx.array, b: mx.array) -> mx.array:
            return base + (SCALE * (low @ b)).astype(base.dtype)

        if not self.mlp:
            if name == THEIRS:
                return lambda g0, u0, ag, au, bg, bu: (swiglu(added(g0, ag, bg), added(u0, au, bu)), {})
            return lambda g0, u0, ag, au, bg, bu: product(ours(g0, ag, bg, route), ours(u0, au, bu))

        shapes = [(self.features, self.dims)] * 2 + [(self.dims, self.features)]
        frozen = [(0.02 * mx.random.normal(shape)).astype(self.dtype) for shape in shapes]
        mx.eval(frozen)  # or they would be drawn again in every step
        gate, up, down = ((lambda x, w=w: x @ w.T) for w in frozen)

        def theirs(linear: Callable[[mx.array], mx.array], x: mx.array, a: mx.array, b: mx.array) -> mx.array:
            return added(linear(x), x @ a, b)

        def both(
            linear: Callable[[mx.array], mx.array],
            x: mx.array,
            a: mx.array,
            b: mx.array,
            route: mx.array | None = None,
        ) -> LowRank:
            if self.low_dtype != self.dtype:
                return ours(linear(x), x.astype(self.low_dtype) @ a, b, route)
            return ours(*project(linear, x, a.astype(self.dtype)), b, route)

        if name == THEIRS:
            return lambda x, ag, bg, au, bu, ad, bd: (
                theirs(down, swiglu(theirs(gate, x, ag, bg), theirs(up, x, au, bu)), ad, bd),
                {},
            )

        def whole(x, ag, bg, au, bu, ad, bd):  # type: ignore[no-untyped-def]
            h, seen = product(both(gate, x, ag, bg, route), both(up, x, au, bu))
            return both(down, h, ad, bd).output(), seen

        return whole


# --- what is measured ---------------------------------------------------------------------------------------


def measure(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Time and peak memory of each contender in turn, `repeats` times, with its bytes and FLOPs."""
    runs = {}
    for name in CONTENDERS:
        arrays = case.arrays(name)
        mx.eval(arrays)
        forward = case.forward(name)

        def loss(*a, forward=forward):  # type: ignore[no-untyped-def]
            y, seen = forward(*a[:-1])
            return (y * a[-1]).astype(mx.float32).sum(), seen

        step = mx.compile(mx.value_and_grad(loss, argnums=list(range(len(arrays) - 1))))
        once = mx.compile(forward)
        # As in a training step of ours; mlx-lm has no such form.
        with nullcontext() if name == THEIRS else vectorized():
            mx.eval(step(*arrays), once(*arrays[:-1]))
        moved = counted(case, name)
        about = {"name": name, "flops": case.flops(name), "bytes": moved.bytes, "kept": moved.kept}
        runs[name] = about, once, step, arrays
    results = []
    for repeat in range(repeats):
        for about, once, step, arrays in runs.values():
            forward_ms, _ = timed(lambda: once(*arrays[:-1]))  # noqa: B023
            ms, peak = timed(lambda: step(*arrays))  # noqa: B023
            times = {"ms": ms, "forward_ms": forward_ms, "backward_ms": ms - forward_ms}
            results.append({**about, "repeat": repeat, **times, "peak_mb": peak / 1e6})
    return results


def timed(work: Callable[[], Any]) -> tuple[float, int]:
    """Milliseconds that some work takes, and its peak of memory above what was there before."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    mx.eval(work())
    return 1e3 * (time.perf_counter() - start), mx.get_peak_memory() - before


def table_head(heads: list[str]) -> str:
    return f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}"


def row(model: str, rank: int, results: list[dict[str, Any]]) -> str:
    """A line of the table: medians, and medians of the ratios to mlx-lm, pair by pair."""

    def of(name: str, key: str) -> list[float]:
        return [r[key] for r in results if r["name"] == name]

    def ratio(key: str, name: str = OURS) -> str:
        found = statistics.median(a / b for a, b in zip(of(name, key), of(THEIRS, key), strict=True))
        return f"{found:.2f}"

    def pair(key: str, unit: float = 1, digits: int = 0) -> str:
        both = (statistics.median(of(name, key)) / unit for name in (THEIRS, OURS))
        return " / ".join(f"{one:.{digits}f}" for one in both)

    cells = [model, str(rank), pair("forward_ms", digits=1), pair("backward_ms", digits=1)]
    cells += [ratio("ms", name) for name in (OURS, OBSERVED, ROUTED)]
    cells += [pair("peak_mb"), ratio("peak_mb"), pair("flops", 1e9, 1), pair("bytes", 1e9, 2), ratio("bytes")]
    return f"| {' | '.join(cells)} |"


# --- what is counted ----------------------------------------------------------------------------------------


def counted(case: Case, name: str) -> Traffic:
    """What a contender's gated residual reads and writes on a GPU, forward and backward, by the graph MLX compiles."""
    case = replace(case, mlp=False)
    arrays, stub = case.arrays(name), Stub()
    chosen, kernel = gated_residual.backend_for, fused._kernel
    gated_residual.backend_for, fused._kernel = lambda *_: "metal", lambda *_: stub  # no GPU is needed
    try:
        forward = case.forward(name)

        def both(*a):  # type: ignore[no-untyped-def]
            seen = {}

            def h(*of):  # type: ignore[no-untyped-def]
                y, found = forward(*of)
                seen.update(found)
                return y

            (y,), gradients = mx.vjp(h, list(a[:-1]), [a[-1]])
            return y, *seen.values(), *gradients

        outputs = mx.compile(both)(*arrays)
    finally:
        gated_residual.backend_for, fused._kernel = chosen, kernel
    return traffic(outputs, arrays, stub, (case.tokens, case.features), case.dtype)


def count_table(args: argparse.Namespace) -> str:
    """Megabytes that each contender moves, the ratio to mlx-lm's, and how many arrays of [N, F] it keeps."""
    lines = [table_head(["model", "dtype", "rank", "contender", "MB moved", "of mlx-lm's", "[N, F] kept"])]
    for model in args.models:
        for dtype in DTYPES if args.dtype is None else [args.dtype]:
            for rank in args.ranks:
                case = Case(*MODELS[model], args.tokens, rank, DTYPES[dtype], args.mlp)
                found = {name: counted(case, name) for name in CONTENDERS}
                for name, moved in found.items():
                    share = f"{moved.bytes / found[THEIRS].bytes:.2f}"
                    cells = [
                        model,
                        dtype,
                        str(rank),
                        name,
                        f"{moved.bytes / 1e6:.0f}",
                        share,
                        str(moved.kept),
                    ]
                    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def prediction(tokens: int = 2048, dtype: mx.Dtype = mx.bfloat16) -> str:
    """What the roofline of each chip allows an MLP, forward and backward, to gain by rank."""
    lines = [table_head(["chip", "model", "products, ms", *(f"gain at r = {rank}" for rank in RANKS)])]
    for chip, (bandwidth, tflops) in CHIPS.items():
        for model, (d, f) in list(MODELS.items())[1:]:
            products = PRODUCTS * 2 * tokens * d * f / (REACHED * tflops * 1e12)
            gains = []
            for rank in RANKS:
                case = Case(d, f, tokens, rank, dtype)
                theirs, ours = (counted(case, name).bytes / (bandwidth * 1e9) for name in (THEIRS, OURS))
                if rank <= fused.MAX_RANK:  # the loop of either kernel, or the bytes, whichever takes longer
                    loop = 4 * tokens * f * rank / (REACHED / 2 * tflops * 1e12)
                    a_pass = tokens * f * dtype.size / (bandwidth * 1e9)
                    ours += max(0.0, loop - 3 * a_pass) + max(0.0, loop - 5 * a_pass)
                gains.append(f"{1 - (products + ours) / (products + theirs):.0%}")
            lines.append(f"| {chip} | {model} | {1e3 * products:.1f} | {' | '.join(gains)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
