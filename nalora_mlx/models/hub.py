"""Model cards: what they say about a model, and the name of the original model on the Hugging Face Hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from nalora_mlx.core.paths import is_hub_name

OUR_TAG = "nalora-mlx"  # in the model cards that we write
SMALL_FILES = ["README.md", "LICEN[CS]E*", "NOTICE*", "*.model", "*.spm", "*.vocab"]


def card_metadata(directory: Path) -> dict[str, Any]:
    """Return the YAML metadata of a model card (README.md), empty if there is none or it cannot be read."""
    import yaml

    try:
        text = (directory / "README.md").read_text(encoding="utf-8")
        content = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def fetch_small_files(name: str) -> None:
    """Download what mlx-lm leaves out of a model on the Hub: its card, its license, and rarer tokenizer files.

    Failures are ignored: without a network, the files that are there are used.
    """
    from huggingface_hub import snapshot_download

    with suppress(Exception):
        snapshot_download(name, allow_patterns=SMALL_FILES)


def original_name(name: str, directory: Path, config: dict[str, Any]) -> str | None:
    """Return the Hub name of the full-precision model with a base's weights, or None if it is unknown.

    A card's base_model names it only if mlx-lm converted or quantized the model. In other cards, ours included, it
    names the model before fine-tuning, whose weights differ.

    Args:
        name: the base as the user gave it, a path or a Hub name.
        directory: its local directory.
        config: its config.json.
    """
    if is_hub_name(name) and not (config.get("quantization") or config.get("quantization_config")):
        return name
    card = card_metadata(directory)
    if card.get("library_name") != "mlx" or OUR_TAG in (card.get("tags") or []):
        return None
    base = card.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) and is_hub_name(base) else None


def model_description(name: str, directory: Path, config: dict[str, Any], weights: int) -> dict[str, Any]:
    """Return what a model is called and how large it is, for people: "name", "type" and "parameters".

    The name is that of a Hub repo. A local directory gives its own name, unless its card names the repo that it was
    converted from.

    Args:
        name: the model as the user gave it, a path or a Hub name.
        directory: its local directory.
        config: its config.json.
        weights: number of its parameters.
    """
    found = name if is_hub_name(name) else original_name(name, directory, config) or directory.resolve().name
    return {"name": found, "type": config.get("model_type"), "parameters": weights}
