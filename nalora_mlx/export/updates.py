"""What an adapter adds to each weight: read from mlx-lm's files, held in one form, scaled and combined."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from nalora_mlx.adapters.files import ADAPTER_CONFIG, ADAPTER_FILE, read_adapter_config, read_weights
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.export.lazy_model import Source


@dataclass(frozen=True)
class Update:
    """The change of one weight W [(E,) F, D]: V = W + scale left @ right; with DoRA each row of V gets the norm m.

    left [(E,) F, r] and right [(E,) r, D], float32; for an embedding F is the vocabulary. m [F] is None for LoRA.
    """

    left: mx.array
    right: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def rank(self) -> int:
        """Inner size r of the product."""
        return self.left.shape[-1]

    def apply(self, part: mx.array, index: tuple[Any, ...]) -> mx.array:
        """The changed rows of a weight, given the plain rows at `index`; float32."""
        right = self.right if self.right.ndim == 2 else self.right[index[0]]
        changed = part + self.scale * (self.left[index] @ right)
        if self.magnitude is None:
            return changed
        norms = mx.linalg.norm(changed, axis=-1, keepdims=True)
        return changed * (self.magnitude[index][:, None] / norms)


@dataclass(frozen=True)
class Updates:
    """An adapter: updates by the path of their module, or whole weights by their own path (full fine-tuning)."""

    kind: str  # lora, dora or full
    by_path: dict[str, Update]
    weights: dict[str, mx.array]


def read_updates(directory: Path, sources: Mapping[str, Source]) -> Updates:
    """Read an adapter in mlx-lm's form, by mlx-lm or by us, and hold it against the model's weights.

    Raises:
        InputError: something is missing, or lists the arrays that do not fit the model.
    """
    content = read_adapter_config(directory)
    path = directory / ADAPTER_CONFIG
    kind = content.get("fine_tune_type", "lora")
    arrays = {name: a.astype(mx.float32) for name, a in read_weights(directory / ADAPTER_FILE).items()}
    if kind == "full":
        problems = [
            f"{name} is no tensor of the model, or of another shape"
            for name, array in arrays.items()
            if name not in sources or sources[name].shape != array.shape
        ]
        refuse(directory, problems)
        return Updates(kind, {}, arrays)
    if kind not in ("lora", "dora"):
        raise InputError(f"{path}: fine_tune_type is {kind!r}; it takes lora, dora or full")
    try:
        scale = float(content["lora_parameters"]["scale"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: lora_parameters has no scale; mlx-lm could not load it either") from None
    modules: dict[str, dict[str, mx.array]] = {}
    for name, array in arrays.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = array
    wanted = {"lora_a", "lora_b", "m"} if kind == "dora" else {"lora_a", "lora_b"}
    problems, found = [], {}
    for module, leaves in modules.items():
        source = sources.get(f"{module}.weight")
        if leaves.keys() != wanted:
            problems.append(f"{module} has {', '.join(sorted(leaves))}, not {', '.join(sorted(wanted))}")
        elif source is None or source.kind == "other":
            problems.append(f"{module} is no linear or embedding layer of the model")
        else:
            update = _normalized(leaves, source.kind, scale)
            if fault := misfit(update, source):
                problems.append(f"{module} {fault}")
            found[module] = update
    refuse(directory, problems)
    if not found:
        raise InputError(f"{directory}: the adapter holds no arrays")
    return Updates(kind, found, {})


def _normalized(leaves: Mapping[str, mx.array], kind: str, scale: float) -> Update:
    a, b = leaves["lora_a"], leaves["lora_b"]
    if kind == "linear":  # a [D, r], b [r, F]
        left, right = b.T, a.T
    elif kind == "embedding":  # a [V, r], b [r, D]
        left, right = a, b
    else:  # a [E, r, D], b [E, F, r]
        left, right = b, a
    return Update(left, right, scale, leaves.get("m"))


def misfit(update: Update, source: Source) -> str:
    """What is wrong with the shapes of an update for a weight; empty if nothing is."""
    left, right = update.left.shape, update.right.shape
    fits = len(left) == len(right) and left[:-1] + right[-1:] == source.shape and left[-1] == right[-2]
    if fits and (update.magnitude is None or update.magnitude.shape == source.shape[:1]):
        return ""
    return f"has factors {left} and {right}, its weight is {source.shape}"


def refuse(directory: Path, problems: Sequence[str]) -> None:
    """Raise InputError if there are problems."""
    if problems:
        raise InputError(f"{directory}: does not fit --model: {listed(problems)}")


def combine(adapters: Sequence[Updates], factors: Sequence[float]) -> Updates:
    """The weighted sum of adapters on one base: sum_i f_i s_i left_i right_i, exact by joining along the rank.

    Raises:
        InputError: there is more than a factor of 1 on one adapter, and one of them is no LoRA.
    """
    if len(adapters) == 1 and factors[0] == 1:
        return adapters[0]
    for adapter in adapters:
        if adapter.kind != "lora":
            raise InputError(
                f"--adapter-path: a {adapter.kind} adapter is no sum that could be scaled or combined; "
                "give it alone, without --scale or --weight"
            )
    joined: dict[str, list[Update]] = {}
    for adapter, factor in zip(adapters, factors, strict=True):
        for path, update in adapter.by_path.items():
            joined.setdefault(path, []).append(replace(update, scale=factor * update.scale))
    return Updates("lora", {path: _join(parts) for path, parts in joined.items()}, {})


def _join(parts: Sequence[Update]) -> Update:
    if len(parts) == 1:
        return parts[0]
    left = mx.concatenate([part.scale * part.left for part in parts], axis=-1)
    return Update(left, mx.concatenate([part.right for part in parts], axis=-2), 1.0)


def uniform(by_path: Mapping[str, Update]) -> tuple[dict[str, Update], int, float]:
    """The same updates with one rank (by zeros) and one scale for all, which most formats want: (they, r, scale)."""
    rank = max(update.rank for update in by_path.values())
    scales = {update.scale for update in by_path.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    return {path: _fitted(update, rank, scale) for path, update in by_path.items()}, rank, scale


def _fitted(update: Update, rank: int, scale: float) -> Update:
    left, right, missing = update.left, update.right, rank - update.rank
    if update.scale != scale:
        left = (update.scale / scale) * left
    if missing:
        lead = [(0, 0)] * (left.ndim - 2)
        left = mx.pad(left, [*lead, (0, 0), (0, missing)])
        right = mx.pad(right, [*lead, (0, missing), (0, 0)])
    return Update(left, right, scale, update.magnitude)


def merged(sources: Mapping[str, Source], updates: Updates) -> dict[str, Source]:
    """The weights with an adapter in them, computed in float32 when they are read."""
    changed = {
        f"{path}.weight": replace(sources[f"{path}.weight"], change=update.apply)
        for path, update in updates.by_path.items()
    }
    whole = {path: Source(array, array.shape) for path, array in updates.weights.items()}
    return {**sources, **changed, **whole}
