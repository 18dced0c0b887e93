"""What a PEFT adapter's adapter_config.json says, and whether mlx-lm's adapters can represent it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError, listed

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLED = "adapter_model.bin"
# What to do with an adapter that mlx-lm cannot represent.
MERGE = "merge the adapter in PEFT (merge_and_unload), save the model and convert it with mlx_lm.convert"
# Settings that `peft_import` reads.
READ = {"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
# Settings that change what a PEFT LoRA computes, and the values for which it is a LoRA or DoRA of mlx-lm.
PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    # Others (pissa, olora, corda, loftq, lora_ga, ...) change the base model's weights when PEFT loads it.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
}
# Settings that a trained LoRA does not depend on: where it came from, how it was trained, what the names of its arrays
# say too.
IRRELEVANT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
_TOWERS = re.compile(r"vis(ion|ual)|projector|connector")  # in names of modules of transformers
_OFF: tuple[Any, ...] = (None, False, [], {}, "")  # values with which an unknown setting has no effect


def read_peft_config(directory: Path) -> dict[str, Any]:
    """Read the adapter_config.json of a PEFT LoRA or DoRA.

    Raises:
        InputError: it is missing, or has settings that mlx-lm cannot represent or that are unknown; lists them.
    """
    path = directory / CONFIG
    if not path.exists():
        raise InputError(f"--from-peft {directory}: has no {CONFIG}; give {_alternatives(directory)}")
    config = storage.read_json(path)
    if "peft_type" not in config:
        raise InputError(f"{path}: has no peft_type; give {_alternatives(directory)}")
    if problems := _problems(config):
        raise InputError(f"{path}: mlx-lm's adapters cannot represent this: {listed(problems)}; {MERGE}")
    return config


def _problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, value in config.items():
        if key in PLAIN_VALUES:
            if value not in PLAIN_VALUES[key]:
                problems.append(f"{key} is {value!r}")
        elif key not in READ | IRRELEVANT and value not in _OFF:
            problems.append(
                f"{key} is {value!r}, a setting unknown here (delete it if the adapter does not need it)"
            )
    return problems


def find_weights(directory: Path) -> Path:
    """Return the path of a PEFT adapter's arrays.

    Raises:
        InputError: there is none in safetensors format.
    """
    path = directory / WEIGHTS
    if path.exists():
        return path
    if (directory / _PICKLED).exists():
        raise InputError(
            f"{directory / _PICKLED}: is pickled code, which is not read; load the adapter in PEFT "
            f"(PeftModel.from_pretrained) and save it again (save_pretrained), which writes {WEIGHTS}"
        )
    raise InputError(f"--from-peft {directory}: has no {WEIGHTS}; give {_alternatives(directory)}")


def adapts_towers(directory: Path) -> bool:
    """Return whether a PEFT adapter of a vision-language model adapts more than its language model.

    Raises:
        InputError: it has no arrays in safetensors format, or the file is damaged.
    """
    return any(_TOWERS.search(name) for name in storage.array_shapes(find_weights(directory)))


def _alternatives(directory: Path) -> str:
    """Say which directory to give instead."""
    found = adapters_inside(directory)
    return f"one of the adapters in it: {', '.join(found)}" if found else "the directory of a PEFT adapter"


def adapters_inside(directory: Path) -> list[str]:
    """Return the subdirectories with PEFT adapters, in which PEFT saves all adapters but the one named default."""
    return sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
