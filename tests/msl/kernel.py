"""A traced kernel, and how each lane runs it."""

import ctypes
import re
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from . import translate
from .build import MSLError, build, clean_environment, fixed_addresses, guarded_runtime, loaded

ORDERS = ("forward", "reverse", "shuffled")
GUARDS = ("end", "start")
WAYS = (("forward", "end"), ("reverse", "start"), ("shuffled", "end"))
SECONDS = 300  # time limit of a kernel
# Lines kept from a sanitizer's report: the verdict, and stack frames in the kernel.
FAULT = re.compile(r"^msl:|(?:ERROR|WARNING): \w+Sanitizer|runtime error:|#\d+ .*kernel\.metal:\d+")
FRAME = re.compile(r"(#\d+) .*(kernel\.metal:\d+).*")
NUMPY = {
    mx.float32: np.float32,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,  # as bits
    mx.int32: np.int32,
    mx.uint32: np.uint32,
    mx.int64: np.int64,
    mx.uint64: np.uint64,
    mx.uint8: np.uint8,
    mx.bool_: np.bool_,
}
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Operand:
    """An input or output array of a kernel."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    extras: tuple[str, ...] = ()  # which of shape, strides and ndim the kernel uses


@dataclass(frozen=True)
class Kernel:
    """A custom kernel of a traced function: the source that Metal would compile, and its launch."""

    name: str
    source: str
    grid: Triple
    threadgroup: Triple
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]

    def run(
        self,
        arrays: Sequence[mx.array],
        *,
        order: str = "forward",
        guard: str = "end",
        lane: str = "guarded",
        rough: bool = False,
    ) -> list[np.ndarray]:
        """Run the kernel and return its outputs, with bfloat16 converted to float32.

        Args:
            arrays: the kernel's inputs, in the order of `inputs`.
            order: in which threadgroups and threads run (in the thread lane: start), one of ORDERS.
            guard: whether arrays of the guarded lane "end" or "start" at an unreadable page. An array that ends there
                is aligned to its elements only, as a slice is in MLX.
            lane: "guarded", "address" or "thread".
            rough: whether exp, tanh and similar functions have the errors that Metal allows.

        Raises:
            MSLError: the source breaks a rule or does not compile, or the kernel did something invalid.
        """
        buffers = self.buffers(arrays)
        path = build(self.source, lane, rough)
        run = self.run_guarded if lane == "guarded" else self.run_program
        run(path, buffers, ORDERS.index(order), GUARDS.index(guard))
        outputs = [buffer.array for buffer in buffers if buffer.is_output]
        return [widened(array, operand.dtype) for array, operand in zip(outputs, self.outputs, strict=True)]

    def verified(self, arrays: Sequence[mx.array], *, rough: bool = False) -> list[np.ndarray]:
        """Run the kernel in the guarded lane in every order, and return its outputs.

        Raises:
            MSLError: as in `run`, or an output depends on the order of threads or was not completely written.
        """
        first, *others = (self.run(arrays, order=order, guard=guard, rough=rough) for order, guard in WAYS)
        for i, operand in enumerate(self.outputs):
            missing = np.argwhere(poisoned(first[i])) if mx.issubdtype(operand.dtype, mx.floating) else ()
            if len(missing):
                where = f"{len(missing)} elements, the first at {missing[0].tolist()}"
                raise MSLError(f"{self.name}: {operand.name} was not written: {where}")
            if any(other[i].tobytes() != first[i].tobytes() for other in others):
                raise MSLError(f"{self.name}: {operand.name} depends on the order in which threads run")
        return first

    def buffers(self, arrays: Sequence[mx.array]) -> list["Buffer"]:
        """Return the kernel's buffers, in the order of its signature."""
        if len(arrays) != len(self.inputs):
            raise ValueError(f"{self.name} takes {len(self.inputs)} arrays, got {len(arrays)}")
        found = []
        for array, operand in zip(arrays, self.inputs, strict=True):
            if array.shape != operand.shape or array.dtype != operand.dtype:
                given = f"{array.dtype} {array.shape}"
                raise ValueError(f"{operand.name} is {operand.dtype} {operand.shape}, got {given}")
            values = stored(array)
            found.append(Buffer(operand.name, values))
            extras = {
                "shape": np.array(operand.shape, np.int32),
                "strides": np.array(values.strides, np.int64) // values.itemsize,
                "ndim": np.array([array.ndim], np.int32),
            }
            found += [Buffer(f"{operand.name}_{extra}", extras[extra]) for extra in operand.extras]
        for operand in self.outputs:
            found.append(Buffer(operand.name, np.empty(operand.shape, NUMPY[operand.dtype]), is_output=True))
        return found

    def run_guarded(self, path: Path, buffers: list["Buffer"], order: int, guard: int) -> None:
        """Run the kernel in this process. It writes outputs into their buffers."""
        rows = (CBuffer * len(buffers))(*[buffer.c_row() for buffer in buffers])
        error = ctypes.create_string_buffer(1024)
        failed = guarded_runtime().msl_run(
            loaded(path).msl_call,
            rows,
            len(buffers),
            (ctypes.c_uint * 3)(*self.grid),
            (ctypes.c_uint * 3)(*self.threadgroup),
            int(translate.waits(self.source)),
            order,
            guard,
            SECONDS,
            error,
            ctypes.c_size_t(len(error)),
        )
        if failed:
            raise self.error(error.value.decode())

    def run_program(self, path: Path, buffers: list["Buffer"], order: int, guard: int) -> None:
        """Run the kernel as a program under a sanitizer. Outputs are written into their buffers."""
        job = struct.pack("<8Q", *self.grid, *self.threadgroup, order, len(buffers))
        job += b"".join(buffer.packed() for buffer in buffers)
        options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
        command, environment = [*fixed_addresses(), str(path)], clean_environment() | options
        try:
            done = subprocess.run(command, input=job, capture_output=True, env=environment, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise MSLError(f"{self.name}: still running after {SECONDS} seconds") from None
        if done.returncode:
            raise self.error(done.stderr.decode(errors="replace"))
        results = memoryview(done.stdout)
        for buffer in buffers:
            if buffer.is_output:
                buffer.array.reshape(-1).view(np.uint8)[:] = results[: buffer.array.nbytes]
                results = results[buffer.array.nbytes :]

    def error(self, report: str) -> MSLError:
        """Return an error with the lines of a report that matter, and the source line that they name."""
        lines = report.splitlines()
        lines = [line for line in lines if FAULT.search(line)] or lines[:3]
        message = "\n".join(FRAME.sub(r"\1 \2", line.strip()) for line in lines)
        if place := re.search(r"kernel\.metal:(\d+)", message):
            message += "\n  " + self.source.splitlines()[int(place[1]) - 1].strip()
        return MSLError(f"{self.name}: {message}")


class CBuffer(ctypes.Structure):
    """A buffer in the layout of guarded.cc."""

    _fields_ = [
        ("host", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("is_output", ctypes.c_int),
    ]


@dataclass
class Buffer:
    """A buffer that is bound to a kernel."""

    name: str
    array: np.ndarray
    is_output: bool = False

    def c_row(self) -> CBuffer:
        return CBuffer(self.array.ctypes.data, self.array.nbytes, self.name.encode(), self.is_output)

    def packed(self) -> bytes:
        """Return the buffer in the format that program.cc reads."""
        name = self.name.encode()
        row = struct.pack("<Q", len(name)) + name + struct.pack("<2Q", self.array.nbytes, self.is_output)
        return row if self.is_output else row + self.array.tobytes()


def poisoned(output: np.ndarray) -> np.ndarray:
    """Return which elements of an output were never written, or were computed from such elements.

    They have all bits set: a NaN that arithmetic does not produce, or for integers -1 or the largest value.
    """
    bits = output.view(f"u{output.itemsize}")
    found = bits == np.iinfo(bits.dtype).max
    if output.dtype == np.float32:
        found |= bits == 0xFFFF0000  # bfloat16, widened
    return found


def stored(array: mx.array) -> np.ndarray:
    """Return the array as it is stored in memory, with bfloat16 as bits."""
    return np.ascontiguousarray(np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array))


def widened(array: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Convert bfloat16 bits to float32; leave other arrays unchanged."""
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == mx.bfloat16 else array
