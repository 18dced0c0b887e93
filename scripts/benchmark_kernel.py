"""The gated residual against what mlx-lm's LoRA does on the same inputs: time, peak memory, bytes and FLOPs.

    python scripts/benchmark_kernel.py --tokens 512 --output kernel.jsonl    # time, on whatever device MLX has
    python scripts/benchmark_kernel.py --mlp --models qwen2.5-0.5b --ranks 16   # with the MLP's own products around it
    python scripts/benchmark_kernel.py --count                               # passes over [N, F], from the graphs
    python scripts/benchmark_kernel.py --predict                             # the table of docs/kernels.md

A measurement is one compiled forward and backward, from the frozen projections' outputs to all gradients. Ours and
theirs take turns in one process, so that a machine whose speed drifts slows both alike; medians are printed, and the
median of the ratios pair by pair. Raw results go to the output as JSON lines.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.activations import swiglu

from nalora_mlx.activations import ACTIVATIONS
from nalora_mlx.kernels import fused, selfcheck
from nalora_mlx.kernels.backend import backend
from nalora_mlx.kernels.fused import Variant
from nalora_mlx.kernels.gated_residual import gated_residual
from nalora_mlx.kernels.low_rank import LowRank, project

SCALE = 20.0
MODELS = {  # hidden size D, intermediate size F
    "qwen2.5-0.5b": (896, 4864),
    "qwen3-0.6b": (1024, 3072),
    "llama-3.2-1b": (2048, 8192),
    "llama-3.2-3b": (3072, 8192),
    "qwen3-8b": (4096, 12288),
}
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
CHIPS = {  # memory bandwidth in GB/s, float32 arithmetic in TFLOP/s, as published
    "M1": (68, 2.6),
    "M1 Max": (400, 10.4),
    "M2": (100, 3.6),
    "M2 Max": (400, 13.6),
    "M3": (100, 3.6),
    "M3 Max": (400, 14.2),
    "M4": (120, 4.3),
    "M4 Pro": (273, 8.5),
    "M4 Max": (546, 17.0),
}
PRODUCTS = 6  # of [N, D] with [D, F]: gate, up, down, and the gradients of their inputs
REACHED = 0.7  # share of the arithmetic that a large product reaches, and half that in the kernel's own loop


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS)[1:])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, and float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mlp", action="store_true", help="with the MLP's own products before and after")
    parser.add_argument("--output", type=Path, help="file for the raw results, appended to")
    parser.add_argument("--count", action="store_true", help="count passes over [N, F] instead")
    parser.add_argument(
        "--predict", action="store_true", help="print what to expect of Apple's chips instead"
    )
    args = parser.parse_args()
    if args.count:
        print("\n".join(f"{name}: {passes}" for name, passes in counts().items()))
        return 0
    if args.predict:
        print(prediction(counts()))
        return 0
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    print(f"{args.tokens} tokens, {dtype}, {backend()} on {mx.default_device()}\n")
    print(
        "| model | rank | mlx-lm, ms | ours, ms | ratio | with statistics | mlx-lm, MB | ours, MB | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for model in args.models:
        for rank in args.ranks:
            results = measure(Case(*MODELS[model], args.tokens, rank, DTYPES[dtype], args.mlp), args.repeats)
            print(row(model, rank, results), flush=True)
            if args.output:
                with args.output.open("a") as file:
                    for result in results:
                        about = {
                            "model": model,
                            "rank": rank,
                            "tokens": args.tokens,
                            "dtype": dtype,
                            "mlp": args.mlp,
                        }
                        file.write(json.dumps({**about, **result}) + "\n")
    return 0


# --- what is measured ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement, and its inputs."""

    dims: int
    features: int
    tokens: int
    rank: int
    dtype: mx.Dtype
    mlp: bool

    def arrays(self) -> list[mx.array]:
        """Everything that is differentiated, then the gradient of the output."""
        n, d, f, r = self.tokens, self.dims, self.features, self.rank

        def normal(*shape: int, size: float = 1.0) -> mx.array:
            return (size * mx.random.normal(shape)).astype(self.dtype)

        if self.mlp:
            adapters = [(d, r), (r, f), (d, r), (r, f), (f, r), (r, d)]
            return [normal(n, d), *(normal(*shape, size=0.02) for shape in adapters), normal(n, d)]
        shapes = [(n, f), (n, f), (n, r), (n, r), (r, f), (r, f), (n, f)]
        return [normal(*shape, size=1.0 if shape[0] == n else 0.02) for shape in shapes]

    def flops(self) -> int:
        """Of the low-rank products, forward and backward; the elementwise work is small beside it."""
        once = 4 * self.tokens * self.features * self.rank  # gate and up
        return 3 * once + (once if self.rank <= fused.MAX_RANK else 0)  # the kernel makes z and u twice

    def functions(self) -> dict[str, Callable[..., mx.array]]:
        """Forward of each contender."""
        variant = Variant(ACTIVATIONS["silu"])
        observed = Variant(ACTIVATIONS["silu"], "separate", "derivative", ACTIVATIONS["silu"].boundaries)
        weights = mx.ones((self.tokens,))
        low_dtype = mx.float32 if self.dtype == mx.float16 else self.dtype
        for one in (variant, observed):
            selfcheck.prepare(one, self.dtype, low_dtype, self.rank)
        if not self.mlp:

            def theirs(g0, u0, ag, au, bg, bu):
                z = g0 + (SCALE * (ag @ bg)).astype(g0.dtype)
                u = u0 + (SCALE * (au @ bu)).astype(u0.dtype)
                return swiglu(z, u)

            def ours(variant, g0, u0, ag, au, bg, bu):
                projections = LowRank(g0, SCALE, ag, bg), LowRank(u0, SCALE, au, bu)
                return gated_residual(variant, projections, weights)

        else:
            shapes = [(self.features, self.dims)] * 2 + [(self.dims, self.features)]
            frozen = [(0.02 * mx.random.normal(shape)).astype(self.dtype) for shape in shapes]
            mx.eval(frozen)
            gate, up, down = ((lambda x, w=w: x @ w.T) for w in frozen)

            def lora(linear, x, a, b):
                y = linear(x)
                return y + (SCALE * ((x @ a) @ b)).astype(y.dtype)

            def theirs(x, ag, bg, au, bu, ad, bd):
                return lora(down, swiglu(lora(gate, x, ag, bg), lora(up, x, au, bu)), ad, bd)

            def ours(variant, x, ag, bg, au, bu, ad, bd):
                projections = (
                    LowRank(*_with_scale(project(gate, x, ag)), bg),
                    LowRank(*_with_scale(project(up, x, au)), bu),
                )
                h, seen = gated_residual(variant, projections, weights)
                return LowRank(*_with_scale(project(down, h, ad)), bd).output(), seen

        return {
            "mlx-lm": lambda *a: (theirs(*a), {}),
            "ours": lambda *a: ours(variant, *a),
            "ours, with statistics": lambda *a: ours(observed, *a),
        }


def _with_scale(base_and_low: tuple[mx.array, mx.array]) -> tuple[mx.array, float, mx.array]:
    base, low = base_and_low
    return base, SCALE, low


def measure(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Time and peak memory of each contender in turn, `repeats` times."""
    arrays = case.arrays()
    mx.eval(arrays)
    steps = {}
    for name, forward in case.functions().items():

        def loss(*a, forward=forward):
            y, seen = forward(*a[:-1])
            return (y * a[-1]).astype(mx.float32).sum(), seen

        steps[name] = mx.compile(mx.value_and_grad(loss, argnums=list(range(len(arrays) - 1))))
        mx.eval(steps[name](*arrays))
    results = []
    for repeat in range(repeats):
        for name, step in steps.items():
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            start = time.perf_counter()
            mx.eval(step(*arrays))
            seconds = time.perf_counter() - start
            peak = mx.get_peak_memory() - before
            results.append(
                {
                    "name": name,
                    "repeat": repeat,
                    "ms": 1e3 * seconds,
                    "peak_mb": peak / 1e6,
                    "flops": case.flops(),
                }
            )
    return results


def row(model: str, rank: int, results: list[dict[str, Any]]) -> str:
    """A line of the table: medians, and medians of the ratios to mlx-lm, pair by pair."""

    def of(name: str, key: str) -> list[float]:
        return [r[key] for r in results if r["name"] == name]

    def ratio(name: str, key: str) -> float:
        return statistics.median(a / b for a, b in zip(of(name, key), of("mlx-lm", key), strict=True))

    times = [f"{statistics.median(of(name, 'ms')):.1f}" for name in ("mlx-lm", "ours")]
    times += [f"{ratio(name, 'ms'):.2f}" for name in ("ours", "ours, with statistics")]
    memory = [f"{statistics.median(of(name, 'peak_mb')):.0f}" for name in ("mlx-lm", "ours")]
    cells = [model, str(rank), *times, *memory, f"{ratio('ours', 'peak_mb'):.2f}"]
    return f"| {' | '.join(cells)} |"


# --- what is counted ----------------------------------------------------------------------------------------


def counts() -> dict[str, int]:
    """Passes over arrays of [N, F], forward and backward, the frozen products left out.

    mlx-lm's are counted on the graph that MLX compiles of them, ours on the loads and stores of the kernels; both have
    the four products that make dA and dB, which read dz and du twice each.
    """
    found = {"mlx-lm, compiled": _passes()}
    loads = {d: fused.source(f"metal/{d}.metal").count("load4<T>(") for d in ("forward", "backward")}
    stores = {d: fused.source(f"metal/{d}.metal").count("store4<T>(") for d in ("forward", "backward")}
    kernels = (
        sum(loads.values()) - 1 + sum(stores.values())
    )  # one load is of z0, when misalignment is measured
    found["ours, product in the kernel"] = kernels + 4
    found["ours, product outside"] = kernels + 4 + 4  # z and u: g0 and u0 are read, and these written
    return found


def _passes() -> int:
    n, f, r = 64, 96, 4
    shapes = {
        "g0": (n, f),
        "u0": (n, f),
        "ag": (n, r),
        "au": (n, r),
        "bg": (r, f),
        "bu": (r, f),
        "dh": (n, f),
    }
    arrays = {name: mx.random.normal(shape).astype(mx.bfloat16) for name, shape in shapes.items()}
    mx.eval(arrays)
    case = Case(1, f, n, r, mx.bfloat16, False)
    theirs = case.functions()["mlx-lm"]

    def both(*a):
        (h,), gradients = mx.vjp(lambda *a: theirs(*a)[0], list(a[:-1]), [a[-1]])
        return h, *gradients

    return count_passes(mx.compile(both)(*arrays.values()), arrays, shapes, (n, f))


def count_passes(
    outputs: Any, arrays: dict[str, mx.array], shapes: dict[str, tuple[int, ...]], size: Any
) -> int:
    """Reads and writes of arrays of one size in the graph of some outputs, views left out."""
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, *outputs, **arrays)
        text = Path(file.name).read_text()
    names = dict(re.findall(r"\{ (\d+) \[label =\"([^\"]*)\"", text))
    reads: dict[str, list[str]] = {name: [] for name in names}
    writes: dict[str, list[str]] = {name: [] for name in names}
    maker: dict[str, str] = {}
    for a, b in (tuple(x.strip('"') for x in edge) for edge in re.findall(r"^(\S+) -> (\S+)$", text, re.M)):
        if b in names:
            reads[b].append(a)
        else:
            writes[a].append(b)
            maker[b] = a
    known: dict[str, Any] = dict(shapes)

    def shape(array: str) -> Any:
        if array not in known:
            operation = maker.get(array)
            inputs = [shape(a) for a in reads[operation]] if operation else []
            kind = names[operation] if operation else ""
            if kind == "Matmul":
                known[array] = (inputs[0][0], inputs[1][1])
            elif kind == "Transpose":
                known[array] = inputs[0][::-1]
            else:
                known[array] = () if kind in ("Broadcast", "Full") else max(inputs, key=len, default=())
        return known[array]

    total = 0
    for operation, kind in names.items():
        if kind not in ("Broadcast", "Transpose", "Full"):
            total += sum(sorted(shape(a)) == sorted(size) for a in {*reads[operation]})
            total += sum(sorted(shape(a)) == sorted(size) for a in {*writes[operation]})
    return total


def prediction(passes: dict[str, int]) -> str:
    """Milliseconds of one MLP, forward and backward, in a half type, that the roofline of each chip allows."""
    n, size = 2048, 2
    lines = [
        "| chip | model | rank | products | mlx-lm's passes | ours | MLP faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for chip, (bandwidth, tflops) in CHIPS.items():
        for model, rank in (("qwen3-0.6b", 8), ("llama-3.2-1b", 8), ("llama-3.2-1b", 64), ("qwen3-8b", 16)):
            d, f = MODELS[model]
            products = PRODUCTS * 2 * n * d * f / (REACHED * tflops * 1e12)
            a_pass = n * f * size / (bandwidth * 1e9)
            theirs = passes["mlx-lm, compiled"] * a_pass
            inside = rank <= fused.MAX_RANK
            ours = passes["ours, product in the kernel" if inside else "ours, product outside"] * a_pass
            if inside:  # forward 3 passes and backward 5, or the arithmetic of the loop, whichever is longer
                loop = 4 * n * f * rank / (REACHED / 2 * tflops * 1e12)
                ours += max(0.0, loop - 3 * a_pass) + max(0.0, loop - 5 * a_pass)
            gain = 1 - (products + ours) / (products + theirs)
            cells = (f"{1e3 * t:.1f} ms" for t in (products, theirs, ours))
            lines.append(f"| {chip} | {model} | {rank} | {' | '.join(cells)} | {gain:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
