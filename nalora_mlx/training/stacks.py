"""Stacks of equal arrays, so that one operation updates a parameter of all layers.

The adapters of a model are hundreds of small arrays, and an optimizer takes several operations for each. On a GPU, that
is thousands of launches per update. Therefore, arrays of one shape and dtype are kept as one array, [n, ...], and the
model has views of it. Elementwise optimizers compute the same bits on a stack.
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from nalora_mlx.adapters.forward_pass import Cast
from nalora_mlx.ops.custom_function import custom_function

MAX_BYTES = 4 << 20  # of an array; for larger ones, the cost of a launch does not matter
MAX_STACK_BYTES = 16 << 20  # an update has old and new versions of several stacks in memory
# Optimizers that compute each entry of a parameter from the same entries of its gradient and state.
ELEMENTWISE = (
    *(optim.SGD, optim.RMSprop, optim.Adagrad, optim.AdaDelta),
    *(optim.Adam, optim.AdamW, optim.Adamax, optim.Lion),
)


class Stacks:
    """A partition of named arrays into stacks. A stack has the name of its first member.

    Args:
        keys: name -> key. Arrays with equal keys are stacked. Those with the key None stay alone, in their own shape.
    """

    def __init__(self, keys: Mapping[str, Hashable | None]):
        groups: dict[Hashable, list[str]] = {}
        for name, key in keys.items():
            groups.setdefault((name, None) if key is None else (None, key), []).append(name)
        self.members = {names[0]: tuple(names) for names in groups.values()}

    def stack(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the stacks of arrays by name of the stack: [n, ...], or the array itself if it is alone."""
        return {
            stack: arrays[stack] if len(names) == 1 else _stacked([arrays[name] for name in names])
            for stack, names in self.members.items()
        }

    def unstack(self, stacks: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the arrays of stacks, as views."""
        arrays: dict[str, mx.array] = {}
        for stack, names in self.members.items():
            parts = [stacks[stack]] if len(names) == 1 else _unstacked(stacks[stack])
            arrays |= dict(zip(names, parts, strict=True))
        return arrays

    def stack_state(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state for stacks, given its state for the arrays one by one.

        A stack is left out if its arrays have no state, or states of other shapes.
        """
        state = {name: value for name, value in tree.items() if name not in self._names}
        for stack, names in self.members.items():
            if len(names) == 1:
                state |= {stack: tree[stack]} if stack in tree else {}
                continue
            found = [tree.get(name, {}) for name in names]
            shapes = [{key: array.shape for key, array in one.items()} for one in found]
            if shapes[0] and all(one == shapes[0] for one in shapes):
                state[stack] = {key: _stacked([one[key] for one in found]) for key in found[0]}
        return state

    def unstack_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state for the arrays one by one, given its state for stacks."""
        tree = {name: value for name, value in state.items() if name not in self.members}
        for stack, names in self.members.items():
            if stack not in state:
                continue
            if len(names) == 1:
                tree[stack] = state[stack]
            else:
                for i, name in enumerate(names):
                    tree[name] = {key: array[i] for key, array in state[stack].items()}
        return tree

    @property
    def _names(self) -> set[str]:
        return {name for names in self.members.values() for name in names}


class StackedParameters:
    """The trainable parameters of a model, in stacks that an optimizer updates. The model has views of them.

    Args:
        model: the model.
        optimizer: parameters are stacked only for an elementwise one.
        casts: name of a parameter -> how the model's adapters use it. Whole stacks are scaled and cast instead.
        roles: name of a parameter -> what the parameters of its stack must have in common, besides shape and dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        casts: Mapping[str, Cast],
        roles: Mapping[str, Hashable],
    ):
        arrays = dict(tree_flatten(model.trainable_parameters()))
        keys: dict[str, Hashable | None] = {}
        counts: Counter[Hashable] = Counter()
        for name, array in arrays.items():
            stackable = type(optimizer) in ELEMENTWISE and array.nbytes <= MAX_BYTES
            kind = (array.shape, array.dtype, casts.get(name), roles.get(name))
            keys[name] = (
                (kind, counts[kind] // max(1, MAX_STACK_BYTES // array.nbytes)) if stackable else None
            )
            counts[kind] += 1
        self.stacks = Stacks(keys)
        self.casts = {stack: casts[stack] for stack in self.stacks.members if stack in casts}
        self.places = {name: _find(model, name) for name in arrays}
        self.scaled = frozenset(
            id(self.places[name][0]) for name in casts if name in arrays and name.endswith(".lora_b")
        )
        self.arrays = self.stacks.stack(arrays)
        self.installed: dict[str, mx.array] = {}
        self.install(self.stacks.unstack(self.arrays))
        self.record()

    def init_optimizer(self, optimizer: optim.Optimizer) -> None:
        """Initialize an optimizer's state for the stacks. State that it has for the parameters is kept.

        The state may be that of an earlier run, or a tree like the model's, as mlx optimizers make it.
        """
        if isinstance(optimizer, optim.MultiOptimizer):  # it selects parameters in a tree like the model's
            optimizer.init(tree_unflatten(list(self.arrays.items())))
            return
        state = optimizer.state
        if (earlier := getattr(optimizer, "_stacks", None)) is not None:
            state = earlier.unstack_state(state)
        single: dict[str, Any] = {key: value for key, value in state.items() if isinstance(value, mx.array)}
        for path, array in tree_flatten(state):
            name, _, key = path.rpartition(".")
            if name in self.places:
                single.setdefault(name, {})[key] = array
        found = self.stacks.stack_state(single)
        like = {
            stack: array.shape for stack, array in self.arrays.items() if len(self.stacks.members[stack]) > 1
        }
        for stack, shape in like.items():
            if any(array.shape != shape for array in found.get(stack, {}).values()):
                del found[stack]
        optimizer.state = found
        optimizer.init(self.arrays)
        optimizer._stacks = self.stacks

    def current(self) -> dict[str, mx.array]:
        """Return the model's arrays by name."""
        return {name: module[key] for name, (module, key) in self.places.items()}

    def install(self, arrays: Mapping[str, mx.array]) -> None:
        """Put arrays into the model."""
        for name, array in arrays.items():
            module, key = self.places[name]
            module[key] = array

    def install_cast(self, stacks: Mapping[str, mx.array]) -> None:
        """Put the parts of stacks into the model, scaled and cast as its adapters use them."""
        used = dict(stacks)
        for name, cast in self.casts.items():
            used[name] = (stacks[name] * cast.scale).astype(cast.dtype)
        self.install(self.stacks.unstack(used))

    def record(self) -> None:
        """Remember the model's arrays, which are views of the stacks."""
        self.installed = self.current()

    def adopt(self) -> None:
        """Stack the model's arrays again if any of them was replaced since `record`, as loading weights does."""
        current = self.current()
        if any(current[name] is not array for name, array in self.installed.items()):
            for name, array in self.stacks.stack(current).items():
                self.arrays[name] = array
            self.installed = current


def _stacked(arrays: Sequence[mx.array]) -> mx.array:
    """Return arrays as a stack [n, ...], by fewer operations than `mx.stack`."""
    first = arrays[0]
    if not first.ndim:
        return mx.stack(list(arrays))
    return mx.concatenate(list(arrays)).reshape(len(arrays), *first.shape)


def _unstacked(stack: mx.array) -> list[mx.array]:
    """Return the arrays of a stack [n, ...], with a gradient that is a stack too.

    For slices, MLX would compute n gradients of the size of the whole stack, and add them.
    """
    count, *shape = stack.shape
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]

    def views(stack: mx.array) -> list[mx.array]:
        flat = stack.reshape(-1)
        return [mx.as_strided(flat, shape, strides, i * math.prod(shape)) for i in range(count)]

    function = custom_function(views)
    function.vjp(lambda _stack, gradients, _arrays: _stacked(gradients))
    return list(function(stack))


def _find(model: nn.Module, name: str) -> tuple[Any, Any]:
    """Return the module or list that holds a parameter, and its key there."""
    *parents, last = name.split(".")
    holder: Any = model
    for part in parents:
        holder = holder[int(part)] if isinstance(holder, list) else holder[part]
    return (holder, int(last)) if isinstance(holder, list) else (holder, last)
