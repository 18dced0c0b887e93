"""The names by which requests choose a model: the base model, or the base with one of several adapters."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.paths import expanded

BASE = "default_model"  # mlx-lm's name of the model in requests that name none
_NAME = re.compile(r"[\w.:-]+")


@dataclass(frozen=True)
class ServedModels:
    """A base model and its adapters.

    Attributes:
        base: directory or Hugging Face repo of the base model.
        adapter: directory of the only adapter, which answers every request; None without one, or if they are named.
        adapters: name -> directory. If there are any, requests choose one of them or the base.
    """

    base: str
    adapter: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        """Names of the models, as a server lists them: the base as mlx-lm does, by its absolute path or Hub name."""
        path = Path(self.base)
        return [str(path.resolve()) if path.exists() else self.base, *self.adapters]

    def find(self, name: str) -> str | None:
        """Return BASE or the name of an adapter for the model that a request names; None if there is no such model."""
        if not self.adapters or name in (BASE, "base", self.base, self.ids[0]):
            return BASE
        return name if name in self.adapters else None


def parse_adapters(base: str, values: Sequence[str]) -> ServedModels:
    """Read the values of --adapter-path: one directory, or several as NAME=DIR or DIR, which is named by its last part.

    Raises:
        InputError: two have the same name, or one has a name of the base model; lists them.
    """
    base = str(expanded(base))
    parts = [_split(value) for value in values]
    if len(parts) == 1 and parts[0][0] is None:
        return ServedModels(base, parts[0][1])
    adapters: dict[str, str] = {}
    problems = []
    for name, directory in parts:
        name = name or Path(directory).resolve().name
        if ServedModels(base, adapters={"": ""}).find(name) == BASE:
            problems.append(
                f"--adapter-path {name}={directory}: {name} is the base model; choose another NAME"
            )
        elif name in adapters:
            problems.append(
                f"--adapter-path {directory}: the name {name} is taken by {adapters[name]}; give NAME=DIR"
            )
        else:
            adapters[name] = directory
    if problems:
        raise InputError(listed(problems))
    return ServedModels(base, adapters=adapters)


def _split(value: str) -> tuple[str | None, str]:
    """Return (name, directory). A directory whose own path has an equals sign has no name."""
    name, equals, directory = value.partition("=")
    if not equals or not _NAME.fullmatch(name) or Path(value).expanduser().exists():
        return None, str(Path(value).expanduser())
    return name, str(Path(directory).expanduser())
