"""Find and load a base model through mlx-lm, with errors that a person can act on. Imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.errors import InputError, first_line

if TYPE_CHECKING:
    import mlx.nn as nn


def load_model(
    name: str, trust_remote_code: bool = False, quantize: int | None = None
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Load (model, tokenizer, config) from a local directory or a Hugging Face repo.

    Args:
        name: directory or repo.
        trust_remote_code: run code that the model or its tokenizer brings along.
        quantize: quantize the model to this many bits, affine, in groups of 64.

    Raises:
        InputError: there is no such model, it cannot be downloaded, or mlx-lm cannot load it.
    """
    from mlx_lm.utils import load, quantize_model

    directory = local_directory(name)
    _check_files(name, directory)
    try:
        model, tokenizer, config = load(
            str(directory),
            tokenizer_config={"trust_remote_code": trust_remote_code},
            return_config=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        raise InputError(f"--model {name}: cannot be loaded: {first_line(error)}") from error
    if quantize is not None:
        if "quantization" in config:
            raise InputError(f"--quantize {quantize}: {name} is quantized already; leave the flag out")
        try:
            model, config = quantize_model(model, config, group_size=64, bits=quantize)
        except ValueError as error:
            raise InputError(f"--quantize {quantize}: {error}") from None
    return model, tokenizer, config


def local_directory(name: str) -> Path:
    """The directory of a model, downloaded if it is a Hugging Face repo.

    Raises:
        InputError: there is no such model, or it cannot be downloaded.
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
            f"--model {name}: no such directory, and not loadable from the Hub: {first_line(error)}"
        ) from error


def _check_files(name: str, directory: Path) -> None:
    """Look at a stranger's model before anything is made of it: sizes against headers, names of files, counts.

    Raises:
        InputError: what is wrong with which file.
    """
    from nalora_mlx.checkpoint import check_arrays, read_json

    if not (directory / "config.json").exists():
        raise InputError(f"--model {name}: the directory has no config.json; give one that mlx-lm can load")
    config = read_json(directory / "config.json")
    arrays = sum(check_arrays(path) for path in directory.glob("*.safetensors"))
    for part in (config, config.get("text_config")):
        for key, value in part.items() if isinstance(part, dict) else ():
            # A list of layers is made before the weights are compared with it.
            if re.fullmatch(r"(num|n)(_hidden)?_layers?", key) and isinstance(value, int) and value > arrays:
                raise InputError(
                    f"--model {name}: config.json has {key} {value}, the weights {arrays} arrays"
                )
    index = directory / "model.safetensors.index.json"
    named = read_json(index).get("weight_map") if index.exists() else {}
    if not isinstance(named, dict) or any(Path(str(file)).name != file for file in named.values()):
        raise InputError(f"--model {name}: {index.name} must map names to files of the same directory")


def card_metadata(directory: Path) -> dict[str, Any]:
    """What a model card (README.md) says of its model in its YAML head; empty if there is none that can be read."""
    import yaml

    try:
        text = (directory / "README.md").read_text(encoding="utf-8")
        content = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def original_name(name: str, directory: Path, config: dict[str, Any]) -> str | None:
    """Name on the Hub of the unquantized model that a base comes from; None if neither name nor card tell it.

    Args:
        name: the base as it was asked for, a path or a Hub name.
        directory: where it lies.
        config: its config.json.
    """
    base = card_metadata(directory).get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    if isinstance(base, str) and is_hub_name(base):
        return base
    return name if is_hub_name(name) and not config.get("quantization") else None


def is_hub_name(name: str) -> bool:
    """Whether a name is one of the Hub (owner/name), and no path on this machine."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).expanduser().exists()


def expanded(name: str) -> str | Path:
    """A local path with its ~ expanded; the name of a Hugging Face repo as it is."""
    path = Path(name).expanduser()
    return path if path.exists() else name


def check_paths(model: str | None, adapter: str | None = None, flag: str = "--model") -> None:
    """Refuse a local model or adapter that is not there, before anything slow.

    Raises:
        InputError: which flag, and what to do.
    """
    if (
        model is not None
        and not Path(model).expanduser().exists()
        and (model[:1] in "./~" or model.count("/") != 1)
    ):
        raise InputError(
            f"{flag} {model}: no such directory, and no Hugging Face repo (these are owner/name)"
        )
    if adapter is not None:
        for name in ("adapter_config.json", "adapters.safetensors"):
            if not (Path(adapter).expanduser() / name).exists():
                raise InputError(
                    f"--adapter-path {adapter}: has no {name}; give the directory of a trained adapter"
                )
