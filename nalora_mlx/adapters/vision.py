"""Whether an adapter belongs to a vision-language model as mlx-vlm loads it, or to the language model in mlx-lm."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nalora_mlx.adapters.files import ADAPTER_FILE, IMAGES_KEY, read_adapter_config
from nalora_mlx.core.storage import array_shapes
from nalora_mlx.models.model_class import reads_text
from nalora_mlx.models.vision.loading import sees_images

# How paths in a language model start, in mlx-lm and mlx-vlm. Those of towers and projectors start otherwise.
_LANGUAGE = ("language_model.", "model.", "lm_head.")


def needs_vision(model_config: Mapping[str, Any], adapter: Path | None) -> bool:
    """Return whether a model must be loaded through mlx-vlm for an adapter to fit it.

    That is so if the adapter was trained on images or adapts a tower, or if mlx-lm has no model of this type.

    Args:
        model_config: content of the model's config.json.
        adapter: directory of the adapter; None without one.

    Raises:
        InputError: a file of the adapter is missing or damaged.
    """
    if not sees_images(dict(model_config)):
        return False
    if not reads_text(model_config):
        return True
    if adapter is None:
        return False
    return bool(read_adapter_config(adapter).get(IMAGES_KEY)) or bool(outside_language(model_config, adapter))


def outside_language(model_config: Mapping[str, Any], adapter: Path) -> list[str]:
    """Return the modules outside the language model that an adapter adapts; none for a model that does not see.

    Raises:
        InputError: the adapter's file is damaged.
    """
    path = adapter / ADAPTER_FILE
    names = array_shapes(path) if sees_images(dict(model_config)) and path.exists() else {}
    paths = (name.rpartition(".")[0] for name in names)
    return list(dict.fromkeys(path for path in paths if not f"{path}.".startswith(_LANGUAGE)))
