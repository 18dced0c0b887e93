"""Find and load a base model through mlx-lm, with errors that a person can act on. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.errors import InputError, RunError, first_line, out_of_memory

if TYPE_CHECKING:
    import mlx.nn as nn

OUR_TAG = "nalora-mlx"  # in the cards of the models that we write


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
        RunError: there is not enough memory for it.
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
            raise InputError(f"--quantize {quantize}: {name} is quantized already; leave the flag out")
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
        if out_of_memory(error):
            raise RunError(
                f"--model {name}: out of memory while it is loaded ({first_line(error)}); take a smaller model, or "
                "one that is quantized already (mlx_lm.convert --quantize makes one)"
            ) from error
        raise InputError(f"--model {name}: cannot be loaded: {first_line(error)}") from error


def is_quantized(config: dict[str, Any]) -> bool:
    """Whether a model's config says that its weights are quantized."""
    return "quantization" in config


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
            f"--model {name}: no such directory, and not loadable from the Hub: "
            f"{first_line(error).removeprefix('Got: ')}; check the name and the network, or give a local directory"
        ) from error


def check_files(name: str) -> Path:
    """Look at a stranger's model before anything is made of it: sizes against headers, names of files, counts.

    Returns:
        The model's directory.

    Raises:
        InputError: there is none, or what is wrong with which file.
    """
    from nalora_mlx.checkpoint import check_arrays, read_json

    directory = local_directory(name)
    if not (directory / "config.json").exists():
        raise InputError(f"--model {name}: the directory has no config.json; give one that mlx-lm can load")
    config = read_json(directory / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"--model {name}: config.json has no model_type; give one that mlx-lm can load")
    arrays = sum(check_arrays(path) for path in directory.glob("*.safetensors"))
    for key, value in _settings(config):
        # A list of layers is made before the weights are compared with it.
        if re.fullmatch(r"(num|n)(_hidden)?_layers?", key) and isinstance(value, int) and value > arrays:
            raise InputError(f"--model {name}: config.json has {key} {value}, the weights {arrays} arrays")
    index = directory / "model.safetensors.index.json"
    named = read_json(index).get("weight_map") if index.exists() else {}
    if not isinstance(named, dict) or any(Path(str(file)).name != file for file in named.values()):
        raise InputError(f"--model {name}: {index.name} must map names to files of the same directory")
    return directory


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of a config, those of the objects in it too."""
    for key, value in config.items() if isinstance(config, dict) else ():
        yield key, value
        yield from _settings(value)


def check_content(model: str | None, adapter: str | None = None) -> None:
    """Look into a model and an adapter from strangers before mlx-lm makes anything of them.

    Raises:
        InputError: what is wrong with which file.
    """
    if model is not None:
        check_files(model)
    if adapter is not None:
        check_adapter(adapter)


def check_adapter(path: str | Path) -> None:
    """Look at a stranger's adapter before mlx-lm makes arrays as its configuration says.

    Raises:
        InputError: a setting is missing or of a wrong type, or the rank is not that of the weights.
    """
    from nalora_mlx.checkpoint import ADAPTER_CONFIG, ADAPTER_FILE, array_shapes, read_json
    from nalora_mlx.config import NALoRAConfig
    from nalora_mlx.strict import coerce

    directory = Path(path).expanduser()
    shapes, config = array_shapes(directory / ADAPTER_FILE), directory / ADAPTER_CONFIG
    content = read_json(config)
    kind, lora = content.get("fine_tune_type", "lora"), content.get("lora_parameters")
    if kind == "full":
        return
    if kind not in ("lora", "dora") or not isinstance(lora, dict):
        raise InputError(
            f"{config}: holds {kind!r} without lora_parameters; give the directory of an adapter"
        )
    needed = ("rank", "scale", "dropout")
    given = {key: lora.get(key) for key in needed} | {"num_layers": content.get("num_layers")}
    given["keys"] = lora.get("keys")
    if missing := [key for key, value in given.items() if value is None and key != "keys"]:
        raise InputError(f"{config}: {', '.join(missing)} is missing; mlx-lm could not load this adapter")
    rank = NALoRAConfig(**coerce(given, NALoRAConfig, str(config))).rank
    arrays = [shape for name, shape in shapes.items() if name.endswith("lora_a") and len(shape) > 1]
    found = {shape[-1 if len(shape) == 2 else 1] for shape in arrays}
    if found != {rank}:
        raise InputError(f"{config}: rank is {rank}, but the weights have {sorted(found)}")


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
    """Name on the Hub of the model in full precision whose weights a base has; None if nothing tells it.

    A card's base_model is that only where mlx-lm has converted or quantized the model. In other cards it is what a
    model was trained from, and in those that we write too: such weights differ.

    Args:
        name: the base as it was asked for, a path or a Hub name.
        directory: where it lies.
        config: its config.json.
    """
    if is_hub_name(name) and not (config.get("quantization") or config.get("quantization_config")):
        return name
    card = card_metadata(directory)
    if card.get("library_name") != "mlx" or OUR_TAG in (card.get("tags") or []):
        return None
    base = card.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) and is_hub_name(base) else None


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
