"""Translate config.json to what mlx-lm's class reads, where transformers writes the same thing in another way."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nalora_mlx.core.errors import listed
from nalora_mlx.models import rope_config
from nalora_mlx.models.config_check import account
from nalora_mlx.models.config_head import HEAD, TIED
from nalora_mlx.models.config_values import invalid_values
from nalora_mlx.models.model_class import (
    TEXT,
    TEXT_TYPES,
    ModelClass,
    field_names,
    find_model_class,
    required_names,
    text_part,
)

# Keys that a class may need, and the names under which a config can have them instead.
_RENAMED: dict[str, tuple[str, ...]] = {
    "block_dim": ("hidden_size",),
    "layer_norm_epsilon": ("rms_norm_eps", "layer_norm_eps"),
    "n_ctx": ("n_positions",),
    "n_group": ("num_expert_group",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "num_experts_per_tok": ("num_experts_per_token", "moe_topk"),
    "num_layers": ("num_hidden_layers",),
    "num_local_experts": ("num_experts",),
}
# Values of keys that a class demands and that a config leaves out where they have no effect.
_NO_EFFECT: dict[str, Any] = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "mlp_bias": False,
    "mlp_only_layers": [],
    "sliding_window": None,
    "sliding_window_pattern": None,
}
# The same for single models: what transformers always does, or what a class demands without using it.
_ALWAYS: dict[str, dict[str, Any]] = {
    "apertus": {"post_norm": False, "qk_norm": True},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "longcat_flash": {
        "attention_method": "MLA",
        "mla_scale_kv_lora": True,
        "mla_scale_q_lora": True,
        "zero_expert_type": "identity",
    },
    "minimax": {"shared_intermediate_size": 0},
    "qwen3_vl_moe": {"norm_topk_prob": True},
}
# Defaults of transformers where those of a class differ.
_DEFAULTS: dict[str, dict[str, Any]] = {"granitemoehybrid": {"time_step_limit": [0.0, math.inf]}}
# Keys with a default that transformers derives from other keys instead.
_DERIVED = {"falcon_h1": "head_dim"}
# Names of layer types: those of transformers 5, and those that a class knows.
_LAYER_TYPES = {
    "granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"},
    "jamba": {"linear_attention": "mamba", "full_attention": "attention"},
}


@dataclass(frozen=True)
class Translation:
    """A config as mlx-lm's class reads it.

    Attributes:
        overrides: top-level keys that differ from the file; the `model_config` of mlx-lm's `load_model`.
        problems: settings that change results and that the class cannot apply, one line each.
        notices: what the user should know, one line each.
    """

    overrides: dict[str, Any]
    problems: list[str]
    notices: list[str]


def translate(config: Mapping[str, Any], weights: Iterable[str] = ()) -> Translation:
    """Translate a config.

    Args:
        config: content of config.json.
        weights: names of the tensors.

    Raises:
        ValueError: mlx-lm has no model of this type, or a value is invalid.
    """
    weights = list(weights)
    if invalid := invalid_values(config, weights):
        raise ValueError(f"config.json: {listed(invalid)}")
    model = find_model_class(config)
    if model is None:
        return Translation({}, [], [])
    before = text_part(config, model)
    text = copy.deepcopy(before)
    changes, problems = rope_config.translate(text, model)
    text |= changes
    text |= _layer_types(text, model)
    text |= _global_heads(text, model, problems)
    text |= {key: value for key, value in _DEFAULTS.get(model.text_name, {}).items() if key not in text}
    if model.text_name == "granitemoehybrid" and text.get("position_embedding_type", "") is None:
        text["position_embedding_type"] = "nope"  # the class takes None for its default, RoPE
    text |= _layer_pattern(text, model, problems)
    text |= _required(text, model)
    text |= _tied(config, text, model, weights)
    if missing := [key for key in required_names(model.text_args) if key not in text]:
        problems.append(f"has no {', '.join(missing)}, which mlx-lm's {model.text_name} needs")
    more, notices = account(config, text, model)
    problems += more
    overrides: dict[str, Any] = {}
    if config["model_type"] in TEXT_TYPES:
        overrides["model_type"] = TEXT_TYPES[config["model_type"]]
    if model.nested:
        lifted = field_names(model.args) - {TEXT} - config.keys() if model.is_wrapper else set()
        overrides |= {key: text[key] for key in lifted if key in text}
        if text != before:
            overrides[TEXT] = text
    else:
        overrides |= {key: value for key, value in text.items() if key not in before or before[key] != value}
    return Translation(overrides, problems, notices)


def mlx_lm_ignores_rope(config: Mapping[str, Any]) -> bool:
    """Return whether mlx-lm, without a translation, computes RoPE with a default base instead of the config's."""
    model = find_model_class(config)
    if model is None:
        return False
    text = text_part(config, model)
    return isinstance(text.get(rope_config.NEW), Mapping) and not (
        model.reads(rope_config.NEW) or "rope_theta" in text
    )


def as_read(config: Mapping[str, Any], translation: Translation) -> dict[str, Any]:
    """Return a config as mlx-lm reads it, with the keys of the language model at the top level."""
    read = {**config, **translation.overrides}
    text = read.pop(TEXT, None)
    inner = text if isinstance(text, Mapping) else {}
    return read | {key: value for key, value in inner.items() if key != "model_type"}


def _required(text: Mapping[str, Any], model: ModelClass) -> dict[str, Any]:
    """Return values for keys that a class needs and a config lacks, where another key has them or none matters."""
    changes: dict[str, Any] = {}
    fields = field_names(model.text_args)
    for key, others in _RENAMED.items():
        found = next((text[other] for other in others if text.get(other) is not None), None)
        if key in fields and key not in text and found is not None:
            changes[key] = found
    defaults = _NO_EFFECT | _ALWAYS.get(model.name, {})
    needed = {*required_names(model.text_args), _DERIVED.get(model.text_name, "")}
    for key in needed - text.keys() - changes.keys():
        if key in defaults:
            changes[key] = defaults[key]
        elif (value := _derived(key, text)) is not None:
            changes[key] = value
    return changes


def _derived(key: str, text: Mapping[str, Any]) -> Any:
    """Return the value of a key that follows from others; None if it does not."""
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    if key == "num_key_value_heads":
        return heads
    head_dim = text.get("head_dim") or (hidden // heads if heads and hidden else None)
    if key == "head_dim":
        return head_dim
    if key == "rotary_dim" and head_dim is not None:
        return int(head_dim * (rope_config.partial_rotary_factor(text) or 1.0))
    if key == "is_moe_layer" and isinstance(kinds := text.get("mlp_layer_types"), list):
        return [kind == "sparse" for kind in kinds]
    return None


def _layer_types(text: Mapping[str, Any], model: ModelClass) -> dict[str, Any]:
    """Return the types of layers under the names that a class knows."""
    names, given = _LAYER_TYPES.get(model.text_name), text.get("layer_types")
    if names is None or not isinstance(given, list):
        return {}
    key = "layer_types" if "layer_types" in field_names(model.text_args) else "layers_block_type"
    types = [names.get(kind, kind) for kind in given]
    return {} if text.get(key) == types or (key != "layer_types" and text.get(key)) else {key: types}


def _global_heads(text: Mapping[str, Any], model: ModelClass, problems: list[str]) -> dict[str, Any]:
    """Return the sizes of heads in full attention, which transformers 5 writes layer by layer."""
    given, types = text.get("per_layer_config"), text.get("layer_types")
    if not given or "global_head_dim" not in field_names(model.text_args):
        return {}
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    entries = list(given.values()) if isinstance(given, Mapping) else [None]
    full = (
        [str(i) for i, kind in enumerate(types) if kind == rope_config.FULL]
        if isinstance(types, list)
        else []
    )
    first = entries[0]
    if (
        not isinstance(first, Mapping)
        or any(entry != first for entry in entries)
        or first.keys() - names.keys()
        or {str(layer) for layer in given} != set(full)
    ):
        problems.append(
            f"per_layer_config is not the same for all layers of {rope_config.FULL} or has more than "
            f"{' and '.join(names)}, and mlx-lm's {model.text_name} reads one setting for them"
        )
        return {}
    changes = {names[key]: value for key, value in first.items()}
    if clashing := [key for key, value in changes.items() if text.get(key) not in (None, value)]:
        problems.append(f"per_layer_config differs from {' and '.join(clashing)}")
    return {"global_head_dim": text.get("head_dim"), **changes} if "global_head_dim" not in text else changes


def _layer_pattern(text: Mapping[str, Any], model: ModelClass, problems: list[str]) -> dict[str, Any]:
    """Return the period of full attention for a class that reads it instead of `layer_types`."""
    fields, types = field_names(model.text_args), text.get("layer_types")
    if "layer_types" in fields or "sliding_window_pattern" not in fields or not isinstance(types, list):
        return {}
    full = rope_config.FULL
    period = types.index(full) + 1 if full in types else len(types) + 1
    if types != [full if (i + 1) % period == 0 else rope_config.SLIDING for i in range(len(types))]:
        problems.append(
            f"layer_types is not periodic, and mlx-lm's {model.text_name} reads one sliding_window_pattern"
        )
    pattern: int | str = period
    if isinstance(text.get("sliding_window_pattern"), str) or model.text_name == "exaone4":
        pattern = "L" * (period - 1) + "G"
    return {} if text.get("sliding_window_pattern") == pattern else {"sliding_window_pattern": pattern}


def _tied(
    config: Mapping[str, Any], text: Mapping[str, Any], model: ModelClass, weights: Iterable[str]
) -> dict[str, Any]:
    """Return whether embedding and output head are tied, for a config that does not say it where the class reads it."""
    if TIED not in field_names(model.text_args):
        return {}
    has_head = any(HEAD.search(name) for name in weights)
    said, above = text.get(TIED), config.get(TIED)
    if said is None:
        tied = False if has_head else above if isinstance(above, bool) else None
        if tied is None and TIED in required_names(model.text_args):
            tied = True
        return {} if tied is None else {TIED: tied}
    # The outer config decides in transformers.
    return {TIED: True} if above is True and not said and not has_head else {}
