"""Tokens that end an answer, in mlx-lm and in llama.cpp.

mlx-lm ends at the tokenizer's eos token and at every `eos_token_id` of generation_config.json, or else of config.json.
GGUF has keys for three ends (eos, eot, eom). llama.cpp also ends at tokens that it knows by their text.
"""

from collections.abc import Sequence
from typing import Any

from nalora_mlx.core.notices import Note
from nalora_mlx.export.gguf.vocabulary.pieces import NORMAL, UNUSED

# Texts of tokens at which llama.cpp ends.
_ENDS_BY_TEXT = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
        *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
        *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~["),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        # Tokens that complete code: padding, repository, file.
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    )
)


def configured_ends(config: dict[str, Any], generation: dict[str, Any]) -> list[int]:
    """Return the end tokens that generation_config.json, or else config.json, names, as mlx-lm does."""
    value = generation.get("eos_token_id") or config.get("eos_token_id")
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def ends_by_text(tokens: Sequence[str]) -> list[int]:
    """Return the ids of the tokens at which llama.cpp ends because of their text."""
    found = {token: i for i, token in enumerate(tokens) if token in _ENDS_BY_TEXT}
    if {"<|return|>", "<|call|>"} <= found.keys() or {"<|flush|>", "<|calls|>"} <= found.keys():
        found.pop("<|end|>", None)
    if "<|tool_response>" in found:
        found.pop("</s>", None)
    return list(found.values())


def assign_ends(
    tokens: Sequence[str], types: Sequence[int], eos: int | None, configured: Sequence[int]
) -> tuple[list[int], dict[str, int], list[str]]:
    """Distribute the end tokens of a model over GGUF's keys.

    Args:
        tokens: all tokens, by id.
        types: their types.
        eos: the tokenizer's eos token.
        configured: those of `configured_ends`.

    Returns:
        The ends, the ids for the keys (eos, eot, eom), and notes for the user.
    """
    ends = [i for i in (eos, *configured) if i is not None and 0 <= i < len(tokens)]
    ends = list(dict.fromkeys(ends))
    by_text, notes = ends_by_text(tokens), []
    if not ends:
        # llama.cpp would take an ordinary token, number 2 or 11, for the end.
        notes.append(
            "the model names no end-of-sequence token, so programs stop only at their limit of tokens"
        )
        unused = [i for i, kind in enumerate(types) if kind == UNUSED]
        return [], {"eos": unused[-1]} if unused else {}, notes
    keys = {"eos": ends[0]}
    others = sorted(ends[1:], key=lambda i: i in by_text)  # those that llama.cpp does not know come first
    keys |= dict(zip(("eot", "eom"), others, strict=False))
    if lost := [i for i in others[2:] if i not in by_text]:
        names = ", ".join(tokens[i] for i in lost)
        notes.append(
            f"llama.cpp has keys for three end tokens and does not stop at {names}; give it as a stop word"
        )
    extra = [i for i in by_text if i not in ends]
    if names := ", ".join(tokens[i] for i in extra if types[i] != NORMAL):
        notes.append(
            Note(f"llama.cpp also ends an answer at {names}, which it knows by name; mlx-lm does not")
        )
    if names := ", ".join(tokens[i] for i in extra if types[i] == NORMAL):
        notes.append(
            f"llama.cpp takes {names} for a special token that ends an answer, because of its name; for mlx-lm it is "
            "ordinary text"
        )
    return ends, keys, notes


def end_texts(tokenizer: Any) -> list[str]:
    """Return the texts of the end tokens of mlx-lm's tokenizer."""
    return [tokenizer.decode([i]) for i in sorted(tokenizer.eos_token_ids)]
