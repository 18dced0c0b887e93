"""Account for every key of config.json: it is read, translated, known to be irrelevant, refused or reported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nalora_mlx.models import config_keys, rope_config
from nalora_mlx.models.model_class import TEXT, ModelClass, field_names

# Settings inside `rope_parameters` and `rope_scaling` that mlx-lm reads or that the type of scaling implies.
_ROPE_KEYS = """
    type rope_type rope_theta factor partial_rotary_factor original_max_position_embeddings low_freq_factor
    high_freq_factor beta_fast beta_slow mscale mscale_all_dim attention_factor short_factor long_factor short_mscale
    long_mscale mrope_section mrope_interleaved alpha llama_4_scaling_beta max_position_embeddings truncate finetuned
    extrapolation_factor
"""


def account(
    config: Mapping[str, Any], text: Mapping[str, Any], model: ModelClass
) -> tuple[list[str], list[str]]:
    """Check the keys that mlx-lm's class does not read.

    Args:
        config: content of config.json.
        text: the part that the language model reads, translated.
        model: its class.

    Returns:
        Problems, which change results and cannot be applied, and notices, one line each.
    """
    problems: list[str] = []
    notices: list[str] = []
    unknown = [f"{rope_config.NEW}.{key}" for key in _unknown_rope_keys(text)]
    for key, value in text.items():
        if model.reads(key) or _reads_elsewhere(key, model) or config_keys.is_irrelevant(key):
            continue
        if (rule := config_keys.find_rule(key)) is None:
            unknown.append(key)
        elif not rule.harmless(value, text, model):
            what = f"{key} is {value!r}, and mlx-lm's {model.text_name} {rule.effect}"
            (problems if rule.refuse else notices).append(what)
        elif rule.keys == config_keys.ACTIVATION and config_keys.is_other_gelu(value, model):
            notices.append(
                f"{key} is {value!r}, and mlx-lm's {model.text_name} computes GELU in the other way, which changes "
                "results slightly"
            )
    if model.nested:
        top = field_names(model.args) | {TEXT} | text.keys()
        known = (config_keys.is_irrelevant(key) or config_keys.find_rule(key) for key in config)
        unknown += [key for key, found in zip(config, known, strict=True) if key not in top and not found]
    if unknown:
        notices.append(
            f"config.json: not read by mlx-lm's {model.text_name}, and not known to be irrelevant: "
            f"{', '.join(map(_shown, sorted(set(unknown))))}"
        )
    difference = config_keys.DIFFERENCES.get(model.text_name)
    if difference is not None and difference.when(text):
        what = f"mlx-lm's {model.text_name} {difference.effect}"
        (problems if difference.refuse else notices).append(what)
    if _window_without_layers(text, model):
        notices.append(
            f"sliding_window is {text['sliding_window']}, and mlx-lm's {model.text_name} attends to tokens beyond it, "
            "because layer_types is absent"
        )
    return problems, notices + list(rope_config.differences(text, model))


def _shown(key: str) -> str:
    return key if re.fullmatch(r"[\w.-]+", key) else repr(key)


def _reads_elsewhere(key: str, model: ModelClass) -> bool:
    """Return whether a wrapper has a field of this name, for a config without a part for the language model."""
    return model.is_wrapper and not model.nested and key in field_names(model.args)


def _window_without_layers(text: Mapping[str, Any], model: ModelClass) -> bool:
    """Return whether a class with a field for the window ignores it because no layer is said to have one."""
    key = "sliding_window"
    rule = config_keys.find_rule(key)
    ignored = model.text_name in config_keys.WINDOW_BY_LAYER and text.get("layer_types") is None
    return ignored and key in text and rule is not None and not rule.harmless(text[key], text, model)


def _unknown_rope_keys(text: Mapping[str, Any]) -> Iterator[str]:
    for key in (rope_config.NEW, rope_config.OLD):
        value = text.get(key)
        for parameters in rope_config.by_layer_type(value) if isinstance(value, Mapping) else ():
            yield from parameters.keys() - set(_ROPE_KEYS.split())
