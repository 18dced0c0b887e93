"""What a training step tells the forward of a model beside its tokens, what it hears from it, and recomputation."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn


@dataclass
class ForwardPass:
    """One training forward: what the adapters need beside x, and what they observed.

    Attributes:
        weights: [B, L], 1 for real tokens, 0 for padding; None if nothing is to be observed.
        routes: path of a gated MLP -> mask [F] on the gradient that reaches the gate's lora_a.
        dropout_keys: [n, 2], a random key per dropout, the same in a recomputation as in the forward.
        diagnose: whether to sum what selection misalignment needs too.
        seen: path of a gated MLP -> its sums over tokens, written during the forward; of a module that runs
            several times, the mean over its runs.
    """

    weights: mx.array | None
    routes: Mapping[str, mx.array] = field(default_factory=dict)
    dropout_keys: mx.array | None = None
    diagnose: bool = False
    seen: dict[str, dict[str, mx.array]] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)

    def observe(self, path: str, sums: dict[str, mx.array]) -> None:
        """Take what one run of a module saw."""
        runs = self.runs[path] = self.runs.get(path, 0) + 1
        if runs > 1:
            sums = {name: old + (sums[name] - old) / runs for name, old in self.seen[path].items()}
        self.seen[path] = sums


_current: ContextVar[ForwardPass | None] = ContextVar("forward_pass", default=None)


def current() -> ForwardPass | None:
    """The pass that a model is in, if a training step has begun one."""
    return _current.get()


@contextmanager
def forward_pass(this: ForwardPass) -> Iterator[ForwardPass]:
    """Make a ForwardPass the current one; it must span the backward too, where checkpointing runs forwards again."""
    token = _current.set(this)
    try:
        yield this
    finally:
        _current.reset(token)


# --- modules ------------------------------------------------------------------------------------------------


@contextmanager
def recomputed(layers: list[nn.Module]) -> Iterator[None]:
    """Recompute these layers' activations in the backward pass instead of keeping them.

    Layers may be of several classes. A class is changed only inside the context, and only for the layers named.
    """
    chosen = {id(layer) for layer in layers}
    forwards = {cls: cls.__call__ for cls in {type(layer) for layer in layers}}

    def patched(forward):
        def call(layer, *args, **kwargs):
            if id(layer) not in chosen:
                return forward(layer, *args, **kwargs)

            def inner(parameters, *args, **kwargs):
                layer.update(parameters)
                return forward(layer, *args, **kwargs)

            return mx.checkpoint(inner)(layer.trainable_parameters(), *args, **kwargs)

        return call

    try:
        for cls, forward in forwards.items():
            cls.__call__ = patched(forward)
        yield
    finally:
        for cls, forward in forwards.items():
            cls.__call__ = forward
