"""The tasks of the study: prompts with completions, made or read, and how an answer is scored.

wikisql, openbookqa and arc_easy are read from a directory (--data of study.py); `orders` is generated, and
`docstrings` taken from the Python that runs this: the first line of what a function's documentation says, given its
first lines. A generated answer is right if it is the completion, token by token. Greedy decoding gives a completion
exactly when each of its tokens is the most likely one after those before it, so that one forward pass over prompt and
completion decides it. An answer by likelihood is the likeliest of the choices, which differ in one token.
"""

import ast
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from study_models import sources

from nalora_mlx.data.batches import sorted_batches
from nalora_mlx.data.tokenization import Example
from nalora_mlx.models.output_head import OutputHead

SPLITS = ("train", "valid", "test")
MOST_TOKENS = 256  # rows that are longer are left out
FROM_FILES = {"wikisql": " ", "openbookqa": "\n", "arc_easy": "\n"}  # what stands before the completion
FORGETTING = (
    "asyncio",
    "email",
)  # packages on whose text forgetting is measured; docstrings come from the others
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Tokenized splits; of a task with choices, per row the position and the tokens of them, the right one first."""

    splits: dict[str, list[Example]]
    choices: dict[str, list[tuple[int, list[int]]]]


@cache
def rows(name: str, data: str) -> dict[str, list[Row]]:
    """The splits of a task, rows of prompt and completion, with `choices` (the right one first) where there are any."""
    if name in FROM_FILES:
        splits = {}
        for split in SPLITS:
            lines = (Path(data) / name / f"{split}.jsonl").read_text().splitlines()
            splits[split] = [_from_file(json.loads(line), FROM_FILES[name]) for line in lines]
        return splits
    return GENERATED[name]()


def _from_file(row: Row, separator: str) -> Row:
    answer = row.get("answer")
    prompt, completion = row["prompt"].rstrip(" "), separator + row["completion"]
    if answer is None:
        return {"prompt": prompt, "completion": completion}
    labels = row["prompt"].rsplit("Answer format: ", 1)[1].split("/")
    others = [completion.replace(answer, label) for label in labels if label != answer]
    return {"prompt": prompt, "completion": completion, "choices": [completion, *others]}


# --- orders -------------------------------------------------------------------------------------------------

DRINKS = ("flat white", "latte", "espresso", "mocha", "green tea", "hot chocolate", "cold brew", "chai")
SIZES = {"small": ("small", "little"), "medium": ("medium", "regular"), "large": ("large", "big")}
EXTRAS = ("oat milk", "cinnamon", "extra foam", "honey", "vanilla", "ice")
NAMES = ("Ada", "Bo", "Chen", "Dara", "Emil", "Fatima", "Grace", "Hugo", "Ines", "Juma", "Kira", "Leo")
NUMBERS = ("a", "two", "three", "four", "five")


def orders() -> dict[str, list[Row]]:
    """A spoken order -> one JSON object; 1200, 150 and 300 different ones."""
    rng = random.Random("orders")
    found: dict[str, Row] = {}
    while len(found) < 1650:
        row = _order(rng)
        found.setdefault(row["prompt"], row)
    made = list(found.values())
    return {"train": made[:1200], "valid": made[1200:1350], "test": made[1350:]}


def _order(rng: random.Random) -> Row:
    count, drink, size = rng.randrange(1, 6), rng.choice(DRINKS), rng.choice(list(SIZES))
    extras = rng.sample(EXTRAS, rng.randrange(3))
    name, takes_away = rng.choice(NAMES), rng.random() < 0.5
    said = f"{NUMBERS[count - 1]} {rng.choice(SIZES[size])} {drink}{'s' if count > 1 else ''}"
    if extras:
        said += " with " + " and ".join(extras)
    place = rng.choice(("to go", "to take away")) if takes_away else rng.choice(("to have here", "for here"))
    parts = [said, place]
    rng.shuffle(parts)
    form = rng.choice(
        ("{0}, {1}, for {2}", "for {2}: {0}, {1}", "{2} would like {0}, {1}", "{0}, please, {1}. {2}")
    )
    text = form.format(*parts, name)
    answer = {
        "drink": drink,
        "size": size,
        "count": count,
        "extras": sorted(extras),
        "name": name,
        "to_go": takes_away,
    }
    return {"prompt": f"Order: {text}\nJSON:", "completion": " " + json.dumps(answer)}


# --- docstrings ---------------------------------------------------------------------------------------------


def docstrings() -> dict[str, list[Row]]:
    """The head of a function -> the first line of its docstring; other packages for validation and test."""
    train = _documented([text for _, text in sources(held_out=False)])
    held_out = [text for path, text in sources(held_out=True) if not set(path.parts) & set(FORGETTING)]
    others = _documented(held_out)
    rng = random.Random("docstrings")
    rng.shuffle(train)
    rng.shuffle(others)
    return {"train": train[:2000], "valid": others[:150], "test": others[150:450]}


def _documented(texts: list[str]) -> list[Row]:
    found: dict[str, Row] = {}
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            line = (ast.get_docstring(node) or "").split("\n", 1)[0].strip()
            if 15 <= len(line) <= 90:
                prompt = f'def {node.name}({ast.unparse(node.args)}):\n    """'
                found.setdefault(prompt, {"prompt": prompt, "completion": f'{line}"""'})
    return list(found.values())


GENERATED = {"orders": orders, "docstrings": docstrings}


# --- tokens and scores --------------------------------------------------------------------------------------


def tokenized(name: str, data: str, tokenizer: Any, most: dict[str, int]) -> Task:
    """A task in tokens: prompt, completion, end; the completion and the end are supervised.

    Args:
        name: of the task.
        data: directory of the tasks that are read.
        tokenizer: mlx-lm's.
        most: rows per split.
    """
    splits: dict[str, list[Example]] = {}
    choices: dict[str, list[tuple[int, list[int]]]] = {}
    end = tokenizer.eos_token_id

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    for split, some in rows(name, data).items():
        splits[split], choices[split] = [], []
        for i, row in enumerate(some):
            prompt, completion = encode(row["prompt"]), encode(row["completion"])
            tokens = np.array([*prompt, *completion, end], np.int32)
            if len(tokens) > MOST_TOKENS or len(splits[split]) == most[split]:
                continue
            splits[split].append(Example(tokens, np.arange(len(tokens)) >= len(prompt), f"{split} {i}"))
            if "choices" in row:
                choices[split].append(_differing([encode(c) for c in row["choices"]], len(prompt)))
    return Task(splits, choices)


def _differing(completions: list[list[int]], start: int) -> tuple[int, list[int]]:
    columns = [i for i, tokens in enumerate(zip(*completions, strict=True)) if len(set(tokens)) > 1]
    if len(columns) != 1:
        raise ValueError("choices must differ in one token")
    return start + columns[0], [c[columns[0]] for c in completions]


def score(
    head: OutputHead, examples: Sequence[Example], choices: Sequence[tuple[int, list[int]]]
) -> dict[str, float]:
    """Mean loss over supervised tokens, share of completions generated exactly, and of right choices.

    Args:
        head: the model, see `nalora_mlx.models.output_head`.
        examples: rows.
        choices: per row the position of the token in which choices differ, and the tokens; empty without choices.
    """
    loss, tokens, exact, chosen = 0.0, 0, 0, 0
    for batch in sorted_batches(examples, 16):
        length = max(examples[row].inputs for row in batch)
        inputs = np.zeros((len(batch), length), np.int32)
        for i, row in enumerate(batch):
            inputs[i, : examples[row].inputs] = examples[row].tokens[:-1]
        where = [(i, np.flatnonzero(examples[row].loss_mask) - 1) for i, row in enumerate(batch)]
        flat = np.concatenate([i * length + at for i, at in where])
        targets = np.concatenate([examples[row].tokens[examples[row].loss_mask] for row in batch])
        hidden = head.hidden(mx.array(inputs))
        logits = head.logits(hidden.reshape(-1, hidden.shape[-1])[mx.array(flat)]).astype(mx.float32)
        losses = (
            mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, mx.array(targets)[:, None], -1)[:, 0]
        )
        hits = np.array(mx.argmax(logits, axis=-1)) == targets
        loss, tokens = loss + float(losses.sum()), tokens + len(targets)
        start = 0
        for row, (_, at) in zip(batch, where, strict=True):
            exact += bool(hits[start : start + len(at)].all())
            if choices:
                position, candidates = choices[row]
                values = logits[start + int(np.flatnonzero(at == position - 1)[0])][mx.array(candidates)]
                chosen += int(mx.argmax(values)) == 0
            start += len(at)
    found = {"loss": loss / tokens, "exact": exact / len(examples)}
    return found | {"accuracy": chosen / len(examples)} if choices else found
