"""Where is the gate in this model: a table of gated-MLP layouts, how to find them, how to be sure.

A gated MLP is a module with a gate, an up and a down projection that computes down(phi(gate(x)) * up(x)). Which
child is the gate, and what phi is, is not read from names: the module is run with probes in place of its
projections, so that it shows the function between them, and then as a whole on random input.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nalora_mlx.activations import ACTIVATIONS, Activation
from nalora_mlx.kernels.reference import gated_product

LINEAR = (nn.Linear, nn.QuantizedLinear)


@dataclass(frozen=True)
class Layout:
    """One row of the table: the names under which a module holds its three projections."""

    name: str
    gate: str
    up: str
    down: str

    @property
    def projections(self) -> tuple[str, str, str]:
        """Child names in the order gate, up, down."""
        return (self.gate, self.up, self.down)


LAYOUTS = (Layout("gate_proj/up_proj/down_proj", "gate_proj", "up_proj", "down_proj"),)


@dataclass(frozen=True)
class Match:
    """A module that has the parts of a gated MLP: its path, its layout, and the module."""

    path: str
    layout: Layout
    module: nn.Module


def walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules with their paths, first layer first; `named_modules` goes from the last to the first."""
    return model.named_modules()[::-1]


def find(model: nn.Module) -> Iterator[Match]:
    """Yield every module whose children fit a row of the table, first layer first."""
    for path, module in walk(model):
        for layout in LAYOUTS:
            if all(isinstance(module.get(name), LINEAR) for name in layout.projections):
                yield Match(path, layout, module)
                break


class _Probe(nn.Module):
    """Stands in for a projection: answers with a fixed array, or passes its input on."""

    def __init__(self, answer: mx.array | None = None):
        super().__init__()
        self._answer = answer

    def __call__(self, x: mx.array) -> mx.array:
        return x if self._answer is None else self._answer


def identify(match: Match) -> Activation:
    """Find phi by running the module with probes for projections; exact to float32 whatever the weights' dtype.

    Raises:
        ValueError: the module does not compute down(phi(gate(x)) * up(x)) for any phi of the table; the message
            is the reason that a report shows.
    """
    module, layout = match.module, match.layout
    held = {name: module[name] for name in layout.projections}
    # Two independent arrays over the range in which activations differ; the seed is fixed so that the answer is.
    keys = mx.random.split(mx.random.key(0), 2)
    z = mx.random.uniform(-8, 8, (1, 1, 512), key=keys[0])
    u = mx.random.uniform(-2, 2, (1, 1, 512), key=keys[1])
    try:
        module[layout.gate], module[layout.up], module[layout.down] = _Probe(z), _Probe(u), _Probe()
        with mx.stream(mx.cpu):
            h = module(mx.zeros((1, 1, input_dims(held[layout.gate]))))
            mx.eval(h)
    except Exception as error:
        raise ValueError(f"its forward takes more than the projections ({type(error).__name__})") from None
    finally:
        for name, child in held.items():
            module[name] = child
    if not isinstance(h, mx.array) or h.shape != z.shape:
        raise ValueError("its forward is not down(phi(gate(x)) * up(x))")
    for activation in ACTIVATIONS.values():
        if _relative_error(gated_product(activation, z, u), h) < 1e-5:
            return activation
    raise ValueError("its activation is none that is known")


def verify(original: nn.Module, rebuilt: nn.Module, dims: int, dtype: mx.Dtype) -> None:
    """Compare two modules on random input [1, 8, dims].

    Raises:
        ValueError: they differ by more than rounding; the message has the relative error.
    """
    x = mx.random.normal((1, 8, dims), key=mx.random.key(1)).astype(dtype)
    # The rebuilt product rounds once where the original may round several times in a half type.
    tolerance = {mx.float32: 1e-5, mx.float16: 5e-3}.get(dtype, 4e-2)
    error = _relative_error(rebuilt(x), original(x))
    if not error < tolerance:
        raise ValueError(f"rebuilt, it gives another output than the original (relative error {error:.1e})")


def _relative_error(got: mx.array, want: mx.array) -> float:
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    size: Any = mx.maximum(mx.abs(want).max(), 1e-30)
    return (mx.abs(got - want).max() / size).item()


def input_dims(linear: nn.Module) -> int:
    """Input size D of a dense or quantized linear layer."""
    if isinstance(linear, nn.QuantizedLinear):
        return linear.weight.shape[-1] * 32 // linear.bits
    return linear.weight.shape[-1]


def output_dims(linear: nn.Module) -> int:
    """Output size F of a dense or quantized linear layer."""
    return linear.weight.shape[0]
