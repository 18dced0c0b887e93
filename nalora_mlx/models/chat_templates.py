"""Chat templates: which one a tokenizer renders chats with, with which arguments, and at which date.

Everything that renders chats calls the tokenizer's `apply_chat_template`, mlx-lm's server and generator included. So
`configure_chat_template` sets up that one method.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.parsing import nearest

if TYPE_CHECKING:
    from jinja2 import Environment

OWN = "default"  # the name of the tokenizer's own template
CHATML = "chatml"
CHATML_END = "<|im_end|>"
NOW = "strftime_now"  # the template function that prints the date


@dataclass(frozen=True)
class ChatSettings:
    """How chats are rendered.

    Attributes:
        template: text of the chat template; None for the tokenizer's own.
        args: arguments of the template.
        date: local date and time that the template prints, in ISO format; None for the current one.
    """

    template: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None


# --- templates ----------------------------------------------------------------------------------------------


def resolve_template(given: str, tokenizer: Any) -> str | None:
    """Return the text of the chat template that a flag names; None for the tokenizer's own.

    Args:
        given: a file; one of the tokenizer's named templates, "default" for its own; "chatml"; or, as for
            mlx_lm.server, the text of a template.
        tokenizer: tokenizer wrapper of mlx-lm.

    Raises:
        InputError: there is no such template, the file cannot be read, or the template is not valid.
    """
    where = f"--chat-template {given}"
    named = own_templates(tokenizer)
    path = os.path.expanduser(given)  # unlike pathlib, os.path takes texts that cannot be file names
    if "{%" in given or "{{" in given:
        text, where = given, "--chat-template"
    elif os.path.isfile(path):
        text, where = _read(Path(path)), given
    elif given in named:
        text = named[given]
    elif given == CHATML:
        text = _chatml(tokenizer)
    else:
        raise InputError(
            f"{where}: no such file, and not the name of a template{nearest(given, [*named, CHATML])}"
        )
    check_template(text, where)
    return None if text == named.get(OWN) else text


def own_templates(tokenizer: Any) -> dict[str, str]:
    """Return the templates that a tokenizer has, by name; its main one is called "default"."""
    templates = tokenizer.chat_template
    if isinstance(templates, Mapping):
        return dict(templates)
    return {} if templates is None else {OWN: templates}


def check_template(text: str, where: str) -> None:
    """Raise InputError, with the line, if a text is not a valid template."""
    from jinja2 import TemplateSyntaxError

    try:
        _environment().compile(text)
    except TemplateSyntaxError as error:
        raise InputError(f"{where}:{error.lineno}: not a valid chat template: {error.message}") from None
    except (RecursionError, SyntaxError, ValueError) as error:  # too deeply nested for Jinja or for Python
        raise InputError(f"{where}: not a valid chat template: {error}") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--chat-template {path}: cannot be read as text ({error})") from None


def _chatml(tokenizer: Any) -> str:
    """Return the ChatML template.

    A chat begins with the beginning-of-sequence token if the tokenizer puts it before texts. A turn ends in <|im_end|>
    if generation stops there. Otherwise, as for most base models, it ends in the tokenizer's end-of-sequence token, so
    that generation stops after an answer in every program.
    """
    begins = tokenizer.bos_token is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    end = tokenizer.convert_tokens_to_ids(CHATML_END)
    stops = end in tokenizer.eos_token_ids or tokenizer.eos_token is None
    end_of_turn = f"'{CHATML_END}'" if stops else "eos_token"
    return (
        f"{'{{ bos_token }}' if begins else ''}"
        "{% for message in messages %}"
        f"{{{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + {end_of_turn} + '\\n' }}}}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


@functools.cache
def _environment() -> Environment:
    """Return a Jinja environment with the syntax that transformers accepts."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag {% generation %}, which marks what the model writes."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
        optimized=False,  # checking a template must not compute its constants
    )


def template_variables(templates: Iterable[str]) -> set[str]:
    """Return the names that templates read, and perhaps some that they only set."""
    from jinja2 import TemplateError, meta

    found: set[str] = set()
    for text in templates:
        with suppress(TemplateError):  # rendering reports it
            found |= meta.find_undeclared_variables(_environment().parse(text))
    return found


def reads_date(tokenizer: Any) -> bool:
    """Return whether a tokenizer's template prints the current date."""
    return NOW in template_variables(own_templates(tokenizer).values())


# --- settings -----------------------------------------------------------------------------------------------


def choose_settings(
    tokenizer: Any,
    template: str | None = None,
    args: Mapping[str, Any] | None = None,
    trained: ChatSettings | None = None,
) -> tuple[ChatSettings, list[str]]:
    """Return the settings that flags name, or else those that an adapter was trained with.

    Args:
        tokenizer: as loaded, not configured yet.
        template: value of --chat-template; None if not given.
        args: value of --chat-template-args; None if not given.
        trained: settings of the adapter; None without one.

    Returns:
        The settings, without a date, and notices: flags that differ from the training or have no effect.

    Raises:
        InputError: there is no such template, or it is not valid.
    """
    saved, notices = trained or ChatSettings(), []
    chosen = ChatSettings(
        saved.template if template is None else resolve_template(template, tokenizer),
        saved.args if args is None else args,
    )
    if trained is not None and chosen.template != saved.template:
        notices.append("--chat-template differs from the template that the adapter was trained with")
    if trained is not None and chosen.args != saved.args:
        notices.append(f"the adapter was trained with {format_args(saved.args)}")
    if args is not None:
        notices += [
            f"--chat-template-args: the chat template does not read {name}, so it has no effect"
            for name in _unread(tokenizer, chosen)
        ]
    return chosen, notices


def format_args(args: Mapping[str, Any]) -> str:
    """Return --chat-template-args with its value, for a shell."""
    return f"--chat-template-args {shlex.quote(json.dumps(args))}"


def _unread(tokenizer: Any, settings: ChatSettings) -> list[str]:
    """Return the arguments that the template does not read."""
    if settings.template is not None:
        read = template_variables([settings.template])
    elif getattr(tokenizer, "_chat_template", None) is None:
        read = template_variables(own_templates(tokenizer).values())
    else:  # mlx-lm renders this model's chats in Python
        return []
    return [name for name in settings.args if name not in read]


def configure_chat_template(tokenizer: Any, settings: ChatSettings) -> list[str]:
    """Make a tokenizer's `apply_chat_template` use a template, arguments and a date; return notices.

    Arguments of a call override those of the settings.

    Args:
        tokenizer: tokenizer wrapper of mlx-lm; changed in place.
        settings: see `ChatSettings`.
    """
    if settings.template is not None:
        tokenizer.chat_template = settings.template
        tokenizer.has_chat_template = True
        tokenizer._chat_template = None  # mlx-lm's renderer in Python, which some models have
    render = functools.partial(type(tokenizer).apply_chat_template, tokenizer, **settings.args)
    tokenizer.apply_chat_template = render
    if settings.date is None or not reads_date(tokenizer):
        return []
    date = datetime.fromisoformat(settings.date)
    tokenizer.apply_chat_template = _with_date(render, tokenizer, date)
    if _prints(tokenizer, date):
        return []
    tokenizer.apply_chat_template = render
    return [
        "the chat template prints the current date, and this version of transformers cannot keep it: on another "
        "day, --resume finds other data"
    ]


# --- the date -----------------------------------------------------------------------------------------------


def _with_date(render: Callable[..., Any], tokenizer: Any, date: datetime) -> Callable[..., Any]:
    """Return a function that renders chats at a date."""

    def apply_chat_template(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("chat_template")
        with _fixed_date([given] if given else own_templates(tokenizer).values(), date):
            return render(*args, **kwargs)

    return apply_chat_template


@contextmanager
def _fixed_date(templates: Iterable[str], date: datetime) -> Iterator[None]:
    """Let templates print a date inside a `with` block.

    transformers passes no functions to templates, but it keeps compiled templates in a cache. So the function that
    prints the date is replaced there, only inside the block because other tokenizers may share the template.
    """
    from transformers.utils import chat_template_utils

    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    found = [] if compile_template is None else [compile_template(text).globals for text in templates]
    before = [values[NOW] for values in found]
    for values in found:
        values[NOW] = date.strftime
    try:
        yield
    finally:
        for values, function in zip(found, before, strict=True):
            values[NOW] = function


def _prints(tokenizer: Any, date: datetime) -> bool:
    """Return whether a tokenizer renders chats at a date."""
    form = "%Y %j %H %M %S"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}],
            chat_template=f"{{{{ {NOW}({form!r}) }}}}",
            tokenize=False,
        )
    except Exception:  # private functions of transformers have changed
        return False
    return bool(text == date.strftime(form))
