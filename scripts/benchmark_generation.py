"""Compare the generation speed of a fused model with that of its base model.

    python scripts/benchmark_generation.py --model demo/model --fused demo/fused

A merged adapter adds no computation, so the speeds should be equal. Both models run in one process and take turns, with
a fixed number of generated tokens. The script prints the median speeds and the median of the pairwise ratios.
"""

import argparse
import statistics
import sys
import time
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of the base model")
    parser.add_argument("--fused", required=True, help="directory that nalora fuse wrote")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate (default: 64)")
    parser.add_argument("--repeats", type=int, default=15, help="measurements per model (default: 15)")
    args = parser.parse_args()
    from mlx_lm import load

    models = {name: load(path)[0] for name, path in (("base", args.model), ("fused", args.fused))}
    rates: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(args.repeats + 1):
        for name in sorted(models, reverse=repeat % 2 == 1):
            rate = tokens_per_second(models[name], args.tokens)
            if repeat:  # the first one is warm-up
                rates[name].append(rate)
    ratio = statistics.median(fused / base for base, fused in zip(rates["base"], rates["fused"], strict=True))
    for name, speeds in rates.items():
        median = statistics.median(speeds)
        print(f"{name:<6}{median:8.1f} tokens per second, {min(speeds):.1f} to {max(speeds):.1f}")
    print(f"ratio, fused / base: {ratio:.3f}")
    return 0


def tokens_per_second(model: Any, count: int) -> float:
    """Measure greedy generation after a fixed prompt, ignoring end-of-sequence tokens."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    start = time.perf_counter()
    for _ in generate_step(mx.arange(1, 17), model, max_tokens=count):
        pass
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
