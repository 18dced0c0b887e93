"""Find out whether a model sees images, and load it through mlx-vlm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.optional_dependencies import install_command, is_installed
from nalora_mlx.models.loading import QUANTIZATION, check_files, load_tokenizer, loading, quantized

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.models.vision.processor import VisionProcessor

TOWERS = ("vision_tower", "vision_model")  # names of a vision tower in models of mlx-vlm
VISION = ("vision_config", "vision_tower", "mm_vision_tower", "visual")  # keys of a config


def sees_images(config: dict[str, Any]) -> bool:
    """Return whether a config.json describes a model that reads images."""
    return any(config.get(key) for key in VISION)


def open_vision_model(
    name: str,
    trust_remote_code: bool = False,
    quantize: int | None = None,
    lazy: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load (model, config) of a vision-language model; the model is called like one of mlx-lm.

    Args:
        name: directory or repo.
        trust_remote_code: run code that comes with the model.
        quantize: quantize the language model to this many bits.
        lazy: leave the weights on disk until they are used.

    Raises:
        InputError: the extra `vlm` is not installed, or mlx-vlm cannot load the model.
        RunError: there is not enough memory.
    """
    from nalora_mlx.core.storage import read_json

    require_mlx_vlm(name)
    directory = check_files(name)
    config = read_json(directory / "config.json")
    if config.get("model_file") and not trust_remote_code:
        raise InputError(
            f"--model {name}: comes with code of its own ({config['model_file']}); read it, and allow it with "
            "--trust-remote-code"
        )
    from mlx_vlm.utils import load_model

    from nalora_mlx.models.vision.model import as_vision_language_model, check_type

    check_type(config["model_type"])
    with loading(name):
        loaded = load_model(directory, lazy=lazy)
        if any(
            getattr(loaded, tower, loaded) is None for tower in TOWERS
        ):  # mlx-vlm drops what has no weights
            raise InputError(
                f"--model {name}: was saved for text alone, without the weights of its vision tower; use the original"
            )
        model = as_vision_language_model(loaded)
        applied = {
            key: value
            for key in QUANTIZATION
            if (value := getattr(model.config, key, None) or config.get(key))
        }
    return quantized(model, config | applied, quantize, name, _is_in_language_model)


def _is_in_language_model(path: str, module: nn.Module) -> bool:
    quantizable = hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0
    return path.startswith("language_model.") and quantizable


def open_processor(name: str, config: dict[str, Any], trust_remote_code: bool = False) -> VisionProcessor:
    """Load the processor of a vision-language model, with its tokenizer.

    Raises:
        InputError: the extra `vlm` is not installed, or there is no processor that mlx-vlm can load.
    """
    require_mlx_vlm(name)
    directory = check_files(name)
    from mlx_vlm.utils import get_model_and_args, load_image_processor, load_processor
    from transformers.utils import logging

    from nalora_mlx.models.vision.model import check_type
    from nalora_mlx.models.vision.processor import VisionProcessor, default_template

    check_type(config.get("model_type"))
    logging.set_verbosity_error()  # mlx-vlm calls it with arguments that it warns about
    with loading(name):
        get_model_and_args(dict(config))  # imports the model's module, which registers its processor
        processor = load_processor(
            directory, eos_token_ids=config.get("eos_token_id"), trust_remote_code=trust_remote_code
        )
        if (images := load_image_processor(directory)) is not None:
            processor.image_processor = images
        tokenizer = load_tokenizer(name, trust_remote_code)
        if not getattr(tokenizer, "chat_template", None) and (
            template := getattr(processor, "chat_template", None) or default_template(processor)
        ):
            tokenizer.chat_template = template
            tokenizer.has_chat_template = True
    return VisionProcessor(processor, tokenizer, _image_token(config, processor), directory)


def require_mlx_vlm(name: str) -> None:
    """Raise InputError if mlx-vlm is not installed."""
    if not is_installed("mlx-vlm"):
        raise InputError(
            f"--model {name}: reads images, for which mlx-vlm is needed; install it: {install_command('vlm')}"
        )


def _image_token(config: dict[str, Any], processor: Any) -> int:
    names = ("image_token_index", "image_token_id")
    found = [getattr(processor, "img_context_token_id", None), *map(config.get, names)]
    found.append(getattr(processor, "image_token_id", None))
    for token in found:
        if isinstance(token, int):
            return token
    raise InputError("config.json names no image_token_id; use a model that mlx-vlm reads images with")
