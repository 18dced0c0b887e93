"""Failures of MLX's device, a GPU or a CPU: how to recognize them, what they mean, and what to do.

The patterns come from MLX's source (0.32), in mlx/backend: metal/{device,allocator}.cpp; cuda/{utils,allocator,
jit_module,cublas_utils,cudnn_utils}.cpp and cuda/lru_cache.h; cpu/compiled.cpp. When a command buffer fails, MLX passes
on the text of macOS, such as "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"; on CUDA,
that of cudaGetErrorString.

MLX raises such an error once, as a RuntimeError of the next operation on that GPU, and clears it. Later reads of the
same arrays succeed and return garbage, so nothing may be saved after such an error.
"""

import re
from typing import Literal, NamedTuple

from nalora_mlx.core.errors import first_line

# What a training run can change to need less.
Saving = Literal["batch", "checkpointing", "length", "quantization", "layers"]


class DeviceFault(NamedTuple):
    """A kind of failure.

    Attributes:
        pattern: regular expression for the message of the exception; case does not matter.
        cause: what happened, as a clause.
        remedy: what to do, in any command, as a clause.
        savings: settings of a training run that make it less likely.
        retry: whether the same command may succeed next time.
    """

    pattern: str
    cause: str
    remedy: str
    savings: tuple[Saving, ...] = ()
    retry: bool = True


OUT_OF_MEMORY = DeviceFault(
    r"\[(metal::)?malloc|insufficient memory \(|^out of memory|: out of memory|bad_alloc|ErrorOutOfMemory"
    r"|ALLOC\w*_FAILED"
    r"|cublas\w*\(.* failed with code: 3\b",
    "out of memory",
    "use a smaller or a quantized model, or fewer tokens at a time",
    ("batch", "checkpointing", "length", "quantization", "layers"),
    retry=False,
)

# The first one whose pattern matches is used.
FAULTS = (
    DeviceFault(
        r"greater than the maximum allowed buffer size",
        "one array would be larger than the GPU allows",
        "use fewer tokens at a time",
        ("batch", "length"),
        retry=False,
    ),
    DeviceFault(
        r"Resource limit \(\d+\) exceeded",
        "too many arrays at once, however small: MLX limits their number on a Mac",
        "use fewer tokens at a time",
        ("batch", "checkpointing", "length"),
        retry=False,
    ),
    OUT_OF_MEMORY,
    DeviceFault(
        r"Impacting ?Interactivity|GPU Timeout|CallbackErrorTimeout|GPU Hang|CallbackErrorHang",
        "macOS ended work on the GPU that blocked the screen for too long",
        "switch the display off (pmset displaysleepnow) and close programs that draw a lot",
        ("batch", "length"),
    ),
    DeviceFault(
        r"for causing prior/excessive GPU errors|SubmissionsIgnored|victim of GPU error|InnocentVictim",
        "macOS discarded work on the GPU after an earlier GPU error, perhaps of another program",
        "run it again; if that does not help, restart the Mac",
    ),
    DeviceFault(
        r"the launch timed out",
        "the driver ended work on the GPU that blocked its display for too long",
        "use a GPU without a display",
        ("batch", "length"),
    ),
    DeviceFault(
        r"Address Fault|PageFault|Invalid Resource \(|ErrorInvalidResource"
        r"|illegal memory access|illegal instruction|misaligned address|unspecified launch failure|device-side assert",
        "a GPU kernel accessed memory that it may not",
        "check the kernels with nalora doctor, and report this error if it comes back",
    ),
    DeviceFault(
        r"Cache thrashing is happening",
        "MLX's cache of CUDA graphs or plans is too small for this run",
        "set the environment variable that the message names to ten times its value",
    ),
    DeviceFault(
        r"\[metal::\w+\] Unable to (build metal library|load kernel|load function)"
        r"|Failed to (compile kernel|load compiled \S+ kernel)"
        r"|nvrtc\w*\(.* failed|no kernel image is available|PTX was compiled with an unsupported toolchain",
        "MLX cannot compile a kernel for this GPU",
        "update MLX and the system; --debug shows the compiler's message",
    ),
    DeviceFault(
        r"\[Compile::eval_cpu\] Failed",
        "MLX cannot compile code for this CPU",
        "install a C++ compiler (g++ or clang++), or set MLX_DISABLE_COMPILE=1; --debug shows the compiler's message",
    ),
    DeviceFault(  # the other errors of Metal and CUDA
        r"Command buffer execution failed|^cu\w+\(.*\) failed(:| with code)|CUDNN_STATUS",
        "work on the GPU failed",
        "run it again; if that does not help, check this machine with nalora doctor",
    ),
)


def find_fault(error: BaseException) -> DeviceFault | None:
    """Return the kind of failure that an exception of MLX means, or None."""
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    if not isinstance(error, RuntimeError):
        return None
    message = str(error)
    return next((fault for fault in FAULTS if re.search(fault.pattern, message, re.IGNORECASE)), None)


def describe(fault: DeviceFault, error: BaseException) -> str:
    """Return the cause of a failure, with MLX's own words."""
    return f"{fault.cause} ({first_line(error)})"


def explain(error: BaseException) -> str | None:
    """Return cause and remedy of a failure in one line; None for any other exception."""
    fault = find_fault(error)
    return None if fault is None else f"{describe(fault, error)}; {fault.remedy}"
