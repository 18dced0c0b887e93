"""Adapters in PEFT's format, read for mlx-lm. Format: https://huggingface.co/docs/peft (LoRA checkpoints)."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from nalora_mlx.adapters.files import check_finite
from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError
from nalora_mlx.export.lazy_model import LazyModel, LazyWeight
from nalora_mlx.export.peft_config import MERGE, adapters_inside, find_weights, read_peft_config
from nalora_mlx.export.peft_names import PREFIX, check_model_type, embedding_path, is_head, is_tied, our_path
from nalora_mlx.export.updates import AdapterUpdates, LowRankUpdate, check_fit, shape_problem

_CHUNK = 2**24  # elements compared at once
_COPIES = ("weight", "bias")  # arrays of the base model that PEFT stores next to adapters of embeddings


def read_peft(directory: Path, model: LazyModel) -> AdapterUpdates:
    """Read a PEFT LoRA or DoRA for a model.

    PEFT stores a copy of the base's weight next to an adapter of an embedding or output head. A copy that equals the
    model's weight is left out.

    Raises:
        InputError: the adapter is of another kind, uses a feature that mlx-lm lacks, or does not fit the model.
    """
    config = read_peft_config(directory)
    check_model_type(model)
    file = find_weights(directory)
    arrays = storage.read_arrays(file)
    check_finite(arrays, file)
    modules = _group_by_module(arrays)
    problems: list[str] = []
    notes = [f"{name} is another adapter, which is not read" for name in adapters_inside(directory)]
    notes += _check_copies(model, modules, problems)
    by_path: dict[str, LowRankUpdate] = {}
    names: dict[str, str] = {}  # in the file, by path
    for module, leaves in modules.items():
        path = our_path(module, model)
        update = _from_peft(module, leaves, config)
        if isinstance(update, str):
            problems.append(f"{module} {update}")
        elif path in by_path:
            problems.append(f"{module} and {names[path]} are the same layer of the model")
        else:
            by_path[path], names[path] = update, module
    if is_tied(model):
        _merge_tied_head(model, by_path, problems)
    for path, update in by_path.items():
        kind = "embedding" if "lora_embedding_A" in modules[names[path]] else "linear"
        if problem := _layer_problem(update, kind, model.weights.get(f"{path}.weight")):
            problems.append(f"{names[path]} {problem}")
    check_fit(directory, problems)
    if not by_path:
        raise InputError(f"--from-peft {directory}: the adapter holds no arrays")
    return AdapterUpdates("dora" if config.get("use_dora") else "lora", by_path, {}, notes)


def _group_by_module(arrays: Mapping[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    """Return arrays by module and by name: lora_A, lora_B, lora_magnitude_vector, weight, ..."""
    modules: dict[str, dict[str, mx.array]] = {}
    for key, array in arrays.items():
        name = key.removeprefix(PREFIX)
        module, is_lora, leaf = name.partition(".lora_")
        if is_lora:
            leaf = "lora_" + leaf.removesuffix(".weight")  # some versions of PEFT add .weight to all of them
        else:
            module, _, leaf = name.rpartition(".")
            module = module.removesuffix(".base_layer")
        modules.setdefault(module, {})[leaf] = array
    return modules


def _from_peft(module: str, leaves: Mapping[str, mx.array], config: Mapping[str, Any]) -> LowRankUpdate | str:
    """Return the update of a module; if its arrays are not those of a LoRA or DoRA, return what is wrong."""
    leaves = {name: array.astype(mx.float32) for name, array in leaves.items()}
    names = leaves.keys() - {"lora_magnitude_vector"}
    magnitude = leaves.get("lora_magnitude_vector")
    if names == {"lora_A", "lora_B"}:
        left, right = leaves["lora_B"], leaves["lora_A"]
    elif names == {"lora_embedding_A", "lora_embedding_B"}:
        if magnitude is not None:
            return "is a DoRA of an embedding, which PEFT computes differently from mlx-lm"
        left, right = leaves["lora_embedding_A"].T, leaves["lora_embedding_B"].T
    else:
        return f"has {', '.join(sorted(leaves))}, which is not a LoRA of a linear or embedding layer"
    if left.ndim != 2 or right.ndim != 2:
        return f"has factors {left.shape} and {right.shape}, not matrices"
    use_dora = bool(config.get("use_dora"))
    if use_dora and magnitude is None:
        return "has no lora_magnitude_vector, but use_dora is true"
    if magnitude is not None and not use_dora:
        return "has a lora_magnitude_vector, but use_dora is false"
    rank = right.shape[0]
    expected = next(_matching_values(config.get("rank_pattern"), module), config.get("r", 8))
    if rank != expected:
        return f"has rank {rank}, adapter_config.json says {expected}"
    alpha = next(_matching_values(config.get("alpha_pattern"), module), config.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRankUpdate(left, right, float(scale), magnitude)


def _matching_values(pattern: Mapping[str, Any] | None, module: str) -> Iterator[Any]:
    """Yield the values of a PEFT pattern for a module. Keys are path suffixes, or regular expressions for them."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            yield value


def _layer_problem(update: LowRankUpdate, kind: str, weight: LazyWeight | None) -> str:
    """Return how an update does not fit a layer; empty if it fits."""
    if weight is None or weight.kind != kind:
        return f"is not {'an' if kind == 'embedding' else 'a'} {kind} layer of the model"
    return shape_problem(update, weight)


def _merge_tied_head(model: LazyModel, by_path: dict[str, LowRankUpdate], problems: list[str]) -> None:
    """Remove the adapter of a tied output head, after checking that it equals the embedding's.

    mlx-lm has a single adapter for both.
    """
    head = next((by_path.pop(path) for path in list(by_path) if is_head(path)), None)
    embedding = by_path.get(embedding_path(model) or "")
    if head is None and embedding is None:
        return
    equal = False
    if head is not None and embedding is not None:
        first, second = (update.scale * (update.left @ update.right) for update in (head, embedding))
        equal = first.shape == second.shape and bool(mx.allclose(first, second, rtol=1e-5, atol=1e-7))
    if not equal:
        problems.append(
            "the model's embedding is also its output head, and the adapter changes only one of them, "
            "which mlx-lm cannot do"
        )


# --- copies of the base's weights -------------------------------------------------------------------


def _check_copies(
    model: LazyModel, modules: dict[str, dict[str, mx.array]], problems: list[str]
) -> list[str]:
    """Remove copies of the base's weights, in place, after comparing them with the model's; return notes on them."""
    equal = []
    for module, leaves in list(modules.items()):
        for leaf in _COPIES:
            if (copy := leaves.pop(leaf, None)) is None:
                continue
            is_shared = is_head(module) and is_tied(model)
            path = embedding_path(model) if is_shared else our_path(module, model)
            weight = model.weights.get(f"{path}.{leaf}")
            if weight is None:
                problems.append(f"{module}.{leaf} is not in the model")
            elif problem := _difference(copy, weight):
                problems.append(f"{module}.{leaf} {problem}")
            else:
                equal.append(f"{module}.{leaf}")
        if not leaves:
            del modules[module]
    return [f"left out {', '.join(equal)}: copies of the model's weights"] if equal else []


def _difference(copy: mx.array, weight: LazyWeight) -> str:
    """Return how a copy of a weight differs from it; empty if it is the same, but for a cast to another dtype."""
    if copy.shape != weight.shape:
        return f"is {copy.shape}, the model has {weight.shape}: the vocabulary was resized; {MERGE}"
    rows = max(1, _CHUNK // math.prod(copy.shape[1:]))
    parts = (slice(start, start + rows) for start in range(0, copy.shape[0], rows))
    if all(_equal(copy[part], weight, part) for part in parts):
        return ""
    if weight.quantization:
        return (
            "differs from the quantized model's: give the unquantized base as --model; the result fits both"
        )
    return f"differs from the model's: it was trained, or is another model's; {MERGE}"


def _equal(copy: mx.array, weight: LazyWeight, rows: slice) -> bool:
    if weight.quantization is None or weight.scales is None:
        base = weight.weight[rows]
        return any(bool(mx.array_equal(copy.astype(t), base.astype(t))) for t in (base.dtype, copy.dtype))
    if weight.global_scale is not None:
        return False
    stored = [array[rows] for array in (weight.weight, weight.scales, weight.biases) if array is not None]
    dense = copy.astype(stored[1].dtype) if mx.issubdtype(stored[1].dtype, mx.floating) else copy
    again = mx.quantize(dense, **weight.quantization)
    return all(bool(mx.array_equal(a, b)) for a, b in zip(again, stored, strict=True))
