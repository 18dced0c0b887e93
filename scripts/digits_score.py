"""Ask a model about the held-out pictures of the digits example, and compare the answers before and after training.

python scripts/digits_score.py ask --data demo/digits/data/sum --model demo/digits/model --output before.json
python scripts/digits_score.py compare --data demo/digits/data/sum before.json after.json

An answer is right if it is exactly that of test.jsonl.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

MAX_TOKENS = 16  # the longest right answer has 9, with the end of the message
BATCH = 25


def read_rows(data: Path, split: str = "test") -> list[dict[str, Any]]:
    lines = (data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def expected(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"]


def answer_batch(model: Any, processor: Any, rows: list[dict[str, Any]], data: Path) -> list[str]:
    """Return greedy answers. The prompts must have the same number of tokens.

    This is mlx-vlm's own model and processor; only its `generate`, which takes one row at a time, is too slow.
    """
    import mlx.core as mx
    from mlx_vlm.models.cache import make_prompt_cache
    from PIL import Image

    tokenizer = processor.tokenizer
    chats = [row["messages"][:-1] for row in rows]
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    images = [
        [Image.open(data / part["image"]).convert("RGB") for part in chat[-1]["content"] if "image" in part]
        for chat in chats
    ]
    inputs = processor(text=texts, images=images)
    tokens, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values")
    embeddings = model.get_input_embeddings(tokens, pixels, **inputs).inputs_embeds
    cache = make_prompt_cache(model.language_model)
    answers: list[list[int]] = [[] for _ in rows]
    ended = [False] * len(rows)
    logits = model.language_model(tokens, inputs_embeds=embeddings, cache=cache).logits
    for _ in range(MAX_TOKENS):
        best = mx.argmax(logits[:, -1], axis=-1)
        for i, token in enumerate(best.tolist()):
            ended[i] = ended[i] or token in model.config.eos_token_id
            if not ended[i]:
                answers[i].append(token)
        if all(ended):
            break
        logits = model.language_model(best[:, None], cache=cache).logits
    return [tokenizer.decode(answer).strip() for answer in answers]


def batches(rows: list[Any], size: int) -> Iterator[list[Any]]:
    remaining = iter(rows)
    while batch := list(islice(remaining, size)):
        yield batch


def ask(args: argparse.Namespace) -> int:
    """Write a model's answers to a JSON file."""
    # mlx-vlm itself loads the adapter: a trained adapter is a plain LoRA.
    from mlx_vlm import load

    model, processor = load(args.model, adapter_path=args.adapter_path)
    rows = read_rows(args.data)[: args.questions]
    answers = [
        text for batch in batches(rows, BATCH) for text in answer_batch(model, processor, batch, args.data)
    ]
    partial = args.output.with_name(args.output.name + ".part")
    partial.write_text(json.dumps(answers, indent=1), encoding="utf-8")
    partial.replace(args.output)
    return 0


def accuracy(answers: list[str], rows: list[dict[str, Any]]) -> float:
    """Return the share of answers that are exactly right."""
    return sum(a == expected(row) for a, row in zip(answers, rows, strict=True)) / len(rows)


def compare(args: argparse.Namespace) -> int:
    """Print some answers and the accuracies. Return 1 if the second is below --enough."""
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in args.answers)
    rows = read_rows(args.data)[: len(before)]
    print(f"{'pictures':32}  {'expected':11}  {'before':40}  after")
    for row, old, new in list(zip(rows, before, after, strict=True))[: args.show]:
        names = [Path(part["image"]).name for part in row["messages"][0]["content"] if "image" in part]
        print(f"{' '.join(names):32}  {expected(row):11}  {' '.join(old.split())[:40]:40}  {new}")
    result = accuracy(after, rows)
    print(
        f"exactly right on {len(rows)} held-out rows: {accuracy(before, rows):.1%} before, {result:.1%} after"
    )
    if result < args.enough:
        print(f"error: less than {args.enough:.0%} are right after training", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("ask", help="write a model's answers to a file")
    add.add_argument("--data", type=Path, required=True, help="directory with test.jsonl")
    add.add_argument("--model", required=True)
    add.add_argument("--adapter-path")
    add.add_argument("--questions", type=int, default=200, help="number of rows (default: 200)")
    add.add_argument("--output", type=Path, required=True)
    add.set_defaults(command=ask)
    add = commands.add_parser("compare", help="show answers and accuracy before and after training")
    add.add_argument("--data", type=Path, required=True, help="directory with test.jsonl")
    add.add_argument("--show", type=int, default=8, help="number of answers to print (default: 8)")
    add.add_argument("--enough", type=float, default=0, help="fail if the accuracy after training is lower")
    add.add_argument("answers", type=Path, nargs=2, metavar="ANSWERS", help="before and after training")
    add.set_defaults(command=compare)
    args = parser.parse_args()
    return args.command(args)


if __name__ == "__main__":
    sys.exit(main())
