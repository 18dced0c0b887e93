"""What commands that answer share about vision-language models: which are used with images, and how they are loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.cli import configure_chats, note_merged
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.optional_dependencies import install_command, is_installed

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.finetuning import FinetuneResult
    from nalora_mlx.models.vision.processor import VisionProcessor

_TOWER = re.compile(r"vision|visual|image|vit\b|siglip")  # in the names of a vision tower's arrays


def why_blind(model: str) -> str:
    """Return why a model cannot be asked about images; an empty string if it can.

    Args:
        model: directory or Hugging Face repo.

    Returns:
        What follows the model's name in a message.

    Raises:
        InputError: the model does not exist, cannot be downloaded, or has an invalid file.
    """
    from nalora_mlx.core.storage import array_shapes
    from nalora_mlx.models.loading import check_files
    from nalora_mlx.models.vision.loading import sees_images

    directory = check_files(model)
    if not sees_images(_config(directory)):
        return "does not see images; use a vision-language model"
    if not is_installed("mlx-vlm"):
        return f"needs mlx-vlm to see images; install it: {install_command('vlm')}"
    names = (name for path in directory.glob("*.safetensors") for name in array_shapes(path))
    if not any(map(_TOWER.search, names)):
        return "was saved for text alone, without a vision tower; use the original model"
    return ""


def needs_mlx_vlm(model: str, adapter: str | Path | None = None) -> bool:
    """Return whether a model reads even text through mlx-vlm; see `adapters.vision.needs_vision`.

    Raises:
        InputError: the model or the adapter does not exist, or has an invalid file.
    """
    from nalora_mlx.adapters.vision import needs_vision
    from nalora_mlx.models.loading import check_files

    return needs_vision(_config(check_files(model)), None if adapter is None else Path(adapter).expanduser())


def load_vision_model(
    model: str,
    adapter: str | Path | None,
    template: str | None,
    template_args: dict[str, Any] | None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, VisionProcessor]:
    """Load a vision-language model, without its adapter, and its processor, which renders chats as in training.

    Args:
        model: directory or Hugging Face repo.
        adapter: directory of the adapter, for its chat template; None without one.
        template: value of --chat-template.
        template_args: value of --chat-template-args.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: the extra `vlm` is not installed, or mlx-vlm cannot load the model.
        RunError: there is not enough memory.
    """
    from nalora_mlx.models.vision.loading import open_processor, open_vision_model

    loaded, config = open_vision_model(model, trust_remote_code)
    loaded.eval()
    processor = open_processor(model, config, trust_remote_code)
    configure_chats(processor.tokenizer, template, template_args, adapter)
    note_merged(model, adapter)
    return loaded, processor


def load_tuned_vision_model(
    model: str,
    adapter: str | Path | None,
    template: str | None,
    template_args: dict[str, Any] | None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, VisionProcessor]:
    """Do what `load_vision_model` does, and load the adapter into the model.

    Raises:
        InputError: as there, or the adapter does not fit the model.
    """
    from nalora_mlx.adapters.files import load_any_adapter

    loaded, processor = load_vision_model(model, adapter, template, template_args, trust_remote_code)
    if adapter is not None:
        load_any_adapter(loaded, Path(adapter).expanduser())
        loaded.eval()
    return loaded, processor


def answer(
    result: FinetuneResult,
    prompt: str | list[dict[str, Any]],
    images: Sequence[Any] = (),
    **settings: Any,
) -> str:
    """Return the answer of a model that was just trained.

    Args:
        result: the model, its tokenizer, and the settings of the run.
        prompt: a message, or a chat as a list of messages.
        images: see `FinetuneResult.generate`.
        settings: of the generator, such as `max_tokens` and `sampler`.

    Raises:
        InputError: the model does not see images, an image cannot be read, or there are not as many as the chat has
            parts for.
    """
    from nalora_mlx.data.image_references import locate
    from nalora_mlx.models.conversation import answer_chat
    from nalora_mlx.models.loading import check_files
    from nalora_mlx.models.vision.generation import message_content, render_chat, stream_answer
    from nalora_mlx.models.vision.loading import open_processor
    from nalora_mlx.models.vision.model import is_vision_language_model

    if not is_vision_language_model(result.model):
        if images:
            raise InputError("generate: the model does not see images; leave images out")
        return answer_chat(result.model, result.tokenizer, prompt, **settings)
    name, source = result.config.model, "generate"
    processor = open_processor(name, _config(check_files(name)), result.config.trust_remote_code)
    processor.tokenizer = result.tokenizer  # it renders chats as in training
    paths = (os.fsdecode(image) if isinstance(image, os.PathLike) else image for image in images)
    references = [locate(image, Path.cwd(), source) for image in paths]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": message_content(prompt, len(references))}]
    text = render_chat(processor, prompt, source)
    responses = stream_answer(result.model, processor, text, references, source, **settings)
    return "".join(response.text for response in responses)


def _config(directory: Path) -> dict[str, Any]:
    from nalora_mlx.core.storage import read_json

    return read_json(directory / "config.json")
