"""Caches that keep packed rows apart.

Packing puts several rows into one sequence. Models of mlx-lm ask their key-value cache for the attention mask, if they
get a cache. `PackedCache` stores nothing and answers with a block-diagonal causal mask. Rotary positions are relative,
so a row may start at any position. `TrainingForms` resets recurrent layers at the start of each row; their cache,
`PackedStates`, stores nothing either. `packing_error` finds the models for which this does not hold, by a comparison.

The same mask lets several branches, such as two answers, follow one prompt: each attends to the prompt and to itself.
A branch then takes up the positions where the prompt ends, see `ops.rope`. `sharing_error` finds the models for which
this does not give what each branch gives alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from nalora_mlx.core.errors import first_line
from nalora_mlx.models.recurrences import TrainingForms
from nalora_mlx.models.tolerances import OTHER_ROWS, PACKED_ROWS, relative_error
from nalora_mlx.ops.attention import causal_masks, lean_attention
from nalora_mlx.ops.rope import rope_positions

PROBE_TOKENS = 8  # length of the row that is compared


class Branches(NamedTuple):
    """Branches that follow one prompt.

    Attributes:
        numbers: int32 [B, L], 0 for the prompt, which all branches attend to, else the number of a branch.
        positions: int32 [B, L], the position of each token in the text of its branch.
    """

    numbers: mx.array
    positions: mx.array


class PackedCache:
    """Replacement for an empty key-value cache of mlx-lm that stores nothing and masks other rows.

    Args:
        segment_ids: [B, L], the number of each position's row; 0 for padding.
        branches: of the rows; None if each is a single text.
    """

    offset = 0

    def __init__(self, segment_ids: mx.array, branches: Branches | None = None):
        self.visible = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # [B, 1, L, L]
        self.positions = None if branches is None else branches.positions
        if branches is not None:
            query, key = branches.numbers[:, None, :, None], branches.numbers[:, None, None, :]
            self.visible &= (key == 0) | (key == query)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return the mask [B, 1, L, L]: True at the position itself and earlier ones of its row and window."""
        if self.positions is None:
            return self.visible & create_causal_mask(length, window_size=window_size)
        distance = self.positions[:, None, :, None] - self.positions[:, None, None, :]
        mask = self.visible & (distance >= 0)
        return mask if window_size is None else mask & (distance < window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return keys and values unchanged."""
        return keys, values


class PackedStates(ArraysCache):
    """Replacement for the empty state of a recurrent layer that stores nothing."""

    def __setitem__(self, index: int, value: mx.array) -> None:
        """Store nothing. Otherwise a layer that is recomputed in the backward would start from its last state."""


def packed_caches(model: nn.Module, segment_ids: mx.array, branches: Branches | None = None) -> list[Any]:
    """Return the `cache` argument that keeps the rows of a packed batch apart.

    Args:
        model: a model for which `packing_error` is None.
        segment_ids: [B, L], the number of each position's row; 0 for padding.
        branches: of the rows, for a model for which `sharing_error` is None; None if each is a single text.
    """
    packed = PackedCache(segment_ids, branches)

    def replace(cache: Any) -> Any:
        if isinstance(cache, CacheList):
            return CacheList(*map(replace, cache.caches))
        return PackedStates(len(cache.cache)) if isinstance(cache, ArraysCache) else packed

    return [replace(cache) for cache in make_prompt_cache(model)]


def packing_error(
    model: nn.Module, hidden: Callable[..., mx.array], length: int, forms: TrainingForms | None = None
) -> str | None:
    """Return why rows cannot be packed for this model; None if they can.

    Compares short rows that are packed after other rows, far into sequences of this length, with the same rows alone.

    Args:
        model: any model of mlx-lm.
        hidden: token ids [B, L] (and `cache`) -> the outputs to compare, [B, L, D]: hidden states or logits.
        length: length of the packed sequences; the result does not cover longer ones.
        forms: the model's training forms; created here if None.
    """
    if others := _cache_types(make_prompt_cache(model)) - {KVCache, RotatingKVCache, ArraysCache}:
        names = ", ".join(sorted(cls.__name__ for cls in others))
        return f"its layers keep more of earlier positions than keys, values and states ({names})"
    forms = forms or TrainingForms(model)
    if forms.notices:
        return "its recurrences keep mlx-lm's own form, which carries a state from row to row"
    return _comparison_error(
        model,
        lambda seed: _rows_agree(model, hidden, length, seed, forms),
        "a row's outputs change when another row precedes it (its positions may not be relative)",
    )


def sharing_error(
    model: nn.Module, hidden: Callable[..., mx.array], length: int, forms: TrainingForms | None = None
) -> str | None:
    """Return why several branches cannot follow one prompt for this model; None if they can.

    Compares two short branches after a long prompt with the same texts alone. Arguments are those of `packing_error`.
    """
    if others := _cache_types(make_prompt_cache(model)) - {KVCache, RotatingKVCache}:
        names = ", ".join(sorted(cls.__name__ for cls in others))
        return f"its layers keep more of earlier positions than keys and values ({names})"
    forms = forms or TrainingForms(model)
    return _comparison_error(
        model,
        lambda seed: _branches_agree(model, hidden, length, seed, forms),
        "the outputs of a branch change when another branch precedes it",
    )


def _comparison_error(model: nn.Module, agree: Callable[[int], bool], difference: str) -> str | None:
    """Return `difference` unless two computations agree for one of three seeds; None if they do."""
    training = model.training
    model.eval()
    try:
        # As in training. MLX's own attention would hold the scores of whole sequences.
        with lean_attention(), causal_masks():
            # Several draws, since rounding alone may send a token to other experts.
            agreed = any(agree(seed) for seed in range(3))
    except Exception as error:
        return f"its forward does not take a packed sequence ({first_line(error)})"
    finally:
        model.train(training)
    return None if agreed else difference


def _cache_types(caches: Sequence[Any]) -> set[type]:
    """Return the types of caches, those in a CacheList included."""
    return {
        cls
        for cache in caches
        for cls in (_cache_types(cache.caches) if isinstance(cache, CacheList) else {type(cache)})
    }


def _rows_agree(
    model: nn.Module, hidden: Callable[..., mx.array], length: int, seed: int, forms: TrainingForms
) -> bool:
    """Return whether two random rows give the same outputs alone, and packed after any other rows."""
    length = max(length, 2 * PROBE_TOKENS)
    tokens = np.random.default_rng(seed).integers(1, 32, (2, length), dtype=np.int32)
    segment_ids = np.ones((2, length), np.int32)
    # A different position in each sequence, so that one mask shared by both would show.
    starts = (length - PROBE_TOKENS, length // 4)
    rows = [slice(start, start + PROBE_TOKENS) for start in starts]
    for i, row in enumerate(rows):
        segment_ids[i, row] = 2
    alone = hidden(mx.array(np.stack([tokens[i, row] for i, row in enumerate(rows)])))
    ids = mx.array(segment_ids)
    other_rows = np.where(segment_ids == 2, tokens, tokens % 31 + 1)
    packed = []
    for inputs in (tokens, other_rows):
        with forms.installed(ids):
            outputs = hidden(mx.array(inputs), cache=packed_caches(model, ids))
        packed.append(mx.stack([outputs[i, row] for i, row in enumerate(rows)]))
        mx.eval(packed)  # one at a time, for the memory
    # With other tokens in the other rows, the same operations run on the same numbers.
    leak = relative_error(packed[1], packed[0])
    error = relative_error(packed[0], alone)
    return leak <= OTHER_ROWS.for_dtype(alone.dtype) and error <= PACKED_ROWS.for_dtype(alone.dtype)


def _branches_agree(
    model: nn.Module, hidden: Callable[..., mx.array], length: int, seed: int, forms: TrainingForms
) -> bool:
    """Return whether two random branches give the same outputs after one prompt and after their own.

    The two sequences have prompts of different lengths. The first branch is longer than the second.
    """
    length = max(length, 4 * PROBE_TOKENS)
    rng = np.random.default_rng(seed)
    first, second = PROBE_TOKENS + 3, PROBE_TOKENS
    layout = np.zeros((3, 2, length), np.int32)  # tokens, branches, positions
    texts: list[tuple[slice, mx.array]] = []  # the places of prompt and branch
    for i, prompt in enumerate((length - first - second, length // 4)):
        branch = np.repeat([0, 1, 2], (prompt, first, second))
        place = np.concatenate([np.arange(prompt + first), prompt + np.arange(second)])
        layout[:, i, : branch.size] = rng.integers(1, 32, branch.size), branch, place
        layout[1, i, branch.size :] = 3
        places = (np.flatnonzero((branch == 0) | (branch == one)) for one in (1, 2))
        texts += [(slice(i, i + 1), mx.array(found)) for found in places]
    tokens, numbers, positions = (mx.array(part) for part in layout)
    ids = mx.array((np.arange(length) < [[length], [length // 4 + first + second]]).astype(np.int32))
    branches = Branches(numbers, positions)
    joined = []
    for inputs in (tokens, mx.where(numbers == 1, tokens % 31 + 1, tokens)):
        with forms.installed(ids), rope_positions(positions):
            joined.append(hidden(inputs, cache=packed_caches(model, ids, branches)))
        mx.eval(joined)  # one at a time, for the memory
    errors = [relative_error(joined[0][row, places], hidden(tokens[row, places])) for row, places in texts]
    # With other tokens in the first branch, the second one's operations run on the same numbers.
    in_second = (numbers == 2)[..., None]
    leak = relative_error(mx.where(in_second, joined[1], 0), mx.where(in_second, joined[0], 0))
    dtype = joined[0].dtype
    return leak <= OTHER_ROWS.for_dtype(dtype) and max(errors) <= PACKED_ROWS.for_dtype(dtype)
