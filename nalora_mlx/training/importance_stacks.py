"""The importance state of all gated MLPs, in stacks of equal ones, so that one operation updates a whole stack."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from nalora_mlx.adapters.gated_mlps import GatedMLP
from nalora_mlx.training import importance
from nalora_mlx.training.importance import LayerState, LayerStatistics
from nalora_mlx.training.stacks import Stacks


class ImportanceStacks:
    """A partition of gated MLPs into stacks of n equal ones.

    A stack's LayerState and LayerStatistics have the fields of a single layer with one more axis, of size n. It is the
    first axis, except in `above_boundary`, where it is the second. The functions of `importance` take both forms.

    Args:
        gated: the gated MLPs by path.

    Attributes:
        members: first path of a stack, which is its name -> all its paths.
        roles: name of a parameter whose steps are scaled -> its stack, and its name within the MLP.
    """

    def __init__(self, gated: Mapping[str, GatedMLP]):
        self.gated = gated
        scaled = {path: self._scaled_parameters(path) for path in gated}
        keys = {path: (mlp.shape, mlp.activation, tuple(scaled[path])) for path, mlp in gated.items()}
        self.members = Stacks(keys).members
        self.roles: dict[str, Hashable] = {
            f"{path}.{name}": (stack, name)
            for stack, paths in self.members.items()
            for path in paths
            for name in scaled[path]
        }

    def _scaled_parameters(self, path: str) -> list[str]:
        factors = self.gated[path].step_factors(mx.ones(self.gated[path].shape))
        return [name.removeprefix(f"{path}.") for name in factors]

    def init(self) -> dict[str, LayerState]:
        """Return the states before the first update."""
        states = {}
        for stack, paths in self.members.items():
            mlp, n = self.gated[stack], len(paths)
            state = importance.init((n, *mlp.shape), len(mlp.activation.regions))
            measured = mlp.activation.selection is not None
            states[stack] = state._replace(misalignment=mx.zeros((n, 2)) if measured else None)
        return states

    def stack(self, layers: Mapping[str, LayerState]) -> dict[str, LayerState]:
        """Return the states of stacks, given those of layers."""
        return {
            stack: LayerState(*_stacked([layers[path] for path in paths]))
            for stack, paths in self.members.items()
        }

    def unstack(self, stacks: Mapping[str, LayerState]) -> dict[str, LayerState]:
        """Return the states of layers by path, given those of stacks."""
        return {
            path: LayerState(*(_layer(field, array, i) for field, array in stacks[stack]._asdict().items()))
            for stack, paths in self.members.items()
            for i, path in enumerate(paths)
        }

    def stack_statistics(
        self, stack: str, layers: Mapping[str, LayerStatistics], tokens: mx.array
    ) -> LayerStatistics | None:
        """Return the statistics of a stack, or None if no layer of it has any.

        Args:
            stack: its name.
            layers: statistics of layers by path. A layer that is missing got no token.
            tokens: the number of tokens, for layers that see all of them.
        """
        found = [layers.get(path) for path in self.members[stack]]
        if all(one is not None and one.tokens is None for one in found):
            return LayerStatistics(*_stacked([one for one in found if one]))._replace(tokens=tokens)
        like = next((one for one in found if one is not None), None)
        if like is None:
            return None
        like = like._replace(tokens=tokens if like.tokens is None else like.tokens)
        fields: Any = (None if array is None else mx.zeros_like(array) for array in like)
        nothing = LayerStatistics(*fields)
        complete = [
            nothing if one is None else one._replace(tokens=tokens if one.tokens is None else one.tokens)
            for one in found
        ]
        return LayerStatistics(*_stacked(complete))

    def step_factors(self, stack: str, multipliers: mx.array, weights: Stacks) -> dict[str, mx.array]:
        """Return the factors on the optimizer steps of a stack's parameters, by name of the stack of parameters.

        Args:
            stack: name of the stack of layers.
            multipliers: [n, ..., F].
            weights: the stacks of the parameters.
        """
        paths, factors = self.members[stack], {}
        for name, factor in self.gated[stack].step_factors(multipliers).items():
            parameter = name.removeprefix(f"{stack}.")
            layer = {f"{path}.{parameter}": i for i, path in enumerate(paths)}
            for first, names in weights.members.items():
                if first not in layer:
                    continue
                chosen = [layer[one] for one in names]
                if len(chosen) == 1:
                    factors[first] = factor[chosen[0]]
                else:
                    factors[first] = factor if len(chosen) == len(paths) else factor[mx.array(chosen)]
        return factors


def _axis(field: str) -> int:
    return 1 if field == "above_boundary" else 0


def _stacked(layers: Sequence[LayerState] | Sequence[LayerStatistics]) -> list[Any]:
    """Return the fields of several layers, stacked."""
    return [
        None if array is None else mx.stack([getattr(one, field) for one in layers], axis=_axis(field))
        for field, array in layers[0]._asdict().items()
    ]


def _layer(field: str, array: mx.array | None, i: int) -> Any:
    """Return a field of one layer of a stack."""
    return None if array is None else array[:, i] if _axis(field) else array[i]
