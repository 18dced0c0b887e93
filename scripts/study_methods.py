"""The methods of the study: LoRA, NA-LoRA and variants of its parts, controls, and other LoRA methods.

Controls keep the step sizes but assign them to other channels, or use a constant step size for the gate. Fitted methods
are plain LoRA with lora_a initialized to the input directions in which the loss decreases fastest. For the gate, whose
gradient is dh u phi'(z), these are the directions that its responsive channels respond to.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from nalora_mlx.adapters.forward_pass import ForwardPass, Gate, forward_pass
from nalora_mlx.adapters.gated_mlps import GatedMLP
from nalora_mlx.core.config import PLAIN_LORA
from nalora_mlx.data.batches import training_batches
from nalora_mlx.data.tokenization import Example
from nalora_mlx.ops.activations import Activation
from nalora_mlx.ops.kernels import reference
from nalora_mlx.training import importance, step
from nalora_mlx.training.loss import SupervisedLoss, batch_arrays
from nalora_mlx.training.selection_limit import SelectionLimit

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
        grad_clip: largest norm of the gradient; None for no clipping.
    """

    na: tuple[tuple[str, Any], ...] = tuple(vars(PLAIN_LORA).items())
    control: str | None = None
    dora: bool = False
    scale: Callable[[int], float] = lambda rank: 1.0
    b_rate: float = 1.0
    fitted: tuple[str, ...] = ()
    grad_clip: float | None = None


def na_lora(control: str | None = None, **settings: Any) -> Method:
    """Return NA-LoRA with the given settings; all others have the defaults of NALoRAConfig."""
    return Method(tuple(sorted(settings.items())), control)


BASE: dict[str, Any] = {**vars(PLAIN_LORA), "mask": "soft"}
PAPER = {**BASE, "step_scaling": True}
# Half the step where selection switches, and no step is enlarged.
SHRINK = {**vars(PLAIN_LORA), "step_scaling": True, "gamma": (1.0, 0.5, 1.0), "preserve": "none"}

LIMIT = {**vars(PLAIN_LORA), "selection_limit": 0.02}

GATED = ("gate_proj", "up_proj")

METHODS: dict[str, Method] = {
    "lora": Method(),
    "na-lora": na_lora(**PAPER),  # the defaults of the first study
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
    # step scales that shrink the steps of channels whose selection switches
    "shrink": na_lora(**SHRINK),
    "shrink-kappa": na_lora(control="kappa", **SHRINK),
    "soft+shrink": na_lora(control="soft", **{**SHRINK, "mask": "soft"}),
    # a limit on the change of the selection per update
    "limit": na_lora(**LIMIT),
    "limit-0.04": na_lora(**{**LIMIT, "selection_limit": 0.04}),
    "limit-0.01": na_lora(**{**LIMIT, "selection_limit": 0.01}),
    "soft+limit": na_lora(**{**BASE, "selection_limit": 0.02}),
    # controls: a limit on the change of the pre-activation, in the unit of the selection weight at 0, and of the output
    "limit-drive": na_lora(control="drive", **LIMIT),
    "limit-output": na_lora(control="output", **LIMIT),
    "limit-output-0.1": na_lora(control="output", **{**LIMIT, "selection_limit": 0.1}),
    # how much the gate's step size matters: none, half, twice, four times
    "gate-x0": na_lora(control="x0", **BASE),
    "gate-x0.5": na_lora(control="x0.5", **BASE),
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
    "clip": Method(grad_clip=1.0),
}


@contextmanager
def apply_control(control: str | None, seed: int) -> Iterator[None]:
    """Patch the trainer to change the channel multipliers, or the layers that they apply to.

    Args:
        control: None changes nothing. "first-half" and "last-half" mask only these layers. "kappa" replaces the
            multiplier by the average of 1 / (1 + |kappa - 1|), and "soft" by the soft mask, normalized, times the step
            scales, not normalized. "drive" and "output" limit the change of something else than the selection, see
            LIMITS. All others are those of `control_multiplier`.
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
    if control in LIMITS:
        with patch.object(*LIMITS[control]):
            yield
        return
    multiplier = importance.multiplier

    def changed_multiplier(state: Any, parameters: Any) -> mx.array:
        if control == "kappa":
            return importance.importance(state, parameters.beta)
        if control == "soft":
            soft = multiplier(state, replace(parameters, step_scaling=False, preserve="rms"))
            return soft * importance.step_scale(state, parameters)
        return control_multiplier(multiplier(state, parameters), control, seed)

    statistics = settledness if control == "kappa" else reference.statistics
    with (
        patch.object(importance, "multiplier", changed_multiplier),
        patch.object(reference, "statistics", statistics),
    ):
        yield


def drive_change(
    self: SelectionLimit, mlp: GatedMLP, old: Gate, new: Gate, token_mask: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the sum over tokens of the mean of |z' - z| rho'(0), and the number of tokens; see SelectionLimit."""
    selection = mlp.activation.selection
    assert selection is not None
    slope = float((selection(mx.array(1e-2)) - selection(mx.array(-1e-2))) / 2e-2)
    counted = token_mask.reshape(-1) > 0
    change = slope * mx.mean(mx.abs(new.z - old.z), axis=-1)
    return mx.sum(mx.where(counted, change, 0)), mx.sum(counted)


def output_change(self: SelectionLimit, new: Any, probe: Any) -> mx.array:
    """Return the mean total variation distance of the next token's distributions before and after the update."""
    probabilities = []
    for arrays in (self.weights.arrays, new):
        self.weights.install_cast(dict(arrays))
        with forward_pass(ForwardPass(token_mask=None, scaled=self.weights.scaled)):
            probabilities.append(mx.softmax(self.loss.forward(probe["inputs"]), axis=-1, precise=True))
    distance = mx.abs(probabilities[1] - probabilities[0]).sum(axis=-1) / 2
    counted = probe["token_mask"] > 0
    return mx.sum(mx.where(counted, distance, 0)) / mx.maximum(mx.sum(counted), 1)


# Control -> what it replaces in the trainer.
LIMITS: dict[str | None, tuple[Any, str, Any]] = {
    "drive": (SelectionLimit, "_change", drive_change),
    "output": (SelectionLimit, "change", output_change),
}

_statistics = reference.statistics


def settledness(activation: Activation, *arguments: Any) -> list[mx.array]:
    """Return what `reference.statistics` returns, with 1 / (1 + |kappa(z) - 1|) for the responsiveness."""
    homogeneity = activation.homogeneity
    assert homogeneity is not None

    def settled(z: mx.array) -> mx.array:
        return 1 / (1 + mx.abs(homogeneity(z) - 1))

    return _statistics(replace(activation, derivative=settled), *arguments)


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
