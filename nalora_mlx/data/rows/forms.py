"""The forms that rows come in, tried in a fixed order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.parsing import did_you_mean
from nalora_mlx.data.rows.cells import check_unicode, is_blank, parsed_cell, text_in
from nalora_mlx.data.rows.features import Features
from nalora_mlx.data.rows.messages import SHAREGPT_KEYS, Chat, Message, joined, read_chat, read_turns
from nalora_mlx.data.rows.preferences import (
    CHOSEN,
    LABEL,
    PROMPT_KEYS,
    REJECTED,
    instruction,
    read_preference,
)

KEY_FLAGS = "--prompt-key, --completion-key, --chat-key and --text-key"


class UnknownForm(InputError):
    """The keys of a row fit no form."""


@dataclass(frozen=True)
class Form:
    """A form of rows.

    Attributes:
        name: in messages.
        needs: keys that a row must have. At least one of them must not be blank, because tables pad their rows.
        parts: all keys that the form reads, and what they become.
        read: returns what a row holds: a chat, or a text.
        named_by: the settings that name the keys; none for forms with fixed keys.
    """

    name: str
    needs: tuple[str, ...]
    parts: Mapping[str, str]
    read: Callable[[Mapping[str, Any]], Chat | str]
    named_by: tuple[str, ...] = ()

    def fits(self, content: Mapping[str, Any]) -> bool:
        """Return whether a row has the keys, and more than padding in them."""
        filled = False
        for key in self.needs:
            value = content.get(key)
            if value is None:
                return False
            filled = filled or not is_blank(value)
        return filled


class Forms(NamedTuple):
    """Forms to try in order.

    Attributes:
        ordered: the forms, each after its first key.
        only_named: whether all of them have keys that the user has named.
        features: the keys.
        prefer: whether the run trains on preferences.
        labels: whether it also trains on single answers with labels.
    """

    ordered: tuple[tuple[str, Form], ...]
    only_named: bool
    features: Features
    prefer: bool = False
    labels: bool = False


@lru_cache(maxsize=32)
def known_forms(features: Features, prefer: bool = False, labels: bool = False) -> Forms:
    """Return the forms to try.

    1. Preferences, if the run trains on them (`prefer`). With `labels` it also reads labels of single answers.
    2. Forms whose keys the user has named; only these, if a key is not the usual one.
    3. The forms of mlx_lm.lora in its order, but a text after the forms that seldom mean anything else.
    4. Pairs with other keys.
    """
    preferences = Form(
        "preferences",
        (CHOSEN, REJECTED),
        {
            **dict.fromkeys((features.prompt, *PROMPT_KEYS), "prompt"),
            CHOSEN: "chosen answer",
            REJECTED: "rejected answer",
        },
        partial(read_preference, features.prompt),
    )
    forms = [
        _pair("prompt/completion", features.prompt, features.completion, ("prompt", "completion"), labels),
        Form(
            "chat", (features.chat,), {features.chat: "chat"}, partial(_read_chat, features.chat), ("chat",)
        ),
        preferences,
        *(Form("ShareGPT", (key,), {key: "chat"}, partial(_read_chat, key)) for key in SHAREGPT_KEYS),
        _instructions("Alpaca", "instruction", "input", "output"),
        _instructions("Dolly", "instruction", "context", "response"),
        Form("text", (features.text,), {features.text: "text"}, partial(_read_text, features), ("text",)),
        *(
            _pair(f"{p}/{c}", p, c, in_cells=labels)
            for p in ("question", "query")
            for c in ("answer", "response")
        ),
        _pair("prompt/response", "prompt", "response", in_cells=labels),
        _pair("input/output", "input", "output", in_cells=labels),
    ]
    first = [preferences] if prefer else []
    first += [form for form in forms if not features.named.isdisjoint(form.named_by)]
    if not features.unusual:
        first += [form for form in forms if form not in first]
    ordered = tuple((form.needs[0], form) for form in first)
    return Forms(ordered, bool(features.unusual), features, prefer, labels)


def form_of(content: Mapping[str, Any], forms: Forms) -> Form:
    """Return the form of a row: the first that fits, or else the first whose keys are there, though blank.

    Raises:
        UnknownForm: no form has these keys.
    """
    for key, form in forms.ordered:
        if key in content and form.fits(content):
            return form
    for _, form in forms.ordered:
        if all(key in content for key in form.needs):
            return form
    features = forms.features
    found = ", ".join(map(repr, content))[:200] or "nothing"
    if forms.prefer and (problem := _uncompared(content, forms, found)):
        raise UnknownForm(problem)
    if not forms.only_named:
        for _, form in forms.ordered:
            missing = [key for key in form.needs if key not in content]
            if len(missing) == 1 < len(form.needs):
                there = next(key for key in form.needs if key in content)
                raise UnknownForm(
                    f"{missing[0]!r} is missing or an empty cell, and {there!r} needs it; fill it, remove the row, or "
                    f"name other keys with {KEY_FLAGS} (found {found})"
                )
        raise UnknownForm(
            f"no known format; give {features.prompt!r} and {features.completion!r}, or {features.chat!r}, "
            f"or {features.text!r}, or name other keys with {KEY_FLAGS} (found {found})"
        )
    form = next(form for _, form in forms.ordered if form.named_by)
    key, part = next(pair for pair in zip(form.needs, form.named_by, strict=True) if pair[0] not in content)
    known = [name for name in content if isinstance(name, str)]
    raise UnknownForm(
        f"no {key!r}, the key of the {part} (found {found}); --{part}-key names another{did_you_mean(key, known)}"
    )


def _uncompared(content: Mapping[str, Any], forms: Forms, found: str) -> str:
    """Return the problem of a row of no known form in a preference run; empty if it is a single answer with a label."""
    there = [key for key in (CHOSEN, REJECTED) if key in content]
    if len(there) == 1:
        (missing,) = {CHOSEN, REJECTED} - {*there}
        return (
            f"{missing!r} is missing or an empty cell, and {there[0]!r} needs it; fill it, or remove the row "
            f"(found {found})"
        )
    if forms.labels and LABEL in content:
        return ""
    prompt = forms.features.prompt
    labelled = f", or {prompt!r}, {forms.features.completion!r} and {LABEL!r}" if forms.labels else ""
    return f"no known format; give {prompt!r}, {CHOSEN!r} and {REJECTED!r}{labelled} (found {found})"


def _pair(
    name: str, prompt: str, completion: str, named_by: tuple[str, ...] = (), in_cells: bool = False
) -> Form:
    return Form(
        name,
        (prompt, completion),
        {prompt: "prompt", completion: "completion"},
        partial(_read_pair, prompt, completion, in_cells),
        named_by,
    )


def _read_pair(prompt: str, completion: str, in_cells: bool, content: Mapping[str, Any]) -> Chat:
    asked, answer = content[prompt], content[completion]
    if (
        type(asked) is str and type(answer) is str and not in_cells
    ):  # most rows; the rest would read them too, more slowly
        if not (asked.isascii() and answer.isascii()):
            check_unicode(asked, repr(prompt))
            check_unicode(answer, repr(completion))
        return Chat([{"role": "user", "content": asked}, {"role": "assistant", "content": answer}])
    answers = read_turns(content, completion, "assistant", in_cells)
    if answers.messages[0]["role"] != "assistant":
        raise InputError(
            f"{completion!r} must begin with an assistant message; if it holds whole chats, "
            f"give --chat-key {completion} instead"
        )
    return joined(read_turns(content, prompt, "user", in_cells), answers)


def _instructions(name: str, prompt: str, context: str, completion: str) -> Form:
    parts = {prompt: "prompt", context: "prompt", completion: "completion", "history": "earlier turns"}
    return Form(name, (prompt, completion), parts, partial(_read_instruction, prompt, context, completion))


def _read_instruction(prompt: str, context: str, completion: str, content: Mapping[str, Any]) -> Chat:
    history = Chat(_read_history(content.get("history")))
    answer = Chat([{"role": "assistant", "content": text_in(content, completion)}])
    return joined(history, instruction(content, prompt, context), answer)


def _read_history(value: Any) -> list[Message]:
    """Return earlier turns, which are a list of [question, answer]."""
    pairs = parsed_cell(value)
    if is_blank(pairs):
        return []
    messages = []
    for pair in pairs if isinstance(pairs, list) else [None]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise InputError("'history' must be a list of [question, answer]")
        turns = dict(zip(("user", "assistant"), pair, strict=True))
        messages += [
            {"role": role, "content": text_in({"history": text}, "history")} for role, text in turns.items()
        ]
    return messages


def _read_chat(key: str, content: Mapping[str, Any]) -> Chat:
    return read_chat(content[key], key)


def _read_text(features: Features, content: Mapping[str, Any]) -> str:
    if features.mask_prompt:
        raise InputError("--mask-prompt needs prompt/completion or chat rows; this row is a text")
    return text_in(content, features.text)
