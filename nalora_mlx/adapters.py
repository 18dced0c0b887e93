"""How adapters come into a model (`adapt`), are saved and loaded, and are merged into its weights (`fuse_model`)."""

import ast
import inspect
import json
import textwrap
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding

from nalora_mlx import layouts
from nalora_mlx.config import NALoRAConfig, coerce, nearest, reject_unknown
from nalora_mlx.errors import InputError
from nalora_mlx.layouts import Match
from nalora_mlx.modules import Dropout, GatedExperts, GatedMLP, LoRALinear, LoRASwitchLinear, fuse_module

ADAPTER_FILE = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
NA_KEY = "na_lora"  # the one key of adapter_config.json that is ours; mlx-lm ignores it

EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)


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
        The report, which `train` and `save_adapter` find on the model again.

    Raises:
        InputError: the model is adapted already, or no key names a module of it.
    """
    config = config or NALoRAConfig()
    targets, report = _select(model, config)
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
    targets, report = _select(model, config)
    model.freeze()
    for index, (path, module) in enumerate(targets.items()):
        if isinstance(module, layouts.SWITCH):
            raise InputError(
                f"{path}: there is no DoRA for expert layers; use lora, or name --keys without them"
            )
        kind = DoRAEmbedding if isinstance(module, EMBEDDING) else DoRALinear
        adapter = kind.from_base(module, r=config.rank, scale=config.scale, dropout=config.dropout)
        adapter.dropout = Dropout(config.dropout, index)
        _put(model, path, adapter)
        report.plain.append(path)
    model.adapt_report = replace(report, fine_tune_type="dora")
    return report


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


def _select(model: nn.Module, config: NALoRAConfig) -> tuple[dict[str, nn.Module], AdaptReport]:
    """Find the modules to adapt, by full path, first layer first; resolve keys and num_layers."""
    if report_of(model) is not None:
        raise InputError("the model is adapted already; fuse_model or load it again first")
    layers, vision = list(model.layers), _vision_layers(model)
    notices = []
    count = len(layers) if config.num_layers == -1 else config.num_layers
    if count > len(layers):
        notices.append(f"num_layers is {count}, the model has {len(layers)}: all of them are adapted")
        count = len(layers)
    chosen = {id(layer) for layer in layers[len(layers) - count :] + vision}
    paths = {id(module): path for path, module in model.named_modules()}
    inside: dict[str, tuple[str, nn.Module]] = {}  # full path -> (key relative to its layer, module)
    everywhere: set[str] = set()
    bare = _read_directly(model)
    blocked: set[str] = (
        set()
    )  # keys under which a chosen layer has something else, where mlx-lm could not load
    for layer in layers + vision:
        for key, module in layer.named_modules():
            if id(layer) in chosen and not _adaptable(module):
                blocked.add(key)
            if key and _adaptable(module) and id(module) not in bare:
                everywhere.add(key)
                if id(layer) in chosen:
                    inside[f"{paths[id(layer)]}.{key}"] = (key, module)
    outside = {path: m for path, m in model.named_modules() if path and path not in inside and _adaptable(m)}
    if config.keys is None:
        routers = _routers(model)
        keys = tuple(sorted({key for path, (key, _) in inside.items() if path not in routers} - blocked))
        targets = {path: module for path, (key, module) in inside.items() if key in keys}
        if not targets:
            raise InputError("the layers of this model hold nothing that a LoRA adapter fits")
    else:
        keys = config.keys
        targets = {path: module for path, (key, module) in inside.items() if key in keys}
        targets.update({path: module for path, module in outside.items() if path in keys})
        unused = [k for k in keys if k not in outside and k not in {key for key, _ in inside.values()}]
        known = sorted(everywhere | {p for p in outside if not any(p.endswith(f".{k}") for k in everywhere)})
        for key in unused:
            notices.append(f"key {key!r} names no linear or embedding layer to adapt{nearest(key, known)}")
        if not targets:
            raise InputError(
                "keys: " + "; ".join(notices[-len(unused) :] or ["none is in the adapted layers"])
            )
    order = {path: position for position, (path, _) in enumerate(layouts.walk(model))}
    targets = dict(sorted(targets.items(), key=lambda item: order[item[0]]))
    return targets, AdaptReport("lora", replace(config, keys=keys, num_layers=count), notices=notices)


def _vision_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of an mlx-vlm model's vision tower, all of them; none for mlx-lm's models, which have no such tower.

    mlx-vlm's towers agree on the attribute, not on what is inside: the layers are the list that holds most modules.
    """
    if not type(model).__module__.startswith("mlx_vlm."):
        return []
    tower = getattr(model, "vision_tower", getattr(model, "vision_model", None))
    lists = [
        value
        for _, module in (tower.named_modules() if tower is not None else [])
        for value in module.values()
        if isinstance(value, list) and all(isinstance(item, nn.Module) for item in value)
    ]
    return max(lists, key=lambda found: sum(len(item.modules()) for item in found), default=[])


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, layouts.LINEAR + layouts.SWITCH + EMBEDDING) or hasattr(module, "to_lora")


def _read_directly(model: nn.Module) -> set[int]:
    """Ids of modules whose weight the model's own code reads, past their call: an adapter there would break it."""
    found = set()
    for _, module in model.named_modules():
        names = _weights_read_by(cast(Hashable, type(module)))
        found |= {id(child) for name, child in module.items() if name in names}
    return found


@cache
def _weights_read_by(cls: Hashable) -> frozenset[str]:
    """Names n for which a method of the class that is not set-up code reads self.n.weight."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cast(type, cls))))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    return frozenset(
        node.value.attr
        for method in ast.walk(tree)
        if isinstance(method, ast.FunctionDef) and method.name not in ("__init__", "sanitize", "shard")
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and node.attr == "weight"
        and isinstance(node.value, ast.Attribute)
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id == "self"
    )


def _routers(model: nn.Module) -> set[str]:
    """Paths of linears that choose experts: beside an expert block, with one output per expert or only one."""
    found = set()
    for path, module in model.named_modules():
        experts = {m.num_experts for _, m in module.named_modules() if isinstance(m, layouts.SWITCH)}
        for name, child in module.items():
            if isinstance(child, layouts.LINEAR) and experts and layouts.output_dims(child) in (*experts, 1):
                found.add(f"{path}.{name}" if path else name)
    return found


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
        layouts.verify(match, gated, dtype)
    except ValueError as error:
        report.skipped.append(Skipped(match.path, f"stays plain LoRA: {error}"))
        return
    for path in paths.values():
        adapters.pop(path, None)
    _put(model, match.path, gated)
    report.gated.append(Gated(match.path, layout.name, activation.name, match.experts))


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


def load_weights(model: nn.Module, path: Path) -> None:
    """Load trained arrays into an adapted model.

    Raises:
        InputError: the file is missing or unreadable, or lists every array that does not fit, with both shapes.
    """
    if not path.exists():
        raise InputError(f"no adapter weights at {path}")
    try:
        loaded: dict[str, mx.array] = dict(mx.load(str(path)))  # type: ignore[arg-type]
    except Exception as error:
        raise InputError(f"{path} is no readable safetensors file ({error})") from None
    wanted = adapter_weights(model)
    problems = [f"{name} is missing" for name in wanted if name not in loaded]
    for name, array in loaded.items():
        if name not in wanted:
            problems.append(f"{name} is no trainable array of the model")
        elif array.shape != wanted[name].shape:
            problems.append(f"{name} is {array.shape}, the model has {wanted[name].shape}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(
            f"{path} does not fit the model (same --rank, --keys and --num-layers?): {'; '.join(problems[:3])}{more}"
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
    content = read_description(Path(directory))
    path = Path(directory) / ADAPTER_CONFIG
    if content.get("fine_tune_type", "lora") != "lora":
        raise InputError(f"{path}: holds {content['fine_tune_type']!r}; load_adapter takes LoRA adapters")
    try:
        lora = {key: content["lora_parameters"][key] for key in ("rank", "scale", "dropout")}
        settings = {
            **lora,
            "keys": content["lora_parameters"].get("keys"),
            "num_layers": content["num_layers"],
        }
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: {error} is missing; mlx-lm could not load this adapter either") from None
    settings.update(content.get(NA_KEY, {}))
    settings["num_layers"] = max(settings["num_layers"], 0) or -1  # mlx-lm takes 0 and below for all layers
    reject_unknown(settings, NALoRAConfig.__dataclass_fields__, str(path))
    report = adapt(model, NALoRAConfig(**coerce(settings, NALoRAConfig, str(path))))
    load_weights(model, Path(directory) / ADAPTER_FILE)
    return report


def load_any_adapter(model: nn.Module, directory: Path) -> None:
    """Load a LoRA adapter as `load_adapter` does; DoRA and full weights as mlx-lm does.

    Raises:
        InputError: something is missing or does not fit the model.
    """
    from mlx_lm.tuner.utils import load_adapters

    if read_description(directory).get("fine_tune_type", "lora") == "lora":
        load_adapter(model, directory)
        return
    try:
        load_adapters(model, str(directory))
    except Exception as error:
        raise InputError(f"--adapter-path {directory}: {error}") from None


def read_description(directory: Path) -> dict[str, Any]:
    """Read adapter_config.json of a saved adapter.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    path = directory / ADAPTER_CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"no adapter in {directory}: {ADAPTER_CONFIG} is missing; check --adapter-path"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    return content
