"""Load a base model through mlx-lm, with errors that a person can act on."""

from pathlib import Path
from typing import Any

import mlx.nn as nn

from nalora_mlx.errors import InputError


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

    path = Path(name).expanduser()
    if path.exists():
        if not (path / "config.json").exists():
            raise InputError(
                f"--model {name}: the directory has no config.json; give one that mlx-lm can load"
            )
        name = str(path)
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(
            f"--model {name}: no such directory, and no Hugging Face repo (these are owner/name)"
        )
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
