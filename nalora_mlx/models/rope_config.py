"""Rotary position embeddings in config.json: the two ways to write them, and what mlx-lm's classes apply.

Up to version 4, transformers writes `rope_theta`, `rope_scaling` and, at the top level, `partial_rotary_factor`.
Version 5 writes all of them as `rope_parameters`, once or per type of layer. Most of mlx-lm's classes read only the
older form.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nalora_mlx.models.model_class import ModelClass, field_names, required_names

NEW, OLD = "rope_parameters", "rope_scaling"
DEFAULT = "default"
FULL, SLIDING = "full_attention", "sliding_attention"  # types of layers
# What classes call the base of full attention, that of sliding attention, and the rotated part of a head.
_BASE = ("rope_theta", "rotary_emb_base")
_SLIDING_BASE = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta")
_PARTIAL = ("partial_rotary_factor", "rotary_pct")
# Classes that read `rope_parameters` per layer type.
_PER_TYPE = {"gemma4_text", "laguna", "mellum", "spark2_5"}
# Scaling without effect, for classes that require some.
_WITHOUT_EFFECT: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "deepseek_v2": lambda text: {"type": "yarn", "factor": 1.0},
    "minicpm3": lambda text: {
        "type": "longrope",
        "original_max_position_embeddings": text.get("max_position_embeddings"),
    },
}
_SCALES_FULL_ONLY = {"olmo3"}  # classes with one base, and scaling in full attention only
_FIXED_PARTIAL = {"recurrent_gemma": 0.5}  # classes that always rotate this part of a head
# Scaling types that a class applies if it does not call mlx-lm's `initialize_rope`, which knows them all.
_APPLIED: dict[str, set[str]] = {
    "deepseek": {"linear"},
    "deepseek_v2": {"yarn", "deepseek_yarn"},
    "hunyuan": {"dynamic"},
    "hunyuan_v1_dense": {"dynamic"},
    "internlm2": {"linear", "dynamic"},
    "internlm3": {"linear", "dynamic"},
    "mellum": {"dynamic", "llama3", "yarn", "longrope", "proportional"},
    "minicpm3": {"longrope"},
    "nemotron": {"linear"},
    "nemotron-nas": {"linear", "dynamic", "llama3", "yarn", "longrope"},
    "phi3": {"linear", "longrope", "su"},
    "phimoe": {"longrope"},
    "telechat3": {"linear", "dynamic", "llama3", "yarn", "longrope", "telechat3-yarn"},
}
_PASSES_SCALING = re.compile(
    r"initialize_rope\((?:[^()]|\([^()]*\))*?(?:\.rope_scaling|\.rope_parameters,|scaling_config=)"
)
_ALL = {"linear", "dynamic", "llama3", "yarn", "deepseek_yarn", "telechat3-yarn", "longrope", "proportional"}
_PLAIN = {DEFAULT, "mrope"}  # multimodal RoPE rotates text like the default


def translate(text: Mapping[str, Any], model: ModelClass) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of RoPE that a class reads, from those that a config has, and problems.

    1. If the config has `rope_parameters`, write them as the older keys that the class has fields for, or per layer
       type for a class that reads them so. If it has the older keys and the class prefers `rope_parameters`, do the
       reverse.
    2. Complete the settings of the scaling (`_normalized`), and add those without which the class fails.
    3. Collect what the class does not apply.

    Args:
        text: part of a config that the language model reads.
        model: its class.

    Returns:
        Keys to change, and settings that the class cannot apply, one line each.
    """
    changes: dict[str, Any] = {}
    problems: list[str] = []
    fields = field_names(model.text_args)
    given = text.get(NEW)
    if isinstance(given, Mapping) and (entries := _entries(given, text, problems)) is not None:
        changes[NEW] = given = entries
    problems += _contradictions(text)
    if isinstance(given, Mapping) and given:
        by_type = _per_layer_type(given)
        if by_type is None and model.text_name in _PER_TYPE:
            changes[NEW] = {name: dict(given) for name in text.get("layer_types") or (FULL, SLIDING)}
        elif by_type is None or model.text_name not in _PER_TYPE:
            full, sliding, differing = _full_and_sliding(given, by_type, fields, model)
            problems += differing
            changes |= _old_form(full, sliding, text, fields, model)
            if NEW in fields and by_type is not None:
                changes[NEW] = dict(full)
    elif NEW not in text and "rope_theta" in text and _prefers_new_form(model):
        changes[NEW] = _new_form(text)
    if NEW in fields and by_layer_type(new := changes.get(NEW, text.get(NEW)) or {}) == [new] and new:
        normal = _normalized(new, text) or new
        changes |= {NEW: normal} if normal != new else {}
    merged = {**text, **changes}
    if isinstance(scaling := merged.get(OLD), Mapping):
        normal = _normalized(scaling, merged)
        if normal != scaling:
            changes[OLD] = normal
    elif OLD in required_names(model.text_args):
        changes.setdefault(OLD, None)
    if model.text_name in _WITHOUT_EFFECT and not changes.get(OLD, text.get(OLD)):
        changes[OLD] = _WITHOUT_EFFECT[model.text_name](text)
    return changes, problems + list(_not_applied({**text, **changes}, model))


def _entries(
    given: Mapping[str, Any], text: Mapping[str, Any], problems: list[str]
) -> dict[str, dict[str, Any]] | None:
    """Return what `rope_parameters` has per layer type if it has more than that beside; None if not.

    As in transformers, an entry for a type of `layer_types` makes the others irrelevant, and a base outside completes
    the entries.
    """
    types = text.get("layer_types") or ()
    named = {name: value for name, value in given.items() if name in (types or (FULL, SLIDING))}
    if not named or all(isinstance(value, Mapping) for value in given.values()):
        return None
    for name in (name for name, value in named.items() if not isinstance(value, Mapping)):
        problems.append(f"{NEW}.{name} is {named[name]!r}; give the settings of these layers, or remove it")
    if not types and given.keys() != named.keys():
        problems.append(
            f"{NEW} has settings for {' and '.join(named)} beside others, and there are no layer_types"
        )
    base = {"rope_theta": text["rope_theta"]} if text.get("rope_theta") is not None else {}
    return {name: {**base, **value} for name, value in named.items() if isinstance(value, Mapping)}


def _contradictions(text: Mapping[str, Any]) -> Iterator[str]:
    """Yield where `rope_scaling` and `rope_parameters` contradict each other."""
    new, old = text.get(NEW), text.get(OLD)
    if not isinstance(new, Mapping) or not isinstance(old, Mapping) or not new or not old:
        return
    ignored = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
    parts = [
        (_rope_type(part), {k: v for k, v in part.items() if v is not None and k not in ignored})
        for part in (new, old)
    ]
    if _per_layer_type(new) is None and parts[0] != parts[1]:
        yield f"{NEW} and {OLD} contradict each other; remove one of them"
    elif text.get("rope_theta") not in (None, new.get("rope_theta", text.get("rope_theta"))):
        yield f"rope_theta and {NEW}.rope_theta contradict each other; remove one of them"


def _per_layer_type(given: Mapping[str, Any]) -> dict[str, Mapping[str, Any]] | None:
    """Return `rope_parameters` per layer type, or None if it holds for all layers."""
    by_type = {name: value for name, value in given.items() if isinstance(value, Mapping)}
    return by_type if by_type and len(by_type) == len(given) else None


def _full_and_sliding(
    given: Mapping[str, Any],
    by_type: Mapping[str, Mapping[str, Any]] | None,
    fields: set[str],
    model: ModelClass,
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None, list[str]]:
    """Return the parameters of full and of sliding attention, and problems."""
    if by_type is None:
        return given, None, []
    full = by_type.get(FULL) or next(iter(by_type.values()))
    sliding = by_type.get(SLIDING)
    others = {name: value for name, value in by_type.items() if value != full}
    own_base = any(name in fields for name in _SLIDING_BASE)
    if (
        sliding is not None
        and _rope_type(sliding) == DEFAULT
        and (
            own_base
            or (model.text_name in _SCALES_FULL_ONLY and sliding.get("rope_theta") == full.get("rope_theta"))
        )
    ):
        others.pop(SLIDING, None)
    return full, sliding, [f"{NEW} differs between {FULL} and {name}" for name in others]


def _old_form(
    full: Mapping[str, Any],
    sliding: Mapping[str, Any] | None,
    text: Mapping[str, Any],
    fields: set[str],
    model: ModelClass,
) -> dict[str, Any]:
    """Return the parameters under the names that a class has fields for."""
    changes: dict[str, Any] = {}
    for names, value in (
        (_BASE, full.get("rope_theta")),
        (_SLIDING_BASE, (sliding or {}).get("rope_theta")),
        (_PARTIAL, full.get("partial_rotary_factor")),
    ):
        changes |= {name: value for name in names if name in fields and value is not None}
    if OLD in fields and not text.get(OLD):
        changes[OLD] = None if _rope_type(full) in _PLAIN else _scaling(full)
    original = full.get("original_max_position_embeddings")
    if "original_max_position_embeddings" in fields and original is not None:
        changes["original_max_position_embeddings"] = original
    return {key: value for key, value in changes.items() if key not in text or text[key] != value}


def _prefers_new_form(model: ModelClass) -> bool:
    """Return whether a class takes the base from `rope_parameters` even if they are absent."""
    new = next((field for field in dataclasses.fields(model.text_args) if field.name == NEW), None)
    if new is None or model.text_name in _PER_TYPE:
        return False
    return new.default is not None or "rope_theta" not in field_names(model.text_args)


def _scaling(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}


def _new_form(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the older keys of a config as `rope_parameters`."""
    parameters = {"rope_type": DEFAULT, "rope_theta": text["rope_theta"]}
    if isinstance(scaling := text.get(OLD), Mapping):
        parameters |= {**scaling, "rope_type": _rope_type(scaling)}
    if text.get("partial_rotary_factor") is not None:
        parameters["partial_rotary_factor"] = text["partial_rotary_factor"]
    return parameters


def _normalized(scaling: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a `rope_scaling` with all keys that classes ask for, in the form in which they ask; None for none."""
    kind = _rope_type(scaling)
    if kind == DEFAULT and "mrope_section" not in scaling:
        return None
    normal: dict[str, Any] = {**scaling, "type": kind, "rope_type": kind}
    if isinstance(factor := scaling.get("factor"), int) and not isinstance(factor, bool):
        normal["factor"] = float(factor)
    if kind in ("yarn", "longrope", "llama3") and "original_max_position_embeddings" not in scaling:
        original = text.get("original_max_position_embeddings") or text.get("max_position_embeddings")
        if original is not None:
            normal["original_max_position_embeddings"] = original
    if kind == "yarn":
        normal |= _yarn_attention_factor(scaling)
    return normal


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Return an explicit attention factor as the `mscale` that gives it in mlx-lm: 1 + 0.1 mscale ln(factor)."""
    attention, factor = scaling.get("attention_factor"), scaling.get("factor")
    if not isinstance(attention, int | float) or not isinstance(factor, int | float) or factor <= 1:
        return {}
    return {"mscale": (attention - 1) / (0.1 * math.log(factor)), "mscale_all_dim": 0}


def _rope_type(parameters: Mapping[str, Any]) -> str:
    return str(parameters.get("rope_type") or parameters.get("type") or DEFAULT)


# --- what a class applies -----------------------------------------------------------------------------------


def applied_types(model: ModelClass) -> set[str]:
    """Return the scaling types that a class applies."""
    if model.text_name in _APPLIED:
        return _APPLIED[model.text_name] | _PLAIN
    calls = [call[0] for call in _PASSES_SCALING.finditer(model.source)]
    if not calls:
        return _PLAIN
    # mlx-lm's longrope rotates halves.
    return _PLAIN | (_ALL - {"longrope"} if any("traditional=True" in call for call in calls) else _ALL)


def _not_applied(text: Mapping[str, Any], model: ModelClass) -> Iterator[str]:
    """Yield the RoPE settings of a translated config that a class does not apply, one line each."""
    applied = applied_types(model)
    reported: set[str] = set()
    for key in (NEW, OLD):
        for parameters in by_layer_type(value) if isinstance(value := text.get(key), Mapping) else ():
            if (kind := _rope_type(parameters)) not in applied | reported:
                reported.add(kind)
                yield f"{key} has the type {kind}, which mlx-lm's {model.text_name} does not apply"
    partial, fixed = partial_rotary_factor(text), _FIXED_PARTIAL.get(model.text_name, 1.0)
    if partial is not None and partial != fixed:
        known = field_names(model.text_args) & {*_PARTIAL, "rotary_dim"}
        if not known and not model.mentions("partial_rotary_factor"):
            yield f"partial_rotary_factor is {partial}, and mlx-lm's {model.text_name} rotates all of a head"


def differences(text: Mapping[str, Any], model: ModelClass) -> Iterator[str]:
    """Yield how mlx-lm computes the RoPE of a translated config differently, one line each."""
    for key in (OLD,) if OLD in field_names(model.text_args) else (NEW,):
        for parameters in by_layer_type(value) if isinstance(value := text.get(key), Mapping) else ():
            kind = _rope_type(parameters)
            if kind == "yarn" and parameters.get("truncate") is False:
                yield f"{key}.truncate is False, but mlx-lm rounds the bounds of YaRN, which changes results slightly"
            original = parameters.get("original_max_position_embeddings")
            if kind == "longrope" and parameters.get("short_factor") != parameters.get("long_factor"):
                yield (
                    f"{key} has a short_factor for rows of up to {original} tokens, but mlx-lm always applies its "
                    "long_factor"
                )


def by_layer_type(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the parameters of each layer type, or the only ones."""
    return list((_per_layer_type(parameters) or {"": parameters}).values())


def partial_rotary_factor(text: Mapping[str, Any]) -> float | None:
    """Return the part of a head that a config says is rotated."""
    parameters = text.get(NEW)
    value = parameters.get("partial_rotary_factor") if isinstance(parameters, Mapping) else None
    value = text.get("partial_rotary_factor") if value is None else value
    return value if isinstance(value, int | float) else None
