"""Fingerprints of everything that determines what a run computes, and the differences between two runs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.core.config import PreferenceConfig, TrainingConfig
from nalora_mlx.data.preferences import TokenizedRow


def fingerprint(arrays: Mapping[str, mx.array]) -> str:
    """Return a hash of arrays that is the same on every device.

    1. View each array as unsigned integers and as a matrix with the array's last dimension.
    2. Sum the integers of each row and each column, modulo their range. Integer sums do not depend on the order.
    3. Hash names, dtypes, shapes and sums with SHA-256; keep 16 hex digits.
    """
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        if not array.size:
            continue
        bits = (mx.uint8, mx.uint16, mx.uint32, mx.uint64)[array.dtype.size.bit_length() - 1]
        words = array.reshape(-1, array.shape[-1] if array.ndim else 1).view(bits)
        sums = [mx.sum(words, axis=axis).astype(mx.uint64) for axis in (0, 1)]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        for part in sums:
            digest.update(np.array(part).tobytes())
    return digest.hexdigest()[:16]


def run_identity(
    model: nn.Module,
    optimizer: optim.Optimizer,
    adapter_config: Mapping[str, Any] | None,
    config: TrainingConfig,
    train_set: Sequence[TokenizedRow],
    valid_set: Sequence[TokenizedRow],
    workers: int,
) -> dict[str, Any]:
    """Return all that determines what a run computes, as JSON: model, data, adapter, optimizer, settings, workers."""
    trainable = adapter_weights(model)
    frozen = {name: array for name, array in tree_flatten(model.parameters()) if name not in trainable}
    # Supervised runs do not depend on them, and earlier versions did not have them.
    unused = set() if config.prefers else {f.name for f in fields(PreferenceConfig)}
    identity = {
        "base_model": {"weights": fingerprint(frozen), "settings": _hash(repr(getattr(model, "args", "")))},
        "training_data": _data_identity(train_set),
        "validation_data": _data_identity(valid_set),
        "adapter": adapter_config,
        "optimizer": _optimizer_identity(optimizer),
        "training": {
            f.name: getattr(config, f.name)
            for f in fields(TrainingConfig)
            if not f.metadata.get("may_change") and f.name not in unused
        },
        "workers": workers,
    }
    return json.loads(json.dumps(identity))  # tuples become lists, as in a file that is read back


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _data_identity(examples: Sequence[TokenizedRow]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.tokens).to_bytes(8, "little"))
        digest.update(example.tokens.tobytes())
        digest.update(example.loss_mask.tobytes())
        if example.media is not None:
            digest.update(example.media.digest.encode())
    return {"rows": len(examples), "tokens": digest.hexdigest()[:16]}


def _optimizer_identity(optimizer: optim.Optimizer) -> dict[str, Any]:
    """Return kind, settings and learning rate. Schedules are functions, so they are sampled at 0, 1, 2, 4, ... updates.

    The learning rate of an optimizer without a schedule is an array in its state.
    """
    identity: dict[str, Any] = {"kind": type(optimizer).__name__}
    for name, value in vars(optimizer).items():
        if not name.startswith("_") and isinstance(value, bool | int | float | str | list | tuple | None):
            identity[name] = value
    if isinstance(optimizer, optim.MultiOptimizer):
        identity["optimizers"] = [_optimizer_identity(one) for one in optimizer.optimizers]
        return identity
    for name, schedule in optimizer._schedulers.items():
        steps = [0, *(2**i for i in range(20))]
        identity[f"{name} schedule"] = [float(schedule(mx.array(step, mx.uint64))) for step in steps]
    for name, value in optimizer.state.items():
        if name not in optimizer._schedulers and name != "step" and isinstance(value, mx.array):
            identity[name] = value.tolist()
    return identity


def differences(before: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Return the differences between two JSON values: dotted path, value before and value now."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            found
            for key in dict.fromkeys((*before, *now))
            for found in differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if before == now else [(path, before, now)]
