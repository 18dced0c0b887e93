"""Types of the tensors in a GGUF file: which each gets, and how values become it.

The plain types are quantized by gguf-py. K-quants it cannot write: these come from llama.cpp's own library, in the
package xllamacpp, and each tensor gets the type that llama.cpp's quantizer gives it.
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

try:
    import gguf
except ImportError as error:
    raise InputError("export gguf needs the package gguf: pip install 'nalora-mlx[export]'") from error

Type = gguf.GGMLQuantizationType

# Type of the weights -> (what GGUF calls a file of it, the type of most tensors).
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
# What llama.cpp takes where rows are no multiple of a K-quant's 256; F16 where they are none of 32 either.
FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}


def is_k_quant(type: str) -> bool:
    """Whether a type needs llama.cpp's own quantizer."""
    return "_k" in type


def type_of(
    name: str, shape: tuple[int, ...], type: str, *, tied: bool, layers: int, experts: int, is_70b: bool
) -> Any:
    """Choose the type of one tensor.

    Vectors and routers stay F32. A head is finer than the rest, for it decides between tokens: Q8_0, or for
    K-quants what llama.cpp takes.

    Args:
        name: of the tensor in GGUF.
        shape: [(experts,) rows, columns].
        type: a key of FILE_TYPES.
        tied: the embedding is the head.
        layers: of the model.
        experts: of the model, 0 if it has none.
        is_70b: llama.cpp takes it for a 70B model of grouped attention.
    """
    if len(shape) == 1 or ".ffn_gate_inp." in name:
        return Type.F32
    wanted, columns = FILE_TYPES[type][1], shape[-1]
    is_head = name == "output.weight" or (tied and name == "token_embd.weight")
    if is_k_quant(type):
        if is_head:
            wanted = Type.Q8_0 if columns % _block(wanted) else Type.Q6_K
        else:
            wanted = _k_type(name, type, layers, experts, is_70b)
        if columns % _block(wanted):
            wanted = FALLBACKS.get(wanted, Type.F16)
    elif is_head and type[:2] in ("q4", "q5"):
        wanted = Type.Q8_0
    return Type.F16 if columns % _block(wanted) else wanted


def _k_type(name: str, type: str, layers: int, experts: int, is_70b: bool) -> Any:
    """llama.cpp's mixture: more bits for values and MLP outputs, in the layers where they matter most."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    wanted = FILE_TYPES[type][1]
    if found is None:
        return wanted
    layer, stem = int(found[1]), found[2].removesuffix("_exps")
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    if stem in ("attn_v", "attn_qkv", "ffn_down") and more and type != "q6_k":
        wanted = Type.Q6_K
    if stem in ("attn_v", "attn_qkv") and is_70b and wanted == Type.Q4_K:
        wanted = Type.Q5_K
    if experts == 8:  # of a model of eight experts attention is a small part
        if stem in ("attn_v", "attn_qkv", "attn_k"):
            wanted = Type.Q8_0
        elif stem == "attn_output" and type == "q4_k_m":
            wanted = Type.Q5_K
    return wanted


def _block(type: Any) -> int:
    return gguf.GGML_QUANT_SIZES[type][0]


def byte_size(shape: Sequence[int], type: Any) -> int:
    """Bytes of a tensor in the file."""
    block, size = gguf.GGML_QUANT_SIZES[type]
    return int(np.prod(shape)) // block * size


def fallback_notes(chosen: Sequence[tuple[tuple[int, ...], Any]], type: str) -> list[str]:
    """Say which matrices, given as (shape, type), have another type than asked for."""
    plain = FILE_TYPES[type][1].name
    others = Counter(t.name for shape, t in chosen if len(shape) > 1 and t.name not in (plain, "F32"))
    return [
        f"{count} of {len(chosen)} tensors are {other} instead of {plain}" for other, count in others.items()
    ]


def quantize(values: np.ndarray, wanted: Any, by_llama_cpp: bool) -> np.ndarray:
    """Turn rows of float32 values into the bytes of a type: uint8 [bytes]."""
    if not by_llama_cpp or wanted in (Type.F32, Type.F16, Type.BF16):
        return gguf.quants.quantize(values, wanted).view(np.uint8).reshape(-1)
    rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
    count, columns = rows.shape
    data = np.empty(byte_size(rows.shape, wanted), np.uint8)
    library, step = _library(), max(1, -(-count // (os.cpu_count() or 1)))

    def part(start: int) -> None:
        library.ggml_quantize_chunk(
            int(wanted),
            rows.ctypes.data,
            data.ctypes.data,
            start * columns,
            min(step, count - start),
            columns,
            None,
        )

    with ThreadPoolExecutor() as pool:
        list(pool.map(part, range(0, count, step)))
    return data


def check_type(type: str) -> None:
    """Refuse a type that is unknown or needs a package that is missing.

    Raises:
        InputError: what to choose or install.
    """
    if type not in FILE_TYPES:
        raise InputError(f"type {type}: unknown; choose one of {', '.join(FILE_TYPES)}")
    if is_k_quant(type):
        _library()


@cache
def _library() -> ctypes.CDLL:
    """llama.cpp's library, of which one C function is used.

    It is size_t ggml_quantize_chunk(type, const float *, void *, start, rows, columns, const float *): all values,
    all data, and the part of them to do.
    """
    try:
        import xllamacpp

        path = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
        library = ctypes.CDLL(str(path))
        function = library.ggml_quantize_chunk
    except (ImportError, StopIteration, OSError, AttributeError) as error:
        raise InputError(
            "K-quants need llama.cpp's quantizer, in the package xllamacpp: pip install 'nalora-mlx[kquants]' "
            f"({error or 'it holds no library'})"
        ) from error
    function.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    # The tables of a type are made on its first use, which is not for several threads at once.
    for wanted in (*FALLBACKS, *FALLBACKS.values()):
        library.ggml_quantize_init(int(wanted))
    return library
