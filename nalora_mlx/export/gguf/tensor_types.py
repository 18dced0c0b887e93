"""Tensor types in GGUF files: which type each tensor gets, and how values are quantized.

gguf-py quantizes the plain types. K-quants need llama.cpp's own library, from the package xllamacpp, and each tensor
gets the type that llama.cpp's quantizer would choose.
"""

import ctypes
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.notices import Note
from nalora_mlx.core.optional_dependencies import install_command

try:
    import gguf
except ImportError as error:
    raise InputError(f"export gguf needs the package gguf: {install_command('export')}") from error

Type = gguf.GGMLQuantizationType

# --type -> (GGUF's name for such a file, the type of most tensors)
FILE_TYPES = {
    "f32": ("ALL_F32", Type.F32),
    "f16": ("MOSTLY_F16", Type.F16),
    "bf16": ("MOSTLY_BF16", Type.BF16),
    "q8_0": ("MOSTLY_Q8_0", Type.Q8_0),
    "q4_0": ("MOSTLY_Q4_0", Type.Q4_0),
    "q4_1": ("MOSTLY_Q4_1", Type.Q4_1),
    "q5_0": ("MOSTLY_Q5_0", Type.Q5_0),
    "q5_1": ("MOSTLY_Q5_1", Type.Q5_1),
    "q4_k_m": ("MOSTLY_Q4_K_M", Type.Q4_K),
    "q5_k_m": ("MOSTLY_Q5_K_M", Type.Q5_K),
    "q6_k": ("MOSTLY_Q6_K", Type.Q6_K),
}
# llama.cpp's choice if the row length is not a multiple of a K-quant's 256. If not of 32 either, it takes F16.
FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}


def is_k_quant(type: str) -> bool:
    """Return whether a file type needs llama.cpp's own quantizer."""
    return "_k" in type


def choose_type(
    name: str, shape: tuple[int, ...], type: str, *, tied: bool, layers: int, experts: int, is_70b: bool
) -> Any:
    """Choose the type of one tensor.

    Vectors and routers stay F32. The output head gets more bits than the rest because it decides between tokens:
    Q8_0, or llama.cpp's choice for K-quants.

    Args:
        name: GGUF name of the tensor.
        shape: [(experts,) rows, columns].
        type: a key of FILE_TYPES.
        tied: whether the embedding is also the output head.
        layers: number of layers of the model.
        experts: number of experts of the model; 0 if it has none.
        is_70b: whether llama.cpp takes the model for a 70B model with grouped-query attention.
    """
    if len(shape) == 1 or ".ffn_gate_inp" in name:
        return Type.F32
    chosen, columns = FILE_TYPES[type][1], shape[-1]
    is_head = name == "output.weight" or (tied and name == "token_embd.weight")
    if is_k_quant(type):
        if is_head:
            chosen = Type.Q8_0 if columns % _block_size(chosen) else Type.Q6_K
        else:
            chosen = _choose_k_quant(name, type, layers, experts, is_70b)
        if columns % _block_size(chosen):
            chosen = FALLBACKS.get(chosen, Type.F16)
    elif is_head and type[:2] in ("q4", "q5"):
        chosen = Type.Q8_0
    return Type.F16 if columns % _block_size(chosen) else chosen


def _choose_k_quant(name: str, type: str, layers: int, experts: int, is_70b: bool) -> Any:
    """Choose as llama.cpp does: values and MLP outputs get more bits in the layers where they matter most."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    chosen = FILE_TYPES[type][1]
    if match is None:
        return chosen
    layer, stem = int(match[1]), match[2].removesuffix("_exps")
    eighth = layers // 8
    more_bits = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    if stem in ("attn_v", "attn_qkv", "ffn_down") and more_bits and type != "q6_k":
        chosen = Type.Q6_K
    if stem in ("attn_v", "attn_qkv") and is_70b and chosen == Type.Q4_K:
        chosen = Type.Q5_K
    if experts == 8:  # attention is a small part of a model with eight experts
        if stem in ("attn_v", "attn_qkv", "attn_k"):
            chosen = Type.Q8_0
        elif stem == "attn_output" and type == "q4_k_m":
            chosen = Type.Q5_K
    return chosen


def _block_size(type: Any) -> int:
    return gguf.GGML_QUANT_SIZES[type][0]


def byte_size(shape: Sequence[int], type: Any) -> int:
    """Return the size in bytes of a tensor in the file."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]
    return int(np.prod(shape)) // block * block_bytes


def fallback_notes(tensors: Sequence[tuple[tuple[int, ...], Any]], type: str) -> list[str]:
    """Return notes on matrices, given as (shape, type), that have another type than the requested one.

    They ask for nothing: the rows of these matrices do not fit the type, or the type has llama.cpp's usual mixture.
    """
    requested = FILE_TYPES[type][1].name
    others = Counter(t.name for shape, t in tensors if len(shape) > 1 and t.name not in (requested, "F32"))
    blocks = others.pop(Type.MXFP4.name, 0)
    kept = (
        f"{blocks} of {len(tensors)} tensors keep the MXFP4 values of the model, as with every type but f32"
    )
    notes: list[str] = [Note(kept)] if blocks else []
    for other, count in others.items():
        notes.append(Note(f"{count} of {len(tensors)} tensors are {other} instead of {requested}"))
    return notes


def quantize(values: np.ndarray, type: Any, use_llama_cpp: bool) -> np.ndarray:
    """Convert rows of float32 values to the bytes of a GGML type: uint8 [bytes]."""
    if not use_llama_cpp or type in (Type.F32, Type.F16, Type.BF16):
        return gguf.quants.quantize(values, type).view(np.uint8).reshape(-1)
    rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
    count, columns = rows.shape
    data = np.empty(byte_size(rows.shape, type), np.uint8)
    library, step = _load_llama_cpp(), max(1, -(-count // (os.cpu_count() or 1)))

    def quantize_rows(start: int) -> None:
        library.ggml_quantize_chunk(
            int(type),
            rows.ctypes.data,
            data.ctypes.data,
            start * columns,
            min(step, count - start),
            columns,
            None,
        )

    with ThreadPoolExecutor() as pool:
        list(pool.map(quantize_rows, range(0, count, step)))
    return data


def check_type(type: str) -> None:
    """Check that a file type exists and that the package it needs is installed.

    Raises:
        InputError: the message says what to choose or install.
    """
    if type not in FILE_TYPES:
        raise InputError(f"type {type}: unknown; choose one of {', '.join(FILE_TYPES)}")
    if is_k_quant(type):
        _load_llama_cpp()


@cache
def _load_llama_cpp() -> ctypes.CDLL:
    """Load llama.cpp's library and prepare the one function that is used.

    size_t ggml_quantize_chunk(type, const float * src, void * dst, start, rows, columns, const float * importance)
    quantizes `rows` rows from element `start` of all values `src` into all data `dst`.
    """
    try:
        import xllamacpp

        path = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
        library = ctypes.CDLL(str(path))
        function = library.ggml_quantize_chunk
    except (ImportError, StopIteration, OSError, AttributeError) as error:
        raise InputError(
            f"K-quants need llama.cpp's quantizer, in the package xllamacpp: {install_command('export')} "
            f"({error or 'it contains no library'})"
        ) from error
    function.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    # The first use of a type builds its tables, which is not safe in several threads.
    for type in (*FALLBACKS, *FALLBACKS.values()):
        library.ggml_quantize_init(int(type))
    return library
