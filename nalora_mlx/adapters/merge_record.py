"""The record that a merged model keeps of its adapters, so that none is applied twice unnoticed."""

import hashlib
from pathlib import Path
from typing import Any

from nalora_mlx.adapters.files import ADAPTER_CONFIG, ADAPTER_FILE, read_weights
from nalora_mlx.core.storage import read_json
from nalora_mlx.core.tensor_files import array_bytes

RECORD_FILE = "nalora_fuse.json"  # in the directory of a merged model
_MERGED = "merged_adapters"


def merge_record(base: Path, adapter: Path) -> dict[str, Any]:
    """Return the content of the record of a model that was merged from a base and an adapter.

    Fully trained weights are not recorded: they replace those of the base, so that loading them again changes nothing.
    """
    new = [] if _is_full(adapter) else [_digest(adapter / ADAPTER_FILE)]
    return {_MERGED: _merged_before(base) + new}


def contains_adapter(model: Path, adapter: Path) -> bool:
    """Return whether an adapter was merged into a model by `nalora fuse`.

    Args:
        model: directory of the model.
        adapter: directory of the adapter, or the file of its arrays.

    Raises:
        InputError: a file is missing or damaged.
    """
    merged = _merged_before(model)
    path = adapter / ADAPTER_FILE if adapter.is_dir() else adapter
    return bool(merged) and not _is_full(path.parent) and _digest(path) in merged


def _is_full(adapter: Path) -> bool:
    path = adapter / ADAPTER_CONFIG
    return path.exists() and read_json(path).get("fine_tune_type") == "full"


def _merged_before(model: Path) -> list[str]:
    path = model / RECORD_FILE
    merged = read_json(path).get(_MERGED) if path.exists() else None
    return merged if isinstance(merged, list) else []


def _digest(path: Path) -> str:
    """Return the SHA-256 of an adapter's arrays, which does not depend on how the file stores them."""
    digest = hashlib.sha256()
    for name, array in sorted(read_weights(path).items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array_bytes(array).data)
    return digest.hexdigest()
