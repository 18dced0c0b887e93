"""Attention for training that stores two numbers per query, not its scores, for the backward.

While gradients are traced, MLX composes attention of single operations, except where cuDNN computes it. It stores the
scores and probabilities of each layer, [B, H, Lq, Lk], until the backward. The attention here computes them for one
chunk of queries at a time and recomputes them in the backward from their row maximum and row sum, as FlashAttention
does. With a causal mask, or any mask while `causal_masks` is open, a chunk skips the keys after its last query.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import mlx.core as mx

from nalora_mlx.ops.custom_function import custom_function
from nalora_mlx.ops.device_sizes import device_sizes
from nalora_mlx.ops.fast_math import LOG2_E, exp2_nonpositive

MAX_CHUNKS = 16  # per sequence, so that graphs stay small
_MASKED_SCORE = -1e30  # added to the scores of keys that a query must not see; absorbs any score
_FLOAT_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_causal_masks: ContextVar[bool] = ContextVar("causal_masks", default=False)


@contextmanager
def lean_attention() -> Iterator[None]:
    """Make models that call mx.fast.scaled_dot_product_attention use `attention` for all calls that it supports.

    Calls that MLX fuses, forward and backward, are left to MLX. So are calls with few scores on a GPU.
    """
    mlx_attention = mx.fast.scaled_dot_product_attention

    def call(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **others: Any
    ) -> mx.array:
        supported = not any(other is not None for other in others.values()) and _is_supported(q, k, v, mask)
        if not supported or _is_faster_in_mlx(q, k, v, mask):
            return mlx_attention(q, k, v, scale=scale, mask=mask, **others)
        return attention(q, k, v, scale=scale, mask=mask)

    mx.fast.scaled_dot_product_attention = call
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = mlx_attention


@contextmanager
def causal_masks() -> Iterator[None]:
    """Declare that masks given as arrays hide all later keys, so `attention` can skip them as with a causal mask."""
    token = _causal_masks.set(True)
    try:
        yield
    finally:
        _causal_masks.reset(token)


def _is_supported(q: mx.array, k: mx.array, v: mx.array, mask: Any) -> bool:
    """Return whether `attention` takes these arguments; everything else, errors included, is left to MLX."""
    if not all(x.ndim == 4 and x.dtype in _FLOAT_DTYPES for x in (q, k, v)):
        return False
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        return False
    if q.shape[1] % k.shape[1] or 0 in q.shape + k.shape:
        return False
    if not isinstance(mask, mx.array):
        return mask is None or mask == "causal"
    scores_shape = (*q.shape[:3], k.shape[2])
    broadcasts = all(m in (1, n) for m, n in zip(mask.shape[::-1], scores_shape[::-1], strict=False))
    return mask.dtype == mx.bool_ and mask.ndim <= 4 and broadcasts


def _is_faster_in_mlx(q: mx.array, k: mx.array, v: mx.array, mask: Any) -> bool:
    """Return whether MLX's own attention is faster on this device and takes little memory; see `device_sizes`."""
    sizes, scores = device_sizes(), math.prod(q.shape[:3]) * k.shape[2]
    if scores * q.itemsize <= sizes.score_bytes:
        return True
    return sizes.fused_attention and _is_fused_by_cudnn(q, k, v, mask)


def _is_fused_by_cudnn(q: mx.array, k: mx.array, v: mx.array, mask: Any) -> bool:
    """Return whether MLX computes attention and its backward with cuDNN, which stores no scores.

    Source: the conditions in MLX 0.32.4, mlx/backend/cuda/scaled_dot_product_attention.cpp.
    """
    if isinstance(mask, str) and q.shape[2] > k.shape[2]:
        return False
    half = all(x.dtype in (mx.float16, mx.bfloat16) for x in (q, k, v))
    return half and q.shape[2] % 128 == 0 and all(d % 8 == 0 and d <= 128 for d in (q.shape[3], v.shape[3]))


class QueryChunk(NamedTuple):
    """A chunk of queries, start:end. None of them sees a key outside :keys."""

    start: int
    end: int
    keys: int


def _split_queries(queries: int, keys: int, causal: bool) -> list[QueryChunk]:
    """Split queries into chunks of equal size. Each chunk has at least one key, which the mask may still hide."""
    size = math.ceil(queries / min(MAX_CHUNKS, math.ceil(queries / device_sizes().attention_queries)))
    bounds = [(start, min(start + size, queries)) for start in range(0, queries, size)]
    return [QueryChunk(start, end, max(end + keys - queries, 1) if causal else keys) for start, end in bounds]


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None = None
) -> mx.array:
    """Return softmax(scale q k^T + mask) v. The backward stores q, k, v, and two numbers per query.

    Forward, for each chunk of queries:

    1. Compute the scores S = scale q k^T + mask.
    2. Compute their row maximum m and row sum z = sum exp(S - m). Store m and 1 / z.
    3. Compute the output O = P v with the probabilities P = exp(S - m) / z.

    Backward, for each chunk, from the last to the first, given the gradient dO of O:

    1. Recompute S and P from q, k, m and 1 / z.
    2. Compute dv = P^T dO, dP = dO v^T, and dS = P * (dP - sum(P * dP)).
    3. Compute dq = scale dS k and dk = scale dS^T q. Sum dk and dv over chunks.

    FlashAttention stores only m + log z and computes sum(P * dP) as sum(dO * O). In float32, that makes the errors of
    the gradients up to 1.4 times those of MLX's own attention; here they are about the same.

    Scores, probabilities and sums are float32. A query that sees no key gives 0 and has no gradient.

    Args:
        q: [B, H, Lq, D], float32, float16 or bfloat16.
        k: [B, K, Lk, D]; K divides H.
        v: [B, K, Lk, E].
        scale: factor on the scores.
        mask: None; "causal", aligned so that the last query sees all keys; or bool, broadcastable to [B, H, Lq, Lk],
            True where a query sees a key.

    Returns:
        [B, H, Lq, E], in the dtype that q, k and v promote to.

    Source: FlashAttention (arXiv 2205.14135), without its tiles of keys.
    """
    (B, H, Lq, D), (K, Lk, E) = q.shape, v.shape[1:]
    G = H // K  # query heads per key head; they form the rows of one matrix product
    dtype = mx.result_type(mx.result_type(q, k), v)
    causal = mask == "causal" if isinstance(mask, str) else mask is not None and _causal_masks.get()
    chunks = _split_queries(Lq, Lk, causal)

    def chunk_rows(x: mx.array, chunk: QueryChunk) -> mx.array:
        """Return the chunk's rows of x, [B, K, G, Lq, n] -> [B, K, G c, n]."""
        return x[:, :, :, chunk.start : chunk.end].reshape(B, K, -1, x.shape[-1])

    def compute_scores(q: mx.array, k: mx.array, chunk: QueryChunk) -> mx.array:
        """Return masked scores [B, K, G, c, e] of scaled queries [B, K, G c, D] and keys [B, K, e, D]."""
        s = (q @ k.swapaxes(-1, -2)).reshape(B, K, G, -1, chunk.keys)
        bias = _mask_bias(mask, chunk, Lk - Lq, K, after=q)
        return s if bias is None else s + bias

    @custom_function
    def forward(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        """Return the output [B, H, Lq, E], and m and 1 / z of each query [B, K, G, Lq, 1]."""
        q, k, v = (x.astype(mx.float32) for x in (q, k, v))
        q = (q * (scale * LOG2_E)).reshape(B, K, G, Lq, D)  # scores in base 2: exp(s) = 2^(s log2 e)
        outputs, row_maxima, inverse_sums = list[mx.array](), list[mx.array](), list[mx.array]()
        for chunk in chunks:
            q_chunk = chunk_rows(q, chunk)
            if outputs:  # wait for the previous chunk, or MLX would hold the scores of several
                q_chunk = mx.depends([q_chunk], [outputs[-1]])[0]
            s = compute_scores(q_chunk, k[:, :, : chunk.keys], chunk)
            # Above all masked scores, so that a query that sees no key gets probabilities of 0.
            row_max = mx.maximum(mx.max(s, axis=-1, keepdims=True), _MASKED_SCORE / 10)
            p = exp2_nonpositive(s - row_max)
            row_sum = mx.maximum(mx.sum(p, axis=-1, keepdims=True), 1e-30)
            o = (p.reshape(B, K, -1, chunk.keys) @ v[:, :, : chunk.keys]).reshape(B, K, G, -1, E)
            outputs.append((o / row_sum).astype(dtype))
            row_maxima.append(row_max)
            inverse_sums.append(1 / row_sum)
        o, row_max, inverse_sum = (
            mx.concatenate(chunks, axis=3) for chunks in (outputs, row_maxima, inverse_sums)
        )
        return [o.reshape(B, H, Lq, E), row_max, inverse_sum]

    @forward.vjp
    def _(primals, cotangents, outputs):
        do, (_, row_maxima, inverse_sums) = cotangents[0], outputs
        # Wait for the gradient. Otherwise mx.compile would identify these scores with the forward's, and keep them.
        q, k, v = (x.astype(mx.float32) for x in mx.depends(list(primals), [do]))
        q = (q * (scale * LOG2_E)).reshape(B, K, G, Lq, D)
        do = do.astype(mx.float32).reshape(B, K, G, Lq, E)
        dqs, dks, dvs = list[mx.array](), list[mx.array](), list[mx.array]()
        dkv_sums = list[mx.array]()  # dk and dv from all chunks so far, for the keys that the last chunk saw
        # The last chunk sees the most keys. The gradients of keys that no earlier chunk sees are complete after it.
        for n, chunk in reversed(list(enumerate(chunks))):
            q_chunk, do_chunk = chunk_rows(q, chunk), chunk_rows(do, chunk)
            if dkv_sums:
                q_chunk, do_chunk = mx.depends([q_chunk, do_chunk], [dqs[-1], *dkv_sums])
            visible = slice(chunk.keys)
            row_max, inverse_sum = (x[:, :, :, chunk.start : chunk.end] for x in (row_maxima, inverse_sums))
            e = exp2_nonpositive(compute_scores(q_chunk, k[:, :, visible], chunk) - row_max)
            # Reshaped before the division by z. As two outputs of one compiled kernel, both would take ten times as
            # long on a CPU.
            e = e.reshape(B, K, -1, chunk.keys)
            inverse_sum = inverse_sum.reshape(B, K, -1, 1)
            do_chunk = do_chunk * inverse_sum
            dp = do_chunk @ v[:, :, visible].swapaxes(-1, -2)
            ds = e * (dp - mx.sum(e * dp, axis=-1, keepdims=True) * inverse_sum)
            dqs.append(((ds @ k[:, :, visible]) * scale).reshape(B, K, G, -1, D))
            dkv = [ds.swapaxes(-1, -2) @ q_chunk, e.swapaxes(-1, -2) @ do_chunk]
            dkv_sums = [x[:, :, visible] + y for x, y in zip(dkv_sums, dkv, strict=True)] if dkv_sums else dkv
            complete = slice(chunks[n - 1].keys if n else 0, chunk.keys)
            if complete.start < complete.stop:
                # Copied, because a slice would keep the whole array alive.
                dks.append(mx.contiguous(dkv_sums[0][:, :, complete]))
                dvs.append(mx.contiguous(dkv_sums[1][:, :, complete]))
        dq = mx.concatenate(dqs[::-1], axis=3).reshape(B, H, Lq, D)
        dk, dv = (mx.concatenate(blocks[::-1], axis=2) for blocks in (dks, dvs))
        gradients = dq, dk / LOG2_E, dv  # dk was computed from queries scaled by log2 e
        return [x.astype(primal.dtype) for x, primal in zip(gradients, primals, strict=True)]

    return forward(q, k, v)[0]


def _mask_bias(
    mask: mx.array | str | None, chunk: QueryChunk, offset: int, key_heads: int, after: mx.array
) -> mx.array | None:
    """Return the bias to add to the scores of a chunk, 0 or -1e30, or None without a mask.

    The reshape makes the bias an array of its own, computed once and not in the loop over heads. It is computed again
    in each layer, once `after` exists, because mx.compile would keep a single one through the whole step.

    Args:
        mask: as in `attention`.
        chunk: the chunk of queries.
        offset: Lk - Lq, the difference between the positions of keys and queries.
        key_heads: K.
        after: the array to wait for.

    Returns:
        [B or 1, K or 1, G or 1, c or 1, e or 1], float32.
    """
    if mask is None:
        return None
    if isinstance(mask, str):
        i = mx.depends([mx.arange(chunk.start, chunk.end)], [after])[0][:, None] + offset
        visible = (i >= mx.arange(chunk.keys)[None, :])[None, None]
    else:
        visible = mx.depends([mask.reshape((1,) * (4 - mask.ndim) + mask.shape)], [after])[0]
        if visible.shape[2] > 1:
            visible = visible[:, :, chunk.start : chunk.end]
        if visible.shape[3] > 1:
            visible = visible[..., : chunk.keys]
    b, h, c, e = visible.shape
    k = key_heads if h > 1 else 1
    return mx.where(visible, 0.0, _MASKED_SCORE).reshape(b, k, h // k, c, e)
