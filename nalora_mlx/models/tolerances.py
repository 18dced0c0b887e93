"""Tolerances for comparing a model's outputs with those of a rewritten forward.

A rewritten forward (a split model, a rebuilt MLP, packed rows) rounds differently from the original. The tolerances are
wide enough for that, in half types and on GPUs that shorten float32 in matrix products. A wrong forward is off by far
more.
"""

import math
from typing import Any, NamedTuple

import mlx.core as mx


class Tolerance(NamedTuple):
    """Largest accepted relative error per dtype of the outputs, see `relative_error`."""

    float32: float
    float16: float
    bfloat16: float

    def for_dtype(self, dtype: mx.Dtype) -> float:
        """Return the tolerance for outputs of a dtype."""
        return {mx.float32: self.float32, mx.float16: self.float16}.get(dtype, self.bfloat16)


LOGITS = Tolerance(2e-3, 2e-2, 2e-2)  # of a model that is split at its output head
GATED_MLP = Tolerance(2e-3, 5e-3, 4e-2)  # outputs of one rebuilt MLP
RECURRENCE = Tolerance(5e-3, 5e-2, 5e-2)  # outputs and gradients of a recurrence in chunks
OTHER_ROWS = Tolerance(1e-5, 1e-3, 8e-3)  # hidden states or logits of a row among other packed rows
PACKED_ROWS = Tolerance(2e-3, 5e-2, 5e-2)  # hidden states or logits of rows that are packed


def relative_error(output: mx.array, expected: mx.array) -> float:
    """Return max |output - expected| / max |expected|, computed in float32.

    Some models give logits of -inf to unused tokens, so equal infinities count as equal. The error is infinite if
    there is NaN, or another infinity, in either array.

    Args:
        output: an array of any shape and floating dtype.
        expected: an array of the same shape.
    """
    output, expected = output.astype(mx.float32), expected.astype(mx.float32)
    difference = mx.where(output == expected, 0, mx.abs(output - expected))
    if not mx.all(mx.isfinite(difference)).item():
        return math.inf
    size: Any = mx.maximum(mx.abs(mx.where(mx.isfinite(expected), expected, 0)).max(), 1e-30)
    return (difference.max() / size).item()
