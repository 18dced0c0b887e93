"""Models and adapters as users name them: local directories, or repos on the Hugging Face Hub."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from nalora_mlx.core.errors import InputError


def expanded(name: str) -> str | Path:
    """Expand ~ in a local path; return the name of a Hugging Face repo unchanged."""
    path = Path(name).expanduser()
    return path if path.exists() else name


def check_paths(model: str | None, adapter: str | None = None, flag: str = "--model") -> None:
    """Check that a local model and an adapter exist, before anything slow.

    Raises:
        InputError: names the flag and the missing file or directory.
    """
    if (
        model is not None
        and not Path(model).expanduser().exists()
        and (model[:1] in "./~" or model.count("/") != 1)
    ):
        raise InputError(
            f"{flag} {model}: no such directory, and not the name of a Hugging Face repo (owner/name)"
        )
    if adapter is not None:
        for name in ("adapter_config.json", "adapters.safetensors"):
            if not (Path(adapter).expanduser() / name).exists():
                raise InputError(
                    f"--adapter-path {adapter}: has no {name}; give the directory of a trained adapter"
                )


def nalora_command() -> str:
    """Return how the user starts nalora; scripts/environment.sh sets NALORA_COMMAND."""
    return os.environ.get("NALORA_COMMAND") or "nalora"


def as_typed(words: Sequence[str]) -> list[str]:
    """Return a command with `nalora` as the user starts it."""
    return [*shlex.split(nalora_command()), *words[1:]] if words[:1] == ["nalora"] else list(words)


def is_hub_name(name: str) -> bool:
    """Return whether a name has the form of a Hub repo (owner/name) and is not a local path."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).expanduser().exists()


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of each path, as many as are needed to distinguish all."""
    resolved = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, resolved), default=0) + 1):
        names = ["/".join(parts[-count:]) for parts in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
