"""Safetensors files as bytes: what they hold, and copies in which some tensors are replaced.

A copy has every other tensor with its exact bytes, in dtypes that MLX lacks too (float8).
"""

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nalora_mlx.core.storage import array_shapes

_METADATA = "__metadata__"
_DTYPES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.uint16: "U16",
    mx.uint32: "U32",
    mx.uint64: "U64",
    mx.int8: "I8",
    mx.int16: "I16",
    mx.int32: "I32",
    mx.int64: "I64",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
}


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file.

    Attributes:
        path: of the file.
        tensors: entries of its header by name: dtype, shape, data_offsets (relative to `start`).
        metadata: texts by name.
        start: offset of the first tensor in bytes.
    """

    path: Path
    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int

    def nbytes(self, name: str) -> int:
        """Return the size of a tensor in bytes."""
        begin, end = self.tensors[name]["data_offsets"]
        return int(end - begin)


def open_tensor_file(path: Path) -> TensorFile:
    """Read the header of a safetensors file, after checking it against the file's size.

    Raises:
        InputError: the file is missing or damaged.
    """
    array_shapes(path)
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    return TensorFile(path, header, header.pop(_METADATA, {}), 8 + size)


def copy_with_replaced(source: TensorFile, target: Path, replaced: Mapping[str, mx.array | None]) -> None:
    """Copy a safetensors file with other tensors under some names.

    Args:
        source: the file to copy; its metadata is copied too.
        target: the file to write.
        replaced: tensors by name, which may be new to the file; None leaves the name out.

    Raises:
        OSError: the disk is full, or the target is not writable.
    """
    entries = {name: entry for name, entry in source.tensors.items() if name not in replaced}
    entries |= {
        name: {"dtype": _DTYPES[array.dtype], "shape": list(array.shape)}
        for name, array in replaced.items()
        if array is not None
    }
    # Wide dtypes first, so that every tensor is aligned to the size of its elements.
    order = sorted(entries, key=lambda name: -_element_bytes(entries[name]["dtype"]))
    header: dict[str, Any] = {_METADATA: source.metadata} if source.metadata else {}
    end = 0
    for name in order:
        array = replaced.get(name)
        begin, end = end, end + (source.nbytes(name) if array is None else array.nbytes)
        header[name] = entries[name] | {"data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file, source.path.open("rb") as original:
        file.write(struct.pack("<Q", len(text)) + text)
        with mmap.mmap(original.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for name in order:
                array = replaced.get(name)
                if array is not None:
                    file.write(array_bytes(array).data)
                    continue
                begin, end = source.tensors[name]["data_offsets"]
                with memoryview(content) as view, view[source.start + begin : source.start + end] as part:
                    file.write(part)


def array_bytes(array: mx.array) -> np.ndarray:
    """Return the bytes of an array in row-major order, as safetensors stores them."""
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8))


def _element_bytes(dtype: str) -> int:
    """Return the bytes of an element; 0 for elements smaller than a byte."""
    bits = "".join(filter(str.isdigit, dtype.partition("_")[0])) or "8"  # BOOL has no digits
    return int(bits) // 8
