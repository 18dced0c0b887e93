"""The context of a training forward, and recomputation of activations in the backward pass.

A model is called with tokens only. What its adapters need beyond them, and the statistics that they collect, travel
in a `ForwardPass`, which is current for as long as `forward_pass` is open.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from nalora_mlx.ops.custom_function import checkpoint


class Gate(NamedTuple):
    """The gate pre-activations of a gated MLP, which decide what it selects."""

    z: mx.array  # [N, F]; with experts [N, k, F], in the order of their numbers
    experts: mx.array | None = None  # [N, k], ascending; None for a dense MLP


@dataclass
class ForwardPass:
    """What adapters need to know about one training forward, and the statistics that they collect in it.

    Attributes:
        token_mask: [B, L], 1 for tokens and 0 for padding; None to collect no statistics.
        routes: path of a gated MLP -> mask [F] on the gradient of the gate's lora_a.
        dropout_keys: [n, 2], one random key per dropout, so that a recomputed forward drops the same elements.
        diagnose: also collect the sums that selection misalignment is computed from.
        gates: path of a gated MLP -> its Gate, if a dict is given to collect them in.
        statistics: path of a gated MLP -> its sums over tokens. If the module is called several times in one
            forward, these are the means over its calls.
        dtypes: id of an adapter -> the dtypes of its low-rank products.
        scaled: ids of the adapters whose lora_b already includes their scale.
    """

    token_mask: mx.array | None
    routes: Mapping[str, mx.array] = field(default_factory=dict)
    dropout_keys: mx.array | None = None
    diagnose: bool = False
    gates: dict[str, Gate] | None = None
    statistics: dict[str, dict[str, mx.array]] = field(default_factory=dict)
    dtypes: dict[int, set[mx.Dtype]] = field(default_factory=dict)
    scaled: frozenset[int] = frozenset()
    _calls: dict[str, int] = field(default_factory=dict)

    def observe(self, path: str, sums: dict[str, mx.array]) -> None:
        """Record the statistics of one call of a module."""
        calls = self._calls[path] = self._calls.get(path, 0) + 1
        if calls > 1:
            sums = {name: old + (sums[name] - old) / calls for name, old in self.statistics[path].items()}
        self.statistics[path] = sums

    def record_dtype(self, adapter: nn.Module, dtype: mx.Dtype) -> None:
        """Record the dtype of an adapter's low-rank products."""
        self.dtypes.setdefault(id(adapter), set()).add(dtype)


_current: ContextVar[ForwardPass | None] = ContextVar("forward_pass", default=None)


def current_pass() -> ForwardPass | None:
    """Return the ForwardPass that is open, or None outside of training."""
    return _current.get()


@contextmanager
def forward_pass(context: ForwardPass) -> Iterator[ForwardPass]:
    """Make a ForwardPass current. Keep it open for the backward pass, where checkpointed layers run again."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


class Cast(NamedTuple):
    """How an adapter uses a parameter: multiplied by a scale, in a dtype."""

    dtype: mx.Dtype
    scale: float


def adapter_casts(model: nn.Module, forward: Callable[[mx.array], mx.array]) -> dict[str, Cast]:
    """Return the dtype and scale with which adapters use lora_a and lora_b, by name of the parameter.

    Traces a forward on a few tokens without computing it. Adapters that it does not reach, or that use several dtypes,
    are left out.
    """
    context, training = ForwardPass(token_mask=None), model.training
    model.eval()  # no dropout
    try:
        with forward_pass(context):
            forward(mx.array([[1, 2, 3, 4]]))
    except Exception:  # the model takes more than tokens
        return {}
    finally:
        model.train(training)
    casts: dict[str, Cast] = {}
    for path, module in model.named_modules():
        dtypes = context.dtypes.get(id(module), set())
        if len(dtypes) == 1:
            dtype = next(iter(dtypes))
            casts |= {f"{path}.lora_a": Cast(dtype, 1.0), f"{path}.lora_b": Cast(dtype, module.scale)}
    return casts


@contextmanager
def recompute_activations(layers: list[nn.Module]) -> Iterator[None]:
    """Recompute the activations of these layers in the backward pass instead of keeping them in memory.

    Replaces `__call__` of the layers' classes while the context is open. Other instances of the same classes are not
    affected. Layers may exchange arrays through an object of their model that they are called with, such as the
    residuals of Kimi K3. These arrays become arguments and results of the recomputed function, since mx.checkpoint
    gives all other arrays a gradient of 0.
    """
    chosen = {id(layer) for layer in layers}
    forwards = {cls: cls.__call__ for cls in {type(layer) for layer in layers}}

    def checkpointed(forward):
        def call(layer, *args, **kwargs):
            if id(layer) not in chosen:
                return forward(layer, *args, **kwargs)

            given = [x for x in (*args, *kwargs.values()) if hasattr(x, "__dict__")]
            holders = [x for x in given if type(x).__module__ == type(layer).__module__]
            attributes = [dict(vars(holder)) for holder in holders]  # the layer may set others to arrays

            def inner(parameters, held, *args, **kwargs):
                layer.update(parameters)
                for holder, before, arrays in zip(holders, attributes, held, strict=True):
                    vars(holder).update(before | arrays)
                return forward(layer, *args, **kwargs), [_arrays_of(holder) for holder in holders]

            held = [_arrays_of(holder) for holder in holders]
            output, held = checkpoint(inner)(layer.trainable_parameters(), held, *args, **kwargs)
            for holder, arrays in zip(holders, held, strict=True):
                vars(holder).update(arrays)
            return output

        return call

    try:
        for cls, forward in forwards.items():
            cls.__call__ = checkpointed(forward)
        yield
    finally:
        for cls, forward in forwards.items():
            cls.__call__ = forward


def _arrays_of(holder: object) -> dict[str, mx.array]:
    """Return the arrays among the attributes of an object."""
    return {name: value for name, value in vars(holder).items() if isinstance(value, mx.array)}
