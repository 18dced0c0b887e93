"""Paths of models and adapters as users give them: local directories or names on the Hugging Face Hub."""

import re
from pathlib import Path

from nalora_mlx.core.errors import InputError


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


def is_hub_name(name: str) -> bool:
    """Whether a name is one of the Hub (owner/name), and no path on this machine."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).expanduser().exists()
