"""Model types that can be exported to GGUF, and the reasons why others cannot.

tests/interop/test_gguf_architectures.py compares the logits of every row in mlx-lm and llama.cpp.
"""

import dataclasses
from typing import Any

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf.architecture import Architecture
from nalora_mlx.export.gguf.families.dense import DENSE
from nalora_mlx.export.gguf.families.experts import EXPERTS, UNSUPPORTED_EXPERTS
from nalora_mlx.export.gguf.families.gemma import GEMMA
from nalora_mlx.export.gguf.families.layer_norm import LAYER_NORM
from nalora_mlx.export.gguf.families.recurrent import RECURRENT, UNSUPPORTED_RECURRENT
from nalora_mlx.export.gguf.families.unusual import UNUSUAL

ARCHITECTURES: dict[str, Architecture] = DENSE | LAYER_NORM | GEMMA | UNUSUAL | EXPERTS | RECURRENT

# Why the other model types of mlx-lm cannot be exported.
_NO_ARCHITECTURE = "llama.cpp has no such architecture"
UNSUPPORTED: dict[str, str] = (
    UNSUPPORTED_EXPERTS
    | UNSUPPORTED_RECURRENT
    | {
        "afm7": _NO_ARCHITECTURE,
        "baichuan_m1": _NO_ARCHITECTURE + ": Baichuan-M1 convolves keys and values",
        "bitnet": "llama.cpp's bitnet computes SiLU in the MLP, this model a squared ReLU",
        "gear": _NO_ARCHITECTURE,
        "gptj": "llama.cpp knows the name of GPT-J, but cannot load it",
        "iquestloopcoder": _NO_ARCHITECTURE,
        "llama4_text": "llama.cpp's llama4 needs experts",
        "nanochat": _NO_ARCHITECTURE,
        "olmo": "mlx-lm 0.32.2 cannot compute it: its attention fails on every prompt of two tokens or more",
        "phi3small": _NO_ARCHITECTURE,
        "talkie": "llama.cpp's talkie has the gains multiplied into other weights, which this export does not do",
    }
)


def find_architecture(config: dict[str, Any]) -> Architecture:
    """Return the GGUF architecture of a model.

    Raises:
        InputError: the config's model_type cannot be exported; the message says why, or lists those that can.
    """
    model_type = text_model_type(config)
    arch = ARCHITECTURES.get(model_type)
    if arch is None:
        reason = UNSUPPORTED.get(model_type) or f"supported are {', '.join(sorted(ARCHITECTURES))}"
        raise InputError(f"model_type {model_type}: cannot be exported to GGUF: {reason}")
    return arch


def for_config(arch: Architecture, config: dict[str, Any]) -> Architecture:
    """Return an architecture under the name that it has for a config, which must be translated for mlx-lm."""
    name = arch.other_name(config)
    return dataclasses.replace(arch, name=name) if name else arch


def text_model_type(config: dict[str, Any]) -> str:
    """Return the model type that decides how a model is exported: of Mistral 3 with images, the text model's."""
    model_type: str = config["model_type"]
    inner = (config.get("text_config") or {}).get("model_type")
    return (
        inner if model_type in ("mistral3", "llava") and inner in ("ministral3", "mistral4") else model_type
    )
