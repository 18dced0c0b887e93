"""The gated residual and its statistics in pure MLX: the definition, on every device.

z = g0 + s a_g B_g        gate pre-activation     [..., F]
u = u0 + s a_u B_u        up branch               [..., F]
h = phi(z) * u            gated product           [..., F]
"""

import mlx.core as mx

from nalora_mlx.activations import Activation


def gated_product(activation: Activation, z: mx.array, u: mx.array, precise: bool = True) -> mx.array:
    """phi(z) * u, returned in the dtype of z; [..., F].

    Args:
        activation: the row of the table.
        z: [..., F].
        u: [..., F].
        precise: compute in float32; False rounds after every operation, as a model in a half type mostly does.
    """
    if not precise:
        return (activation.native_phi(z) * (u if activation.up is None else activation.up(u))).astype(z.dtype)
    return (activation.phi(z) * activation.linear_branch(u)).astype(z.dtype)


def statistics(
    activation: Activation,
    statistic: str,
    boundaries: tuple[float, ...],
    z0: mx.array,
    z: mx.array,
    u: mx.array,
    weights: mx.array,
    diagnose: bool,
    experts: mx.array | None = None,
    num_experts: int = 0,
) -> dict[str, mx.array]:
    """Sums over tokens that NA-LoRA needs of one forward; float32, no gradient.

    Args:
        activation: the row of the table.
        statistic: "derivative" for |phi'(z)|, "sensitivity" for |phi'(z) u|.
        boundaries: of the partition, R - 1 values; empty without one.
        z0: [..., F], gate pre-activation without the low-rank update.
        z: [..., F], with it.
        u: [..., F], up branch.
        weights: one per row, 1 for a real token and 0 for padding.
        diagnose: whether to measure the misalignment too.
        experts: which expert each row went to; None for a dense MLP.
        num_experts: how many there are, E.

    Returns:
        responsiveness [F] or [E, F]; beyond [R-1, F] or [R-1, E, F] (with a partition); misalignment [2] (if asked
        and self-gated): sums of |delta rho(z0) u| and |z (rho(z) - rho(z0)) u| with delta = z - z0; tokens [E] (with
        experts).
    """
    features = z.shape[-1]
    w = weights.reshape(-1, 1).astype(mx.float32)  # [N, 1]

    def rows(array: mx.array) -> mx.array:
        return array.reshape(-1, features).astype(mx.float32)  # [N, F]

    def total(array: mx.array) -> mx.array:
        # where, not a product: what stands at a padded position may be anything, NaN included
        kept = mx.where(w > 0, array * w, 0)  # [N, F]
        if experts is None:
            return kept.sum(axis=0)  # [F]
        return mx.zeros((num_experts, kept.shape[-1])).at[experts.reshape(-1)].add(kept)  # [E, F]

    # The derivative before the gradient is stopped: mx.compile then shares its exponential with that of phi(z).
    response = mx.abs(mx.stop_gradient(rows(activation.derivative(z))))
    z, z0, u = (mx.stop_gradient(rows(array)) for array in (z, z0, activation.linear_branch(u)))
    if statistic == "sensitivity":
        response = response * mx.abs(u)
    sums = {"responsiveness": total(response)}
    if experts is not None:
        sums["tokens"] = total(mx.ones_like(w))[:, 0]
    if boundaries:
        sums["beyond"] = mx.stack([total(activation.beyond(z, b).astype(mx.float32)) for b in boundaries])
    if diagnose and activation.selection is not None:
        frozen = activation.selection(z0)
        feature = mx.where(w > 0, mx.abs((z - z0) * frozen * u) * w, 0)
        selection = mx.where(w > 0, mx.abs(z * (activation.selection(z) - frozen) * u) * w, 0)
        sums["misalignment"] = mx.stack([feature.sum(), selection.sum()])
    return sums
