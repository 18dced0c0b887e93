"""Every model of mlx-lm in miniature: a config that builds it, and the gated MLPs of its source, counted by hand."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Gated:
    """Gated MLPs of one kind in a model, as read from the model's source.

    Attributes:
        paths: module paths, with * for a number, such as model.layers.*.mlp.
        count: how many modules of the miniature have such a path.
        gate, up, down: names of the projections; gate == up where one projection holds both halves.
        activation: silu, gelu, gelu_tanh, relu, relu2, sigmoid, or the model's own name for another one.
        experts: experts in the module, 0 for a dense MLP.
        gate_first: where one projection holds both: whether the gate is its first half.
        plain: why NA-LoRA cannot act on it, empty if it can.
    """

    paths: str
    count: int
    gate: str
    up: str
    down: str
    activation: str = "silu"
    experts: int = 0
    gate_first: bool = True
    plain: str = ""


@dataclass(frozen=True)
class Miniature:
    """A tiny config of one model module, and what is gated in it.

    Attributes:
        config: what ModelArgs.from_dict takes; a forward of a few tokens runs in well under a second.
        gated: the gated MLPs; empty where the model has none.
        no_forward, no_backward, no_freeze: why mlx on a Linux CPU cannot do it, empty if it can.
    """

    config: dict[str, Any]
    gated: tuple[Gated, ...] = ()
    no_forward: str = ""
    no_backward: str = ""
    no_freeze: str = ""
    notes: str = field(default="")
