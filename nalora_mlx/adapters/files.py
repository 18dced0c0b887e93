"""The adapter's files, adapters.safetensors and adapter_config.json: write, read, describe and validate them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from nalora_mlx.adapters.attach import AdaptResult, adapt, adapt_dora, adapt_result
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.parsing import coerce, reject_unknown

ADAPTER_FILE = "adapters.safetensors"  # mlx-lm reads these two files
ADAPTER_CONFIG = "adapter_config.json"
NA_KEY = "na_lora"  # our settings in adapter_config.json; mlx-lm ignores this key


def check_adapter(path: str | Path) -> None:
    """Look at a stranger's adapter before mlx-lm makes arrays as its configuration says.

    Raises:
        InputError: a setting is missing or of a wrong type, or the rank is not that of the weights.
    """
    directory = Path(path).expanduser()
    shapes, config = storage.array_shapes(directory / ADAPTER_FILE), directory / ADAPTER_CONFIG
    content = storage.read_json(config)
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


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The trainable arrays by path, as they stand in adapters.safetensors."""
    return dict(tree_flatten(model.trainable_parameters()))


def adapter_config(model: nn.Module) -> dict[str, Any]:
    """The content of adapter_config.json: what an unmodified mlx-lm needs, and our settings under one key."""
    report = adapt_result(model)
    if report is None:
        raise InputError("the model has no adapters; call adapt first")
    config = report.config
    return {
        "fine_tune_type": report.fine_tune_type,
        "num_layers": config.num_layers,
        "lora_parameters": config.lora_parameters,
        NA_KEY: config.na_parameters,
    }


def read_weights(path: Path) -> dict[str, mx.array]:
    """Read the arrays of a safetensors file.

    Raises:
        InputError: it is missing, or no such file.
    """
    if not path.exists():
        raise InputError(f"no adapter weights at {path}")
    return storage.read_arrays(path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load trained arrays into an adapted model.

    Raises:
        InputError: the file is missing or unreadable, or lists every array that does not fit, with both shapes.
    """
    _load(model, path, adapter_weights(model), whole=True)


def _load(model: nn.Module, path: Path, wanted: dict[str, mx.array], whole: bool) -> None:
    """Load arrays of a file that are among those wanted, or exactly those; names and shapes must agree."""
    loaded = read_weights(path)
    problems = [f"{name} is missing" for name in wanted if name not in loaded and whole]
    for name, array in loaded.items():
        if name not in wanted:
            problems.append(f"{name} is no trainable array of the model")
        elif array.shape != wanted[name].shape:
            problems.append(f"{name} is {array.shape}, the model has {wanted[name].shape}")
        elif not mx.issubdtype(array.dtype, mx.floating):
            problems.append(f"{name} holds {array.dtype}, which no adapter is made of")
    if problems:
        raise InputError(
            f"{path} does not fit the model (same --rank, --keys and --num-layers?): {listed(problems)}"
        )
    model.load_weights([(name, a.astype(wanted[name].dtype)) for name, a in loaded.items()], strict=False)


def load_adapter(model: nn.Module, directory: str | Path) -> AdaptResult:
    """Adapt a base model as a saved LoRA adapter says, and load its weights.

    Args:
        model: the base model.
        directory: holds adapters.safetensors and adapter_config.json, ours or mlx-lm's.

    Raises:
        InputError: something is missing, of another kind than LoRA, or does not fit the model.
    """
    return _attach(model, Path(directory), {"lora": adapt})


def _attach(
    model: nn.Module, directory: Path, kinds: dict[str, Callable[[nn.Module, NALoRAConfig], AdaptResult]]
) -> AdaptResult:
    """Adapt a model as adapter_config.json says, and load the weights, which are looked at first."""
    content = read_adapter_config(directory)
    kind = content.get("fine_tune_type", "lora")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"{directory / ADAPTER_CONFIG}: holds {kind!r}, not {' or '.join(kinds)}")
    path = directory / ADAPTER_CONFIG
    lora, own = content.get("lora_parameters"), content.get(NA_KEY, {})
    if not isinstance(lora, dict) or not isinstance(own, dict):
        raise InputError(f"{path}: lora_parameters is missing or no object, or {NA_KEY} is none")
    given = {**lora, "num_layers": content.get("num_layers")}
    needed = ("rank", "scale", "dropout", "num_layers")
    if missing := [key for key in needed if given.get(key) is None]:
        raise InputError(
            f"{path}: {', '.join(missing)} is missing; mlx-lm could not load this adapter either"
        )
    settings = {key: given[key] for key in needed} | {"keys": lora.get("keys") or None} | own
    reject_unknown(settings, NALoRAConfig.__dataclass_fields__, str(path))
    config = NALoRAConfig(**coerce(settings, NALoRAConfig, str(path)))
    weights = read_weights(directory / ADAPTER_FILE)
    config = replace(config, keys=config.keys or tuple(_keys_of(model, weights)))
    # Arrays of the rank are made on the way: a false one must not decide how large.
    ranks = {
        a.shape[-1 if a.ndim == 2 else 1] for n, a in weights.items() if n.endswith("lora_a") and a.ndim > 1
    }
    if ranks and ranks != {config.rank}:
        raise InputError(f"{path}: rank is {config.rank}, but the weights have {sorted(ranks)}")
    report = kinds[kind](model, config)
    load_weights(model, directory / ADAPTER_FILE)
    return report


def _keys_of(model: nn.Module, weights: dict[str, mx.array]) -> list[str]:
    """The keys that name the adapters of a file; mlx-lm leaves them out where it adapted everything, routers too."""
    paths = {name.rpartition(".")[0] for name in weights}
    layers = {
        f"{path}." for path, module in model.named_modules() if any(module is one for one in model.layers)
    }
    return sorted(
        {next((p.removeprefix(start) for start in layers if p.startswith(start)), p) for p in paths}
    )


def load_any_adapter(model: nn.Module, directory: Path) -> None:
    """Load what a run of any kind has left: LoRA, DoRA, or full weights.

    Raises:
        InputError: something is missing or does not fit the model.
    """
    if read_adapter_config(directory).get("fine_tune_type") == "full":
        _load(model, directory / ADAPTER_FILE, dict(tree_flatten(model.parameters())), whole=False)
    else:
        _attach(model, directory, {"lora": adapt, "dora": adapt_dora})


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Read adapter_config.json of a saved adapter.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    path = directory / ADAPTER_CONFIG
    if not path.exists():
        raise InputError(f"no adapter in {directory}: {ADAPTER_CONFIG} is missing; check --adapter-path")
    return storage.read_json(path)
