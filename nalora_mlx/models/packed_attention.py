"""Attention masks that keep packed rows apart.

Packing puts several rows into one sequence. Models of mlx-lm ask their key-value cache for the attention mask, if they
get a cache. `PackedCache` stores nothing and answers with a block-diagonal causal mask. Rotary positions are relative,
so a row may start at any position. Models for which this does not hold are found by trying, see `packing_error`.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from nalora_mlx.core.errors import first_line
from nalora_mlx.models.tolerances import PACKED_ROWS, relative_error
from nalora_mlx.ops.attention import lean_attention

PROBE_TOKENS = 8  # length of the row that is compared


class PackedCache:
    """Replacement for an empty key-value cache of mlx-lm that stores nothing and masks other rows.

    Args:
        segment_ids: [B, L], the number of each position's row; 0 for padding.
    """

    offset = 0

    def __init__(self, segment_ids: mx.array):
        self.same_row = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # [B, 1, L, L]

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return the mask [B, 1, L, L]: True at the position itself and earlier ones of its row and window."""
        return self.same_row & create_causal_mask(length, window_size=window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return keys and values unchanged."""
        return keys, values


def packed_caches(model: nn.Module, segment_ids: mx.array) -> list[PackedCache]:
    """Return the `cache` argument that keeps the rows of a packed batch apart.

    Args:
        model: a model for which `packing_error` is None.
        segment_ids: [B, L], the number of each position's row; 0 for padding.
    """
    return [PackedCache(segment_ids)] * len(make_prompt_cache(model))


def packing_error(model: nn.Module, hidden: Callable[..., mx.array], length: int) -> str | None:
    """Return why rows cannot be packed for this model; None if they can.

    Compares short rows that are packed after other rows, far into sequences of this length, with the same rows alone.

    Args:
        model: any model of mlx-lm.
        hidden: token ids [B, L] (and `cache`) -> the outputs to compare, [B, L, D]: hidden states or logits.
        length: of the packed sequences; longer ones are not covered.
    """
    caches = {type(cache).__name__ for cache in make_prompt_cache(model)}
    if others := caches - {KVCache.__name__, RotatingKVCache.__name__}:
        return f"its layers keep more of earlier positions than keys and values ({', '.join(sorted(others))})"
    training = model.training
    model.eval()
    try:
        with lean_attention():  # as in training; MLX's own would hold the scores of whole sequences
            # Several draws, since rounding alone may send a token to other experts.
            agree = any(_rows_agree(model, hidden, length, seed) for seed in range(3))
    except Exception as error:
        return f"its forward does not take a packed sequence ({first_line(error)})"
    finally:
        model.train(training)
    if not agree:
        return "a row's outputs change when another row precedes it (its positions may not be relative)"
    return None


def _rows_agree(model: nn.Module, hidden: Callable[..., mx.array], length: int, seed: int) -> bool:
    """Return whether two random rows give the same outputs alone and packed."""
    length = max(length, 2 * PROBE_TOKENS)
    tokens = np.random.default_rng(seed).integers(1, 32, (2, length), dtype=np.int32)
    segment_ids = np.ones((2, length), np.int32)
    # A different position in each sequence, so that one mask shared by both would show.
    starts = (length - PROBE_TOKENS, length // 4)
    rows = [slice(start, start + PROBE_TOKENS) for start in starts]
    for i, row in enumerate(rows):
        segment_ids[i, row] = 2
    alone = hidden(mx.array(np.stack([tokens[i, row] for i, row in enumerate(rows)])))
    outputs = hidden(mx.array(tokens), cache=packed_caches(model, mx.array(segment_ids)))
    packed = mx.stack([outputs[i, row] for i, row in enumerate(rows)])
    return relative_error(packed, alone) <= PACKED_ROWS.for_dtype(alone.dtype)
