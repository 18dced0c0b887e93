"""What to do after training: commands with the right model and adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nalora_mlx.core.config import RunConfig
from nalora_mlx.runs.checkpoints import BEST
from nalora_mlx.runs.progress import TrainResult

CLEARLY_BETTER = 0.98  # of the last validation loss: below it, the best adapter is suggested
CLEARLY_MORE_ACCURATE = 0.02  # difference of validation accuracies above which it is suggested, too
QUOTED_PROMPT = 60  # characters of a prompt that is shown as part of a command


def next_steps(
    config: RunConfig, result: TrainResult, prompts: Sequence[Mapping[str, Any]] = ()
) -> list[tuple[str, list[str]]]:
    """Return commands, each as a word that says what it is for and its arguments.

    Args:
        config: settings of the run.
        result: of the training. If its best validation is clearly better than its last one, the commands name the best
            adapter. They evaluate it if the run has a test set or validation rows.
        prompts: of the run's data, see `runs.samples.choose_prompts`. A run on texts gets `nalora generate` instead of
            a chat.
    """
    output = config.adapter_path
    adapter = str(Path(output) / BEST) if has_better_adapter(result) else output
    model = ["--model", config.model, "--adapter-path", adapter]
    if config.trust_remote_code:
        model.append("--trust-remote-code")
    report = ("report", ["nalora", "report", output, "--open"])
    merge = ("merge", ["nalora", "fuse", *model])
    if prompts and "text" in prompts[0]:
        prompt = " ".join(prompts[0]["text"][:QUOTED_PROMPT].split())
        return [("generate", ["nalora", "generate", *model, "--prompt", prompt]), report, merge]
    chat = ["nalora", "chat", *model]
    has_rows = config.test or result.valid_loss is not None
    evaluate = [("evaluate", ["nalora", "evaluate", *model])] if has_rows else []
    return [("chat", chat), ("compare", [*chat, "--compare"]), report, *evaluate, merge]


def has_better_adapter(result: TrainResult) -> bool:
    """Return whether the best adapter is clearly better than the last one."""
    best, last = result.best_valid_loss, result.valid_loss
    gain = (result.best_valid_accuracy or 0.0) - (result.valid_accuracy or 0.0)
    if gain > CLEARLY_MORE_ACCURATE:
        return True
    return best is not None and (last is None or best < CLEARLY_BETTER * last)
