"""All settings. Each default is declared here and nowhere else. Checks report all problems at once."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nalora_mlx.core.config_data import DataConfig
from nalora_mlx.core.config_fields import not_a_count, setting, too_small, wrong_choices
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.parsing import coerce, nearest, read_yaml, reject_unknown


@dataclass(frozen=True)
class NAParameters:
    """How NA-LoRA scales the updates of gate-related LoRA columns (`na_parameters` in YAML).

    Source: NA-LoRA (arXiv 2606.31717). docs/method.md says what its abstract fixes and what is our reading.
    """

    mask: str = setting(
        "soft", "kind of temporal-importance mask on the gate channels", choices=("soft", "hard", "off")
    )
    statistic: str = setting(
        "derivative",
        "measure of a channel's responsiveness: |phi'(z)| or |phi'(z) u|",
        choices=("derivative", "sensitivity"),
    )
    beta: float = setting(0.9, "decay rate of the importance's moving average, per optimizer update")
    mask_every: int = setting(1, "number of optimizer updates from one mask to the next")
    mask_warmup: int = setting(10, "number of optimizer updates before the mask starts")
    keep_fraction: float = setting(0.5, "fraction of channels that a hard mask keeps")
    step_scaling: bool = setting(True, "scale updates by the regions of the homogeneity partition")
    gamma: tuple[float, ...] = setting(
        (0.5, 1.0, 1.0), "update scale in the suppressed, transition and homogeneous regions", nargs=3
    )
    boundaries: tuple[float, ...] | None = setting(
        None, "boundaries of the regions in z (default: those of the activation)", nargs=2
    )
    preserve: str = setting(
        "rms",
        "statistic of each layer's update that masking and scaling preserve",
        choices=("rms", "mean", "function", "none"),
    )
    max_multiplier: float = setting(4.0, "upper limit of a channel's update multiplier")
    branches: tuple[str, ...] = setting(
        ("gate",), "branches whose updates are masked and scaled", choices=("gate", "up"), nargs="+"
    )
    route: bool = setting(False, "also mask the gradient of the gate's lora_a")

    @property
    def active(self) -> bool:
        """Whether any mechanism is on. If not, training is bit-identical to plain LoRA."""
        return self.mask != "off" or self.step_scaling

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        found = wrong_choices(self) + too_small(self, 1, "mask_every") + too_small(self, 0, "mask_warmup")
        if not 0 <= self.beta < 1:
            found.append(f"beta is {self.beta}; it must be at least 0 and below 1")
        if not 0 < self.keep_fraction <= 1:
            found.append(f"keep_fraction is {self.keep_fraction}; it must be above 0 and at most 1")
        if len(self.gamma) != 3 or min(self.gamma) < 0 or max(self.gamma) <= 0:
            found.append(f"gamma is {list(self.gamma)}; it takes three numbers, none negative, not all 0")
        edges = self.boundaries
        if edges is not None and (len(edges) != 2 or edges[0] >= edges[1]):
            found.append(f"boundaries is {list(edges)}; it takes two increasing numbers")
        if not self.max_multiplier > 0:
            found.append(f"max_multiplier is {self.max_multiplier}; it must be above 0")
        if not self.branches:
            found.append("branches is empty; name gate, up or both")
        return found


PLAIN_LORA = NAParameters(mask="off", step_scaling=False)


@dataclass(frozen=True)
class NALoRAConfig(NAParameters):
    """Settings of `adapt`: the LoRA settings of mlx-lm, and those of NA-LoRA.

    `scale` multiplies the low-rank product, as in mlx-lm; other libraries set alpha / rank. `keys` are module paths,
    relative to a layer ("mlp.gate_proj") or, outside the layers, from the root of the model. None adapts every linear
    and embedding layer in the last `num_layers` layers, except the routers of expert models.

    Raises:
        InputError: a value is out of range; the message lists all of them.
    """

    rank: int = setting(8, "rank of the low-rank update", flag=True)
    scale: float = setting(20.0, "factor of the low-rank update; alpha / rank in other libraries", flag=True)
    dropout: float = setting(0.0, "dropout rate on the input of the low-rank update", flag=True)
    keys: tuple[str, ...] | None = setting(
        None,
        "modules to adapt, for example mlp.gate_proj (default: all linear and embedding layers)",
        flag=True,
        nargs="+",
    )
    num_layers: int = setting(16, "number of layers to adapt, counted from the end; -1 for all")

    def __post_init__(self) -> None:
        found = self.problems()
        if found:
            raise InputError("NA-LoRA settings: " + "; ".join(found))

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        found = super().problems() + too_small(self, 1, "rank")
        if not math.isfinite(self.scale) or self.scale == 0:
            found.append(f"scale is {self.scale}; it must be a number other than 0")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.keys is not None and not self.keys:
            found.append("keys is empty; name at least one module, or leave it out to adapt all")
        return found

    @property
    def lora_parameters(self) -> dict[str, Any]:
        """The settings that mlx-lm calls `lora_parameters`."""
        return {"rank": self.rank, "scale": self.scale, "dropout": self.dropout, "keys": self.keys}

    @property
    def na_parameters(self) -> dict[str, Any]:
        """The settings that only NA-LoRA has."""
        return {f.name: getattr(self, f.name) for f in fields(NAParameters)}


@dataclass
class TrainingConfig:
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
    max_seq_length: int = setting(
        2048, "maximum length of a row in tokens; longer rows are truncated", may_change=True
    )
    grad_checkpoint: bool = setting(False, "save memory by recomputing activations in the backward pass")
    grad_checkpoint_every: int = setting(1, "with grad_checkpoint, recompute only every N-th layer")
    grad_accumulation_steps: int = setting(1, "number of batches per optimizer update")
    grad_clip: float | None = setting(None, "maximum norm of the gradient (default: no clipping)")
    clear_cache_threshold: int = setting(
        0,
        "size above which the allocator's cache is cleared, in bytes or as 500MB, 2GB",
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
        found += too_small(self, 2, "max_seq_length") + not_a_count(self, "val_batches")
        if self.grad_clip is not None and not (math.isfinite(self.grad_clip) and self.grad_clip > 0):
            found.append(f"grad_clip is {self.grad_clip}; it must be a number above 0")
        if self.grad_checkpoint_every > 1 and not self.grad_checkpoint:
            found.append(f"grad_checkpoint_every is {self.grad_checkpoint_every}; it needs grad_checkpoint")
        if not 0 <= self.seed < 2**64:
            found.append(f"seed is {self.seed}; it must not be negative")
        if self.epochs is not None and not self.epochs > 0:
            found.append(f"epochs is {self.epochs}; it must be above 0")
        return found


OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")
# Fine-tuning methods, and their names in messages, reports and model cards.
METHOD_LABELS = {"na-lora": "NA-LoRA", "lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}
FINE_TUNE_TYPES = tuple(METHOD_LABELS)


@dataclass
class RunConfig(TrainingConfig, DataConfig):
    """Settings of `nalora lora`: every key of `mlx_lm.lora` 0.32 with its default, and our own."""

    model: str = setting("Qwen/Qwen3-0.6b", "model directory, or Hugging Face repo")
    train: bool = setting(False, "train the model")
    test: bool = setting(False, "evaluate on the test set, with --train after training")
    test_batches: int = setting(500, "number of test batches; -1 for all")
    fine_tune_type: str = setting("na-lora", "fine-tuning method", choices=FINE_TUNE_TYPES)
    optimizer: str = setting("adam", "optimizer", choices=OPTIMIZERS)
    optimizer_config: dict[str, Any] = setting({}, "settings per optimizer", yaml_only=True)
    learning_rate: float = setting(1e-5, "learning rate")
    lr_schedule: dict[str, Any] | None = setting(None, "learning rate schedule", yaml_only=True)
    num_layers: int = setting(16, "number of layers to adapt, counted from the end; -1 for all")
    lora_parameters: dict[str, Any] = setting({}, "rank, scale, dropout, keys", yaml_only=True)
    na_parameters: dict[str, Any] = setting(
        {}, "settings of NA-LoRA: mask, statistic, beta and so on", yaml_only=True
    )
    resume_adapter_file: str | None = setting(None, "file with adapter weights to start from")
    resume: str | None = setting(
        None,
        "continue a run from its last checkpoint, or from the one at PATH; give the flags of that run",
        nargs="?",
        const="latest",
    )
    resume_anyway: bool = setting(
        False, "resume even if settings, model or data differ from those of the run"
    )
    adapter_path: str = setting(
        "adapters", "directory to save the adapter to; without --train, to load it from"
    )
    plan: bool = setting(False, "only predict how much memory the run needs, and suggest settings that fit")
    memory_budget: int | None = setting(
        None,
        "memory limit, in bytes or as 8GB (default: the device's recommended working set, or 80% of RAM)",
        size=True,
    )
    quantize: int | None = setting(
        None, "number of bits to quantize the base model to on load (default: none)"
    )
    report_to: str | None = setting(
        None, "services to report metrics to, separated by commas: wandb, swanlab, tensorboard"
    )
    project_name: str | None = setting(None, "project name for these services")
    trust_remote_code: bool = setting(False, "run code that comes with a model or tokenizer")

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        found = super().problems() + wrong_choices(self)
        found += too_small(self, 1, "memory_budget") + self.data_problems()
        found += not_a_count(self, "test_batches")
        if not (self.train or self.test or self.plan):
            found.append("nothing to do; give --train, --test or both, or --plan")
        if self.resume is not None and not self.train:
            found.append("resume needs --train")
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
        """Raise InputError if there are problems; the message lists all of them."""
        found = self.problems()
        if found:
            raise InputError("; ".join(found))

    def lora_config(self) -> NALoRAConfig:
        """Return the adapter's settings. For plain LoRA and DoRA, both mechanisms are off.

        Raises:
            InputError: a key is unknown, or a value is out of range.
        """
        lora = dict(self.lora_parameters)
        if "alpha" in lora and "scale" not in lora:
            raise InputError("lora_parameters has 'alpha'; mlx-lm uses 'scale' (= alpha / rank)")
        lora_names = ("rank", "scale", "dropout", "keys")
        na_names = tuple(f.name for f in fields(NAParameters))
        reject_unknown(lora, lora_names, "lora_parameters")
        reject_unknown(self.na_parameters, na_names, "na_parameters")
        na = dict(self.na_parameters)
        if self.fine_tune_type != "na-lora":
            na = {"mask": PLAIN_LORA.mask, "step_scaling": PLAIN_LORA.step_scaling}
        settings = {"num_layers": self.num_layers, **lora, **na}
        return NALoRAConfig(**coerce(settings, NALoRAConfig, "adapter settings"))


def load_run_config(path: Path | None, flags: Mapping[str, Any]) -> RunConfig:
    """Merge defaults, a YAML file and command-line flags. Flags override the file, and the file overrides defaults.

    Raises:
        InputError: a key is unknown (the message suggests the nearest one), or a value has the wrong type.
    """
    known = [f.name for f in fields(RunConfig)]
    given: dict[str, Any] = {}
    if path is not None:
        content = read_yaml(path)
        # mlx_lm.lora accepts this key and ignores it.
        content.pop("config", None)
        reject_unknown(content, known, str(path))
        # As in mlx_lm.lora, null means "not set".
        content = {key: value for key, value in content.items() if value is not None}
        given.update(coerce(content, RunConfig, str(path)))
    flags = dict(flags)
    if "iters" in flags and "epochs" not in flags:
        given.pop("epochs", None)  # both set the length of the run, and flags win
    lora_names = [f.name for f in fields(NALoRAConfig) if f.metadata.get("flag")]
    na_names = [f.name for f in fields(NAParameters)]
    for group, names in (("lora_parameters", lora_names), ("na_parameters", na_names)):
        nested = {name: flags.pop(name) for name in names if name in flags}
        if nested:
            given[group] = {**given.get(group, {}), **nested}
    given.update(coerce(flags, RunConfig, "command line"))
    if "optimizer" in given:
        given["optimizer"] = given["optimizer"].lower()  # mlx-lm accepts AdamW, too
    return dataclasses.replace(RunConfig(), **given)
