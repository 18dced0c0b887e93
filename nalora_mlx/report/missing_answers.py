"""Answers for runs that have none: runs of older versions, with --no-samples, or stopped early."""

import math
from collections.abc import Callable

from nalora_mlx.core.errors import InputError
from nalora_mlx.report.run_data import RunData


def add_answers(model_name: str, runs: list[RunData], notify: Callable[[str], None] = print) -> None:
    """Answer the prompts of runs without answers, and keep the answers in the runs, like those of training.

    Args:
        model_name: base model of the runs: directory or Hugging Face repo.
        runs: those that have answers are left as they are.
        notify: called with a line for each run, because models take a while.

    Raises:
        InputError: no run lacks answers, a run has saved no prompts, or the model or an adapter cannot be loaded.
    """
    from nalora_mlx.adapters.comparison import load_tuned
    from nalora_mlx.cli import configure_chats, note_merged
    from nalora_mlx.core.paths import check_paths
    from nalora_mlx.models.loading import load_module, load_tokenizer
    from nalora_mlx.runs.samples import readable
    from nalora_mlx.training.samples import write_samples

    missing = [run for run in runs if not run.samples]
    if not missing:
        raise InputError("--model: the runs have answers already; leave it out, or ask more with nalora chat")
    for run in missing:
        check_paths(model_name, str(run.path))
        if not run.prompts:
            raise InputError(f"{run.path} has saved no prompts to answer; ask with nalora chat --compare")
    notify(f"loading {model_name}")
    base, _ = load_module(model_name)
    for run in missing:
        note_merged(model_name, run.path)
        tokenizer = load_tokenizer(model_name)
        configure_chats(tokenizer, None, None, run.path)
        prompts = [
            {
                "source": "",
                "prompt": readable(prompt["messages"]) if "messages" in prompt else prompt["text"],
                "expected": None,
                **prompt,
            }
            for prompt in run.prompts
        ]
        notify(f"{run.name}: answering {len(prompts)} prompts with the base and the tuned model")
        run.samples = write_samples(
            load_tuned(base, model_name, run.path), tokenizer, prompts, run.path, notify, math.inf
        )
