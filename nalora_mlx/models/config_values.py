"""Check the types and ranges of values in config.json that most models have.

mlx-lm does not: a value of another type ends in an error that does not name the key, or in wrong results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from nalora_mlx.models import rope_config
from nalora_mlx.models.model_class import TEXT

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "head_dim",
)
_POSITIVE = ("rope_theta", "rope_local_base_freq")
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
# Formats of other programs that mlx-lm converts, and the ending of a tensor's name that marks them.
_CONVERTED = {"gptq": ".qweight", "awq": ".qweight"}


def invalid_values(config: Mapping[str, Any], weights: Iterable[str]) -> list[str]:
    """Return what no model can have, one line for each value.

    Args:
        config: content of config.json.
        weights: names of the tensors.
    """
    found: list[str] = []
    text = config.get(TEXT)
    if text is not None and not isinstance(text, Mapping):
        found.append(_must_be(TEXT, text, "an object"))
    for prefix, part in (("", config), (f"{TEXT}.", text)):
        if isinstance(part, Mapping):
            found += _of_part(prefix, part)
    for key in ("quantization", "quantization_config"):
        if config.get(key) is not None and not isinstance(config[key], Mapping):
            found.append(_must_be(key, config[key], "an object or null"))
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    names = list(weights)
    ending = _CONVERTED.get(str(method))
    if ending and names and not config.get("quantization") and not any(n.endswith(ending) for n in names):
        found.append(
            f"quantization_config says {method}, but the weights have no tensors that end in {ending}; load the model "
            "in transformers, dequantize it and save it, or remove quantization_config if the weights are not quantized"
        )
    return found


def _of_part(prefix: str, part: Mapping[str, Any]) -> Iterator[str]:
    kinds: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
        (_SIZES, _is_size, "a positive integer"),
        # 0 if all layers have experts instead.
        (("intermediate_size",), lambda v: v == 0 or _is_size(v), "an integer that is not negative"),
        (_POSITIVE, _is_positive, "a positive number"),
        (_EPSILONS, lambda value: _is_number(value) and value >= 0, "a number that is not negative"),
        (("tie_word_embeddings",), lambda value: isinstance(value, bool), "true or false"),
    ]
    for keys, valid, description in kinds:
        for key in keys:
            value = part.get(key)
            values = value if isinstance(value, list) else [value]  # some models have one for each layer
            if value is not None and not all(valid(item) for item in values if item is not None):
                yield _must_be(prefix + key, value, description)
    types, layers = part.get("layer_types"), part.get("num_hidden_layers")
    if types is not None:
        if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
            yield _must_be(f"{prefix}layer_types", types, "a list of names")
        elif isinstance(layers, int) and len(types) < layers:
            yield f"{prefix}layer_types has {len(types)} names, but num_hidden_layers is {layers}"
    for key in (rope_config.NEW, rope_config.OLD):
        yield from _rope(prefix, key, part)


def _rope(prefix: str, key: str, part: Mapping[str, Any]) -> Iterator[str]:
    value = part.get(key)
    if value is None:
        return
    if not isinstance(value, Mapping):
        yield _must_be(prefix + key, value, "an object or null")
        return
    by_type = {f"{key}.{name}": entry for name, entry in value.items() if isinstance(entry, Mapping)}
    for path, parameters in {key: value, **by_type}.items():
        path = prefix + path
        for name in ("rope_theta", "factor"):
            given = parameters.get(name, 1.0)
            scales = parameters.get("rope_type", parameters.get("type")) not in (None, rope_config.DEFAULT)
            if not _is_positive(given) and (given is not None or (name == "factor" and scales)):
                yield _must_be(f"{path}.{name}", given, "a positive number")
        kinds = [parameters[name] for name in ("rope_type", "type") if name in parameters]
        if any(kind is not None and not isinstance(kind, str) for kind in kinds):
            yield _must_be(
                f"{path}.{'rope_type' if 'rope_type' in parameters else 'type'}", kinds[0], "a name"
            )
        elif kinds and not any(kinds) and parameters.get("factor") is not None:
            yield f"{path} has a factor, but no type"


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not isinstance(value, float) or math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < 1e300


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _must_be(key: str, value: Any, description: str) -> str:
    text = repr(value)
    return f"{key} is {text if len(text) <= 40 else text[:37] + '...'}, but must be {description}"
