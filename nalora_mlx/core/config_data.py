"""Settings of the training data: where it is, what its rows mean, and how chats are rendered."""

from dataclasses import dataclass
from typing import Any

from nalora_mlx.core.config_fields import setting, too_small


@dataclass
class DataConfig:
    """Settings of the data of a run."""

    data: str = setting(
        "mlx-community/WikiSQL", "directory with {train,valid,test}.jsonl, or a Hugging Face dataset"
    )
    mask_prompt: bool = setting(False, "compute the loss on assistant turns only")
    last_turn_only: bool = setting(
        False, "with mask_prompt, train on the last assistant turn of a chat only, as mlx_lm.lora does"
    )
    show_masks: int = setting(0, "number of training rows to print with their supervised tokens marked")
    hf_dataset: dict[str, Any] | list[Any] | None = setting(
        None, "Hugging Face datasets: path, splits, features", yaml_only=True
    )
    prompt_feature: str = setting("prompt", "key of the prompt in a row", yaml_only=True)
    completion_feature: str = setting("completion", "key of the completion in a row", yaml_only=True)
    text_feature: str = setting("text", "key of the text in a row", yaml_only=True)
    chat_feature: str = setting("messages", "key of the messages in a row", yaml_only=True)

    def data_problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        return too_small(self, 0, "show_masks")
