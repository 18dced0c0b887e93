"""Find and load a base model through mlx-lm, with errors that a person can act on. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nalora_mlx.core.paths import is_hub_name

OUR_TAG = "nalora-mlx"  # in the cards of the models that we write


def card_metadata(directory: Path) -> dict[str, Any]:
    """What a model card (README.md) says of its model in its YAML head; empty if there is none that can be read."""
    import yaml

    try:
        text = (directory / "README.md").read_text(encoding="utf-8")
        content = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def original_name(name: str, directory: Path, config: dict[str, Any]) -> str | None:
    """Name on the Hub of the model in full precision whose weights a base has; None if nothing tells it.

    A card's base_model is that only where mlx-lm has converted or quantized the model. In other cards it is what a
    model was trained from, and in those that we write too: such weights differ.

    Args:
        name: the base as it was asked for, a path or a Hub name.
        directory: where it lies.
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
