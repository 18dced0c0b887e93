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


class OutputHead:
    """A model in two parts: tokens -> hidden states, hidden states -> logits.

    Args:
        backbone: the module of the model whose output is the hidden states.
        forward: token ids [B, L] -> logits [B, L, V], the whole model.
        vocabulary: V.

    Attributes:
        projection: the module whose rows are the vocabulary's entries; None if logits can only be had all together.
    """

    def __init__(self, backbone: nn.Module, forward: Forward, vocabulary: int):
        self.backbone = backbone
        self.forward = forward
        self.vocabulary = vocabulary
        self.projection: nn.Module | None = None

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
            # Not [0], which MLX makes a gather, with a sum of scattered elements for a gradient.
            return self.forward(mx.zeros((1, 1), mx.int32)).squeeze(0)

    def logits_for(self, hidden: mx.array, which: Any) -> mx.array:
        """Logits [S, v] of some entries of the vocabulary, a slice or their indices [v]."""
        assert self.projection is not None
        with _cut(self.projection, self.vocabulary, which):
            return self.logits(hidden)


@contextmanager
def _cut(projection: nn.Module, vocabulary: int, which: Any) -> Iterator[None]:
    """Leave a linear layer or an embedding, quantized or not, some of its V rows for a while."""
    whole = {name: leaf for name, leaf in projection.items() if _has_rows(leaf, vocabulary)}
    try:
        for name, leaf in whole.items():
            projection[name] = leaf[which]
        yield
    finally:
        for name, leaf in whole.items():
            projection[name] = leaf


def _has_rows(leaf: Any, count: int) -> bool:
    return isinstance(leaf, mx.array) and leaf.ndim > 0 and leaf.shape[0] == count


@contextmanager
def _answering(
    module: nn.Module, answer: Callable[[Callable[[], Any]], Any], method: str = "__call__"
) -> Iterator[None]:
    """Let `answer` take the calls of one module; it gets the call that would have been made."""
    cls = type(module)
    original = getattr(cls, method)

    def call(this, *args, **kwargs):
        if this is not module:
            return original(this, *args, **kwargs)
        return answer(lambda: original(this, *args, **kwargs))

    inherited = method not in vars(cls)
    setattr(cls, method, call)
    try:
        yield
    finally:
        if inherited:
            delattr(cls, method)
        else:
            setattr(cls, method, original)


def find_output_head(model: nn.Module, forward: Forward | None = None) -> OutputHead | None:
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


def _first_exact(model: nn.Module, forward: Forward) -> OutputHead | None:
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
        head = OutputHead(modules[path], forward, want.shape[-1])
        if _is_exact(head, tokens, want):
            head.projection = _find_projection(head, model, tokens, want)
            return head
    return None


def _find_projection(
    head: OutputHead, model: nn.Module, tokens: mx.array, want: mx.array
) -> nn.Module | None:
    hidden = head.hidden(tokens)[0]
    part = mx.array([head.vocabulary - 1, 0, 1, 0])
    for module in model.modules():
        if not _has_rows(module.get("weight"), head.vocabulary):
            continue
        head.projection = module
        try:
            if _alike_for_all(head, hidden) and _agree(head.logits_for(hidden, part), want[0][:, part]):
                return module
        except Exception:  # not what makes the logits
            continue
    return None


def _alike_for_all(head: OutputHead, hidden: mx.array) -> bool:
    """Whether what follows the projection treats all entries of the vocabulary alike, so that some may be left out.

    Not so where entries are addressed by number: beyond the end of an array MLX does not look where it writes.
    """
    assert head.projection is not None
    method = "as_linear" if hasattr(head.projection, "as_linear") else "__call__"
    made = mx.random.normal((1, hidden.shape[0], head.vocabulary), key=mx.random.key(0)).astype(hidden.dtype)
    with _answering(head.projection, lambda _: made, method):
        there = head.logits(hidden)
    with _answering(head.projection, lambda _: made[..., ::-1], method):
        back = head.logits(hidden)
    return _agree(back[..., ::-1], there)


def _is_exact(head: OutputHead, tokens: mx.array, want: mx.array) -> bool:
    try:
        hidden = head.hidden(tokens)
        if not isinstance(hidden, mx.array) or hidden.ndim != 3 or hidden.shape[:2] != tokens.shape:
            return False
        if hidden.shape == want.shape:
            return False  # the logits themselves, or before they are scaled: nothing is left to save
        # Other positions, in another order: a head that looks at its neighbours gives itself away.
        order = mx.array([3, 1])
        got = head.logits(hidden[0][order])
    except Exception:
        return False
    return _agree(got, want[0][order])


def _agree(got: mx.array, want: mx.array) -> bool:
    # Wide enough for half types and for GPUs that shorten float32 in products; a wrong cut is off by far more.
    tolerance = 2e-3 if want.dtype == mx.float32 else 2e-2
    expected, got = want.astype(mx.float32), got.astype(mx.float32)
    finite = mx.isfinite(expected)
    expected, got = mx.where(finite, expected, 0), mx.where(finite, got, 0)
    return bool(mx.all(mx.abs(got - expected) <= tolerance * mx.abs(expected).max()).item())
