"""The arrays that a batch of rows with images needs besides token ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nalora_mlx.data.media import RowMedia
from nalora_mlx.data.padding import rounded_length

UNALIGNED = ("features", "deepstack")  # arrays of a batch without an entry for each token
TEXT = -1  # in an index of features: a position that holds a text token


def collate_media(rows: Sequence[RowMedia | None], length: int) -> dict[str, Any] | None:
    """Return the arrays of a batch with one row per sequence; None if no row has images.

    Returns:
        Either, if features are given:
        index: int32 [B, L], where in `features` the feature of each position is; TEXT for text.
        features: [N, D], and further arrays [N, ...] of the same names as in the rows.
        The arrays `aligned` of the rows, [..., B, L].
        Or, if the towers are trained: "inputs", what the processor made of each row, and "aligned" as above.
    """
    if not any(rows):
        return None
    media: dict[str, Any] = _aligned(rows, length)
    if any(row is not None and row.inputs is not None for row in rows):
        return media | {"inputs": [row.inputs.load() if row and row.inputs else None for row in rows]}
    index = np.full((len(rows), length), TEXT, np.int32)
    parts: dict[str, list[np.ndarray]] = {}
    count = 0
    for i, row in enumerate(rows):
        if row is None:
            continue
        index[i, row.positions] = np.arange(count, count + len(row.positions))
        count += len(row.positions)
        for features in row.features:
            for name, array in features.load().items():
                parts.setdefault(name, []).append(array)
    # Padded, so that as few shapes as possible are compiled.
    size = rounded_length(max(count, 1))
    for name, arrays in parts.items():
        media[name] = np.zeros((size, *arrays[0].shape[1:]), arrays[0].dtype)
        np.concatenate(arrays, out=media[name][:count])
    return media | {"index": index}


def scaled_media(media: dict[str, Any], rows: int, length: int) -> dict[str, Any]:
    """Return the arrays of a batch of another shape, with the same share of image tokens as the first row of `media`.

    The values are those of the first row, repeated; so they are of use only to measure a step.
    """
    first = first_row(media)
    columns = np.arange(length) % first["index"].shape[1]
    result = {
        name: np.repeat(a[..., columns], rows, axis=-2) for name, a in first.items() if name not in UNALIGNED
    }
    count = int((result["index"] >= 0).sum())
    result["index"] = np.where(
        result["index"] >= 0, np.cumsum(result["index"] >= 0).reshape(rows, length) - 1, TEXT
    )
    result["index"] = result["index"].astype(np.int32)
    size = rounded_length(max(count, 1))
    features = {name: first[name][np.arange(size) % len(first[name])] for name in UNALIGNED if name in first}
    return result | features


def first_row(media: dict[str, Any]) -> dict[str, Any]:
    """Return the arrays of the first row of a batch."""
    kept = {"inputs": media["inputs"][:1]} if "inputs" in media else {}
    rows = {name: array[..., :1, :] for name, array in media.items() if name not in (*UNALIGNED, "inputs")}
    return {name: media[name] for name in UNALIGNED if name in media} | rows | kept


def _aligned(rows: Sequence[RowMedia | None], length: int) -> dict[str, np.ndarray]:
    """Return the arrays with an entry for each token, padded. Rows without images have positions 0, 1, ..."""
    given = next(row.aligned for row in rows if row is not None) or {}
    result = {}
    for name, array in given.items():
        start = np.arange(length) if name == "position_ids" else np.zeros(length)
        padded = np.broadcast_to(start.astype(array.dtype), (*array.shape[:-1], len(rows), length)).copy()
        for i, row in enumerate(rows):
            if row is not None and row.aligned:
                own = row.aligned[name][..., :length]
                padded[..., i, : own.shape[-1]] = own
        result[name] = padded
    return result
