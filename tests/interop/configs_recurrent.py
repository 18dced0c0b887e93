"""Configs of tiny recurrent and hybrid models that can be exported to GGUF."""

from typing import Any

# Model type -> config.
CONFIGS: dict[str, dict[str, Any]] = {}
# Variants of these configs: name -> (model type, changes).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {}
