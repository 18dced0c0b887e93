"""Attention for training, which keeps two numbers per query for the backward in place of its scores.

While gradients are traced MLX composes attention of single operations, on every backend, and keeps scores and
probabilities [B, H, Lq, Lk] of each layer until the backward. Here both are made for a chunk of queries at a time, and
once more in the backward, from their maximum and sum. With a causal mask a chunk leaves out keys that none of it sees.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from nalora_mlx.ops.fast_math import LOG2_E, exp2_nonpositive

QUERIES = 128  # of a chunk at least: in fewer, graphs grow, and with them the time to compile them
CHUNKS = 16  # of a sequence at most, so that graphs stay small
_HIDDEN = -1e30  # added to scores that a query must not see; any score is lost in it
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@contextmanager
def lean_attention() -> Iterator[None]:
    """Let models that call mx.fast.scaled_dot_product_attention run `attention` where it can stand in."""
    fused = mx.fast.scaled_dot_product_attention

    def call(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **others: Any
    ) -> mx.array:
        if any(other is not None for other in others.values()) or not _can_take(q, k, v, mask):
            return fused(q, k, v, scale=scale, mask=mask, **others)
        return attention(q, k, v, scale=scale, mask=mask)

    mx.fast.scaled_dot_product_attention = call
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = fused


def _can_take(q: mx.array, k: mx.array, v: mx.array, mask: Any) -> bool:
    if not all(x.ndim == 4 and x.dtype in _FLOATS for x in (q, k, v)):
        return False
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        return False
    if q.shape[1] % k.shape[1] or 0 in q.shape + k.shape:
        return False
    if not isinstance(mask, mx.array):
        return mask is None or mask == "causal"
    full = (*q.shape[:3], k.shape[2])
    fits = all(m in (1, n) for m, n in zip(mask.shape[::-1], full[::-1], strict=False))
    return mask.dtype == mx.bool_ and mask.ndim <= 4 and fits


class _Chunk(NamedTuple):
    """Queries start:end, which see no keys but :keys."""

    start: int
    end: int
    keys: int


def _chunks(queries: int, keys: int, causal: bool) -> list[_Chunk]:
    """Queries in equal parts; at least one key for each, which the mask may still hide."""
    size = math.ceil(queries / min(CHUNKS, math.ceil(queries / QUERIES)))
    bounds = [(start, min(start + size, queries)) for start in range(0, queries, size)]
    return [_Chunk(i, j, max(j + keys - queries, 1) if causal else keys) for i, j in bounds]


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None = None
) -> mx.array:
    """softmax(scale q k^T + mask) v, of which the backward finds only q, k, v, and two numbers per query.

    With S the scores, m their maximum, z = sum exp(S - m) and P = exp(S - m) / z: O = P v, and for a gradient dO

        dv = P^T dO,  dP = dO v^T,  dS = P * (dP - sum(P * dP)),  dq = scale dS k,  dk = scale dS^T q

    It is usual to keep m + log z alone, and to take sum(dO * O) for sum(P * dP); in float32 the errors of the gradients
    are then up to 1.4 times those of MLX's own attention. Here they are much the same.
    Scores, probabilities and sums are float32. A query that sees no key gives 0, and no gradient passes it.

    Args:
        q: [B, H, Lq, D].
        k: [B, K, Lk, D], with K a divisor of H.
        v: [B, K, Lk, E].
        scale: of the scores.
        mask: None; "causal", in which the last query sees all keys; or bool, broadcast to [B, H, Lq, Lk], true where a
            query sees a key.

    Returns:
        [B, H, Lq, E], of the dtype to which q, k and v promote.
    """
    (B, H, Lq, D), (K, Lk, E) = q.shape, v.shape[1:]
    G = H // K  # query heads that share a key head; they are rows of one multiplication
    dtype = mx.result_type(mx.result_type(q, k), v)
    chunks = _chunks(Lq, Lk, mask == "causal" if isinstance(mask, str) else False)

    def rows(x: mx.array, chunk: _Chunk) -> mx.array:
        """A chunk of [B, K, G, Lq, n] as [B, K, G c, n]."""
        return x[:, :, :, chunk.start : chunk.end].reshape(B, K, -1, x.shape[-1])

    def scores(q: mx.array, k: mx.array, chunk: _Chunk) -> mx.array:
        """Of scaled queries [B, K, G c, D] and keys [B, K, e, D]: [B, K, G, c, e], in which what is hidden is -1e30."""
        s = (q @ k.swapaxes(-1, -2)).reshape(B, K, G, -1, chunk.keys)
        hidden = _hidden(mask, chunk, Lk - Lq, K, after=q)
        return s if hidden is None else s + hidden

    custom: Any = mx.custom_function

    @custom
    def both(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        """The output [B, H, Lq, E], and m and 1 / z of each query [B, K, G, Lq, 2]."""
        q, k, v = (x.astype(mx.float32) for x in (q, k, v))
        q = (q * (scale * LOG2_E)).reshape(B, K, G, Lq, D)  # scores in powers of 2
        outputs, sizes = list[mx.array](), list[mx.array]()
        for chunk in chunks:
            here = rows(q, chunk)
            if outputs:  # only after the chunk before, or MLX would hold the scores of several
                here = mx.depends([here], [outputs[-1]])[0]
            s = scores(here, k[:, :, : chunk.keys], chunk)
            # Above all that is hidden: of a query that sees nothing every exp2_nonpositive is 0.
            largest = mx.maximum(mx.max(s, axis=-1, keepdims=True), _HIDDEN / 10)
            p = exp2_nonpositive(s - largest)
            total = mx.maximum(mx.sum(p, axis=-1, keepdims=True), 1e-30)
            o = (p.reshape(B, K, -1, chunk.keys) @ v[:, :, : chunk.keys]).reshape(B, K, G, -1, E)
            outputs.append((o / total).astype(dtype))
            sizes.append(mx.concatenate([largest, 1 / total], axis=-1))
        return [mx.concatenate(outputs, axis=3).reshape(B, H, Lq, E), mx.concatenate(sizes, axis=3)]

    @both.vjp
    def _(primals, cotangents, outputs):
        do, (_, sizes) = cotangents[0], outputs
        # After the gradient has come: mx.compile would take the scores for those of the forward, and keep them.
        q, k, v = (x.astype(mx.float32) for x in mx.depends(list(primals), [do]))
        q = (q * (scale * LOG2_E)).reshape(B, K, G, Lq, D)  # scores in powers of 2
        do = do.astype(mx.float32).reshape(B, K, G, Lq, E)
        dqs, dks, dvs = list[mx.array](), list[mx.array](), list[mx.array]()
        sums = list[mx.array]()  # of the keys that the last chunk saw: their gradient from all chunks so far
        # From the last chunk on, which sees most keys: keys that earlier chunks do not see are done with.
        for n, chunk in reversed(list(enumerate(chunks))):
            here, slope = rows(q, chunk), rows(do, chunk)
            if sums:
                here, slope = mx.depends([here, slope], [dqs[-1], *sums])
            seen = slice(chunk.keys)
            largest, inverse = mx.split(sizes[:, :, :, chunk.start : chunk.end], 2, axis=-1)
            e = exp2_nonpositive(scores(here, k[:, :, seen], chunk) - largest)
            # Reshaped between: as two outputs of one kernel, both would take ten times as long on a CPU.
            e = e.reshape(B, K, -1, chunk.keys)
            inverse = inverse.reshape(B, K, -1, 1)
            slope = slope * inverse
            dp = slope @ v[:, :, seen].swapaxes(-1, -2)
            ds = e * (dp - mx.sum(e * dp, axis=-1, keepdims=True) * inverse)
            dqs.append(((ds @ k[:, :, seen]) * scale).reshape(B, K, G, -1, D))
            parts = [ds.swapaxes(-1, -2) @ here, e.swapaxes(-1, -2) @ slope]
            sums = [x[:, :, seen] + part for x, part in zip(sums, parts, strict=True)] if sums else parts
            done = slice(chunks[n - 1].keys if n else 0, chunk.keys)
            if done.start < done.stop:
                # Copied, for a slice would hold all of what it is a slice of.
                dks.append(mx.contiguous(sums[0][:, :, done]))
                dvs.append(mx.contiguous(sums[1][:, :, done]))
        dq = mx.concatenate(dqs[::-1], axis=3).reshape(B, H, Lq, D)
        dk, dv = (mx.concatenate(blocks[::-1], axis=2) for blocks in (dks, dvs))
        gradients = dq, dk / LOG2_E, dv  # dk is made of scaled queries, in powers of 2
        return [x.astype(primal.dtype) for x, primal in zip(gradients, primals, strict=True)]

    return both(q, k, v)[0]


def _hidden(
    mask: mx.array | str | None, chunk: _Chunk, offset: int, heads: int, after: mx.array
) -> mx.array | None:
    """0 or -1e30 to be added to the scores of a chunk, with K or 1 key heads: [B or 1, K or 1, G or 1, c or 1, e or 1].

    An array of its own by the reshape, made once and not in the loop over heads; and made again in each layer, in the
    moment in which `after` exists, where mx.compile would keep a single one through the whole step.
    """
    if mask is None:
        return None
    if isinstance(mask, str):
        i = mx.depends([mx.arange(chunk.start, chunk.end)], [after])[0][:, None] + offset
        seen = (i >= mx.arange(chunk.keys)[None, :])[None, None]
    else:
        seen = mx.depends([mask.reshape((1,) * (4 - mask.ndim) + mask.shape)], [after])[0]
        if seen.shape[2] > 1:
            seen = seen[:, :, chunk.start : chunk.end]
    b, h, c, e = seen.shape
    k = heads if h > 1 else 1
    return mx.where(seen, 0.0, _HIDDEN).reshape(b, k, h // k, c, e)
