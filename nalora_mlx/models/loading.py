"""Find, check and load base models through mlx-lm, with clear errors. Imports nothing heavy."""

from __future__ import annotations

import copy
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.core.device_faults import OUT_OF_MEMORY, find_fault
from nalora_mlx.core.errors import InputError, RunError, first_line, listed
from nalora_mlx.core.paths import check_paths

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.models.config_translation import Translation

INDEX = "model.safetensors.index.json"
# Measured on 24 tokens of a 4-bit model: 240 times. What half precision takes depends on the length.
SLOW_QUANTIZED = "which on a CPU takes about a hundred times as long as float32"
SLOW_HALF = "which on a CPU takes up to fifty times as long as float32"
QUANTIZATION = ("quantization", "quantization_config")  # keys that mlx-lm rewrites when it loads a model


def load_model(
    name: str,
    trust_remote_code: bool = False,
    quantize: int | None = None,
    notify: Callable[[str], None] | None = None,
    lazy: bool = False,
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Load (model, tokenizer, config) from a local directory or a Hugging Face repo.

    Args:
        name: directory or repo.
        trust_remote_code: run code that comes with the model.
        quantize: quantize the model to this many bits (affine, group size 64).
        notify: called with each setting of config.json that mlx-lm does not apply; prints to stderr by default.
        lazy: leave the weights on disk until they are used.

    Returns:
        The model, its tokenizer, and the content of config.json with the quantization that was applied.

    Raises:
        InputError: the model does not exist, cannot be downloaded, or mlx-lm cannot run it as its config says.
        RunError: there is not enough memory.
    """
    model, config = load_module(name, trust_remote_code, quantize, notify, lazy)
    return model, load_tokenizer(name, trust_remote_code), config


def load_module(
    name: str,
    trust_remote_code: bool = False,
    quantize: int | None = None,
    notify: Callable[[str], None] | None = None,
    lazy: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load (model, config) without the tokenizer; see `load_model`."""
    directory = check_files(name)
    for notice in translated(directory, name).notices:
        (notify or print_notice)(notice)
    model, config = open_module(directory, trust_remote_code, name=name, lazy=lazy)
    return quantized(model, config, quantize, name)


def quantized(
    model: nn.Module,
    config: dict[str, Any],
    bits: int | None,
    name: str,
    predicate: Callable[[str, nn.Module], bool] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return (model, config) quantized to some bits, in groups of 64; as they are if `bits` is None.

    Args:
        model: changed in place.
        config: content of config.json.
        bits: of a weight.
        name: of the model, for messages.
        predicate: whether to quantize the module at a path; None for all.

    Raises:
        InputError: the model is quantized already, or cannot be.
    """
    if bits is None:
        return model, config
    if is_quantized(config):
        raise InputError(f"--quantize {bits}: {name} is already quantized; remove the flag")
    from mlx_lm import utils

    try:
        return utils.quantize_model(model, config, group_size=64, bits=bits, quant_predicate=predicate)
    except ValueError as error:
        raise InputError(f"--quantize {bits}: {error}") from None


def print_notice(text: str) -> None:
    """Print a notice to stderr."""
    print(f"note: {text}", file=sys.stderr)


def open_module(
    directory: Path,
    trust_remote_code: bool = False,
    *,
    name: str | None = None,
    lazy: bool = False,
    wrap: Callable[[type], type] = lambda base: base,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load (model, config) from a local directory. Every command loads models here.

    Args:
        directory: the model's directory.
        trust_remote_code: run code that comes with the model.
        name: how the user named the model, for messages.
        lazy: leave the weights on disk until they are used.
        wrap: returns a subclass of the model's class to load instead.

    Returns:
        The model, and the content of config.json with the quantization that was applied.

    Raises:
        InputError: mlx-lm cannot load the model, or not as its config says.
        RunError: there is not enough memory.
    """
    from mlx_lm import utils

    from nalora_mlx.core.storage import read_json

    name = str(directory) if name is None else name
    translation = translated(directory, name)
    with loading(name):

        def classes(config: dict[str, Any]) -> tuple[type, type]:
            model, args = utils._get_classes(config)
            return wrap(model), args

        model, loaded = utils.load_model(
            directory,
            lazy=lazy,
            model_config=copy.deepcopy(translation.overrides),
            get_model_classes=classes,
            trust_remote_code=trust_remote_code,
        )
    config = read_json(directory / "config.json")
    return model, config | {key: loaded[key] for key in QUANTIZATION if key in loaded}


def translated(directory: Path, name: str | None = None) -> Translation:
    """Return how the class that mlx-lm has for a model reads its config.

    Raises:
        InputError: names the keys that change results and that the class cannot apply.
    """
    from mlx_lm.utils import load_config

    from nalora_mlx.core.storage import array_shapes
    from nalora_mlx.models.config_head import unused_head
    from nalora_mlx.models.config_translation import as_read, translate

    name = str(directory) if name is None else name
    with loading(name):
        config = load_config(directory)
        weights = [array for path in directory.glob("*.safetensors") for array in array_shapes(path)]
        translation = translate(config, weights)
        translation.notices.extend(unused_head(directory, as_read(config, translation)))
    if translation.problems:
        raise InputError(
            f"--model {name}: config.json: {listed(translation.problems)}; use another program or model"
        )
    return translation


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer without the model, in mlx-lm's wrapper; see `load_model`."""
    from mlx_lm import utils

    directory = check_files(name)
    with loading(name):
        ends = utils.load_config(directory).get("eos_token_id")
        return utils.load_tokenizer(directory, {"trust_remote_code": trust_remote_code}, eos_token_ids=ends)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn what goes wrong while a model is loaded into an InputError or a RunError that names the model."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if fault := find_fault(error):
            smaller = "use a smaller model, or a quantized one (mlx_lm.convert --quantize makes one)"
            raise RunError(
                f"--model {name}: {fault.cause} while loading ({first_line(error)}); "
                f"{smaller if fault is OUT_OF_MEMORY else fault.remedy}"
            ) from error
        what, *names = (
            line.strip(" ,.") for line in str(error).strip().splitlines() or [type(error).__name__]
        )
        what = (
            f"{what} is missing in config.json or among the weights" if isinstance(error, KeyError) else what
        )
        what += f" {listed(names, ', ')}" if what.endswith(":") else ""  # mlx lists arrays one a line
        raise InputError(f"--model {name}: cannot be loaded: {what}") from error


def slow_on_cpu_notice(name: str, quantize: int | None = None) -> str | None:
    """Say that a model will be slow, because it runs on a CPU quantized or in half precision.

    Reads config.json and the headers of the weights, so it can be called before anything slow begins.

    Args:
        name: directory or repo of the model.
        quantize: bits to which it will be quantized on loading; None to leave it as it is.

    Returns:
        The notice, with a remedy; None on a GPU, and for float32 weights.

    Raises:
        InputError: the model does not exist, cannot be downloaded, or has an invalid file.
    """
    import mlx.core as mx

    from nalora_mlx.core.storage import read_json
    from nalora_mlx.core.tensor_files import open_tensor_file

    if mx.default_device() != mx.Device(mx.cpu):
        return None
    directory = check_files(name)
    config = read_json(directory / "config.json")
    source, target = (shlex.quote(path) for path in (name, f"{Path(name).name}-float32"))
    convert = f"mlx_lm.convert --hf-path {source} --mlx-path {target} --dtype float32"
    if any(config.get(key) for key in QUANTIZATION):
        return f"{name} is quantized, {SLOW_QUANTIZED}; use a float32 copy: {convert} --dequantize"
    if quantize is not None:
        return f"--quantize {quantize} makes the model quantized, {SLOW_QUANTIZED}; remove the flag"
    files = [open_tensor_file(path) for path in directory.glob("model*.safetensors")]
    if any(tensor["dtype"] in ("F16", "BF16") for file in files for tensor in file.tensors.values()):
        return f"{name} is in half precision, {SLOW_HALF}; use a float32 copy: {convert}"
    return None


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
    index = directory / INDEX
    named = read_json(index).get("weight_map") if index.exists() else {}
    if not isinstance(named, dict) or any(Path(str(file)).name != file for file in named.values()):
        raise InputError(f"--model {name}: {INDEX} must map names to files in the same directory")
    if missing := sorted({file for file in named.values() if not (directory / file).exists()}):
        raise InputError(
            f"--model {name}: {listed(missing, ', ')} is missing, which {INDEX} lists; download the model again"
        )
    if not list(directory.glob("model*.safetensors")):
        raise InputError(f"--model {name}: {_no_weights(directory)}")
    arrays = sum(len(array_shapes(path)) for path in directory.glob("*.safetensors"))
    for key, value in _settings(config):
        # mlx-lm builds all layers before it compares them with the weights.
        if re.fullmatch(r"(num|n)(_hidden)?_layers?", key) and isinstance(value, int) and value > arrays:
            raise InputError(
                f"--model {name}: config.json has {key} {value}, the weights only {arrays} arrays"
            )
    return directory


def _no_weights(directory: Path) -> str:
    """Say which weights a directory has instead of those that mlx-lm reads, and what to do."""
    missing = "the directory has no model*.safetensors, which mlx-lm reads"
    convert = (
        "load it in transformers and save it: AutoModelForCausalLM.from_pretrained({}).save_pretrained(NEW)"
    )
    if list(directory.glob("*.bin")):
        return f"{missing}, only *.bin; {convert.format('DIR')}"
    if files := sorted(directory.glob("*.gguf")):
        return f"{missing}, only GGUF; {convert.format(f'DIR, gguf_file={files[0].name!r}')}"
    return f"{missing}; download the model again"


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield all keys and values of a config, including those of nested objects."""
    for key, value in config.items() if isinstance(config, dict) else ():
        yield key, value
        yield from _settings(value)
