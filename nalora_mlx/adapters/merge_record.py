"""The record that a merged model keeps of its adapters, so that none is applied twice unnoticed.

It is an entry of config.json, which survives a conversion or quantization of the merged model. An adapter is known by a
hash of its arrays, wherever its files are.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nalora_mlx.adapters.files import ADAPTER_CONFIG, ADAPTER_FILE, read_weights
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.storage import read_json
from nalora_mlx.core.tensor_files import array_bytes

RECORD_KEY = "_nalora_merged"  # in config.json; the underscore marks an entry that describes no model
_ADAPTERS, _SAME_RUNS = "adapters", "same_runs"
_HASH_LENGTH = 16  # hexadecimal digits


def merge_record(base: Path, adapter: Path, same_run: Iterable[Path] = ()) -> dict[str, list[str]]:
    """Return the record of a model that is merged from a base and an adapter; empty if there is nothing to record.

    Fully trained weights are not recorded: they replace those of the base, so that loading them again changes nothing.

    Args:
        base: directory of the base model, which may have a record of its own.
        adapter: directory of the adapter.
        same_run: directories of other adapters of the same run.
    """
    before = _read_record(base)
    new: dict[str, list[str]] = {}
    if not _is_full(adapter):
        new = {
            _ADAPTERS: [adapter_digest(adapter / ADAPTER_FILE)],
            _SAME_RUNS: [adapter_digest(path / ADAPTER_FILE) for path in same_run],
        }
    found = {name: list(dict.fromkeys([*before[name], *new.get(name, [])])) for name in before}
    found[_SAME_RUNS] = [digest for digest in found[_SAME_RUNS] if digest not in found[_ADAPTERS]]
    return {name: digests for name, digests in found.items() if digests}


def contains(name: str, model: Path, adapter: str | Path) -> str | None:
    """Say that `nalora fuse` merged an adapter, or another one of the same run, into a model; None if it did not.

    Args:
        name: how the user named the model.
        model: its directory.
        adapter: directory of the adapter, or the file of its arrays.

    Raises:
        InputError: a file is missing or damaged.
    """
    merged = _read_record(model)
    if not merged[_ADAPTERS]:
        return None
    path = Path(adapter).expanduser()
    path = path / ADAPTER_FILE if path.is_dir() else path
    if _is_full(path.parent):
        return None
    digest = adapter_digest(path)
    if digest in merged[_ADAPTERS]:
        return f"{name} already contains {adapter}"
    if digest in merged[_SAME_RUNS]:
        return f"{name} already contains another adapter of the run that wrote {adapter}"
    return None


def twice_notice(name: str, model: Path, adapter: str | Path) -> str | None:
    """Return a notice that an adapter is applied twice; None if it is not. The arguments are those of `contains`."""
    found = contains(name, model, adapter)
    return (
        found and f"{found}, so it is applied twice; use the base model that it was trained on, or no adapter"
    )


def reject_twice(name: str, model: Path, adapter: str | Path, remedy: str) -> None:
    """Raise InputError if a model contains an adapter. The other arguments are those of `contains`.

    Args:
        remedy: what to do instead of giving the base model.
    """
    if found := contains(name, model, adapter):
        raise InputError(
            f"--model {found}, which would be applied twice; give the base model that it was trained on{remedy}"
        )


def _is_full(adapter: Path) -> bool:
    path = adapter / ADAPTER_CONFIG
    return path.exists() and read_json(path).get("fine_tune_type") == "full"


def _read_record(model: Path) -> dict[str, list[str]]:
    path = model / "config.json"
    record: Any = read_json(path).get(RECORD_KEY) if path.exists() else None
    found = {}
    for name in (_ADAPTERS, _SAME_RUNS):
        digests = record.get(name) if isinstance(record, dict) else None
        found[name] = [str(digest) for digest in digests] if isinstance(digests, list) else []
    return found


def adapter_digest(path: Path) -> str:
    """Return the start of the SHA-256 of an adapter's arrays, which does not depend on how the file stores them."""
    digest = hashlib.sha256()
    for name, array in sorted(read_weights(path).items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array_bytes(array).data)
    return digest.hexdigest()[:_HASH_LENGTH]
