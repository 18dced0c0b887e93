"""Images of a row: in parts of its messages, or beside them."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nalora_mlx.core.errors import InputError, counted
from nalora_mlx.data.image_references import array_image, is_data_uri
from nalora_mlx.data.rows.cells import check_unicode, is_blank, parsed_cell

Message = dict[str, Any]
MARKER = "<image>"
# Keys under which image parts and images of Arrow, OpenAI and Anthropic hold an image, from the outside in.
_BASE64 = ("base64", "data")
_REFERENCES = ("image", "image_url", "source", "bytes", "url", "path", *_BASE64)


def read_content(content: Any, number: int, images: list[Any]) -> str | list[dict[str, Any]]:
    """Return the content of a message as a string; as a list of parts only if there are images among them.

    The images go to `images`, with None for a part that names none.

    Raises:
        InputError: a part is neither text nor image.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"the 'content' of message {number} must be a string, not {type(content).__name__}")
    parts = [_read_part(part, number, images) for part in content]
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _read_part(part: Any, number: int, images: list[Any]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise InputError(f"the 'content' of message {number} has a part that is a {type(part).__name__}")
    kind = part.get("type") or next((key for key in ("text", "image") if key in part), None)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InputError(f"the 'content' of message {number} has a text part without a 'text' string")
        return {"type": "text", "text": part["text"]}
    if isinstance(kind, str) and kind.startswith("image"):
        images.append(_reference(part))
        return {"type": "image"}
    raise InputError(
        f"the 'content' of message {number} has a part of type {kind!r}; parts must be of type 'text' or 'image'"
    )


def read_images(value: Any) -> list[Any]:
    """Return the images under the key "images" or "image": paths, data URIs, bytes, or images of Pillow.

    Raises:
        InputError: something is no image.
    """
    value = parsed_cell(value)
    if is_blank(value):
        return []
    found = [_reference(item) for item in (value if isinstance(value, list | tuple) else [value])]
    if any(image is None for image in found):
        raise InputError("one of the images is null or empty; give its path, or remove it")
    return found


def _reference(value: Any) -> Any:
    """Return an image without its wrapper, such as {"url": ...} or {"bytes": ..., "path": ...}; None if it is blank."""
    if isinstance(value, Mapping):
        key = next((key for key in _REFERENCES if not is_blank(value.get(key))), None)
        value = None if key is None else value[key]
        if key in _BASE64 and isinstance(value, str) and not is_data_uri(value):
            return f"data:image;base64,{value}"
        return _reference(value)
    if is_blank(value):
        return None
    if isinstance(value, np.ndarray):
        return array_image(value)
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, os.PathLike):
        value = os.fsdecode(value)
    pillow = sys.modules.get("PIL.Image")
    if isinstance(value, str | bytes) or (pillow is not None and isinstance(value, pillow.Image)):
        check_unicode(value, "the path of an image")
        return value
    raise InputError(
        f"an image must be a path, a data URI, bytes, an image of Pillow or an array, not {type(value).__name__}"
    )


def _with_images_first(content: str | list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the parts of a message with image parts put before them."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [*({"type": "image"} for _ in range(count)), *parts]


def place_images(
    messages: list[Message], inline: Sequence[Any], images: list[Any]
) -> tuple[list[Message], tuple[Any, ...]]:
    """Assign the images beside messages to their image parts; return the messages and the images in their order.

    1. Image parts that name no image (None in `inline`) take the images in order.
    2. If there are no image parts, every "<image>" in a message becomes one.
    3. If there are none of these either, the images come first in the first user message, or in the first message.

    Raises:
        InputError: there are not as many images as parts.
    """
    if images and not inline:
        if any(MARKER in message["content"] for message in messages):
            messages = [
                message | {"content": _split_at_markers(message["content"])}
                if MARKER in message["content"]
                else message
                for message in messages
            ]
        else:
            first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
            content = _with_images_first(messages[first]["content"], len(images))
            messages = [*messages[:first], messages[first] | {"content": content}, *messages[first + 1 :]]
        parts = (part for message in messages for part in message["content"] if isinstance(part, dict))
        inline = [None for part in parts if part["type"] == "image"]
    free = sum(image is None for image in inline)
    if len(images) != free and (free or not _are_same(images, inline)):
        raise InputError(
            f"the messages need {counted(free, 'image')}, and 'images' holds {len(images)}; give as many, "
            "or remove the image parts"
        )
    following = iter(images)
    return messages, tuple(next(following) if image is None else image for image in inline)


def _are_same(images: Sequence[Any], others: Sequence[Any]) -> bool:
    """Return whether two lists name the same images; those of Pillow are not compared by their pixels."""
    return len(images) == len(others) and all(
        one is other or (isinstance(one, str | bytes) and one == other)
        for one, other in zip(images, others, strict=True)
    )


def _split_at_markers(content: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for index, text in enumerate(content.split(MARKER)):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts
