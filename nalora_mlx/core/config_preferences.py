"""Settings of preference training: which loss compares the answers of a row, and with what strength."""

import math
from dataclasses import dataclass

from nalora_mlx.core.config_fields import setting

SFT, DPO, ORPO, KTO, SIMPO = TRAIN_MODES = ("sft", "dpo", "orpo", "kto", "simpo")
REFERENCES = ("precomputed", "on-the-fly")
BETAS = {DPO: 0.1, ORPO: 0.1, KTO: 0.1, SIMPO: 2.0}  # the default strength of each loss


@dataclass
class PreferenceConfig:
    """Settings of preference training; see `nalora_mlx.training.preferences.losses` for the formulas."""

    train_mode: str = setting(SFT, "objective", choices=TRAIN_MODES)
    preference_beta: float | None = setting(
        None,
        "strength of the preference loss (default: 0.1; simpo 2.0)",
    )
    dpo_loss: str = setting("sigmoid", "loss of dpo", choices=("sigmoid", "ipo", "hinge"))
    label_smoothing: float = setting(
        0.0,
        "fraction of pairs assumed to be the wrong way round (dpo with sigmoid, simpo)",
        metavar="FRACTION",
    )
    length_normalized: bool = setting(False, "dpo: compare log-probabilities per token, not of whole answers")
    simpo_margin: float = setting(1.0, "simpo: margin that the loss asks for, gamma in the paper")
    desirable_weight: float = setting(1.0, "kto: weight of the rows with label true")
    undesirable_weight: float = setting(1.0, "kto: weight of the rows with label false")
    reference: str = setting(
        "precomputed",
        "dpo, kto: compute the log-probabilities of the reference once before training, or in each iteration",
        choices=REFERENCES,
    )

    @property
    def prefers(self) -> bool:
        """Whether rows hold answers to compare."""
        return self.train_mode != SFT

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the model with what it was before training."""
        return self.train_mode in (DPO, KTO)

    @property
    def compares_per_token(self) -> bool:
        """Whether dpo compares log-probabilities per token."""
        return self.train_mode == DPO and (self.length_normalized or self.dpo_loss == "ipo")

    @property
    def beta_of_loss(self) -> float:
        """The strength of the loss."""
        return BETAS.get(self.train_mode, 0.0) if self.preference_beta is None else self.preference_beta

    def preference_problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        found = []
        if self.preference_beta is not None and not 0 < self.preference_beta < math.inf:
            found.append(f"preference_beta is {self.preference_beta}; it must be a number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            found.append(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 0.5")
        if not 0 <= self.simpo_margin < math.inf:
            found.append(f"simpo_margin is {self.simpo_margin}; it must be a number, and not negative")
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 < getattr(self, name) < math.inf:
                found.append(f"{name} is {getattr(self, name)}; it must be a number above 0")
        if self.train_mode == DPO and self.dpo_loss != "sigmoid" and self.label_smoothing:
            found.append(
                f"label_smoothing is for dpo_loss sigmoid, not {self.dpo_loss}; leave one of them out"
            )
        return found
