"""Training forms of a model's recurrences, which replace functions of its code while the model is trained.

mlx-lm and mlx-vlm compute recurrences for generation, with a Metal kernel or one token at a time. The kernels have no
gradient. A loop over tokens builds a graph of about a hundred operations per token and layer, and keeps a state for
each token. `TrainingForms` replaces these functions while a batch is computed. It first compares each replacement with
the model's own function, on the arguments that the model calls it with.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from nalora_mlx.core.errors import first_line
from nalora_mlx.models.tolerances import RECURRENCE, relative_error
from nalora_mlx.models.training_forms import TRAINING_FORMS, packed_convolution
from nalora_mlx.ops.fast_math import vectorized
from nalora_mlx.ops.recurrence.chunks import CHUNK
from nalora_mlx.ops.recurrence.segments import packed_rows

COMPARED_TOKENS = CHUNK + 6  # more than one chunk
# A gradient smaller than this fraction of the largest one may be rounding. Its error is relative to that fraction.
NEGLIGIBLE = 1e-4
_mlx_convolution = nn.Conv1d.__call__  # read once, because another model's forms may be installed later


class Patch(NamedTuple):
    """An attribute to replace while a model is trained.

    Attributes:
        owner: a Python module or a class.
        attribute: its attribute.
        original: the value outside training.
        replacement: the value while a batch is computed.
        compared: whether to compare the replacement with the original before it is used.
    """

    owner: Any
    attribute: str
    original: Any
    replacement: Callable[..., Any] | None
    compared: bool = False

    @property
    def name(self) -> str:
        """The full path, such as mlx_lm.models.qwen3_5.gated_delta_update."""
        path = self.owner.__name__
        if isinstance(self.owner, type):
            path = f"{self.owner.__module__}.{self.owner.__qualname__}"
        return f"{path}.{self.attribute}"


class TrainingForms:
    """The training forms of a model's recurrences.

    Runs one short forward of the model, in which each form is compared with the function that it replaces: outputs and
    gradients, in float32. Forms that differ are not used.

    Args:
        model: any model; its weights are used as they are.
        forward: token ids [B, L] -> outputs; the model itself if None.

    Attributes:
        patches: what is replaced while a batch is computed.
        notices: one line for each form that is not used.
    """

    def __init__(self, model: nn.Module, forward: Callable[[mx.array], Any] | None = None):
        self.patches = find_patches(model)
        self.notices: list[str] = []
        self._convolutions = {id(module) for module in model.modules() if _is_causal_convolution(module)}
        if any(patch.compared for patch in self.patches):
            self._remove_differing(model, forward or model)

    @contextmanager
    def installed(self, segment_ids: mx.array | None = None) -> Iterator[None]:
        """Use the training forms, for the forward and the backward of a batch.

        Args:
            segment_ids: the number of each position's row in a packed batch, [B, L]. Recurrences and convolutions are
                then reset at the start of each row.
        """
        patches = list(self.patches)
        # On a CPU, MLX's convolution takes eight times as long.
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        if self._convolutions and (segment_ids is not None or on_cpu):
            patches.append(Patch(nn.Conv1d, "__call__", _mlx_convolution, self._convolution()))
        with packed_rows(segment_ids), _applied(patches):
            yield

    def _convolution(self) -> Callable[..., mx.array]:
        def convolve(module: nn.Conv1d, x: mx.array) -> mx.array:
            own = id(module) in self._convolutions
            return packed_convolution(module, x) if own else _mlx_convolution(module, x)

        return convolve

    def _remove_differing(self, model: nn.Module, forward: Callable[[mx.array], Any]) -> None:
        """Compare each form with its original during one forward, and remove the forms that differ."""
        problems: dict[Patch, str | None] = {}
        seen = set()

        def compare_and_call(patch: Patch, *args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            arrays = tuple((x.shape, x.dtype) for x in given if isinstance(x, mx.array))
            numbers = tuple(x for x in given if isinstance(x, int | float))
            signature = (patch, arrays, numbers)
            assert patch.replacement is not None
            if signature not in seen:
                seen.add(signature)
                problem = find_difference(patch.original, patch.replacement, args, kwargs)
                problems[patch] = problems.get(patch) or problem
            return (patch.original if problems[patch] else patch.replacement)(*args, **kwargs)

        def with_comparison(patch: Patch) -> Patch:
            def replacement(*args: Any, **kwargs: Any) -> Any:  # a partial would not become a method
                return compare_and_call(patch, *args, **kwargs)

            return patch._replace(replacement=replacement)

        patches = [with_comparison(patch) if patch.compared else patch for patch in self.patches]
        tokens = np.random.default_rng(0).integers(1, 32, (1, COMPARED_TOKENS), dtype=np.int32)
        training = model.training
        model.eval()
        try:
            with _applied(patches):
                forward(mx.array(tokens))
        except Exception as error:
            reason = f"the model does not run ({first_line(error)})"
            problems = {patch: reason for patch in self.patches if patch.compared}
        finally:
            model.train(training)
        self.notices += [
            f"{patch.name} keeps the model's own form, which takes time and memory for every token: its training form "
            f"cannot be used, since {problem}"
            for patch, problem in problems.items()
            if problem
        ]
        # A function that the model imports but does not call was not compared; it is not replaced either.
        agreeing = {patch for patch, problem in problems.items() if not problem}
        self.patches = [patch for patch in self.patches if patch in agreeing or not patch.compared]


def find_patches(model: nn.Module) -> list[Patch]:
    """Return a patch for each function, method and kernel of this model's code that has a training form."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    # A model's own file, which mlx-lm runs if trusted, is not among sys.modules.
    modules = [
        sys.modules[name] for name in sorted({cls.__module__ for cls in classes}) if name in sys.modules
    ]
    patches = []
    for form in TRAINING_FORMS:
        source = sys.modules.get(form.module)
        owner_name, _, attribute = form.name.rpartition(".")
        owners: list[Any]
        if owner_name:  # a class that the model uses, or a Python module that the model's code imports
            owner = getattr(source, owner_name, None)
            used = owner in classes if isinstance(owner, type) else source in modules
            owners = [owner] if used else []
        else:
            original = getattr(source, attribute, None)
            owners = [module for module in modules if getattr(module, attribute, None) is original]
        for owner in owners:
            original = getattr(owner, attribute, None)
            if original is not None:  # Metal kernels are None on other machines
                patches.append(Patch(owner, attribute, original, form.replacement, form.compared))
    return patches


def find_difference(
    original: Callable[..., Any], replacement: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> str | None:
    """Return how outputs or gradients of two functions differ for these arguments, in float32; None if they agree.

    The original runs on the CPU, where it uses operations that have gradients; if that fails, on the default device.
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
        # Flat, because some originals return an additional axis of size 1.
        return [leaf.reshape(-1) for _, leaf in tree_flatten(outputs) if isinstance(leaf, mx.array)]

    def outputs_and_gradients(function: Callable[..., Any]) -> tuple[list[mx.array], list[mx.array]]:
        call = partial(outputs_of, function)
        cotangents = [mx.zeros_like(output) for output in call(*primals)]
        cotangents[0] = mx.random.normal(cotangents[0].shape, cotangents[0].dtype, key=mx.random.key(0))
        outputs, gradients = mx.vjp(call, primals, cotangents)
        mx.eval(outputs, gradients)
        return outputs, gradients

    def reference() -> tuple[list[mx.array], list[mx.array]]:
        try:
            with mx.stream(mx.cpu):
                return outputs_and_gradients(original)
        except Exception:  # for example without a C++ compiler
            return outputs_and_gradients(original)

    try:
        expected, expected_gradients = reference()
        with vectorized():  # as in training
            found, found_gradients = outputs_and_gradients(replacement)
        errors = [relative_error(x, y) for x, y in zip(found, expected, strict=True)]
    except Exception as error:
        return first_line(error)
    sizes = [_largest(gradient) for gradient in expected_gradients]
    for x, y, size in zip(found_gradients, expected_gradients, sizes, strict=True):
        errors.append(_largest(x - y) / max(size, NEGLIGIBLE * max(sizes), 1e-30))
    if all(error <= RECURRENCE.float32 for error in errors):  # false for NaN
        return None
    return f"its results differ by {max(errors):.1e}"


def _largest(x: mx.array) -> float:
    return float(mx.abs(x).max().item())  # type: ignore[arg-type]


@contextmanager
def _applied(patches: Sequence[Patch]) -> Iterator[None]:
    """Set the attributes, and restore them at the end."""
    try:
        for patch in patches:
            setattr(patch.owner, patch.attribute, patch.replacement)
        yield
    finally:
        for patch in patches:
            setattr(patch.owner, patch.attribute, patch.original)


def _is_causal_convolution(module: nn.Module) -> bool:
    """Return whether a module is a depthwise convolution without padding of its own: callers pad on the left."""
    if not isinstance(module, nn.Conv1d):
        return False
    depthwise = module.groups == module.weight.shape[0] and module.weight.shape[2] == 1
    return depthwise and (module.stride, module.padding, module.dilation) == (1, 0, 1)
