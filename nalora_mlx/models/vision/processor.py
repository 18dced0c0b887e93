"""The processor of a vision-language model: what an image becomes in the text of a chat, and in arrays."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.data.chats.placeholders import expand_placeholders
from nalora_mlx.data.images import image_digest, open_image

_PLACEHOLDER_NAMES = ("image_token", "boi_token", "image_placeholder", "fake_image_token")
_PLACEHOLDERS = ("<image>", "[IMG]", "<|image|>", "<|image_pad|>", "<image_soft_token>", "<IMG_CONTEXT>")
_QUESTION = "question"
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # outputs of processors with an entry for each token
_TEXT = ("input_ids", "attention_mask", "labels")  # outputs of processors that are not about images
COMPARED = 8  # chats whose tokens are compared with the processor's own

# PaliGemma's processor takes a prompt instead of a chat, and puts these parts together itself.
PROMPT_TEMPLATE = (
    "{% if messages | length > 2 or messages[0]['role'] != 'user' %}"
    "{{ raise_exception('PaliGemma takes one question and its answer, without a system message') }}{% endif %}"
    "{% for message in messages %}"
    "{% set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string "
    "else message['content'] %}"
    "{% if message['role'] == 'user' %}"
    "{% for part in parts if part['type'] == 'image' %}<image>{% endfor %}{{ bos_token }}"
    "{% endif %}"
    "{% for part in parts if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '\n' if message['role'] == 'user' else eos_token }}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class ImageTokens:
    """What an image becomes in a chat.

    Attributes:
        digest: of the image's pixels.
        text: what stands for it in the text of a chat.
        tokens: the token ids of that text.
        arrays: what the processor makes of the image besides token ids and pixels, such as the size of its grid.
    """

    digest: str
    text: str
    tokens: tuple[int, ...]
    arrays: Mapping[str, np.ndarray]


class VisionProcessor:
    """A processor of mlx-vlm. Images are opened when they are needed, and their pixels are not kept.

    Args:
        processor: of mlx-vlm.
        tokenizer: wrapper of mlx-lm, whose chat template is the one that chats are rendered with.
        image_token: id of the tokens that image features replace.
        directory: of the model, for the files that hold the processor's settings.

    Attributes:
        token_ids: ids of the tokens that image features replace.
        fingerprint: of the settings.
    """

    def __init__(self, processor: Any, tokenizer: Any, image_token: int, directory: Path):
        self.processor, self.tokenizer, self.image_token = processor, tokenizer, image_token
        self.token_ids = frozenset({image_token})
        self._takes_prompts = _takes_prompts(processor)
        self._read: dict[Any, ImageTokens] = {}
        self._encoded: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._agrees: dict[tuple[str, int], bool] = {}
        settings = sorted(directory.glob("*processor*.json"))
        self.fingerprint = hashlib.sha256(b"".join(path.read_bytes() for path in settings)).hexdigest()
        if type(processor).__name__ == "LlavaProcessor":
            processor.image_processor = _WithoutPadding(processor.image_processor)

    def texts(self, images: Sequence[Any], source: str) -> list[str]:
        """Return the text that stands for each image of a row.

        Raises:
            InputError: an image cannot be read.
        """
        return [self.tokens_of(image, source).text for image in images]

    def tokens_of(self, reference: Any, source: str) -> ImageTokens:
        """Return what an image becomes in a chat; it is read once.

        Raises:
            InputError: it cannot be read, or the processor refuses it.
        """
        if (key := _content_key(reference)) not in self._read:
            image = open_image(reference, source)
            with _recorded(self.processor) as texts:
                given = self.arrays(self.placeholder, [image], source)
            count = int(np.isin(given["input_ids"], list(self.token_ids)).sum())
            text = (
                texts[-1]
                if texts
                else self.tokenizer.decode(list(self._without_start(given["input_ids"][0])))
            )
            if self._takes_prompts:  # the rest of the prompt comes from the template
                text = self.placeholder * count
            if text not in self._encoded:  # images of one size share their text
                self._encoded[text] = text, tuple(self.tokenizer.encode(text, add_special_tokens=False))
            text, tokens = self._encoded[text]
            if not count or sum(token in self.token_ids for token in tokens) != count:
                raise InputError(
                    f"{source}: the model's processor makes {count} image tokens of an image, and its tokenizer "
                    f"{sum(token in self.token_ids for token in tokens)} of their text; use another model"
                )
            kept = {name: given[name] for name in given if _is_small(name, given[name])}
            self._read[key] = ImageTokens(image_digest(image), text, tokens, kept)
        return self._read[key]

    def arrays(self, text: str, images: Sequence[Any], source: str) -> dict[str, Any]:
        """Return what the processor makes of a text with images: NumPy arrays, or lists of them.

        Raises:
            InputError: the processor refuses them.
        """
        from mlx_vlm.utils import prepare_inputs

        try:
            given = prepare_inputs(
                self.processor,
                images=list(images),
                prompts=[text],
                image_token_index=self.image_token,
                add_special_tokens=False,
            )
        except Exception as error:
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise InputError(
                f"{source}: the model's processor refuses the images ({sizes} pixels: {first_line(error)}); "
                "resize them, or remove the row"
            ) from None
        return {name: _as_numpy(value) for name, value in given.items() if value is not None}

    def inputs(self, references: Sequence[Any], source: str) -> dict[str, Any]:
        """Return what the model's `get_input_embeddings` takes besides token ids for the images of a row.

        Raises:
            InputError: an image cannot be read, or the processor refuses them.
        """
        images = [open_image(reference, source) for reference in references]
        given = self.arrays(self.placeholder * len(images), images, source)
        return {name: value for name, value in given.items() if name not in _TEXT}

    def prompt_inputs(self, text: str, references: Sequence[Any], source: str) -> dict[str, Any]:
        """Return what a model reads of a rendered chat: "input_ids" [1, L] as in training, and `inputs`.

        Raises:
            InputError: an image cannot be read, or the text has more placeholders than there are images.
        """
        if references:
            text = expand_placeholders(text, self, references, source)
        ids = np.array([self.tokenizer.encode(text, add_special_tokens=False)])
        given = self.inputs(references, source) if references else {}
        for name in TOKEN_TYPES:
            if name in given:
                given[name] = np.isin(ids, list(self.token_ids)) * given[name].max()
        return given | {"input_ids": ids}

    def check(self, text: str, expanded: str, images: Sequence[Any], source: str) -> None:
        """Compare the tokens of a chat with those that the processor makes of it; only the first chats are compared.

        Args:
            text: a rendered chat, or its beginning.
            expanded: the text with what images become in the place of their placeholders.
            images: of the text.
            source: of the row, for messages.

        Raises:
            InputError: they differ.
        """
        if not images or self._takes_prompts:
            return
        key = (source, len(images))
        if key not in self._agrees:
            if len(self._agrees) >= COMPARED:
                return
            given = self.arrays(text, [open_image(image, source) for image in images], source)
            tokens = self.tokenizer.encode(expanded, add_special_tokens=False)
            self._agrees[key] = self._without_start(given["input_ids"][0]) == self._without_start(tokens)
        if not self._agrees[key]:  # raised each time, since the renderer of chats tries several forms
            raise InputError(
                f"{source}: the model's processor makes other tokens of this chat than of its images and texts by "
                "themselves, so training would differ from generation; use rows with one image, or another model"
            )

    def _without_start(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Remove beginning-of-sequence tokens, of which processors add one even if the chat template wrote one."""
        start = getattr(self.tokenizer, "bos_token_id", None)
        given = [int(token) for token in tokens]
        first = next((i for i, token in enumerate(given) if token != start), len(given))
        return tuple(given[first:])

    @cached_property
    def placeholder(self) -> str:
        """The text that the chat template writes for an image, and that the processor replaces.

        Raises:
            InputError: the chat template writes nothing for an image.
        """
        parts = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            raise InputError(
                f"the model's chat template refuses a message with an image ({first_line(error)}); "
                "give another with --chat-template"
            ) from None
        names = [getattr(self.processor, name, None) for name in _PLACEHOLDER_NAMES]
        candidates = [name for name in (*names, *_PLACEHOLDERS) if isinstance(name, str) and name in text]
        if not candidates:
            raise InputError(
                "the model's chat template writes nothing for an image; give another with --chat-template"
            )
        return candidates[0]


def default_template(processor: Any) -> str | None:
    """Return the chat template to use with a processor that has none; None if its prompts are not known."""
    return PROMPT_TEMPLATE if _takes_prompts(processor) else None


def _takes_prompts(processor: Any) -> bool:
    return type(processor).__name__ == "PaliGemmaProcessor"


def _content_key(reference: Any) -> Any:
    """Return what changes with the content of an image, and does not keep it in memory."""
    if isinstance(reference, bytes):
        return hashlib.sha256(reference).digest()
    if not isinstance(reference, str):
        return image_digest(open_image(reference, "an image"))
    try:
        found = os.stat(reference)
    except (OSError, ValueError):  # a data URI; or `open_image` says what is wrong
        return hashlib.sha256(reference.encode()).digest()
    return reference, found.st_mtime_ns, found.st_size


class _Proxy:
    """Passes everything on to another object."""

    def __init__(self, target: Any):
        object.__setattr__(self, "target", target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.target, name, value)


class _WithoutPadding(_Proxy):
    """An image processor that ignores `padding`, which mlx-vlm means for the tokenizer and transformers refuses."""

    def __call__(self, images: Any, padding: Any = None, **settings: Any) -> Any:
        return self.target(images, **settings)


class _Recorder(_Proxy):
    """A tokenizer that keeps the texts it is called with."""

    def __call__(self, text: Any = None, **settings: Any) -> Any:
        self.texts.extend([text] if isinstance(text, str) else text)
        return self.target(text=text, **settings)


@contextmanager
def _recorded(processor: Any) -> Iterator[list[str]]:
    """Record the texts that a processor passes to its tokenizer."""
    texts: list[str] = []
    if not hasattr(processor, "tokenizer"):
        yield texts
        return
    tokenizer = processor.tokenizer
    recorder = _Recorder(tokenizer)
    object.__setattr__(recorder, "texts", texts)
    processor.tokenizer = recorder
    try:
        yield texts
    finally:
        processor.tokenizer = tokenizer


def _as_numpy(value: Any) -> Any:
    if isinstance(value, mx.array):
        return np.array(value)
    if isinstance(value, list | tuple) and value and isinstance(value[0], mx.array):
        return [np.array(item) for item in value]
    return value


def _is_small(name: str, value: Any) -> bool:
    """Return whether an output of the processor is neither tokens nor pixels."""
    named = name in _TEXT or name.startswith("pixel")
    return isinstance(value, np.ndarray) and not named
