"""What reports say about the mask: selection misalignment, and statistics of importance, mask and multipliers."""

from typing import Any

import mlx.core as mx
import numpy as np

from nalora_mlx.adapters.forward_pass import ForwardPass, forward_pass
from nalora_mlx.core.config import NAParameters
from nalora_mlx.data.batches import Batch
from nalora_mlx.training import importance
from nalora_mlx.training.importance import LayerState
from nalora_mlx.training.loss import first_row_arrays
from nalora_mlx.training.step import TrainingStep

PROBE_TOKENS = 256  # at most, on which selection misalignment is measured
SHOWN_CHANNELS = 32  # per layer, whose importance a report lists


def measure_misalignment(step: TrainingStep, batch: Batch) -> None:
    """Measure selection misalignment on the first tokens of a batch, and store it in the importance state.

    Runs a short forward of its own, uncompiled. It costs a small part of an iteration, keeps no graph, and leaves the
    graphs of training as they are. Measurements that are not finite are dropped.
    """
    layers = step.importance["layers"]
    measured = [path for path, state in layers.items() if state.misalignment is not None]
    if not measured:
        return
    arrays = first_row_arrays(batch, slice(0, PROBE_TOKENS))
    context = ForwardPass(token_mask=arrays["token_mask"], diagnose=True)
    training = step.model.training
    step.model.eval()  # no dropout
    try:
        with forward_pass(context), step.loss.installed(arrays):  # lazy: the logits are never computed
            step.loss.forward(arrays["inputs"], **step.loss.model_arguments(arrays))
    finally:
        step.model.train(training)
    no_tokens = mx.zeros(2)  # experts without tokens observe nothing
    found = {path: context.statistics.get(path, {}).get("misalignment", no_tokens) for path in measured}
    for path, sums in step.workers.sum(found).items():
        finite = mx.all(mx.isfinite(sums))
        new = mx.where(finite, sums, layers[path].misalignment)
        layers[path] = layers[path]._replace(misalignment=new)
    step.set_layers(layers)


def describe_layers(step: TrainingStep) -> dict[str, dict[str, Any]]:
    """Return what a report says of each gated MLP, by path; see `describe_layer`."""
    return {
        path: describe_layer(state, step.parameters, step.gated[path].activation.regions)
        for path, state in step.importance["layers"].items()
    }


def describe_layer(state: LayerState, parameters: NAParameters, regions: tuple[str, ...]) -> dict[str, Any]:
    """Return mean and percentiles of a layer's mask, multipliers, importance and step scales, and what they sum up to.

    "channels" lists the importance of some channels, evenly spaced; "occupancy" the mean share of tokens per region.
    Without mask and step scales, only the misalignment is known.
    """
    aligned = (
        {}
        if state.misalignment is None
        else {"misalignment": importance.misalignment(state.misalignment).item()}
    )
    if not parameters.scales_channels:
        return aligned
    s = np.array(importance.importance(state, parameters.beta)).reshape(-1)
    shown = np.arange(min(SHOWN_CHANNELS, s.size)) * s.size // min(SHOWN_CHANNELS, s.size)
    row: dict[str, Any] = {
        "mask": _spread(state.mask),
        "sparsity": importance.sparsity(state.mask).item(),
        "effective": importance.effective_share(state.mask).item(),
        "multiplier": _spread(importance.multiplier(state, parameters)),
        "importance": _spread(s),
        "channels": [float(f"{value:.4g}") for value in s[shown].tolist()],
    }
    scale = importance.step_scale(state, parameters)
    if scale is not None:
        row["step_scale"] = _spread(scale)
    if state.above_boundary is not None:
        occupancy = np.array(importance.occupancy(state, parameters.beta))
        row["occupancy"] = dict(zip(regions, occupancy.mean(axis=-1).tolist(), strict=True))
    return row | aligned


def _spread(values: Any) -> dict[str, float]:
    """Return the mean and the 10th, 50th and 90th percentile of the values of an array."""
    array = np.array(values)
    low, median, high = np.quantile(array, (0.1, 0.5, 0.9)).tolist()
    return {"mean": float(array.mean()), "p10": low, "p50": median, "p90": high}
