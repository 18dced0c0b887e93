"""Adapters in mlx-lm's format: adapters.safetensors and adapter_config.json."""

from pathlib import Path
from typing import Any

import mlx.core as mx

from nalora_mlx.adapters.files import ADAPTER_CONFIG, ADAPTER_FILE, IMAGES_KEY, chat_entry, not_finite
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.storage import arrays_writer, json_writer, write_directory
from nalora_mlx.export.lazy_model import LazyModel, LazyWeight
from nalora_mlx.export.updates import (
    AdapterUpdates,
    LowRankUpdate,
    reject_full_weights,
    with_common_rank,
)
from nalora_mlx.models.chat_templates import ChatSettings


def export_mlx(model: LazyModel, updates: AdapterUpdates, output: Path, chat: ChatSettings) -> int:
    """Write an adapter for `mlx_lm --adapter-path` (`mlx_vlm`, if the model is one of it) and for this package.

    mlx-lm creates an adapter of the same rank for every key in each of the last layers, so modules among them
    without an update get zeros.

    Args:
        model: the base model.
        updates: the adapter.
        output: directory to write.
        chat: how chats were rendered in the adapter's training.

    Returns:
        The number of modules with an update.

    Raises:
        InputError: the weights were fully trained, so there is no adapter, or weights of the model are not finite.
    """
    reject_full_weights(updates, "mlx")
    by_path, rank, scale = with_common_rank(updates.by_path)
    keys, num_layers = _adapted_keys(model, by_path)
    candidates = {f"{layer}.{key}" for layer in model.layers[-num_layers:] for key in keys}
    created = {path for path in candidates if f"{path}.weight" in model.weights}
    if model.images:  # mlx-vlm reads whole paths, and creates an adapter for each
        keys, created = sorted(by_path), set()
    arrays: dict[str, mx.array] = {}
    for path in sorted(created | by_path.keys()):
        weight = model.weights[f"{path}.weight"]
        update = by_path.get(path) or _zero_update(weight, rank, updates.kind)
        arrays |= {f"{path}.{leaf}": array for leaf, array in _to_mlx_lm(update, weight.kind).items()}
    if wrong := not_finite(arrays):  # magnitudes that were computed from the model's weights
        raise InputError(
            f"{model.directory}: NaN or infinite weights in {listed(wrong, ', ')}; the model is damaged"
        )
    config: dict[str, Any] = {
        "fine_tune_type": updates.kind,
        "num_layers": num_layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
        **({IMAGES_KEY: True} if model.images else {}),
        **chat_entry(chat),
    }
    write_directory(output, {ADAPTER_FILE: arrays_writer(arrays), ADAPTER_CONFIG: json_writer(config)})
    return len(by_path)


def _adapted_keys(model: LazyModel, by_path: dict[str, LowRankUpdate]) -> tuple[list[str], int]:
    """Return the keys and the number of last layers with which mlx-lm adapts at least these modules."""
    keys, first = set(), len(model.layers)
    for path in by_path:
        layer = next((layer for layer in model.layers if path.startswith(f"{layer}.")), None)
        keys.add(path if layer is None else path.removeprefix(f"{layer}."))
        if layer is not None:
            first = min(first, model.layers.index(layer))
    return sorted(keys), max(1, len(model.layers) - first)


def _zero_update(weight: LazyWeight, rank: int, kind: str) -> LowRankUpdate:
    """Return an update that changes nothing; for DoRA, the magnitude is the norm of each row."""
    experts, (rows, columns) = weight.shape[:-2], weight.shape[-2:]
    magnitude = None
    if kind == "dora":
        magnitude = mx.linalg.norm(mx.array(weight.read((slice(None),))), axis=-1)
    left, right = mx.zeros((*experts, rows, rank)), mx.zeros((*experts, rank, columns))
    return LowRankUpdate(left, right, 1.0, magnitude)


def _to_mlx_lm(update: LowRankUpdate, kind: str) -> dict[str, mx.array]:
    left, right = update.left, update.right
    a, b = {"linear": (right.T, left.T), "embedding": (left, right), "experts": (right, left)}[kind]
    leaves = {"lora_a": mx.contiguous(a), "lora_b": mx.contiguous(b)}
    if update.magnitude is not None:
        leaves["m"] = update.magnitude
    return leaves
