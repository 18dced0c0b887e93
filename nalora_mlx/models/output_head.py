"""Splitting a model into hidden states and output head, so that training computes only the logits that it needs.

The split does not rely on names or on knowledge of the architecture. While the model's own code runs, calls of the
module that produces the hidden states are intercepted: their result is recorded, or replaced by other hidden states.
Everything between hidden states and logits (norms, scales, soft caps, tied or quantized embeddings) therefore stays the
model's own. A split is tried on a few tokens before it is used.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nalora_mlx.models.tolerances import LOGITS, relative_error

Forward = Callable[..., mx.array]


class OutputHead:
    """A model in two parts: tokens -> hidden states, and hidden states -> logits.

    Args:
        backbone: the module of the model whose output is the hidden states.
        forward: token ids [B, L] -> logits [B, L, V], the whole model.
        vocabulary: V, the number of logits per token.
        layers: those of the model that come before the backbone, if it is only a norm. They are bypassed when logits
            are computed, since they would otherwise run once more for each call and disturb what adapters observe.

    Attributes:
        projection: the module whose weight has one row per vocabulary entry; None if logits can only be computed for
            the whole vocabulary.
    """

    def __init__(
        self, backbone: nn.Module, forward: Forward, vocabulary: int, layers: Sequence[nn.Module] = ()
    ):
        self.backbone = backbone
        self.forward = forward
        self.vocabulary = vocabulary
        self.layers = layers
        self.projection: nn.Module | None = None

    def hidden(self, tokens: mx.array, **arguments: Any) -> mx.array:
        """Return hidden states [B, L, D] of token ids [B, L], without computing the logits.

        `arguments` are passed to the model, such as `cache`.
        """
        outputs: list[mx.array] = []

        def record(call: Callable[[], mx.array]) -> mx.array:
            outputs.append(call())
            return outputs[-1]

        with _intercept(self.backbone, record):
            self.forward(tokens, **arguments)  # lazy: the logits are never evaluated
        return outputs[-1]

    def logits(self, hidden: mx.array) -> mx.array:
        """Return logits [S, V] of any hidden states [S, D]."""
        with _bypassed(self.layers), _intercept(self.backbone, lambda _: hidden[None]):
            # Not [0]: MLX makes that a gather, whose gradient is a scatter.
            return self.forward(mx.zeros((1, 1), mx.int32)).squeeze(0)

    def logits_for(self, hidden: mx.array, entries: Any) -> mx.array:
        """Return logits [S, v] of some vocabulary entries, given by a slice or by their indices [v]."""
        assert self.projection is not None
        with _select_rows(self.projection, self.vocabulary, entries):
            return self.logits(hidden)


def find_output_head(model: nn.Module, forward: Forward | None = None) -> OutputHead | None:
    """Find the outermost module whose output gives the model's exact logits, and split the model there.

    Tries the model's children first, then its grandchildren. Runs the model about twice for each, on four tokens.

    Args:
        model: any model.
        forward: token ids -> logits; the model itself if None.

    Returns:
        The output head; None if no split is exact.
    """
    forward = forward or model
    training = model.training
    model.eval()  # dropout would make every split look wrong
    try:
        return _first_exact_split(model, forward)
    finally:
        model.train(training)


def _first_exact_split(model: nn.Module, forward: Forward) -> OutputHead | None:
    tokens = mx.array([[1, 2, 3, 4]])
    try:
        expected = forward(tokens)
        mx.eval(expected)
    except Exception:
        return None  # the model takes more than tokens
    modules = {path: module for path, module in model.named_modules() if path and path.count(".") <= 1}
    for path in sorted(modules, key=lambda path: path.count(".")):
        if any(part.isdigit() for part in path.split(".")):
            continue  # a layer of the backbone
        inside = {id(module) for module in modules[path].modules()}
        layers = [layer for layer in getattr(model, "layers", ()) if id(layer) not in inside]
        head = OutputHead(modules[path], forward, expected.shape[-1], layers)
        if _is_exact(head, tokens, expected):
            head.projection = _find_projection(head, model, tokens, expected)
            return head
    return None


def _is_exact(head: OutputHead, tokens: mx.array, expected: mx.array) -> bool:
    """Return whether a split gives the model's logits for single hidden states."""
    try:
        hidden = head.hidden(tokens)
        if not isinstance(hidden, mx.array) or hidden.ndim != 3 or hidden.shape[:2] != tokens.shape:
            return False
        if hidden.shape == expected.shape:
            return False  # these are logits already, perhaps before scaling, so the split would save nothing
        # Some positions in another order, which shows a head that mixes neighbouring positions.
        order = mx.array([3, 1])
        logits = head.logits(hidden[0][order])
    except Exception:
        return False
    return _agree(logits, expected[0][order])


def _find_projection(
    head: OutputHead, model: nn.Module, tokens: mx.array, expected: mx.array
) -> nn.Module | None:
    """Return the module whose weight's rows are the vocabulary entries; None if logits need all rows at once."""
    hidden = head.hidden(tokens)[0]
    entries = mx.array([head.vocabulary - 1, 0, 1, 0])
    for module in model.modules():
        if not _has_rows(module.get("weight"), head.vocabulary):
            continue
        head.projection = module
        try:
            if _treats_entries_alike(head, hidden) and _agree(
                head.logits_for(hidden, entries), expected[0][:, entries]
            ):
                return module
        except Exception:  # not the output projection
            continue
    return None


def _treats_entries_alike(head: OutputHead, hidden: mx.array) -> bool:
    """Return whether the code after the projection treats all vocabulary entries alike, so that some may be left out.

    It does not if it addresses entries by index. Must be checked first, since MLX does not check the bounds of indices
    when it writes.
    """
    assert head.projection is not None
    method = "as_linear" if hasattr(head.projection, "as_linear") else "__call__"
    shape = (1, hidden.shape[0], head.vocabulary)
    projected = mx.random.normal(shape, key=mx.random.key(0)).astype(hidden.dtype)
    with _intercept(head.projection, lambda _: projected, method):
        logits = head.logits(hidden)
    with _intercept(head.projection, lambda _: projected[..., ::-1], method):
        reversed_logits = head.logits(hidden)
    return _agree(reversed_logits[..., ::-1], logits)


def _agree(logits: mx.array, expected: mx.array) -> bool:
    return relative_error(logits, expected) <= LOGITS.for_dtype(expected.dtype)


@contextmanager
def _select_rows(projection: nn.Module, vocabulary: int, entries: Any) -> Iterator[None]:
    """Reduce a linear layer or embedding, dense or quantized, to some of its V rows while the context is open."""
    arrays = {name: array for name, array in projection.items() if _has_rows(array, vocabulary)}
    try:
        for name, array in arrays.items():
            projection[name] = array[entries]
        yield
    finally:
        for name, array in arrays.items():
            projection[name] = array


def _has_rows(array: Any, count: int) -> bool:
    return isinstance(array, mx.array) and array.ndim > 0 and array.shape[0] == count


@contextmanager
def _bypassed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let layers return their input while the context is open."""
    ids = {id(layer) for layer in layers}

    def bypass(original: Callable[..., Any], layer: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x if id(layer) in ids else original(layer, x, *args, **kwargs)

    with ExitStack() as stack:
        for cls in {type(layer) for layer in layers}:
            stack.enter_context(_replaced(cls, "__call__", partial(bypass, cls.__call__)))
        yield


@contextmanager
def _intercept(
    module: nn.Module, replacement: Callable[[Callable[[], Any]], Any], method: str = "__call__"
) -> Iterator[None]:
    """Replace a method of one module while the context is open; `replacement` gets the original call as a function."""
    cls = type(module)
    original = getattr(cls, method)

    def call(instance, *args, **kwargs):
        if instance is not module:
            return original(instance, *args, **kwargs)
        return replacement(lambda: original(instance, *args, **kwargs))

    with _replaced(cls, method, call):
        yield


@contextmanager
def _replaced(cls: type, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of a class while the context is open."""
    inherited, original = name not in vars(cls), getattr(cls, name)

    def call(*args: Any, **kwargs: Any) -> Any:  # a partial would not become a method
        return method(*args, **kwargs)

    setattr(cls, name, call)
    try:
        yield
    finally:
        if inherited:
            delattr(cls, name)
        else:
            setattr(cls, name, original)
