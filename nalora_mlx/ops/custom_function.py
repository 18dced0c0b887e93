"""Functions with a gradient of their own, like mx.custom_function, that can also be traced for the memory planner.

MLX cannot export a graph that contains its primitive for custom functions. While `tracing_custom_functions` is open,
another function is called instead, and builds an equivalent graph without that primitive.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

# (primals, cotangents, outputs) -> gradients of the primals, as for mx.custom_function
Gradient = Callable[[Any, Any, Any], Any]
Replacement = Callable[[Callable[..., Any], Gradient, Sequence[mx.array]], Any]

_replacement: ContextVar[Replacement | None] = ContextVar("custom_function_replacement", default=None)


class custom_function:
    """A function of arrays whose gradient is set with `vjp`; see mx.custom_function.

    Args:
        function: takes arrays, and returns an array or a list or tuple of arrays.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.gradient: Gradient | None = None
        self._mlx: Any = mx.custom_function(function)

    def vjp(self, gradient: Gradient) -> "custom_function":
        """Set the function that computes the gradients from primals, cotangents and outputs."""
        self.gradient = gradient
        self._mlx.vjp(gradient)
        return self

    def __call__(self, *arrays: mx.array) -> Any:
        """Compute the function."""
        replacement = _replacement.get()
        if replacement is None or self.gradient is None:
            return self._mlx(*arrays)
        return replacement(self.function, self.gradient, arrays)


@contextmanager
def tracing_custom_functions(replacement: Replacement) -> Iterator[None]:
    """Call `replacement(function, gradient, arrays)` instead of custom functions while the context is open."""
    token = _replacement.set(replacement)
    try:
        yield
    finally:
        _replacement.reset(token)


def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with activations recomputed in the backward pass, as mx.checkpoint does.

    While custom functions are traced, the recomputation is traced in the forward pass.
    """
    replacement = _replacement.get()
    if replacement is None:
        return mx.checkpoint(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        arrays, build_arguments = _separated((args, kwargs))
        build_result = None

        def flat(*arrays: mx.array) -> list[mx.array]:
            nonlocal build_result
            args, kwargs = build_arguments(arrays)
            outputs, build_result = _separated(function(*args, **kwargs))
            return outputs

        def gradient(primals: Any, cotangents: Any, _outputs: Any) -> list[mx.array]:
            primals = [primals] if isinstance(primals, mx.array) else list(primals)
            return mx.vjp(flat, mx.depends(primals, list(cotangents)), list(cotangents))[1]

        outputs = replacement(flat, gradient, arrays)
        assert build_result is not None
        return build_result(outputs)

    return call


def _separated(tree: Any) -> tuple[list[mx.array], Callable[[Sequence[mx.array]], Any]]:
    """Return the arrays of a tree of dicts, lists and tuples, and a function that builds it with other arrays."""
    arrays = list[mx.array]()

    def collect(leaf: Any) -> Any:
        if isinstance(leaf, mx.array):
            arrays.append(leaf)
        return leaf

    tree_map(collect, tree)

    def build(others: Sequence[mx.array]) -> Any:
        remaining = iter(others)
        return tree_map(lambda leaf: next(remaining) if isinstance(leaf, mx.array) else leaf, tree)

    return arrays, build
