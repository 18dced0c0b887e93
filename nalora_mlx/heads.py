"""Cut a model between its last hidden states and its logits, so that logits are computed only where they count.

No model is taken apart by name: while the model's own code runs, the module that makes the hidden states is
overheard, or made to answer with others. Whatever a model does on the way to its logits (norms, scales, soft caps,
tied or quantized embeddings) is thereby its own. The cut is tried on a few tokens before it is used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Forward = Callable[..., mx.array]


class Head:
    """A model in two parts: tokens -> hidden states, hidden states -> logits.

    Args:
        backbone: the module of the model whose output is the hidden states.
        forward: token ids [B, L] -> logits [B, L, V], the whole model.
        vocabulary: V.
    """

    def __init__(self, backbone: nn.Module, forward: Forward, vocabulary: int):
        self.backbone = backbone
        self.forward = forward
        self.vocabulary = vocabulary

    def hidden(self, tokens: mx.array, **arguments: Any) -> mx.array:
        """Hidden states [B, L, D] of token ids [B, L]; the logits beyond stay uncomputed.

        `arguments` are the model's own, such as a cache.
        """
        heard: list[mx.array] = []

        def listen(call: Callable[[], mx.array]) -> mx.array:
            heard.append(call())
            return heard[-1]

        with _answering(self.backbone, listen):
            self.forward(tokens, **arguments)
        return heard[-1]

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [S, V] of hidden states [S, D], in any order and number."""
        with _answering(self.backbone, lambda _: hidden[None]):
            return self.forward(mx.zeros((1, 1), mx.int32))[0]


@contextmanager
def _answering(module: nn.Module, answer: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Let `answer` take the calls of one module; it gets the call that would have been made."""
    cls = type(module)
    original = cls.__call__

    def call(this, *args, **kwargs):
        if this is not module:
            return original(this, *args, **kwargs)
        return answer(lambda: original(this, *args, **kwargs))

    cls.__call__ = call
    try:
        yield
    finally:
        cls.__call__ = original


def find_head(model: nn.Module, forward: Forward | None = None) -> Head | None:
    """Find where a model can be cut, the outermost place at which the cut is exact; None if there is none.

    Args:
        model: any model; run twice per candidate on four tokens.
        forward: token ids -> logits; the model itself if None.
    """
    forward = forward or model
    training = model.training
    model.eval()  # dropout would make every cut look wrong
    try:
        return _first_exact(model, forward)
    finally:
        model.train(training)


def _first_exact(model: nn.Module, forward: Forward) -> Head | None:
    tokens = mx.array([[1, 2, 3, 4]])
    try:
        want = forward(tokens)
        mx.eval(want)
    except Exception:
        return None  # it takes more than tokens
    modules = {path: module for path, module in model.named_modules() if path and path.count(".") <= 1}
    for path in sorted(modules, key=lambda path: path.count(".")):
        if any(part.isdigit() for part in path.split(".")):
            continue  # a layer: what follows it is no head
        head = Head(modules[path], forward, want.shape[-1])
        if _is_exact(head, tokens, want):
            return head
    return None


def _is_exact(head: Head, tokens: mx.array, want: mx.array) -> bool:
    try:
        hidden = head.hidden(tokens)
        if not isinstance(hidden, mx.array) or hidden.ndim != 3 or hidden.shape[:2] != tokens.shape:
            return False
        if hidden.shape == want.shape and mx.array_equal(hidden, want):
            return False  # the logits themselves: nothing is left to save
        # Other positions, in another order: a head that looks at its neighbours gives itself away.
        order = mx.array([3, 1])
        got = head.logits(hidden[0][order]).astype(mx.float32)
    except Exception:
        return False
    expected = want[0][order].astype(mx.float32)
    finite = mx.isfinite(expected)
    expected, got = mx.where(finite, expected, 0), mx.where(finite, got, 0)
    # Wide enough for half types and for GPUs that shorten float32 in products; a wrong cut is off by far more.
    tolerance = 2e-3 if want.dtype == mx.float32 else 2e-2
    return bool(mx.all(mx.abs(got - expected) <= tolerance * mx.abs(expected).max()).item())
