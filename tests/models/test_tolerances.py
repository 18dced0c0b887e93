"""Comparisons of outputs: NaN never counts as agreement, equal infinities do."""

import math

import mlx.core as mx
import pytest

from nalora_mlx.models import output_head
from nalora_mlx.models.tolerances import LOGITS, relative_error

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("output", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([1.0, -INF], [2.0, -INF], 0.5),  # unused tokens
        ([-INF, -INF], [-INF, -INF], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, NAN], [1.0, NAN], INF),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([1.0, NAN], [1.0, -INF], INF),
        ([1.0, 2.0], [1.0, -INF], INF),
        ([1.0, -INF], [1.0, 2.0], INF),
        ([1.0, INF], [1.0, -INF], INF),
    ],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_relative_error(output, expected, error, dtype):
    found = relative_error(mx.array(output, dtype=dtype), mx.array(expected, dtype=dtype))
    assert found == pytest.approx(error)
    assert (found <= LOGITS.for_dtype(dtype)) == (error < 0.1)


def test_logits_that_are_nan_do_not_agree():
    assert output_head._agree(mx.zeros((2, 3)), mx.zeros((2, 3)))
    assert not output_head._agree(mx.zeros((2, 3)), mx.full((2, 3), NAN))
