"""The gated residual and its statistics in pure MLX: the definition, and what runs where no kernel does.

z = g0 + s a_g B_g        gate pre-activation     [..., F]
u = u0 + s a_u B_u        up branch               [..., F]
h = phi(z) * u            gated product           [..., F]
"""

import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import mlx.core as mx

from nalora_mlx.ops.activations import Activation

# Of float32 in one array of a chunk: small beside a whole array, large enough for few of them: each is compiled, and
# takes some 0.2 MB of a graph.
CHUNK_BYTES = 2 << 20
MAX_STREAMS = 8

Work = TypeVar("Work")

_local = threading.local()


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
    z0: mx.array | None,
    z: mx.array,
    u: mx.array,
    weights: mx.array,
    experts: mx.array | None = None,
    num_experts: int = 0,
) -> list[mx.array]:
    """Sums over tokens that NA-LoRA needs of one forward; float32, no gradient.

    Args:
        activation: the row of the table.
        statistic: "derivative" for |phi'(z)|, "sensitivity" for |phi'(z) u|.
        boundaries: of the partition, R - 1 values; empty without one.
        z0: [N, F], gate pre-activation without the low-rank update; None if misalignment is not to be measured.
        z: [N, F], with it.
        u: [N, F], up branch.
        weights: [N], 1 for a real token and 0 for padding.
        experts: [N], which expert each row went to; None for a dense MLP.
        num_experts: how many there are, E.

    Returns:
        The responsiveness, then the count above each boundary, [F] or [E, F] each; then with z0 the sums of
        |delta rho(z0) u| and |z (rho(z) - rho(z0)) u| with delta = z - z0, scalars.
    """
    w = weights.reshape(-1, 1).astype(mx.float32)  # [N, 1]

    def total(array: mx.array) -> mx.array:
        # where, not a product: what stands at a padded position may be anything, NaN included
        kept = mx.where(w > 0, array * w, 0)  # [N, F]
        if experts is None:
            return kept.sum(axis=0)  # [F]
        return mx.zeros((num_experts, kept.shape[-1])).at[experts.reshape(-1)].add(kept)  # [E, F]

    # The derivative of the z that phi gets, not of a cast copy: mx.compile then shares its exponential with phi's.
    response = mx.abs(activation.derivative(z))
    u = activation.linear_branch(u)
    if statistic == "sensitivity":
        response = response * mx.abs(u)
    sums = [total(response)]
    z = z.astype(mx.float32)
    sums += [total(activation.above_boundary(z, b).astype(mx.float32)) for b in boundaries]
    if z0 is not None and activation.selection is not None:
        z0 = z0.astype(mx.float32)
        frozen = activation.selection(z0)
        for change in ((z - z0) * frozen, z * (activation.selection(z) - frozen)):
            sums.append(mx.where(w > 0, mx.abs(change * u) * w, 0).sum())
    return sums


def by_chunks(work: Callable[[slice], Work], rows: int, features: int) -> list[Work]:
    """Do work on some rows at a time, so that its temporaries stay small; on a GPU, where kernels fuse them, on all.

    The chunks are spread over streams of the CPU, since one stream runs elementwise operations on one core only.
    """
    size = max(1, CHUNK_BYTES // (4 * features))
    if size >= rows or mx.default_device() != mx.Device(mx.cpu):
        return [work(slice(0, rows))]
    if not hasattr(_local, "streams"):  # a stream belongs to the thread that made it
        _local.streams = [mx.new_stream(mx.cpu) for _ in range(min(MAX_STREAMS, os.cpu_count() or 1))]
    done: list[Work] = []
    start = 0
    while start < rows:
        index = len(done) % len(_local.streams)
        # Each stream has a size of its own. Constants of one value and shape mx.compile makes one array of one stream,
        # which it cannot fuse into what the others do; their loops would then not be vectorized.
        stop = min(start + size + index, rows)
        with mx.stream(_local.streams[index]):
            done.append(work(slice(start, stop)))
        start = stop
    return done


def joined(parts: Sequence[mx.array]) -> mx.array:
    """Chunks of rows as one array."""
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts))


def gradients(
    product: Callable[..., mx.array], arrays: tuple[mx.array, ...], dh: mx.array
) -> tuple[mx.array, ...]:
    """Gradients of a product of arrays from that of its result."""
    return tuple(mx.vjp(product, list(arrays), [dh])[1])
