"""The gated residual and its statistics in pure MLX: the definition, on every device.

z = g0 + s a_g B_g        gate pre-activation     [..., F]
u = u0 + s a_u B_u        up branch               [..., F]
h = phi(z) * u            gated product           [..., F]
"""

import mlx.core as mx

from nalora_mlx.activations import Activation


def low_rank(base: mx.array, a: mx.array, b: mx.array, scale: float) -> mx.array:
    """base + scale * (a @ b), in the dtype of base.

    Args:
        base: [..., F], the frozen projection.
        a: [..., r], the input seen through lora_a.
        b: [r, F], lora_b; cast to the dtype of a.
        scale: factor of the update.
    """
    return base + (scale * (a @ b.astype(a.dtype))).astype(base.dtype)


@mx.custom_function
def routed_product(a: mx.array, a_route: mx.array, b: mx.array, mask: mx.array) -> mx.array:
    """a @ b, whose gradient reaches `a` whole and `a_route` through the mask.

    `a` and `a_route` hold the same values [..., r]: the first leads back to x, the second to lora_a alone. With
    dP the cotangent of the product, da = dP b^T, da_route = (dP * mask) b^T, db = a^T dP.
    """
    return a @ b


@routed_product.vjp
def _routed_product_vjp(primals, cotangent, _):
    a, _a_route, b, mask = primals
    routed = cotangent * mask.astype(cotangent.dtype)
    db = a.reshape(-1, a.shape[-1]).T @ cotangent.reshape(-1, cotangent.shape[-1])
    return cotangent @ b.T, routed @ b.T, db, mx.zeros_like(mask)


def gated_product(activation: Activation, z: mx.array, u: mx.array) -> mx.array:
    """phi(z) * u in float32, returned in the dtype of z; [..., F]."""
    return (activation.phi(z) * u.astype(mx.float32)).astype(z.dtype)


def statistics(
    activation: Activation,
    statistic: str,
    boundaries: tuple[float, ...],
    z0: mx.array,
    z: mx.array,
    u: mx.array,
    weights: mx.array,
) -> dict[str, mx.array]:
    """Sums over tokens that NA-LoRA needs of one forward; float32, no gradient.

    Args:
        activation: the row of the table.
        statistic: "derivative" for |phi'(z)|, "sensitivity" for |phi'(z) u|.
        boundaries: of the partition, R - 1 values; empty without one.
        z0: [..., F], gate pre-activation without the low-rank update.
        z: [..., F], with it.
        u: [..., F], up branch.
        weights: [...], 1 for a real token and 0 for padding.

    Returns:
        responsiveness [F], beyond [R-1, F] (with a partition), misalignment [2] (if self-gated):
        sums of |delta rho(z0) u| and |z (rho(z) - rho(z0)) u| with delta = z - z0.
    """
    features = z.shape[-1]
    w = weights.reshape(-1, 1).astype(mx.float32)  # [N, 1]

    def rows(array: mx.array) -> mx.array:
        return mx.stop_gradient(array).reshape(-1, features).astype(mx.float32)  # [N, F]

    def total(array: mx.array) -> mx.array:
        # where, not a product: what stands at a padded position may be anything, NaN included
        return mx.where(w > 0, array * w, 0).sum(axis=0)  # [F]

    z, z0, u = rows(z), rows(z0), rows(u)
    response = mx.abs(activation.derivative(z))
    if statistic == "sensitivity":
        response = response * mx.abs(u)
    sums = {"responsiveness": total(response)}
    if boundaries:
        sums["beyond"] = mx.stack([total(activation.beyond(z, b).astype(mx.float32)) for b in boundaries])
    if activation.selection is not None:
        frozen = activation.selection(z0)
        feature = mx.abs((z - z0) * frozen * u)
        selection = mx.abs(z * (activation.selection(z) - frozen) * u)
        sums["misalignment"] = mx.stack([total(feature).sum(), total(selection).sum()])
    return sums
