"""The keys of a row's parts, as the settings name them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.config_data import DEFAULT_KEYS


@dataclass(frozen=True)
class Features:
    """The keys of a row's parts, and whether prompts are masked.

    Attributes:
        prompt, completion, chat, text: the keys.
        mask_prompt: whether prompts are masked.
        named: the parts whose keys the user has named. Rows are read by these keys first.
    """

    prompt: str = DEFAULT_KEYS["prompt"]
    completion: str = DEFAULT_KEYS["completion"]
    chat: str = DEFAULT_KEYS["chat"]
    text: str = DEFAULT_KEYS["text"]
    mask_prompt: bool = False
    named: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "named", self.named | self.unusual)

    @property
    def unusual(self) -> frozenset[str]:
        """The parts that have other keys than the default ones. Every row must have them."""
        return frozenset(part for part, key in DEFAULT_KEYS.items() if getattr(self, part) != key)

    @classmethod
    def from_config(cls, config: RunConfig, overrides: Mapping[str, Any] | None = None) -> "Features":
        """Return the features of a run; `overrides` may hold other keys for one dataset, as chat_feature."""
        named = {}
        for part in DEFAULT_KEYS:
            name = f"{part}_feature"
            key = (overrides or {}).get(name) or getattr(config, name)
            if key is not None:
                named[part] = key
        return cls(**named, mask_prompt=config.mask_prompt, named=frozenset(named))
