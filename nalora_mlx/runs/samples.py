"""samples.json: a few prompts from a run's data, and how its base model and its tuned model answer them."""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.checks import RunData
from nalora_mlx.data.images import open_image
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
MOST_IMAGES = 8  # of a prompt; rows with more are not used
SIDE = 160  # pixels of a thumbnail's longer side
MOST_BYTES = 15_000  # of a thumbnail, which base64 makes a third longer
EXACT_BYTES = 4000  # of a thumbnail as PNG; larger ones become JPEG
QUALITIES = (85, 60, 40, 20)  # of JPEG, tried in this order
REFERENCES = "references"  # key of the images of a prompt, which no file holds
_THUMBNAIL = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*")  # nothing that a page would load
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

    They are from the first rows; long rows are used only if there are too few short ones. Of preference rows, the
    expected answer is the chosen one, or one with the label true.

    Returns:
        Prompts with these keys:
        source: the row's file and line, without directories.
        split: "valid" or "train".
        messages: the chat before its last answer, with "tools" and "chat_template_kwargs" if the row has them.
        text: instead of messages, the first words of a text.
        prompt: the same as a person reads it, without images.
        expected: the row's answer, or None.
        images: thumbnails of the images, as data URIs; absent without images.
        references: what `data.images.open_image` reads; absent without images. `saved_prompt` leaves them out.
    """
    rows: list[Row] = []
    for split in ("valid", "train"):
        every = (row for dataset in data.sources for row in dataset.get(split, ()))
        rows = [row for row in every if row.label is not False]  # bad answers are none to expect
        if rows:
            break
    found: dict[str, dict[str, Any]] = {}
    for row in rows[:CANDIDATES]:
        asked = _asked(row)
        if asked is not None:
            prompt = {"source": row.source.rsplit("/", 1)[-1], "split": split, **asked}
            images = [image if isinstance(image, str) else id(image) for image in asked.get(REFERENCES, ())]
            found.setdefault(
                json.dumps([asked.get("messages"), asked["prompt"], images], default=str), prompt
            )
    fitting = [prompt for prompt in found.values() if _length(prompt) <= LONGEST]
    # Sorting is stable: short rows stay in their order.
    fitting.sort(key=lambda prompt: max(_length(prompt), SHORT))
    return list(islice(filter(None, map(_with_thumbnails, fitting)), SAMPLES))


def saved_prompt(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """Return a prompt without what names or holds the user's files."""
    return {key: value for key, value in prompt.items() if key != REFERENCES}


def _with_thumbnails(prompt: dict[str, Any]) -> dict[str, Any] | None:
    """Return a prompt with thumbnails of its images; None if one of them cannot be read."""
    if REFERENCES not in prompt:
        return prompt
    try:
        return prompt | {"images": [thumbnail(image, prompt["source"]) for image in prompt[REFERENCES]]}
    except InputError:  # what is wrong with it, the checks of the data say
        return None


def thumbnail(reference: Any, where: str) -> str:
    """Return a small copy of an image as a data URI.

    Raises:
        InputError: the image cannot be read; `where` begins the message.
    """
    image = open_image(reference, where)
    image.thumbnail((SIDE, SIDE))
    kind, data = "png", _encoded(image, "PNG", optimize=True)
    for quality in QUALITIES:
        if len(data) <= (EXACT_BYTES if kind == "png" else MOST_BYTES):
            break
        kind, data = "jpeg", _encoded(image, "JPEG", quality=quality)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _encoded(image: Any, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def _asked(row: Row) -> dict[str, Any] | None:
    """Return what a row asks a model and what it expects, or None if it asks nothing or about too many images."""
    if not row.messages:
        words = re.findall(r"\S+\s*", row.text)
        if len(words) < OPENING and len(row.text) > OPENING * WORD_LENGTH:  # a script without spaces
            words = re.findall(rf"(?s).{{1,{WORD_LENGTH}}}", row.text.strip())
        count = min(OPENING, max(len(words) // 2, 1))
        opening, rest = words[:count], words[count : count + CONTINUATION]
        text = "".join(opening).rstrip()
        return {"text": text, "prompt": text, "expected": "".join(rest).strip() or None} if text else None
    answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    if row.rejected is not None:
        answers = [row.answer_start]
    messages = row.messages[: answers[-1]] if answers else row.messages
    count = sum(_is_image(part) for message in messages for part in _parts(message))
    if not messages or count > MOST_IMAGES:
        return None
    optional = {
        "tools": row.tools,
        "chat_template_kwargs": dict(row.template_args),
        REFERENCES: list(row.images[:count]),
    }
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
        return _text(turns[0])
    return "\n".join(f"{turn['role']}: {_text(turn)}" for turn in turns)


def _parts(message: Mapping[str, Any]) -> list[Any]:
    """Return the content of a message as a list of parts."""
    content = message.get("content") or ""
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _is_image(part: Any) -> bool:
    return bool(part["type"] == "image")


def _text(message: Mapping[str, Any]) -> str:
    """Return the text of a message, without its images; "(image)" if there is nothing else."""
    parts = _parts(message)
    text = "".join(part["text"] for part in parts if not _is_image(part))
    return "(image)" if not text and any(map(_is_image, parts)) else text


def _answer(message: Mapping[str, Any]) -> str | None:
    """Return an assistant message as text, with the tools it calls."""
    text = _text(message)
    parts = [text] if text else []
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
    if not isinstance(content, dict):
        return False
    images = content.get("images", [])
    return all(name in content and isinstance(content[name], kind) for name, kind in TYPES.items()) and (
        isinstance(images, list) and all(map(_is_thumbnail, images))
    )


def _is_thumbnail(value: Any) -> bool:
    return isinstance(value, str) and _THUMBNAIL.fullmatch(value) is not None
