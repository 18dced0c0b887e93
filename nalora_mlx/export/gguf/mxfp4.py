"""Experts in MXFP4, copied from mlx's layout to GGUF's without another rounding.

MXFP4 gives 32 neighbouring values of a row 4 bits each, FP4 E2M1, and a common factor 2^(s - 127) with s in 8 bits.
Both layouts have the same codes in another order. With value i in 0..31 of a block:

    mlx    weight: value i in bits 4 (i mod 8) of uint32 i / 8; scales: s as uint8 in an array of its own
    GGUF   17 bytes: s, then 16 bytes, the j-th with value j in the low half and value j + 16 in the high half

Source: OCP Microscaling Formats (MX) Specification v1.0.
"""

import mlx.core as mx
import numpy as np

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf.placement import Placement
from nalora_mlx.export.lazy_model import LazyWeight

_NAN = 255  # as s


def keeps_blocks(weight: LazyWeight, placement: Placement) -> bool:
    """Return whether a weight consists of experts in MXFP4 that enter the file unchanged, unless it is all float32."""
    quantization = weight.quantization or {}
    is_mxfp4 = quantization.get("mode") == "mxfp4" and weight.kind == "experts" and weight.transform is None
    return is_mxfp4 and placement == Placement(placement.name)


def copy_blocks(weight: LazyWeight, path: str) -> np.ndarray:
    """Return the blocks of a weight [E, F, D] in GGUF's layout: uint8 [E F D / 32 * 17].

    Raises:
        InputError: a factor is NaN.
    """
    assert weight.scales is not None
    parts = []
    for expert in range(weight.shape[0]):  # one at a time, which keeps the copies small
        scales = np.array(weight.scales[expert]).reshape(-1, 1)
        if (scales == _NAN).any():
            raise InputError(f"{path}: has NaN values; the model is damaged")
        packed = np.array(mx.view(weight.weight[expert], mx.uint8)).reshape(-1, 16)
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1, 2, 16)
        parts.append(np.concatenate([scales, codes[:, 0] | codes[:, 1] << 4], axis=1).reshape(-1))
    return np.concatenate(parts)
