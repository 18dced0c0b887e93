"""Speed of generation with a fused model against its base: what NA-LoRA trains is gone once it is merged.

    python scripts/benchmark_generation.py --model demo/model --fused demo/fused

Both are loaded in one process and answer in turns, with tokens that are forced to be as many; medians, and the median
of the ratios pair by pair.
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
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer (default: 64)")
    parser.add_argument("--repeats", type=int, default=15, help="answers of each (default: 15)")
    args = parser.parse_args()
    from mlx_lm import load

    models = {name: load(path)[0] for name, path in (("base", args.model), ("fused", args.fused))}
    rates: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(args.repeats + 1):
        for name in sorted(models, reverse=repeat % 2 == 1):
            rate = tokens_per_second(models[name], args.tokens)
            if repeat:  # the first is for warming up
                rates[name].append(rate)
    ratio = statistics.median(b / a for a, b in zip(rates["base"], rates["fused"], strict=True))
    for name, found in rates.items():
        print(
            f"{name:<6}{statistics.median(found):8.1f} tokens per second, {min(found):.1f} to {max(found):.1f}"
        )
    print(f"fused over base: {ratio:.3f}")
    return 0


def tokens_per_second(model: Any, count: int) -> float:
    """Generate greedily after a fixed prompt; the end of a sequence ends nothing."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    start = time.perf_counter()
    for _ in generate_step(mx.arange(1, 17), model, max_tokens=count):
        pass
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
