"""Attaching adapters to a model, in place, and finding them there."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding

from nalora_mlx.adapters import layouts
from nalora_mlx.adapters.gated_mlps import GatedExperts, GatedMLP
from nalora_mlx.adapters.layers import Dropout, LoRALinear, LoRASwitchLinear
from nalora_mlx.adapters.layouts import Match
from nalora_mlx.adapters.targets import EMBEDDING, select_targets
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.models.vision.model import is_vision_language_model
from nalora_mlx.ops.kernels.backend import backend


@dataclass(frozen=True)
class Gated:
    """A gated MLP that NA-LoRA acts on."""

    path: str
    layout: str
    activation: str
    experts: int


@dataclass(frozen=True)
class Skipped:
    """A gated MLP that NA-LoRA does not act on, and the reason."""

    path: str
    reason: str


@dataclass
class AdaptResult:
    """The adapters that `adapt` or `adapt_dora` attached.

    Attributes:
        fine_tune_type: "lora" or "dora", mlx-lm's names.
        config: the settings, with `keys` and `num_layers` resolved.
        gated: gated MLPs that NA-LoRA acts on.
        skipped: gated MLPs that it does not act on, each with the reason.
        plain: paths of all other adapted modules.
        notices: warnings about the settings.
        left_out: key -> reason, for keys that are not adapted by default.
    """

    fine_tune_type: str
    config: NALoRAConfig
    gated: list[Gated] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def adapt(model: nn.Module, config: NALoRAConfig | None = None, *, verify_all: bool = True) -> AdaptResult:
    """Attach NA-LoRA adapters to a model of mlx-lm, in place, and freeze its other parameters.

    The model's outputs do not change, because lora_b is zero.

    1. Wrap every target in a LoRA adapter.
    2. Rebuild every gated MLP on its adapters, so that NA-LoRA can act on it. If the rebuilt module does not give the
       original's output on random input, the original stays, with plain LoRA on its projections (see `skipped`).
    3. Replace the remaining targets by their adapters.

    Args:
        model: a model as mlx-lm loads it, dense or quantized.
        config: settings; the defaults if None.
        verify_all: compare every rebuilt gated MLP with its original. If false, only the first of those that differ in
            nothing but their weights: a preview, which reads few of the weights of a lazily loaded model.

    Returns:
        What was attached. It is kept with the model, where `train` and `fuse_model` find it.

    Raises:
        InputError: The model has adapters already, no key names a module of it, or NALORA_KERNEL is invalid.
    """
    config = config or NALoRAConfig()
    backend()  # raises for an invalid NALORA_KERNEL, which would otherwise look like a fault of the gated MLPs
    targets, result = _start(model, config, "lora")
    for path, kind in layouts.find_unsupported(model):
        inside = any(target.startswith(f"{path}.") for target in targets)
        reason = f"untouched: LoRA does not support its projections, which are {kind} layers"
        result.skipped.append(
            Skipped(path, f"stays plain LoRA: its projections are {kind} layers" if inside else reason)
        )
    model.freeze()
    adapters = {path: _lora(module, config, index) for index, (path, module) in enumerate(targets.items())}
    dtype = layouts.compute_dtype(model)
    precise: dict[Any, bool] = {}  # how the last verified gated MLP of each kind rounds
    for match in layouts.find_gated_mlps(model):
        paths = match.projection_paths
        if not any(paths[name] in adapters for name in (match.layout.gate, match.layout.up)):
            # With keys from the config, projections without adapters are the user's choice and need no reason.
            if config.keys is None and _is_in_last_layers(model, match.path, result.config.num_layers):
                reason = (
                    "the same keys name another kind of layer elsewhere, so mlx-lm could not load the adapter"
                )
                result.skipped.append(Skipped(match.path, f"untouched: {reason}"))
            continue
        projections = {name: adapters.get(path, match.module[name]) for name, path in paths.items()}
        try:
            gated = _rebuild(match, projections, result.config, dtype)
            alike = layouts.kind(match, gated.layout, gated.activation)
            if verify_all or alike not in precise:
                _match_precision(match, gated, dtype)
                precise[alike] = gated.precise
            gated.precise = precise[alike]
            gated.sees_tokens = _is_in_language_model(model, match.path)
        except ValueError as error:
            result.skipped.append(Skipped(match.path, f"stays plain LoRA: {error}"))
            continue
        for path in paths.values():
            adapters.pop(path, None)
        replace_module(model, match.path, gated)
        result.gated.append(Gated(match.path, gated.layout.name, gated.activation.name, match.experts))
    for path, adapter in adapters.items():
        replace_module(model, path, adapter)
        result.plain.append(path)
    if not result.gated and config.active:
        result.notices.append("NA-LoRA acts nowhere, since no gate projection is adapted: this is plain LoRA")
    elif (
        config.vision
        and config.active
        and all(_is_in_language_model(model, gated.path) for gated in result.gated)
    ):
        result.notices.append(
            "NA-LoRA acts on the language model only: the vision tower has no gated MLP that it can act on, and gets "
            "plain LoRA"
        )
    model.adapt_result = result
    return result


def adapt_dora(model: nn.Module, config: NALoRAConfig) -> AdaptResult:
    """Attach mlx-lm's DoRA adapters to linear and embedding layers, in place, and freeze other parameters.

    NA-LoRA does not act on them, since DoRA rescales whole output channels, gates included.

    Raises:
        InputError: As for `adapt`; or a target has experts, for which mlx-lm has no DoRA.
    """
    targets, result = _start(model, config, "dora")
    for path, module in targets.items():
        if not isinstance(module, layouts.LINEAR + EMBEDDING):
            raise InputError(
                f"{path}: DoRA does not support {type(module).__name__} layers; use lora, or leave it out of --keys"
            )
    model.freeze()
    for index, (path, module) in enumerate(targets.items()):
        kind = DoRAEmbedding if isinstance(module, EMBEDDING) else DoRALinear
        adapter = kind.from_base(module, r=config.rank, scale=config.scale, dropout=config.dropout)
        adapter.dropout = Dropout(config.dropout, index)
        replace_module(model, path, adapter)
        result.plain.append(path)
    model.adapt_result = result
    return result


def unfreeze_layers(model: nn.Module, num_layers: int) -> int:
    """Freeze a model except for its last layers, for full fine-tuning; return how many layers train.

    Raises:
        InputError: The model is quantized.
    """
    if any("scales" in module for _, module in model.named_modules()):
        raise InputError("--fine-tune-type full: the model is quantized; only adapters train on it")
    model.freeze()
    count = min(num_layers, len(model.layers)) if num_layers > 0 else len(model.layers)
    for layer in model.layers[len(model.layers) - count :]:
        layer.unfreeze()
    return count


def adapt_result(model: nn.Module) -> AdaptResult | None:
    """Return the result of the `adapt` call that adapted a model; None if it has no adapters from here."""
    return getattr(model, "adapt_result", None)


def gated_mlps(model: nn.Module) -> list[GatedMLP]:
    """Return the gated MLPs that NA-LoRA acts on, first layer first."""
    return [module for _, module in layouts.modules_in_order(model) if isinstance(module, GatedMLP)]


def dropout_count(model: nn.Module) -> int:
    """Return the number of dropout keys that a ForwardPass needs; 0 if nothing is dropped."""
    indices = [m.index for _, m in model.named_modules() if isinstance(m, Dropout) and m.p > 0]
    return max(indices, default=-1) + 1


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at a dotted path."""
    parent: Any = model
    *parents, name = path.split(".")
    for part in parents:
        parent = parent[int(part)] if isinstance(parent, list | tuple) else getattr(parent, part)
    if isinstance(parent, list):
        parent[int(name)] = module
    else:
        parent[name] = module


def _start(model: nn.Module, config: NALoRAConfig, kind: str) -> tuple[dict[str, nn.Module], AdaptResult]:
    """Return the modules to adapt by path, and a result with the resolved settings."""
    if adapt_result(model) is not None or any("lora_a" in module for _, module in model.named_modules()):
        raise InputError("the model is adapted already; call fuse_model, or load it again")
    targets = select_targets(model, config)
    resolved = replace(config, keys=targets.keys, num_layers=targets.num_layers)
    return targets.modules, AdaptResult(kind, resolved, notices=targets.notices, left_out=targets.left_out)


def _lora(module: nn.Module, config: NALoRAConfig, index: int) -> nn.Module:
    """Return the LoRA adapter of a module; `index` is that of its dropout key."""
    dropout = Dropout(config.dropout, index)
    settings = {"r": config.rank, "dropout": config.dropout, "scale": config.scale}
    if hasattr(module, "to_lora"):
        adapter = module.to_lora(**settings)
    elif isinstance(module, EMBEDDING):
        adapter = LoRAEmbedding.from_base(module, **settings)
    else:
        kind = LoRASwitchLinear if isinstance(module, layouts.SWITCH) else LoRALinear
        return kind(module, config.rank, config.scale, dropout)
    adapter.dropout = dropout
    return adapter


def _rebuild(
    match: Match, projections: Mapping[str, nn.Module], config: NALoRAConfig, dtype: mx.Dtype
) -> GatedMLP:
    """Rebuild a gated MLP on adapted projections, and verify its kernels.

    Raises:
        ValueError: NA-LoRA cannot act on it, with the reason.
    """
    layout, activation = layouts.identify(match)
    kind = GatedExperts if match.experts else GatedMLP
    gated = kind(match, layout, activation, projections, config)
    if not gated.step_factors(mx.ones(gated.shape)):
        raise ValueError(f"its {' or '.join(config.branches)} projection has no adapter")
    gated.verify_kernels(dtype, config.rank)
    return gated


def _match_precision(match: Match, gated: GatedMLP, dtype: mx.Dtype) -> None:
    """Verify a rebuilt module, and let it round like the original: once, or after every operation."""
    error = layouts.verify(match, gated, dtype)
    if dtype != mx.float32 and error > 0:
        gated.precise = False
        try:
            gated.precise = layouts.verify(match, gated, dtype) >= error
        except ValueError:
            gated.precise = True


def _is_in_language_model(model: nn.Module, path: str) -> bool:
    return path.startswith("language_model.") or not is_vision_language_model(model)


def _is_in_last_layers(model: nn.Module, path: str, count: int) -> bool:
    ids = {id(layer) for layer in list(model.layers)[-count:]}
    return any(path.startswith(f"{p}.") for p, module in model.named_modules() if id(module) in ids)
