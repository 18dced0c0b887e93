"""Where is the gate in this model: a table of gated-MLP layouts, how to find them, how to be sure.

A gated MLP is a module with a gate, an up and a down projection that computes down(phi(gate(x)) * up(x)); gate and
up may be one projection, and each may be per expert. What phi is and which half of a shared projection is the gate
is not read from names: the module is run with probes in place of its projections, so that it shows the function
between them, and then as a whole on random input.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from nalora_mlx.ops import activation_families
from nalora_mlx.ops.activations import ACTIVATIONS, Activation
from nalora_mlx.ops.kernels.reference import gated_product

LINEAR = (nn.Linear, nn.QuantizedLinear)
SWITCH = (SwitchLinear, QuantizedSwitchLinear)


@dataclass(frozen=True)
class Layout:
    """One row of the table: the names under which a module holds its projections; gate == up for a shared one."""

    gate: str
    up: str
    down: str
    gate_first: bool = True  # in a shared projection: whether the gate is its first half
    norm: str = ""  # a norm of the module's own, through which x goes first

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
            if layout.norm and not isinstance(module.get(layout.norm), nn.RMSNorm | nn.LayerNorm):
                continue
            if (
                layout.shared
                and _is_linear(children)
                and output_dims(children[0]) != 2 * input_dims(children[1])
            ):
                continue  # such as the up and down projection of an MLP without a gate
            if _is_linear(children):
                yield Match(path, layout, module)
                break
            if not layout.shared and all(isinstance(child, SWITCH) for child in children):
                yield Match(path, layout, module, children[0].num_experts)
                break


def find_foreign(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (path, class name) of gated MLPs whose projections are of a class that no LoRA fits."""
    for path, module in walk(model):
        for layout in LAYOUTS:
            children = [module.get(name) for name in layout.projections]
            if (
                not layout.shared
                and all(isinstance(child, nn.Module) for child in children)
                and not isinstance(children[0], LINEAR + SWITCH)
            ):
                yield path, type(children[0]).__name__
                break


def _is_linear(children: list[Any]) -> bool:
    return all(isinstance(child, LINEAR) for child in children)


# Activations whose parameters a model sets: from the object that may hold them, None where it has no such thing.
_Family = Callable[[Any], Activation | None]


def _has(holder: Any, *names: str) -> bool:
    return all(isinstance(getattr(holder, name, None), int | float) for name in names)


_XIELU = ("alpha_p", "alpha_n", "beta", "eps")
FAMILIES: tuple[_Family, ...] = (
    lambda h: activation_families.swiglu_oai(h._alpha, h._limit) if _has(h, "_alpha", "_limit") else None,
    lambda h: activation_families.swiglu_input_clamped(h.limit) if _has(h, "limit") else None,
    lambda h: activation_families.swiglu_output_clamped(h.limit) if _has(h, "limit") else None,
    lambda h: activation_families.situ(h.beta, getattr(h, "linear_beta", None)) if _has(h, "beta") else None,
    lambda h: (
        activation_families.xielu(*(getattr(h, name).item() for name in _XIELU))
        if hasattr(h, "alpha_p")
        else None
    ),
    lambda h: (
        activation_families.gelu_topk(h._std_multiplier.item()) if hasattr(h, "_std_multiplier") else None
    ),
)


def _candidates(module: nn.Module) -> Iterator[Activation]:
    yield from ACTIVATIONS.values()
    # The parameters are the module's own, or those of the activation that it holds.
    for holder in (module, *(getattr(module, name, None) for name in ("activation", "act_fn"))):
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


# Two forms of one activation differ by a few ulp, on a GPU with fast exponentials by some more; the exact GELU and its
# tanh form, the nearest neighbours in the table, differ by 1.7e-4.
SAME = 5e-5
_CHANNELS = 512


def _probes(seed: int) -> mx.array:
    """Values over the range in which activations differ, and some far beyond it, where they clip; [F]."""
    keys = mx.random.split(mx.random.key(seed), 3)
    near = mx.random.uniform(-12, 12, (_CHANNELS * 3 // 4,), key=keys[0])
    size = mx.power(10.0, mx.random.uniform(1, 4, (_CHANNELS // 4,), key=keys[1]))
    sign = mx.where(mx.random.bernoulli(0.5, size.shape, key=keys[2]), 1.0, -1.0)
    return mx.concatenate([near, size * sign])


def identify(match: Match) -> tuple[Layout, Activation]:
    """Find phi, and the halves of a shared projection, by running the module with probes in float32.

    Raises:
        ValueError: the module does not compute down(phi(gate(x)) * up(x)) for any phi that is known; the message
            is the reason that a report shows.
    """
    z, u = _probes(0), mx.roll(_probes(1), 64)  # rolled, so that not all far values meet far ones
    for gate_first in (True, False) if match.layout.shared else (True,):
        h = _between(match, z, u, gate_first)
        for activation in _candidates(match.module):
            error = mx.abs(gated_product(activation, z, u) - h) / (1 + mx.abs(h))
            if mx.all(error < SAME).item():
                return replace(match.layout, gate_first=gate_first), activation
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


def verify(match: Match, rebuilt: nn.Module, dtype: mx.Dtype) -> float:
    """Compare a module and its rebuilt form on random input of a dtype, experts with few and with many rows.

    Returns:
        The largest error, relative to the largest output.

    Raises:
        ValueError: they differ by more than rounding; the message has the relative error.
    """
    dims = input_dims(match.module[match.layout.gate])
    # Wide enough for half types and for GPUs that shorten float32 in products; a wrong rebuilding is off by far more.
    tolerance = {mx.float32: 2e-3, mx.float16: 5e-3}.get(dtype, 4e-2)
    worst = 0.0
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
        worst = max(worst, error)
    return worst


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


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype of a model's activations: that of its first weight that is neither packed nor a quantization scale."""
    for path, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating) and path.endswith("weight"):
            return array.dtype
    return mx.float32
