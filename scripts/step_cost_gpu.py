"""The operations that a GPU runs as one kernel, in graphs that are traced on a machine without one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from nalora_mlx.ops import custom_function as custom
from nalora_mlx.ops.custom_function import custom_function
from nalora_mlx.ops.device_sizes import SIZES, DeviceSizes, using_sizes
from nalora_mlx.ops.kernels import backend


@contextmanager
def as_gpu(kind: str, sizes: DeviceSizes | None = None, attention: str = "ours") -> Iterator[None]:
    """Trace what a GPU would run, on a machine that has none.

    On a GPU, MLX has RMSNorm, RoPE and, with cuDNN, attention as single kernels. On a CPU, it traces their parts. Here,
    custom kernels with the same inputs and outputs replace them. Our own kernels are traced too, but not run.

    Args:
        kind: "metal" or "cuda".
        sizes: of the pieces of our computations; those of the kind if None.
        attention: "ours", or "mlx" to leave attention to MLX.
    """
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(using_sizes(sizes or SIZES[kind]))
        enter(patch.object(mx, "default_device", lambda: mx.Device(mx.gpu)))
        enter(patch.object(backend, "backend", lambda: "metal"))
        enter(patch.object(backend, "verified", _Everything()))
        enter(patch.object(custom_function, "__call__", _with_barrier))
        enter(patch.object(mx.fast, "rms_norm", _rms_norm))
        enter(patch.object(mx.fast, "rope", _rope))
        if kind == "cuda":
            composed = mx.fast.scaled_dot_product_attention
            enter(patch.object(mx.fast, "scaled_dot_product_attention", _attention(composed)))
        if attention == "mlx":
            enter(patch("nalora_mlx.training.step.lean_attention", ExitStack))
        yield


class _Everything:
    def __contains__(self, _: object) -> bool:
        return True


def _with_barrier(function: custom_function, *arrays: mx.array) -> Any:
    """Call a custom function, whose outputs depend on all its inputs, as those of MLX's primitive do."""
    replacement = custom._replacement.get()
    if replacement is None or function.gradient is None:
        return function._mlx(*arrays)

    def held(*arrays: mx.array) -> Any:
        outputs = function.function(*arrays)
        single = isinstance(outputs, mx.array)
        results = mx.depends([outputs] if single else list(outputs), list(arrays))
        return results[0] if single else type(outputs)(results)

    return replacement(held, function.gradient, arrays)


@cache
def _stand_in(name: str, inputs: int, outputs: int) -> Callable[..., Any]:
    names = [f"x{i}" for i in range(inputs)], [f"y{i}" for i in range(outputs)]
    return mx.fast.metal_kernel(name, *names, source="")


def _kernel(name: str, inputs: Sequence[mx.array], outputs: Sequence[mx.array]) -> list[mx.array]:
    """Return arrays like `outputs`, computed by a kernel of this name."""
    return _stand_in(name, len(inputs), len(outputs))(
        inputs=list(inputs),
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[a.shape for a in outputs],
        output_dtypes=[a.dtype for a in outputs],
    )


def _differentiable(name: str, arrays: Sequence[mx.array], output: mx.array) -> mx.array:
    """Return an array like `output` from a kernel; its gradient is a kernel that returns one for each input."""
    function = custom_function(lambda *arrays: _kernel(name, arrays, [output])[0])

    def gradient(primals: Any, cotangent: Any, result: Any) -> list[mx.array]:
        primals = [primals] if isinstance(primals, mx.array) else list(primals)
        return _kernel(f"{name}_vjp", [*primals, result, cotangent], primals)

    return function.vjp(gradient)(*arrays)


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float, stream: Any = None) -> mx.array:
    weight = mx.ones(x.shape[-1:], x.dtype) if weight is None else weight
    return _differentiable("rms_norm", [x, weight], x)


def _rope(x: mx.array, dims: int, *, freqs: mx.array | None = None, **_: Any) -> mx.array:
    return _differentiable("rope", [x], x)


def _attention(composed: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return attention as MLX's CUDA backend runs it, by cuDNN where that takes the arguments."""

    def call(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **others: Any
    ) -> mx.array:
        narrow = max(q.shape[-1], v.shape[-1]) <= 128 and q.dtype in (mx.float16, mx.bfloat16)
        if not narrow or q.shape[2] % 128 or isinstance(mask, mx.array):
            return composed(q, k, v, scale=scale, mask=mask, **others)
        output = mx.broadcast_to(mx.array(0, q.dtype), (*q.shape[:-1], v.shape[-1]))
        return _differentiable("attention", [q, k, v], output)

    return call
