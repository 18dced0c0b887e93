"""Run Metal kernels on a CPU over their whole grid, with every memory access checked.

    (kernel,) = trace(call, *arrays)     # runs nothing, and needs no Metal
    outputs = kernel.verified(arrays)    # raises MSLError if the kernel does something invalid

The kernel source is the text that MLX would pass to Metal, compiled as C++. There are three lanes, that is, ways to run
it:

guarded  in this process. Unreadable pages surround each array, outputs are filled with NaN before, undefined behaviour
         traps, and threads run as fibers, in three orders.
address  as a program under the address sanitizer, which reports the line of a bad access.
thread   as a program with real threads under the thread sanitizer, which finds races that no order reveals.

In addition, `check_address_spaces` compiles the kernel with clang, where address spaces are part of the types as in
Metal. Before any of that, translate.py checks rules of Metal that no C++ compiler knows. Together, they check
arithmetic, indices, bounds and barriers. They do not prove that Apple's compiler accepts the source, nor its speed.

Environment variables: MSL_CACHE, the directory of compiled kernels (default: one for temporary files); MSL_CXX, the
compiler (default: g++).
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from . import translate
from .build import MSLError, build, check_address_spaces, unavailable
from .kernel import Kernel, Operand, poisoned

__all__ = [
    "Kernel",
    "MSLError",
    "Operand",
    "build_all",
    "check_address_spaces",
    "elementwise",
    "emulated",
    "poisoned",
    "require",
    "slow_except",
    "trace",
    "unavailable",
]

EXTRAS = ("shape", "strides", "ndim")
ELEMENTWISE = """
[[kernel]] void elementwise(
  const device float* values [[buffer(0)]],
  device float* results [[buffer(1)]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {
  const float x = values[thread_position_in_grid.x];
  results[thread_position_in_grid.x] = EXPRESSION;
}
"""


def trace(fn: Callable, *arrays: mx.array) -> list[Kernel]:
    """Return all custom kernels that fn(*arrays) would run, in order, without running anything.

    A graph that contains mx.custom_function or mx.checkpoint cannot be exported; trace the kernel call itself instead.
    """
    nodes: list[dict] = []
    mx.export_function(nodes.append, fn, *arrays)
    return [to_kernel(node) for node in nodes if node.get("name") == "CustomKernel"]


def to_kernel(node: dict) -> Kernel:
    """Return the kernel of an exported graph node."""
    name, source, *sizes, extras = node["arguments"][:9]
    _, parameters = translate.signature(source)
    names = iter(p.name for p in parameters if p.attribute.startswith("buffer"))
    inputs = []
    for (_, shape, dtype), flags in zip(node["inputs"], extras, strict=True):
        used = tuple(extra for extra, flag in zip(EXTRAS, flags, strict=True) if flag and shape)
        inputs.append(Operand(next(names), shape, dtype, used))
        for _ in used:
            next(names)
    outputs = [Operand(next(names), shape, dtype) for _, shape, dtype in node["outputs"]]
    return Kernel(name, source, tuple(sizes[:3]), tuple(sizes[3:]), tuple(inputs), tuple(outputs))


def emulated(kernel: Callable) -> Callable:
    """Return a function that is called like the given mx.fast.metal_kernel, but runs in the guarded lane.

    It evaluates its inputs, so it works under mx.vjp and mx.grad, but not under mx.compile.
    """

    def call(*, inputs: Sequence[mx.array], **launch: Any) -> list[mx.array]:
        (traced,) = trace(lambda *arrays: kernel(inputs=list(arrays), **launch), *inputs)
        outputs = traced.verified(inputs)
        return [mx.array(o).astype(spec.dtype) for o, spec in zip(outputs, traced.outputs, strict=True)]

    return call


def elementwise(header: str, expression: str, x: np.ndarray) -> np.ndarray:
    """Evaluate a Metal expression of the float `x`, which may call functions of a header, for every element of x."""
    values = np.ascontiguousarray(x, np.float32).reshape(-1)
    count = values.size
    kernel = Kernel(
        "elementwise",
        header + ELEMENTWISE.replace("EXPRESSION", expression),
        (count, 1, 1),
        (1024, 1, 1),
        (Operand("values", (count,), mx.float32),),
        (Operand("results", (count,), mx.float32),),
    )
    return kernel.run([mx.array(values)])[0].reshape(np.shape(x))


def build_all(kernels: Iterable[Kernel], lane: str = "guarded") -> None:
    """Compile kernels in parallel, so that `run` finds them compiled."""
    sources = dict.fromkeys(kernel.source for kernel in kernels)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: build(source, lane), sources))


def slow_except(cases: Iterable[Any], always: Callable[[Any], bool]) -> list[Any]:
    """Return cases for pytest.mark.parametrize, with all marked slow except those that should always run."""
    return [case if always(case) else pytest.param(*_values(case), marks=pytest.mark.slow) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)


def require(lane: str) -> None:
    """Skip the calling test if a lane is unavailable. On Linux under CI, which has the compilers, fail it."""
    if reason := unavailable(lane):
        if sys.platform == "linux" and os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
