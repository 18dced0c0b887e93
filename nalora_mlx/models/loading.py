"""Find, check and load base models through mlx-lm, with clear errors. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.core.errors import InputError, RunError, first_line, is_out_of_memory
from nalora_mlx.core.paths import check_paths

if TYPE_CHECKING:
    import mlx.nn as nn


def load_model(
    name: str, trust_remote_code: bool = False, quantize: int | None = None
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Load (model, tokenizer, config) from a local directory or a Hugging Face repo.

    Args:
        name: directory or repo.
        trust_remote_code: run code that comes with the model.
        quantize: quantize the model to this many bits (affine, group size 64).

    Raises:
        InputError: the model does not exist, cannot be downloaded, or cannot be loaded by mlx-lm.
        RunError: there is not enough memory.
    """
    model, config = load_module(name, trust_remote_code, quantize)
    return model, load_tokenizer(name, trust_remote_code), config


def load_module(
    name: str, trust_remote_code: bool = False, quantize: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Load (model, config) without the tokenizer; see `load_model`."""
    from mlx_lm import utils

    directory = check_files(name)
    with _loading(name):
        model, config = utils.load_model(directory, trust_remote_code=trust_remote_code)
    if quantize is not None:
        if is_quantized(config):
            raise InputError(f"--quantize {quantize}: {name} is already quantized; remove the flag")
        try:
            model, config = utils.quantize_model(model, config, group_size=64, bits=quantize)
        except ValueError as error:
            raise InputError(f"--quantize {quantize}: {error}") from None
    return model, config


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer without the model, in mlx-lm's wrapper; see `load_model`."""
    from mlx_lm import utils

    directory = check_files(name)
    with _loading(name):
        ends = utils.load_config(directory).get("eos_token_id")
        return utils.load_tokenizer(directory, {"trust_remote_code": trust_remote_code}, eos_token_ids=ends)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise RunError(
                f"--model {name}: out of memory while loading ({first_line(error)}); use a smaller model, or a "
                "quantized one (mlx_lm.convert --quantize makes one)"
            ) from error
        raise InputError(f"--model {name}: cannot be loaded: {first_line(error)}") from error


def is_slow_on_cpu(model: nn.Module) -> bool:
    """Return whether a model runs on a CPU in half precision, which is about fifty times slower than float32 there."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    half = (mx.float16, mx.bfloat16)
    return mx.default_device() == mx.Device(mx.cpu) and any(
        array.dtype in half for _, array in tree_flatten(model.parameters())
    )


def is_quantized(config: dict[str, Any]) -> bool:
    """Return whether a config says that the model's weights are quantized."""
    return "quantization" in config


def local_directory(name: str) -> Path:
    """Return the directory of a model; download it if it is a Hugging Face repo.

    Raises:
        InputError: the model does not exist, or cannot be downloaded.
    """
    from mlx_lm.utils import _download

    check_paths(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    try:
        return Path(_download(name))
    except Exception as error:
        raise InputError(
            f"--model {name}: no such directory, and cannot be downloaded from the Hub: "
            f"{first_line(error).removeprefix('Got: ')}; check the name and the network, or give a local directory"
        ) from error


def check_files(name: str) -> Path:
    """Check an untrusted model's files before loading them: array sizes, number of layers, names in the index.

    Returns:
        The model's directory.

    Raises:
        InputError: the model does not exist, or a file is invalid; names the file and what is wrong.
    """
    from nalora_mlx.core.storage import array_shapes, read_json

    directory = local_directory(name)
    if not (directory / "config.json").exists():
        raise InputError(
            f"--model {name}: the directory has no config.json; give a model that mlx-lm can load"
        )
    config = read_json(directory / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"--model {name}: config.json has no model_type; give a model that mlx-lm can load")
    arrays = sum(len(array_shapes(path)) for path in directory.glob("*.safetensors"))
    for key, value in _settings(config):
        # mlx-lm builds all layers before it compares them with the weights.
        if re.fullmatch(r"(num|n)(_hidden)?_layers?", key) and isinstance(value, int) and value > arrays:
            raise InputError(
                f"--model {name}: config.json has {key} {value}, the weights only {arrays} arrays"
            )
    index = directory / "model.safetensors.index.json"
    named = read_json(index).get("weight_map") if index.exists() else {}
    if not isinstance(named, dict) or any(Path(str(file)).name != file for file in named.values()):
        raise InputError(f"--model {name}: {index.name} must map names to files in the same directory")
    return directory


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield all keys and values of a config, including those of nested objects."""
    for key, value in config.items() if isinstance(config, dict) else ():
        yield key, value
        yield from _settings(value)
