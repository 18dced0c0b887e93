"""Which modules of a model get an adapter: keys and layers as mlx-lm counts them, minus what must be left alone."""

import ast
import inspect
import textwrap
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import cast

import mlx.nn as nn

from nalora_mlx.adapters import layouts
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.parsing import nearest

EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class Targets:
    """What is to be adapted.

    Attributes:
        modules: full path -> module, first layer first.
        keys: the keys that name them, as mlx-lm writes them.
        num_layers: number of layers, counted from the last.
        notices: what a person should know of it.
    """

    modules: dict[str, nn.Module]
    keys: tuple[str, ...]
    num_layers: int
    notices: list[str]


def select(model: nn.Module, config: NALoRAConfig) -> Targets:
    """Find the modules to adapt; resolve keys and num_layers.

    Raises:
        InputError: no key names a module of the adapted layers, or there is nothing that an adapter fits.
    """
    layers, vision = list(model.layers), _vision_layers(model)
    notices = []
    count = config.num_layers if config.num_layers > 0 else len(layers)  # mlx-lm takes 0 and below for all
    if count > len(layers):
        notices.append(f"num_layers is {count}, the model has {len(layers)}: all of them are adapted")
        count = len(layers)
    chosen = {id(layer) for layer in layers[len(layers) - count :] + vision}
    paths = {id(module): path for path, module in model.named_modules()}
    inside: dict[str, tuple[str, nn.Module]] = {}  # full path -> (key relative to its layer, module)
    everywhere: set[str] = set()
    bare = _read_directly(model)
    # Keys under which a chosen layer has something else, so that mlx-lm could not load an adapter.
    blocked: set[str] = set()
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
    return Targets(targets, keys, count, notices)


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
