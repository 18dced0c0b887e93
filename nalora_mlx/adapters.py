"""How adapters come into a model (`adapt`), are saved and loaded, and are merged into its weights (`fuse_model`)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding

from nalora_mlx import checkpoint, layouts
from nalora_mlx.checkpoint import ADAPTER_CONFIG, ADAPTER_FILE
from nalora_mlx.config import NALoRAConfig
from nalora_mlx.errors import InputError, listed
from nalora_mlx.kernels.backend import backend
from nalora_mlx.layouts import Match
from nalora_mlx.modules import Dropout, GatedExperts, GatedMLP, LoRALinear, LoRASwitchLinear, fuse_module
from nalora_mlx.strict import coerce, reject_unknown
from nalora_mlx.targets import EMBEDDING, select

NA_KEY = "na_lora"  # the one key of adapter_config.json that is ours; mlx-lm ignores it


# --- adapt --------------------------------------------------------------------------------------------------


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
class AdaptReport:
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


def adapt(model: nn.Module, config: NALoRAConfig | None = None) -> AdaptReport:
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
        _put(model, path, adapter)
        report.plain.append(path)
    if not report.gated and config.active:
        report.notices.append("no gate projection is adapted, so NA-LoRA acts nowhere: this is plain LoRA")
    model.adapt_report = report
    return report


def adapt_dora(model: nn.Module, config: NALoRAConfig) -> AdaptReport:
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
        _put(model, path, adapter)
        report.plain.append(path)
    model.adapt_report = report
    return report


def _start(model: nn.Module, config: NALoRAConfig, kind: str) -> tuple[dict[str, nn.Module], AdaptReport]:
    """The modules to adapt, and a report that says so much."""
    if report_of(model) is not None or any("lora_a" in module for _, module in model.named_modules()):
        raise InputError("the model is adapted already; fuse_model or load it again first")
    targets = select(model, config)
    resolved = replace(config, keys=targets.keys, num_layers=targets.num_layers)
    return targets.modules, AdaptReport(kind, resolved, notices=list(targets.notices))


def report_of(model: nn.Module) -> AdaptReport | None:
    """The report of the `adapt` that made this model what it is, or None."""
    return getattr(model, "adapt_report", None)


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
    report: AdaptReport,
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
    _put(model, match.path, gated)
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


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at a dotted path."""
    parent: Any = model
    *way, name = path.split(".")
    for step in way:
        parent = parent[int(step)] if isinstance(parent, list | tuple) else getattr(parent, step)
    if isinstance(parent, list):
        parent[int(name)] = module
    else:
        parent[name] = module


# --- fuse ---------------------------------------------------------------------------------------------------


def fuse_model(model: nn.Module, bits: int | None = 8, dequantize: bool = False) -> dict[str, nn.Module]:
    """Merge all adapters into the weights, in place; the module tree is the base model's again.

    Args:
        model: an adapted model, by `adapt` or by mlx-lm.
        bits: what a quantized, adapted layer becomes: 8 keeps the update, 4 mostly loses it; None for the bits that
            it has. Layers without an adapter keep their bits untouched.
        dequantize: leave adapted layers dense instead.

    Returns:
        The merged layers by path.
    """
    merged = {path for path, module in model.named_modules() if "lora_a" in module}
    for gated in gated_mlps(model):
        _put(model, gated.path, gated.fuse(bits, dequantize))
    for path, module in list(model.named_modules()):
        if (fused := fuse_module(module, bits, dequantize)) is not module:
            _put(model, path, fused)
    if report_of(model) is not None:
        del model.adapt_report
    return {path: module for path, module in model.named_modules() if path in merged}


# --- files --------------------------------------------------------------------------------------------------


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The trainable arrays by path, as they stand in adapters.safetensors."""
    return dict(tree_flatten(model.trainable_parameters()))


def adapter_description(model: nn.Module) -> dict[str, Any]:
    """The content of adapter_config.json: what an unmodified mlx-lm needs, and our settings under one key."""
    report = report_of(model)
    if report is None:
        raise InputError("the model has no adapters; call adapt first")
    config = report.config
    return {
        "fine_tune_type": report.fine_tune_type,
        "num_layers": config.num_layers,
        "lora_parameters": config.lora_parameters,
        NA_KEY: config.na_parameters,
    }


def read_weights(path: Path) -> dict[str, mx.array]:
    """Read the arrays of a safetensors file.

    Raises:
        InputError: it is missing, or no such file.
    """
    if not path.exists():
        raise InputError(f"no adapter weights at {path}")
    return checkpoint.read_arrays(path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load trained arrays into an adapted model.

    Raises:
        InputError: the file is missing or unreadable, or lists every array that does not fit, with both shapes.
    """
    _load(model, path, adapter_weights(model), whole=True)


def _load(model: nn.Module, path: Path, wanted: dict[str, mx.array], whole: bool) -> None:
    """Load arrays of a file that are among those wanted, or exactly those; names and shapes must agree."""
    loaded = read_weights(path)
    problems = [f"{name} is missing" for name in wanted if name not in loaded and whole]
    for name, array in loaded.items():
        if name not in wanted:
            problems.append(f"{name} is no trainable array of the model")
        elif array.shape != wanted[name].shape:
            problems.append(f"{name} is {array.shape}, the model has {wanted[name].shape}")
        elif not mx.issubdtype(array.dtype, mx.floating):
            problems.append(f"{name} holds {array.dtype}, which no adapter is made of")
    if problems:
        raise InputError(
            f"{path} does not fit the model (same --rank, --keys and --num-layers?): {listed(problems)}"
        )
    model.load_weights([(name, a.astype(wanted[name].dtype)) for name, a in loaded.items()], strict=False)


def load_adapter(model: nn.Module, directory: str | Path) -> AdaptReport:
    """Adapt a base model as a saved LoRA adapter says, and load its weights.

    Args:
        model: the base model.
        directory: holds adapters.safetensors and adapter_config.json, ours or mlx-lm's.

    Raises:
        InputError: something is missing, of another kind than LoRA, or does not fit the model.
    """
    return _attach(model, Path(directory), {"lora": adapt})


def _attach(
    model: nn.Module, directory: Path, kinds: dict[str, Callable[[nn.Module, NALoRAConfig], AdaptReport]]
) -> AdaptReport:
    """Adapt a model as adapter_config.json says, and load the weights, which are looked at first."""
    content = read_description(directory)
    kind = content.get("fine_tune_type", "lora")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"{directory / ADAPTER_CONFIG}: holds {kind!r}, not {' or '.join(kinds)}")
    path = directory / ADAPTER_CONFIG
    lora, own = content.get("lora_parameters"), content.get(NA_KEY, {})
    if not isinstance(lora, dict) or not isinstance(own, dict):
        raise InputError(f"{path}: lora_parameters is missing or no object, or {NA_KEY} is none")
    given = {**lora, "num_layers": content.get("num_layers")}
    needed = ("rank", "scale", "dropout", "num_layers")
    if missing := [key for key in needed if given.get(key) is None]:
        raise InputError(
            f"{path}: {', '.join(missing)} is missing; mlx-lm could not load this adapter either"
        )
    settings = {key: given[key] for key in needed} | {"keys": lora.get("keys") or None} | own
    reject_unknown(settings, NALoRAConfig.__dataclass_fields__, str(path))
    config = NALoRAConfig(**coerce(settings, NALoRAConfig, str(path)))
    weights = read_weights(directory / ADAPTER_FILE)
    config = replace(config, keys=config.keys or tuple(_keys_of(model, weights)))
    # Arrays of the rank are made on the way: a false one must not decide how large.
    ranks = {
        a.shape[-1 if a.ndim == 2 else 1] for n, a in weights.items() if n.endswith("lora_a") and a.ndim > 1
    }
    if ranks and ranks != {config.rank}:
        raise InputError(f"{path}: rank is {config.rank}, but the weights have {sorted(ranks)}")
    report = kinds[kind](model, config)
    load_weights(model, directory / ADAPTER_FILE)
    return report


def _keys_of(model: nn.Module, weights: dict[str, mx.array]) -> list[str]:
    """The keys that name the adapters of a file; mlx-lm leaves them out where it adapted everything, routers too."""
    paths = {name.rpartition(".")[0] for name in weights}
    layers = {
        f"{path}." for path, module in model.named_modules() if any(module is one for one in model.layers)
    }
    return sorted(
        {next((p.removeprefix(start) for start in layers if p.startswith(start)), p) for p in paths}
    )


def load_any_adapter(model: nn.Module, directory: Path) -> None:
    """Load what a run of any kind has left: LoRA, DoRA, or full weights.

    Raises:
        InputError: something is missing or does not fit the model.
    """
    if read_description(directory).get("fine_tune_type") == "full":
        _load(model, directory / ADAPTER_FILE, dict(tree_flatten(model.parameters())), whole=False)
    else:
        _attach(model, directory, {"lora": adapt, "dora": adapt_dora})


def read_description(directory: Path) -> dict[str, Any]:
    """Read adapter_config.json of a saved adapter.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    path = directory / ADAPTER_CONFIG
    if not path.exists():
        raise InputError(f"no adapter in {directory}: {ADAPTER_CONFIG} is missing; check --adapter-path")
    return checkpoint.read_json(path)
