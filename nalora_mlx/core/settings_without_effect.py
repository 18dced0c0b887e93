"""Settings that were given and have no effect in a run: a notice for each, so that none is ignored silently."""

import math
from collections.abc import Callable
from typing import NamedTuple

from nalora_mlx.core.config import DPO, KTO, ORPO, SIMPO, RunConfig
from nalora_mlx.core.config_adapter import LORA_NAMES, NA_NAMES
from nalora_mlx.core.config_presets import PRESETS

TRAINING_ONLY = (
    "iters epochs val_batches steps_per_report steps_per_eval save_every keep_last early_stopping max_bad_steps "
    "grad_checkpoint grad_checkpoint_every grad_accumulation_steps grad_clip clear_cache_threshold wired_limit packing "
    "fine_tune_type optimizer optimizer_config learning_rate lr_schedule num_layers resume_adapter_file "
    "preset memory_budget report_to project_name push_to_hub"
)


# Settings of a preference loss, and the train modes that read them.
OF_MODES = {
    "dpo_loss": (DPO,),
    "length_normalized": (DPO,),
    "label_smoothing": (DPO, SIMPO),
    "simpo_margin": (SIMPO,),
    "desirable_weight": (KTO,),
    "undesirable_weight": (KTO,),
}


class Rule(NamedTuple):
    """Settings that have no effect under a condition; `when` completes the sentence "they have no effect ..."."""

    names: tuple[str, ...]
    applies: Callable[[RunConfig], bool]
    when: str
    in_files: bool = True  # False: a file may give them for another job


def _mask(config: RunConfig) -> str:
    return config.lora_config().mask


def _ignores_rate(config: RunConfig) -> bool:
    """Return whether the optimizer computes its learning rate itself, as mlx's Adafactor does by default."""
    settings = config.optimizer_config.get("adafactor") or {}
    return config.optimizer == "adafactor" and settings.get("relative_step", True)


def _is_only_for_na_lora(config: RunConfig) -> bool:
    return set(PRESETS.get(config.preset or "", ())) == {"na_parameters"}


def _only_in(modes: tuple[str, ...], name: str) -> Rule:
    """Return the rule for a setting that only some train modes read."""
    return Rule((name,), lambda c: c.train_mode not in modes, f"without --train-mode {' or '.join(modes)}")


# The first rule that applies to a setting gives the reason.
RULES = (
    Rule(
        (*TRAINING_ONLY.split(), *LORA_NAMES, *NA_NAMES),
        lambda c: not c.train,
        "without --train: the adapter is tested as it was trained",
        in_files=False,
    ),
    Rule(("test_batches",), lambda c: not c.test, "without --test", in_files=False),
    Rule(LORA_NAMES, lambda c: c.fine_tune_type == "full", "in full fine-tuning, which has no adapter"),
    Rule(NA_NAMES, lambda c: c.fine_tune_type != "na-lora", "without fine_tune_type na-lora"),
    Rule(
        ("preset",),
        lambda c: c.fine_tune_type != "na-lora" and _is_only_for_na_lora(c),
        "without fine_tune_type na-lora",
    ),
    Rule(
        ("statistic", "mask_every", "mask_warmup", "route"), lambda c: _mask(c) == "off", "while mask is off"
    ),
    Rule(("keep_fraction",), lambda c: _mask(c) != "hard", "without mask hard"),
    Rule(("gamma", "boundaries"), lambda c: not c.lora_config().step_scaling, "while step_scaling is off"),
    Rule(
        ("beta", "preserve", "max_multiplier", "branches"),
        lambda c: not c.lora_config().scales_channels,
        "while mask and step_scaling are off",
    ),
    Rule(
        ("learning_rate", "lr_schedule"),
        _ignores_rate,
        "with adafactor, which computes its own rate: set optimizer_config: {adafactor: {relative_step: false}}",
    ),
    Rule(
        ("preference_beta", "reference", *OF_MODES),
        lambda c: not c.prefers,
        "without --train-mode dpo, orpo, kto or simpo",
    ),
    Rule(("reference",), lambda c: not c.has_reference, "without a reference: only dpo and kto have one"),
    *(_only_in(modes, name) for name, modes in OF_MODES.items()),
    Rule(
        ("mask_prompt", "last_turn_only"),
        lambda c: c.prefers and c.train_mode != ORPO,
        "in preference training, which compares answers only",
    ),
    Rule(("last_turn_only", "chunk"), lambda c: c.prefers, "in preference training"),
    Rule(("grad_checkpoint_every",), lambda c: not c.grad_checkpoint, "without --grad-checkpoint"),
    Rule(("resume_adapter_file",), lambda c: c.resume is not None, "with --resume, which has a checkpoint"),
    Rule(("resume_anyway",), lambda c: c.resume is None, "without --resume"),
    Rule(("project_name",), lambda c: c.report_to is None, "without report_to"),
    Rule(("last_turn_only",), lambda c: not c.mask_prompt, "without --mask-prompt"),
    Rule(("data",), lambda c: c.hf_dataset is not None, "with hf_dataset, which says where the data is"),
)


def has_effect(config: RunConfig, name: str) -> bool:
    """Return whether a setting has an effect in a run, whatever the data and the model."""
    return not any(name in rule.names and rule.applies(config) for rule in RULES)


def without_effect(config: RunConfig) -> list[str]:
    """Return notices of the settings in `config.given` that have no effect, whatever the data and the model."""
    found: dict[tuple[str, str], list[str]] = {}  # (file, reason) -> settings
    for name, place in config.given.items():
        is_flag = place.startswith("--")
        rule = next((rule for rule in RULES if name in rule.names and rule.applies(config)), None)
        if rule is not None and (is_flag or rule.in_files):
            found.setdefault(("" if is_flag else place, rule.when), []).append(place if is_flag else name)
    notices = [
        f"{', '.join(names)}{file and f' ({file})'} {'has' if len(names) == 1 else 'have'} no effect {when}"
        for (file, when), names in found.items()
    ]
    if not config.train:
        return notices
    if config.prefers and "beta" in config.given:
        notices.append(
            f"{_named('beta', config.given['beta'])} is the decay rate of NA-LoRA's average; the strength of the "
            "preference loss is --preference-beta"
        )
    notices += [
        f"optimizer_config.{name} has no effect with optimizer {config.optimizer}"
        for name, settings in config.optimizer_config.items()
        if settings and name != config.optimizer and "optimizer_config" in config.given
    ]
    rate, place = schedule_rate(config), config.given.get("learning_rate", "")
    if place and rate is not None and rate != config.learning_rate and not _ignores_rate(config):
        notices.append(
            f"{_named('learning_rate', place)} {config.learning_rate:g} has no effect: lr_schedule sets the learning "
            f"rate, from {rate:g}; change the arguments of lr_schedule, or remove it"
        )
    return notices


def schedule_rate(config: RunConfig) -> float | None:
    """Return the first argument of lr_schedule, its initial rate; None without a schedule or a number there."""
    arguments = (config.lr_schedule or {}).get("arguments")
    rate = arguments[0] if isinstance(arguments, list | tuple) and arguments else None
    return float(rate) if isinstance(rate, int | float) else None


def without_effect_in_length(config: RunConfig, iterations: int, has_validation: bool) -> list[str]:
    """Return a notice for each setting in `config.given` that has no effect in a run of this length and data."""
    notices = []
    if not has_validation:
        notices += [
            f"{_named(name, config.given[name])} has no effect: there is no validation set"
            for name in ("val_batches", "steps_per_eval")
            if name in config.given
        ]
    validations = math.ceil(iterations / config.steps_per_eval)
    if has_validation and config.early_stopping is not None and config.early_stopping >= validations:
        notices.append(
            f"early_stopping has no effect: it waits for {config.early_stopping} validations without improvement, "
            f"and the run has {validations}; lower --steps-per-eval"
        )
    if config.grad_accumulation_steps > iterations:
        notices.append(
            f"grad_accumulation_steps is {config.grad_accumulation_steps}, but the run has {iterations} iterations: "
            "it takes one optimizer update"
        )
    return notices


def _named(name: str, place: str) -> str:
    return place if place.startswith("--") else f"{name} ({place})"
