"""Run the text that MLX would hand to Metal on the CPU, over the whole grid, with every access watched.

    (kernel,) = trace(call, *arrays)     # nothing is run, and MLX needs no Metal for it
    outputs = kernel.verified(arrays)    # MSLError where the kernel does what it may not

Three lanes run a kernel:

guarded  in this process: unreadable pages at both sides of each array, NaN in all that is to be written, undefined
         behaviour trapped, and threads as fibers, in three orders
address  a program under the address sanitizer: the same, with the line of a bad access
thread   a program with real threads under the thread sanitizer: races that no order shows

and `check_address_spaces` asks clang what Metal says of address spaces. All lanes hold the text to rules of Metal that
no C++ compiler knows (translate.py). They prove arithmetic, indices, bounds and barriers; not that Apple's compiler
takes the text, nor its speed.

$MSL_CACHE is where compiled kernels are kept (or a directory for temporary files), $MSL_CXX the compiler (or g++).
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
    """Every custom kernel that fn(*arrays) reaches, in order; nothing is run.

    A graph with mx.custom_function or mx.checkpoint in it cannot be exported: trace the call of the kernel itself.
    """
    nodes: list[dict] = []
    mx.export_function(nodes.append, fn, *arrays)
    return [kernel_of(node) for node in nodes if node.get("name") == "CustomKernel"]


def kernel_of(node: dict) -> Kernel:
    """The kernel of an exported node."""
    name, source, *sizes, extras = node["arguments"][:9]
    _, parameters = translate.signature(source)
    names = iter(p.name for p in parameters if p.attribute.startswith("buffer"))
    inputs = []
    for (_, shape, dtype), wanted in zip(node["inputs"], extras, strict=True):
        taken = tuple(extra for extra, want in zip(EXTRAS, wanted, strict=True) if want and shape)
        inputs.append(Operand(next(names), shape, dtype, taken))
        for _ in taken:
            next(names)
    outputs = [Operand(next(names), shape, dtype) for _, shape, dtype in node["outputs"]]
    return Kernel(name, source, tuple(sizes[:3]), tuple(sizes[3:]), tuple(inputs), tuple(outputs))


def emulated(kernel: Callable) -> Callable:
    """The same call as an mx.fast.metal_kernel, but run by the guarded lane, so that the code around it runs too.

    Its inputs are evaluated: it works under mx.vjp and mx.grad, and not under mx.compile.
    """

    def call(*, inputs: Sequence[mx.array], **launch: Any) -> list[mx.array]:
        (traced,) = trace(lambda *arrays: kernel(inputs=list(arrays), **launch), *inputs)
        outputs = traced.verified(inputs)
        return [mx.array(o).astype(spec.dtype) for o, spec in zip(outputs, traced.outputs, strict=True)]

    return call


def elementwise(header: str, expression: str, x: np.ndarray) -> np.ndarray:
    """An expression in the float `x`, with the functions of a header, for every element of float32 x, as float32."""
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
    """Compile many kernels at once; `run` finds them compiled."""
    sources = dict.fromkeys(kernel.source for kernel in kernels)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: build(source, lane), sources))


def require(lane: str) -> None:
    """Skip the test that calls this where a lane cannot run; on Linux under CI, which has the compilers, fail it."""
    if reason := unavailable(lane):
        if sys.platform == "linux" and os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
