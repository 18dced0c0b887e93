"""The methods of the study: LoRA, NA-LoRA and variants of its parts, controls, and other LoRA methods.

Controls keep the step sizes but assign them to other channels, or use a constant step size for the gate. Fitted methods
are plain LoRA with lora_a initialized to the input directions in which the loss decreases fastest. For the gate, whose
gradient is dh u phi'(z), these are the directions that its responsive channels respond to.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from nalora_mlx.data.batches import training_batches
from nalora_mlx.data.tokenization import Example
from nalora_mlx.training import importance, step
from nalora_mlx.training.loss import SupervisedLoss, batch_arrays

FIT_BATCHES = 4  # batches whose gradient determines a fitted lora_a


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    Attributes:
        na: NALoRAConfig settings; by default plain LoRA.
        control: how to change the channel multipliers, see `apply_control`.
        dora: whether to use DoRA adapters.
        scale: rank -> scale of the update relative to alpha / rank.
        b_rate: learning rate of lora_b relative to that of lora_a.
        fitted: projections whose lora_a is fitted to the gradient.
    """

    na: tuple[tuple[str, Any], ...] = (("mask", "off"), ("step_scaling", False))
    control: str | None = None
    dora: bool = False
    scale: Callable[[int], float] = lambda rank: 1.0
    b_rate: float = 1.0
    fitted: tuple[str, ...] = ()


def na_lora(control: str | None = None, **settings: Any) -> Method:
    """Return NA-LoRA with the given settings; all others have the defaults of NALoRAConfig."""
    return Method(tuple(sorted(settings.items())), control)


BASE: dict[str, Any] = {"mask": "soft", "statistic": "derivative", "step_scaling": False, "preserve": "rms"}
PAPER = {**BASE, "step_scaling": True}

GATED = ("gate_proj", "up_proj")

METHODS: dict[str, Method] = {
    "lora": Method(),
    "na-lora": na_lora(),  # the defaults
    # variants of its parts
    "soft": na_lora(**BASE),
    "soft+scaling": na_lora(**PAPER),
    "scaling": na_lora(**{**PAPER, "mask": "off"}),
    "sensitivity": na_lora(**{**BASE, "statistic": "sensitivity"}),
    "hard": na_lora(**{**BASE, "mask": "hard"}),
    "hard-sensitivity": na_lora(**{**BASE, "mask": "hard", "statistic": "sensitivity"}),
    "soft-mean": na_lora(**{**BASE, "preserve": "mean"}),
    "soft-function": na_lora(**{**BASE, "preserve": "function"}),
    "soft-none": na_lora(**{**BASE, "preserve": "none"}),
    "sensitivity-mean": na_lora(**{**BASE, "statistic": "sensitivity", "preserve": "mean"}),
    "gate+up": na_lora(**{**BASE, "branches": ("gate", "up")}),
    "sensitivity-gate+up": na_lora(**{**BASE, "statistic": "sensitivity", "branches": ("gate", "up")}),
    "route": na_lora(**{**BASE, "route": True}),
    "beta-0": na_lora(**{**BASE, "beta": 0.0}),
    "beta-0.99": na_lora(**{**BASE, "beta": 0.99}),
    "refresh-20": na_lora(**{**BASE, "mask_every": 20}),
    "hard-0.25": na_lora(**{**BASE, "mask": "hard", "keep_fraction": 0.25}),
    "hard-0.75": na_lora(**{**BASE, "mask": "hard", "keep_fraction": 0.75}),
    "first-half": na_lora(control="first-half", **BASE),
    "last-half": na_lora(control="last-half", **BASE),
    # controls: the multipliers of "soft" permuted, reversed, or all 1
    "random": na_lora(control="random", **BASE),
    "inverse": na_lora(control="inverse", **BASE),
    "observed": na_lora(control="x1", **BASE),  # plain LoRA with measured misalignment
    # controls: a constant gate step, with the mean of "soft" or the RMS of "soft-mean"
    "matched-mean": na_lora(control="mean", **BASE),
    "matched-rms": na_lora(control="rms", **{**BASE, "preserve": "mean"}),
    # how much the gate's step size matters: none, twice, four times
    "gate-x0": na_lora(control="x0", **BASE),
    "gate-x2": na_lora(control="x2", **BASE),
    "gate-x4": na_lora(control="x4", **BASE),
    "up-x2": na_lora(control="x2", **{**BASE, "branches": ("up",)}),
    "gate+up-x2": na_lora(control="x2", **{**BASE, "branches": ("gate", "up")}),
    # fitted lora_a
    "fitted-gate": Method(fitted=GATED[:1]),
    "fitted-gate+up": Method(fitted=GATED),
    "fitted-all": Method(fitted=(*GATED, "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")),
    # other LoRA methods
    "rslora": Method(scale=lambda rank: math.sqrt(rank)),
    "lora+": Method(b_rate=16.0),
    "lora+4": Method(b_rate=4.0),
    "dora": Method(dora=True),
}


@contextmanager
def apply_control(control: str | None, seed: int) -> Iterator[None]:
    """Patch the trainer to change the channel multipliers, or the layers that they apply to.

    Args:
        control: "first-half" or "last-half" of the layers, or a control of `control_multiplier`. None changes nothing.
        seed: of the "random" control.
    """
    if control is None:
        yield
        return
    if control.endswith("-half"):
        gated_mlps = step.gated_mlps

        def half(model: nn.Module) -> list[Any]:
            mlps = list(gated_mlps(model))
            middle = len(mlps) // 2
            return mlps[:middle] if control == "first-half" else mlps[middle:]

        with patch.object(step, "gated_mlps", half):
            yield
        return
    multiplier = importance.multiplier

    def changed_multiplier(state: Any, parameters: Any) -> mx.array:
        return control_multiplier(multiplier(state, parameters), control, seed)

    with patch.object(importance, "multiplier", changed_multiplier):
        yield


def control_multiplier(q: mx.array, control: str, seed: int) -> mx.array:
    """Return the multipliers that a control uses in place of q [..., F].

    Args:
        q: the multipliers of NA-LoRA.
        control: "random" permutes the channels, the same way in every step. "inverse" gives the k-th smallest
            multiplier to the channel with the k-th largest. "x<number>" is a constant. "mean" and "rms" are the mean
            and the root mean square of q.
        seed: of "random".
    """
    if control == "random":
        return q[..., mx.array(np.random.default_rng(seed).permutation(q.shape[-1]))]
    if control == "inverse":
        order = mx.argsort(q, axis=-1)
        return mx.put_along_axis(q, order, mx.sort(q, axis=-1)[..., ::-1], axis=-1)
    if control.startswith("x"):
        return float(control[1:]) * mx.ones_like(q)
    if control == "rms":
        size = mx.sqrt(mx.mean(mx.square(q), axis=-1, keepdims=True))
    else:
        size = mx.mean(q, axis=-1, keepdims=True)
    return mx.broadcast_to(size, q.shape)


def fit_lora_a(
    model: nn.Module, examples: Sequence[Example], names: tuple[str, ...], batch: int, seed: int
) -> None:
    """Initialize lora_a of some projections to the leading input directions of the loss gradient.

    Let G [D, F] be the gradient of a frozen weight over FIT_BATCHES batches. The gradients of the adapter are
    d lora_a = s G B^T and d lora_b = s A^T G. Subspace iteration therefore finds the leading left singular vectors of G
    without computing G:

    1. Set B to random values and A to zero.
    2. Set A to an orthonormal basis of d lora_a.
    3. Set B to an orthonormal basis of d lora_b.
    4. Set A to an orthonormal basis of d lora_a.
    5. Scale A to its original mean column norm and set B to zero, so the model's function does not change.

    The cost, three passes over FIT_BATCHES batches, does not count as training steps.

    Args:
        model: adapted model.
        examples: training rows.
        names: names of the projections.
        batch: rows per batch.
        seed: of the batches and of B.
    """
    adapters = {
        path: module
        for path, module in model.named_modules()
        if "lora_a" in module and path.rsplit(".", 1)[-1] in names
    }
    loss = SupervisedLoss(model)
    loss_and_gradient: Any = nn.value_and_grad(model, lambda arrays: loss(arrays)[0])
    batches = list(itertools.islice(training_batches(examples, batch, seed + 1), FIT_BATCHES))
    rng = np.random.default_rng(seed)
    norms = {path: mx.sqrt(mx.mean(mx.sum(mx.square(m.lora_a), axis=0))) for path, m in adapters.items()}

    def gradients(leaf: str) -> dict[str, mx.array]:
        """Return the gradient of lora_a or lora_b for each adapter, summed over the batches."""
        total: dict[str, mx.array] = {}
        for one in batches:
            _, gradient = loss_and_gradient(batch_arrays(one))
            flat: Any = dict(tree_flatten(gradient))
            for path in adapters:
                total[path] = total.get(path, mx.array(0.0)) + flat[f"{path}.{leaf}"]
            mx.eval(total)
        return total

    def basis(columns: mx.array) -> mx.array:
        return mx.linalg.qr(columns, stream=mx.cpu)[0]

    for module in adapters.values():
        module.lora_b = mx.array(rng.standard_normal(module.lora_b.shape).astype(np.float32))
        module.lora_a = mx.zeros_like(module.lora_a)
    for last in (False, True):
        for path, gradient in gradients("lora_a").items():
            module = adapters[path]
            module.lora_a, module.lora_b = basis(gradient), mx.zeros_like(module.lora_b)
        if not last:
            for path, gradient in gradients("lora_b").items():
                module = adapters[path]
                module.lora_a, module.lora_b = mx.zeros_like(module.lora_a), basis(gradient.T).T
        mx.eval(model.parameters())
    for path, module in adapters.items():
        module.lora_a = module.lora_a * norms[path]
    mx.eval(model.parameters())
