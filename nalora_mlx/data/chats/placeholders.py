"""Images in rendered chats: placeholders become the text that stands for an image."""

from collections.abc import Sequence
from typing import Any, Protocol

from nalora_mlx.core.errors import InputError


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


def expand_placeholders(text: str, images: ImageTexts, row_images: Sequence[Any], source: str) -> str:
    """Replace the placeholders in a rendered chat by what the images become.

    Args:
        text: a chat, or its beginning; it may lack the last images.
        images: of the model.
        row_images: of the row, in the order of their placeholders.
        source: of the row, for messages.

    Raises:
        InputError: the text has more placeholders than the row has images.
    """
    first, *rest = text.split(images.placeholder)
    if len(rest) > len(row_images):
        raise InputError(
            f"{source}: the chat holds {images.placeholder!r} {len(rest)} times, and the row has {len(row_images)} "
            "images; remove that text from the messages, or add the images"
        )
    present = row_images[: len(rest)]
    pairs = zip(images.texts(present, source), rest, strict=True)
    expanded = first + "".join(image + piece for image, piece in pairs)
    images.check(text, expanded, present, source)
    return expanded
