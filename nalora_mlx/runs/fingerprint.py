"""What decides which bits a run computes: base model, data, method, optimizer and settings; and how two runs differ."""

import hashlib
import importlib.metadata
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
from nalora_mlx.core.config import TrainingConfig
from nalora_mlx.data.tokenization import Example


def fingerprint(arrays: Mapping[str, mx.array]) -> str:
    """A hash of names, types, shapes, and the sums of the bits of every row and column; the same on every device."""
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


def identity(
    model: nn.Module,
    optimizer: optim.Optimizer,
    description: Mapping[str, Any] | None,
    config: TrainingConfig,
    train_set: Sequence[Example],
    valid_set: Sequence[Example],
    workers: int,
) -> dict[str, Any]:
    """All that decides what a run computes: base model, data, method, optimizer, settings, and how many workers."""
    trainable = adapter_weights(model)
    frozen = {name: a for name, a in tree_flatten(model.parameters()) if name not in trainable}
    known = {
        "base_model": {"weights": fingerprint(frozen), "settings": _hash(repr(getattr(model, "args", "")))},
        "training_data": _data_identity(train_set),
        "validation_data": _data_identity(valid_set),
        "adapter": description,
        "optimizer": _optimizer_identity(optimizer),
        "training": {
            f.name: getattr(config, f.name)
            for f in fields(TrainingConfig)
            if not f.metadata.get("may_change")
        },
        "workers": workers,
    }
    return json.loads(json.dumps(known))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _data_identity(examples: Sequence[Example]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.tokens).to_bytes(8, "little"))
        digest.update(example.tokens.tobytes())
        digest.update(example.loss_mask.tobytes())
    return {"rows": len(examples), "tokens": digest.hexdigest()[:16]}


def _optimizer_identity(optimizer: optim.Optimizer) -> dict[str, Any]:
    """Kind, settings and learning rate; a schedule is known by its values at 0, 1, 2, 4, 8 ... updates."""
    known: dict[str, Any] = {"kind": type(optimizer).__name__}
    for name, value in vars(optimizer).items():
        if not name.startswith("_") and isinstance(value, bool | int | float | str | list | tuple | None):
            known[name] = value
    if isinstance(optimizer, optim.MultiOptimizer):
        known["optimizers"] = [_optimizer_identity(one) for one in optimizer.optimizers]
        return known
    for name, schedule in optimizer._schedulers.items():
        steps = [0, *(2**i for i in range(20))]
        known[f"{name} schedule"] = [float(schedule(mx.array(step, mx.uint64))) for step in steps]
    for name, value in optimizer.state.items():
        if name not in optimizer._schedulers and name != "step" and isinstance(value, mx.array):
            known[name] = value.tolist()
    return known


def differences(then: Any, now: Any, where: str = "") -> list[str]:
    """What is not as it was, one phrase each."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            phrase
            for key in dict.fromkeys((*then, *now))
            for phrase in differences(then.get(key), now.get(key), f"{where}.{key}" if where else key)
        ]
    if then == now:
        return []
    if max(len(str(then)), len(str(now))) > 60:
        return [f"{where} differs"]
    return [f"{where} was {then}, is {now}"]


def versions() -> dict[str, str]:
    """The libraries and the device that the arithmetic comes from."""
    libraries = ("nalora-mlx", "mlx", "mlx-lm", "numpy")
    known = {}
    for name in libraries:
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            continue
    return {**known, "device": str(mx.default_device())}
