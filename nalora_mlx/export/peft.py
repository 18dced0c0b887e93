"""Adapters written in PEFT's format. Format: https://huggingface.co/docs/peft (LoRA checkpoints).

The module paths are those of transformers, so only model types are supported whose implementations in mlx-lm and
transformers have been compared.
"""

from pathlib import Path

import mlx.core as mx

from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError
from nalora_mlx.export.lazy_model import LazyModel
from nalora_mlx.export.peft_config import CONFIG, WEIGHTS
from nalora_mlx.export.peft_names import HEAD, PREFIX, check_model_type, is_tied, their_path
from nalora_mlx.export.updates import AdapterUpdates, reject_full_weights, with_common_rank


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
    tied = is_tied(model)
    arrays: dict[str, mx.array] = {}
    for path, update in by_path.items():
        module = PREFIX + their_path(path, model)
        if model.weights[f"{path}.weight"].kind == "embedding":
            arrays[f"{module}.lora_embedding_A"] = update.left.T  # [r, V]
            arrays[f"{module}.lora_embedding_B"] = update.right.T  # [D, r]
            module = PREFIX + HEAD
            if not tied:
                continue
        arrays[f"{module}.lora_A.weight"] = update.right  # [r, D]
        arrays[f"{module}.lora_B.weight"] = update.left  # [F, r]
        if update.magnitude is not None:
            arrays[f"{module}.lora_magnitude_vector"] = update.magnitude
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
    check_model_type(model)
    reject_full_weights(updates, "peft")
    for path in updates.by_path:
        kind = model.weights[f"{path}.weight"].kind
        if kind == "experts":
            raise InputError(
                f"{path}: PEFT has no adapters of experts; merge it (nalora fuse), or train with --keys without it"
            )
        if path.endswith((".gate", ".shared_expert_gate")) or ".router" in path:
            raise InputError(f"{path}: is a router, which PEFT does not adapt; merge it (nalora fuse)")
        if kind == "embedding" and updates.kind == "dora":
            raise InputError(
                f"{path}: PEFT computes DoRA of an embedding differently; merge it (nalora fuse)"
            )
