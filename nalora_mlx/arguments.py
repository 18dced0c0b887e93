"""Command-line arguments: the parser, its help pages, and flags made of settings. Imports nothing heavy."""

import argparse
import dataclasses
import shutil
import textwrap
from collections.abc import Collection, Sequence
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from nalora_mlx import __version__
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.parsing import base_types, meant_name, meant_value
from nalora_mlx.core.template_args import EXAMPLE, parse_template_args

EXIT_USAGE = 2
MAX_WIDTH = 110  # of a help page, in columns


class Parser(argparse.ArgumentParser):
    """An argument parser with short help pages, and with errors in one line.

    --help shows the essential arguments and examples; --help-all shows all arguments.

    Args:
        prog: name of the command.
        usage: its most important arguments, for the first line of the help.
        examples: for the end of the help: lines that say what a command does, each with the command below it.
        essentials: names of the arguments that --help shows; None for all but those that every command has.
        settings: as for argparse.ArgumentParser.
    """

    def __init__(
        self,
        prog: str,
        usage: str | None = None,
        examples: str = "",
        essentials: Collection[str] | None = None,
        add_help: bool = True,
        **settings: Any,
    ):
        super().__init__(
            prog=prog,
            usage=usage and f"%(prog)s {usage}",
            allow_abbrev=False,
            add_help=False,
            formatter_class=_Formatter,
            **settings,
        )
        self.examples, self.essentials = textwrap.dedent(examples).strip(), essentials
        self.pages: dict[str, Parser] = {}  # value of the first argument -> parser whose help applies then
        self._positionals.title = "arguments"
        self.general = self.add_argument_group("general")
        if add_help:
            self.general.add_argument(
                "-h", "--help", action=_Help, help="show the essential arguments and exit"
            )
            self.general.add_argument("--help-all", action=_Help, help="show all arguments and exit")

    def format_help(self, everything: bool = False) -> str:
        """Return the help page: the essential arguments and the examples, or all arguments."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in [*(g for g in self._action_groups if g is not self.general), self.general]:
            formatter.start_section(group.title)
            formatter.add_arguments(
                a for a in group._group_actions if everything or self._is_essential(a, group)
            )
            formatter.end_section()
        parts = [formatter.format_help()]
        if self.examples:
            parts.append(f"examples:\n{textwrap.indent(self.examples, '  ')}\n")
        if everything and any(isinstance(action, argparse.BooleanOptionalAction) for action in self._actions):
            parts.append("Every switch --NAME has a counterpart --no-NAME, which overrides a config file.\n")
        if not everything:
            count = sum(bool(action.option_strings) for action in self._actions)
            parts.append(f"{self.prog} --help-all lists all {count} flags.\n")
        return "\n".join(parts)

    def _is_essential(self, action: argparse.Action, group: argparse._ArgumentGroup) -> bool:
        if self.essentials is None:
            return group is not self.general
        return not action.option_strings or action.dest in self.essentials

    def error(self, message: str) -> NoReturn:
        """Print the error in one line, suggest the flag that was meant, and exit with status 2."""
        page = "--help"
        if message.startswith("unrecognized arguments:"):
            wrong = [word.partition("=")[0] for word in message.split() if _looks_like_a_flag(word)]
            message += "".join(map(self._meant_flag, wrong))
            page = "--help-all"
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}; see {self.prog} {page}\n")

    def _meant_flag(self, wrong: str) -> str:
        actions = [action for action in self._actions if action.option_strings]
        flags = [flag for action in actions for flag in action.option_strings if flag.startswith("--")]
        # A flag that is not named like its setting.
        aliases = {action.dest: _longest(action) for action in actions}
        return meant_name(wrong, flags, aliases=aliases)

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        """Convert an argument; choices may be written in capitals."""
        value = super()._get_value(action, text)
        if isinstance(value, str) and action.choices and value not in action.choices:
            return value.lower() if value.lower() in action.choices else value
        return value

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise ArgumentError if a value is not among the choices; suggest the one that was meant."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            meant = meant_value(action.dest, value, choices)
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r} (choose from {', '.join(choices)}){meant}"
            )


class _Help(argparse.Action):
    """Print a help page and exit. If the first argument has a page of its own and is given, print that."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, _values: Any, flag: str | None = None
    ) -> None:
        """Print the page to standard output."""
        first = next((a.dest for a in parser._actions if not a.option_strings), "")
        page = parser.pages.get(getattr(namespace, first, None), parser)
        print(page.format_help(everything=flag == "--help-all"), end="")
        parser.exit()


class _Formatter(argparse.HelpFormatter):
    """Writes flags as people type them: one value after all names, and one form of a switch."""

    def __init__(self, prog: str):
        width = min(shutil.get_terminal_size().columns, MAX_WIDTH) - 2
        super().__init__(prog, max_help_position=28, width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(action.option_strings)
        if isinstance(action, argparse.BooleanOptionalAction):
            name = action.option_strings[0].removeprefix("--")
            return f"--[no-]{name}" if getattr(action, "on_by_default", False) else f"--{name}"
        return names if action.nargs == 0 else f"{names} {self._format_args(action, action.dest.upper())}"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":
            return f"{action.metavar or default_metavar} ..."
        return super()._format_args(action, default_metavar)


def _looks_like_a_flag(word: str) -> bool:
    return word.startswith("-") and word.lstrip("-")[:1].isalpha()


def _longest(action: argparse.Action) -> str:
    return max(action.option_strings, key=lambda flag: (flag.startswith("--"), -len(flag)))


def add_common(parser: Parser) -> None:
    """Add the flags of every command."""
    for page in (parser, *parser.pages.values()):
        page.general.add_argument("--debug", action="store_true", help="show tracebacks")
        page.general.add_argument(
            "--version", action="version", version=f"nalora {__version__}", help="show the version and exit"
        )


def add_settings(
    parser: argparse._ActionsContainer,
    settings: type,
    names: Collection[str] | None = None,
    without_default: Collection[str] = (),
) -> None:
    """Add a flag for each field of a settings dataclass; a flag that is not given is absent from the result.

    Types come from the fields' annotations; help texts, choices and the like from their metadata. Defaults are shown in
    the help, but the parser does not set them.

    Args:
        parser: or a group of one.
        settings: the dataclass.
        names: the fields to add, in this order; None for all.
        without_default: fields whose default does not apply to the command.
    """
    types = get_type_hints(settings)
    known = {field.name: field for field in dataclasses.fields(settings)}
    for field in known.values() if names is None else [known[name] for name in names]:
        if not field.metadata.get("yaml_only"):
            _add_setting(parser, field, types[field.name], field.name not in without_default)


def _add_setting(parser: argparse._ActionsContainer, field: Any, annotation: Any, show_default: bool) -> None:
    metadata = field.metadata
    flag = "--" + metadata.get("flag_name", field.name.replace("_", "-"))
    kind = base_types(annotation)[0]
    if get_origin(kind) is tuple:  # argparse converts item by item
        kind = get_args(kind)[0]
    text = metadata["help"]
    if "choices" in metadata and "metavar" not in metadata:
        text += f": {', '.join(metadata['choices'])}"
    if show_default and field.default is not False:
        text += _default_text(field.default)
    options: dict[str, Any] = {
        "help": text.replace("%", "%%"),
        "default": argparse.SUPPRESS,
        "dest": field.name,
    }
    if kind is bool:
        action: Any = parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        action.on_by_default = field.default is True
        return
    options |= {name: metadata[name] for name in ("choices", "nargs", "const", "action") if name in metadata}
    if get_origin(kind) is dict:
        options |= {"type": _template_args, "metavar": "JSON"}
    elif metadata.get("size"):  # `coerce` parses it
        options["metavar"] = "SIZE"
    else:
        options |= {"type": kind, "metavar": "N" if kind in (int, float) else "NAME"}
    parser.add_argument(flag, **options | {"metavar": metadata.get("metavar", options["metavar"])})


def _template_args(text: str) -> dict[str, Any]:
    """Parse a JSON flag for argparse, which hides the messages of other exceptions."""
    try:
        return parse_template_args(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _default_text(default: Any) -> str:
    """Return a default for the help text; nothing for None, whose meaning the help text says itself."""
    if default is None:
        return ""
    if default is True:
        return " (default: yes)"
    return f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"


def add_model(parser: argparse._ActionsContainer, text: str = "model") -> None:
    """Add --model. `cli.require_model` checks that it is given, because it can name the model that is meant."""
    parser.add_argument("--model", metavar="MODEL", help=f"{text}: directory or Hugging Face repo")


def add_chat_flags(parser: argparse._ActionsContainer, *aliases: str) -> None:
    """Add --chat-template and --chat-template-args; `aliases` are other names of the latter."""
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="chat template: a file, a template of the model by name, or chatml (default: as the adapter was trained)",
    )
    parser.add_argument(
        "--chat-template-args",
        *aliases,
        metavar="JSON",
        type=_template_args,
        help=f"arguments of the chat template, a JSON object such as '{EXAMPLE}' (default: as the adapter was trained)",
    )


# A flag that mlx-lm parses again: its names, what stands for its value in the help, the help, and its type.
Forwarded = tuple[tuple[str, ...], str, str, type]


def add_forwarded(
    parser: argparse._ActionsContainer,
    values: Sequence[Forwarded],
    lists: Sequence[Forwarded] = (),
    switches: Sequence[tuple[tuple[str, ...], str]] = (),
) -> None:
    """Add flags that mlx-lm parses again; a flag that is not given is absent from the result."""
    for names, metavar, text, kind in (*values, *lists):
        nargs = "+" if (names, metavar, text, kind) in lists else None
        parser.add_argument(
            *names, metavar=metavar, help=text, type=kind, nargs=nargs, default=argparse.SUPPRESS
        )
    for names, text in switches:
        parser.add_argument(*names, help=text, action="store_true", default=argparse.SUPPRESS)
