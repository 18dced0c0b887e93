"""All settings. Each default is declared here and nowhere else. Checks report all problems at once."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nalora_mlx.core.config_adapter import LORA_NAMES, NA_NAMES, PLAIN_LORA, NALoRAConfig, NAParameters
from nalora_mlx.core.config_data import DataConfig
from nalora_mlx.core.config_fields import not_a_count, setting, too_small, wrong_choices
from nalora_mlx.core.config_preferences import DPO, KTO, ORPO, SFT, SIMPO, PreferenceConfig
from nalora_mlx.core.config_presets import PRESETS
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.parsing import coerce, nearest, reject_unknown
from nalora_mlx.core.yaml_files import read_yaml

__all__ = [
    "DPO",
    "FINE_TUNE_TYPES",
    "KTO",
    "METHOD_LABELS",
    "OPTIMIZERS",
    "ORPO",
    "PLAIN_LORA",
    "SFT",
    "SIMPO",
    "DataConfig",
    "NALoRAConfig",
    "NAParameters",
    "PreferenceConfig",
    "RunConfig",
    "TrainingConfig",
    "load_run_config",
]


@dataclass
class TrainingConfig(PreferenceConfig):
    """Settings of `train`. Names, meanings and defaults are those of mlx-lm's trainer.

    Settings marked `may_change` may differ when a run is resumed. All others determine what the run computes.
    """

    batch_size: int = setting(4, "number of rows per batch")
    iters: int = setting(1000, "number of batches to train on", may_change=True)
    epochs: float | None = setting(
        None, "number of passes over the training set, instead of iters", may_change=True
    )
    val_batches: int = setting(25, "number of validation batches, the same each time; -1 for all")
    steps_per_report: int = setting(
        10, "number of iterations between reports of the training loss", may_change=True
    )
    steps_per_eval: int = setting(200, "number of iterations between validations", may_change=True)
    save_every: int = setting(100, "number of iterations between checkpoints", may_change=True)
    keep_last: int | None = setting(None, "number of checkpoints to keep (default: all)", may_change=True)
    early_stopping: int | None = setting(
        None, "number of validations without improvement before stopping (default: never)", may_change=True
    )
    max_bad_steps: int = setting(
        3,
        "number of consecutive updates with a NaN or infinite loss or gradient before stopping",
        may_change=True,
    )
    max_seq_length: int = setting(2048, "maximum tokens of a row; longer rows are truncated", may_change=True)
    grad_checkpoint: bool = setting(False, "save memory by recomputing activations in the backward pass")
    grad_checkpoint_every: int = setting(1, "with grad_checkpoint, recompute only every N-th layer")
    grad_accumulation_steps: int = setting(1, "number of batches per optimizer update")
    grad_clip: float | None = setting(None, "maximum norm of the gradient (default: no clipping)")
    clear_cache_threshold: int | None = setting(
        None,
        "size above which the allocator's cache is cleared, in bytes or as 500MB, 2GB (default: cleared after each "
        "step on a CPU, and on a GPU when memory nears 85% of the budget)",
        size=True,
        may_change=True,
    )
    wired_limit: int | None = setting(
        None,
        "memory that Metal keeps resident, in bytes or as 8GB; 0 for none (default: the planned peak and a margin; at "
        "most the device's recommended working set)",
        size=True,
        may_change=True,
    )
    packing: bool = setting(
        False,
        "pack rows into sequences no longer than the longest row; they do not attend to each other",
    )
    seed: int = setting(0, "seed of all random number generators")

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        found = too_small(self, 1, "batch_size", "iters", "steps_per_report", "steps_per_eval", "save_every")
        found += too_small(self, 1, "keep_last", "early_stopping", "max_bad_steps")
        found += too_small(self, 1, "grad_accumulation_steps", "grad_checkpoint_every")
        found += too_small(self, 0, "clear_cache_threshold", "wired_limit")
        found += too_small(self, 2, "max_seq_length") + not_a_count(self, "val_batches")
        if self.grad_clip is not None and not (math.isfinite(self.grad_clip) and self.grad_clip > 0):
            found.append(f"grad_clip is {self.grad_clip}; it must be a number above 0")
        if self.grad_checkpoint_every > 1 and not self.grad_checkpoint:
            found.append(f"grad_checkpoint_every is {self.grad_checkpoint_every}; it needs grad_checkpoint")
        if not 0 <= self.seed < 2**64:
            found.append(f"seed is {self.seed}; it must not be negative")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            found.append(f"epochs is {self.epochs}; it must be a number above 0")
        return found + wrong_choices(self) + self.preference_problems()


OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")
# Fine-tuning methods, and their names in messages, reports and model cards.
METHOD_LABELS = {"na-lora": "NA-LoRA", "lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}
FINE_TUNE_TYPES = tuple(METHOD_LABELS)


# Keys of a YAML file -> the settings under them, which are flags of their own.
GROUPS = {"lora_parameters": LORA_NAMES, "na_parameters": NA_NAMES}


@dataclass
class RunConfig(TrainingConfig, DataConfig):
    """Settings of `nalora lora`: every key of `mlx_lm.lora` 0.32 with its default, and our own.

    `load_run_config` sets `given`: the settings that a command line gives, or a file with another value than the
    default -> where they are given, in words.
    """

    model: str = setting("Qwen/Qwen3-0.6b", "base model: directory or Hugging Face repo", metavar="MODEL")
    preset: str | None = setting(
        None, "settings to start from, which others override", choices=tuple(PRESETS)
    )
    train: bool = setting(False, "train the model")
    test: bool = setting(False, "evaluate on the test set, with --train after training")
    test_batches: int = setting(500, "number of test batches; -1 for all")
    fine_tune_type: str = setting("na-lora", "fine-tuning method", choices=FINE_TUNE_TYPES)
    optimizer: str = setting("adam", "optimizer", choices=OPTIMIZERS)
    optimizer_config: dict[str, Any] = setting({}, "settings per optimizer", yaml_only=True)
    learning_rate: float = setting(1e-5, "learning rate", metavar="RATE")
    lr_schedule: dict[str, Any] | None = setting(None, "learning rate schedule", yaml_only=True)
    num_layers: int = setting(16, "number of layers to adapt, counted from the end; -1 for all")
    lora_parameters: dict[str, Any] = setting({}, "rank, scale, dropout, keys", yaml_only=True)
    na_parameters: dict[str, Any] = setting(
        {}, "settings of NA-LoRA: mask, statistic, beta and so on", yaml_only=True
    )
    resume_adapter_file: str | None = setting(
        None, "adapter to start from: directory, or file of its weights", metavar="PATH"
    )
    resume: str | None = setting(
        None,
        "continue the run in adapter_path, or from the checkpoint at PATH",
        nargs="?",
        const="latest",
        metavar="PATH",
    )
    resume_anyway: bool = setting(
        False, "resume even if settings, model or data differ from those of the run"
    )
    adapter_path: str = setting(
        "adapters", "where to save the adapter; without --train, load it", metavar="DIR"
    )
    samples: bool = setting(
        True, "at the end of training, keep a few answers of the base and the tuned model, for nalora report"
    )
    plan: bool = setting(False, "only predict how much memory the run needs, and suggest settings that fit")
    memory_budget: int | None = setting(
        None,
        "memory limit, in bytes or as 8GB (default: the device's recommended working set, or 80% of RAM)",
        size=True,
    )
    quantize: int | None = setting(
        None, "bits to quantize the base model to on load, such as 4 (default: none)", metavar="BITS"
    )
    report_to: str | None = setting(
        None, "services to report metrics to, separated by commas: wandb, swanlab, tensorboard"
    )
    project_name: str | None = setting(None, "project name for these services")
    push_to_hub: str | None = setting(
        None, "Hugging Face repo to upload the adapter to after training", metavar="OWNER/NAME"
    )
    trust_remote_code: bool = setting(False, "run code that comes with a model or tokenizer")

    def __post_init__(self) -> None:
        self.given: dict[str, str] = {}

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        found = super().problems()
        found += too_small(self, 1, "memory_budget") + self.data_problems()
        found += not_a_count(self, "test_batches")
        if not (self.train or self.test or self.plan):
            found.append("nothing to do; give --train, --test or both, or --plan")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            found.append(f"learning_rate is {self.learning_rate}; it must be above 0")
        preset = PRESETS.get(self.preset or "", {})
        is_of_preset = self.learning_rate == preset.get("learning_rate") and "learning_rate" not in self.given
        if is_of_preset and self.fine_tune_type == "full":
            found.append(f"preset {self.preset} has a learning rate for adapters; give --learning-rate, too")
        for name in self.optimizer_config:
            if name not in OPTIMIZERS:
                found.append(f"optimizer_config names {name!r}{nearest(name, OPTIMIZERS)}")
        if self.fine_tune_type in ("na-lora", "lora", "dora"):
            try:
                self.lora_config()
            except InputError as error:
                found.append(str(error))
        return found

    def check(self) -> None:
        """Raise InputError if there are problems; the message lists all of them."""
        found = self.problems()
        if found:
            raise InputError("; ".join(found))

    def lora_config(self) -> NALoRAConfig:
        """Return the adapter's settings. For plain LoRA and DoRA, all mechanisms are off.

        Raises:
            InputError: a key is unknown, or a value is out of range.
        """
        lora = dict(self.lora_parameters)
        if "alpha" in lora and "scale" not in lora:
            raise InputError("lora_parameters has 'alpha'; mlx-lm uses 'scale' (= alpha / rank)")
        reject_unknown(lora, LORA_NAMES, "lora_parameters")
        reject_unknown(self.na_parameters, NA_NAMES, "na_parameters")
        na = dict(self.na_parameters)
        if self.fine_tune_type != "na-lora":
            na = {name: getattr(PLAIN_LORA, name) for name in ("mask", "step_scaling", "selection_limit")}
        settings = {"num_layers": self.num_layers, **lora, **na}
        return NALoRAConfig(**coerce(settings, NALoRAConfig, "adapter settings"))


def load_run_config(
    path: Path | None,
    flags: Mapping[str, Any],
    saved: Mapping[str, Any] | None = None,
    where: str = "command line",
) -> RunConfig:
    """Merge defaults, the settings of a resumed run, a preset, a YAML file and flags; each overrides those before it.

    Args:
        path: YAML file of settings; None for none.
        flags: settings by name, as from a command line. Those of the adapter are names of their own.
        saved: settings of the run that is resumed, as from a file.
        where: of the flags, for messages.

    Raises:
        InputError: a key is unknown (the message suggests the nearest one), a value has the wrong type, or one place
            gives both iters and epochs.
    """
    given: dict[str, Any] = {} if path is None else _read_file(path)
    default = RunConfig()
    adapter = NALoRAConfig()
    places = {name: str(path) for name, value in given.items() if value != getattr(default, name)}
    for group in GROUPS:
        for name, value in given.get(group, {}).items():
            if value != getattr(adapter, name, None):
                places[name] = f"{group} in {path}"
    flags_given = {name: f"--{name.replace('_', '-')}" for name in flags}
    flags = dict(flags)
    _reject_two_lengths(flags, where)
    preset = PRESETS.get(flags.get("preset") or given.get("preset") or "", {})
    given = _override(_override(saved or {}, preset), given)
    nested = {
        group: {name: flags.pop(name) for name in names if name in flags} for group, names in GROUPS.items()
    }
    given = _override(given, coerce(flags, RunConfig, where) | {key: of for key, of in nested.items() if of})
    if "optimizer" in given:
        given["optimizer"] = given["optimizer"].lower()  # mlx-lm accepts AdamW, too
    config = dataclasses.replace(default, **given)
    config.train |= config.resume is not None
    config.given = places | flags_given
    return config


def _override(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with others on top. Two that mean the same (how long, which data) do not stay together."""
    merged = dict(below)
    for name, other in (
        ("iters", "epochs"),
        ("epochs", "iters"),
        ("data", "hf_dataset"),
        ("hf_dataset", "data"),
    ):
        if above.get(name) is not None:
            merged.pop(other, None)
    for name, value in above.items():
        merged[name] = {**(merged.get(name) or {}), **value} if name in GROUPS else value
    return merged


def _read_file(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    content.pop("config", None)  # mlx_lm.lora accepts this key and ignores it
    groups = {name: group for group, names in GROUPS.items() for name in names}
    reject_unknown(content, [f.name for f in fields(RunConfig)], str(path), groups)
    # As in mlx_lm.lora, null means "not set".
    content = coerce(
        {key: value for key, value in content.items() if value is not None}, RunConfig, str(path)
    )
    _reject_two_lengths(content, str(path))
    return content


def _reject_two_lengths(given: Mapping[str, Any], where: str) -> None:
    if given.get("iters") is not None and given.get("epochs") is not None:
        raise InputError(f"{where}: iters and epochs both set the length of the run; give one of them")
