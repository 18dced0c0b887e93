"""Compare the speed of answers in batches with that of one answer at a time, or a fused model's with its base model's.

    python scripts/benchmark_generation.py --model demo/model --data examples/bakery/test.jsonl
    python scripts/benchmark_generation.py --model demo/model --fused demo/fused

With --data, the same prompts are answered in batches and one at a time, in turns. The script prints a line of JSON for
each measurement, and one with the medians, the median of the pairwise ratios and how many answers are the same. Tokens
per second are those of the answers; the time includes reading the prompts.

With --fused, both models generate a fixed number of tokens, in turns. A merged adapter adds no computation, so the
speeds should be equal. The script prints the median speeds and the median of the pairwise ratios.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of the base model")
    compared = parser.add_mutually_exclusive_group(required=True)
    compared.add_argument("--data", type=Path, help="file of rows with prompts, to be answered")
    compared.add_argument("--fused", help="directory that nalora fuse wrote")
    parser.add_argument("--batch-size", type=int, default=8, help="answers at a time (default: 8)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer, at most (default: 64)")
    parser.add_argument("--repeats", type=int, help="measurements of each (default: 3; with --fused, 15)")
    args = parser.parse_args()
    if args.data:
        compare_batches(args.model, args.data, args.batch_size, args.tokens, args.repeats or 3)
    else:
        compare_fused(args.model, args.fused, args.tokens, args.repeats or 15)
    return 0


def compare_batches(model_path: str, data: Path, batch_size: int, tokens: int, repeats: int) -> None:
    """Print the speeds of answers in batches and of one answer at a time, as lines of JSON."""
    from mlx_lm import load

    from nalora_mlx.models.conversation import render_prompt

    model, tokenizer = load(model_path)[:2]
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}]) for row in rows]
    answer_prompts(model, tokenizer, prompts[:2], 2, 2)  # warm-up
    sizes = (batch_size, 1)
    found: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    answers: dict[int, list[Any]] = {}
    for repeat in range(repeats):
        for size in sizes if repeat % 2 == 0 else reversed(sizes):
            result, answers[size] = answer_prompts(model, tokenizer, prompts, tokens, size)
            found[size].append(result)
            print(json.dumps({"repeat": repeat, "batch_size": size, **result}), flush=True)
    speeds = {size: [result["tokens_per_second"] for result in results] for size, results in found.items()}
    ratios = [batched / alone for batched, alone in zip(speeds[batch_size], speeds[1], strict=True)]
    same = sum(one == other for one, other in zip(answers[batch_size], answers[1], strict=True))
    summary = {
        "prompts": len(prompts),
        "same_answers": same,
        **{f"tokens_per_second_by_{size}": round(statistics.median(speeds[size]), 1) for size in sizes},
        "ratio": round(statistics.median(ratios), 2),
        **{f"peak_gb_by_{size}": max(result["peak_gb"] for result in found[size]) for size in sizes},
    }
    print(json.dumps(summary))


def answer_prompts(
    model: Any, tokenizer: Any, prompts: list[list[int]], tokens: int, size: int
) -> tuple[dict[str, Any], list[Any]]:
    """Answer prompts, `size` at a time; return the speed and the peak memory, and the answers."""
    import mlx.core as mx

    from nalora_mlx.evaluate.generation import Batching, generate_answers

    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    answers = generate_answers(model, tokenizer, prompts, tokens, size, batching=Batching())
    seconds = time.perf_counter() - start
    count = sum(answer.tokens for answer in answers)
    result = {
        "tokens": count,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(count / seconds, 1),
        "peak_gb": round(mx.get_peak_memory() / 1e9, 3),
    }
    return result, answers


def compare_fused(model_path: str, fused_path: str, tokens: int, repeats: int) -> None:
    """Print the speeds of a base model and of a fused one."""
    from mlx_lm import load

    models = {name: load(path)[0] for name, path in (("base", model_path), ("fused", fused_path))}
    rates: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name in sorted(models, reverse=repeat % 2 == 1):
            rate = tokens_per_second(models[name], tokens)
            if repeat:  # the first one is warm-up
                rates[name].append(rate)
    ratio = statistics.median(fused / base for base, fused in zip(rates["base"], rates["fused"], strict=True))
    for name, speeds in rates.items():
        median = statistics.median(speeds)
        print(f"{name:<6}{median:8.1f} tokens per second, {min(speeds):.1f} to {max(speeds):.1f}")
    print(f"ratio, fused / base: {ratio:.3f}")


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
