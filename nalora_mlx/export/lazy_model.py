"""A model as its directory holds it: weights stay on disk until they are read, quantized ones are read as plain."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from nalora_mlx.adapters import layouts
from nalora_mlx.adapters.targets import EMBEDDING
from nalora_mlx.core.errors import InputError


@dataclass(frozen=True)
class Source:
    """One weight as the model holds it: lazy arrays, read when `read` asks for them.

    `weight` [(experts,) rows, columns], packed where there are scales; `shape` is that of the plain weight. `kind` is
    "linear", "experts", "embedding", or "other" for what no adapter fits. `change` is what an adapter makes of a
    part of the plain weight: (the part, its index) -> the part, float32.
    """

    weight: mx.array
    shape: tuple[int, ...]
    scales: mx.array | None = None
    biases: mx.array | None = None
    global_scale: mx.array | None = None
    packing: dict[str, Any] | None = None  # group_size, bits, mode
    kind: str = "other"
    change: Callable[[mx.array, tuple[Any, ...]], mx.array] | None = None

    def read(self, index: tuple[Any, ...]) -> np.ndarray:
        """Return the part of the plain weight at `index` (rows, or expert and rows), float32."""
        part = self._plain(index)
        return np.array(part if self.change is None else self.change(part, index))

    def _plain(self, index: tuple[Any, ...]) -> mx.array:
        if self.scales is None or self.packing is None:
            return self.weight[index].astype(mx.float32)
        scales, biases, whole = self.scales[index], self.biases, self.global_scale
        if biases is not None:  # dequantize() rounds to the dtype of its scales
            scales, biases = scales.astype(mx.float32), biases[index].astype(mx.float32)
        if whole is not None and whole.ndim:  # one per expert
            whole = whole[index[0]]
        packed = self.weight[index]
        return mx.dequantize(packed, scales, biases, **self.packing, global_scale=whole, dtype=mx.float32)


@dataclass(frozen=True)
class LazyModel:
    """A model that is open for reading.

    `args` is its ModelArgs, `sources` its tensors by path, `layers` the paths of its layers, first to last;
    `problems` says which tensors are missing, superfluous or of another shape, one line each. The model itself is
    not kept: it would hold every weight that was read.
    """

    directory: Path
    config: dict[str, Any]
    args: Any
    sources: dict[str, Source]
    layers: list[str]
    problems: list[str]


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json of a model.

    Raises:
        InputError: there is none, or it is not that of an mlx-lm model.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; give the directory of an mlx-lm model") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{path}: has no model_type; give the directory of an mlx-lm model")
    return config


def open_model(directory: Path) -> LazyModel:
    """Open a model as mlx-lm does, with lazy weights.

    mlx-lm's own classes say which tensors there must be, in which shapes, and how each is quantized.

    Raises:
        InputError: mlx-lm cannot open it, or its config lacks keys.
    """
    from mlx_lm import utils

    config = read_config(directory)
    try:
        base, args_class = utils._get_classes(config)
    except (ValueError, KeyError, ImportError) as error:
        raise InputError(f"{directory}: mlx-lm cannot open this model: {error}") from error
    needed = [
        f.name
        for f in dataclasses.fields(args_class)
        if f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing := [key for key in needed if key not in config]:
        raise InputError(f"{directory / 'config.json'}: has no {', '.join(missing)}")
    problems: list[str] = []

    class Checked(base):  # type: ignore[misc, valid-type]
        def load_weights(self, weights: Any, strict: bool = True) -> Any:
            problems.extend(_mismatches(dict(tree_flatten(self.parameters())), dict(weights)))
            return super().load_weights(weights, strict=False)

    try:
        model, _ = utils.load_model(
            directory, lazy=True, get_model_classes=lambda config: (Checked, args_class)
        )
    except Exception as error:  # whatever a stranger's config makes of mlx-lm's classes
        raise InputError(f"{directory}: mlx-lm cannot open this model: {error}") from error
    paths = {id(module): path for path, module in model.named_modules()}
    layers = [paths[id(layer)] for layer in model.layers]
    return LazyModel(directory, config, model.args, _sources(model), layers, problems)


def _sources(model: nn.Module) -> dict[str, Source]:
    sources = {}
    for prefix, module in model.named_modules():
        plain = {
            leaf: value for leaf, value in module.items() if isinstance(value, mx.array) and leaf[0] != "_"
        }
        if "scales" in plain:
            weight, scales = plain.pop("weight"), plain.pop("scales")
            shape = (*weight.shape[:-1], weight.shape[-1] * 32 // module.bits)
            packing = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            biases, whole = plain.pop("biases", None), plain.pop("global_scale", None)
            source = Source(weight, shape, scales, biases, whole, packing, _kind(module))
            sources[f"{prefix}.weight"] = source
        for leaf, value in plain.items():
            kind = _kind(module) if leaf == "weight" else "other"
            sources[f"{prefix}.{leaf}".lstrip(".")] = Source(value, value.shape, kind=kind)
    return sources


def _kind(module: nn.Module) -> str:
    kinds = {"linear": layouts.LINEAR, "experts": layouts.SWITCH, "embedding": EMBEDDING}
    return next((name for name, types in kinds.items() if isinstance(module, types)), "other")


def _mismatches(expected: dict[str, mx.array], given: dict[str, mx.array]) -> list[str]:
    found = []
    for path in sorted(expected.keys() | given.keys()):
        if path not in given:
            found.append(f"tensor {path} is missing")
        elif path not in expected:
            found.append(f"tensor {path} is not one of this model type's")
        elif expected[path].shape != given[path].shape:
            found.append(f"tensor {path} has shape {given[path].shape}, expected {expected[path].shape}")
    return found
