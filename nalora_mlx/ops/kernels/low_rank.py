"""The low-rank update of one frozen projection, y = base + scale (x A) B, and its gradients."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from nalora_mlx.ops.custom_function import custom_function


class LowRank(NamedTuple):
    """The output of a frozen projection and its low-rank update.

    Shapes: leading dimensions `...` (batch and sequence), rank r, output channels F, experts E. A projection without
    an adapter has `low` and `b` None.

    `routed` and `route` split the gradient of x A: `routed` has the values of `low`. The gradient of `low` reaches x
    only, and that of `routed` reaches A only, masked per channel by `route`. Both are None if it is not split.
    """

    base: mx.array  # [..., F], output of the frozen projection
    scale: float = 0.0  # of the update
    low: mx.array | None = None  # [..., r], x A
    b: mx.array | None = None  # [r, F], or [E, F, r] with experts
    routed: mx.array | None = None  # [..., r]
    route: mx.array | None = None  # [F], or [E, F] with experts; mask on the gradient of routed
    experts: mx.array | None = None  # [...], the expert of each row; None for a dense projection
    is_sorted: bool = False  # whether rows are sorted by expert

    @property
    def lora_arrays(self) -> tuple[mx.array, ...]:
        """The arrays other than `base` that have a gradient: low, b, and routed if the gradient is split."""
        return tuple(a for a in (self.low, self.b, self.routed) if a is not None)

    def product(self, low: mx.array, b: mx.array) -> mx.array:
        """Return low B, without the scale; [..., r] -> [..., F]."""
        if self.experts is None:
            return low @ b
        return mx.gather_mm(low, b.swapaxes(-1, -2), rhs_indices=self.experts, sorted_indices=self.is_sorted)

    def output(self) -> mx.array:
        """Return base + scale low B, [..., F], in the dtype of the base."""
        if self.low is None or self.b is None:
            return self.base
        add = custom_function(self._add)
        add.vjp(lambda arrays, dy, _: (dy, *self.gradients(arrays[1:], dy, self.scale)))
        return add(self.base, *self.lora_arrays)

    def _add(self, base: mx.array, low: mx.array, b: mx.array, _routed: mx.array | None = None) -> mx.array:
        if self.experts is None and low.dtype == base.dtype:
            return mx.addmm(base, low, b, alpha=self.scale)
        return base + (self.scale * self.product(low, b)).astype(base.dtype)

    def gradients(self, arrays: tuple[mx.array, ...], dy: mx.array, scale: float) -> tuple[mx.array, ...]:
        """Return the gradients of `arrays`, each in its array's dtype.

        With dlow = scale dy B^T, dB = scale low^T dy, and drouted = scale (route * dy) B^T. The scale is applied to
        these small results, because a scaled dy would be one more array of [N, F].

        Args:
            arrays: values of `lora_arrays`.
            dy: [..., F], the gradient of scale low B.
            scale: of the update.
        """
        low, b = arrays[:2]
        dy = dy.astype(low.dtype)
        # The product is linear, so this vjp evaluates no forward.
        dlow, db = mx.vjp(self.product, [low, b], [dy])[1]
        found = [*mx.depends([dlow], [db]), db]  # as in `project`
        if self.routed is not None and self.route is not None:
            # Masking B's columns gives the same result as masking dy, and B is smaller.
            mask = self.route if self.experts is None else self.route[:, :, None]
            masked_b = b * mask.astype(b.dtype)
            found += mx.vjp(lambda low: self.product(low, masked_b), [low], [dy])[1]
        return tuple(found) if scale == 1 else tuple(scale * gradient for gradient in found)


def project(linear: Callable[[mx.array], mx.array], x: mx.array, a: mx.array) -> tuple[mx.array, mx.array]:
    """Return linear(x) and x A, with a backward that adds both gradients of x within one matrix product.

        dx = (gradient through the frozen projection) + d(x A) A^T,    dA = x^T d(x A)

    Args:
        linear: the frozen projection, dense or quantized.
        x: [..., D].
        a: [D, r], in the dtype of x.

    Returns:
        linear(x) [..., F] and x A [..., r].
    """
    function = custom_function(lambda x, a: (linear(x), x @ a))

    @function.vjp
    def _(primals, cotangents, _):
        x, a = primals
        dy, dlow = cotangents
        dx = mx.vjp(linear, [x], [dy])[1][0]
        rows = dlow.reshape(-1, a.shape[-1])
        da = x.reshape(-1, x.shape[-1]).T @ rows
        # Compute da before the backward goes on. It is needed only at the end, and x would be kept until then.
        (rows,) = mx.depends([rows], [da])
        dx = mx.addmm(dx.reshape(-1, x.shape[-1]), rows, a.T)
        return dx.reshape(x.shape), da

    return function(x, a)
