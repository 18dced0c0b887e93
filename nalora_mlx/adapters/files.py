"""The files of an adapter, adapters.safetensors and adapter_config.json: describe, write, read, validate and load them.

mlx-lm reads and writes the same two files. Ours have the NA settings, and how chats were rendered in training, under
keys of their own, which mlx-lm ignores.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from nalora_mlx.adapters.attach import AdaptResult, adapt, adapt_dora, adapt_result
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig, NAParameters
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.parsing import coerce, reject_unknown
from nalora_mlx.core.template_args import template_args_problems
from nalora_mlx.models.chat_templates import ChatSettings, check_template
from nalora_mlx.models.vision.model import is_vision_language_model

ADAPTER_FILE = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
NA_KEY = "na_lora"  # the NA settings in adapter_config.json
CHAT_KEY = "chat_template"  # the chat settings, unless they are the tokenizer's own
IMAGES_KEY = "images"  # true if the adapted model was one of mlx-vlm
FINE_TUNE_TYPES = ("lora", "dora", "full")


# --- describing and writing ---------------------------------------------------------------------------------


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """Return a model's trainable arrays by path, the content of adapters.safetensors."""
    return dict(tree_flatten(model.trainable_parameters()))


def adapter_config(model: nn.Module, chat: ChatSettings | None = None) -> dict[str, Any]:
    """Return the content of adapter_config.json for an adapted model whose chats were rendered with these settings.

    Raises:
        InputError: The model has no adapters.
    """
    result = adapt_result(model)
    if result is None:
        raise InputError("the model has no adapters; call adapt first")
    config = result.config
    return {
        "fine_tune_type": result.fine_tune_type,
        "num_layers": config.num_layers,
        "lora_parameters": config.lora_parameters,
        NA_KEY: config.na_parameters,
        **({IMAGES_KEY: True} if is_vision_language_model(model) else {}),
        **chat_entry(chat),
    }


def chat_entry(chat: ChatSettings | None) -> dict[str, Any]:
    """Return the entry of adapter_config.json that holds chat settings; nothing for the tokenizer's own."""
    given = {name: value for name, value in asdict(chat or ChatSettings()).items() if value}
    return {CHAT_KEY: given} if given else {}


def adapter_files(model: nn.Module, config: Mapping[str, Any] | None) -> dict[str, storage.Writer]:
    """Return writers of an adapter's two files; `config` is the content of adapter_config.json."""
    return {
        ADAPTER_FILE: storage.arrays_writer(adapter_weights(model)),
        ADAPTER_CONFIG: storage.json_writer(config),
    }


# --- reading and validating ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterConfig:
    """The content of adapter_config.json, validated as far as mlx-lm uses it.

    Attributes:
        path: of the file, for error messages.
        fine_tune_type: one of FINE_TUNE_TYPES.
        lora: rank, scale, dropout, keys (None if the file has none) and num_layers; None for full weights.
        na_parameters: the NA settings as written, not validated; see `nalora_config`.
        chat: how chats were rendered in training.
    """

    path: Path
    fine_tune_type: str
    lora: NALoRAConfig | None = None
    na_parameters: Any = None
    chat: ChatSettings = ChatSettings()

    def nalora_config(self) -> NALoRAConfig:
        """Return the LoRA and NA settings.

        Raises:
            InputError: An NA setting is unknown or invalid, or the file is not of LoRA or DoRA.
        """
        if self.lora is None:
            raise InputError(f"{self.path}: holds full weights, not an adapter")
        where = f"{self.path}: {NA_KEY}"
        reject_unknown(self.na_parameters, NAParameters.__dataclass_fields__, where)
        given = coerce(self.na_parameters, NAParameters, where)
        return _build_config(
            self.path, self.lora.lora_parameters | {"num_layers": self.lora.num_layers} | given
        )


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Read adapter_config.json without validating its content.

    Raises:
        InputError: There is none, or it does not hold a JSON object.
    """
    path = directory / ADAPTER_CONFIG
    if not path.exists():
        raise InputError(f"no adapter in {directory}: {ADAPTER_CONFIG} is missing; check --adapter-path")
    return storage.read_json(path)


def parse_adapter_config(content: Mapping[str, Any], path: Path) -> AdapterConfig:
    """Validate the content of adapter_config.json; `path` is for error messages.

    Raises:
        InputError: Settings that mlx-lm needs are missing, of the wrong type or out of range; lists them.
    """
    kind = content.get("fine_tune_type", "lora")
    if kind not in FINE_TUNE_TYPES:
        raise InputError(f"{path}: fine_tune_type is {kind!r}; it takes {', '.join(FINE_TUNE_TYPES)}")
    chat = _parse_chat(content, path)
    if kind == "full":
        return AdapterConfig(path, kind, chat=chat)
    lora = content.get("lora_parameters")
    if not isinstance(lora, Mapping):
        raise InputError(
            f"{path}: lora_parameters is missing or not an object; give the directory of an adapter"
        )
    given = {name: lora.get(name) for name in ("rank", "scale", "dropout", "keys")}
    given["num_layers"] = content.get("num_layers")
    if missing := [name for name, value in given.items() if value is None and name != "keys"]:
        raise InputError(f"{path}: {', '.join(missing)} is missing; mlx-lm cannot load this adapter either")
    config = _build_config(path, coerce(given, NALoRAConfig, str(path)))
    return AdapterConfig(path, kind, config, content.get(NA_KEY, {}), chat)


def _parse_chat(content: Mapping[str, Any], path: Path) -> ChatSettings:
    given, where = content.get(CHAT_KEY, {}), f"{path}: {CHAT_KEY}"
    reject_unknown(given, ChatSettings.__dataclass_fields__, where)
    template, args, date = given.get("template"), given.get("args", {}), given.get("date")
    problems = template_args_problems(args)
    if not isinstance(template, str | None):
        problems.append(f"template is {template!r}, not text")
    try:
        datetime.fromisoformat("2000-01-01" if date is None else date)
    except (TypeError, ValueError):
        problems.append(f"date is {date!r}, not a date such as 2026-01-31T12:00:00")
    if problems:
        raise InputError(f"{where}: " + "; ".join(problems))
    if template is not None:
        check_template(template, f"{where}: line")
    return ChatSettings(template, args, date)


def _build_config(path: Path, settings: Mapping[str, Any]) -> NALoRAConfig:
    try:
        return NALoRAConfig(**settings)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def check_adapter(path: str | Path) -> None:
    """Check an adapter's files before mlx-lm loads them, and before memory is allocated as they say.

    Raises:
        InputError: See `read_adapter`.
    """
    read_adapter(Path(path).expanduser())


def read_chat_settings(directory: Path) -> ChatSettings:
    """Return how chats were rendered in an adapter's training.

    Raises:
        InputError: adapter_config.json is missing, or these settings in it are invalid.
    """
    return _parse_chat(read_adapter_config(directory), directory / ADAPTER_CONFIG)


def read_adapter(directory: Path) -> tuple[AdapterConfig, dict[str, mx.array]]:
    """Read an adapter's two files, and check all that can be checked without the model.

    Raises:
        InputError: A file is missing or damaged, a setting is invalid, the rank is not that of the weights, or weights
            are NaN or infinite.
    """
    config = parse_adapter_config(read_adapter_config(directory), directory / ADAPTER_CONFIG)
    weights = read_weights(directory / ADAPTER_FILE)
    if config.lora is not None:
        _check_rank(config.path, config.lora.rank, weights)
    check_finite(weights, directory / ADAPTER_FILE)
    return config, weights


def _check_rank(path: Path, rank: int, weights: Mapping[str, mx.array]) -> None:
    """Raise InputError if the rank in a config is not that of all lora_a: [D, r], or [E, r, D] with experts."""
    ranks = {
        name: array.shape[-1 if array.ndim == 2 else 1]
        for name, array in weights.items()
        if name.endswith("lora_a") and array.ndim > 1
    }
    wrong = sorted(name.removesuffix(".lora_a") for name, found in ranks.items() if found != rank)
    if wrong or not ranks:
        where = f" ({listed(wrong, ', ')})" if wrong else ""
        raise InputError(f"{path}: rank is {rank}, but the weights have {sorted({*ranks.values()})}{where}")


def check_finite(arrays: Mapping[str, mx.array], path: Path) -> None:
    """Raise InputError if arrays of a file hold NaN or infinity; the message names them."""
    if wrong := not_finite(arrays):
        raise InputError(
            f"{path}: NaN or infinite values in {listed(wrong, ', ')}; use an earlier checkpoint, or train again"
        )


def not_finite(arrays: Mapping[str, mx.array]) -> list[str]:
    """Return the names of arrays that hold NaN or infinity."""
    finite = {name: mx.all(mx.isfinite(array)) for name, array in arrays.items()}
    mx.eval(finite)  # all at once: each evaluation waits for the device
    return sorted(name for name, is_finite in finite.items() if not is_finite.item())


# --- loading ------------------------------------------------------------------------------------------------


def load_adapter(model: nn.Module, directory: str | Path) -> AdaptResult:
    """Adapt a base model as a saved LoRA adapter was, and load its weights.

    Args:
        model: the base model.
        directory: of adapters.safetensors and adapter_config.json, written here or by mlx-lm.

    Raises:
        InputError: A file is missing or invalid, the adapter is not LoRA, or it does not fit the model.
    """
    config, weights = read_adapter(Path(directory))
    if config.fine_tune_type != "lora":
        raise InputError(f"{config.path}: fine_tune_type is {config.fine_tune_type!r}, not 'lora'")
    return _attach(model, config, weights)


def load_any_adapter(model: nn.Module, directory: Path) -> None:
    """Load the result of any kind of fine-tuning into a base model: LoRA, DoRA or full weights.

    Raises:
        InputError: A file is missing or invalid, or does not fit the model.
    """
    config, weights = read_adapter(directory)
    if config.fine_tune_type == "full":
        expected = dict(tree_flatten(model.parameters()))
        _assign(model, directory / ADAPTER_FILE, weights, expected, require_all=False)
    else:
        _attach(model, config, weights)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the trainable arrays of an adapted model from a safetensors file.

    Raises:
        InputError: The file is missing or damaged, or does not fit the model; lists the arrays and both shapes.
    """
    _assign(model, path, read_weights(path), adapter_weights(model), require_all=True)


def read_weights(path: Path) -> dict[str, mx.array]:
    """Read the arrays of a safetensors file.

    Raises:
        InputError: The file is missing or damaged.
    """
    if not path.exists():
        raise InputError(f"no adapter weights at {path}")
    return storage.read_arrays(path)


def _attach(model: nn.Module, config: AdapterConfig, weights: Mapping[str, mx.array]) -> AdaptResult:
    """Adapt a base model as a config of LoRA or DoRA says, and load the weights."""
    settings = config.nalora_config()
    settings = replace(settings, keys=settings.keys or tuple(_keys_of(model, weights)))
    result = (adapt_dora if config.fine_tune_type == "dora" else adapt)(model, settings)
    path = config.path.parent / ADAPTER_FILE
    _assign(model, path, weights, adapter_weights(model), require_all=True)
    return result


def _keys_of(model: nn.Module, weights: Mapping[str, mx.array]) -> list[str]:
    """Return the keys that name a file's adapters; without keys, mlx-lm adapts every module, routers included."""
    paths = {name.rpartition(".")[0] for name in weights}
    layer_ids = {id(layer) for layer in model.layers}
    layers = [f"{path}." for path, module in model.named_modules() if id(module) in layer_ids]
    return sorted(
        {next((p.removeprefix(layer) for layer in layers if p.startswith(layer)), p) for p in paths}
    )


def _assign(
    model: nn.Module,
    path: Path,
    weights: Mapping[str, mx.array],
    expected: Mapping[str, mx.array],
    require_all: bool,
) -> None:
    """Load the arrays of a file into a model, in its dtypes, if names and shapes agree and all values are finite."""
    problems = [f"{name} is missing" for name in expected if name not in weights and require_all]
    for name, array in weights.items():
        if name not in expected:
            problems.append(f"{name} is not a trainable array of the model")
        elif array.shape != expected[name].shape:
            problems.append(f"{name} is {array.shape}, the model has {expected[name].shape}")
        elif not mx.issubdtype(array.dtype, mx.floating):
            problems.append(f"{name} is {array.dtype}, not floating-point")
    if problems:
        raise InputError(
            f"{path} does not fit the model (same --rank, --keys and --num-layers?): {listed(problems)}"
        )
    arrays = {name: array.astype(expected[name].dtype) for name, array in weights.items()}
    check_finite(arrays, path)  # also of what a narrower dtype cannot hold
    model.load_weights(list(arrays.items()), strict=False)
