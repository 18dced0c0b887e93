"""Miniatures of every model of mlx-lm: a small config, and the gated MLPs counted by hand in the model's source."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gated:
    """Gated MLPs of one kind in a model, according to its source.

    Attributes:
        paths: module paths, with * for a number, such as model.layers.*.mlp.
        count: number of modules of the miniature with such a path.
        gate, up, down: names of the projections; gate == up if one joint projection computes both.
        activation: silu, gelu, gelu_tanh, relu, relu2, sigmoid, or the name of a family of activations.
        experts: number of experts, 0 for a dense MLP.
        gate_first: whether the gate is the first half of a joint projection.
        plain: why NA-LoRA cannot act on them; empty if it can.
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
    """A small config of one model, and its gated MLPs.

    Attributes:
        config: the argument of ModelArgs.from_dict.
        gated: the gated MLPs; empty if the model has none.
        no_forward, no_backward, no_freeze: why MLX on a Linux CPU cannot do this; empty if it can.
        notes: peculiarities of the model.
    """

    config: dict[str, Any]
    gated: tuple[Gated, ...] = ()
    no_forward: str = ""
    no_backward: str = ""
    no_freeze: str = ""
    notes: str = ""
