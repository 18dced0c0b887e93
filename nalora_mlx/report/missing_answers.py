"""Answers for runs that have none: runs of older versions, with --no-samples, or stopped early."""

import math
from collections.abc import Callable
from typing import Any

from nalora_mlx.core.errors import InputError, counted
from nalora_mlx.report.run_data import RunData


def add_answers(model_name: str, runs: list[RunData], notify: Callable[[str], None] = print) -> None:
    """Answer the prompts of runs without answers, and keep the answers in the runs, like those of training.

    Args:
        model_name: base model of the runs: directory or Hugging Face repo.
        runs: those that have answers are left as they are.
        notify: called with a line for each run, because models take a while.

    Raises:
        InputError: no run lacks answers, a run has saved no prompts without images, or the model or an adapter cannot
            be loaded.
    """
    from nalora_mlx.adapters.comparison import load_tuned
    from nalora_mlx.cli import configure_chats, note_merged
    from nalora_mlx.core.paths import check_paths
    from nalora_mlx.models.loading import load_module, load_tokenizer
    from nalora_mlx.models.vision.loading import open_processor, open_vision_model
    from nalora_mlx.runs.samples import readable
    from nalora_mlx.training.samples import write_samples
    from nalora_mlx.vision_models import needs_mlx_vlm

    missing = [run for run in runs if not run.samples]
    if not missing:
        raise InputError("--model: the runs have answers already; leave it out, or ask more with nalora chat")
    for run in missing:
        check_paths(model_name, str(run.path))
        if not run.prompts:
            raise InputError(f"{run.path} has saved no prompts to answer; ask with nalora chat --compare")
        if not _without_images(run):
            raise InputError(
                f"{run.path}: its prompts have images, which a run does not keep; ask with nalora chat --compare and "
                "/image PATH"
            )
    notify(f"loading {model_name}")
    sees = any(needs_mlx_vlm(model_name, run.path) for run in missing)
    base, config = open_vision_model(model_name) if sees else load_module(model_name)
    for run in missing:
        note_merged(model_name, run.path)
        processor = open_processor(model_name, config) if sees else None
        tokenizer = processor.tokenizer if processor else load_tokenizer(model_name)
        configure_chats(tokenizer, None, None, run.path)
        prompts = [
            {
                "source": "",
                "prompt": readable(prompt["messages"]) if "messages" in prompt else prompt["text"],
                "expected": None,
                **prompt,
            }
            for prompt in _without_images(run)
        ]
        if left_out := len(run.prompts) - len(prompts):
            notify(
                f"{run.name}: {counted(left_out, 'prompt')} with images left out; a run does not keep images"
            )
        notify(f"{run.name}: answering {len(prompts)} prompts with the base and the tuned model")
        run.samples = write_samples(
            load_tuned(base, model_name, run.path),
            tokenizer,
            prompts,
            run.path,
            notify,
            math.inf,
            processor=processor,
        )


def _without_images(run: RunData) -> list[dict[str, Any]]:
    return [prompt for prompt in run.prompts if not prompt.get("images")]
