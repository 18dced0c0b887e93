"""The choice of modules to adapt: keys and layers as in mlx-lm, except modules that must not be adapted."""

import ast
import inspect
import textwrap
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from nalora_mlx.adapters import layouts
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.core.errors import InputError, counted
from nalora_mlx.core.notices import Note
from nalora_mlx.core.parsing import nearest
from nalora_mlx.models.vision.model import is_vision_language_model

EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
ROUTER_NAMES = ("gate", "router")
# Modules that compute only the gates, decays and step sizes of a recurrence: a small projection, or a low-rank pair.
# Names are reliable here, because no other module of mlx-lm or mlx-vlm has them.
GATE_NAMES = frozenset(
    {
        *("in_proj_a", "in_proj_b", "in_proj_ba"),  # Qwen3.5, Qwen3-Next
        *("a_proj", "b_proj"),  # OLMo Hybrid; Kimi and Ling have b_proj
        *("f_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj"),  # Ling, Kimi
        *("x_proj", "dt_proj", "bcdt_proj"),  # Mamba, Jamba, PLaMo 2
        *("w_lora", "a_lora", "v_lora", "g_lora"),  # RWKV-7
    }
)
# What other tools call the choice of all linear layers.
ALL_LINEAR = ("all-linear", "all_linear", "all", "linear")
# Reasons to leave a key out by default.
GATE, ROUTER, BLOCKED = "gates of the recurrence", "routers", "another kind of layer has this key too"


@dataclass(frozen=True)
class Targets:
    """The modules to adapt.

    Attributes:
        modules: path -> module, first layer first.
        keys: the keys that name these modules, as mlx-lm writes them.
        num_layers: number of layers, counted from the last.
        notices: warnings about the settings.
        left_out: key -> reason, for keys that are not adapted by default.
    """

    modules: dict[str, nn.Module]
    keys: tuple[str, ...]
    num_layers: int
    notices: list[str]
    left_out: dict[str, str]


class _Layers(NamedTuple):
    """The layers of a model."""

    chosen: list[nn.Module]  # the last num_layers, and all layers of a vision tower that is adapted
    others: list[nn.Module]
    num_layers: int


class _Candidates(NamedTuple):
    """The modules of a model that an adapter fits. A key is a path relative to a layer."""

    inside: dict[str, tuple[str, nn.Module]]  # path -> (key, module), in the chosen layers
    outside: dict[str, nn.Module]  # path -> module, in other layers and outside of layers
    layer_keys: set[str]  # the keys of all layers, chosen or not
    blocked_keys: set[str]  # keys under which a chosen layer has a module that no adapter fits


def select_targets(model: nn.Module, config: NALoRAConfig) -> Targets:
    """Find the modules to adapt, and resolve `keys` and `num_layers`.

    1. Choose the layers: the last `num_layers`, and with `vision` all layers of the vision tower.
    2. Find the modules in them that an adapter fits, and those outside.
    3. Choose among these modules by `keys`. Without keys, take all modules in the chosen layers except the routers of
       experts and the gates of recurrences; with `vision` or `projector`, also the linear layers between the towers.

    Raises:
        InputError: No key names a module, the layers have no module that an adapter fits, or the rank is larger than
            the dimensions of every layer.
    """
    notices: list[str] = []
    if config.num_layers > len(model.layers):
        notices.append(
            Note(
                f"num_layers is {config.num_layers}, but the model has {counted(len(model.layers), 'layer')}; "
                "all of them are adapted"
            )
        )
    layers = _choose_layers(model, config)
    candidates = _find_candidates(model, layers)
    adaptable = candidates.outside | {path: module for path, (_, module) in candidates.inside.items()}
    left_out: dict[str, str] = {}
    if config.keys is None:
        keys, left_out = _default_keys(model, candidates)
        modules = {path: module for path, (key, module) in candidates.inside.items() if key in keys}
        if not modules:
            raise InputError("the layers of this model have no module that a LoRA adapter fits")
        if config.vision or config.projector:
            modules |= _projector(model, candidates)
    else:
        keys = config.keys
        modules = {
            path: module for path, (key, module) in candidates.inside.items() if key in keys or path in keys
        }
        modules |= {path: module for path, module in candidates.outside.items() if path in keys}
        problems = _unknown_keys(keys, candidates)
        if not modules:
            raise InputError("keys: " + "; ".join(problems))
        notices += problems
    if is_vision_language_model(model):
        keys = tuple(modules)  # mlx-vlm takes whole paths only; mlx-lm takes them too
    notices += check_rank(config.rank, modules, adaptable)
    order = {path: position for position, (path, _) in enumerate(layouts.modules_in_order(model))}
    modules = dict(sorted(modules.items(), key=lambda item: order[item[0]]))
    return Targets(modules, keys, layers.num_layers, notices, left_out)


def check_rank(rank: int, targets: Mapping[str, nn.Module], adaptable: Mapping[str, nn.Module]) -> list[str]:
    """Compare the rank with the layers' shapes, before anything is allocated; return notices.

    The product of lora_a and lora_b has at most the rank of the smaller dimension of its layer. A rank above that of
    every layer of the model is a mistake. Above that of some targets it is a notice, because a rank that suits the
    model may well exceed a small projection, such as a gate with 16 outputs.

    Raises:
        InputError: the rank is larger than the smaller dimension of every layer that an adapter fits.
    """
    sizes = {path: size for path, module in adaptable.items() if (size := _dimensions(module)) is not None}
    largest = max(sizes, key=lambda path: min(sizes[path]), default=None)
    if largest is not None and rank > min(sizes[largest]):
        outputs, inputs = sizes[largest]
        raise InputError(
            f"rank is {rank}, larger than the smaller dimension of every layer; {largest} has {outputs} x {inputs} "
            f"weights, so a rank above {min(outputs, inputs)} adds nothing"
        )
    small = [path for path in targets if path in sizes and rank > min(sizes[path])]
    if not small:
        return []
    outputs, inputs = sizes[small[0]]
    return [
        f"rank is {rank}, larger than the smaller dimension of {len(small)} of {len(targets)} adapted modules, such as "
        f"{small[0]} ({outputs} x {inputs}); there, a rank above {min(outputs, inputs)} adds nothing"
    ]


def _dimensions(module: nn.Module) -> tuple[int, int] | None:
    """Return the outputs and inputs of a layer, or of each of its experts; None if it has no weight of its own."""
    weight = module.get("weight")
    if not isinstance(weight, mx.array) or weight.ndim < 2:
        return None
    outputs, columns = weight.shape[-2:]
    return outputs, columns * 32 // module.bits if "scales" in module else columns


# --- layers -------------------------------------------------------------------------------------------------


def _choose_layers(model: nn.Module, config: NALoRAConfig) -> _Layers:
    layers, num_layers = list(model.layers), config.num_layers
    vision = vision_layers(model) if config.vision else []
    if (config.vision or config.projector) and not is_vision_language_model(model):
        flag = "vision" if config.vision else "projector"
        raise InputError(f"{flag} is set, and the model was not loaded with a vision tower; remove it")
    # As in mlx-lm, 0 and negative numbers mean all layers.
    count = min(num_layers, len(layers)) if num_layers > 0 else len(layers)
    first = len(layers) - count
    return _Layers(layers[first:] + vision, layers[:first], count)


def vision_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of an mlx-vlm model's vision tower; none for models of mlx-lm.

    The towers of mlx-vlm share the attribute's name but not their structure. The layers are the list with most modules.
    """
    if not is_vision_language_model(model):
        return []
    tower = getattr(model, "vision_tower", getattr(model, "vision_model", None))
    lists = [
        value
        for _, module in (tower.named_modules() if tower is not None else [])
        for value in module.values()
        if isinstance(value, list) and all(isinstance(item, nn.Module) for item in value)
    ]
    return max(lists, key=lambda layers: sum(len(layer.modules()) for layer in layers), default=[])


def _projector(model: nn.Module, candidates: _Candidates) -> dict[str, nn.Module]:
    """Return the linear layers that are neither in the language model nor in a layer of the vision tower."""
    left_out = {id(module) for layer in vision_layers(model) for module in layer.modules()} | _read_directly(
        model
    )
    return {
        path: module
        for path, module in candidates.outside.items()
        if isinstance(module, layouts.LINEAR)
        and not path.startswith("language_model.")
        and id(module) not in left_out
    }


# --- modules ------------------------------------------------------------------------------------------------


def _find_candidates(model: nn.Module, layers: _Layers) -> _Candidates:
    paths = {id(module): path for path, module in model.named_modules()}
    read_directly = _read_directly(model)
    inside: dict[str, tuple[str, nn.Module]] = {}
    layer_keys: set[str] = set()
    blocked_keys: set[str] = set()
    for layer in layers.chosen:
        for key, module in layer.named_modules():
            if not _is_adaptable(module):
                blocked_keys.add(key)
            elif key and id(module) not in read_directly:
                layer_keys.add(key)
                inside[f"{paths[id(layer)]}.{key}"] = (key, module)
    for layer in layers.others:
        layer_keys |= {
            key
            for key, module in layer.named_modules()
            if key and _is_adaptable(module) and id(module) not in read_directly
        }
    outside = {
        path: module
        for path, module in model.named_modules()
        if path and path not in inside and _is_adaptable(module)
    }
    if is_vision_language_model(model):  # their keys are whole paths, which name no other module
        blocked_keys.clear()
    return _Candidates(inside, outside, layer_keys, blocked_keys)


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, layouts.LINEAR + layouts.SWITCH + EMBEDDING) or hasattr(module, "to_lora")


def _read_directly(model: nn.Module) -> set[int]:
    """Return ids of modules whose weight the model's code reads without calling them, which an adapter would break."""
    found = set()
    for _, module in model.named_modules():
        names = _weights_read_by(cast(Hashable, type(module)))
        found |= {id(child) for name, child in module.items() if name in names}
    return found


@cache
def _weights_read_by(cls: Hashable) -> frozenset[str]:
    """Return the names n for which a method of a class reads self.n.weight; set-up methods do not count."""
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


# --- keys ---------------------------------------------------------------------------------------------------


def _default_keys(model: nn.Module, candidates: _Candidates) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the keys to adapt by default, and key -> reason for the other keys of the chosen layers.

    Blocked keys are left out: mlx-lm could not load such an adapter, since it adapts every module that a key names.
    """
    routers = _routers(model)
    keys: set[str] = set()
    left_out: dict[str, str] = {}
    for path, (key, _) in candidates.inside.items():
        if key in candidates.blocked_keys:
            left_out[key] = BLOCKED
        elif path in routers:
            left_out[key] = ROUTER
        elif not GATE_NAMES.isdisjoint(key.split(".")):
            left_out[key] = GATE
        else:
            keys.add(key)
    return tuple(sorted(keys)), {key: left_out[key] for key in sorted(left_out.keys() - keys)}


def _routers(model: nn.Module) -> set[str]:
    """Return paths of the linear layers that choose experts.

    These are the siblings of experts with one output, or one output per expert, and all linear layers of a sibling with
    a router's name.
    """
    found = set()
    for path, module in model.named_modules():
        outputs = {m.num_experts for _, m in module.named_modules() if isinstance(m, layouts.SWITCH)}
        if not outputs and "experts" not in module:
            continue
        for name, child in module.items():
            child_path = f"{path}.{name}" if path else name
            if isinstance(child, nn.Module) and name in ROUTER_NAMES:
                linear = [inner for inner, m in child.named_modules() if isinstance(m, layouts.LINEAR)]
                found |= {f"{child_path}.{inner}" if inner else child_path for inner in linear}
            elif isinstance(child, layouts.LINEAR) and layouts.output_dims(child) in (*outputs, 1):
                found.add(child_path)
    return found


def _unknown_keys(keys: tuple[str, ...], candidates: _Candidates) -> list[str]:
    """Return an error message for each key that names no candidate."""
    inside, outside, layer_keys, _ = candidates
    inside_keys = {key for key, _ in inside.values()} | inside.keys()
    unknown = [key for key in keys if key not in outside and key not in inside_keys]
    # Full paths that a key of a layer covers are no better suggestions than that key.
    full_paths = {path for path in outside if not any(path.endswith(f".{key}") for key in layer_keys)}
    known = sorted(layer_keys | full_paths)
    return [f"key {key!r} names no linear or embedding layer{_meant_keys(key, known)}" for key in unknown]


def _meant_keys(key: str, known: list[str]) -> str:
    """Return a suggestion of the keys that a wrong one means, or else a list of all keys.

    Other tools call modules by the last part of their path, take several separated by commas, and have a word for all.
    """
    if key.lower() in ALL_LINEAR:
        return "; leave keys out to adapt all linear and embedding layers"
    if "," in key:
        return f"; separate keys by spaces: --keys {' '.join(part.strip() for part in key.split(','))}"
    ends = [name for name in known if f".{name}".endswith(f".{key}") or f".{key}".endswith(f".{name}")]
    if ends:
        return f"; did you mean {' or '.join(map(repr, ends))}?"
    return nearest(key, known)
