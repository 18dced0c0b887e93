"""Adapters in PEFT's format, in both directions. Format: https://huggingface.co/docs/peft (LoRA checkpoints).

The module paths are those of transformers, so only model types are supported whose implementations in mlx-lm and
transformers have been compared.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError
from nalora_mlx.export.lazy_model import LazyModel
from nalora_mlx.export.updates import (
    AdapterUpdates,
    LowRankUpdate,
    check_fit,
    shape_problem,
    with_common_rank,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# Model types whose linear and embedding layers have the same names and layouts in mlx-lm and transformers.
# tests/interop/test_peft.py compares the logits of each with those of transformers + PEFT.
MODEL_TYPES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3"),
    *("smollm3", "olmo2", "glm4", "granite", "cohere2", "starcoder2", "ernie4_5", "helium", "nemotron"),
    *("hunyuan_v1_dense", "stablelm"),
)
# Settings that change what a PEFT LoRA computes, and the values for which it is a plain LoRA.
PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "lora_bias": (None, False),
    "layer_replication": (None,),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # Other initializations (pissa, olora, corda, loftq, ...) change the base model's weights when PEFT loads it.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def export_peft(model: LazyModel, updates: AdapterUpdates, output: Path, base: str | None) -> int:
    """Write an adapter for `peft.PeftModel.from_pretrained`.

    lora_A is right, lora_B is left, and lora_alpha is scale * r. For an embedding, both are transposed. If the
    embedding is also the output head, PEFT adapts only the lookup, so the head gets its own adapter: the same product,
    as a linear layer.

    Args:
        model: the base model.
        updates: the adapter.
        output: directory to write.
        base: name of the unquantized base model on the Hub; None if unknown.

    Returns:
        The number of adapted modules.

    Raises:
        InputError: PEFT cannot represent the adapter, or the model type is not supported.
    """
    _check_supported(model, updates)
    by_path, rank, scale = with_common_rank(updates.by_path)
    tied = "lm_head.weight" not in model.weights
    arrays: dict[str, mx.array] = {}
    for path, update in by_path.items():
        if model.weights[f"{path}.weight"].kind == "embedding":
            arrays[f"{PREFIX}{path}.lora_embedding_A"] = update.left.T  # [r, V]
            arrays[f"{PREFIX}{path}.lora_embedding_B"] = update.right.T  # [D, r]
            path = "lm_head"
            if not tied:
                continue
        arrays[f"{PREFIX}{path}.lora_A.weight"] = update.right  # [r, D]
        arrays[f"{PREFIX}{path}.lora_B.weight"] = update.left  # [F, r]
        if update.magnitude is not None:
            arrays[f"{PREFIX}{path}.lora_magnitude_vector"] = update.magnitude
    alpha = scale * rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": updates.kind == "dora",
        # Whole paths, so that PEFT raises an error for one that the model lacks.
        "target_modules": sorted({key.removeprefix(PREFIX).partition(".lora_")[0] for key in arrays}),
        "inference_mode": True,
    }

    def write_arrays(path: Path) -> None:
        contiguous = {key: mx.contiguous(array) for key, array in arrays.items()}
        mx.save_safetensors(str(path), contiguous, metadata={"format": "pt"})

    storage.write_directory(output, {WEIGHTS: write_arrays, CONFIG: storage.json_writer(config)})
    return len(by_path)


def _check_supported(model: LazyModel, updates: AdapterUpdates) -> None:
    _check_model_type(model)
    if updates.kind == "full":
        raise InputError(
            "export peft: these are fully trained weights, not an adapter; write a model with nalora fuse"
        )
    for path in updates.by_path:
        kind = model.weights[f"{path}.weight"].kind
        if kind == "experts":
            raise InputError(
                f"{path}: PEFT has no adapters of experts; merge it (nalora fuse), or train with --keys without it"
            )
        if path.endswith((".mlp.gate", ".block_sparse_moe.gate")):
            raise InputError(f"{path}: is a router, which PEFT does not adapt; merge it (nalora fuse)")
        if kind == "embedding" and updates.kind == "dora":
            raise InputError(
                f"{path}: PEFT computes DoRA of an embedding differently; merge it (nalora fuse)"
            )


def _check_model_type(model: LazyModel) -> None:
    model_type = model.config["model_type"]
    if model_type not in MODEL_TYPES:
        raise InputError(
            f"model_type {model_type}: not supported for PEFT, because its layers have not been compared with "
            f"transformers; supported are {', '.join(sorted(MODEL_TYPES))}"
        )


# --- from PEFT ---------------------------------------------------------------------------------------


def read_peft(directory: Path, model: LazyModel) -> AdapterUpdates:
    """Read a PEFT LoRA or DoRA for a model.

    Raises:
        InputError: the adapter is of another kind, uses a feature that mlx-lm lacks, or does not fit the model.
    """
    config = _read_config(directory)
    _check_model_type(model)
    arrays = _read_arrays(directory)
    by_path, problems = {}, []
    modules = _group_by_module(arrays)
    for module, leaves in modules.items():
        if (update := _from_peft(module, leaves, config)) is None:
            problems.append(
                f"{module} has {', '.join(sorted(leaves))}, which is not a LoRA of a linear or embedding layer"
            )
        else:
            by_path[module] = update
    _merge_tied_head(model, by_path, problems)
    for module, update in by_path.items():
        weight = model.weights.get(f"{module}.weight")
        kind = "embedding" if "lora_embedding_A" in modules[module] else "linear"
        if weight is None or weight.kind != kind:
            expected = {"linear": "a linear", "embedding": "an embedding"}[kind]
            problems.append(f"{module} is not {expected} layer of the model")
        elif problem := shape_problem(update, weight):
            problems.append(f"{module} {problem}")
    check_fit(directory, problems)
    if not by_path:
        raise InputError(f"--from-peft {directory}: the adapter holds no arrays")
    return AdapterUpdates("dora" if config.get("use_dora") else "lora", by_path, {})


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.exists():
        raise InputError(f"--from-peft {directory}: has no {CONFIG}; give the directory of a PEFT adapter")
    config = storage.read_json(path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}; mlx-lm only supports LORA")
    for key, plain in PLAIN_VALUES.items():
        if config.get(key, plain[0]) not in plain:
            raise InputError(f"{path}: {key} is {config[key]!r}; mlx-lm's adapters do not support this")
    return config


def _read_arrays(directory: Path) -> dict[str, mx.array]:
    path = directory / WEIGHTS
    if not path.exists():
        other = " (a .bin file holds pickled code and is not read)" if list(directory.glob("*.bin")) else ""
        raise InputError(f"--from-peft {directory}: has no {WEIGHTS}{other}; save the adapter as safetensors")
    return {key: array.astype(mx.float32) for key, array in storage.read_arrays(path).items()}


def _group_by_module(arrays: dict[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    modules: dict[str, dict[str, mx.array]] = {}
    for key, array in arrays.items():
        module, _, leaf = key.removeprefix(PREFIX).rpartition(".lora_")
        modules.setdefault(module or key, {})["lora_" + leaf.removesuffix(".weight")] = array
    return modules


def _from_peft(module: str, leaves: dict[str, mx.array], config: dict[str, Any]) -> LowRankUpdate | None:
    """Return the update of a module; None if its arrays are not those of a LoRA or DoRA."""
    magnitude = leaves.get("lora_magnitude_vector")
    names = leaves.keys() - {"lora_magnitude_vector"}
    if names == {"lora_A", "lora_B"}:
        left, right = leaves["lora_B"], leaves["lora_A"]
    elif names == {"lora_embedding_A", "lora_embedding_B"} and magnitude is None:
        left, right = leaves["lora_embedding_A"].T, leaves["lora_embedding_B"].T
    else:
        return None
    if left.ndim != 2 or right.ndim != 2:
        return None
    rank = right.shape[0]
    alpha = next(_matching_values(config.get("alpha_pattern"), module), config.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRankUpdate(left, right, float(scale), magnitude)


def _matching_values(pattern: dict[str, Any] | None, module: str) -> Iterator[Any]:
    """Yield the values of a PEFT pattern for a module. Keys are path suffixes, or regular expressions for them."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            yield value


def _merge_tied_head(model: LazyModel, by_path: dict[str, LowRankUpdate], problems: list[str]) -> None:
    """Remove the adapter of a tied output head, after checking that it equals the embedding's.

    mlx-lm has a single adapter for both.
    """
    if "lm_head.weight" in model.weights:
        return
    head = by_path.pop("lm_head", None)
    embeddings = [
        path
        for path in by_path
        if (weight := model.weights.get(f"{path}.weight")) and weight.kind == "embedding"
    ]
    if head is None and not embeddings:
        return
    equal = False
    if head is not None and len(embeddings) == 1:
        embedding = by_path[embeddings[0]]
        first, second = (update.scale * (update.left @ update.right) for update in (head, embedding))
        equal = first.shape == second.shape and bool(mx.allclose(first, second, rtol=1e-5, atol=1e-7))
    if not equal:
        problems.append(
            "the model's embedding is also its output head, and the adapter changes only one of them, "
            "which mlx-lm cannot do"
        )
