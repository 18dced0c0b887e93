"""Rows of training data: what a JSON object in any of the known forms means."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.template_args import template_args_problems
from nalora_mlx.data.rows.cells import check_unicode, is_blank, parsed_cell, text_in
from nalora_mlx.data.rows.features import Features
from nalora_mlx.data.rows.forms import Form, Forms, UnknownForm, form_of, known_forms
from nalora_mlx.data.rows.images import place_images, read_images
from nalora_mlx.data.rows.messages import Chat, joined
from nalora_mlx.data.rows.preferences import (
    CHOSEN,
    LABEL,
    REJECTED,
    labelled_start,
    read_label,
    supervised_remedy,
)
from nalora_mlx.data.rows.survey import Survey
from nalora_mlx.data.rows.tool_calls import read_tools

__all__ = ["IMAGES", "LABELS", "PREFERENCES", "Features", "Row", "parse_row", "parse_rows"]

PREFERENCES, LABELS, IMAGES = "preferences", "labels", "images"  # kinds of rows that not every run trains on
MAX_WEIGHT = 1000  # of a row; more is likely a column of another meaning
# Keys beside a chat: of the first that is not blank, the value is read.
_ALTERNATIVES = (("system", "system_prompt"), ("tools", "functions"), ("images", "image"))


@dataclass(frozen=True)
class Row:
    """One valid row of training data: a chat or a text.

    Attributes:
        source: where it comes from: file:line or dataset[split]:number.
        messages: the chat, empty for a text. A prompt and completion become a user and an assistant message.
        tools: what the row holds under "tools", for the chat template.
        text: the text, empty for a chat.
        template_args: arguments of the chat template that the row brings, under "chat_template_kwargs".
        untrained: indices of the assistant messages that are not trained on ("weight": 0 or "train": false).
        weight: how many times an epoch holds the row.
        chunk: whether a text longer than the sequence length becomes several sequences, instead of being truncated.
        rejected: in preference rows, the worse end of the chat, in place of the messages from `answer_start` on.
        answer_start: in preference rows, index of the first message that is compared or labelled.
        label: whether a single answer is a good one, in rows for KTO.
        images: the images of a row in the order of their appearance: paths, bytes of files, data URIs or images of
            Pillow. In the data of a run, paths are absolute.
    """

    source: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    template_args: Mapping[str, Any] = field(default_factory=dict)
    untrained: frozenset[int] = frozenset()
    weight: int = 1
    chunk: bool = False
    rejected: list[dict[str, Any]] | None = None
    images: tuple[Any, ...] = ()
    answer_start: int = 0
    label: bool | None = None


class _Unread(NamedTuple):
    """What nothing reads in a row: keys of it, keys of its messages, and a system prompt."""

    keys: Collection[str] = ()
    message_keys: Collection[str] = ()
    system: bool = False


def parse_row(source: str, content: Mapping[str, Any], features: Features) -> Row:
    """Return the row that a JSON object holds. The first form that fits is taken, see `known_forms`.

    Raises:
        InputError: the keys fit no form, or a value is wrong; the message begins with the source.
    """
    return _parse_any_case(source, content, known_forms(features))[0]


def parse_rows(
    contents: Iterable[tuple[str, Mapping[str, Any]]],
    features: Features,
    survey: Survey | None = None,
    accepted: Collection[str] = (),
) -> tuple[list[Row], list[str]]:
    """Parse (source, JSON object) pairs; return the valid rows and one problem for each of the others.

    Args:
        contents: the pairs.
        features: keys of the rows.
        survey: counts the forms of the rows, and what nothing reads in them.
        accepted: which of PREFERENCES, LABELS and IMAGES the run trains on. Rows with others are problems; with
            PREFERENCES or LABELS, so are rows without them.
    """
    rows, problems = [], []
    forms = known_forms(features, PREFERENCES in accepted, LABELS in accepted)
    for source, content in contents:
        try:
            row, form, unread, content = _parse_any_case(source, content, forms)
            if unread is not None and (row.rejected or row.images):
                _check_accepted(row, content, features, accepted)
            if PREFERENCES in accepted and not row.rejected:
                _check_compared(row, content, LABELS in accepted)
        except InputError as error:
            problems.append(str(error))
            continue
        rows.append(row)
        if survey is not None:
            survey.add(form, content)
            if unread is not None:
                survey.add_unread(
                    source, unread.keys, unread.message_keys, unread.system, bool(features.named)
                )
                survey.add_weight(source, row.weight)
    return rows, problems


def _check_accepted(
    row: Row, content: Mapping[str, Any], features: Features, accepted: Collection[str]
) -> None:
    """Raise InputError if the run does not train on rows of this kind."""
    if row.rejected and PREFERENCES not in accepted:
        remedy = supervised_remedy(content, features.prompt)
        raise InputError(
            f"{row.source}: holds a chosen and a rejected answer, and supervised training takes one; "
            f"--train-mode dpo trains on both{remedy}"
        )
    if row.images and PREFERENCES in accepted:
        raise InputError(
            f"{row.source}: holds images, and preference training takes none; remove the images, or the row"
        )
    if row.images and IMAGES not in accepted:
        raise InputError(refused_images(row.source))


def _check_compared(row: Row, content: Mapping[str, Any], labels: bool) -> None:
    """Raise InputError for a row without what a preference run compares."""
    if not row.messages:
        what = f"{CHOSEN!r} and {REJECTED!r}" + (f", or 'completion' and {LABEL!r}" if labels else "")
        raise InputError(
            f"{row.source}: is a text, and preference training compares answers; give 'prompt', {what}"
        )
    if labels and row.label is None:
        raise InputError(
            f"{row.source}: has no {LABEL!r} (true for a good answer, false for a bad one), nor a {CHOSEN!r} and a "
            f"{REJECTED!r} answer; --train-mode kto needs one or the other"
        )
    if not labels and is_blank(content.get(LABEL)):
        raise InputError(
            f"{row.source}: has one answer, and nothing to compare it with; give 'prompt', {CHOSEN!r} and "
            f"{REJECTED!r}, or use --train-mode sft"
        )
    if not labels:
        raise InputError(
            f"{row.source}: has one answer with a {LABEL!r}, which --train-mode kto reads; the other preference modes "
            f"need 'prompt', {CHOSEN!r} and {REJECTED!r}"
        )


def refused_images(source: str) -> str:
    """Return the problem that a row with images is for a model that does not see."""
    return f"{source}: holds images, which only vision-language models read; remove the images, or the row"


def _parse(source: str, content: Mapping[str, Any], forms: Forms) -> tuple[Row, Form, _Unread | None]:
    """Return a row, its form, and what nothing reads in it."""
    try:
        if type(content) is not dict and not isinstance(content, Mapping):
            raise InputError(f"holds a {type(content).__name__}; each row must be an object")
        form = form_of(content, forms)
        parts = form.read(content)
        others = {} if content.keys() <= form.parts.keys() else _others(content, form)
        if isinstance(parts, str):
            row, unread = _text_row(source, parts, others) if others else (Row(source, [], text=parts), None)
        elif others or any(parts[1:]):
            row, unread = _chat_row(source, parts, others, forms.labels)
        else:
            row, unread = Row(source, parts.messages), None
        return row, form, unread
    except InputError as error:
        raise type(error)(f"{source}: {error}") from None
    except RecursionError:
        raise InputError(f"{source}: nested too deeply; each row must be a flat object") from None


def _parse_any_case(
    source: str, content: Mapping[str, Any], forms: Forms
) -> tuple[Row, Form, _Unread | None, Mapping[str, Any]]:
    """Parse a row; if no form fits, with its keys in lower case. Return the row with the keys that were read, too."""
    try:
        return *_parse(source, content, forms), content
    except UnknownForm as error:
        lower = _lower_keys(content)  # as in the header of a spreadsheet: Question, Answer
        try:
            return *_parse(source, lower, forms), lower
        except UnknownForm:
            raise error from None


def _lower_keys(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row with keys in lower case, if they stay different."""
    lower = {key.strip().lower() if isinstance(key, str) else key: value for key, value in content.items()}
    return lower if len(lower) == len(content) else content


def _others(content: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """Return what a row holds beside the keys of its form."""
    return {key: value for key, value in content.items() if key not in form.parts and not is_blank(value)}


def _text_row(source: str, text: str, others: Mapping[str, Any]) -> tuple[Row, _Unread]:
    if key := next((key for key in ("images", "image") if key in others), None):
        raise InputError(
            f"{key!r} is read beside a prompt and a completion or in a chat, not beside a text; "
            "write 'prompt' and 'completion', or remove it"
        )
    row = Row(source, [], text=text, weight=_weight(others.get("weight")))
    return row, _Unread([key for key in others if key != "weight"])


def _chat_row(source: str, chat: Chat, others: Mapping[str, Any], has_label: bool) -> tuple[Row, _Unread]:
    """Return a chat with what stands beside it: a system prompt, tools, images, template arguments, a weight."""
    system_key, tools_key, images_key = (
        next((key for key in keys if key in others), None) for keys in _ALTERNATIVES
    )
    unused_system = False
    if system_key:
        message = {"role": "system", "content": text_in(others, system_key)}
        if chat.messages[0]["role"] not in ("system", "developer"):
            chat = joined(Chat([message]), chat)
        else:
            unused_system = message["content"] != chat.messages[0]["content"]
    label = None
    if has_label and LABEL in others and chat.rejected is None:
        label = read_label(others[LABEL])
        chat = chat._replace(answer_start=labelled_start(chat))
    images = read_images(others[images_key]) if images_key else []
    messages, all_images = place_images(chat.messages, chat.images, images)
    row = Row(
        source,
        messages,
        read_tools(others[tools_key], tools_key) if tools_key else None,
        template_args=_template_args(others.get("chat_template_kwargs")),
        untrained=chat.untrained,
        weight=_weight(others.get("weight")),
        rejected=chat.rejected,
        images=all_images,
        answer_start=chat.answer_start,
        label=label,
    )
    used = {system_key, tools_key, images_key, "chat_template_kwargs", "weight"}
    if label is not None:
        used.add(LABEL)
    return row, _Unread([key for key in others if key not in used], chat.unknown_keys, unused_system)


def _weight(value: Any) -> int:
    """Return how often a row counts; a .csv cell holds the number as a string."""
    if value is None:
        return 1
    try:
        number = -1.0 if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        number = -1.0
    if 0 <= number <= MAX_WEIGHT and number == int(number):
        return int(number)
    raise InputError(
        f"'weight' is {str(value)[:50]!r}; it takes whole numbers: 0 leaves the row out, 2 counts it twice "
        f"(at most {MAX_WEIGHT})"
    )


def _template_args(value: Any) -> Mapping[str, Any]:
    args = parsed_cell(value)
    if is_blank(args):
        return {}
    if found := template_args_problems(args):
        raise InputError(f"'chat_template_kwargs': {'; '.join(found)}")
    check_unicode(args, "'chat_template_kwargs'")
    return args
