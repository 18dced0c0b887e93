"""What commands that answer share about vision-language models: which are used with images, and how they are loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.cli import configure_chats, note_merged
from nalora_mlx.core.optional_dependencies import install_command, is_installed

if TYPE_CHECKING:
    import mlx.nn as nn

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


def _config(directory: Path) -> dict[str, Any]:
    from nalora_mlx.core.storage import read_json

    return read_json(directory / "config.json")
