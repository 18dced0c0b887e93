"""Adapters as PEFT keeps them, there and back. Format: https://huggingface.co/docs/peft, its LoRA checkpoints.

Paths of modules are those of transformers, so only model types whose two implementations have been compared are taken.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.storage import json_writer, write_directory
from nalora_mlx.export.lazy_model import LazyModel
from nalora_mlx.export.updates import Update, Updates, misfit, refuse, uniform

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# Model types whose linear and embedding layers have one name and one layout here and in transformers:
# tests/interop/test_peft.py holds each to the logits of transformers + PEFT.
MODEL_TYPES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3"),
    *("smollm3", "olmo2", "glm4", "granite", "cohere2", "starcoder2", "ernie4_5", "helium", "nemotron"),
    *("hunyuan_v1_dense", "stablelm"),
)
# Settings of a PEFT LoRA that change what it computes, and the values under which it is the plain one.
PLAIN: dict[str, tuple[Any, ...]] = {
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
    # The other ways to start (pissa, olora, corda, loftq, ...) change the base model's weights when PEFT loads it.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def export_peft(opened: LazyModel, updates: Updates, output: Path, base: str | None) -> int:
    """Write an adapter that `peft.PeftModel.from_pretrained` loads; returns the number of modules.

    lora_A is right, lora_B is left, lora_alpha = scale r; an embedding's are transposed. Where the embedding is the
    head too, PEFT adapts only its look-up, so that the head gets an adapter of its own: the same product, as a
    linear layer.

    Args:
        opened: the base model.
        updates: the adapter.
        output: directory to write.
        base: name of the unquantized base model on the Hub, None if it is not known.

    Raises:
        InputError: PEFT has no form for the adapter, or the model is named otherwise in transformers.
    """
    _check(opened, updates)
    by_path, rank, scale = uniform(updates.by_path)
    tied = "lm_head.weight" not in opened.sources
    arrays: dict[str, mx.array] = {}
    for path, update in by_path.items():
        if opened.sources[f"{path}.weight"].kind == "embedding":
            arrays[f"{PREFIX}{path}.lora_embedding_A"] = update.left.T  # [r, V]
            arrays[f"{PREFIX}{path}.lora_embedding_B"] = update.right.T  # [D, r]
            path = "lm_head"
            if not tied:
                continue
        arrays[f"{PREFIX}{path}.lora_A.weight"] = update.right  # [r, D]
        arrays[f"{PREFIX}{path}.lora_B.weight"] = update.left  # [F, r]
        if update.magnitude is not None:
            arrays[f"{PREFIX}{path}.lora_magnitude_vector"] = update.magnitude
    paths = sorted({key.removeprefix(PREFIX).partition(".lora_")[0] for key in arrays})
    alpha = scale * rank
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": updates.kind == "dora",
        "target_modules": paths,  # whole paths: a wrong one is an error in PEFT, not an adapter without effect
        "inference_mode": True,
    }

    def write(path: Path) -> None:
        contiguous = {key: mx.contiguous(array) for key, array in arrays.items()}
        mx.save_safetensors(str(path), contiguous, metadata={"format": "pt"})

    write_directory(output, {WEIGHTS: write, CONFIG: json_writer(description)})
    return len(by_path)


def _check(opened: LazyModel, updates: Updates) -> None:
    model_type = opened.config["model_type"]
    if model_type not in MODEL_TYPES:
        raise InputError(
            f"model_type {model_type}: its layers have not been compared with those of transformers; "
            f"there is PEFT for {', '.join(sorted(MODEL_TYPES))}"
        )
    if updates.kind == "full":
        raise InputError(
            "export peft: these are fully trained weights, not an adapter; nalora fuse writes a model"
        )
    for path in updates.by_path:
        kind = opened.sources[f"{path}.weight"].kind
        if kind == "experts":
            raise InputError(
                f"{path}: PEFT has no such adapter of experts; merge it (nalora fuse), or train with --keys without it"
            )
        if path.endswith((".mlp.gate", ".block_sparse_moe.gate")):
            raise InputError(f"{path}: is a router, which PEFT does not adapt; merge it (nalora fuse)")
        if kind == "embedding" and updates.kind == "dora":
            raise InputError(
                f"{path}: PEFT computes the DoRA of an embedding otherwise; merge it (nalora fuse)"
            )


# --- and back ----------------------------------------------------------------------------------------


def read_peft(directory: Path, opened: LazyModel) -> Updates:
    """Read a PEFT LoRA or DoRA for a model.

    Raises:
        InputError: it is of another kind, uses what mlx-lm has not, or lists what does not fit the model.
    """
    config = _read_config(directory)
    model_type = opened.config["model_type"]
    if model_type not in MODEL_TYPES:
        raise InputError(
            f"model_type {model_type}: its layers have not been compared with those of transformers"
        )
    path = directory / WEIGHTS
    if not path.exists():
        other = " (a .bin file holds pickled code and is not read)" if list(directory.glob("*.bin")) else ""
        raise InputError(f"--from-peft {directory}: has no {WEIGHTS}{other}; save the adapter as safetensors")
    try:
        arrays = {key: a.astype(mx.float32) for key, a in dict(mx.load(str(path))).items()}  # type: ignore[arg-type]
    except Exception as error:
        raise InputError(f"{path} is no readable safetensors file ({error})") from None
    found, problems = {}, []
    for module, leaves in _by_module(arrays).items():
        if (update := _update(module, leaves, config)) is None:
            problems.append(
                f"{module} has {', '.join(sorted(leaves))}, which is no LoRA of a linear or embedding layer"
            )
        else:
            found[module] = update
    _untie(opened, found, problems)
    for module, update in found.items():
        source = opened.sources.get(f"{module}.weight")
        kind = "embedding" if "lora_embedding_A" in _by_module(arrays)[module] else "linear"
        if source is None or source.kind != kind:
            problems.append(f"{module} is no {kind} layer of the model")
        elif fault := misfit(update, source):
            problems.append(f"{module} {fault}")
    refuse(directory, problems)
    if not found:
        raise InputError(f"--from-peft {directory}: the adapter holds no arrays")
    return Updates("dora" if config.get("use_dora") else "lora", found, {})


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"--from-peft {directory}: has no {CONFIG}; give the directory of a PEFT adapter"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise InputError(f"{path}: peft_type is {kind!r}; only LORA has a form in mlx-lm")
    for key, plain in PLAIN.items():
        if config.get(key, plain[0]) not in plain:
            raise InputError(f"{path}: {key} is {config[key]!r}; mlx-lm's adapters have nothing like it")
    return config


def _by_module(arrays: dict[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    modules: dict[str, dict[str, mx.array]] = {}
    for key, array in arrays.items():
        module, _, leaf = key.removeprefix(PREFIX).rpartition(".lora_")
        modules.setdefault(module or key, {})["lora_" + leaf.removesuffix(".weight")] = array
    return modules


def _update(module: str, leaves: dict[str, mx.array], config: dict[str, Any]) -> Update | None:
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
    alpha = next(_patterned(config.get("alpha_pattern"), module), config.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Update(left, right, float(scale), magnitude)


def _patterned(pattern: dict[str, Any] | None, module: str) -> Iterator[Any]:
    """Values of a PEFT pattern, whose keys are ends of paths or regular expressions for them."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            yield value


def _untie(opened: LazyModel, found: dict[str, Update], problems: list[str]) -> None:
    """Where the embedding is the head too, mlx-lm has one adapter for both; PEFT must have the same on both."""
    if "lm_head.weight" in opened.sources:
        return
    head = found.pop("lm_head", None)
    embeddings = [
        path
        for path in found
        if (source := opened.sources.get(f"{path}.weight")) and source.kind == "embedding"
    ]
    if head is None and not embeddings:
        return
    both = head is not None and len(embeddings) == 1
    if both and head is not None:
        embedding = found[embeddings[0]]
        change, same = (u.scale * (u.left @ u.right) for u in (head, embedding))
        both = change.shape == same.shape and bool(mx.allclose(change, same, rtol=1e-5, atol=1e-7))
    if not both:
        problems.append(
            "its embedding is its head too, and the adapter changes the one without the other, which mlx-lm cannot"
        )
