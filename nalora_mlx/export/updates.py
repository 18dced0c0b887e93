"""Adapters as low-rank updates of weights: read from mlx-lm's files, scaled, summed, and merged on the fly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from nalora_mlx.adapters.files import not_finite, read_adapter
from nalora_mlx.adapters.vision import outside_language
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.export.lazy_model import LazyWeight


@dataclass(frozen=True)
class LowRankUpdate:
    """An update of one weight W [(E,) F, D]: V = W + scale left @ right. DoRA then scales each row of V to norm m.

    All arrays are float32. For an embedding, F is the vocabulary size.
    """

    left: mx.array  # [(E,) F, r]
    right: mx.array  # [(E,) r, D]
    scale: float
    magnitude: mx.array | None = None  # m [F], None for LoRA

    @property
    def rank(self) -> int:
        """Inner size r of the product."""
        return self.left.shape[-1]

    def apply(self, part: mx.array, index: tuple[Any, ...]) -> mx.array:
        """Return the updated rows of a weight, given its rows at `index`; float32."""
        right = self.right if self.right.ndim == 2 else self.right[index[0]]
        updated = part + self.scale * (self.left[index] @ right)
        if self.magnitude is None:
            return updated
        norms = mx.linalg.norm(updated, axis=-1, keepdims=True)
        return updated * (self.magnitude[index][:, None] / norms)


@dataclass(frozen=True)
class AdapterUpdates:
    """An adapter as updates by module path, or, for full fine-tuning, as whole weights by their own path."""

    kind: str  # lora, dora or full
    by_path: dict[str, LowRankUpdate]
    full_weights: dict[str, mx.array]
    notes: list[str] = field(default_factory=list)  # what the reader left out, for the user


def read_updates(directory: Path, weights: Mapping[str, LazyWeight]) -> AdapterUpdates:
    """Read an adapter in mlx-lm's format and check it against the model's weights.

    Raises:
        InputError: a file or setting is missing or invalid, or arrays are not finite or do not fit the model; the
            message lists them.
    """
    config, arrays = read_adapter(directory)
    kind = config.fine_tune_type
    if config.lora is None:
        check_fit(
            directory,
            [
                f"{name} is not a tensor of the model, or has another shape"
                for name, array in arrays.items()
                if name not in weights or weights[name].shape != array.shape
            ],
        )
        return AdapterUpdates(kind, {}, arrays)
    expected = {"lora_a", "lora_b", "m"} if kind == "dora" else {"lora_a", "lora_b"}
    problems, by_path = [], {}
    for module, leaves in _group_by_module(arrays).items():
        leaves = {name: array.astype(mx.float32) for name, array in leaves.items()}
        weight = weights.get(f"{module}.weight")
        if leaves.keys() != expected:
            problems.append(f"{module} has {', '.join(sorted(leaves))}, not {', '.join(sorted(expected))}")
        elif weight is None or weight.kind == "other":
            problems.append(f"{module} is not a linear or embedding layer of the model")
        else:
            update = _from_mlx_lm(leaves, weight.kind, config.lora.scale)
            if problem := shape_problem(update, weight):
                problems.append(f"{module} {problem}")
            by_path[module] = update
    check_fit(directory, problems)
    if not by_path:
        raise InputError(f"{directory}: the adapter holds no arrays")
    return AdapterUpdates(kind, by_path, {})


def _group_by_module(arrays: Mapping[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    modules: dict[str, dict[str, mx.array]] = {}
    for name, array in arrays.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = array
    return modules


def _from_mlx_lm(leaves: Mapping[str, mx.array], kind: str, scale: float) -> LowRankUpdate:
    a, b = leaves["lora_a"], leaves["lora_b"]
    if kind == "linear":  # a [D, r], b [r, F]
        left, right = b.T, a.T
    elif kind == "embedding":  # a [V, r], b [r, D]
        left, right = a, b
    else:  # a [E, r, D], b [E, F, r]
        left, right = b, a
    return LowRankUpdate(left, right, scale, leaves.get("m"))


def shape_problem(update: LowRankUpdate, weight: LazyWeight) -> str:
    """Return how the shapes of an update do not fit a weight; empty if they fit."""
    left, right = update.left.shape, update.right.shape
    fits = len(left) == len(right) and left[:-1] + right[-1:] == weight.shape and left[-1] == right[-2]
    if fits and (update.magnitude is None or update.magnitude.shape == weight.shape[:1]):
        return ""
    return f"has factors {left} and {right}, its weight is {weight.shape}"


def check_fit(directory: Path, problems: Sequence[str]) -> None:
    """Raise InputError if an adapter has problems with the model."""
    if problems:
        raise InputError(f"{directory}: does not fit --model: {listed(problems)}")


def reject_full_weights(updates: AdapterUpdates, format: str) -> None:
    """Raise InputError if the weights were fully trained, so that there is no adapter to export."""
    if updates.kind == "full":
        raise InputError(
            f"export {format}: these are fully trained weights, not an adapter; write a model with nalora fuse"
        )


def reject_towers(model_config: Mapping[str, Any], adapter: Path, format: str) -> None:
    """Raise InputError if an adapter adapts modules outside the language model, which GGUF files do not hold.

    Args:
        model_config: content of the model's config.json.
        adapter: directory of the adapter.
        format: what was asked for.
    """
    if paths := outside_language(model_config, adapter):
        raise InputError(
            f"{format}: {adapter} adapts {paths[0]}, which is not in the language model, and a GGUF file holds nothing "
            "else; merge it (nalora fuse), and convert the tower with llama.cpp's convert_hf_to_gguf.py --mmproj"
        )


def weighted_sum(adapters: Sequence[AdapterUpdates], factors: Sequence[float]) -> AdapterUpdates:
    """Return the sum over adapters of factor * scale * left @ right, exact by concatenating along the rank.

    Raises:
        InputError: one of several or scaled adapters is not a LoRA.
    """
    if len(adapters) == 1 and factors[0] == 1:
        return adapters[0]
    for adapter in adapters:
        if adapter.kind != "lora":
            raise InputError(
                f"--adapter-path: a {adapter.kind} adapter cannot be scaled or summed; "
                "give it alone, without --scale or --weight"
            )
    terms: dict[str, list[LowRankUpdate]] = {}
    for adapter, factor in zip(adapters, factors, strict=True):
        for path, update in adapter.by_path.items():
            terms.setdefault(path, []).append(replace(update, scale=factor * update.scale))
    return AdapterUpdates("lora", {path: _concatenate(updates) for path, updates in terms.items()}, {})


def _concatenate(updates: Sequence[LowRankUpdate]) -> LowRankUpdate:
    if len(updates) == 1:
        return updates[0]
    left = mx.concatenate([update.scale * update.left for update in updates], axis=-1)
    return LowRankUpdate(left, mx.concatenate([update.right for update in updates], axis=-2), 1.0)


def with_common_rank(by_path: Mapping[str, LowRankUpdate]) -> tuple[dict[str, LowRankUpdate], int, float]:
    """Give all updates one rank, by zero padding, and one scale, as most formats require.

    Returns:
        The updates, their rank and their scale.

    Raises:
        InputError: an update is too large for float32, as sums and scaled adapters can be.
    """
    rank = max(update.rank for update in by_path.values())
    scales = {update.scale for update in by_path.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    padded = {path: _pad(update, rank, scale) for path, update in by_path.items()}
    factors = {path: update.left for path, update in padded.items()} | {"the scale": mx.array(scale * rank)}
    if wrong := not_finite(factors):
        raise InputError(f"{listed(wrong, ', ')}: too large for float32; give a smaller --scale or --weight")
    return padded, rank, scale


def _pad(update: LowRankUpdate, rank: int, scale: float) -> LowRankUpdate:
    left, right, missing = update.left, update.right, rank - update.rank
    if update.scale != scale:
        left = (update.scale / scale) * left
    if missing:
        experts = [(0, 0)] * (left.ndim - 2)
        left = mx.pad(left, [*experts, (0, 0), (0, missing)])
        right = mx.pad(right, [*experts, (0, missing), (0, 0)])
    return LowRankUpdate(left, right, scale, update.magnitude)


def merge_updates(weights: Mapping[str, LazyWeight], updates: AdapterUpdates) -> dict[str, LazyWeight]:
    """Return the weights with an adapter merged in; the merge is computed in float32 as each weight is read."""
    changed = {
        f"{path}.weight": replace(weights[f"{path}.weight"], transform=update.apply)
        for path, update in updates.by_path.items()
    }
    full = {path: LazyWeight(array, array.shape) for path, array in updates.full_weights.items()}
    return {**weights, **changed, **full}
