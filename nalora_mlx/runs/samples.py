"""samples.json: a few prompts from a run's data, and how its base model and its tuned model answer them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.checks import RunData
from nalora_mlx.data.rows.formats import Row

SAMPLES_FILE = "samples.json"
FORMAT = 1
SAMPLES = 3  # prompts of a run
CANDIDATES = 100  # rows to choose from, so that a large data set costs no time
SHORT = 1000  # characters of a row up to which all rows are equally good
LONGEST = 8000  # characters of a row from which on it is not used
OPENING = 12  # words of a text that make a prompt
CONTINUATION = 60  # words after them to compare with
WORD_LENGTH = 5  # characters that count as a word in a text without spaces
TYPES: dict[str, type | tuple[type, ...]] = {
    "source": str,
    "prompt": str,
    "expected": (str, type(None)),
    "before": (str, type(None)),
    "after": str,
    "complete": bool,
}


# --- prompts ------------------------------------------------------------------------------------------------


def choose_prompts(data: RunData) -> list[dict[str, Any]]:
    """Return up to three different prompts of the validation set, or of the training set if there is none.

    They are from the first rows; long rows are used only if there are too few short ones. Rows whose prompt is not
    plain text are not used.

    Returns:
        Prompts with these keys:
        source: the row's file and line, without directories.
        split: "valid" or "train".
        messages: the chat before its last answer, with "tools" and "chat_template_kwargs" if the row has them.
        text: instead of messages, the first words of a text.
        prompt: the same as a person reads it.
        expected: the row's answer, or None.
    """
    rows: list[Row] = []
    for split in ("valid", "train"):
        rows = [row for dataset in data.sources for row in dataset.get(split, ())]
        if rows:
            break
    found: dict[str, dict[str, Any]] = {}
    for row in rows[:CANDIDATES]:
        asked = _asked(row)
        if asked is not None:
            prompt = {"source": row.source.rsplit("/", 1)[-1], "split": split, **asked}
            found.setdefault(json.dumps([asked.get("messages"), asked["prompt"]], default=str), prompt)
    fitting = {key: prompt for key, prompt in found.items() if _length(prompt) <= LONGEST}
    # Sorting is stable: short rows stay in their order.
    return sorted(fitting.values(), key=lambda prompt: max(_length(prompt), SHORT))[:SAMPLES]


def _asked(row: Row) -> dict[str, Any] | None:
    """Return what a row asks a model and what it expects, or None if that is not plain text."""
    if row.images:
        return None
    if not row.messages:
        words = re.findall(r"\S+\s*", row.text)
        if len(words) < OPENING and len(row.text) > OPENING * WORD_LENGTH:  # a script without spaces
            words = re.findall(rf"(?s).{{1,{WORD_LENGTH}}}", row.text.strip())
        count = min(OPENING, max(len(words) // 2, 1))
        opening, rest = words[:count], words[count : count + CONTINUATION]
        text = "".join(opening).rstrip()
        return {"text": text, "prompt": text, "expected": "".join(rest).strip() or None} if text else None
    answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    messages = row.messages[: answers[-1]] if answers else row.messages
    if not messages or not all(isinstance(message.get("content"), str) for message in messages):
        return None
    optional = {"tools": row.tools, "chat_template_kwargs": dict(row.template_args)}
    return {
        "messages": messages,
        **{key: value for key, value in optional.items() if value},
        "prompt": readable(messages),
        "expected": _answer(row.messages[answers[-1]]) if answers else None,
    }


def readable(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return a chat as a person reads it: without system messages, and with roles if more than one message is left."""
    turns = [message for message in messages if message["role"] != "system"] or messages
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _answer(message: Mapping[str, Any]) -> str | None:
    """Return an assistant message as text, with the tools it calls."""
    content = message.get("content")
    parts = [content] if isinstance(content, str) and content else []
    parts += [json.dumps(call.get("function", call), default=str) for call in message.get("tool_calls") or ()]
    return "\n".join(parts) or None


def _length(prompt: Mapping[str, Any]) -> int:
    """Return the number of characters of a prompt, its tools and its answer."""
    asked = [prompt.get("messages", prompt["prompt"]), prompt.get("tools", "")]
    return len(json.dumps(asked, default=str)) + len(prompt["expected"] or "")


# --- the file -----------------------------------------------------------------------------------------------


def write_samples_file(directory: Path, samples: Sequence[Mapping[str, Any]], max_tokens: int) -> None:
    """Write the samples of a run, atomically.

    Raises:
        OSError: the disk is full, or the directory is not writable.
    """
    content = {"format": FORMAT, "max_tokens": max_tokens, "samples": list(samples)}
    storage.write_file(directory / SAMPLES_FILE, storage.json_writer(content))


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """Return the samples of a run: prompts as of `choose_prompts`, each with these keys added; [] if there are none.

        before: the base model's answer, or None.
        after: the tuned model's answer.
        complete: whether that answer ended by itself; if not, it was cut.
        before_complete: the same for the base model's answer.

    Raises:
        InputError: the file is damaged, or a newer version of this program wrote it.
    """
    path = directory / SAMPLES_FILE
    if not path.exists():
        return []
    try:
        content = storage.read_json(path)
    except InputError as error:
        raise InputError(f"{error}; remove the file to go on without its answers") from None
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {content.get('format')!r}, and this version reads {FORMAT}; update nalora-mlx"
        )
    samples = content.get("samples")
    if not isinstance(samples, list) or not all(map(_is_sample, samples)):
        raise InputError(f"{path} is damaged; remove it")
    return samples


def _is_sample(content: Any) -> bool:
    return isinstance(content, dict) and all(
        name in content and isinstance(content[name], kind) for name, kind in TYPES.items()
    )
