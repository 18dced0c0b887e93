"""What preference runs record: the objective, and the measures in words and under the names of other tools."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nalora_mlx.core.config import DPO, KTO, ORPO, SIMPO, PreferenceConfig

OBJECTIVES = {DPO: "DPO", ORPO: "ORPO", KTO: "KTO", SIMPO: "SimPO"}
# Measures in metrics events, and the names under which TRL reports them.
TRL_NAMES = {
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "chosen_logp": "logps/chosen",
    "rejected_logp": "logps/rejected",
    "kl": "kl",
}


def preference_config(settings: Mapping[str, Any]) -> PreferenceConfig:
    """Return the settings of preference training among all settings of a run."""
    names = [field.name for field in fields(PreferenceConfig)]
    return PreferenceConfig(**{name: settings[name] for name in names if settings.get(name) is not None})


def describe_objective(settings: Mapping[str, Any]) -> str | None:
    """Return the objective of a preference run with its main settings; None for supervised training."""
    config = preference_config(settings)
    if config.train_mode not in OBJECTIVES:
        return None
    parts = [f"{config.dpo_loss} loss"] if config.train_mode == DPO else []
    parts.append(f"beta {config.beta_of_loss:g}")
    if config.train_mode == DPO and config.length_normalized:
        parts.append("length-normalized")
    if config.train_mode == SIMPO:
        parts.append(f"margin {config.simpo_margin:g}")
    if config.train_mode in (DPO, SIMPO) and config.label_smoothing:
        parts.append(f"label smoothing {config.label_smoothing:g}")
    if config.train_mode == KTO:
        parts.append(f"weights {config.desirable_weight:g} and {config.undesirable_weight:g}")
    return f"{OBJECTIVES[config.train_mode]} ({', '.join(parts)})"


def measures(event: Mapping[str, Any]) -> dict[str, float]:
    """Return the measures of a metrics event, with the reward margin; none in supervised training.

    A batch of KTO may lack chosen or rejected answers. Their measures are then missing, and the margin too.
    """
    values = {name: event.get(name) for name in TRL_NAMES}
    chosen, rejected = values["chosen_reward"], values["rejected_reward"]
    if chosen is not None and rejected is not None:
        values["margin"] = chosen - rejected
    return {name: value for name, value in values.items() if value is not None}


def describe_measures(event: Mapping[str, Any]) -> list[str]:
    """Return accuracy, reward margin and KL divergence of a metrics event as phrases, as far as it has them."""
    formats = {"accuracy": "accuracy {:.2f}", "margin": "margin {:.3f}", "kl": "KL {:.2f}"}
    found = measures(event)
    return [text.format(found[name]) for name, text in formats.items() if name in found]
