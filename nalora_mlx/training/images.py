"""Images in a run: whether it loads a vision-language model, and what its rows' images become."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.storage import read_json
from nalora_mlx.data.checks import RunData, images_refused
from nalora_mlx.data.tokenization import Split
from nalora_mlx.models.loading import check_files, load_module, load_tokenizer
from nalora_mlx.models.model_class import reads_text
from nalora_mlx.models.vision.features import ImageEncoder, Show
from nalora_mlx.models.vision.loading import open_processor, open_vision_model, sees_images
from nalora_mlx.models.vision.model import trains_towers
from nalora_mlx.models.vision.processor import VisionProcessor


def run_processor(config: RunConfig, data: RunData, notify: Callable[[str], None]) -> VisionProcessor | None:
    """Return the processor of a run's vision-language model; None if the run trains on text alone.

    A model that sees is loaded through mlx-vlm if rows have images, if its tower or projector is trained, or if mlx-lm
    has no model of its type. `notify` gets a notice if a tower is adapted that no row reaches.

    Raises:
        InputError: rows have images, and the model does not see, or its processor cannot be loaded; or a setting does
            not go with images.
    """
    model_config = read_json(check_files(config.model) / "config.json")
    sees = sees_images(model_config)
    if data.has_images and not sees:
        raise InputError(listed(images_refused(data)))
    wanted = data.has_images or adapts_towers(config) or not reads_text(model_config)
    if not (sees and wanted):
        return None
    if config.packing:
        raise InputError("packing: the rows of a vision-language model cannot be packed; switch it off")
    if config.fine_tune_type == "full" and data.has_images:
        raise InputError("fine_tune_type: full fine-tuning does not take images; use na-lora, lora or dora")
    if config.train and adapts_towers(config) and not data.has_images:
        notify(
            "no row has images, so the vision tower and the projector learn nothing; leave --vision and --projector "
            "out, or add images"
        )
    return open_processor(config.model, model_config, config.trust_remote_code)


def adapts_towers(config: RunConfig) -> bool:
    """Return whether a run adapts the vision tower or the projector."""
    lora = config.lora_config()
    return lora.vision or lora.projector


def load_run_tokenizer(config: RunConfig, processor: VisionProcessor | None) -> Any:
    """Return a run's tokenizer: that of its processor, if there is one."""
    return processor.tokenizer if processor else load_tokenizer(config.model, config.trust_remote_code)


def load_run_model(
    config: RunConfig, processor: VisionProcessor | None, notify: Callable[[str], None]
) -> tuple[nn.Module, dict[str, Any]]:
    """Load (model, config) through mlx-vlm if there is a processor, else through mlx-lm.

    Raises:
        InputError: it cannot be loaded.
    """
    if processor is not None:
        return open_vision_model(config.model, config.trust_remote_code, config.quantize)
    return load_module(config.model, config.trust_remote_code, config.quantize, notify)


def encode_images(
    model: nn.Module, processor: VisionProcessor, splits: dict[str, Split], output: Path, show: Show
) -> None:
    """Give the rows of all splits what a batch needs of their images.

    Features of images are computed here, once, if neither the tower nor the projector is trained.

    Args:
        model: as it is trained, with its adapters.
        processor: of the model.
        splits: changed in place.
        output: the run's directory, which keeps the features.
        show: called with the number of images that are done, and of all.

    Raises:
        InputError: an image cannot be read or does not fit the model.
    """
    encoder = ImageEncoder(model, processor, output, trains_towers(model))
    examples = [example for split in splits.values() for example in split.sequences]
    encoded = iter(encoder.attach(examples, show))
    for split in splits.values():
        split.sequences = [next(encoded) for _ in split.sequences]
