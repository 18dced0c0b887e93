"""The tensors in a model's files: which of them the loaded model uses, and under which names.

A model class of mlx-lm renames, splits, stacks or drops the tensors of a checkpoint in its `sanitize`. It drops those
of a vision tower, for example. Those of mlx-vlm do so in one `sanitize` for the model and one for each tower. Here they
run once more on lazy arrays, and two things are read off:

1. An array that comes out as the same object is used as it is stored, under the name that it has afterwards.
2. Any other array is used if one that comes out is computed from it, which the graph of MLX tells.
"""

import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from nalora_mlx.core.storage import read_json
from nalora_mlx.core.tensor_files import TensorFile, open_tensor_file
from nalora_mlx.models.loading import INDEX
from nalora_mlx.models.vision.model import is_vision_language_model

_MOST_NAMES = 1000  # of arrays in one call of `export_to_dot`; Python passes at most 1024 keyword arguments


@dataclass(frozen=True)
class StoredTensors:
    """The tensors in a model's files.

    Attributes:
        files: the files that hold the model's weights.
        names: stored names by path in the loaded model, of arrays that the model uses as they are stored.
        unused: stored names of tensors that the loaded model does not use.
    """

    files: list[TensorFile]
    names: dict[str, str]
    unused: list[str]

    @property
    def file_names(self) -> set[str]:
        """The names of the files."""
        return {file.path.name for file in self.files}

    @property
    def has_own_layout(self) -> bool:
        """Whether mlx-lm keeps some of the tensors under other names, or in another form."""
        used = {name for file in self.files for name in file.tensors} - set(self.unused)
        return any(self.names.get(name) != name for name in used)

    def describe_unused(self) -> str:
        """Return the unused tensors by prefix, with count and size; an empty text if all are used."""
        sizes = {name: file.nbytes(name) for file in self.files for name in file.tensors}
        groups: dict[str, list[str]] = {}
        for name, prefix in _prefixes(self.unused, sizes.keys() - set(self.unused)).items():
            groups.setdefault(prefix, []).append(name)
        return ", ".join(
            f"{prefix} ({len(names)} tensors, {format_bytes(sum(sizes[name] for name in names))})"
            if names != [prefix]
            else f"{prefix} ({format_bytes(sizes[prefix])})"
            for prefix, names in groups.items()
        )


def find_stored_tensors(model: nn.Module, directory: Path) -> StoredTensors:
    """Return the tensors in a model's files. `model` is as loaded from them, without adapters.

    Raises:
        InputError: a file is damaged.
    """
    index = directory / INDEX
    named = set(read_json(index).get("weight_map", {}).values()) if index.exists() else set()
    loaded = {path.name for path in directory.glob("model*.safetensors")}  # what mlx-lm loads
    files = [
        open_tensor_file(directory / name) for name in sorted(named | loaded) if (directory / name).is_file()
    ]
    stored: dict[str, mx.array] = {}
    for file in files:
        if file.path.name in loaded:
            stored |= mx.load(str(file.path))  # type: ignore[arg-type]
    result = _sanitized(model, directory, stored)
    name_of = {id(array): name for name, array in stored.items()}
    names = {path: name_of[id(array)] for path, array in result.items() if id(array) in name_of}
    rest = {name: stored[name] for name in stored.keys() - set(names.values())}
    used = set(names.values()) | _inputs(rest, result.values())
    return StoredTensors(files, names, [name for file in files for name in file.tensors if name not in used])


def reads_own_names(model: nn.Module, directory: Path) -> bool:
    """Return whether weights that are stored under a model's own paths are loaded as they are.

    Args:
        model: a model of mlx-vlm or mlx-lm.
        directory: of its base's config.json.
    """
    weights = dict(tree_flatten(model.parameters()))
    result = _sanitized(model, directory, weights)
    return result.keys() == weights.keys() and all(result[path] is weights[path] for path in weights)


def _sanitized(model: nn.Module, directory: Path, stored: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Return stored arrays under the names, and in the form, that the model has them.

    `sanitize` is called on new models, because some classes also change themselves there.
    """
    if not is_vision_language_model(model):
        args: Any = getattr(model, "args", None) or model.config  # mlx-lm has both names
        sanitize: Any = getattr(type(model)(args), "sanitize", dict)
        result: dict[str, mx.array] = sanitize(dict(stored))
        return result
    from mlx_vlm.utils import get_model_and_args, sanitize_weights

    package, _ = get_model_and_args(read_json(directory / "config.json"), directory)
    result = sanitize_weights(package.Model(model.config), dict(stored))
    for tower, name in (("VisionModel", "vision"), ("LanguageModel", "text"), ("AudioModel", "audio")):
        config = getattr(model.config, f"{name}_config", None)
        if hasattr(package, tower) and config is not None:
            result = sanitize_weights(getattr(package, tower), result, config)
    return result


def _inputs(arrays: Mapping[str, mx.array], outputs: Iterable[mx.array]) -> set[str]:
    """Return the names of the arrays that outputs are computed from."""
    outputs = list(outputs)
    found: set[str] = set()
    names = list(arrays)
    for start in range(0, len(names), _MOST_NAMES):
        part = names[start : start + _MOST_NAMES]
        graph = io.StringIO()
        mx.export_to_dot(graph, *outputs, **{f"input{i}": arrays[name] for i, name in enumerate(part)})
        found |= {part[int(i)] for i in re.findall(r'^"input(\d+)" ->', graph.getvalue(), re.MULTILINE)}
    return found


def _prefixes(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Return for each name its shortest dotted prefix that no other name has.

    Where prefixes differ in a number only, as those of one tensor of each layer do, the number becomes an asterisk.
    """
    taken = {prefix for name in others for prefix in _dotted_prefixes(name)}
    found = {
        name: next((prefix for prefix in _dotted_prefixes(name) if prefix not in taken), name)
        for name in names
    }
    groups: dict[str, set[str]] = {}
    for prefix in found.values():
        groups.setdefault(_without_numbers(prefix), set()).add(prefix)
    return {
        name: pattern if len(groups[pattern := _without_numbers(prefix)]) > 1 else prefix
        for name, prefix in found.items()
    }


def _dotted_prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _without_numbers(prefix: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", prefix)


def format_bytes(size: int) -> str:
    """Return a size with its unit."""
    value, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
