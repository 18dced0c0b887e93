"""Ask a model the held-out questions of an example, and compare the answers of several models.

python scripts/demo_questions.py ask --example examples/bakery --model demo/model --output demo/before.json
python scripts/demo_questions.py compare --example examples/bakery demo/before.json demo/after.json
python scripts/demo_questions.py same demo/after.json demo/fused.json

An answer is in the trained format if the regular expression in the example's format.txt matches all of it. Its lines
are compared with those of the completion in test.jsonl to count how many are correct.
"""

import argparse
import json
import re
import sys
from pathlib import Path

MAX_TOKENS = 64  # the longest completion in the data has 43


def read_rows(example: Path, count: int) -> list[dict]:
    lines = (example / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def ask(args: argparse.Namespace) -> int:
    """Write a model's answers to a JSON file."""
    from mlx_lm import batch_generate, load

    # mlx-lm itself loads the adapter: a trained adapter is a plain LoRA that every mlx-lm program reads.
    model, tokenizer = load(args.model, adapter_path=args.adapter_path)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        for row in read_rows(args.example, args.questions)
    ]
    answers = batch_generate(model, tokenizer, prompts, max_tokens=MAX_TOKENS).texts  # greedy decoding
    partial = args.output.with_name(args.output.name + ".part")
    partial.write_text(json.dumps([answer.strip() for answer in answers], indent=1), encoding="utf-8")
    partial.replace(args.output)
    return 0


def read_answers(paths: list[Path]) -> list[list[str]]:
    """Read answer files, cut to the shortest one. The small demo answers only the first questions."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    total = min(map(len, files))
    return [answers[:total] for answers in files]


def compare(args: argparse.Namespace) -> int:
    """Print the answers side by side. Return 1 if fewer than --enough are in the trained format."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    pattern = re.compile((args.example / "format.txt").read_text(encoding="utf-8").strip())
    before, after = read_answers(args.answers)
    total = len(after)
    rows = read_rows(args.example, total)

    def count_matches(answers: list[str]) -> int:
        return sum(bool(pattern.fullmatch(answer)) for answer in answers)

    def cell(answer: str) -> Text:
        if pattern.fullmatch(answer):
            return Text(answer, style="green")
        text = re.sub(r"\s+", " ", answer)
        return Text(text[:150] + " ..." if len(text) > 150 else text, style="red")

    console = Console()
    # The default width outside a terminal, 80 columns, is too narrow for this table.
    console = console if console.is_terminal else Console(width=120)
    table = Table(show_lines=True, title=f"{total} held-out messages (green: answer in the trained format)")
    table.add_column("message")
    table.add_column("before", ratio=1)
    table.add_column("after", ratio=1)
    for row, old, new in zip(rows, before, after, strict=True):
        table.add_row(Text(row["prompt"]), cell(old), cell(new))
    console.print(table)

    lines = correct = 0
    for row, answer in zip(rows, after, strict=True):
        expected = row["completion"].split("\n")
        lines += len(expected)
        correct += sum(a == b for a, b in zip(expected, answer.split("\n"), strict=False))
    matches = count_matches(after)
    print(f"in the trained format: {count_matches(before)} of {total} before, {matches} of {total} after")
    print(f"correct lines after training: {correct} of {lines}")
    if matches < args.enough:
        print(f"error: fewer than {args.enough} answers are in the trained format", file=sys.stderr)
        return 1
    return 0


def same(args: argparse.Namespace) -> int:
    """Count the answers that are equal in two files. Return 1 with --exact if any differ."""
    after, fused = read_answers(args.answers)
    equal = sum(a == b for a, b in zip(after, fused, strict=True))
    print(f"merged model: {equal} of {len(after)} answers identical to those of the base model with adapter")
    if args.exact and equal < len(after):
        print("error: the merged model's answers differ", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("ask", help="write a model's answers to a file")
    add.add_argument("--example", type=Path, required=True, help="directory with test.jsonl and format.txt")
    add.add_argument("--model", required=True)
    add.add_argument("--adapter-path")
    add.add_argument("--questions", type=int, default=10, help="number of questions (default: 10)")
    add.add_argument("--output", type=Path, required=True)
    add.set_defaults(command=ask)
    add = commands.add_parser("compare", help="show answers before and after training side by side")
    add.add_argument("--example", type=Path, required=True, help="directory with test.jsonl and format.txt")
    add.add_argument("--enough", type=int, default=0, help="fail if fewer answers are in the trained format")
    add.add_argument("answers", type=Path, nargs=2, metavar="ANSWERS", help="before and after training")
    add.set_defaults(command=compare)
    add = commands.add_parser("same", help="count identical answers of the adapter and the merged model")
    add.add_argument("--exact", action="store_true", help="fail if any answer differs (for float32 models)")
    add.add_argument("answers", type=Path, nargs=2, metavar="ANSWERS", help="with adapter and merged")
    add.set_defaults(command=same)
    args = parser.parse_args()
    return args.command(args)


if __name__ == "__main__":
    sys.exit(main())
