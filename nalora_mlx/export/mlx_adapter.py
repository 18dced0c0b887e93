"""Adapters as mlx-lm loads them: adapters.safetensors and adapter_config.json."""

from pathlib import Path
from typing import Any

import mlx.core as mx

from nalora_mlx.adapters.files import ADAPTER_CONFIG, ADAPTER_FILE
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.storage import arrays_writer, json_writer, write_directory
from nalora_mlx.export.lazy_model import LazyModel, Source
from nalora_mlx.export.updates import Update, Updates, uniform


def export_mlx(opened: LazyModel, updates: Updates, output: Path) -> int:
    """Write an adapter for `mlx_lm --adapter-path`, and for ours; returns the number of modules.

    mlx-lm makes one adapter of one rank for every key in every one of the last layers, so modules of these that have
    no update get zeros.

    Raises:
        InputError: the adapter is a fully trained model.
    """
    if updates.kind == "full":
        raise InputError(
            "export mlx: these are fully trained weights, not an adapter; nalora fuse writes a model"
        )
    by_path, rank, scale = uniform(updates.by_path)
    keys, count = _keys(opened, by_path)
    possible = {f"{layer}.{key}" for layer in opened.layers[-count:] for key in keys}
    made = {path for path in possible if f"{path}.weight" in opened.sources}
    arrays: dict[str, mx.array] = {}
    for path in sorted(made | by_path.keys()):
        source = opened.sources[f"{path}.weight"]
        update = by_path.get(path) or _nothing(source, rank, updates.kind)
        arrays |= {f"{path}.{leaf}": array for leaf, array in _leaves(update, source.kind).items()}
    description: dict[str, Any] = {
        "fine_tune_type": updates.kind,
        "num_layers": count,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }
    write_directory(output, {ADAPTER_FILE: arrays_writer(arrays), ADAPTER_CONFIG: json_writer(description)})
    return len(by_path)


def _keys(opened: LazyModel, by_path: dict[str, Update]) -> tuple[list[str], int]:
    """Keys and number of layers from which mlx-lm makes at least these modules."""
    keys, first = set(), len(opened.layers)
    for path in by_path:
        layer = next((layer for layer in opened.layers if path.startswith(f"{layer}.")), None)
        keys.add(path if layer is None else path.removeprefix(f"{layer}."))
        if layer is not None:
            first = min(first, opened.layers.index(layer))
    return sorted(keys), max(1, len(opened.layers) - first)


def _nothing(source: Source, rank: int, kind: str) -> Update:
    """An update that changes nothing; left is zero, as in an adapter before training."""
    lead, (rows, columns) = source.shape[:-2], source.shape[-2:]
    magnitude = None
    if kind == "dora":
        magnitude = mx.linalg.norm(mx.array(source.read((slice(None),))), axis=-1)
    return Update(mx.zeros((*lead, rows, rank)), mx.zeros((*lead, rank, columns)), 1.0, magnitude)


def _leaves(update: Update, kind: str) -> dict[str, mx.array]:
    left, right = update.left, update.right
    a, b = {"linear": (right.T, left.T), "embedding": (left, right), "experts": (right, left)}[kind]
    leaves = {"lora_a": mx.contiguous(a), "lora_b": mx.contiguous(b)}
    if update.magnitude is not None:
        leaves["m"] = update.magnitude
    return leaves
