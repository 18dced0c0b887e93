"""The number of positions that a model was made for, and rows that are longer."""

from collections.abc import Mapping
from typing import Any

from nalora_mlx.core.errors import counted, places
from nalora_mlx.data.preferences import separate_sequences
from nalora_mlx.data.tokenization import Split

# Keys of config.json, as families of models name it. Models that count no positions, such as Mamba, have none of them.
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
SCALING_KEYS = ("rope_scaling", "rope_parameters")


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the number of positions that config.json states, RoPE scaling included; None if it states none.

    A scaled model was trained on `original_max_position_embeddings` positions, or on the stated number if that is
    absent, and its scaling multiplies them by `factor`. Some configs state the product itself, so the larger counts.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping) and (length := context_length(text)) is not None:
        return length
    stated = next((config[key] for key in LENGTH_KEYS if _is_number(config.get(key))), None)
    if stated is None:
        return None
    lengths = [stated]
    given = [config[key] for key in SCALING_KEYS if isinstance(config.get(key), Mapping)]
    per_layer_type = [value for scaling in given for value in scaling.values()]
    for scaling in given + per_layer_type:
        if isinstance(scaling, Mapping) and _is_number(scaling.get("factor")):
            original = scaling.get("original_max_position_embeddings")
            lengths.append((original if _is_number(original) else stated) * scaling["factor"])
    return int(max(lengths))


def context_notices(splits: Mapping[str, Split], config: Mapping[str, Any]) -> list[str]:
    """Return a notice for each split with rows that are longer than the model's context."""
    if (limit := context_length(config)) is None:
        return []
    notices = []
    for name, split in splits.items():
        lengths: dict[str, int] = {}
        for sequence in separate_sequences(split.sequences):
            if (length := len(sequence.tokens)) > limit:
                lengths[sequence.source] = max(length, lengths.get(sequence.source, 0))
        if lengths:
            notices.append(
                f"{name}: {counted(len(lengths), 'row')} {'is' if len(lengths) == 1 else 'are'} longer than the "
                f"{limit} tokens that the model was made for, the "
                f"longest has {max(lengths.values())}: {places(list(lengths))}; --max-seq-length {limit} truncates them"
            )
    return notices


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**40
