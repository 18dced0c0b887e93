"""Rows of training data: formats and per-token loss masks.

A row becomes tokens with a mask that says which of them are supervised (predicted and scored). Formats and their
keys are those of mlx_lm.lora: text, prompt/completion, chat messages with tools.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nalora_mlx.errors import InputError
from nalora_mlx.strict import reject_unknown

SPLITS = ("train", "valid", "test")
HUB_KEYS = (  # of a record of hf_dataset, as in mlx-lm
    "path",
    "config",
    *(f"{split}_split" for split in SPLITS),
    *(f"{part}_feature" for part in ("prompt", "completion", "chat", "text")),
)


@dataclass(frozen=True)
class Features:
    """The keys under which a row holds its parts, and whether prompts are masked."""

    prompt: str = "prompt"
    completion: str = "completion"
    chat: str = "messages"
    text: str = "text"
    mask_prompt: bool = False


@dataclass(frozen=True)
class Example:
    """One tokenized row: token ids [n], supervised flags [n] (never the first), and where it came from."""

    tokens: np.ndarray
    supervised: np.ndarray
    source: str

    @property
    def inputs(self) -> int:
        """How many tokens the model reads: all but the last, which is only a target."""
        return len(self.tokens) - 1


@dataclass
class Split:
    """The tokenized rows of one split and what was left out or noticed on the way."""

    examples: list[Example]
    notices: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.examples)


# --- reading ------------------------------------------------------------------------------------------------


def read_jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read (source, row) pairs from a .jsonl file; blank lines are skipped.

    Raises:
        InputError: names the first bad line as file:line, with what is wrong.
    """
    rows = []
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                source = f"{path}:{number}"
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{source}: not UTF-8 at byte {error.start}; save the file as UTF-8"
                    ) from None
                if not line:
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    detail = getattr(error, "msg", "nested too deeply")
                    column = getattr(error, "colno", 1)
                    raise InputError(
                        f"{source}: not valid JSON (column {column}: {detail}); each line must be one object"
                    ) from None
                if not isinstance(row, dict):
                    raise InputError(
                        f"{source}: holds a {type(row).__name__}; each line must be one JSON object"
                    )
                rows.append((source, row))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    return rows


def load_local(directory: Path, names: Sequence[str]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Read {name}.jsonl for each name that exists in a directory; an absent file gives no rows."""
    return {
        name: read_jsonl(path) if (path := directory / f"{name}.jsonl").exists() else [] for name in names
    }


def load_hub(identifier: str, names: Sequence[str]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Load the splits of a Hugging Face dataset that is already in a supported format.

    Raises:
        InputError: the name is neither a directory nor a dataset that can be loaded.
    """
    datasets = _import_datasets(f"--data {identifier}: no such directory")
    try:
        loaded = datasets.load_dataset(identifier)
    except Exception as error:
        raise InputError(
            f"--data {identifier}: no such directory, and not loadable from the Hugging Face Hub ({_first_line(error)})"
        ) from None
    return {name: _numbered(f"{identifier}[{name}]", loaded.get(name, [])) for name in names}


def load_hub_entry(
    entry: dict[str, Any], names: Sequence[str]
) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Load one record of `hf_dataset`: path, config, and {train,valid,test}_split as mlx_lm.lora has them.

    Raises:
        InputError: a missing path or split, or a dataset that cannot be loaded.
    """
    reject_unknown(entry, HUB_KEYS, "hf_dataset")
    if "path" not in entry:
        raise InputError("hf_dataset: each record needs a 'path'")
    datasets = _import_datasets(f"hf_dataset {entry['path']}")
    splits = {
        "train": entry.get("train_split", "train[:80%]"),
        "valid": entry.get("valid_split", "train[-10%:]"),
        "test": entry.get("test_split"),
    }
    rows = {}
    for name in names:
        if splits[name] is None:
            raise InputError(f"hf_dataset {entry['path']}: give {name}_split")
        try:
            loaded = datasets.load_dataset(entry["path"], split=splits[name], **entry.get("config", {}))
        except Exception as error:
            raise InputError(
                f"hf_dataset {entry['path']}: cannot load {splits[name]} ({_first_line(error)})"
            ) from None
        rows[name] = _numbered(f"{entry['path']}[{splits[name]}]", loaded)
    return rows


def _import_datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{what}; to load it from the Hugging Face Hub, pip install datasets") from None
    return datasets


def _numbered(name: str, rows: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{name}:{number}", dict(row)) for number, row in enumerate(rows, 1)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- tokenizing ---------------------------------------------------------------------------------------------


def tokenize_split(
    rows: Sequence[tuple[str, dict[str, Any]]],
    tokenizer: Any,
    features: Features,
    max_seq_length: int,
    name: str = "data",
) -> Split:
    """Tokenize rows, cut those that are too long, drop those without a supervised token; say so in notices.

    Args:
        rows: (source, row) pairs.
        tokenizer: mlx-lm's tokenizer wrapper.
        features: keys and mask.
        max_seq_length: most tokens that a row may keep.
        name: of the split, for messages.

    Raises:
        InputError: a row of no known format, or of wrong types (with its source), or no row that is left.
    """
    split = Split([])
    cut, longest, empty, unstable = 0, 0, [], 0
    for source, row in rows:
        tokens, supervised, stable = _tokenize(row, tokenizer, features, source)
        unstable += not stable
        longest = max(longest, len(tokens))
        if len(tokens) > max_seq_length:
            cut += 1
            tokens, supervised = tokens[:max_seq_length], supervised[:max_seq_length]
        flags = np.array(supervised, dtype=bool)
        flags[:1] = False  # nothing predicts the first token
        if not flags.any():
            empty.append(source)
            continue
        split.examples.append(Example(np.array(tokens, dtype=np.int32), flags, source))
    if rows and not split.examples:
        raise InputError(
            f"{name}: no row has a supervised token within {max_seq_length} tokens "
            f"(first: {empty[0]}, longest row {longest}); raise --max-seq-length or shorten the prompts"
        )
    if cut:
        split.notices.append(
            f"{name}: {cut} of {len(rows)} rows are longer than {max_seq_length} tokens and were cut "
            f"(longest {longest}); raise --max-seq-length to keep them whole"
        )
    if empty:
        split.notices.append(
            f"{name}: left out {len(empty)} of {len(rows)} rows, which have no supervised token (first: {empty[0]})"
        )
    if unstable:
        split.notices.append(
            f"{name}: the chat template rewrites earlier turns in {unstable} of {len(rows)} rows; "
            "those train on their last assistant turn only"
        )
    return split


def _tokenize(
    row: dict[str, Any], tokenizer: Any, features: Features, source: str
) -> tuple[list[int], list[bool], bool]:
    """Tokens, supervised flags, and whether every assistant turn could be found in the rendered chat."""
    if features.prompt in row and features.completion in row:
        for key in (features.prompt, features.completion):
            if not isinstance(row[key], str):
                raise InputError(f"{source}: {key!r} is a {type(row[key]).__name__}; it must be a text")
        messages = [
            {"role": "user", "content": row[features.prompt]},
            {"role": "assistant", "content": row[features.completion]},
        ]
        return _tokenize_chat(messages, row.get("tools"), tokenizer, features.mask_prompt, source)
    if features.chat in row:
        messages = row[features.chat]
        if (
            not isinstance(messages, list)
            or not messages
            or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
        ):
            raise InputError(
                f"{source}: {features.chat!r} must be a list of messages with 'role' and 'content'"
            )
        return _tokenize_chat(messages, row.get("tools"), tokenizer, features.mask_prompt, source)
    if features.text in row:
        if features.mask_prompt:
            raise InputError(
                f"{source}: --mask-prompt needs prompt/completion or chat rows; this one is a text"
            )
        if not isinstance(row[features.text], str):
            raise InputError(
                f"{source}: {features.text!r} is a {type(row[features.text]).__name__}; it must be a text"
            )
        tokens = list(tokenizer.encode(row[features.text]))
        if not tokens or tokens[-1] != tokenizer.eos_token_id:
            tokens.append(tokenizer.eos_token_id)
        return tokens, [True] * len(tokens), True
    raise InputError(
        f"{source}: no known format; give {features.prompt!r} and {features.completion!r}, "
        f"or {features.chat!r}, or {features.text!r} (found {', '.join(map(repr, row)) or 'nothing'})"
    )


def _tokenize_chat(
    messages: list[dict[str, Any]], tools: Any, tokenizer: Any, mask_prompt: bool, source: str
) -> tuple[list[int], list[bool], bool]:
    def render(part: list[dict[str, Any]], generation_prompt: bool) -> list[int]:
        try:
            return list(
                tokenizer.apply_chat_template(
                    part, tools=tools, add_generation_prompt=generation_prompt, return_dict=False
                )
            )
        except Exception as error:
            raise InputError(
                f"{source}: the model's chat template refuses this row ({_first_line(error)})"
            ) from None

    if not getattr(tokenizer, "has_chat_template", True):
        raise InputError(
            f"{source}: the model has no chat template; give 'text' rows, or take an instruct model"
        )
    tokens = render(messages, False)
    if not mask_prompt:
        return tokens, [True] * len(tokens), True
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans, stable = [], True
    for turn in turns:
        start, end, found = _turn_span(messages, turn, tokens, render)
        stable = stable and found
        spans.append((start, end))
    if not stable:
        # The template changes what came before (it drops earlier reasoning, say): only the last turn is itself.
        spans = spans[-1:]
    supervised = [False] * len(tokens)
    for start, end in spans:
        supervised[start:end] = [True] * (end - start)
    return tokens, supervised, stable


def _turn_span(
    messages: list[dict[str, Any]], turn: int, tokens: list[int], render: Callable[..., list[int]]
) -> tuple[int, int, bool]:
    """Where an assistant turn begins and ends in the rendered chat, and whether all before it is unchanged there.

    It begins where the generation prompt ends, or where that departs from the chat: some templates open a thought
    in the prompt that the finished turn does not have.
    """
    history = render(messages[:turn], False) if turn else []
    prompt = render(messages[:turn], True) if turn else []
    through = tokens if turn == len(messages) - 1 else render(messages[: turn + 1], False)
    stable = tokens[: len(history)] == history and tokens[: len(through)] == through
    start, end = _common(prompt, tokens), _common(through, tokens)
    if start < len(history):  # the beginning of the chat is another one: lengths are all there is to go by
        start = min(len(prompt), len(tokens))
    if end < start:
        end = min(len(through), len(tokens))
    return start, max(start, end), stable


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common beginning."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
