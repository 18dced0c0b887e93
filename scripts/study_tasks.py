"""The tasks of the study and their scores.

Tasks are sets of prompts with completions. wikisql, openbookqa and arc_easy are read from a directory (--data of
study.py). `orders` is generated. `docstrings` comes from the standard library of the running Python: given a function's
signature, complete the first line of its docstring.

Scores:

- loss: mean over the supervised tokens.
- exact: share of rows for which greedy decoding generates the completion. It does so if and only if each token of the
  completion is the most likely one given the tokens before it, so one forward pass is enough.
- accuracy: share of rows for which the most likely of the given choices is correct. Choices differ in one token.
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
from study_models import python_sources

from nalora_mlx.data.batches import sorted_batches
from nalora_mlx.data.tokenization import Example
from nalora_mlx.models.output_head import OutputHead

SPLITS = ("train", "valid", "test")
MAX_TOKENS = 256  # longer rows are left out
FROM_FILES = {"wikisql": " ", "openbookqa": "\n", "arc_easy": "\n"}  # task -> text before the completion
# Held-out packages to measure forgetting on. The validation and test rows of `docstrings` come from the others.
FORGETTING = ("asyncio", "email")
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A tokenized task.

    Attributes:
        splits: rows by split.
        choices: for tasks with choices, the position at which they differ and their tokens there, the correct one
            first, for each row by split.
    """

    splits: dict[str, list[Example]]
    choices: dict[str, list[tuple[int, list[int]]]]


@cache
def rows(name: str, data: str) -> dict[str, list[Row]]:
    """Return a task's rows by split: dicts with prompt, completion and, if any, choices, the correct one first."""
    if name in FROM_FILES:
        splits = {}
        for split in SPLITS:
            lines = (Path(data) / name / f"{split}.jsonl").read_text().splitlines()
            splits[split] = [_row_from_file(json.loads(line), FROM_FILES[name]) for line in lines]
        return splits
    return GENERATED[name]()


def _row_from_file(row: Row, separator: str) -> Row:
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
    """Generate different orders in everyday language, with the order as JSON for the completion."""
    rng = random.Random("orders")
    by_prompt: dict[str, Row] = {}
    while len(by_prompt) < 1650:
        row = _order(rng)
        by_prompt.setdefault(row["prompt"], row)
    generated = list(by_prompt.values())
    return {"train": generated[:1200], "valid": generated[1200:1350], "test": generated[1350:]}


def _order(rng: random.Random) -> Row:
    count, drink, size = rng.randrange(1, 6), rng.choice(DRINKS), rng.choice(list(SIZES))
    extras = rng.sample(EXTRAS, rng.randrange(3))
    name, to_go = rng.choice(NAMES), rng.random() < 0.5
    item = f"{NUMBERS[count - 1]} {rng.choice(SIZES[size])} {drink}{'s' if count > 1 else ''}"
    if extras:
        item += " with " + " and ".join(extras)
    place = rng.choice(("to go", "to take away")) if to_go else rng.choice(("to have here", "for here"))
    parts = [item, place]
    rng.shuffle(parts)
    template = rng.choice(
        ("{0}, {1}, for {2}", "for {2}: {0}, {1}", "{2} would like {0}, {1}", "{0}, please, {1}. {2}")
    )
    text = template.format(*parts, name)
    answer = {
        "drink": drink,
        "size": size,
        "count": count,
        "extras": sorted(extras),
        "name": name,
        "to_go": to_go,
    }
    return {"prompt": f"Order: {text}\nJSON:", "completion": " " + json.dumps(answer)}


# --- docstrings ---------------------------------------------------------------------------------------------


def docstrings() -> dict[str, list[Row]]:
    """Return function signatures with the first line of the docstring. Validation and test use held-out packages."""
    train = _docstring_rows([text for _, text in python_sources(held_out=False)])
    held_out = _docstring_rows(
        [text for path, text in python_sources(held_out=True) if not set(path.parts) & set(FORGETTING)]
    )
    rng = random.Random("docstrings")
    rng.shuffle(train)
    rng.shuffle(held_out)
    return {"train": train[:2000], "valid": held_out[:150], "test": held_out[150:450]}


def _docstring_rows(texts: list[str]) -> list[Row]:
    by_prompt: dict[str, Row] = {}
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            line = (ast.get_docstring(node) or "").split("\n", 1)[0].strip()
            if 15 <= len(line) <= 90:
                prompt = f'def {node.name}({ast.unparse(node.args)}):\n    """'
                by_prompt.setdefault(prompt, {"prompt": prompt, "completion": f'{line}"""'})
    return list(by_prompt.values())


GENERATED = {"orders": orders, "docstrings": docstrings}


# --- tokens and scores --------------------------------------------------------------------------------------


def tokenize_task(name: str, data: str, tokenizer: Any, max_rows: dict[str, int]) -> Task:
    """Tokenize a task: prompt, completion and end-of-sequence token, with the last two supervised.

    Args:
        name: name of the task.
        data: directory of the tasks that are read from files.
        tokenizer: an mlx-lm tokenizer.
        max_rows: maximum number of rows by split.
    """
    splits: dict[str, list[Example]] = {}
    choices: dict[str, list[tuple[int, list[int]]]] = {}

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    for split, split_rows in rows(name, data).items():
        splits[split], choices[split] = [], []
        for i, row in enumerate(split_rows):
            prompt, completion = encode(row["prompt"]), encode(row["completion"])
            tokens = np.array([*prompt, *completion, tokenizer.eos_token_id], np.int32)
            if len(tokens) > MAX_TOKENS or len(splits[split]) == max_rows[split]:
                continue
            splits[split].append(Example(tokens, np.arange(len(tokens)) >= len(prompt), f"{split} {i}"))
            if "choices" in row:
                choices[split].append(differing_tokens([encode(c) for c in row["choices"]], len(prompt)))
    return Task(splits, choices)


def differing_tokens(completions: list[list[int]], start: int) -> tuple[int, list[int]]:
    """Return the position at which the completions differ, counted from `start`, and their tokens there.

    Raises:
        ValueError: If they do not differ in exactly one token.
    """
    columns = [i for i, tokens in enumerate(zip(*completions, strict=True)) if len(set(tokens)) > 1]
    if len(columns) != 1:
        raise ValueError("choices must differ in exactly one token")
    return start + columns[0], [c[columns[0]] for c in completions]


def score(
    head: OutputHead, examples: Sequence[Example], choices: Sequence[tuple[int, list[int]]]
) -> dict[str, float]:
    """Compute the scores of a split: "loss", "exact" and, with choices, "accuracy".

    Args:
        head: the model's output head.
        examples: rows.
        choices: for each row the position at which the choices differ and their tokens there, the correct one first;
            empty for tasks without choices.
    """
    loss, tokens, exact, correct = 0.0, 0, 0, 0
    for batch in sorted_batches(examples, 16):
        length = max(examples[row].inputs for row in batch)
        inputs = np.zeros((len(batch), length), np.int32)
        for i, row in enumerate(batch):
            inputs[i, : examples[row].inputs] = examples[row].tokens[:-1]
        positions = [np.flatnonzero(examples[row].loss_mask) - 1 for row in batch]
        flat = np.concatenate([i * length + at for i, at in enumerate(positions)])
        targets = np.concatenate([examples[row].tokens[examples[row].loss_mask] for row in batch])
        hidden = head.hidden(mx.array(inputs))
        logits = head.logits(hidden.reshape(-1, hidden.shape[-1])[mx.array(flat)]).astype(mx.float32)
        losses = (
            mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, mx.array(targets)[:, None], -1)[:, 0]
        )
        greedy_matches = np.array(mx.argmax(logits, axis=-1)) == targets
        loss, tokens = loss + float(losses.sum()), tokens + len(targets)
        start = 0
        for row, at in zip(batch, positions, strict=True):
            exact += bool(greedy_matches[start : start + len(at)].all())
            if choices:
                position, candidates = choices[row]
                values = logits[start + int(np.flatnonzero(at == position - 1)[0])][mx.array(candidates)]
                correct += int(mx.argmax(values)) == 0
            start += len(at)
    scores = {"loss": loss / tokens, "exact": exact / len(examples)}
    if choices:
        scores["accuracy"] = correct / len(examples)
    return scores
