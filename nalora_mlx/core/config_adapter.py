"""Settings of the adapters: those of LoRA, and how NA-LoRA scales their updates."""

import math
from dataclasses import dataclass, fields
from typing import Any

from nalora_mlx.core.config_fields import setting, too_small, wrong_choices
from nalora_mlx.core.errors import InputError


@dataclass(frozen=True)
class NAParameters:
    """How NA-LoRA limits updates, and scales those of gate-related LoRA columns (`na_parameters` in YAML).

    Source: NA-LoRA (arXiv 2606.31717). docs/method.md says what its abstract fixes and what is our reading.
    """

    mask: str = setting(
        "off", "kind of temporal-importance mask on the gate channels", choices=("soft", "hard", "off")
    )
    statistic: str = setting(
        "derivative",
        "measure of a channel's responsiveness, |phi'(z)| or |phi'(z) u|",
        choices=("derivative", "sensitivity"),
    )
    beta: float = setting(
        0.9, "decay rate of the importance's moving average, per optimizer update", metavar="RATE"
    )
    mask_every: int = setting(1, "number of optimizer updates from one mask to the next")
    mask_warmup: int = setting(10, "number of optimizer updates before the mask starts")
    keep_fraction: float = setting(0.5, "fraction of channels that a hard mask keeps", metavar="FRACTION")
    step_scaling: bool = setting(False, "scale updates by the regions of the homogeneity partition")
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
    selection_limit: float = setting(
        0.02,
        "largest mean change of the selection weights per update, to which updates are shortened; 0 for none",
    )
    branches: tuple[str, ...] = setting(
        ("gate",), "branches whose updates are masked and scaled", choices=("gate", "up"), nargs="+"
    )
    route: bool = setting(False, "also mask the gradient of the gate's lora_a")

    @property
    def active(self) -> bool:
        """Whether any mechanism is on. If not, training is bit-identical to plain LoRA."""
        return self.scales_channels or self.selection_limit > 0

    @property
    def scales_channels(self) -> bool:
        """Whether the updates of gate channels are scaled."""
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
        if not 0 <= self.selection_limit < math.inf:
            found.append(f"selection_limit is {self.selection_limit}; it must be a number, and not negative")
        if not self.branches:
            found.append("branches is empty; name gate, up or both")
        return found


PLAIN_LORA = NAParameters(mask="off", step_scaling=False, selection_limit=0.0)


@dataclass(frozen=True)
class NALoRAConfig(NAParameters):
    """Settings of `adapt`: the LoRA settings of mlx-lm, and those of NA-LoRA.

    `scale` multiplies the low-rank product, as in mlx-lm; other libraries set alpha / rank. `keys` are module paths,
    relative to a layer ("mlp.gate_proj") or, outside the layers, from the root of the model. None adapts every linear
    and embedding layer in the last `num_layers` layers, except the routers of experts and the gates of recurrences.

    Raises:
        InputError: a value is out of range; the message lists all of them.
    """

    rank: int = setting(8, "rank of the low-rank update", flag=True)
    scale: float = setting(20.0, "factor of the low-rank update; alpha / rank in other libraries", flag=True)
    dropout: float = setting(
        0.0, "dropout rate on the input of the low-rank update", flag=True, metavar="RATE"
    )
    keys: tuple[str, ...] | None = setting(
        None,
        "modules to adapt, for example mlp.gate_proj (default: all linear and embedding layers)",
        flag=True,
        nargs="+",
        metavar="KEY",
    )
    num_layers: int = setting(16, "number of layers to adapt, counted from the end; -1 for all")
    vision: bool = setting(
        False, "also adapt the vision tower and the projector of a vision-language model", flag=True
    )
    projector: bool = setting(False, "also adapt the projector of a vision-language model", flag=True)

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


LORA_NAMES = tuple(f.name for f in fields(NALoRAConfig) if f.metadata.get("flag"))
NA_NAMES = tuple(f.name for f in fields(NAParameters))
