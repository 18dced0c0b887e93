"""The lane itself: kernels that are right, in every order and dtype, and planted bugs that each lane must catch."""

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from tests.msl import build, translate
from tests.msl import kernel as kernel_module
from tests.msl.lane import (
    Kernel,
    MSLError,
    Operand,
    build_all,
    check_address_spaces,
    elementwise,
    emulated,
    poisoned,
    require,
    trace,
)

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
EVERY_WAY = [("forward", "end"), ("reverse", "start"), ("shuffled", "end")]


def kernel_call(body, *, inputs=("x",), outputs=("y",), header="", name="planted", **launch):
    """A call of one metal_kernel: fn(*arrays); `launch` may hold functions of the arrays."""
    kernel = mx.fast.metal_kernel(name, list(inputs), list(outputs), body, header)

    def fn(*arrays):
        now = {key: value(*arrays) if callable(value) else value for key, value in launch.items()}
        return kernel(inputs=list(arrays), **now)

    return fn


def random(*shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def float64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


# --- Kernels that are right ----------------------------------------------------------------------------------------

# One element a thread; the grid is larger than the array.
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


# Four channels a thread, as vectors where they are whole and aligned; y = x * w, w [F].
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


# One threadgroup a row: simdgroups reduce, one of them reduces their results.
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


# Rows are staged eight at a time: y[n, f] = sum over the rows of its eight of x[row, f] a[row].
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


CLEAN = {  # name -> (call, arrays of a dtype, float64 truth)
    "double": (double, lambda dt: [random(45, dtype=dt)], lambda x: 2 * float64(x)),
    "columns": (
        columns,
        lambda dt: [random(5, 44, dtype=dt), random(44)],
        lambda x, w: float64(x) * float64(w),
    ),
    "columns with a tail": (
        columns,
        lambda dt: [random(5, 43, dtype=dt), random(43)],
        lambda x, w: float64(x) * float64(w),
    ),
    "row sums": (row_sums, lambda dt: [random(3, 211, dtype=dt)], lambda x: float64(x).sum(1)),
    "staged": (staged, lambda dt: [random(21, 19, dtype=dt), random(21)], staged_truth),
}
EPSILON = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}


def check_close(output, truth, dtype):
    error = np.abs(output.astype(np.float64) - truth)
    assert (error <= EPSILON[dtype] * np.abs(truth) + 1e-5).all(), error.max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CLEAN)
def test_clean_kernels_are_right_in_every_order(name, dtype):
    require("guarded")
    call, arrays, truth = CLEAN[name]
    arrays = arrays(dtype)
    (kernel,) = trace(call(), *arrays)
    for order, guard in EVERY_WAY:
        (output,) = kernel.run(arrays, order=order, guard=guard)
        check_close(output, truth(*arrays), kernel.outputs[0].dtype)
    assert kernel.verified(arrays)[0].tobytes() == output.tobytes()


@pytest.mark.parametrize("lane", ["address", "thread"])
@pytest.mark.parametrize("name", ["columns", "row sums", "staged"])
def test_clean_kernels_are_right_under_sanitizers(name, lane):
    require(lane)
    call, arrays, truth = CLEAN[name]
    arrays = arrays(mx.bfloat16)
    (kernel,) = trace(call(), *arrays)
    check_close(kernel.run(arrays, lane=lane)[0], truth(*arrays), kernel.outputs[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CLEAN)
def test_clean_kernels_keep_to_their_address_spaces(name, dtype):
    require("spaces")
    call, arrays, _ = CLEAN[name]
    (kernel,) = trace(call(), *arrays(dtype))
    assert check_address_spaces(kernel.source) == ""


# --- Planted bugs --------------------------------------------------------------------------------------------------


def changed(body, old, new):
    assert old in body
    return body.replace(old, new)


def run(call, *arrays, **how):
    (kernel,) = trace(call, *arrays)
    return kernel.run(arrays, **how)[0]


def caught(message, call, *arrays, **how):
    with pytest.raises(MSLError, match=message):
        run(call, *arrays, **how)


OUT_OF_BOUNDS = [  # name, what for x[i] or y[i], guard, what is said of which buffer
    ("read past the end", ("x[i]", "x[i + 1]"), "end", r"x \(180 bytes\), byte 180, thread \(44, 0, 0\)"),
    (
        "read before the start",
        ("x[i]", "x[int(i) - 1]"),
        "start",
        r"x \(180 bytes\), byte -4, thread \(0, 0, 0\)",
    ),
    ("read at a wrapped index", ("x[i]", "x[i - 1u]"), "end", r"x \(180 bytes\), byte 17179869180, thread"),
    ("write past the end", ("y[i]", "y[i + 1]"), "end", r"y \(180 bytes\), byte 180, thread \(44, 0, 0\)"),
    ("write before the start", ("y[i]", "y[int(i) - 1]"), "start", r"y \(180 bytes\), byte -4, thread"),
    (
        "write past the end, unguarded",
        ("y[i]", "y[i + 1]"),
        "start",
        r"write outside of y \(180 bytes\), byte 180",
    ),
    ("no test of the tail", ("if (i >= uint(x_shape[0])) return;", ""), "end", r"x \(180 bytes\), byte 180"),
    ("a shape's fourth side", ("x_shape[0]", "x_shape[3]"), "end", r"x_shape \(4 bytes\), byte 12"),
]


@pytest.mark.parametrize(
    ("name", "change", "guard", "message"), OUT_OF_BOUNDS, ids=[row[0] for row in OUT_OF_BOUNDS]
)
def test_out_of_bounds(name, change, guard, message):
    require("guarded")
    call = double(changed(DOUBLE, *change))
    caught(message, call, random(45), guard=guard)


@pytest.mark.parametrize("change", [("x[i]", "x[i + 1]"), ("x[i]", "x[int(i) - 1]"), ("y[i]", "y[i + 1]")])
def test_out_of_bounds_with_its_line(change):
    require("address")
    caught(
        r"heap-buffer-overflow(.|\n)*kernel.metal:10(.|\n)*byte (180|-4), thread",
        double(changed(DOUBLE, *change)),
        random(45),
        lane="address",
    )


def test_a_read_beside_an_array_that_does_not_fault_is_nan():
    require("guarded")
    assert np.isnan(run(double(changed(DOUBLE, "x[i]", "x[int(i) - 1]")), random(45), guard="end")[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unwritten_elements_are_found(dtype):
    require("guarded")
    x = random(45, dtype=dtype)
    x[7] = float("nan")  # a NaN that was written is none that was not
    call = double(changed(DOUBLE, "x_shape[0])", "x_shape[0]) - 3"))
    output = run(call, x)
    assert np.isnan(output[7])
    assert poisoned(output).tolist() == [False] * 42 + [True] * 3
    (kernel,) = trace(call, x)
    with pytest.raises(MSLError, match=r"y was not written: 3 elements, the first at \[42\]"):
        kernel.verified([x])


REGISTERS = """
  const uint i = thread_position_in_grid.x;
  if (i >= uint(x_shape[0])) return;
  float kept[4];
  for (uint k = 0; k < x_shape[0] - 40u; ++k) kept[k] = float(x[i]);
  y[i] = T(2.0f * kept[0]);
"""
MISALIGNED = changed(COLUMNS, "F % 4 == 0", "f + 4 <= F")
UNDEFINED = [
    ("register array", double(REGISTERS), [45], "index out of bounds of a local array at kernel.metal:"),
    ("misaligned vector", columns(MISALIGNED), [5, 43], "misaligned or null access at kernel.metal:"),
    (
        "shift",
        double(changed(DOUBLE, "y[i]", "y[i << (40 + x_shape[0])]")),
        [45],
        "shift out of range at kernel",
    ),
    (
        "overflow",
        double(changed(DOUBLE, "y[i]", "y[x_shape[0] * 2147483647 - i]")),
        [45],
        "signed overflow in *",
    ),
    (
        "float to integer",
        double(changed(DOUBLE, "y[i]", "y[uint(-1e20f * x_shape[0])]")),
        [45],
        "float out of the",
    ),
    ("division", double(changed(DOUBLE, "y[i]", "y[i / (x_shape[0] - 45)]")), [45], "division by zero"),
]


@pytest.mark.parametrize(("name", "call", "shape", "message"), UNDEFINED, ids=[row[0] for row in UNDEFINED])
def test_undefined_behaviour(name, call, shape, message):
    require("guarded")
    arrays = [random(*shape)] + [random(shape[-1])] * (len(shape) - 1)
    caught(message, call, *arrays)


def test_undefined_behaviour_under_the_address_sanitizer():
    require("address")
    caught("runtime error: index 4 out of bounds", double(REGISTERS), random(45), lane="address")
    caught("misaligned address", columns(MISALIGNED), random(5, 43), random(43), lane="address")


BARRIER = "    threadgroup_barrier(mem_flags::mem_threadgroup);\n"
FIRST, _, REST = STAGED.partition(BARRIER)
WITHOUT_BARRIER = {"first": FIRST + REST, "second": FIRST + BARRIER + REST.replace(BARRIER, "")}


@pytest.mark.parametrize("which", WITHOUT_BARRIER)
def test_a_missing_barrier_shows_in_some_order(which):
    require("guarded")
    arrays = [random(21, 19), random(21)]
    (kernel,) = trace(staged(WITHOUT_BARRIER[which]), *arrays)
    with pytest.raises(MSLError, match=r"y (depends on the order in which threads run|was not written)"):
        kernel.verified(arrays)


@pytest.mark.parametrize("which", WITHOUT_BARRIER)
def test_a_missing_barrier_is_a_data_race(which):
    require("thread")
    caught(
        r"data race(.|\n)*kernel.metal:",
        staged(WITHOUT_BARRIER[which]),
        random(21, 19),
        random(21),
        lane="thread",
    )


def test_two_threads_that_write_one_element_race():
    require("thread")
    caught("data race", double(changed(DOUBLE, "y[i]", "y[i / 30]")), random(45), lane="thread")


TWO_BARRIERS = """
  if (thread_position_in_grid.x < 3) {
    threadgroup_barrier(mem_flags::mem_none);
    y[0] = 1.0f;
  } else {
    threadgroup_barrier(mem_flags::mem_none);
  }
"""
SOME_RETURN = changed(STAGED, "  threadgroup float", "  if (f >= F) return;\n  threadgroup float")
SOME_LANES = changed(ROW_SUMS, "sum = simd_sum(sum);\n  if", "if (own != 3) sum = simd_sum(sum);\n  if")


def test_a_barrier_that_not_all_reach():
    require("guarded")
    barrier = r"wait for one another forever: thread \(\d+, 0, 0\) is at the barrier of line \d+; thread "
    caught(barrier + r"\(\d+, 0, 0\) has returned", staged(SOME_RETURN), random(21, 19), random(21))
    caught(barrier + r"\(\d+, 0, 0\) is at the barrier of line", double(TWO_BARRIERS), random(45))
    caught(
        "forever: .* is in the simd function of line .* is at the barrier",
        row_sums(SOME_LANES),
        random(3, 211),
    )


STAGING_OVERRUN = changed(STAGED, "j < count; j +=", "j < count + (n0 == 0 ? 2 : 0); j +=")
THROUGH_POINTER = changed(
    changed(STAGING_OVERRUN, "staged[j] = ", "to[j] = "),
    "  for (uint n0",
    "  threadgroup float* to = staged;\n  for (uint n0",
)


def test_an_overrun_of_threadgroup_memory():
    arrays = [random(21, 19), random(21)]
    require("guarded")
    caught("index out of bounds of a local array", staged(STAGING_OVERRUN), *arrays)
    caught(r"threadgroup array staged \(32 bytes\), byte 32, thread", staged(THROUGH_POINTER), *arrays)
    require("address")
    caught(
        r"heap-buffer-overflow(.|\n)*threadgroup array staged \(32 bytes\), byte 32",
        staged(THROUGH_POINTER),
        *arrays,
        lane="address",
    )


def test_threadgroup_memory_holds_nothing_at_first():
    require("guarded")
    own = "  threadgroup float kept[1];\n  y[thread_position_in_grid.x] = kept[0];\n  kept[0] = 1.0f;\n"
    assert np.isnan(run(double(own, grid=(45, 1, 1), threadgroup=(1, 1, 1)), random(45))).all()
    body = changed(ROW_SUMS, "thread_index_in_simdgroup < simdgroups_per_threadgroup", "true")
    assert np.isnan(run(row_sums(body), random(3, 211))).all()


def test_limits_of_a_threadgroup():
    require("guarded")
    caught(
        "staged: more than 32 KiB", staged(changed(STAGED, "[ROWS]", "[8193]")), random(21, 19), random(21)
    )
    caught("more than 1024 threads", row_sums(threads=1025), random(3, 211))


DEEP = """
  float large[33000];
  for (uint i = 0; i < 33000; ++i) large[i] = x[0];
  threadgroup_barrier(mem_flags::mem_none);
  y[0] = large[thread_position_in_grid.x];
"""


def test_a_kernel_that_overflows_its_stack():
    require("guarded")
    caught("signal 11", double(DEEP), random(45))


FOREVER = "  while (x[thread_position_in_grid.x] > -1e30f) y[thread_position_in_grid.x] += 1.0f;\n"


@pytest.mark.parametrize("lane", ["guarded", "address"])
def test_a_kernel_that_never_ends(lane, monkeypatch):
    require(lane)
    monkeypatch.setattr(kernel_module, "SECONDS", 1)
    caught("it still runs after 1 seconds", double(FOREVER, grid=(45, 1, 1)), random(45), lane=lane)


# --- What C++ lets through and Metal does not ----------------------------------------------------------------------

REJECTED = [  # header, body of a kernel, what is said
    ("", "y[i] = T(2.0 * x[i]);", "implicit conversion from .float. to .double."),
    ("", "double a = x[i]; y[i] = T(a);", "kernel.metal:8: Metal has no `double`"),
    ("", "y[i] = T(std::exp(x[i]));", "Metal has no `std::`"),
    ("", "y[i] = T(metal::expm1(x[i]));", ".expm1. is not a member of .metal."),
    ("", "y[i] = T(metal::erf(x[i]));", ".erf. is not a member of .metal."),
    ("", "auto twice = [&](float a) { return 2.0f * a; }; y[i] = T(twice(x[i]));", "no lambda expressions"),
    ("", "const device float* p = (const device float*)y; y[i] = p[i];", "cast `.*` as a reinterpret_cast"),
    ("", "float* p = &scratch; y[i] = *p;", "a pointer or reference needs an address space: `float[*]`"),
    (
        "inline void set(float& a) { a = 1.0f; }\n",
        "set(scratch); y[i] = T(scratch);",
        "1: a pointer or reference needs",
    ),
    (
        "template <typename U>\ninline void set(U& a) { a = 1; }\n",
        "y[i] = x[i];",
        "2: a pointer or reference needs",
    ),
    (
        "constexpr float TWO = 2.0f;\n",
        "y[i] = T(TWO * x[i]);",
        "outside of functions must be `constant`: `constexpr",
    ),
    (
        "namespace n {\nfloat two = 2.0f;\n}\n",
        "y[i] = x[i];",
        "2: a variable outside of functions must be `constant`",
    ),
    ("", "threadgroup float a[4], b[4]; y[i] = x[i];", "declare one threadgroup variable a statement"),
    (
        "inline float f() { threadgroup float a[4]; return a[0]; }\n",
        "y[i] = x[i];",
        "belongs into the kernel itself",
    ),
    ("", "y[i] = metal::exp(bfloat(x[i]));", "no matching function"),
    ("", "y[i] = metal::min(i, 3);", "no matching function"),
    ("", "float a; y[i] = T(a);", "uninitialized"),
]


@pytest.mark.parametrize(("header", "statement", "message"), REJECTED, ids=[row[1] for row in REJECTED])
def test_what_metal_rejects(header, statement, message):
    require("guarded")
    body = f"  const uint i = thread_position_in_grid.x;\n  float scratch = 0.0f;\n  {statement}\n"
    caught(message, double(body, header=header, grid=(45, 1, 1)), random(45))


ACCEPTED = """
// double trouble: (device float*) std:: float& goto
#define TWICE(x) (2.0f * (x))
constant float TABLE[3] = {1.0f, 2.0f, 3.0f};
static constexpr constant float HALF = 0.5f;
using Four = vec<float, 4>;
namespace inner {
struct Pair {
  float a = 1.0f, b = 2.0f;
  float sum() const { return a * b + a; }
};
inline bool operator==(Pair a, Pair b) { return a.a == b.a; }
template <typename T, int N = 2>
inline float total(thread const T* list, float start = 0.0f) {
  float sum = start;
  for (int i = 0; i < N && sum >= start; ++i) sum += float(list[i]);
  return sum;
}
inline void set(device Pair& to, thread float4& four) {
  to.a = four.x * HALF;
}
}  // namespace inner
"""


def test_what_metal_accepts():
    assert translate.violations(ACCEPTED) == []
    (found,) = translate.violations(ACCEPTED + "float after = 1.0f;\n")
    assert found.startswith(f"kernel.metal:{ACCEPTED.count(chr(10)) + 1}: a variable outside")


WRONG_SPACES = [  # body, arrays: g++ sees nothing wrong in them
    ("y[i] = load(x);", [4]),  # fewer than 8 elements: MLX makes the input constant
    ("y[i] = load(reinterpret_cast<const device float*>(x_shape));", [45]),
    ("threadgroup float t[64]; t[i] = x[i]; y[i] = load(t);", [45]),
    ("threadgroup float t[64]; t[i] = x[i]; y[i] = load_own(t);", [45]),
    ("const device float* p = &TABLE[0]; y[i] = p[i % 3];", [45]),
]
LOAD = """
constant float TABLE[3] = {1.0f, 2.0f, 3.0f};
inline float load(const device float* p) { return p[0]; }
inline float load_own(thread const float* p) { return p[0]; }
"""


@pytest.mark.parametrize(("statement", "shape"), WRONG_SPACES, ids=[row[0] for row in WRONG_SPACES])
def test_wrong_address_spaces(statement, shape):
    require("spaces")
    body = f"  const uint i = thread_position_in_grid.x;\n  {statement}\n"
    (kernel,) = trace(double(body, header=LOAD, grid=(4, 1, 1)), random(*shape))
    assert "kernel.metal:" in check_address_spaces(kernel.source)
    require("guarded")
    kernel.run([random(*shape)])


ALL_SPACES = """
  const uint i = thread_position_in_grid.x;
  threadgroup float t[64];
  t[i] = x[i];
  threadgroup float* p = t;
  const float4 v = float4(x[0], x[1], x[2], x[3]) * vec<float, 4>(2.0f);
  y[i] = T(p[i] + TABLE[i % 3] + load(x) + v.x + metal::select(v, -v, v < float4(0.0f)).y);
"""


def test_a_right_use_of_every_address_space():
    require("spaces")
    (kernel,) = trace(double(ALL_SPACES, header=LOAD, grid=(4, 1, 1)), random(45))
    assert check_address_spaces(kernel.source) == ""


# --- The shim's arithmetic -----------------------------------------------------------------------------------------

X = np.concatenate(
    [np.linspace(-20, 20, 4001), np.logspace(-30, 30, 601), -np.logspace(-30, 30, 601)]
).astype(np.float32)
POSITIVE = np.abs(X[X != 0])
FUNCTIONS = [  # expression, x, float64 truth
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


def test_a_function_of_a_header():
    require("guarded")
    x = np.linspace(-3, 3, 12).reshape(3, 4).astype(np.float32)
    np.testing.assert_allclose(elementwise(POWER, "power<3>(x)", x), x**3, rtol=1e-6)


def test_nan_and_infinity():
    require("guarded")
    x = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    expected = {
        "metal::max(x, 0.0f)": [0, np.inf, 0, 1],  # drops a NaN, as Metal may
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
def test_rounding_to_half_types(dtype):
    require("guarded")
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32)
    ties = bits & 0xFFFF0000 | 0x8000  # half way between two numbers of bfloat16
    x = mx.array(np.concatenate([bits.view(np.float32), ties.view(np.float32), X]))
    call = double(
        "  y[thread_position_in_grid.x] = T(x[thread_position_in_grid.x]);\n",
        template=[("T", dtype)],
        grid=(x.size, 1, 1),
        output_dtypes=[dtype],
    )
    expected = np.array(x.astype(dtype).astype(mx.float32))
    np.testing.assert_array_equal(run(call, x).astype(np.float32), expected)


def test_half_types_round_after_every_operation():
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


def test_rough_functions_miss_by_the_ulps_that_metal_allows():
    require("guarded")
    x = mx.array(X[np.abs(X) < 80])
    call = double(
        "  y[thread_position_in_grid.x] = metal::precise::exp(x[thread_position_in_grid.x]);\n",
        template=[],
        grid=(x.size, 1, 1),
    )
    missed = ulps(run(call, x, rough=True), np.exp(float64(x)))
    assert 3.5 < missed.max() <= 4.6
    assert ulps(run(call, x), np.exp(float64(x))).max() <= 1


# --- Positions, simdgroups, orders ---------------------------------------------------------------------------------

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
        assert np.isnan(own[3, -3:]).all()  # there is no such lane
        np.testing.assert_allclose(own[4], lanes[2] + np.arange(begin, end).sum(), rtol=1e-5)


def test_orders_differ():
    require("guarded")
    call = double("  y[0] = T(thread_position_in_grid.x);\n", output_shapes=[(1,)])
    last = {order: run(call, random(45), order=order)[0] for order in ("forward", "reverse", "shuffled")}
    assert last["forward"] == 63
    assert last["reverse"] == 0
    assert 0 < last["shuffled"] < 63
    assert last["shuffled"] == run(call, random(45), order="shuffled")[0]  # and again the same


# --- Tracing, the cache, and calls from elsewhere ------------------------------------------------------------------


def test_trace_finds_every_kernel_and_its_parameters():
    first = double(changed(DOUBLE, "return;", "return;\n  if (x_ndim > 2 || x_strides[0] > 9) return;"))

    def both(x, s):
        (y,) = first(x + 1)
        return kernel_call(
            "y[thread_position_in_grid.x] = x[thread_position_in_grid.x] * s;",
            inputs=("x", "s"),
            name="scaled",
            grid=(45, 1, 1),
            threadgroup=(45, 1, 1),
            output_shapes=[(45,)],
            output_dtypes=[mx.float32],
        )(y, s)

    one, two = trace(both, random(45), mx.array(3.0))
    assert ("planted" in one.name, "scaled" in two.name) == (True, True)
    assert (one.grid, one.threadgroup) == ((64, 1, 1), (24, 1, 1))
    assert one.inputs == (Operand("x", (45,), mx.float32, ("shape", "strides", "ndim")),)
    assert [operand.name for operand in (*two.inputs, *two.outputs)] == ["x", "s", "y"]
    require("guarded")
    x = random(45)
    np.testing.assert_allclose(
        two.run([mx.array(one.run([x])[0]), mx.array(3.0)])[0], 6 * float64(x), rtol=1e-6
    )
    with pytest.raises(
        ValueError, match=r"x is mlx.core.float32 .45.., and was given mlx.core.float32 .44.."
    ):
        one.run([random(44)])
    with pytest.raises(ValueError, match="takes 2 arrays, and was given 1"):
        two.run([x])


def test_one_text_is_compiled_once(monkeypatch, tmp_path):
    require("guarded")
    commands = []
    real = subprocess.run
    monkeypatch.setattr(build, "cache", lambda: tmp_path)
    monkeypatch.setattr(
        build.subprocess, "run", lambda command, **kw: commands.append(command) or real(command, **kw)
    )
    call = columns(COLUMNS + "// compiled nowhere else\n")
    kernels = [trace(call, random(n, f), random(f))[0] for n, f in ((5, 44), (3, 9), (7, 43))]
    kernels += [trace(call, random(5, 44, dtype=mx.float16), random(44))[0]]
    build_all(kernels)
    build_all(kernels)
    assert len(commands) == 2


def test_an_emulated_kernel_stands_in_for_the_real_one():
    require("guarded")
    kernel = emulated(mx.fast.metal_kernel("double", ["x"], ["y"], DOUBLE))

    @mx.custom_function
    def doubled(x):
        launch = {"grid": (64, 1, 1), "threadgroup": (24, 1, 1), "template": [("T", x.dtype)]}
        return kernel(inputs=[x], output_shapes=[x.shape], output_dtypes=[x.dtype], **launch)[0]

    @doubled.vjp
    def doubled_vjp(x, cotangent, _):
        return doubled(cotangent)

    x = random(45, dtype=mx.bfloat16)
    value, gradient = mx.value_and_grad(lambda x: mx.sum(mx.square(doubled(x))).astype(mx.float32))(x)
    assert gradient.dtype == mx.bfloat16
    np.testing.assert_allclose(float64(gradient), 8 * float64(x), rtol=0.01)
    assert value.item() == pytest.approx(4 * (float64(x) ** 2).sum(), rel=0.02)


def test_without_a_compiler_tests_are_skipped(tmp_path):
    code = (
        "from tests.msl.lane import unavailable; print(unavailable('guarded')); print(unavailable('spaces'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path), "MSL_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    guarded, spaces = done.stdout.splitlines()
    assert "No such file or directory: 'g++'" in guarded or sys.platform != "linux"
    assert "no clang++ is installed" in spaces


def test_a_kernel_is_a_value():
    (kernel,) = trace(double(), random(45))
    assert isinstance(kernel, Kernel)
    assert kernel == trace(double(), random(45))[0]
