"""Ollama Modelfiles for GGUF files. Syntax: https://docs.ollama.com/modelfile

Ollama reads weights and tokens from the GGUF but not its Jinja chat template: it guesses one from its own list. The
Modelfile therefore contains the template in Ollama's language, if it can be expressed there: if each message is
rendered independently, between two fixed texts for its role.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nalora_mlx.core.storage import write_file
from nalora_mlx.export.gguf.vocabulary.ends import end_texts

# Contents of messages that no template contains, to see what it puts around them.
_MARKERS = tuple(f"nalora{i}mark" for i in range(5))
_CHECKED_CHATS = (
    ("system", "user", "assistant", "user"),
    ("user",),
    ("user", "assistant", "user", "assistant", "user"),
)


@dataclass(frozen=True)
class ChatFormat:
    """A chat template that puts fixed texts around each message."""

    wrappers: dict[str, tuple[str, str]]  # role -> (text before, text after)
    generation_prompt: str  # starts the answer
    start: str  # BOS or empty
    adds_start: bool  # whether tokenization adds BOS anyway, in llama.cpp too
    default_system: str | None  # system message that the template adds to conversations without one

    def render(self, messages: list[dict[str, str]]) -> str:
        """Return what Ollama makes of a conversation, including the generation prompt."""
        if self.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        texts = []
        for message in messages:
            before, after = self.wrappers[message["role"]]
            texts.append(before + message["content"] + after)
        return self.start + "".join(texts) + self.generation_prompt

    def texts(self) -> list[str]:
        """Return the fixed texts that go into a Modelfile."""
        wrappers = [text for pair in self.wrappers.values() for text in pair]
        return [*wrappers, self.generation_prompt, self.default_system or ""]

    def go_template(self) -> str:
        """Return the template in Go's template language, without trimming ({{-), so that texts stay unchanged."""
        branches = []
        for role, (before, after) in self.wrappers.items():
            branches.append(f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ ')
        cases = "else ".join(branches)
        start = "" if self.adds_start else self.start
        return f"{start}{{{{ range .Messages }}}}{{{{ {cases}end }}}}{{{{ end }}}}{self.generation_prompt}"


def modelfile_path(gguf: Path) -> Path:
    """Return the path of the Modelfile that belongs to a GGUF file."""
    return gguf.with_name(f"{gguf.name}.Modelfile")


def write_modelfile(gguf: Path, tokenizer: Any, base: str | None = None) -> tuple[Path, list[str]]:
    """Write GGUF.Modelfile for `ollama create NAME -f FILE`, unless it exists.

    Args:
        gguf: file of the model, or of the adapter if `base` is given.
        tokenizer: the model's tokenizer, for its chat template; None if unknown.
        base: for an adapter, the file name of the base model's GGUF.

    Returns:
        The path of the Modelfile, and notes for the user.
    """
    path = modelfile_path(gguf)
    if path.exists():
        return path, [f"{path.name} exists and was not changed"]
    lines, notes = [f"# ollama create NAME -f {shlex.quote(path.name)}"], []
    if base is None:
        lines.append(f"FROM ./{gguf.name}")
    else:
        lines.append("# Write the base model with: nalora export gguf --model BASE")
        lines += [f"FROM ./{base}", f"ADAPTER ./{gguf.name}"]
    chat_format = extract_chat_format(tokenizer)
    if chat_format is not None and not any('"""' in text for text in chat_format.texts()):
        lines.append(f'TEMPLATE """{chat_format.go_template()}"""')
        if chat_format.default_system is not None:
            lines.append(f'SYSTEM """{chat_format.default_system}"""')
    elif getattr(tokenizer, "chat_template", None):
        lines.append("# No TEMPLATE: Ollama cannot express the chat template, and guesses one.")
        notes.append("Ollama cannot express the model's chat template and guesses one; check its answers")
    else:
        lines.append("# No TEMPLATE: the model has no chat template, so Ollama passes prompts on unchanged.")
    lines += [f'PARAMETER stop "{stop}"' for stop in _stop_words(tokenizer, chat_format)]
    text = "\n".join(lines) + "\n"
    write_file(path, lambda temporary: _write_text(temporary, text))
    return path, notes


def _stop_words(tokenizer: Any, chat_format: ChatFormat | None) -> list[str]:
    """Return the texts of all end tokens, and what the template puts after an answer."""
    words = end_texts(tokenizer) if tokenizer is not None else []
    if chat_format is not None:
        words.append(chat_format.wrappers["assistant"][1].strip())
    return [word for word in dict.fromkeys(words) if word and not {'"', "\n"} & set(word)]


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def extract_chat_format(tokenizer: Any) -> ChatFormat | None:
    """Return the fixed texts of a tokenizer's chat template; None if it has none or does not work that way.

    1. Render short conversations whose messages are markers, and split the results at the markers.
    2. Render longer conversations with the texts found, and compare with the template.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        chat_format = _split_template(tokenizer)
        if any("{{" in text or "}}" in text for text in chat_format.texts()):
            return None
        chats = [roles for roles in _CHECKED_CHATS if set(roles) <= chat_format.wrappers.keys()]
        equal = all(
            _render(tokenizer, roles, True) == chat_format.render(_messages(roles)) for roles in chats
        )
    except Exception:  # the template rejects these conversations, or changes or mixes messages
        return None
    return chat_format if equal else None


def _split_template(tokenizer: Any) -> ChatFormat:
    """Split rendered conversations at the markers.

    Raises:
        ValueError: a text is not where it should be.
    """
    one_turn = _render(tokenizer, ["user"], False)
    generation_prompt = _remove_prefix(_render(tokenizer, ["user"], True), one_turn)
    opening, after_user = _split_at_markers(one_turn, 1)
    _, middle, after_assistant = _split_at_markers(_render(tokenizer, ["user", "assistant"], False), 2)
    two_turns = _render(tokenizer, ["user", "assistant", "user"], False)
    _, _, next_middle, _ = _split_at_markers(two_turns, 3)
    before_user = _remove_prefix(next_middle, after_assistant)
    before_assistant = _remove_prefix(middle, after_user)
    wrappers = {"user": (before_user, after_user), "assistant": (before_assistant, after_assistant)}

    bos = getattr(tokenizer, "bos_token", None) or ""
    # If every message begins with BOS, it belongs to the messages and not to the start.
    start = bos if opening.startswith(bos) and not before_user.startswith(bos) else ""
    adds_start = bool(bos) and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    default_message = _remove_suffix(_remove_prefix(opening, start), before_user)
    try:
        with_system = _render(tokenizer, ["system", "user"], False)
    except Exception:  # most templates without system messages raise an error
        if default_message:
            raise
        return ChatFormat(wrappers, generation_prompt, start, adds_start, None)
    opening, middle, _ = _split_at_markers(with_system, 2)
    before_system, after_system = _remove_prefix(opening, start), _remove_suffix(middle, before_user)
    default_system = None
    if default_message:
        default_system = _remove_suffix(_remove_prefix(default_message, before_system), after_system)
    wrappers = {"system": (before_system, after_system), **wrappers}
    return ChatFormat(wrappers, generation_prompt, start, adds_start, default_system)


def _split_at_markers(text: str, count: int) -> list[str]:
    """Return the texts before, between and after the first `count` markers."""
    parts = []
    for marker in _MARKERS[:count]:
        part, text = text.split(marker)
        parts.append(part)
    return [*parts, text]


def _remove_prefix(text: str, prefix: str) -> str:
    if not text.startswith(prefix):
        raise ValueError("a message changes the text before it")
    return text[len(prefix) :]


def _remove_suffix(text: str, suffix: str) -> str:
    if not text.endswith(suffix):
        raise ValueError("a message changes the text before it")
    return text[: len(text) - len(suffix)]


def _messages(roles: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": marker} for role, marker in zip(roles, _MARKERS, strict=False)]


def _render(tokenizer: Any, roles: Sequence[str], add_generation_prompt: bool) -> str:
    return tokenizer.apply_chat_template(
        _messages(roles), tokenize=False, add_generation_prompt=add_generation_prompt
    )
