"""The mlx-lm class that a config.json belongs to: which keys it reads, and from which part of the file."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT = "text_config"  # the part of a multimodal model's config that describes the language model
# Text models that transformers saves under a type of their own, and the type under which mlx-lm has them.
TEXT_TYPES = {
    "muse_glimmer_text": "muse_glimmer",
    "qwen2_5_vl_text": "qwen2_vl",
    "qwen2_vl_text": "qwen2_vl",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_vl_text": "qwen3_vl",
    "qwen3_vl_moe_text": "qwen3_vl_moe",
}
# Modules of mlx-lm whose Model holds a `language_model`, and where the class of its arguments is defined.
_LANGUAGE_MODELS = {
    "gemma3": ("gemma3_text", "ModelArgs"),
    "gemma3n": ("gemma3n", "TextConfig"),
    "gemma4": ("gemma4_text", "ModelArgs"),
    "kimi_k25": ("deepseek_v3", "ModelArgs"),
    "kimi_k3": ("kimi_k3", "TextArgs"),
    "kimi_vl": ("kimi_vl", "TextArgs"),
    "lfm2-vl": ("lfm2", "ModelArgs"),
    "llama4": ("llama4", "TextArgs"),
    "minimax_m3_vl": ("minimax_m3_vl", "TextArgs"),
    "mistral3": ("llama", "ModelArgs"),
    "muse_spark": ("muse_spark", "TextArgs"),
    "pixtral": ("llama", "ModelArgs"),
    "prism_hadamard_qwen35": ("qwen3_5", "TextModelArgs"),
    "qwen2_vl": ("qwen2", "ModelArgs"),
    "qwen3_5": ("qwen3_5", "TextModelArgs"),
    "qwen3_5_moe": ("qwen3_5", "TextModelArgs"),
    "qwen3_vl": ("qwen3", "ModelArgs"),
    "qwen3_vl_moe": ("qwen3_moe", "ModelArgs"),
}
# Of mistral3, by the model_type of its text_config.
_MISTRAL = {"ministral3": ("ministral3", "ModelArgs"), "mistral4": ("mistral4", "ModelArgs")}
_LIBRARY = "mlx_lm.models."
_SHARED = {"base", "cache", "mla", "pipeline", "switch_layers"}  # modules that read no config


@dataclass(frozen=True)
class ModelClass:
    """The classes that read a config, as `find_model_class` returns them.

    Attributes:
        name: module of mlx-lm that holds the model.
        args: its ModelArgs.
        text_args: class of the language model's arguments; `args` itself unless the model is a wrapper.
        text_name: module of mlx-lm that holds the language model.
        nested: whether the language model reads `text_config` instead of the top level.
    """

    name: str
    args: type
    text_args: type
    text_name: str
    nested: bool

    @property
    def is_wrapper(self) -> bool:
        """Whether the model holds a language model with arguments of its own."""
        return self.args is not self.text_args

    @functools.cached_property
    def source(self) -> str:
        """Source code of the modules that define the language model, without the fields of dataclasses."""
        return "\n".join(_source(name) for name in sorted(_with_imports({self.name, self.text_name})))

    def reads(self, key: str) -> bool:
        """Return whether the language model's class has a field of this name and its code uses it."""
        return key in field_names(self.text_args) and self.mentions(key)

    def mentions(self, key: str) -> bool:
        """Return whether the code uses an attribute or a string of this name."""
        return re.search(rf"\.{key}\b|[\"']{key}[\"']", self.source) is not None


def find_model_class(config: Mapping[str, Any]) -> ModelClass | None:
    """Return the classes of mlx-lm that read a config; None for a model whose code comes with it.

    Raises:
        ValueError: mlx-lm has no model of this type.
    """
    from mlx_lm.utils import _get_classes

    if config.get("model_file") is not None:
        return None
    model_type = config["model_type"]
    try:
        model, args = _get_classes({**config, "model_type": TEXT_TYPES.get(model_type, model_type)})
    except SystemExit as error:  # one model exits if a package that it needs is absent
        raise ValueError(f"the model type {model_type} needs a package that is not installed") from error
    name = model.__module__.removeprefix(_LIBRARY)
    text_name, class_name = _LANGUAGE_MODELS.get(name, (name, ""))
    text = config.get(TEXT)
    if name == "mistral3" and isinstance(text, Mapping):
        text_name, class_name = _MISTRAL.get(str(text.get("model_type")), (text_name, class_name))
    text_args = getattr(importlib.import_module(_LIBRARY + text_name), class_name) if class_name else args
    reads_nested = text_args is not args or "text_config" in _source(name)
    return ModelClass(name, args, text_args, text_name, reads_nested and isinstance(text, Mapping))


def reads_text(config: Mapping[str, Any]) -> bool:
    """Return whether mlx-lm has a model of a config's type, which then reads text alone."""
    try:
        find_model_class(config)
    except ValueError:
        return False
    return True


def text_part(config: Mapping[str, Any], model: ModelClass) -> dict[str, Any]:
    """Return the part of a config that the language model reads."""
    return dict(config[TEXT] if model.nested else config)


def field_names(args: type) -> set[str]:
    """Return the names of a dataclass's fields."""
    return {field.name for field in dataclasses.fields(args)}


def required_names(args: type) -> list[str]:
    """Return the names of a dataclass's fields without a default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(args) if f.default is f.default_factory is missing]


def _with_imports(names: set[str]) -> set[str]:
    """Return modules and those that they import, as far as they define models or their layers."""
    found: set[str] = set()
    while names:
        name = names.pop()
        found.add(name)
        text = inspect.getsource(importlib.import_module(_LIBRARY + name))
        relative = re.findall(r"^from \.(\w+) import", text, re.M)
        relative += re.findall(r"^from \. import (\w+)", text, re.M)
        names |= set(relative) - found - _SHARED
    return found


@functools.cache
def _source(name: str) -> str:
    """Return the source of a module without the field declarations of its dataclasses."""
    text = inspect.getsource(importlib.import_module(_LIBRARY + name))
    return re.sub(r"^    \w+: [^\n]*$", "", text, flags=re.M)
