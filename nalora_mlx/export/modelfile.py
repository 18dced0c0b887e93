"""An Ollama Modelfile beside a GGUF. Syntax: https://docs.ollama.com/modelfile

Ollama reads weights and tokens from the GGUF, but not its Jinja chat template: it guesses one from a list of its own.
So the template is written in Ollama's form too, where that says the same: where every message is rendered alone,
between two fixed texts for its role.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nalora_mlx.core.storage import write_file

ROLES = ("system", "user", "assistant")
# Texts that are in no template, one for each message of a conversation that is rendered to see what is around them.
_MARKS = tuple(f"nalora{i}mark" for i in range(5))
_CHATS = (
    ("system", "user", "assistant", "user"),
    ("user",),
    ("user", "assistant", "user", "assistant", "user"),
)


@dataclass(frozen=True)
class Wraps:
    """A chat template as fixed texts: (before, after) of a message by role, the prompt of the answer, and the start.

    The start is BOS or nothing; `adds_start` says that tokenizing puts it there anyway, in llama.cpp too. `system` is
    the message that the template puts before a conversation without one.
    """

    around: dict[str, tuple[str, str]]
    prompt: str
    start: str
    adds_start: bool
    system: str | None

    def render(self, messages: list[dict[str, str]]) -> str:
        """What Ollama makes of a conversation, the prompt of the answer included."""
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        texts = [self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1] for m in messages]
        return self.start + "".join(texts) + self.prompt


def write_modelfile(gguf: Path, tokenizer: Any, base: str | None = None) -> tuple[Path, list[str]]:
    """Write GGUF.Modelfile beside a GGUF, unless there is one, for `ollama create NAME -f FILE`.

    Args:
        gguf: the model; or, with `base`, the adapter.
        tokenizer: of the model, for its chat template.
        base: file name of the GGUF of the base model, for an adapter.

    Returns:
        Where it is, and what the user should know of it.
    """
    path = gguf.with_name(f"{gguf.name}.Modelfile")
    if path.exists():
        return path, [f"{path.name} was there and is left as it was"]
    lines, notes = [f"# ollama create NAME -f {path.name}"], []
    if base is None:
        lines.append(f"FROM ./{gguf.name}")
    else:
        lines += ["# The base model as GGUF: nalora export gguf --model BASE", f"FROM ./{base}"]
        lines.append(f"ADAPTER ./{gguf.name}")
    wraps = find_wraps(tokenizer)
    if wraps is not None and not any('"""' in text for text in _texts(wraps)):
        lines.append(f'TEMPLATE """{_go(wraps)}"""')
        if wraps.system is not None:
            lines.append(f'SYSTEM """{wraps.system}"""')
        stop = wraps.around["assistant"][1].strip()
        if stop and not {'"', "\n"} & set(stop):
            lines.append(f'PARAMETER stop "{stop}"')
    elif getattr(tokenizer, "chat_template", None):
        lines.append("# No TEMPLATE: the chat template has no simple form, and Ollama guesses one.")
        notes.append("the chat template has no simple form for Ollama, which guesses one; try its answers")
    else:
        lines.append(
            "# No TEMPLATE: the model has no chat template, and Ollama passes prompts on as they are."
        )
    text = "\n".join(lines) + "\n"
    write_file(path, lambda place: _write(place, text))
    return path, notes


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _texts(wraps: Wraps) -> list[str]:
    return [*(text for pair in wraps.around.values() for text in pair), wraps.prompt, wraps.system or ""]


def _go(wraps: Wraps) -> str:
    """The template in Go's language. Nothing is trimmed ({{-), so that every text stands as it is."""
    branches = []
    for role, (before, after) in wraps.around.items():
        branches.append(f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ ')
    cases = "else ".join(branches)
    start = "" if wraps.adds_start else wraps.start
    return f"{start}{{{{ range .Messages }}}}{{{{ {cases}end }}}}{{{{ end }}}}{wraps.prompt}"


def find_wraps(tokenizer: Any) -> Wraps | None:
    """Take a tokenizer's chat template apart; None if it has none, or is no such simple one.

    It is rendered with marks for messages, cut at them, and compared on conversations with what the parts give.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        wraps = _cut(tokenizer)
        if any("{{" in text or "}}" in text for text in _texts(wraps)):
            return None
        known = [roles for roles in _CHATS if set(roles) <= wraps.around.keys()]
        agree = all(_render(tokenizer, roles, True) == wraps.render(_messages(roles)) for roles in known)
    except Exception:  # the template raises on such conversations, or does not keep the messages apart
        return None
    return wraps if agree else None


def _cut(tokenizer: Any) -> Wraps:
    """Cut renderings at the marks; raises where a text is not where it should be."""
    one = _render(tokenizer, ["user"], False)
    prompt = _after(one, _render(tokenizer, ["user"], True))
    first, after_user = _between(one, 1)
    _, answer, after_answer = _between(_render(tokenizer, ["user", "assistant"], False), 2)
    _, _, next_user, _ = _between(_render(tokenizer, ["user", "assistant", "user"], False), 3)
    user = (_after(after_answer, next_user), after_user)
    around = {"user": user, "assistant": (_after(after_user, answer), after_answer)}
    bos = getattr(tokenizer, "bos_token", None) or ""
    # Some models begin every message with their BOS; then it is not the start of the text alone.
    start = bos if first.startswith(bos) and not user[0].startswith(bos) else ""
    adds = bool(bos) and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    brought = _before(_after(start, first), user[0])
    try:
        instructed = _render(tokenizer, ["system", "user"], False)
    except Exception:  # most templates without system messages say so
        if brought:
            raise
        return Wraps(around, prompt, start, adds, None)
    opening, closing, _ = _between(instructed, 2)
    system = (_after(start, opening), _before(closing, user[0]))
    text = _before(_after(system[0], brought), system[1]) if brought else None
    return Wraps({"system": system, **around}, prompt, start, adds, text)


def _between(text: str, count: int) -> list[str]:
    """The texts before, between and after the first `count` marks."""
    parts = []
    for mark in _MARKS[:count]:
        part, text = text.split(mark)
        parts.append(part)
    return [*parts, text]


def _after(start: str, text: str) -> str:
    """The text without its start."""
    if not text.startswith(start):
        raise ValueError("a message changes what is before it")
    return text[len(start) :]


def _before(text: str, end: str) -> str:
    """The text without its end."""
    if not text.endswith(end):
        raise ValueError("a message changes what is before it")
    return text[: len(text) - len(end)]


def _messages(roles: Any) -> list[dict[str, str]]:
    return [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=False)]


def _render(tokenizer: Any, roles: Any, prompt: bool) -> str:
    return tokenizer.apply_chat_template(_messages(roles), tokenize=False, add_generation_prompt=prompt)
