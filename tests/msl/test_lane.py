"""Correct kernels in every order and dtype, and planted bugs that each lane must catch."""

import mlx.core as mx
import numpy as np
import pytest

from tests.msl import kernel as kernel_module
from tests.msl.lane import MSLError, check_address_spaces, poisoned, require, slow_except, trace
from tests.msl.planted import (
    COLUMNS,
    DOUBLE,
    DTYPES,
    ROW_SUMS,
    STAGED,
    caught,
    changed,
    columns,
    double,
    float64,
    random,
    row_sums,
    run,
    staged,
    staged_truth,
)

# --- Correct kernels --------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("dtype", slow_except(DTYPES, lambda dtype: dtype == mx.bfloat16), ids=str)
@pytest.mark.parametrize("name", CLEAN)
def test_clean_kernels_are_correct_in_every_order(name, dtype):
    require("guarded")
    call, arrays, truth = CLEAN[name]
    arrays = arrays(dtype)
    (kernel,) = trace(call(), *arrays)
    for order, guard in kernel_module.WAYS:
        (output,) = kernel.run(arrays, order=order, guard=guard)
        check_close(output, truth(*arrays), kernel.outputs[0].dtype)
    assert kernel.verified(arrays)[0].tobytes() == output.tobytes()


@pytest.mark.parametrize("lane", ["address", "thread"])
@pytest.mark.parametrize(
    "name", slow_except(["columns", "row sums", "staged"], lambda name: name == "staged")
)
def test_clean_kernels_are_correct_under_sanitizers(name, lane):
    require(lane)
    call, arrays, truth = CLEAN[name]
    arrays = arrays(mx.bfloat16)
    (kernel,) = trace(call(), *arrays)
    check_close(kernel.run(arrays, lane=lane)[0], truth(*arrays), kernel.outputs[0].dtype)


@pytest.mark.parametrize("dtype", slow_except(DTYPES, lambda dtype: dtype == mx.bfloat16), ids=str)
@pytest.mark.parametrize("name", CLEAN)
def test_clean_kernels_use_address_spaces_correctly(name, dtype):
    require("spaces")
    call, arrays, _ = CLEAN[name]
    (kernel,) = trace(call(), *arrays(dtype))
    assert check_address_spaces(kernel.source) == ""


# --- Planted bugs ------------------------------------------------------------------------------------------------

OUT_OF_BOUNDS = [  # name, replacement in DOUBLE, guard, expected message
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
    ("no check of the tail", ("if (i >= uint(x_shape[0])) return;", ""), "end", r"x \(180 bytes\), byte 180"),
    ("a shape's fourth dimension", ("x_shape[0]", "x_shape[3]"), "end", r"x_shape \(4 bytes\), byte 12"),
]


@pytest.mark.parametrize(
    ("name", "change", "guard", "message"), OUT_OF_BOUNDS, ids=[row[0] for row in OUT_OF_BOUNDS]
)
def test_out_of_bounds(name, change, guard, message):
    require("guarded")
    call = double(changed(DOUBLE, *change))
    caught(message, call, random(45), guard=guard)


@pytest.mark.parametrize("change", [("x[i]", "x[i + 1]"), ("x[i]", "x[int(i) - 1]"), ("y[i]", "y[i + 1]")])
def test_out_of_bounds_reports_the_line(change):
    require("address")
    caught(
        r"heap-buffer-overflow(.|\n)*kernel.metal:10(.|\n)*byte (180|-4), thread",
        double(changed(DOUBLE, *change)),
        random(45),
        lane="address",
    )


def test_a_read_outside_an_array_that_does_not_fault_is_nan():
    require("guarded")
    assert np.isnan(run(double(changed(DOUBLE, "x[i]", "x[int(i) - 1]")), random(45), guard="end")[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unwritten_elements_are_found(dtype):
    require("guarded")
    x = random(45, dtype=dtype)
    x[7] = float("nan")  # a NaN that was written counts as written
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
def test_a_missing_barrier_changes_results_in_some_order(which):
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


def test_two_threads_writing_one_element_are_a_data_race():
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


def test_a_barrier_that_not_all_threads_reach():
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


def test_threadgroup_memory_is_uninitialized():
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
    caught("still running after 1 seconds", double(FOREVER, grid=(45, 1, 1)), random(45), lane=lane)


def test_orders_differ():
    require("guarded")
    call = double("  y[0] = T(thread_position_in_grid.x);\n", output_shapes=[(1,)])
    last = {order: run(call, random(45), order=order)[0] for order in ("forward", "reverse", "shuffled")}
    assert last["forward"] == 63
    assert last["reverse"] == 0
    assert 0 < last["shuffled"] < 63
    assert last["shuffled"] == run(call, random(45), order="shuffled")[0]  # deterministic
