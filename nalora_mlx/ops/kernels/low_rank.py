"""The update of one frozen projection, y = base + scale (x A) B, and its gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class LowRank:
    """A frozen projection's output and the low-rank update that it gets.

    Attributes:
        base: output of the frozen projection, [..., F].
        scale: factor of the update.
        low: x A, [..., r]; None for a projection without an adapter.
        b: B, [r, F], or [E, F, r] with experts.
        routed: the same values as `low`, through which the gradient reaches A alone, masked by `route`; that of
            `low` then reaches x alone. None if the gradient is not to be split.
        route: mask on the channels of that gradient, [F] or [E, F].
        experts: the expert of each row; None for a dense projection.
        is_sorted: whether the rows are sorted by expert.
    """

    base: mx.array
    scale: float = 0.0
    low: mx.array | None = None
    b: mx.array | None = None
    routed: mx.array | None = None
    route: mx.array | None = None
    experts: mx.array | None = None
    is_sorted: bool = False

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """What a gradient reaches beside the base: low, b, and routed where the gradient is split."""
        return tuple(a for a in (self.low, self.b, self.routed) if a is not None)

    def product(self, low: mx.array, b: mx.array) -> mx.array:
        """Low B; [..., r] -> [..., F]."""
        if self.experts is None:
            return low @ b
        return mx.gather_mm(low, b.swapaxes(-1, -2), rhs_indices=self.experts, sorted_indices=self.is_sorted)

    def output(self) -> mx.array:
        """Base + scale low B, in the dtype of the base."""
        if self.low is None or self.b is None:
            return self.base
        add: Any = mx.custom_function(self._add)
        add.vjp(lambda arrays, dy, _: (dy, *self.gradients(arrays[1:], dy, self.scale)))
        return add(self.base, *self.arrays)

    def _add(self, base: mx.array, low: mx.array, b: mx.array, _: mx.array | None = None) -> mx.array:
        if self.experts is None and low.dtype == base.dtype:
            return mx.addmm(base, low, b, alpha=self.scale)
        return base + (self.scale * self.product(low, b)).astype(base.dtype)

    def gradients(self, arrays: tuple[mx.array, ...], dy: mx.array, scale: float) -> tuple[mx.array, ...]:
        """Gradients of `arrays` from dy, that of scale low B, [..., F]; each in its array's dtype.

        What is scaled is the small results, since a scaled dy would be one more array of [N, F].
        """
        low, b = arrays[:2]
        dy = dy.astype(low.dtype)
        # The product is linear: nothing of it is computed here.
        found = mx.vjp(self.product, [low, b], [dy])[1]
        if self.routed is not None and self.route is not None:
            # The mask of a channel weighs its column of B as well as its gradient.
            mask = self.route if self.experts is None else self.route[:, :, None]
            masked = b * mask.astype(b.dtype)
            found += mx.vjp(lambda low: self.product(low, masked), [low], [dy])[1]
        return tuple(scale * one for one in found)


def project(linear: Callable[[mx.array], mx.array], x: mx.array, a: mx.array) -> tuple[mx.array, mx.array]:
    """A frozen projection of x and x A, whose gradients in x are added up within one product.

        dx = (gradient through the frozen projection) + d(x A) A^T

    Args:
        linear: frozen, dense or quantized.
        x: [..., D].
        a: [D, r], of the dtype of x.

    Returns:
        linear(x) [..., F] and x A [..., r].
    """
    both: Any = mx.custom_function(lambda x, a: (linear(x), x @ a))

    @both.vjp
    def _(primals, cotangents, _):
        x, a = primals
        dy, dlow = cotangents
        dx = mx.vjp(linear, [x], [dy])[1][0]
        rows = dlow.reshape(-1, a.shape[-1])
        dx = mx.addmm(dx.reshape(-1, x.shape[-1]), rows, a.T)
        return dx.reshape(x.shape), x.reshape(-1, x.shape[-1]).T @ rows

    return both(x, a)
