"""Trees of arrays: nested dicts and lists, as models, optimizers and the training state hold them."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map


def named_arrays(tree: Any) -> dict[str, mx.array]:
    """Return the arrays of a tree by dotted path."""
    return {name: leaf for name, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)}


def nbytes(tree: Any) -> int:
    """Return the bytes of all arrays of a tree."""
    return sum(array.nbytes for array in named_arrays(tree).values())


def references(tree: Any) -> Any:
    """Return new containers with the same leaves, so that `assign` can restore the tree later."""
    return tree_map(lambda leaf: leaf, tree)


def assign(tree: Any, new: Any) -> None:
    """Replace the leaves of a tree by those of another tree of the same structure, in place.

    Dicts and lists stay the same objects, since others hold references to them. Tuples are replaced whole.
    """
    for key in new if isinstance(new, dict) else range(len(new)):
        if isinstance(new[key], dict | list):
            assign(tree[key], new[key])
        else:
            tree[key] = new[key]


def fill(tree: Any, arrays: Mapping[str, mx.array], prefix: str = "") -> None:
    """Replace the arrays of nested dicts and lists by those that `named_arrays` listed, in place."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        name = f"{prefix}{key}"
        if isinstance(tree[key], mx.array):
            tree[key] = arrays[name]
        elif isinstance(tree[key], dict | list):
            fill(tree[key], arrays, f"{name}.")
