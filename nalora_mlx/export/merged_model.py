"""A merged model's directory: its weights, its config, and the base's other files byte for byte.

The weights have the names and the layout that mlx-lm gives them or, with `KeptNames`, those of the base's files.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from nalora_mlx.adapters.merge import merged_quantization
from nalora_mlx.adapters.merge_record import RECORD_KEY
from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.tensor_files import copy_with_replaced
from nalora_mlx.core.trees import nbytes
from nalora_mlx.models.loading import INDEX
from nalora_mlx.models.model_files import ModelFiles
from nalora_mlx.models.stored_tensors import StoredTensors

QUANTIZED_LEAVES = ("weight", "scales", "biases")  # arrays of a layer that a merge changes


@dataclass(frozen=True)
class MergedModel:
    """A merged model, ready to be written.

    Attributes:
        base: directory of the base model.
        model: the merged model.
        merged: the merged layers by path.
        files: the base's other files.
        kept: where the merged arrays belong in the base's files; None to write mlx-lm's names.
        record: of the merged adapters, for config.json.
    """

    base: Path
    model: nn.Module
    merged: dict[str, nn.Module]
    files: ModelFiles
    kept: "KeptNames | None" = None
    record: Mapping[str, Any] = field(default_factory=dict)

    def nbytes(self) -> int:
        """Return the size of the directory in bytes, without headers, config and model card."""
        if self.kept is None:
            return self.files.nbytes() + nbytes(self.model.parameters())
        stored = sum(file.path.stat().st_size for file in self.kept.stored.files)
        return self.files.nbytes() + stored + _growth(self.kept.stored, self.kept.replaced(self.model))

    def write(self, target: Path) -> None:
        """Write all files but the model card into an existing directory.

        Raises:
            OSError: the disk is full, or the target is not writable.
        """
        self.files.write(target)
        (target / "config.json").write_bytes(with_record(self._config(), self.record))
        if self.kept is None:
            _write_weights(self.model, target)
        else:
            _write_kept_weights(self.kept, self.model, self.base, target)

    def _config(self) -> bytes:
        path = self.base / "config.json"
        before = storage.read_json(path).get("quantization")
        if self.kept is not None and before is None:  # the files keep the form that the config describes
            return path.read_bytes()
        quantization = merged_quantization(before, self.model, self.merged)
        return _merged_config(path, self.kept.quantization(quantization) if self.kept else quantization)


# --- config -------------------------------------------------------------------------------------------------


def _merged_config(path: Path, quantization: Mapping[str, Any] | None) -> bytes:
    """Return the content of a merged model's config.json: the base's, but for what it says about quantization.

    Args:
        path: of the base's config.json.
        quantization: how the merged model is quantized; None if it is not.
    """
    config = storage.read_json(path)
    before = json.dumps(config)
    places = [config, *filter(None, [config.get("text_config")])]
    if quantization is None and (config.get("quantization_config") or {}).get("quant_method") != "bitnet":
        # MLX does not count the layers of bitnet as quantized, but its class needs the entry.
        for place in places:
            place.pop("quantization", None)
            place.pop("quantization_config", None)
    elif quantization is not None and config.get("quantization") != quantization:
        config["quantization"] = quantization
        for place in places:
            if "quantization_config" in place:
                place["quantization_config"] = quantization
    return path.read_bytes() if json.dumps(config) == before else _json_bytes(config)


def with_record(config: bytes, record: Mapping[str, Any]) -> bytes:
    """Return the content of a config.json with the record of the merged adapters; the rest keeps its bytes."""
    content = json.loads(config)
    if not record or RECORD_KEY in content:
        return _json_bytes(content | {RECORD_KEY: record}) if record else config
    text = config.decode().rstrip().removesuffix("}").rstrip()
    return f'{text}{"," if content else ""}\n    "{RECORD_KEY}": {json.dumps(record)}\n}}\n'.encode()


def _json_bytes(content: Any) -> bytes:
    return json.dumps(content, indent=4, ensure_ascii=False).encode()  # as mlx-lm writes it


# --- weights under mlx-lm's names -----------------------------------------------------------------------------


def _write_weights(model: nn.Module, target: Path) -> None:
    """Write a model's weights as mlx-lm does: shards of at most 5 GB and an index.

    Raises:
        OSError: the disk is full, or the target is not writable.
    """
    from mlx_lm import utils

    weights = dict(tree_flatten(model.parameters()))
    shards = utils.make_shards(weights)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        storage.arrays_writer(shard)(target / name)
    files = {array: name for name, shard in zip(names, shards, strict=True) for array in shard}
    metadata = {
        "total_size": sum(array.nbytes for array in weights.values()),
        "total_parameters": utils.get_total_parameters(model),
    }
    _write_index(target, metadata, files)


def _write_index(target: Path, metadata: Mapping[str, Any], files: Mapping[str, str]) -> None:
    content = {"metadata": metadata, "weight_map": dict(sorted(files.items()))}
    (target / INDEX).write_bytes(_json_bytes(content))


# --- weights under the base's names ---------------------------------------------------------------------------


@dataclass(frozen=True)
class KeptNames:
    """Where the arrays that a merge changes belong in the base's files.

    Attributes:
        stored: the tensors of the base.
        arrays: paths in the model of arrays that change, with their stored names; also of new ones.
    """

    stored: StoredTensors
    arrays: dict[str, str]

    def replaced(self, model: nn.Module) -> dict[str, mx.array | None]:
        """Return the arrays of the merged model by stored name, and None for those that it no longer has."""
        found = dict(tree_flatten(model.parameters()))
        return {
            name: found.get(path)
            for path, name in self.arrays.items()
            if path in found or path in self.stored.names
        }

    def quantization(self, quantization: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Return what a config says about quantization, with the layers under their stored names too.

        mlx-vlm names layers as the files do, mlx-lm as its own classes do.
        """
        if quantization is None:
            return None
        return dict(quantization) | {
            name.removesuffix(".weight"): quantization[path.removesuffix(".weight")]
            for path, name in self.arrays.items()
            if path.endswith(".weight") and path.removesuffix(".weight") in quantization
        }


def keep_names(stored: StoredTensors, layers: list[str], arrays: list[str]) -> KeptNames:
    """Find the stored names of arrays that a merge will change.

    Args:
        stored: the tensors of the base.
        layers: paths of layers whose weights change, and with them perhaps their quantization.
        arrays: paths of other arrays that change.

    Raises:
        InputError: arrays are stored in another form than the model uses; names them.
    """
    found: dict[str, str] = {}
    lost = []
    for path in layers:
        name = stored.names.get(f"{path}.weight")
        if name is None:
            lost.append(f"{path}.weight")
            continue
        prefix = name.removesuffix("weight")
        found |= {
            f"{path}.{leaf}": stored.names.get(f"{path}.{leaf}", prefix + leaf) for leaf in QUANTIZED_LEAVES
        }
        found[f"{path}.weight"] = name
    for path in arrays:
        if path in stored.names:
            found[path] = stored.names[path]
        else:
            lost.append(path)
    if lost:
        raise InputError(
            f"--keep-all: these weights are stored in another form than mlx-lm uses (split, stacked, transposed, "
            f"shifted or packed), so that the merged ones cannot be written back: {listed(lost, ', ')}; leave "
            "--keep-all out, or train without these layers (--keys)"
        )
    return KeptNames(stored, found)


def _write_kept_weights(kept: KeptNames, model: nn.Module, base: Path, target: Path) -> None:
    """Copy the base's weight files with the merged arrays in them, and its index.

    Raises:
        OSError: the disk is full, or the target is not writable.
    """
    replaced = kept.replaced(model)
    homes = {name: file.path.name for file in kept.stored.files for name in file.tensors}
    for path, name in kept.arrays.items():
        if name not in homes:  # new arrays go where their layer's weight is
            homes[name] = homes[kept.arrays[f"{path.rpartition('.')[0]}.weight"]]
    for file in kept.stored.files:
        changed = {
            name: array
            for name, array in replaced.items()
            if name in file.tensors or homes[name] == file.path.name
        }
        if changed:
            copy_with_replaced(file, target / file.path.name, changed)
        else:
            shutil.copyfile(file.path, target / file.path.name)
    if (base / INDEX).exists():
        index = storage.read_json(base / INDEX)
        before = json.dumps(index)
        index["weight_map"] |= {name: homes[name] for name, array in replaced.items() if array is not None}
        for name, array in replaced.items():
            if array is None:
                index["weight_map"].pop(name, None)
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += _growth(kept.stored, replaced)
        unchanged = json.dumps(index) == before
        (target / INDEX).write_bytes((base / INDEX).read_bytes() if unchanged else _json_bytes(index))


def _growth(stored: StoredTensors, replaced: Mapping[str, mx.array | None]) -> int:
    """Return by how many bytes tensors grow when some are replaced."""
    before = sum(file.nbytes(name) for file in stored.files for name in file.tensors if name in replaced)
    return sum(array.nbytes for array in replaced.values() if array is not None) - before
