"""Every setting and its default, declared once, with checks that report all problems."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.parsing import coerce, nearest, read_yaml, reject_unknown


def _setting(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a dataclass field: its default, its help text, and how a command line shows it."""
    metadata["help"] = help
    if isinstance(default, dict | list):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class NAParameters:
    """How NA-LoRA shapes the steps of gate-related LoRA columns (`na_parameters` in YAML).

    Source: NA-LoRA (arXiv 2606.31717); the README says what its abstract fixes and what is our reading.
    """

    mask: str = _setting("soft", "temporal-importance mask on gate channels", choices=("soft", "hard", "off"))
    statistic: str = _setting(
        "derivative",
        "what makes a channel responsive: |phi'(z)| or |phi'(z) u|",
        choices=("derivative", "sensitivity"),
    )
    beta: float = _setting(0.9, "smoothing of the importance over optimizer steps")
    mask_every: int = _setting(1, "optimizer steps between two masks")
    mask_warmup: int = _setting(10, "first optimizer steps, which use no mask")
    keep_fraction: float = _setting(0.5, "share of channels that a hard mask keeps")
    step_scaling: bool = _setting(True, "scale steps by the homogeneity partition")
    gamma: tuple[float, ...] = _setting(
        (0.5, 1.0, 1.0), "step scale of the suppressed, transition and homogeneous region", nargs=3
    )
    boundaries: tuple[float, ...] | None = _setting(
        None, "boundaries of the partition in z (default: the activation's own)", nargs=2
    )
    preserve: str = _setting(
        "rms",
        "what of the whole step the scales keep per layer",
        choices=("rms", "mean", "function", "none"),
    )
    max_multiplier: float = _setting(4.0, "cap of a channel's step multiplier")
    branches: tuple[str, ...] = _setting(
        ("gate",), "branches whose steps are scaled", choices=("gate", "up"), nargs="+"
    )
    route: bool = _setting(False, "mask the gradient that reaches the gate's lora_a as well")

    @property
    def active(self) -> bool:
        """Whether any mechanism changes training; if not, it is plain LoRA to the last bit."""
        return self.mask != "off" or self.step_scaling

    def problems(self) -> list[str]:
        """List what is wrong with the values, one sentence each."""
        found = _wrong_choices(self)
        if not 0 <= self.beta < 1:
            found.append(f"beta is {self.beta}; it must be at least 0 and below 1")
        if self.mask_every < 1:
            found.append(f"mask_every is {self.mask_every}; it must be at least 1")
        if self.mask_warmup < 0:
            found.append(f"mask_warmup is {self.mask_warmup}; it must not be negative")
        if not 0 < self.keep_fraction <= 1:
            found.append(f"keep_fraction is {self.keep_fraction}; it must be above 0 and at most 1")
        if len(self.gamma) != 3 or min(self.gamma) < 0 or max(self.gamma) <= 0:
            found.append(f"gamma is {list(self.gamma)}; it takes three numbers, none negative, not all 0")
        if self.boundaries is not None and (
            len(self.boundaries) != 2 or self.boundaries[0] >= self.boundaries[1]
        ):
            found.append(f"boundaries is {list(self.boundaries)}; it takes two increasing numbers")
        if not self.max_multiplier > 0:
            found.append(f"max_multiplier is {self.max_multiplier}; it must be above 0")
        if not self.branches:
            found.append("branches is empty; name gate, up or both")
        return found


PLAIN_LORA = NAParameters(mask="off", step_scaling=False)


@dataclass(frozen=True)
class NALoRAConfig(NAParameters):
    """What `adapt` attaches to a model: the LoRA settings of mlx-lm and the NA settings.

    `scale` multiplies the low-rank product, as in mlx-lm (alpha / rank elsewhere). `keys` are paths relative to
    a layer ("mlp.gate_proj"), or full paths for modules outside the layers; None adapts every linear and
    embedding layer inside the last `num_layers` layers, except the routers of expert models.
    """

    rank: int = _setting(8, "rank of the low-rank update", flag=True)
    scale: float = _setting(20.0, "factor of the low-rank update (alpha / rank elsewhere)", flag=True)
    dropout: float = _setting(0.0, "dropout on the input of the low-rank update", flag=True)
    keys: tuple[str, ...] | None = _setting(
        None, "modules to adapt, such as self_attn.q_proj mlp.gate_proj", flag=True, nargs="+"
    )
    num_layers: int = _setting(16, "number of layers to adapt, counted from the last; -1 for all")

    def __post_init__(self) -> None:
        found = self.problems()
        if found:
            raise InputError("NA-LoRA settings: " + "; ".join(found))

    def problems(self) -> list[str]:
        """List what is wrong with the values, one sentence each."""
        found = super().problems()
        if self.rank < 1:
            found.append(f"rank is {self.rank}; it must be at least 1")
        if not math.isfinite(self.scale) or self.scale == 0:
            found.append(f"scale is {self.scale}; it must be a number other than 0")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.keys is not None and not self.keys:
            found.append("keys is empty; name at least one module, or leave it out to adapt all")
        return found

    @property
    def lora_parameters(self) -> dict[str, Any]:
        """The part of the settings that mlx-lm calls `lora_parameters`."""
        return {"rank": self.rank, "scale": self.scale, "dropout": self.dropout, "keys": self.keys}

    @property
    def na_parameters(self) -> dict[str, Any]:
        """The part of the settings that is NA-LoRA's own."""
        return {f.name: getattr(self, f.name) for f in fields(NAParameters)}


@dataclass
class TrainingConfig:
    """How `train` runs: the settings of mlx-lm's trainer, with its meanings and defaults.

    A setting marked `may_change` can be another one when a run is resumed; all others decide what it computes.
    """

    batch_size: int = _setting(4, "rows in a batch")
    iters: int = _setting(1000, "batches to train on", may_change=True)
    epochs: float | None = _setting(None, "passes over the training set, instead of iters", may_change=True)
    val_batches: int = _setting(25, "validation batches, the same ones each time; -1 for all")
    steps_per_report: int = _setting(
        10, "iterations between two reports of the training loss", may_change=True
    )
    steps_per_eval: int = _setting(200, "iterations between two validations", may_change=True)
    save_every: int = _setting(100, "iterations between two checkpoints", may_change=True)
    keep_last: int | None = _setting(None, "checkpoints to keep (default: all)", may_change=True)
    early_stopping: int | None = _setting(
        None, "stop after so many validations without a better loss (default: never)", may_change=True
    )
    max_bad_steps: int = _setting(
        3, "stop after so many updates in a row whose loss or gradient is not finite", may_change=True
    )
    max_seq_length: int = _setting(2048, "longest row in tokens; longer ones are cut", may_change=True)
    grad_checkpoint: bool = _setting(False, "recompute activations in the backward pass to save memory")
    grad_checkpoint_every: int = _setting(1, "with grad_checkpoint: recompute every k-th layer only")
    grad_accumulation_steps: int = _setting(1, "batches per optimizer update")
    grad_clip: float | None = _setting(None, "largest norm of an update's gradient (default: no clipping)")
    clear_cache_threshold: int = _setting(
        0,
        "free the allocator's cache between steps once it exceeds this (bytes, or 500MB, 2GB)",
        size=True,
        may_change=True,
    )
    packing: bool = _setting(
        False, "put several rows into one sequence, up to the length of the longest, isolated from each other"
    )
    seed: int = _setting(0, "seed of all random numbers")

    def problems(self) -> list[str]:
        """List what is wrong with the values, one sentence each."""
        found = []
        at_least_1 = ("batch_size", "iters", "steps_per_report", "steps_per_eval", "save_every")
        for name in (*at_least_1, "keep_last", "early_stopping", "max_bad_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name} is {value}; it must be at least 1")
        if self.grad_clip is not None and not (math.isfinite(self.grad_clip) and self.grad_clip > 0):
            found.append(f"grad_clip is {self.grad_clip}; it must be a number above 0")
        if self.grad_accumulation_steps < 1:
            found.append(f"grad_accumulation_steps is {self.grad_accumulation_steps}; it must be at least 1")
        if self.grad_checkpoint_every < 1:
            found.append(f"grad_checkpoint_every is {self.grad_checkpoint_every}; it must be at least 1")
        elif self.grad_checkpoint_every > 1 and not self.grad_checkpoint:
            found.append(f"grad_checkpoint_every is {self.grad_checkpoint_every}; it needs grad_checkpoint")
        if self.val_batches < -1 or self.val_batches == 0:
            found.append(f"val_batches is {self.val_batches}; it must be at least 1, or -1 for all")
        if self.max_seq_length < 2:
            found.append(f"max_seq_length is {self.max_seq_length}; it must be at least 2")
        if not 0 <= self.seed < 2**64:
            found.append(f"seed is {self.seed}; it must not be negative")
        if self.epochs is not None and not self.epochs > 0:
            found.append(f"epochs is {self.epochs}; it must be above 0")
        return found


OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")
FINE_TUNE_TYPES = ("na-lora", "lora", "dora", "full")


@dataclass
class RunConfig(TrainingConfig):
    """The settings of `nalora lora`: every key and default of `mlx_lm.lora` 0.32, and ours."""

    model: str = _setting("Qwen/Qwen3-0.6b", "local model directory or Hugging Face repo")
    train: bool = _setting(False, "train")
    test: bool = _setting(False, "evaluate on the test set (after training, with --train)")
    test_batches: int = _setting(500, "test batches; -1 for all")
    data: str = _setting(
        "mlx-community/WikiSQL", "directory with {train,valid,test}.jsonl, or a Hugging Face dataset"
    )
    fine_tune_type: str = _setting("na-lora", "kind of fine-tuning", choices=FINE_TUNE_TYPES)
    optimizer: str = _setting("adam", "optimizer", choices=OPTIMIZERS)
    optimizer_config: dict[str, Any] = _setting({}, "settings of each optimizer", yaml_only=True)
    learning_rate: float = _setting(1e-5, "learning rate")
    lr_schedule: dict[str, Any] | None = _setting(None, "schedule of the learning rate", yaml_only=True)
    num_layers: int = _setting(16, "number of layers to adapt, counted from the last; -1 for all")
    lora_parameters: dict[str, Any] = _setting({}, "rank, scale, dropout, keys", yaml_only=True)
    na_parameters: dict[str, Any] = _setting({}, "settings of NA-LoRA", yaml_only=True)
    mask_prompt: bool = _setting(False, "compute the loss on the assistant's turns only")
    resume_adapter_file: str | None = _setting(None, "adapter weights to start from")
    resume: str | None = _setting(
        None,
        "go on from the run's last checkpoint, or the one at PATH, with the run's own flags",
        nargs="?",
        const="latest",
    )
    resume_anyway: bool = _setting(False, "resume even if something differs that decides the result")
    adapter_path: str = _setting("adapters", "where the adapter is saved, or loaded from")
    plan: bool = _setting(False, "say how much memory the run will need, and what would fit; train nothing")
    memory_budget: int | None = _setting(
        None,
        "memory to stay within (bytes, or 8GB; default: the device's recommended working set, or 80% of RAM)",
        size=True,
    )
    show_masks: int = _setting(0, "training rows to print with what is trained on marked")
    quantize: int | None = _setting(None, "quantize the base model to this many bits on load")
    report_to: str | None = _setting(None, "services that get the metrics: wandb, swanlab, tensorboard")
    project_name: str | None = _setting(None, "project name for those services")
    trust_remote_code: bool = _setting(False, "run code that a model or tokenizer brings along")
    hf_dataset: dict[str, Any] | list[Any] | None = _setting(
        None, "Hugging Face dataset(s): path, splits, features", yaml_only=True
    )
    prompt_feature: str = _setting("prompt", "key of the prompt in a row", yaml_only=True)
    completion_feature: str = _setting("completion", "key of the completion in a row", yaml_only=True)
    text_feature: str = _setting("text", "key of the text in a row", yaml_only=True)
    chat_feature: str = _setting("messages", "key of the messages in a row", yaml_only=True)

    def problems(self) -> list[str]:
        """List what is wrong with the values, one sentence each."""
        found = super().problems() + _wrong_choices(self)
        if not (self.train or self.test or self.plan):
            found.append("nothing to do; give --train, --test or both, or --plan")
        if self.memory_budget is not None and self.memory_budget < 1:
            found.append(f"memory_budget is {self.memory_budget}; it must be at least 1")
        if self.test_batches < -1 or self.test_batches == 0:
            found.append(f"test_batches is {self.test_batches}; it must be at least 1, or -1 for all")
        if self.resume is not None and not self.train:
            found.append("resume needs --train")
        if self.show_masks < 0:
            found.append(f"show_masks is {self.show_masks}; it must not be negative")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            found.append(f"learning_rate is {self.learning_rate}; it must be above 0")
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
        """Raise one InputError that lists every problem."""
        found = self.problems()
        if found:
            raise InputError("; ".join(found))

    def lora_config(self) -> NALoRAConfig:
        """Build the adapter's settings; plain LoRA and DoRA have both mechanisms off.

        Raises:
            InputError: on an unknown key or a bad value.
        """
        lora = dict(self.lora_parameters)
        if "alpha" in lora and "scale" not in lora:
            raise InputError("lora_parameters has 'alpha'; mlx-lm's name is 'scale' (= alpha / rank)")
        lora_names = ("rank", "scale", "dropout", "keys")
        na_names = tuple(f.name for f in fields(NAParameters))
        reject_unknown(lora, lora_names, "lora_parameters")
        reject_unknown(self.na_parameters, na_names, "na_parameters")
        na = dict(self.na_parameters)
        if self.fine_tune_type != "na-lora":
            na = {"mask": PLAIN_LORA.mask, "step_scaling": PLAIN_LORA.step_scaling}
        settings = {"num_layers": self.num_layers, **lora, **na}
        return NALoRAConfig(**coerce(settings, NALoRAConfig, "adapter settings"))


def _wrong_choices(settings: Any) -> list[str]:
    found = []
    for f in fields(settings):
        choices = f.metadata.get("choices")
        value = getattr(settings, f.name)
        for item in value if isinstance(value, tuple) else (value,):
            if choices and item not in choices:
                found.append(f"{f.name} is {item!r}; choose from {', '.join(choices)}")
    return found


def load_run_config(path: Path | None, flags: Mapping[str, Any]) -> RunConfig:
    """Merge a YAML file with command-line flags, which win; whatever neither names has its default.

    Raises:
        InputError: an unknown key (with the nearest known one), or a value of the wrong type.
    """
    known = [f.name for f in fields(RunConfig)]
    given: dict[str, Any] = {}
    if path is not None:
        content = read_yaml(path)
        # mlx_lm.lora accepts its own flag's name as a key and ignores it
        content.pop("config", None)
        reject_unknown(content, known, str(path))
        # null means "not set", as there
        content = {key: value for key, value in content.items() if value is not None}
        given.update(coerce(content, RunConfig, str(path)))
    flags = dict(flags)
    if "iters" in flags and "epochs" not in flags:
        given.pop("epochs", None)  # they say the same thing, and flags win
    lora_names = [f.name for f in fields(NALoRAConfig) if f.metadata.get("flag")]
    na_names = [f.name for f in fields(NAParameters)]
    for group, names in (("lora_parameters", lora_names), ("na_parameters", na_names)):
        nested = {name: flags.pop(name) for name in names if name in flags}
        if nested:
            given[group] = {**given.get(group, {}), **nested}
    given.update(coerce(flags, RunConfig, "command line"))
    if "optimizer" in given:
        given["optimizer"] = given["optimizer"].lower()  # mlx-lm takes AdamW as well
    return dataclasses.replace(RunConfig(), **given)
