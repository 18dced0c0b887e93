"""Several rows in one sequence, none of which sees another: a block-diagonal attention mask in place of a cache.

mlx-lm's models make their attention masks themselves, and ask the key-value cache for them where there is one. A
cache that holds nothing and answers with a mask of its own isolates the rows of a sequence. Rotary positions are
relative, so that a row need not begin at position 0. A model for which either does not hold is found out by trying.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from nalora_mlx.ops.attention import lean_attention

PROBE = 8  # tokens of the row that a probe compares


class PackedCache:
    """Stands in for an empty key-value cache of mlx-lm: keeps nothing, and masks what is of another row."""

    offset = 0

    def __init__(self, segments: mx.array):
        self.same = segments[:, None, :, None] == segments[:, None, None, :]  # [B, 1, L, L]

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Where a position may look: at itself and at earlier ones of its row, within the window; [B, 1, L, L]."""
        return self.same & create_causal_mask(length, window_size=window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Give keys and values back."""
        return keys, values


def packed_caches(model: nn.Module, segments: mx.array) -> list[PackedCache]:
    """What to call a model with as `cache`, so that positions of different segments do not see one another.

    Args:
        model: one that `refusal` has nothing against.
        segments: [B, L], the number of the row that a position belongs to; 0 for padding.
    """
    return [PackedCache(segments)] * len(make_prompt_cache(model))


def packing_error(model: nn.Module, hidden: Callable[..., mx.array], length: int) -> str | None:
    """Say why rows cannot be packed for this model; None if they can.

    Short rows far into sequences of this length, after other rows, must give what they give alone.

    Args:
        model: any model of mlx-lm.
        hidden: token ids [B, L] (and `cache`) -> what to compare, [B, L, D]: hidden states or logits.
        length: of the packed sequences; positions beyond it are not vouched for.
    """
    others = {type(cache).__name__ for cache in make_prompt_cache(model)} - {
        KVCache.__name__,
        RotatingKVCache.__name__,
    }
    if others:
        return f"its layers keep more of earlier positions than keys and values ({', '.join(sorted(others))})"
    training = model.training
    model.eval()
    try:
        # More than one draw: among experts, rounding alone may send a token elsewhere.
        with lean_attention():  # as in training; MLX's own would hold the scores of whole sequences
            differences = [_difference(model, hidden, length, seed) for seed in range(3)]
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"its forward does not take a packed sequence ({reason})"
    finally:
        model.train(training)
    if min(differences) > 1:
        return "a row gives something else after another row than alone (positions that are not relative, perhaps)"
    return None


def _difference(model: nn.Module, hidden: Callable[..., mx.array], length: int, seed: int) -> float:
    """Largest difference between rows alone and packed, as a multiple of what rounding may do."""
    length = max(length, 2 * PROBE)
    tokens = np.random.default_rng(seed).integers(1, 32, (2, length), dtype=np.int32)
    segments = np.ones((2, length), np.int32)
    starts = (length - PROBE, length // 4)  # in each sequence elsewhere, so that one mask for both would show
    rows = [slice(start, start + PROBE) for start in starts]
    for i, row in enumerate(rows):
        segments[i, row] = 2
    alone = hidden(mx.array(np.stack([tokens[i, row] for i, row in enumerate(rows)])))
    whole = hidden(mx.array(tokens), cache=packed_caches(model, mx.array(segments)))
    packed = mx.stack([whole[i, row] for i, row in enumerate(rows)])
    tolerance = 2e-3 if alone.dtype == mx.float32 else 5e-2
    alone, packed = alone.astype(mx.float32), packed.astype(mx.float32)
    finite = mx.isfinite(alone)
    alone, packed = mx.where(finite, alone, 0), mx.where(finite, packed, 0)
    return float(mx.abs(packed - alone).max() / (tolerance * mx.abs(alone).max() + 1e-30))
