"""Images of a row: in parts of its messages, or beside them."""

from collections.abc import Mapping, Sequence
from typing import Any

from nalora_mlx.core.errors import InputError
from nalora_mlx.data.rows.cells import is_blank, parsed_cell

Message = dict[str, Any]
MARKER = "<image>"
_REFERENCES = ("image", "image_url", "url", "path", "base64")  # keys of an image part


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
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InputError(f"the 'content' of message {number} has a text part without a 'text' string")
        return {"type": "text", "text": part["text"]}
    if isinstance(kind, str) and kind.startswith("image"):
        references = (part[key] for key in _REFERENCES if not is_blank(part.get(key)))
        images.append(_reference(next(references, None)))
        return {"type": "image"}
    raise InputError(
        f"the 'content' of message {number} has a part of type {kind!r}; parts must be of type 'text' or 'image'"
    )


def read_images(value: Any) -> list[Any]:
    """Return the images under the key "images" or "image": paths, URLs, bytes, or decoded images.

    Raises:
        InputError: something is no image.
    """
    value = parsed_cell(value)
    if is_blank(value):
        return []
    return [_reference(item, True) for item in (value if isinstance(value, list) else [value])]


def _reference(value: Any, needed: bool = False) -> Any:
    """Return an image without its wrapper: {"url": ...} of OpenAI, {"bytes": ..., "path": ...} of Arrow."""
    if isinstance(value, Mapping):
        found = (value[key] for key in ("bytes", "url", "path") if not is_blank(value.get(key)))
        value, needed = next(found, None), True
    if (value is None and needed) or isinstance(value, bool | int | float | list | Mapping):
        raise InputError(f"an image must be a path, a URL or bytes, not {type(value).__name__}")
    return value


def with_images_first(content: str | list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the parts of a message with image parts put before them."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [*({"type": "image"} for _ in range(count)), *parts]


def place_images(
    messages: list[Message], inline: Sequence[Any], images: list[Any]
) -> tuple[list[Message], tuple[Any, ...]]:
    """Assign the images beside a chat to its image parts; return the messages and the images in their order.

    1. Image parts that name no image (None in `inline`) take the images in order.
    2. If there are no image parts, every "<image>" in a message becomes one.
    3. If there are none of these either, the images come first in the first user message.

    Raises:
        InputError: there are not as many images as parts.
    """
    if images and not inline:
        if any(MARKER in message["content"] for message in messages):
            messages = [_split_at_markers(message) for message in messages]
        else:
            first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
            content = with_images_first(messages[first]["content"], len(images))
            messages = [*messages[:first], messages[first] | {"content": content}, *messages[first + 1 :]]
        parts = (part for message in messages for part in message["content"] if isinstance(part, dict))
        inline = [None for part in parts if part["type"] == "image"]
    free = sum(image is None for image in inline)
    if len(images) != free and (free or images != list(inline)):
        raise InputError(
            f"the messages need {free} images, and 'images' holds {len(images)}; give as many, "
            "or remove the image parts"
        )
    following = iter(images)
    return messages, tuple(next(following) if image is None else image for image in inline)


def _split_at_markers(message: Message) -> Message:
    texts = message["content"].split(MARKER)
    if len(texts) == 1:
        return message
    parts: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": text}] if text else []
    return message | {"content": parts}
