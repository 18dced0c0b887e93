"""Content of chats that the rendered text does not hold, because the chat template leaves it out."""

from collections.abc import Iterator
from dataclasses import replace

from nalora_mlx.core.errors import InputError
from nalora_mlx.data.chats.chat_encoder import ChatEncoder, Encoding
from nalora_mlx.data.chats.contents import RenderedText, split_reasoning
from nalora_mlx.data.findings import Finding
from nalora_mlx.data.rows.formats import Row


def dropped_parts(row: Row, encoder: ChatEncoder, encoding: Encoding) -> Iterator[tuple[Finding, str]]:
    """Yield what the template leaves out of a chat, and the role of its message.

    With masked prompts, an assistant turn must be in its target, and otherwise after the previous message. Everything
    else, up to the last target, must be in one of the sequences. Turns that are not trained on do not count: their
    reasoning, for example, is no part of later contexts.
    """
    whole, position = RenderedText("\n".join(encoding.texts)), 0
    last = max(encoding.targets, default=-1) if encoder.mask_prompt else len(row.messages)
    for index, message in enumerate(row.messages[: last + 1]):
        role, text = message["role"], whole
        content = message.get("content") or ""
        if isinstance(content, list):
            content = [part["text"] for part in content if part["type"] == "text"]
        if role == "assistant" and encoder.mask_prompt:
            if index not in encoding.targets:
                continue
            text = RenderedText(encoding.targets[index])
        elif role == "assistant":
            text = RenderedText(whole.text[position:])
        if isinstance(content, str) and (start := whole.text.find(content.strip(), position)) >= 0:
            position = start + len(content.strip())
        reasoning, without_reasoning = split_reasoning(message)
        if not text.holds(content) and not (reasoning and text.holds(without_reasoning.get("content") or "")):
            yield (Finding.DROPPED_SYSTEM if role == "system" else Finding.DROPPED_CONTENT), role
        if not text.holds(reasoning):
            yield Finding.DROPPED_REASONING, role
        if not all(text.holds_call(call) for call in message.get("tool_calls") or ()):
            yield Finding.IGNORED_TOOL_CALLS, role
    if row.tools and _ignores_tools(row, encoder):
        yield Finding.IGNORED_TOOLS, ""


def _ignores_tools(row: Row, encoder: ChatEncoder) -> bool:
    """Return whether a chat without its tools is rendered as with them."""
    trained = encoder.trained_turns(row)
    messages = row.messages[: trained[-1]] if encoder.mask_prompt and trained else row.messages
    prompt = len(messages) < len(row.messages)
    try:
        render = encoder.renderer.render
        return render(row, messages, prompt) == render(replace(row, tools=None), messages, prompt)
    except InputError:  # the template needs the tools, so it does not ignore them
        return False


def control_token(row: Row, encoder: ChatEncoder) -> str:
    """Return a control token that a chat's contents hold as text, if any. Tags of reasoning are not meant."""
    for message in row.messages:
        content = message.get("content")
        texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content or ()]
        for text in (token for whole in texts for token in encoder.text_encoder.split(whole)[1::2]):
            if text in encoder.text_encoder.control_texts and "think" not in text:
                return text
    return ""
