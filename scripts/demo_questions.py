"""Ask a model the held-out questions of an example, and show side by side what several models answered.

python scripts/demo_questions.py ask --example examples/bakery --model demo/model --output demo/before.json
python scripts/demo_questions.py compare --example examples/bakery demo/before.json demo/after.json
python scripts/demo_questions.py same demo/after.json demo/fused.json

An answer counts when it matches the regular expression in the example's format.txt, from its first character to
its last. How much of it is also right is counted by lines, against the completion in test.jsonl.
"""

import argparse
import json
import re
import sys
from pathlib import Path

MAX_TOKENS = 64  # the longest completion of the data set has 43


def read_rows(example: Path, count: int) -> list[dict]:
    lines = (example / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def ask(args: argparse.Namespace) -> int:
    from mlx_lm import batch_generate, load

    # The adapter is loaded by mlx-lm itself: after training it is a plain LoRA that any mlx-lm program reads.
    model, tokenizer = load(args.model, adapter_path=args.adapter_path)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        for row in read_rows(args.example, args.questions)
    ]
    answers = batch_generate(model, tokenizer, prompts, max_tokens=MAX_TOKENS).texts  # greedy
    partial = args.output.with_name(args.output.name + ".part")
    partial.write_text(json.dumps([a.strip() for a in answers], indent=1), encoding="utf-8")
    partial.replace(args.output)
    return 0


def read_answers(paths: list[Path]) -> list[list[str]]:
    """As many of each: a smaller cut of the demo asks fewer questions, the first ones."""
    answers = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    total = min(map(len, answers))
    return [a[:total] for a in answers]


def compare(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    pattern = re.compile((args.example / "format.txt").read_text(encoding="utf-8").strip())
    before, after = read_answers(args.answers)
    total = len(after)
    rows = read_rows(args.example, total)

    def count(answers: list[str]) -> int:
        return sum(bool(pattern.fullmatch(a)) for a in answers)

    def cell(answer: str) -> Text:
        good = bool(pattern.fullmatch(answer))
        text = answer if good else re.sub(r"\s+", " ", answer)
        if not good and len(text) > 150:
            text = text[:150] + " ..."
        return Text(text, style="green" if good else "red")

    console = Console()
    # A pipe has no width of its own, and 80 columns are narrow for three of them.
    console = console if console.is_terminal else Console(width=120)
    table = Table(show_lines=True, title=f"{len(rows)} held-out messages; green: in the trained format")
    table.add_column("message")
    table.add_column("before", ratio=1)
    table.add_column("after", ratio=1)
    for row, old, new in zip(rows, before, after, strict=True):
        table.add_row(Text(row["prompt"]), cell(old), cell(new))
    console.print(table)

    expected = [row["completion"].split("\n") for row in rows]
    lines = sum(len(e) for e in expected)
    right = sum(
        x == y for e, a in zip(expected, after, strict=True) for x, y in zip(e, a.split("\n"), strict=False)
    )
    print(f"in the trained format: {count(before)} of {total} before, {count(after)} of {total} after")
    print(f"lines that are also right, word for word, after: {right} of {lines}")
    if count(after) < args.enough:
        print(f"demo: fewer than {args.enough} answers are in the format", file=sys.stderr)
        return 1
    return 0


def same(args: argparse.Namespace) -> int:
    after, fused = read_answers(args.answers)
    equal = sum(x == y for x, y in zip(after, fused, strict=True))
    print(
        f"merged model: {equal} of {len(after)} answers the same as those of the base model with its adapter"
    )
    if args.exact and equal < len(after):
        print("demo: the merged model answers differently", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("ask", help="answer the questions with a model")
    add.add_argument("--example", type=Path, required=True, help="directory with test.jsonl and format.txt")
    add.add_argument("--model", required=True)
    add.add_argument("--adapter-path")
    add.add_argument("--questions", type=int, default=10, help="how many (default: 10)")
    add.add_argument("--output", type=Path, required=True)
    add.set_defaults(job=ask)
    add = commands.add_parser("compare", help="show the answers and count them")
    add.add_argument("--example", type=Path, required=True, help="directory with test.jsonl and format.txt")
    add.add_argument("--enough", type=int, default=0, help="fail below this many answers in the format")
    add.add_argument("answers", type=Path, nargs=2, metavar="ANSWERS", help="before, after")
    add.set_defaults(job=compare)
    add = commands.add_parser(
        "same", help="count the answers of a merged model that are those of the adapter"
    )
    add.add_argument("--exact", action="store_true", help="fail if one differs (float32)")
    add.add_argument("answers", type=Path, nargs=2, metavar="ANSWERS", help="after, fused")
    add.set_defaults(job=same)
    args = parser.parse_args()
    return args.job(args)


if __name__ == "__main__":
    sys.exit(main())
