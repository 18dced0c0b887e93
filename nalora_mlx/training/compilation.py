"""Compiled functions whose state survives an exception."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx


def compile_with_state(function: Callable[..., Any], inputs: Any, outputs: Any = None) -> Callable[..., Any]:
    """Compile a function that reads the arrays of `inputs` and changes those of `outputs`, as `mx.compile` does.

    While `mx.compile` traces a function, it puts placeholders into these trees and into MLX's random state. If the
    function raises, for example KeyboardInterrupt in a notebook, it leaves them there, and neither the model nor
    `mx.random` can be used any more. This function puts the arrays back.

    Args:
        function: the function.
        inputs: tree of arrays. Its dicts and lists must stay the same objects, except for `mx.random.state`.
        outputs: the part of `inputs` that the function changes.
    """
    compiled = partial(mx.compile, inputs=inputs, outputs=outputs)(function)
    containers: list[Any] = []

    def call(*arguments: Any) -> Any:
        if not containers:
            containers.extend(_containers(inputs))
        state: Any = mx.random.state
        key, contents = state[0], [container.copy() for container in containers]
        try:
            return compiled(*arguments)
        except BaseException:
            for container, content in zip(containers, contents, strict=True):
                if isinstance(container, dict):
                    dict.update(container, content)
                else:
                    container[:] = content
            high, low = key.tolist()
            mx.random.seed(high << 32 | low)
            raise

    return call


def _containers(tree: Any) -> Iterator[Any]:
    """Yield all dicts and lists of a tree, modules among them."""
    if isinstance(tree, dict | list):
        yield tree
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _containers(child)
