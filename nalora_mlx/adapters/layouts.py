"""Gated MLPs: a table of their layouts, how to find them in a model, and how to identify what they compute.

A gated MLP is a module with a gate, an up and a down projection that computes down(phi(gate(x)) * up(x)). One
projection may compute both gate and up, and each projection may have a weight per expert. Names only tell which
projections to look at. What the module computes is found by running it:

1. Replace the projections by probes, which output fixed values. The module then shows the function between them:
   the activation phi, and which half of a joint projection is the gate (`identify`).
2. Compare the rebuilt module with the original on random input (`verify`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from nalora_mlx.models.tolerances import GATED_MLP, relative_error
from nalora_mlx.ops import activation_families as families
from nalora_mlx.ops.activations import ACTIVATIONS, Activation
from nalora_mlx.ops.kernels.reference import gated_product

LINEAR = (nn.Linear, nn.QuantizedLinear)
SWITCH = (SwitchLinear, QuantizedSwitchLinear)


@dataclass(frozen=True)
class Layout:
    """A row of the layout table: the attribute names of a gated MLP's projections.

    Attributes:
        gate: the gate projection.
        up: the up projection; equal to `gate` if one joint projection computes both.
        down: the down projection.
        gate_first: whether the gate is the first half of a joint projection's output.
        norm: a norm that the module applies to its input; empty if it has none.
    """

    gate: str
    up: str
    down: str
    gate_first: bool = True
    norm: str = ""

    @property
    def is_joint(self) -> bool:
        """Whether one projection computes both gate and up."""
        return self.gate == self.up

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections without duplicates, gate first."""
        return tuple(dict.fromkeys((self.gate, self.up, self.down)))

    @property
    def name(self) -> str:
        """The layout's name in reports."""
        if not self.is_joint:
            return f"{self.gate}, {self.up}, {self.down}"
        halves = "gate | up" if self.gate_first else "up | gate"
        return f"{self.gate} ({halves}), {self.down}"


LAYOUTS = (
    Layout("gate_proj", "up_proj", "down_proj", norm="norm"),  # lille-130m
    Layout("gate_proj", "up_proj", "down_proj"),  # most models, SwitchGLU
    Layout("w1", "w3", "w2"),  # internlm2, lfm2
    Layout("w1", "v1", "w2"),  # dbrx
    Layout("w2", "w1", "c_proj"),  # qwen
    Layout("c_fc_0", "c_fc_1", "c_proj"),  # exaone
    Layout("mlp_gate", "mlp_linear", "mlp_resid"),  # talkie
    Layout("gate_up_proj", "gate_up_proj", "down_proj"),  # phi3, glm, plamo
    Layout("input_linear", "input_linear", "output_linear"),  # granitemoehybrid
    Layout("proj_1", "proj_1", "proj_2"),  # openelm
    Layout("up_proj", "up_proj", "down_proj"),  # phi3small
    Layout("ff_proj", "ff_proj", "ff_out"),  # olmo
)


@dataclass(frozen=True)
class Match:
    """A module whose children fit a row of the layout table.

    Attributes:
        path: of the module.
        layout: the row.
        module: the module.
        experts: number of experts, 0 for a dense MLP.
    """

    path: str
    layout: Layout
    module: nn.Module
    experts: int = 0

    @property
    def projection_paths(self) -> dict[str, str]:
        """The path of each projection by its name."""
        prefix = f"{self.path}." if self.path else ""
        return {name: prefix + name for name in self.layout.projections}


# --- finding gated MLPs -------------------------------------------------------------------------------------


def modules_in_order(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return all modules with their paths, first layer first. `named_modules` starts with the last one."""
    return model.named_modules()[::-1]


def find_gated_mlps(model: nn.Module) -> list[Match]:
    """Return the modules whose children fit a row of the layout table, first layer first."""
    matches = (_match(path, module) for path, module in modules_in_order(model))
    return [match for match in matches if match is not None]


def _match(path: str, module: nn.Module) -> Match | None:
    """Return the first row of the layout table that a module fits."""
    for layout in LAYOUTS:
        children = [module.get(name) for name in layout.projections]
        if layout.norm and not isinstance(module.get(layout.norm), nn.RMSNorm | nn.LayerNorm):
            continue
        if all(isinstance(child, LINEAR) for child in children):
            if layout.is_joint and output_dims(children[0]) != 2 * input_dims(children[1]):
                continue  # such as the up and down projections of an MLP without a gate
            return Match(path, layout, module)
        if not layout.is_joint and all(isinstance(child, SWITCH) for child in children):
            return Match(path, layout, module, children[0].num_experts)
    return None


def find_unsupported(model: nn.Module) -> list[tuple[str, str]]:
    """Return (path, class name of the projections) of gated MLPs whose projections LoRA does not support."""
    found = []
    for path, module in modules_in_order(model):
        for layout in LAYOUTS:
            children = [module.get(name) for name in layout.projections]
            if layout.is_joint or not all(isinstance(child, nn.Module) for child in children):
                continue
            if not isinstance(children[0], LINEAR + SWITCH):
                found.append((path, type(children[0]).__name__))
                break
    return found


# --- identifying what a gated MLP computes ------------------------------------------------------------------

# Largest difference of two implementations of one activation, relative to 1 + |h|. They differ by a few ulp, and by
# some more on a GPU with fast exponentials. Exact GELU and its tanh form, the closest pair in the table, differ by
# 1.7e-4.
ACTIVATION_TOLERANCE = 5e-5
PROBE_CHANNELS = 512


def _has_numbers(holder: Any, *names: str) -> bool:
    return all(isinstance(getattr(holder, name, None), int | float) for name in names)


def _swiglu_oai(holder: Any) -> Activation | None:
    found = _has_numbers(holder, "_alpha", "_limit")
    return families.swiglu_oai(holder._alpha, holder._limit) if found else None


def _swiglu_input_clamped(holder: Any) -> Activation | None:
    return families.swiglu_input_clamped(holder.limit) if _has_numbers(holder, "limit") else None


def _swiglu_output_clamped(holder: Any) -> Activation | None:
    return families.swiglu_output_clamped(holder.limit) if _has_numbers(holder, "limit") else None


def _situ(holder: Any) -> Activation | None:
    found = _has_numbers(holder, "beta")
    return families.situ(holder.beta, getattr(holder, "linear_beta", None)) if found else None


def _xielu(holder: Any) -> Activation | None:
    if not hasattr(holder, "alpha_p"):
        return None
    return families.xielu(*(getattr(holder, name).item() for name in ("alpha_p", "alpha_n", "beta", "eps")))


def _gelu_topk(holder: Any) -> Activation | None:
    found = hasattr(holder, "_std_multiplier")
    return families.gelu_topk(holder._std_multiplier.item()) if found else None


# Activations with parameters: each function takes the object that may hold the parameters, and returns None if it does
# not hold them.
FAMILIES: tuple[Callable[[Any], Activation | None], ...] = (
    _swiglu_oai,
    _swiglu_input_clamped,
    _swiglu_output_clamped,
    _situ,
    _xielu,
    _gelu_topk,
)


def _candidate_activations(module: nn.Module) -> Iterator[Activation]:
    yield from ACTIVATIONS.values()
    # Parameters belong to the module itself, or to the activation module inside it.
    for holder in (module, *(getattr(module, name, None) for name in ("activation", "act_fn"))):
        for family in FAMILIES:
            if (activation := family(holder)) is not None:
                yield activation


def identify(match: Match) -> tuple[Layout, Activation]:
    """Find phi, and which half of a joint projection is the gate, by running the module with probes in float32.

    Raises:
        ValueError: The module does not compute down(phi(gate(x)) * up(x)) for any known phi. The message is the reason
            that reports show.
    """
    z, u = _probe_values(0), mx.roll(_probe_values(1), 64)  # rolled, so that not all large values meet
    for gate_first in (True, False) if match.layout.is_joint else (True,):
        h = _run_between_projections(match, z, u, gate_first)
        for activation in _candidate_activations(match.module):
            error = mx.abs(gated_product(activation, z, u) - h) / (1 + mx.abs(h))
            if mx.all(error < ACTIVATION_TOLERANCE).item():
                return replace(match.layout, gate_first=gate_first), activation
    raise ValueError("its activation is unknown, or gate and up are not combined as phi(gate) * up")


def _probe_values(seed: int) -> mx.array:
    """Return random values [PROBE_CHANNELS], most in the range where activations differ, some where they clip."""
    keys = mx.random.split(mx.random.key(seed), 3)
    small = mx.random.uniform(-12, 12, (PROBE_CHANNELS * 3 // 4,), key=keys[0])
    magnitude = mx.power(10.0, mx.random.uniform(1, 4, (PROBE_CHANNELS // 4,), key=keys[1]))
    sign = mx.where(mx.random.bernoulli(0.5, magnitude.shape, key=keys[2]), 1.0, -1.0)
    return mx.concatenate([small, magnitude * sign])


class _Probe(nn.Module):
    """Replacement for a projection that outputs a fixed array, or its input if it has none."""

    def __init__(self, output: mx.array | None = None):
        super().__init__()
        self._output = output

    def __call__(self, x: mx.array, *_: Any, **__: Any) -> mx.array:
        return x if self._output is None else self._output


def _run_between_projections(match: Match, z: mx.array, u: mx.array, gate_first: bool) -> mx.array:
    """Return the input of the down projection, [F], for given outputs z [F] and u [F] of gate and up."""
    module, layout = match.module, match.layout
    projections = {name: module[name] for name in layout.projections}
    leading = (1, 1, 1, 1) if match.experts else (1, 1)
    dims = input_dims(projections[layout.gate])
    try:
        if layout.is_joint:
            both = mx.concatenate([z, u] if gate_first else [u, z])
            module[layout.gate] = _Probe(both.reshape(*leading, -1))
        else:
            module[layout.gate] = _Probe(z.reshape(*leading, -1))
            module[layout.up] = _Probe(u.reshape(*leading, -1))
        module[layout.down] = _Probe()
        x = mx.zeros((1, 1, dims))
        h = module(x, mx.zeros((1, 1, 1), mx.uint32)) if match.experts else module(x)
        mx.eval(h)
    except Exception as error:
        raise ValueError(f"its forward takes more than the projections ({type(error).__name__})") from None
    finally:
        for name, projection in projections.items():
            module[name] = projection
    if not isinstance(h, mx.array) or h.size != PROBE_CHANNELS:
        raise ValueError("its forward is not down(phi(gate(x)) * up(x))")
    return h.reshape(-1)


def verify(match: Match, rebuilt: nn.Module, dtype: mx.Dtype) -> float:
    """Compare a rebuilt module with the original on random input of a dtype.

    Returns:
        The largest error, relative to the largest output.

    Raises:
        ValueError: They differ by more than rounding. The message is the reason that reports show.
    """
    dims = input_dims(match.module[match.layout.gate])
    largest = 0.0
    # Experts get few and many rows: mlx-lm sorts rows by expert if there are at least 64.
    for length in (8, 48) if match.experts else (8,):
        x = mx.random.normal((1, length, dims), key=mx.random.key(1)).astype(dtype)
        inputs = [x]
        if match.experts:
            chosen = min(2, match.experts)
            inputs.append(mx.random.randint(0, match.experts, (1, length, chosen), key=mx.random.key(2)))
        error = relative_error(rebuilt(*inputs), match.module(*inputs))
        if not error < GATED_MLP.for_dtype(dtype):  # also if it is NaN
            raise ValueError(
                f"the rebuilt module's output differs from the original's (relative error {error:.1e})"
            )
        largest = max(largest, error)
    return largest


def kind(match: Match, layout: Layout, activation: Activation) -> tuple[Any, ...]:
    """Return what a gated MLP has in common with those that differ from it in nothing but their weights."""
    arrays = tree_flatten(match.module.parameters())
    module, shapes = type(match.module), tuple((path, array.shape, array.dtype) for path, array in arrays)
    return module, layout, activation, shapes


# --- sizes and dtypes ---------------------------------------------------------------------------------------


def input_dims(linear: nn.Module) -> int:
    """Return the input size D of a dense or quantized linear layer, with or without experts."""
    if isinstance(linear, SWITCH):
        return linear.input_dims
    if isinstance(linear, nn.QuantizedLinear):
        return linear.weight.shape[-1] * 32 // linear.bits
    return linear.weight.shape[-1]


def output_dims(linear: nn.Module) -> int:
    """Return the output size F of a dense or quantized linear layer, with or without experts."""
    return linear.weight.shape[-2]


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """Return the dtype of a model's activations: that of its first floating-point weight."""
    for path, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating) and path.endswith("weight"):
            return array.dtype
    return mx.float32
