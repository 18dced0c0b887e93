"""How adapters come into a model (`adapt`), are saved and loaded, and are merged into its weights (`fuse_model`)."""

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
from nalora_mlx.adapters.targets import EMBEDDING, select
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.core.errors import InputError
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
    """A gated MLP that stayed plain LoRA or untouched, and why."""

    path: str
    reason: str


@dataclass
class AdaptResult:
    """What `adapt` did.

    Attributes:
        fine_tune_type: "lora" or "dora", as mlx-lm calls the kind of adapter.
        config: the settings, with `keys` and `num_layers` as they turned out.
        gated: gated MLPs that NA-LoRA acts on.
        skipped: gated MLPs left as plain LoRA or untouched, each with the reason.
        plain: paths of all other adapted modules.
        notices: what a person should know of the settings.
    """

    fine_tune_type: str
    config: NALoRAConfig
    gated: list[Gated] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def adapt(model: nn.Module, config: NALoRAConfig | None = None) -> AdaptResult:
    """Attach NA-LoRA adapters to any mlx-lm model, in place, and freeze the rest.

    The model's function does not change: lora_b is zero, and each gated MLP is rebuilt only if it gives the
    original's output on random input; one that does not keeps plain LoRA on its linears and is listed in `skipped`.

    Args:
        model: a model as mlx-lm loads it, dense or quantized.
        config: settings; the defaults if None.

    Returns:
        The report; it stays with the model, where `train` and `fuse_model` find it.

    Raises:
        InputError: the model is adapted already, no key names a module of it, or NALORA_KERNEL is wrong.
    """
    config = config or NALoRAConfig()
    backend()  # an error in NALORA_KERNEL ends here, and is no fault of a gated MLP
    targets, report = _start(model, config, "lora")
    for path, kind in layouts.find_foreign(model):
        report.skipped.append(
            Skipped(path, f"untouched: its projections are {kind} layers, which no LoRA fits")
        )
    model.freeze()
    adapters = {path: _lora(module, config, index) for index, (path, module) in enumerate(targets.items())}
    dtype = layouts.compute_dtype(model)
    for match in list(layouts.find(model)):
        _adapt_gated(model, match, adapters, report, dtype, chosen=config.keys is not None)
    for path, adapter in adapters.items():
        replace_module(model, path, adapter)
        report.plain.append(path)
    if not report.gated and config.active:
        report.notices.append("no gate projection is adapted, so NA-LoRA acts nowhere: this is plain LoRA")
    model.adapt_result = report
    return report


def adapt_dora(model: nn.Module, config: NALoRAConfig) -> AdaptResult:
    """Attach mlx-lm's DoRA adapters to linear and embedding layers, in place, and freeze the rest.

    NA-LoRA does not act on them: DoRA rescales whole output channels, gates included.

    Raises:
        InputError: as `adapt`; or the adapted layers hold experts, for which mlx-lm has no DoRA.
    """
    targets, report = _start(model, config, "dora")
    for path, module in targets.items():
        if not isinstance(module, layouts.LINEAR + EMBEDDING):
            raise InputError(
                f"{path}: there is no DoRA for such a layer; use lora, or name --keys without it"
            )
    model.freeze()
    for index, (path, module) in enumerate(targets.items()):
        kind = DoRAEmbedding if isinstance(module, EMBEDDING) else DoRALinear
        adapter = kind.from_base(module, r=config.rank, scale=config.scale, dropout=config.dropout)
        adapter.dropout = Dropout(config.dropout, index)
        replace_module(model, path, adapter)
        report.plain.append(path)
    model.adapt_result = report
    return report


def _start(model: nn.Module, config: NALoRAConfig, kind: str) -> tuple[dict[str, nn.Module], AdaptResult]:
    """The modules to adapt, and a report that says so much."""
    if adapt_result(model) is not None or any("lora_a" in module for _, module in model.named_modules()):
        raise InputError("the model is adapted already; fuse_model or load it again first")
    targets = select(model, config)
    resolved = replace(config, keys=targets.keys, num_layers=targets.num_layers)
    return targets.modules, AdaptResult(kind, resolved, notices=list(targets.notices))


def adapt_result(model: nn.Module) -> AdaptResult | None:
    """The report of the `adapt` that made this model what it is, or None."""
    return getattr(model, "adapt_result", None)


def gated_mlps(model: nn.Module) -> list[GatedMLP]:
    """All gated MLPs that NA-LoRA acts on, first layer first."""
    return [module for _, module in layouts.walk(model) if isinstance(module, GatedMLP)]


def dropout_count(model: nn.Module) -> int:
    """Number of dropout keys that a ForwardPass needs; 0 if nothing is dropped."""
    indices = [m.index for _, m in model.named_modules() if isinstance(m, Dropout) and m.p > 0]
    return max(indices, default=-1) + 1


def _lora(module: nn.Module, config: NALoRAConfig, index: int) -> nn.Module:
    """Wrap a module in the adapter of its kind."""
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


def _adapt_gated(
    model: nn.Module,
    match: Match,
    adapters: dict[str, nn.Module],
    report: AdaptResult,
    dtype: mx.Dtype,
    chosen: bool,
) -> None:
    """Rebuild one gated MLP on its adapters and take them from the list; or say why not.

    `chosen` says that a person named the keys: what these leave out needs no reason.
    """
    paths = {name: f"{match.path}.{name}" if match.path else name for name in match.layout.projections}
    if not any(paths[name] in adapters for name in (match.layout.gate, match.layout.up)):
        if not chosen and _in_layers(model, match.path, report.config.num_layers):
            why = "the same key names another kind of layer elsewhere, so that mlx-lm could not load its adapter"
            report.skipped.append(Skipped(match.path, f"untouched: {why}"))
        return
    try:
        layout, activation = layouts.identify(match)
        projections = {name: adapters.get(path, match.module[name]) for name, path in paths.items()}
        kind = GatedExperts if match.experts else GatedMLP
        gated = kind(match, layout, activation, projections, report.config)
        if not gated.step_factors(mx.ones(gated.shape)):
            raise ValueError(f"no adapter is on its {' or '.join(report.config.branches)} projection")
        gated.prepare(dtype, report.config.rank)
        _match_precision(match, gated, dtype)
    except ValueError as error:
        report.skipped.append(Skipped(match.path, f"stays plain LoRA: {error}"))
        return
    for path in paths.values():
        adapters.pop(path, None)
    replace_module(model, match.path, gated)
    report.gated.append(Gated(match.path, layout.name, activation.name, match.experts))


def _match_precision(match: Match, gated: GatedMLP, dtype: mx.Dtype) -> None:
    """Verify the rebuilt module, and let it round as the original does: in float32, or after every operation."""
    error = layouts.verify(match, gated, dtype)
    if dtype != mx.float32 and error > 0:
        gated.precise = False
        try:
            gated.precise = layouts.verify(match, gated, dtype) >= error
        except ValueError:
            gated.precise = True


def _in_layers(model: nn.Module, path: str, count: int) -> bool:
    """Whether a path lies in one of the last `count` layers."""
    ids = {id(layer) for layer in list(model.layers)[-count:]}
    return any(path.startswith(f"{p}.") for p, module in model.named_modules() if id(module) in ids)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at a dotted path."""
    parent: Any = model
    *way, name = path.split(".")
    for step in way:
        parent = parent[int(step)] if isinstance(parent, list | tuple) else getattr(parent, step)
    if isinstance(parent, list):
        parent[int(name)] = module
    else:
        parent[name] = module
