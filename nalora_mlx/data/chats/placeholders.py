"""Images in rendered chats: placeholders become the text that stands for an image."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from nalora_mlx.core.errors import InputError, counted


class ImageTexts(Protocol):
    """What images become in the text of a chat; see `models.vision.processor`."""

    token_ids: frozenset[int]

    @property
    def placeholder(self) -> str:
        """The text that a chat template writes for an image."""
        ...

    def texts(self, images: Sequence[Any], source: str) -> list[str]:
        """Return the text that stands for each image."""
        ...

    def check(self, text: str, expanded: str, images: Sequence[Any], source: str) -> None:
        """Compare the tokens of an expanded chat with the processor's own."""
        ...


def expand_placeholders(text: str, images: ImageTexts, present: Sequence[Any], source: str) -> str:
    """Replace the placeholders in a rendered chat by what the images become.

    Args:
        text: the chat.
        images: of the model.
        present: the images of the messages that were rendered, in their order.
        source: of the row, for messages.

    Raises:
        InputError: the text does not have a placeholder for each image, so which is whose cannot be told.
    """
    first, *rest = text.split(images.placeholder)
    if len(rest) != len(present):
        remedy = (
            "the chat template leaves some out; remove these, or use another --chat-template"
            if len(rest) < len(present)
            else "remove that text from the messages, or add images"
        )
        raise InputError(
            f"{source}: the chat has {counted(len(present), 'image')}, and {images.placeholder!r} stands in it "
            f"{counted(len(rest), 'time')}; {remedy}"
        )
    pairs = zip(images.texts(present, source), rest, strict=True)
    expanded = first + "".join(image + piece for image, piece in pairs)
    images.check(text, expanded, present, source)
    return expanded


def image_count(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of image parts in messages."""
    contents = (message.get("content") for message in messages)
    return sum(
        part["type"] == "image" for content in contents if isinstance(content, list) for part in content
    )
