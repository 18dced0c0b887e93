"""Answers of a base model and of what runs made of it, greedy, so that they are the same each time."""

from pathlib import Path
from typing import Any


def answers(
    model_name: str, runs: list[tuple[str, Path]], prompts: list[str], max_tokens: int
) -> list[dict[str, Any]]:
    """Ask the base model and each run's adapter.

    Args:
        model_name: base model: directory or Hugging Face repo.
        runs: name and adapter directory of each run.
        prompts: messages of a user, or plain text for a model without a chat template.
        max_tokens: longest answer.

    Returns:
        For each prompt its "prompt" and its "texts": pairs of who answered and what.

    Raises:
        InputError: the model or an adapter cannot be loaded.
    """
    from mlx_lm import generate

    from nalora_mlx.adapters import load_any_adapter
    from nalora_mlx.models import load_model

    texts: list[list[tuple[str, str]]] = [[] for _ in prompts]
    for name, adapter in [("before", None), *runs]:
        model, tokenizer, _ = load_model(model_name)  # anew: an adapter is not taken off again
        if adapter is not None:
            load_any_adapter(model, adapter)
            name = "after" if len(runs) == 1 else name
        model.eval()
        for prompt, found in zip(prompts, texts, strict=True):
            tokens: Any = prompt
            if tokenizer.has_chat_template:
                message = [{"role": "user", "content": prompt}]
                tokens = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
            found.append((name, generate(model, tokenizer, tokens, max_tokens=max_tokens).strip()))
    return [{"prompt": prompt, "texts": found} for prompt, found in zip(prompts, texts, strict=True)]
