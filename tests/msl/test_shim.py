"""Functions, rounding, thread positions and simd functions of the shim."""

import mlx.core as mx
import numpy as np
import pytest

from tests.msl.lane import elementwise, require
from tests.msl.planted import double, float64, kernel_call, random, run

X = np.concatenate(
    [np.linspace(-20, 20, 4001), np.logspace(-30, 30, 601), -np.logspace(-30, 30, 601)]
).astype(np.float32)
POSITIVE = np.abs(X[X != 0])
FUNCTIONS = [  # expression, x, float64 function
    ("metal::precise::exp(x)", X, np.exp),
    ("metal::exp2(x)", X, np.exp2),
    ("metal::log(x)", POSITIVE, np.log),
    ("metal::log2(x)", POSITIVE, np.log2),
    ("metal::sqrt(x)", POSITIVE, np.sqrt),
    ("metal::fast::rsqrt(x)", POSITIVE, lambda x: 1 / np.sqrt(x)),
    ("metal::tanh(x)", X, np.tanh),
    ("metal::sin(x)", X[np.abs(X) < 100], np.sin),
    ("metal::cos(x)", X[np.abs(X) < 100], np.cos),
    ("metal::powr(x, 1.5f)", POSITIVE, lambda x: x**1.5),
]
EXACT = [
    ("metal::fabs(x)", np.abs),
    ("metal::abs(x)", np.abs),
    ("metal::floor(x)", np.floor),
    ("metal::ceil(x)", np.ceil),
    ("metal::rint(x)", np.rint),
    ("metal::trunc(x)", np.trunc),
    ("metal::sign(x)", np.sign),
    ("metal::min(x, 2.0f)", lambda x: np.fmin(x, 2)),
    ("metal::max(x, 2.0f)", lambda x: np.fmax(x, 2)),
    ("metal::clamp(x, -1.0f, 2.0f)", lambda x: np.clip(x, -1, 2)),
    ("metal::select(1.0f, 3.0f, x > 0.0f)", lambda x: np.where(x > 0, 3, 1)),
    ("metal::step(0.5f, x)", lambda x: x >= 0.5),
    ("metal::copysign(2.0f, x)", lambda x: np.copysign(2, x)),
    ("metal::isfinite(x) && !metal::isnan(x) && !metal::isinf(x)", np.ones_like),
    ("metal::fma(x, 1.0f, metal::mix(0.0f, 4.0f, 0.5f)) - x == 2.0f ? 2.0f : 2.0f", lambda x: 0 * x + 2),
    ("metal::as_type<float>(metal::as_type<uint>(x))", lambda x: x),
    ("metal::dot(float2(x, 0.0f), float2(1.0f))", lambda x: x),
]


def ulps(y, truth):
    return np.abs(y.astype(np.float64) - truth) / np.spacing(
        np.maximum(np.abs(truth), 2.0**-126).astype(np.float32)
    )


@pytest.mark.parametrize(("expression", "x", "truth"), FUNCTIONS, ids=[row[0] for row in FUNCTIONS])
def test_functions(expression, x, truth):
    require("guarded")
    with np.errstate(over="ignore"):
        expected = truth(x.astype(np.float64))
    inside = np.abs(expected) < 3e38
    assert ulps(elementwise("", expression, x)[inside], expected[inside]).max() <= 2


def test_exact_functions():
    require("guarded")
    for expression, truth in EXACT:
        np.testing.assert_array_equal(elementwise("", expression, X), truth(X).astype(np.float32), expression)


POWER = """
template <int K>
inline float power(float x) {
  float y = 1.0f;
  for (int i = 0; i < K; ++i) y *= x;
  return y;
}
"""


def test_function_in_a_header():
    require("guarded")
    x = np.linspace(-3, 3, 12).reshape(3, 4).astype(np.float32)
    np.testing.assert_allclose(elementwise(POWER, "power<3>(x)", x), x**3, rtol=1e-6)


def test_nan_and_infinity():
    require("guarded")
    x = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    expected = {
        "metal::max(x, 0.0f)": [0, np.inf, 0, 1],  # drops NaN, as Metal may
        "metal::min(0.0f, x)": [0, 0, -np.inf, 0],
        "metal::clamp(x, -1.0f, 2.0f)": [-1, 2, -1, 1],
        "metal::exp(x)": [np.nan, np.inf, 0, np.float32(np.e)],
        "float(metal::isnan(x)) + 2.0f * float(metal::isinf(x))": [1, 2, 2, 0],
        "x > 0.0f ? x : 0.0f": [0, np.inf, 0, 1],
        "metal::numeric_limits<float>::infinity() - x": [np.nan, np.nan, np.inf, np.inf],
    }
    for expression, values in expected.items():
        np.testing.assert_array_equal(elementwise("", expression, x), np.float32(values), expression)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_rounding_to_half_precision(dtype):
    require("guarded")
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32)
    ties = bits & 0xFFFF0000 | 0x8000  # halfway between two bfloat16 numbers
    x = mx.array(np.concatenate([bits.view(np.float32), ties.view(np.float32), X]))
    call = double(
        "  y[thread_position_in_grid.x] = T(x[thread_position_in_grid.x]);\n",
        template=[("T", dtype)],
        grid=(x.size, 1, 1),
        output_dtypes=[dtype],
    )
    expected = np.array(x.astype(dtype).astype(mx.float32))
    np.testing.assert_array_equal(run(call, x).astype(np.float32), expected)


def test_half_precision_rounds_after_every_operation():
    require("guarded")
    for dtype in (mx.float16, mx.bfloat16):
        x, w = random(45, dtype=dtype), random(45, dtype=dtype, seed=1)
        body = (
            "  const uint i = thread_position_in_grid.x;\n  y[i] = x[i] * w[i] * w[i] + x[i] / w[i] - w[i];\n"
        )
        call = kernel_call(
            body,
            inputs=("x", "w"),
            grid=(45, 1, 1),
            threadgroup=(9, 1, 1),
            output_shapes=[(45,)],
            output_dtypes=[dtype],
        )
        np.testing.assert_array_equal(run(call, x, w), np.array((x * w * w + x / w - w).astype(mx.float32)))


def test_rough_functions_have_the_errors_that_metal_allows():
    require("guarded")
    x = mx.array(X[np.abs(X) < 80])
    call = double(
        "  y[thread_position_in_grid.x] = metal::precise::exp(x[thread_position_in_grid.x]);\n",
        template=[],
        grid=(x.size, 1, 1),
    )
    error = ulps(run(call, x, rough=True), np.exp(float64(x)))
    assert 3.5 < error.max() <= 4.6
    assert ulps(run(call, x), np.exp(float64(x))).max() <= 1


POSITIONS = """
  const uint3 p = thread_position_in_grid;
  const uint i = 8 * (p.x + threads_per_grid.x * (p.y + threads_per_grid.y * p.z));
  y[i] = thread_position_in_threadgroup.x + 10 * thread_position_in_threadgroup.y;
  y[i + 1] = threadgroup_position_in_grid.x + 10 * threadgroup_position_in_grid.y;
  y[i + 2] = threads_per_threadgroup.x + 10 * threads_per_threadgroup.y + 100 * threads_per_threadgroup.z;
  y[i + 3] = threadgroups_per_grid.x + 10 * threadgroups_per_grid.y + 100 * threadgroups_per_grid.z;
  y[i + 4] = thread_index_in_threadgroup;
  y[i + 5] = thread_index_in_simdgroup + 100 * simdgroup_index_in_threadgroup;
  y[i + 6] = simdgroups_per_threadgroup + 10 * threads_per_simdgroup;
  y[i + 7] = p.z + x[0];
"""


def test_positions():
    require("guarded")
    grid, group = (11, 5, 2), (8, 4, 2)
    call = kernel_call(
        POSITIONS, grid=grid, threadgroup=group, output_shapes=[(2, 5, 11, 8)], output_dtypes=[mx.uint32]
    )
    output = run(call, mx.zeros(9))
    z, y, x = np.meshgrid(*(np.arange(n) for n in grid[::-1]), indexing="ij")
    part = [
        np.minimum(size, n - at // size * size) for at, n, size in zip((x, y, z), grid, group, strict=True)
    ]
    index = x % 8 + part[0] * (y % 4 + part[1] * z)
    count = part[0] * part[1] * part[2]
    expected = [
        x % 8 + 10 * (y % 4),
        x // 8 + 10 * (y // 4),
        part[0] + 10 * part[1] + 100 * part[2],
        2 + 20 + 100 + 0 * x,
        index,
        index % 32 + 100 * (index // 32),
        -(-count // 32) + 320,
        z,
    ]
    np.testing.assert_array_equal(output, np.stack(expected, -1))


SIMD = """
  const uint i = thread_position_in_grid.x;
  const float4 four = simd_sum(float4(x[i], 1.0f, 2.0f, 3.0f));
  y[i] = simd_sum(x[i]) + four.x + four.y;
  y[i + 40] = simd_max(x[i]) - simd_min(x[i]);
  y[i + 80] = simd_shuffle_xor(x[i], 5);
  y[i + 120] = simd_shuffle_down(x[i], 3);
  y[i + 160] = simd_broadcast(x[i], 2) + float(simd_sum(i));
"""


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_simd_functions(order):
    require("guarded")
    values = random(40)  # the second simdgroup has 8 lanes
    call = kernel_call(
        SIMD, grid=(40, 1, 1), threadgroup=(40, 1, 1), output_shapes=[(5, 40)], output_dtypes=[mx.float32]
    )
    output = run(call, values, order=order)
    x = float64(values)
    for begin, end in ((0, 32), (32, 40)):
        lanes, own, count = x[begin:end], output[:, begin:end], end - begin
        np.testing.assert_allclose(own[0], 2 * lanes.sum() + count, rtol=1e-5)
        np.testing.assert_allclose(own[1], lanes.max() - lanes.min(), rtol=1e-6)
        np.testing.assert_allclose(own[2], lanes[np.arange(count) ^ 5], rtol=1e-6)
        np.testing.assert_allclose(own[3, :-3], lanes[3:], rtol=1e-6)
        assert np.isnan(own[3, -3:]).all()  # these lanes do not exist
        np.testing.assert_allclose(own[4], lanes[2] + np.arange(begin, end).sum(), rtol=1e-5)
