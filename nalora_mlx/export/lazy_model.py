"""A model opened for reading: its weights stay on disk until they are read, and quantized ones are dequantized."""

import dataclasses
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
from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError
from nalora_mlx.models import loading
from nalora_mlx.models.config_translation import as_read
from nalora_mlx.models.model_class import TEXT_TYPES, find_model_class
from nalora_mlx.models.vision.loading import open_vision_model


@dataclass(frozen=True)
class LazyWeight:
    """One weight of a model, as lazy arrays that `read` evaluates part by part."""

    weight: mx.array  # [(experts,) rows, columns]; packed if there are scales
    shape: tuple[int, ...]  # of the dequantized weight
    scales: mx.array | None = None
    biases: mx.array | None = None
    global_scale: mx.array | None = None
    quantization: dict[str, Any] | None = None  # group_size, bits, mode
    kind: str = "other"  # "linear", "experts", "embedding", or "other" if no adapter fits
    transform: Callable[[mx.array, tuple[Any, ...]], mx.array] | None = None  # merges an adapter into a part

    def read(self, index: tuple[Any, ...]) -> np.ndarray:
        """Return the part of the weight at `index` (rows, or expert and rows), dequantized and merged, float32."""
        part = self._dequantize(index)
        return np.array(part if self.transform is None else self.transform(part, index))

    def _dequantize(self, index: tuple[Any, ...]) -> mx.array:
        if self.scales is None or self.quantization is None:
            return self.weight[index].astype(mx.float32)
        scales, biases, global_scale = self.scales[index], self.biases, self.global_scale
        if biases is not None:  # dequantize() rounds to the dtype of its scales
            scales, biases = scales.astype(mx.float32), biases[index].astype(mx.float32)
        if global_scale is not None and global_scale.ndim:  # one per expert
            global_scale = global_scale[index[0]]
        return mx.dequantize(
            self.weight[index],
            scales,
            biases,
            **self.quantization,
            global_scale=global_scale,
            dtype=mx.float32,
        )


@dataclass(frozen=True)
class LazyModel:
    """A model opened for reading. It does not keep the module, which would hold every weight that was read."""

    directory: Path
    config: dict[str, Any]  # as mlx-lm reads it, with the keys of the text model at the top level
    args: Any  # mlx-lm's ModelArgs of the text model
    weights: dict[str, LazyWeight]  # by path
    layers: list[str]  # paths of the layers, first to last
    problems: list[str]  # tensors that are missing, unexpected or of another shape, one line each
    images: bool = False  # whether the model is one of mlx-vlm, with its towers


def read_config(directory: Path) -> dict[str, Any]:
    """Read a model's config.json. Its `model_type` is the one under which mlx-lm has the model.

    Raises:
        InputError: the file does not exist or is not the config of an mlx-lm model.
    """
    path = directory / "config.json"
    if not path.exists():
        raise InputError(f"{path}: not found; give the directory of an mlx-lm model")
    config = storage.read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{path}: has no model_type; give the directory of an mlx-lm model")
    return config | {"model_type": TEXT_TYPES.get(config["model_type"], config["model_type"])}


def open_model(directory: Path) -> LazyModel:
    """Open a model with lazy weights.

    mlx-lm's own classes define the expected tensors, their shapes and how each is quantized.

    Raises:
        InputError: mlx-lm cannot open the model, or its config lacks required keys.
    """
    config = read_config(directory)
    problems: list[str] = []

    def checked(base: Any) -> type:
        class CheckedModel(base):
            """The model's class, whose loading records mismatches instead of raising at the first."""

            def load_weights(self, weights: Any, strict: bool = True) -> Any:
                problems.extend(_mismatches(dict(tree_flatten(self.parameters())), dict(weights)))
                return super().load_weights(weights, strict=False)

        return CheckedModel

    translation = loading.translated(directory)
    model, _ = loading.open_module(directory, lazy=True, wrap=checked)
    found = find_model_class(config)
    args = model.args if found is None else text_args(model, found.text_args)
    weights = _lazy_weights(model)
    return LazyModel(directory, as_read(config, translation), args, weights, _layer_paths(model), problems)


def open_vision(directory: Path) -> LazyModel:
    """Open a vision-language model, with its towers, as mlx-vlm loads it.

    Raises:
        InputError: mlx-vlm cannot open the model.
    """
    model, config = open_vision_model(str(directory), lazy=True)
    layers = _layer_paths(model)
    return LazyModel(directory, config, model.args, _lazy_weights(model), layers, [], images=True)


def _layer_paths(model: nn.Module) -> list[str]:
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(layer)] for layer in model.layers]


def text_args(model: nn.Module, cls: type) -> Any:
    """Return the arguments of a model's language model, which are of a class; the model's own if there are none."""
    for _, module in model.named_modules():
        for value in vars(module).values():
            held = vars(value).values() if dataclasses.is_dataclass(value) else ()
            for candidate in (value, *held):
                if isinstance(candidate, cls):
                    return candidate
    return getattr(model, "args", None)


def _lazy_weights(model: nn.Module) -> dict[str, LazyWeight]:
    weights = {}
    for prefix, module in model.named_modules():
        arrays = {
            leaf: value for leaf, value in module.items() if isinstance(value, mx.array) and leaf[0] != "_"
        }
        if "scales" in arrays:
            weight, scales = arrays.pop("weight"), arrays.pop("scales")
            biases, global_scale = arrays.pop("biases", None), arrays.pop("global_scale", None)
            weights[f"{prefix}.weight"] = LazyWeight(
                weight,
                (*weight.shape[:-1], weight.shape[-1] * 32 // module.bits),
                scales,
                biases,
                global_scale,
                {"group_size": module.group_size, "bits": module.bits, "mode": module.mode},
                _layer_kind(module),
            )
        for leaf, value in arrays.items():
            kind = _layer_kind(module) if leaf == "weight" else "other"
            weights[f"{prefix}.{leaf}".lstrip(".")] = LazyWeight(value, value.shape, kind=kind)
    return weights


def _layer_kind(module: nn.Module) -> str:
    kinds = {"linear": layouts.LINEAR, "experts": layouts.SWITCH, "embedding": EMBEDDING}
    return next((name for name, types in kinds.items() if isinstance(module, types)), "other")


def _mismatches(expected: dict[str, mx.array], found: dict[str, mx.array]) -> list[str]:
    problems = []
    for path in sorted(expected.keys() | found.keys()):
        if path not in found:
            problems.append(f"tensor {path} is missing")
        elif path not in expected:
            problems.append(f"tensor {path} is unexpected for this model type")
        elif expected[path].shape != found[path].shape:
            problems.append(f"tensor {path} has shape {found[path].shape}, expected {expected[path].shape}")
    return problems
