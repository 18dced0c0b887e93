"""Find and load a base model through mlx-lm, with errors that a person can act on. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.errors import InputError

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

    check_paths(name)
    path = Path(name).expanduser()
    if path.exists():
        if not (path / "config.json").exists():
            raise InputError(
                f"--model {name}: the directory has no config.json; give one that mlx-lm can load"
            )
        name = str(path)
    try:
        model, tokenizer, config = load(
            name,
            tokenizer_config={"trust_remote_code": trust_remote_code},
            return_config=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = "cannot be loaded" if path.exists() else "no such directory, and not loadable from the Hub"
        raise InputError(f"--model {name}: {where}: {reason}") from error
    if quantize is not None:
        if "quantization" in config:
            raise InputError(f"--quantize {quantize}: {name} is quantized already; leave the flag out")
        try:
            model, config = quantize_model(model, config, group_size=64, bits=quantize)
        except ValueError as error:
            raise InputError(f"--quantize {quantize}: {error}") from None
    return model, tokenizer, config


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
