"""The choice of kernels: which backend this process uses, and which kernels passed their self-check."""

import os
import warnings
from typing import NamedTuple

import mlx.core as mx

from nalora_mlx.core.errors import InputError
from nalora_mlx.ops.kernels import fused
from nalora_mlx.ops.kernels.fused import Variant
from nalora_mlx.ops.kernels.low_rank import LowRank

ENVIRONMENT = "NALORA_KERNEL"
CHOICES = ("auto", "reference", "metal", "cuda")
REFERENCE = "reference"


class KernelKey(NamedTuple):
    """Everything that identifies a compiled kernel."""

    backend: str  # "metal" or "cuda"
    variant: Variant
    dtype: mx.Dtype  # of the frozen projections' outputs
    low_dtype: mx.Dtype | None  # of the low-rank inputs; None if the kernel computes no low-rank product
    rank: int  # of the low-rank product in the kernel, 0 for none


verified: set[KernelKey] = set()  # kernels that passed their self-check
disabled_backends: set[str] = (
    set()
)  # backends with a kernel that failed; none of their kernels is used any more
reported: set[KernelKey] = set()  # kernels that a warning named because they were not checked


def backend() -> str:
    """Return the backend of this process: "metal", "cuda" or "reference".

    Raises:
        InputError: NALORA_KERNEL names an unknown backend, or one without a device here.
    """
    choice = os.environ.get(ENVIRONMENT, "auto")
    if choice not in CHOICES:
        raise InputError(f"{ENVIRONMENT}={choice}: choose from {', '.join(CHOICES)}")
    if choice == REFERENCE:
        return REFERENCE
    available = REFERENCE
    if mx.default_device() != mx.Device(mx.cpu):
        available = "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else REFERENCE
    if choice in ("auto", available):
        return available
    raise InputError(f"{ENVIRONMENT}={choice}: no such device here; unset {ENVIRONMENT}, or set it to auto")


def kernel_key(backend: str, variant: Variant, projections: tuple[LowRank, ...]) -> KernelKey | None:
    """Return the key of the kernel that could run an operation, or None if no kernel can."""
    first = projections[0]
    if backend == REFERENCE or variant.activation.kernel is None or len(variant.boundaries) > 2:
        return None
    if first.experts is not None and not first.is_sorted:
        return None
    if first.base.size < fused.MIN_SIZE * (
        2 if variant.is_joint else 1
    ):  # h, [N, F], is an input of the backward
        return None
    dtype = first.base.dtype
    if not fused.fits_in_kernel(projections):
        return KernelKey(backend, variant, dtype, None, 0)
    low = first.lora_arrays[0]
    return KernelKey(backend, variant, dtype, low.dtype, low.shape[-1])


def backend_for(variant: Variant, projections: tuple[LowRank, ...]) -> str:
    """Return the backend of one operation: that of the process if its kernel passed its check, else "reference"."""
    chosen = backend()
    key = kernel_key(chosen, variant, projections)
    if key is None or chosen in disabled_backends:
        return REFERENCE
    if key in verified:
        return chosen
    if key not in reported:
        reported.add(key)
        warnings.warn(
            f"the {chosen} kernel of {variant.activation.name} in {key.dtype} was not checked when the model was "
            "adapted, so it is not used; MLX's own operations run instead, which is slower",
            stacklevel=2,
        )
    return REFERENCE
