"""Where is the gate in this model: a table of gated-MLP layouts, how to find them, how to be sure.

A gated MLP is a module with a gate, an up and a down projection that computes down(phi(gate(x)) * up(x)); gate and
up may be one projection, and each may be per expert. What phi is and which half of a shared projection is the gate
is not read from names: the module is run with probes in place of its projections, so that it shows the function
between them, and then as a whole on random input.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from nalora_mlx import activations
from nalora_mlx.activations import ACTIVATIONS, Activation
from nalora_mlx.kernels.reference import gated_product

LINEAR = (nn.Linear, nn.QuantizedLinear)
SWITCH = (SwitchLinear, QuantizedSwitchLinear)


@dataclass(frozen=True)
class Layout:
    """One row of the table: the names under which a module holds its projections; gate == up for a shared one."""

    gate: str
    up: str
    down: str
    gate_first: bool = True  # in a shared projection: whether the gate is its first half

    @property
    def shared(self) -> bool:
        """Whether one projection holds the gate and the up branch."""
        return self.gate == self.up

    @property
    def projections(self) -> tuple[str, ...]:
        """Child names, each once, gate first."""
        return tuple(dict.fromkeys((self.gate, self.up, self.down)))

    @property
    def name(self) -> str:
        """How reports call it."""
        if not self.shared:
            return f"{self.gate}, {self.up}, {self.down}"
        halves = "gate | up" if self.gate_first else "up | gate"
        return f"{self.gate} ({halves}), {self.down}"


LAYOUTS = (
    Layout("gate_proj", "up_proj", "down_proj"),  # most models, SwitchGLU
    Layout("w1", "w3", "w2"),  # internlm2, lfm2
    Layout("w1", "v1", "w2"),  # dbrx
    Layout("w2", "w1", "c_proj"),  # qwen
    Layout("c_fc_0", "c_fc_1", "c_proj"),  # exaone
    Layout("gate_up_proj", "gate_up_proj", "down_proj"),  # phi3, glm, plamo
    Layout("input_linear", "input_linear", "output_linear"),  # granitemoehybrid
    Layout("proj_1", "proj_1", "proj_2"),  # openelm
)


@dataclass(frozen=True)
class Match:
    """A module that has the parts of a gated MLP: its path, its layout, the module, its experts (0 if dense)."""

    path: str
    layout: Layout
    module: nn.Module
    experts: int = 0


def walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules with their paths, first layer first; `named_modules` goes from the last to the first."""
    return model.named_modules()[::-1]


def find(model: nn.Module) -> Iterator[Match]:
    """Yield every module whose children fit a row of the table, first layer first."""
    for path, module in walk(model):
        for layout in LAYOUTS:
            children = [module.get(name) for name in layout.projections]
            if all(isinstance(child, LINEAR) for child in children):
                yield Match(path, layout, module)
                break
            if not layout.shared and all(isinstance(child, SWITCH) for child in children):
                yield Match(path, layout, module, children[0].num_experts)
                break


# Activations whose parameters a model sets: from the object that may hold them, None where it has no such thing.
_Family = Callable[[Any], Activation | None]


def _has(holder: Any, *names: str) -> bool:
    return all(isinstance(getattr(holder, name, None), int | float) for name in names)


FAMILIES: tuple[_Family, ...] = (
    lambda h: activations.swiglu_oai(h._alpha, h._limit) if _has(h, "_alpha", "_limit") else None,
    lambda h: activations.swiglu_input_clamped(h.limit) if _has(h, "limit") else None,
    lambda h: activations.swiglu_output_clamped(h.limit) if _has(h, "limit") else None,
    lambda h: activations.situ(h.beta, getattr(h, "linear_beta", None)) if _has(h, "beta") else None,
    lambda h: activations.gelu_topk(h._std_multiplier.item()) if hasattr(h, "_std_multiplier") else None,
)


def _candidates(module: nn.Module) -> Iterator[Activation]:
    yield from ACTIVATIONS.values()
    for holder in (module, module.get("activation", getattr(module, "activation", None))):
        for family in FAMILIES:
            if (activation := family(holder)) is not None:
                yield activation


class _Probe(nn.Module):
    """Stands in for a projection: answers with a fixed array, or passes its input on."""

    def __init__(self, answer: mx.array | None = None):
        super().__init__()
        self._answer = answer

    def __call__(self, x: mx.array, *_: Any, **__: Any) -> mx.array:
        return x if self._answer is None else self._answer


_CHANNELS = 512


def identify(match: Match) -> tuple[Layout, Activation]:
    """Find phi, and the halves of a shared projection, by running the module with probes; exact to float32.

    Raises:
        ValueError: the module does not compute down(phi(gate(x)) * up(x)) for any phi that is known; the message
            is the reason that a report shows.
    """
    keys = mx.random.split(mx.random.key(0), 2)
    # Over the range in which activations differ and clip; the seed is fixed so that the answer is.
    z = mx.random.uniform(-12, 12, (_CHANNELS,), key=keys[0])
    u = mx.random.uniform(-12, 12, (_CHANNELS,), key=keys[1])
    halves = [True, False] if match.layout.shared else [True]
    for gate_first in halves:
        h = _between(match, z, u, gate_first)
        for activation in _candidates(match.module):
            if _relative_error(gated_product(activation, z, u), h) < 1e-5:
                layout = match.layout
                if layout.shared:
                    layout = Layout(layout.gate, layout.up, layout.down, gate_first)
                return layout, activation
    raise ValueError(
        "its activation is none that is known, or gate and up are not combined as phi(gate) * up"
    )


def _between(match: Match, z: mx.array, u: mx.array, gate_first: bool) -> mx.array:
    """What the module makes of z and u between its projections; [F]."""
    module, layout = match.module, match.layout
    held = {name: module[name] for name in layout.projections}
    lead = (1, 1, 1, 1) if match.experts else (1, 1)
    dims = input_dims(held[layout.gate])
    try:
        if layout.shared:
            both = mx.concatenate([z, u] if gate_first else [u, z])
            module[layout.gate] = _Probe(both.reshape(*lead, -1))
        else:
            module[layout.gate], module[layout.up] = (
                _Probe(z.reshape(*lead, -1)),
                _Probe(u.reshape(*lead, -1)),
            )
        module[layout.down] = _Probe()
        x = mx.zeros((1, 1, dims))
        h = module(x, mx.zeros((1, 1, 1), mx.uint32)) if match.experts else module(x)
        mx.eval(h)
    except Exception as error:
        raise ValueError(f"its forward takes more than the projections ({type(error).__name__})") from None
    finally:
        for name, child in held.items():
            module[name] = child
    if not isinstance(h, mx.array) or h.size != _CHANNELS:
        raise ValueError("its forward is not down(phi(gate(x)) * up(x))")
    return h.reshape(-1)


def verify(match: Match, rebuilt: nn.Module) -> None:
    """Compare a module and its rebuilt form on random input, experts with few and with many rows.

    Raises:
        ValueError: they differ by more than rounding; the message has the relative error.
    """
    gate = match.module[match.layout.gate]
    dims, dtype = input_dims(gate), compute_dtype(gate)
    # The rebuilt product rounds once where the original may round several times in a half type.
    tolerance = {mx.float32: 1e-5, mx.float16: 5e-3}.get(dtype, 4e-2)
    # mlx-lm sorts the rows by expert from 64 choices on.
    for length in (8, 48) if match.experts else (8,):
        x = mx.random.normal((1, length, dims), key=mx.random.key(1)).astype(dtype)
        inputs = [x]
        if match.experts:
            chosen = min(2, match.experts)
            inputs.append(mx.random.randint(0, match.experts, (1, length, chosen), key=mx.random.key(2)))
        error = _relative_error(rebuilt(*inputs), match.module(*inputs))
        if not error < tolerance:
            raise ValueError(
                f"rebuilt, it gives another output than the original (relative error {error:.1e})"
            )


def _relative_error(got: mx.array, want: mx.array) -> float:
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    size: Any = mx.maximum(mx.abs(want).max(), 1e-30)
    return (mx.abs(got - want).max() / size).item()


def input_dims(linear: nn.Module) -> int:
    """Input size D of a dense or quantized linear layer, with or without experts."""
    if isinstance(linear, SWITCH):
        return linear.input_dims
    if isinstance(linear, nn.QuantizedLinear):
        return linear.weight.shape[-1] * 32 // linear.bits
    return linear.weight.shape[-1]


def output_dims(linear: nn.Module) -> int:
    """Output size F of a dense or quantized linear layer, with or without experts."""
    return linear.weight.shape[-2]


def compute_dtype(linear: nn.Module) -> mx.Dtype:
    """The dtype in which a layer's outputs come: of its weight, or of its scales where these are floats."""
    if "scales" not in linear:
        return linear.weight.dtype
    return linear.scales.dtype if mx.issubdtype(linear.scales.dtype, mx.floating) else mx.bfloat16
