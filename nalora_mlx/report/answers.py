"""Answers of a base model and of what runs made of it, greedy, so that they are the same each time."""

from pathlib import Path
from typing import Any


def answers(
    model_name: str, runs: list[tuple[str, Path]], prompts: list[dict[str, Any]], max_tokens: int
) -> list[dict[str, Any]]:
    """Ask the base model and each run's adapter.

    Args:
        model_name: base model: directory or Hugging Face repo.
        runs: name and adapter directory of each run.
        prompts: each with "messages" and perhaps "tools", or with a "text" to go on with.
        max_tokens: longest answer.

    Returns:
        For each prompt its "prompt" and its "texts": pairs of who answered and what.

    Raises:
        InputError: the model or an adapter cannot be loaded.
    """
    from mlx_lm import generate

    from nalora_mlx.adapters.files import load_any_adapter
    from nalora_mlx.models.loading import load_model

    texts: list[list[tuple[str, str]]] = [[] for _ in prompts]
    for name, adapter in [("before", None), *runs]:
        model, tokenizer, _ = load_model(model_name)  # anew: an adapter is not taken off again
        if adapter is not None:
            load_any_adapter(model, adapter)
            name = "after" if len(runs) == 1 else name
        model.eval()
        for prompt, found in zip(prompts, texts, strict=True):
            tokens: Any = _shown(prompt)
            if "messages" in prompt and tokenizer.has_chat_template:
                tokens = tokenizer.apply_chat_template(
                    prompt["messages"],
                    tools=prompt.get("tools"),
                    add_generation_prompt=True,
                    return_dict=False,
                )
            found.append((name, generate(model, tokenizer, tokens, max_tokens=max_tokens).strip()))
    return [{"prompt": _shown(prompt), "texts": found} for prompt, found in zip(prompts, texts, strict=True)]


def _shown(prompt: dict[str, Any]) -> str:
    """A prompt as a person reads it: who says what, if it is more than one message."""
    if "text" in prompt:
        return str(prompt["text"])
    messages = prompt["messages"]
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
