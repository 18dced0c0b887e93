"""Settings of the training data: where it is, what its rows mean, and how chats are rendered."""

from dataclasses import dataclass
from typing import Any

from nalora_mlx.core.config_fields import setting, too_small
from nalora_mlx.core.data_entries import data_entries
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.template_args import template_args_problems

DEFAULT_KEYS = {
    "prompt": "prompt",
    "completion": "completion",
    "chat": "messages",
    "text": "text",
}  # of a row's parts


def _key_setting(part: str, what: str) -> Any:
    """Declare the key of a part of a row. None stands for the usual key, so that naming it can mean something."""
    text = f"key of the {what} in a row; rows are read by the keys that are named (default: {DEFAULT_KEYS[part]})"
    return setting(None, text, flag_name=f"{part}-key", metavar="KEY")


@dataclass
class DataConfig:
    """Settings of the data of a run."""

    data: str | dict[str, Any] | list[Any] = setting(
        "mlx-community/WikiSQL",
        "file or directory of {train,valid,test} as .jsonl, .json, .csv, .tsv, .parquet, .txt or .md; or Hugging Face "
        "dataset; several are joined, DATA=RATIO repeats rows",
        nargs="+",
        metavar="DATA",
    )
    valid_fraction: float = setting(
        0.05,
        "fraction of the training rows to validate on if there is no validation set; 0 for none",
        metavar="FRACTION",
    )
    chunk: bool = setting(
        False, "cut texts longer than max_seq_length into several sequences, instead of truncating them"
    )
    mask_prompt: bool = setting(False, "compute the loss on assistant turns only")
    last_turn_only: bool = setting(
        False, "with mask_prompt, train on the last assistant turn of a chat only, as mlx_lm.lora does"
    )
    show_masks: int = setting(0, "training rows to print, with the supervised tokens marked")
    hf_dataset: dict[str, Any] | list[Any] | None = setting(
        None, "Hugging Face datasets: path, splits, features", yaml_only=True
    )
    prompt_feature: str | None = _key_setting("prompt", "prompt")
    completion_feature: str | None = _key_setting("completion", "completion")
    text_feature: str | None = _key_setting("text", "text")
    chat_feature: str | None = _key_setting("chat", "messages")

    chat_template: str | None = setting(
        None, "chat template: a file, a template of the model by name, or chatml (default: the model's own)"
    )
    chat_template_args: dict[str, Any] | None = setting(
        None, "arguments of the chat template, a JSON object such as '{\"enable_thinking\": false}'"
    )

    def data_problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        found = too_small(self, 0, "show_masks")
        if not 0 <= self.valid_fraction <= 0.5:
            found.append(f"valid_fraction is {self.valid_fraction}; it must be at least 0 and at most 0.5")
        try:
            data_entries(self.data)
        except InputError as error:
            found.append(str(error))
        problems = template_args_problems(self.chat_template_args or {})
        return found + [f"chat_template_args: {problem}" for problem in problems]
