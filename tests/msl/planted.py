"""Small correct kernels, into which the tests of the lanes plant bugs."""

import mlx.core as mx
import numpy as np
import pytest

from .lane import MSLError, trace

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def kernel_call(body, *, inputs=("x",), outputs=("y",), header="", name="planted", **launch):
    """Return fn(*arrays), which calls a metal_kernel. Values of `launch` may be functions of the arrays."""
    kernel = mx.fast.metal_kernel(name, list(inputs), list(outputs), body, header)

    def fn(*arrays):
        settings = {key: value(*arrays) if callable(value) else value for key, value in launch.items()}
        return kernel(inputs=list(arrays), **settings)

    return fn


def random(*shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def float64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def changed(body, old, new):
    """Return the body with a bug planted: `new` instead of `old`."""
    assert old in body
    return body.replace(old, new)


def run(call, *arrays, **how):
    (kernel,) = trace(call, *arrays)
    return kernel.run(arrays, **how)[0]


def caught(message, call, *arrays, **how):
    with pytest.raises(MSLError, match=message):
        run(call, *arrays, **how)


# --- Kernels ----------------------------------------------------------------------------------------------------

# y = 2 x, one element per thread. The grid is larger than the array.
DOUBLE = """
  const uint i = thread_position_in_grid.x;
  if (i >= uint(x_shape[0])) return;
  y[i] = T(2.0f * float(x[i]));
"""


def double(body=DOUBLE, **launch):
    return kernel_call(
        body,
        **{
            "template": lambda x: [("T", x.dtype)],
            "grid": (64, 1, 1),
            "threadgroup": (24, 1, 1),  # the last threadgroup is smaller
            "output_shapes": lambda x: [x.shape],
            "output_dtypes": lambda x: [x.dtype],
        }
        | launch,
    )


# y = x * w with w [F], four channels per thread, as vectors where all four exist and are aligned.
COLUMNS_HEADER = """
template <typename T>
inline float4 load4(const device T* p) {
  return float4(*reinterpret_cast<const device vec<T, 4>*>(p));
}
"""
COLUMNS = """
  const uint F = x_shape[1];
  const uint f = 4 * thread_position_in_grid.x;
  const uint n = thread_position_in_grid.y;
  if (f >= F) return;
  const size_t i = size_t(n) * F + f;
  if (F % 4 == 0) {
    const float4 v = load4<T>(x + i) * load4<float>(w + f);
    *reinterpret_cast<device vec<T, 4>*>(y + i) = vec<T, 4>(v);
  } else {
    for (uint j = 0; j < metal::min(4u, F - f); ++j) y[i + j] = T(float(x[i + j]) * w[f + j]);
  }
"""


def columns(body=COLUMNS, header=COLUMNS_HEADER):
    return kernel_call(
        body,
        inputs=("x", "w"),
        header=header,
        template=lambda x, w: [("T", x.dtype)],
        grid=lambda x, w: (-(-x.shape[1] // 4), x.shape[0], 1),
        threadgroup=(8, 2, 1),
        output_shapes=lambda x, w: [x.shape],
        output_dtypes=lambda x, w: [x.dtype],
    )


# Row sums, one threadgroup per row. Each simdgroup sums its part, and one of them adds up the parts.
ROW_SUMS = """
  const uint F = x_shape[1];
  const uint row = threadgroup_position_in_grid.x;
  const uint own = thread_position_in_threadgroup.x;
  threadgroup float parts[32];
  float sum = 0.0f;
  for (uint f = own; f < F; f += threads_per_threadgroup.x) sum += float(x[row * F + f]);
  sum = simd_sum(sum);
  if (thread_index_in_simdgroup == 0) parts[simdgroup_index_in_threadgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup_index_in_threadgroup == 0) {
    sum = thread_index_in_simdgroup < simdgroups_per_threadgroup ? parts[thread_index_in_simdgroup] : 0.0f;
    sum = simd_sum(sum);
    if (own == 0) y[row] = sum;
  }
"""


def row_sums(body=ROW_SUMS, threads=80):
    return kernel_call(
        body,
        grid=lambda x: (x.shape[0] * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=lambda x: [x.shape[:1]],
        output_dtypes=[mx.float32],
    )


# y[n, f] = sum of x[row, f] a[row] over the eight rows of group n. The values of a are staged in threadgroup memory.
STAGED = """
  const uint N = x_shape[0];
  const uint F = x_shape[1];
  const uint f = thread_position_in_grid.x;
  const uint own = thread_position_in_threadgroup.x;
  threadgroup float staged[ROWS];
  for (uint n0 = 0; n0 < N; n0 += ROWS) {
    const uint count = metal::min(uint(ROWS), N - n0);
    for (uint j = own; j < count; j += threads_per_threadgroup.x) staged[j] = float(a[n0 + j]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (f < F) {
      float sum = 0.0f;
      for (uint j = 0; j < count; ++j) sum = metal::fma(float(x[(n0 + j) * F + f]), staged[j], sum);
      y[n0 / ROWS * F + f] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
"""


def staged(body=STAGED, threads=16):
    return kernel_call(
        body,
        inputs=("x", "a"),
        template=[("ROWS", 8)],
        grid=lambda x, a: (-(-x.shape[1] // threads) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=lambda x, a: [(-(-x.shape[0] // 8), x.shape[1])],
        output_dtypes=[mx.float32],
    )


def staged_truth(x, a):
    products = float64(x) * float64(a)[:, None]
    return np.add.reduceat(products, np.arange(0, len(products), 8), axis=0)
