"""The gated residual and its statistics in plain MLX. Defines what kernels compute, and runs where they do not.

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
from nalora_mlx.ops.device_sizes import device_sizes

MAX_STREAMS = 8

Result = TypeVar("Result")

_local = threading.local()


def gated_product(activation: Activation, z: mx.array, u: mx.array, precise: bool = True) -> mx.array:
    """Return phi(z) * u, [..., F], in the dtype of z.

    Args:
        activation: a row of the activation table.
        z: [..., F], gate pre-activation.
        u: [..., F], up branch.
        precise: whether to compute in float32; otherwise every operation rounds to the dtype of z, as in most
            half-precision models.
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
    """Return the sums over tokens that NA-LoRA needs from one forward.

    Args:
        activation: a row of the activation table.
        statistic: "derivative" for |phi'(z)|, "sensitivity" for |phi'(z) u|.
        boundaries: the R - 1 boundaries of the partition; empty without one.
        z0: [N, F], gate pre-activation without the low-rank update; None if misalignment is not measured.
        z: [N, F], gate pre-activation with the update.
        u: [N, F], up branch.
        weights: [N], 1 for tokens and 0 for padding.
        experts: [N], the expert of each row; None for a dense MLP.
        num_experts: E.

    Returns:
        Float32 arrays without gradient: the responsiveness, then the count above each boundary, [F] or [E, F] each;
        with z0 also the sums of |delta rho(z0) u| and |z (rho(z) - rho(z0)) u| with delta = z - z0, scalars.
    """
    w = weights.reshape(-1, 1).astype(mx.float32)  # [N, 1]

    def sum_over_tokens(array: mx.array) -> mx.array:
        # `where` instead of a product, because padding may hold anything, NaN included.
        kept = mx.where(w > 0, array * w, 0)  # [N, F]
        if experts is None:
            return kept.sum(axis=0)  # [F]
        return mx.zeros((num_experts, kept.shape[-1])).at[experts.reshape(-1)].add(kept)  # [E, F]

    # The derivative at the same z that phi gets, not at a cast copy, so that mx.compile shares phi's exponential.
    response = mx.abs(activation.derivative(z))
    u = activation.linear_branch(u)
    if statistic == "sensitivity":
        response = response * mx.abs(u)
    sums = [sum_over_tokens(response)]
    z = z.astype(mx.float32)
    sums += [sum_over_tokens(activation.above_boundary(z, b).astype(mx.float32)) for b in boundaries]
    if z0 is not None and activation.selection is not None:
        z0 = z0.astype(mx.float32)
        frozen = activation.selection(z0)
        for change in ((z - z0) * frozen, z * (activation.selection(z) - frozen)):
            # Over rows first: the error of one float32 sum grows with the number of its terms.
            sums.append(mx.where(w > 0, mx.abs(change * u) * w, 0).sum(axis=0).sum())
    return sums


def map_row_chunks(function: Callable[[slice], Result], rows: int, features: int) -> list[Result]:
    """Call a function on chunks of rows, so that its temporaries stay small, and return its results in order.

    A chunk is small compared with the whole array, but large enough for few chunks: each is compiled separately and
    takes about 0.2 MB of a graph. They take turns over several streams, because one stream of a CPU runs elementwise
    operations on one core only. On a GPU, there is one chunk of all rows.

    Args:
        function: takes a slice of rows.
        rows: number of rows.
        features: elements per row.
    """
    chunk_bytes = device_sizes().chunk_bytes
    size = rows if chunk_bytes is None else max(1, chunk_bytes // (4 * features))
    if size >= rows:
        return [function(slice(0, rows))]
    if not hasattr(_local, "streams"):  # a stream belongs to the thread that created it
        _local.streams = [mx.new_stream(mx.cpu) for _ in range(min(MAX_STREAMS, os.cpu_count() or 1))]
    results: list[Result] = []
    start = 0
    while start < rows:
        index = len(results) % len(_local.streams)
        # Chunks of different streams have different sizes. mx.compile merges constants of the same value and shape into
        # one array, on one stream. Other streams could not fuse it into their loops, which would not be vectorized.
        stop = min(start + size + index, rows)
        with mx.stream(_local.streams[index]):
            results.append(function(slice(start, stop)))
        start = stop
    return results


def concatenate_chunks(chunks: Sequence[mx.array]) -> mx.array:
    """Return chunks of rows as one array."""
    return chunks[0] if len(chunks) == 1 else mx.concatenate(list(chunks))


def gradients(
    function: Callable[..., mx.array], arrays: tuple[mx.array, ...], dh: mx.array
) -> tuple[mx.array, ...]:
    """Return the gradients of a function's arguments from the gradient of its result."""
    return tuple(mx.vjp(function, list(arrays), [dh])[1])
