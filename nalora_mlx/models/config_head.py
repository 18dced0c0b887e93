"""An output head among the weights that mlx-lm does not use, because config.json says that it is the embedding."""

from __future__ import annotations

import functools
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nalora_mlx.core.tensor_files import TensorFile, open_tensor_file

TIED = "tie_word_embeddings"
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|scales)$|^output\.(weight|scales)$")
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|word_embeddings|tok_embeddings|embeddings|embed_in|wte)\.weight$"
)
_CHUNK = 1 << 24  # bytes


def unused_head(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """Return a notice if the weights hold an output head that differs from the embedding and is not used.

    Args:
        directory: the model's directory.
        config: content of config.json as the class reads it.

    Raises:
        InputError: a file is damaged.
    """
    if config.get(TIED) is not True:
        return []
    files = [open_tensor_file(path) for path in sorted(directory.glob("model*.safetensors"))]
    stored = [(name, file) for file in files for name in file.tensors if name.endswith(".weight")]
    heads = [(name, file) for name, file in stored if HEAD.search(name)]
    embeddings = [(name, file) for name, file in stored if _EMBEDDING.search(name)]
    return [
        f"the weights hold {name}, which differs from the embedding and is not used, because config.json says "
        f"{TIED}; if the model needs it, set {TIED} to false"
        for name, file in heads
        if not any(_equal(file, name, other_file, other) for other, other_file in embeddings)
    ]


def _equal(file: TensorFile, name: str, other_file: TensorFile, other: str) -> bool:
    if any(file.tensors[name][key] != other_file.tensors[other][key] for key in ("dtype", "shape")):
        return False
    starts = [
        part.start + part.tensors[key]["data_offsets"][0] for part, key in ((file, name), (other_file, other))
    ]
    changed = [part.path.stat().st_mtime_ns for part in (file, other_file)]
    return _equal_bytes((file.path, other_file.path), tuple(starts), file.nbytes(name), tuple(changed))


@functools.lru_cache(maxsize=16)  # a command asks several times
def _equal_bytes(
    paths: tuple[Path, Path], starts: tuple[int, ...], size: int, changed: tuple[int, ...]
) -> bool:
    with (
        paths[0].open("rb") as first,
        paths[1].open("rb") as second,
        mmap.mmap(first.fileno(), 0, access=mmap.ACCESS_READ) as left,
        mmap.mmap(second.fileno(), 0, access=mmap.ACCESS_READ) as right,
    ):
        return all(
            left[starts[0] + begin : starts[0] + end] == right[starts[1] + begin : starts[1] + end]
            for begin in range(0, size, _CHUNK)
            for end in (min(begin + _CHUNK, size),)
        )
