"""Answers of a base model and of the runs that trained it. Decoding is greedy, so that they are reproducible."""

from pathlib import Path
from typing import Any


def answers(
    model_name: str,
    runs: list[tuple[str, Path]],
    prompts: list[dict[str, Any]],
    max_tokens: int,
    template: str | None = None,
    template_args: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Answer prompts with the base model and with each run's adapter.

    Each run gets the prompts as its training rendered chats, and the base model as the first run.

    Args:
        model_name: base model: directory or Hugging Face repo.
        runs: name and adapter directory of each run.
        prompts: each has "messages" and optionally "tools", or "text" to be continued.
        max_tokens: maximum length of an answer.
        template: value of --chat-template; None for the runs' own.
        template_args: value of --chat-template-args; None for the runs' own.

    Returns:
        For each prompt, "prompt" as text and "texts": pairs of a model's name and its answer.

    Raises:
        InputError: the model or an adapter cannot be loaded.
    """
    from nalora_mlx.adapters.comparison import load_tuned
    from nalora_mlx.cli import configure_chats
    from nalora_mlx.models.conversation import greedy_answer
    from nalora_mlx.models.loading import load_module, load_tokenizer

    base, _ = load_module(model_name)
    base.eval()
    texts: list[list[tuple[str, str]]] = [[] for _ in prompts]

    def ask(name: str, model: Any, tokenizer: Any) -> None:
        for prompt, found in zip(prompts, texts, strict=True):
            answer = greedy_answer(model, tokenizer, _encode(tokenizer, prompt), max_tokens)
            found.append((name, answer.text.strip()))

    for number, (name, adapter) in enumerate(runs):
        tokenizer = load_tokenizer(model_name)
        configure_chats(tokenizer, template, template_args, adapter)
        if number == 0:
            ask("before", base, tokenizer)
        ask("after" if len(runs) == 1 else name, load_tuned(base, model_name, adapter), tokenizer)
    return [
        {"prompt": _as_text(prompt), "texts": found} for prompt, found in zip(prompts, texts, strict=True)
    ]


def _encode(tokenizer: Any, prompt: dict[str, Any]) -> str | list[int]:
    """Return a prompt as the model reads it: token ids of a chat, or plain text."""
    from nalora_mlx.models.conversation import render_prompt

    if "messages" in prompt and tokenizer.has_chat_template:
        return render_prompt(
            tokenizer, prompt["messages"], prompt.get("tools"), prompt.get("chat_template_kwargs", {})
        )
    return _as_text(prompt)


def _as_text(prompt: dict[str, Any]) -> str:
    """Return a prompt as readers see it: with the roles if it has more than one message."""
    if "text" in prompt:
        return str(prompt["text"])
    messages = prompt["messages"]
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
