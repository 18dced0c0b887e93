"""Which kernels this process uses, and which of them were found right on this machine."""

import os
import warnings

import mlx.core as mx

from nalora_mlx.core.errors import InputError
from nalora_mlx.ops.kernels import fused
from nalora_mlx.ops.kernels.fused import Variant
from nalora_mlx.ops.kernels.low_rank import LowRank

ENVIRONMENT = "NALORA_KERNEL"
CHOICES = ("auto", "reference", "metal", "cuda")
REFERENCE = "reference"

# A kernel that is compiled of its own: backend, variant, dtypes of the bases and of the low-rank inputs, and the rank
# of the product inside it, 0 for none.
Kind = tuple[str, Variant, mx.Dtype, mx.Dtype | None, int]

checked: set[Kind] = set()  # those that were found right
refused: set[str] = set()  # backends of which one was found wrong: they are used no more
unchecked: set[Kind] = set()  # those that were wanted and had not been checked


def backend() -> str:
    """Which kernels this process uses: "metal", "cuda" or "reference".

    Raises:
        InputError: NALORA_KERNEL asks for one that is not there.
    """
    choice = os.environ.get(ENVIRONMENT, "auto")
    if choice not in CHOICES:
        raise InputError(f"{ENVIRONMENT}={choice}: choose from {', '.join(CHOICES)}")
    if choice == REFERENCE:
        return REFERENCE
    there = REFERENCE
    if mx.default_device() != mx.Device(mx.cpu):
        there = "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else REFERENCE
    if choice in ("auto", there):
        return there
    raise InputError(f"{ENVIRONMENT}={choice}: there is no such device here; leave it out, or set it to auto")


def kind_of(backend: str, variant: Variant, projections: tuple[LowRank, ...]) -> Kind | None:
    """The kernel that would run an operation; None if none can."""
    first = projections[0]
    if backend == REFERENCE or variant.activation.kernel is None or len(variant.boundaries) > 2:
        return None
    if first.experts is not None and not first.is_sorted:
        return None
    if first.base.size < fused.SMALLEST * (1 if variant.gate_up_layout == "separate" else 2):  # of h, [N, F]
        return None
    dtype = first.base.dtype
    if not fused.fits(projections):
        return backend, variant, dtype, None, 0
    low = projections[0].arrays[0]
    return backend, variant, dtype, low.dtype, low.shape[-1]


def backend_for(variant: Variant, projections: tuple[LowRank, ...]) -> str:
    """The backend of one operation: that of the process if its kernel was found right, else the reference."""
    chosen = backend()
    kind = kind_of(chosen, variant, projections)
    if kind is None or chosen in refused:
        return REFERENCE
    if kind in checked:
        return chosen
    if kind not in unchecked:
        unchecked.add(kind)
        warnings.warn(
            f"a {chosen} kernel of {variant.activation.name} in {kind[2]} was not checked when the model was adapted, "
            "and is not used; the same is computed without it, more slowly",
            stacklevel=2,
        )
    return REFERENCE
