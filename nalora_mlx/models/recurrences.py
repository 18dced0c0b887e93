"""Recurrent and hybrid models while they are trained: training forms in place of mlx-lm's functions.

mlx-lm computes recurrences for generation: with a Metal kernel, or one token after the other. Kernels have no gradient,
and a loop over tokens makes a graph of some hundred operations per token and layer, which keeps a state for each.
`TrainingForms` puts forms without either in place while a batch is computed. Each is first compared with the model's
own function, on the arguments that the model calls it with.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from nalora_mlx.core.errors import first_line
from nalora_mlx.models.tolerances import RECURRENCE, relative_error
from nalora_mlx.models.training_forms import TRAINING_FORMS, packed_convolution
from nalora_mlx.ops.recurrence.chunks import CHUNK
from nalora_mlx.ops.recurrence.segments import packed_rows

COMPARED_TOKENS = CHUNK + 6  # more than a chunk
NEGLIGIBLE = 1e-4  # gradients this much smaller than those of other arguments are compared with these


class Place(NamedTuple):
    """An attribute to set while a model is trained."""

    owner: Any  # a module or a class of mlx-lm
    attribute: str
    original: Any
    replacement: Callable[..., Any] | None
    compared: bool = False

    @property
    def name(self) -> str:
        """Where the attribute is, such as mlx_lm.models.qwen3_5.gated_delta_update."""
        path = self.owner.__name__
        if isinstance(self.owner, type):
            path = f"{self.owner.__module__}.{self.owner.__qualname__}"
        return f"{path}.{self.attribute}"


class TrainingForms:
    """The training forms of a model's recurrences.

    Makes one short forward of the model, in which each form is compared with the function whose place it takes:
    outputs and gradients, in float32. A form that differs is not used.

    Args:
        model: any model; its weights are used as they are.
        forward: token ids [B, L] -> outputs; the model itself if None.

    Attributes:
        places: what is replaced while a batch is computed.
        notices: one line for each form that differs and is not used.
    """

    def __init__(self, model: nn.Module, forward: Callable[[mx.array], Any] | None = None):
        self.places = find_places(model)
        self.notices: list[str] = []
        self._convolutions = {id(module) for module in model.modules() if _is_causal(module)}
        if any(place.compared for place in self.places):
            self._compare(model, forward or model)

    @contextmanager
    def installed(self, segment_ids: mx.array | None = None) -> Iterator[None]:
        """Put the forms in place, for the forward and the backward of a batch.

        Args:
            segment_ids: the number of each position's row in a packed batch, [B, L]. Recurrences and convolutions of
                these layers then start anew with each row.
        """
        places = list(self.places)
        # On a CPU, MLX's own takes eight times as long.
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        if self._convolutions and (segment_ids is not None or on_cpu):
            convolve = nn.Conv1d.__call__
            places.append(Place(nn.Conv1d, "__call__", convolve, self._convolution(convolve)))
        with packed_rows(segment_ids), _replaced(places):
            yield

    def _convolution(self, convolve: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(module: nn.Conv1d, x: mx.array) -> mx.array:
            return packed_convolution(module, x) if id(module) in self._convolutions else convolve(module, x)

        return call

    def _compare(self, model: nn.Module, forward: Callable[[mx.array], Any]) -> None:
        """Keep the places whose forms agree with the originals."""
        problems: dict[Place, str | None] = {}
        seen = set()

        def compared(place: Place, *args: Any, **kwargs: Any) -> Any:
            arrays = [x for x in (*args, *kwargs.values()) if isinstance(x, mx.array)]
            call = (place, *((x.shape, x.dtype) for x in arrays))
            assert place.replacement is not None
            if call not in seen:
                seen.add(call)
                found = difference(place.original, place.replacement, args, kwargs)
                problems[place] = problems.get(place) or found
            return (place.original if problems[place] else place.replacement)(*args, **kwargs)

        # A function, not a partial, because methods need the module that they are called on.
        def watched(place: Place) -> Place:
            call = wraps(place.original)(lambda *args, **kwargs: compared(place, *args, **kwargs))
            return place._replace(replacement=call)

        places = [watched(place) if place.compared else place for place in self.places]
        tokens = np.random.default_rng(0).integers(1, 32, (1, COMPARED_TOKENS), dtype=np.int32)
        training = model.training
        model.eval()
        try:
            with _replaced(places):
                forward(mx.array(tokens))
        except Exception as error:
            reason = f"the model does not run ({first_line(error)})"
            problems = {place: reason for place in self.places if place.compared}
        finally:
            model.train(training)
        for place, problem in problems.items():
            if problem:
                self.notices.append(
                    f"{place.name} keeps mlx-lm's own form, which takes time and memory for every token: its training "
                    f"form cannot be used, since {problem}"
                )
        # The model may also hold a function that it does not call; that was not compared.
        agreeing = {place for place, problem in problems.items() if not problem}
        self.places = [place for place in self.places if place in agreeing or not place.compared]


def find_places(model: nn.Module) -> list[Place]:
    """Return where this model calls functions, methods and kernels that have training forms."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    modules = [sys.modules[name] for name in sorted({cls.__module__ for cls in classes})]
    places = []
    for form in TRAINING_FORMS:
        source = sys.modules.get(f"mlx_lm.models.{form.module}")
        owner_name, _, attribute = form.name.rpartition(".")
        owners: list[Any]
        if owner_name:  # of a class of the model, or of a module that a module of the model imports
            owner = getattr(source, owner_name, None)
            used = owner in classes if isinstance(owner, type) else source in modules
            owners = [owner] if used else []
        else:
            original = getattr(source, attribute, None)
            owners = [module for module in modules if getattr(module, attribute, None) is original]
        for owner in owners:
            original = getattr(owner, attribute, None)
            if original is not None:  # Metal kernels are None on other machines
                places.append(Place(owner, attribute, original, form.replacement, form.compared))
    return places


def difference(
    original: Callable[..., Any], replacement: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> str | None:
    """Return how two functions differ, in outputs or gradients, for these arguments in float32; None if they agree.

    The original runs on the CPU, where it is made of operations that have gradients.
    """
    given = [*args, *kwargs.values()]
    positions = [
        i for i, x in enumerate(given) if isinstance(x, mx.array) and mx.issubdtype(x.dtype, mx.floating)
    ]
    primals = [given[i].astype(mx.float32) for i in positions]

    def outputs_of(function: Callable[..., Any], *arrays: mx.array) -> list[mx.array]:
        values = list(given)
        for i, array in zip(positions, arrays, strict=True):
            values[i] = array
        outputs = function(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))
        # Flat, because some originals have another last axis of 1.
        return [leaf.reshape(-1) for _, leaf in tree_flatten(outputs) if isinstance(leaf, mx.array)]

    def outputs_and_gradients(function: Callable[..., Any]) -> tuple[list[mx.array], list[mx.array]]:
        call = partial(outputs_of, function)
        cotangents = [mx.zeros_like(output) for output in call(*primals)]
        cotangents[0] = mx.random.normal(cotangents[0].shape, cotangents[0].dtype, key=mx.random.key(0))
        outputs, gradients = mx.vjp(call, primals, cotangents)
        mx.eval(outputs, gradients)
        return outputs, gradients

    try:
        with mx.stream(mx.cpu):
            expected, expected_gradients = outputs_and_gradients(original)
        found, found_gradients = outputs_and_gradients(replacement)
        errors = [relative_error(x, y) for x, y in zip(found, expected, strict=True)]
    except Exception as error:
        return first_line(error)
    sizes = [_largest(gradient) for gradient in expected_gradients]
    for x, y, size in zip(found_gradients, expected_gradients, sizes, strict=True):
        errors.append(_largest(x - y) / max(size, NEGLIGIBLE * max(sizes), 1e-30))
    if all(error <= RECURRENCE.float32 for error in errors):  # NaN is not
        return None
    return f"its results differ by {max(errors):.1e}"


def _largest(x: mx.array) -> float:
    return float(mx.abs(x).max().item())  # type: ignore[arg-type]


@contextmanager
def _replaced(places: Sequence[Place]) -> Iterator[None]:
    """Set the attributes, and restore them at the end."""
    try:
        for place in places:
            setattr(place.owner, place.attribute, place.replacement)
        yield
    finally:
        for place in places:
            setattr(place.owner, place.attribute, place.original)


def _is_causal(module: nn.Module) -> bool:
    """Return whether a module is a depthwise convolution over the K - 1 tokens before each, padded by its caller."""
    if not isinstance(module, nn.Conv1d):
        return False
    depthwise = module.groups == module.weight.shape[0] and module.weight.shape[2] == 1
    return depthwise and (module.stride, module.padding, module.dilation) == (1, 0, 1)
