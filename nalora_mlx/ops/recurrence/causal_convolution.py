"""Depthwise causal convolution that does not cross the boundaries of packed rows."""

from functools import reduce

import mlx.core as mx

from nalora_mlx.ops.custom_function import custom_function


def causal_convolution(
    x: mx.array, weight: mx.array, bias: mx.array | None = None, segment_ids: mx.array | None = None
) -> mx.array:
    """Return the convolution of each channel over a token and the K - 1 tokens before it.

        y_t = bias + sum_k w_k x_{t+k}    for k = 0 to K - 1; x begins K - 1 tokens earlier than y

    The sum and the gradient of x are K elementwise products in float32. On a CPU, this is faster than mx.conv1d.

    Args:
        x: [B, K - 1 + L, E].
        weight: [E, K, 1], as in a grouped mlx.nn.Conv1d.
        bias: [E].
        segment_ids: [B, L], at least 0. Inputs of other segments and the first K - 1 inputs are taken as 0. None: all
            inputs are used.

    Returns:
        [B, L, E] in the dtype of x.
    """
    taps = weight.shape[1]
    input_ids = output_ids = None
    if segment_ids is not None:
        output_ids = segment_ids.astype(mx.int32)
        input_ids = mx.pad(output_ids, [(0, 0), (taps - 1, 0)], constant_values=-1)

    @custom_function
    def convolve(x: mx.array, weight: mx.array) -> mx.array:
        return _sum_of_products(x, weight, input_ids, output_ids)

    @convolve.vjp
    def _(primals, dy, _y):
        x, weight = primals
        ends = (taps - 1, taps - 1)
        padded = mx.pad(dy, [(0, 0), ends, (0, 0)])
        padded_ids = None if output_ids is None else mx.pad(output_ids, [(0, 0), ends])
        dx = _sum_of_products(padded, weight[:, ::-1], padded_ids, input_ids)
        dw = [mx.sum(part * dy, axis=(0, 1)) for part in _parts(x, taps, input_ids, output_ids)]
        return dx, mx.stack(dw, axis=1)[..., None].astype(weight.dtype)

    y = convolve(x, weight)
    return y if bias is None else y + bias


def _sum_of_products(
    x: mx.array, weight: mx.array, input_ids: mx.array | None, output_ids: mx.array | None
) -> mx.array:
    """Return sum_k w_k x_{t+k}: [B, K - 1 + L, E] -> [B, L, E]."""
    parts = _parts(x, weight.shape[1], input_ids, output_ids)
    products = [part * weight[:, k, 0].astype(mx.float32) for k, part in enumerate(parts)]
    return reduce(mx.add, products).astype(x.dtype)


def _parts(x: mx.array, taps: int, input_ids: mx.array | None, output_ids: mx.array | None) -> list[mx.array]:
    """Return x_{t+k} for each k, in float32, and 0 where the segments differ: K arrays [B, L, E]."""
    length = x.shape[1] - taps + 1
    parts = [x[:, k : k + length].astype(mx.float32) for k in range(taps)]
    if input_ids is None or output_ids is None:
        return parts
    same = [input_ids[:, k : k + length] == output_ids for k in range(taps)]
    return [mx.where(same[k][..., None], parts[k], 0) for k in range(taps)]
