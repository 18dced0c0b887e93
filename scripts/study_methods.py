"""The methods of the study: NA-LoRA with one part changed at a time, controls, and peers.

A control keeps the sizes of the steps and changes which channels get them, or gives the gate's steps a constant size.
A fitted method is plain LoRA whose lora_a starts in the input directions in which the loss falls fastest; for the gate,
whose gradient is dh u phi'(z), these are the directions to which its responsive channels answer.
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
from nalora_mlx.training.loss import ScoredLoss

FIT_BATCHES = 4  # whose gradient a fitted lora_a spans


@dataclass(frozen=True)
class Method:
    """What is trained: NA settings, what a control makes of the multipliers, and what a peer does otherwise."""

    na: tuple[tuple[str, Any], ...] = (("mask", "off"), ("step_scaling", False))
    control: str | None = None
    dora: bool = False
    scale: Callable[[int], float] = lambda rank: 1.0  # of the update, relative to alpha / rank
    b_rate: float = 1.0  # learning rate of lora_b, relative to that of lora_a
    fitted: tuple[str, ...] = ()  # projections whose lora_a is fitted to the gradient


def na(control: str | None = None, **settings: Any) -> Method:
    """NA-LoRA with settings other than the defaults of `base`."""
    return Method(tuple(sorted(settings.items())), control)


BASE: dict[str, Any] = {"mask": "soft", "statistic": "derivative", "step_scaling": False, "preserve": "rms"}
PAPER = {**BASE, "step_scaling": True}

GATED = ("gate_proj", "up_proj")

METHODS: dict[str, Method] = {
    "lora": Method(),
    "na-lora": na(),  # the defaults of config.py
    # which parts of it
    "soft": na(**BASE),
    "soft+scaling": na(**PAPER),
    "scaling": na(**{**PAPER, "mask": "off"}),
    "sensitivity": na(**{**BASE, "statistic": "sensitivity"}),
    "hard": na(**{**BASE, "mask": "hard"}),
    "hard-sensitivity": na(**{**BASE, "mask": "hard", "statistic": "sensitivity"}),
    "soft-mean": na(**{**BASE, "preserve": "mean"}),
    "soft-function": na(**{**BASE, "preserve": "function"}),
    "soft-none": na(**{**BASE, "preserve": "none"}),
    "sensitivity-mean": na(**{**BASE, "statistic": "sensitivity", "preserve": "mean"}),
    "gate+up": na(**{**BASE, "branches": ("gate", "up")}),
    "sensitivity-gate+up": na(**{**BASE, "statistic": "sensitivity", "branches": ("gate", "up")}),
    "route": na(**{**BASE, "route": True}),
    "beta-0": na(**{**BASE, "beta": 0.0}),
    "beta-0.99": na(**{**BASE, "beta": 0.99}),
    "refresh-20": na(**{**BASE, "mask_every": 20}),
    "hard-0.25": na(**{**BASE, "mask": "hard", "keep_fraction": 0.25}),
    "hard-0.75": na(**{**BASE, "mask": "hard", "keep_fraction": 0.75}),
    "first-half": na(control="first-half", **BASE),
    "last-half": na(control="last-half", **BASE),
    # controls: the same multipliers, given to other channels, or to none
    "random": na(control="random", **BASE),
    "inverse": na(control="inverse", **BASE),
    "observed": na(control="x1", **BASE),  # plain LoRA whose misalignment is measured
    # LoRA whose gate step is constant: as large as that of "soft" in the mean, of "soft-mean" in RMS
    "matched-mean": na(control="mean", **BASE),
    "matched-rms": na(control="rms", **{**BASE, "preserve": "mean"}),
    # how much there is to win or lose: no steps of the gate, larger ones
    "gate-x0": na(control="x0", **BASE),
    "gate-x2": na(control="x2", **BASE),
    "gate-x4": na(control="x4", **BASE),
    "up-x2": na(control="x2", **{**BASE, "branches": ("up",)}),
    "gate+up-x2": na(control="x2", **{**BASE, "branches": ("gate", "up")}),
    # lora_a fitted to the gradient
    "fitted-gate": Method(fitted=GATED[:1]),
    "fitted-gate+up": Method(fitted=GATED),
    "fitted-all": Method(fitted=(*GATED, "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")),
    # peers
    "rslora": Method(scale=lambda rank: math.sqrt(rank)),
    "lora+": Method(b_rate=16.0),
    "lora+4": Method(b_rate=4.0),
    "dora": Method(dora=True),
}


@contextmanager
def controlled(control: str | None, seed: int) -> Iterator[None]:
    """Change what the multipliers of the channels' steps are, or in which layers they act."""
    if control is None:
        yield
        return
    if control.endswith("-half"):
        find = step.gated_mlps

        def half(model: nn.Module) -> list[Any]:
            found = list(find(model))
            middle = len(found) // 2
            return found[:middle] if control == "first-half" else found[middle:]

        with patch.object(step, "gated_mlps", half):
            yield
        return
    multiplier = importance.multiplier

    def changed(state: Any, parameters: Any) -> mx.array:
        return _changed(multiplier(state, parameters), control, seed)

    with patch.object(importance, "multiplier", changed):
        yield


def _changed(q: mx.array, control: str, seed: int) -> mx.array:
    """The multipliers q [..., F] of a control."""
    if control == "random":  # the same channels in every step
        return q[..., mx.array(np.random.default_rng(seed).permutation(q.shape[-1]))]
    if control == "inverse":  # what the k-th largest had goes to the k-th smallest
        order = mx.argsort(q, axis=-1)
        return mx.put_along_axis(q, order, mx.sort(q, axis=-1)[..., ::-1], axis=-1)
    if control.startswith("x"):
        return float(control[1:]) * mx.ones_like(q)
    square = control == "rms"
    size = mx.mean(mx.square(q) if square else q, axis=-1, keepdims=True)
    return mx.broadcast_to(mx.sqrt(size) if square else size, q.shape)


def fit(model: nn.Module, examples: Sequence[Example], names: tuple[str, ...], batch: int, seed: int) -> None:
    """Let lora_a of some projections start in the leading input directions of the loss's gradient.

    With G [D, F] the gradient of a frozen weight over FIT_BATCHES batches, d lora_a = s G B^T and d lora_b = s A^T G.
    So subspace iteration finds G's leading left singular vectors without G: B random, A from the first pass, B from A,
    A from B. Columns of lora_a keep their mean norm, and lora_b is zero again, so that the model is the same. The
    passes cost 3 FIT_BATCHES training steps, which are not counted as steps of the run.
    """
    adapters = {
        path: module
        for path, module in model.named_modules()
        if "lora_a" in module and path.rsplit(".", 1)[-1] in names
    }
    loss = ScoredLoss(model)
    value: Any = nn.value_and_grad(model, lambda *arrays: loss(*arrays))
    batches = list(itertools.islice(training_batches(examples, batch, seed + 1), FIT_BATCHES))
    rng = np.random.default_rng(seed)
    norms = {path: mx.sqrt(mx.mean(mx.sum(mx.square(m.lora_a), axis=0))) for path, m in adapters.items()}

    def gradients(leaf: str) -> dict[str, mx.array]:
        """The gradient of one leaf of each adapter, summed over the batches."""
        total: dict[str, mx.array] = {}
        for one in batches:
            flat: Any = dict(tree_flatten(value(mx.array(one.inputs), *map(mx.array, one.scored()))[1]))
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
