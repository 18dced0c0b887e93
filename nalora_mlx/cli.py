"""Code that all commands share: one-line errors, exit statuses, and flags. Imports nothing heavy."""

import argparse
import dataclasses
import importlib
import io
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin, get_type_hints

from nalora_mlx import __version__
from nalora_mlx.core.device_faults import explain
from nalora_mlx.core.errors import InputError, RunError
from nalora_mlx.core.parsing import base_types, did_you_mean
from nalora_mlx.core.paths import check_paths, expanded
from nalora_mlx.core.signals import SIGNALS, Stopped
from nalora_mlx.core.template_args import EXAMPLE, parse_template_args

if TYPE_CHECKING:
    from nalora_mlx.models.chat_templates import ChatSettings

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

COMMANDS = {
    "lora": "fine-tune and evaluate a model",
    "fuse": "merge an adapter into the weights of its base model",
    "export": "write GGUF, PEFT and mlx-lm files",
    "generate": "answer one prompt",
    "chat": "chat with a model, or with base and tuned model side by side",
    "serve": "start an OpenAI-compatible HTTP server",
    "report": "write an HTML report of one run, or of several compared",
    "doctor": "check the machine, and a run before it starts",
    "completion": "print a completion script for a shell",
}
PACKAGES = ("export", "report", "serve")  # commands that are packages


def command(name: str) -> ModuleType:
    """Import the module of a command; it has `build_parser(prog)` and `run(args)`."""
    return importlib.import_module(f"nalora_mlx.{name}" + (".__main__" if name in PACKAGES else ""))


class Parser(argparse.ArgumentParser):
    """An argument parser that prints errors as one line."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Print the error in one line, suggest the nearest flag, and exit with status 2."""
        if message.startswith("unrecognized arguments:"):
            flags = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
            message += next(filter(None, (did_you_mean(flag, _flags(self)) for flag in flags)), "")
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    """Return all flags of a parser and its subparsers."""
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags += [flag for below in action.choices.values() for flag in _flags(below)]
    return flags


def execute(
    prog: str, build_parser: Callable[[str], Parser], run: Callable[..., None], argv: list[str]
) -> int:
    """Parse the arguments and run a command. Errors become one line on stderr, unless --debug is given.

    Returns:
        The exit status: 0 success, 1 failure while running, 2 usage or bad input, 130 Ctrl-C, 143 SIGTERM.
    """
    parser = build_parser(prog)
    add_common(parser)
    args = parser.parse_args(argv)
    debug = vars(args).pop("debug")
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Data may contain characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        run(args)
        return 0
    except InputError as error:
        if debug:
            raise
        return _fail(prog, "error", str(error), EXIT_USAGE)
    except KeyboardInterrupt:
        return _fail(prog, SIGNALS[signal.SIGINT], "stopped by Ctrl-C", EXIT_INTERRUPTED)
    except Stopped as stopped:
        return _fail(prog, SIGNALS[stopped.number], str(stopped), 128 + stopped.number)
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_FAILED
    except Exception as error:
        if debug:
            raise
        return _fail(prog, "failed", _explained(error), EXIT_FAILED)


def add_common(parser: Parser) -> None:
    """Add the flags of every command."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument(
        "--version", action="version", version=f"nalora {__version__}", help="show the version and exit"
    )


def _terminate(_signal: int, _frame: Any) -> NoReturn:
    raise Stopped(signal.SIGTERM, "stopped by SIGTERM")


def _explained(error: Exception) -> str:
    """Return an exception's message; add what a device's failure means, or how to see where another one came from."""
    if isinstance(error, FloatingPointError | RunError):
        return str(error)
    return explain(error) or f"{error} ({type(error).__name__}; --debug shows where)"


def _fail(prog: str, what: str, message: str, status: int) -> int:
    line = " ".join(message.split())
    print(f"{prog}: {what}: {line}", file=sys.stderr)
    return status


def add_settings(parser: argparse._ActionsContainer, settings: type, skip: tuple[str, ...] = ()) -> None:
    """Add a flag for each field of a settings dataclass; a flag that is not given is absent from the result.

    Types come from the fields' annotations; help texts, choices and the like from their metadata. Defaults are shown in
    the help, but the parser does not set them.
    """
    types = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        metadata = field.metadata
        if field.name in skip or metadata.get("yaml_only"):
            continue
        flag = "--" + metadata.get("flag_name", field.name.replace("_", "-"))
        text = metadata["help"] + _default_text(field.default)
        options: dict[str, Any] = {
            "help": text.replace("%", "%%"),
            "default": argparse.SUPPRESS,
            "dest": field.name,
        }
        kind = base_types(types[field.name])[0]
        if get_origin(kind) is tuple:  # argparse converts item by item
            kind = get_args(kind)[0]
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            continue
        options |= {name: metadata[name] for name in ("choices", "nargs", "metavar") if name in metadata}
        if "const" in metadata:  # the value of the flag without an argument
            options |= {"const": metadata["const"], "metavar": "PATH"}
        if metadata.get("size"):  # `coerce` parses it
            options["metavar"] = "SIZE"
        elif get_origin(kind) is dict:
            options |= {"type": _template_args, "metavar": "JSON"}
        else:
            options["type"] = kind
            if kind in (int, float):
                options["metavar"] = "N"
        parser.add_argument(flag, **options)


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
    if isinstance(default, bool):
        return f" (default: {str(default).lower()})"
    return f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"


def add_chat_flags(parser: argparse._ActionsContainer, *aliases: str) -> None:
    """Add --chat-template and --chat-template-args; `aliases` are other names of the latter."""
    parser.add_argument(
        "--chat-template",
        metavar="X",
        help="chat template: a file, a template of the model by name, or chatml (default: as the adapter was trained)",
    )
    parser.add_argument(
        "--chat-template-args",
        *aliases,
        metavar="JSON",
        type=_template_args,
        help=f"arguments of the chat template, a JSON object such as '{EXAMPLE}' (default: as the adapter was trained)",
    )


def configure_chats(
    tokenizer: Any, template: str | None, args: dict[str, Any] | None, adapter: str | Path | None
) -> "ChatSettings":
    """Make a tokenizer render chats as flags say, or else as in an adapter's training; print notices.

    Args:
        tokenizer: tokenizer wrapper of mlx-lm; changed in place.
        template: value of --chat-template; None if not given.
        args: value of --chat-template-args; None if not given.
        adapter: directory of the adapter; None without one.

    Raises:
        InputError: there is no such template, or it is not valid.
    """
    from nalora_mlx.adapters.files import read_chat_settings
    from nalora_mlx.models.chat_templates import choose_settings, configure_chat_template

    trained = None if adapter is None else read_chat_settings(Path(adapter).expanduser())
    settings, notices = choose_settings(tokenizer, template, args, trained)
    configure_chat_template(tokenizer, settings)
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    return settings


def add_forwarded(
    parser: Parser,
    values: Sequence[tuple[tuple[str, ...], str, type]],
    lists: Sequence[tuple[tuple[str, ...], str]],
    switches: Sequence[tuple[tuple[str, ...], str]],
) -> None:
    """Add flags that mlx-lm parses again; a flag that is not given is absent from the result."""
    for names, text, kind in values:
        parser.add_argument(*names, help=text, type=kind, metavar="X", default=argparse.SUPPRESS)
    for names, text in lists:
        parser.add_argument(*names, help=text, metavar="X", nargs="+", default=argparse.SUPPRESS)
    for names, text in switches:
        parser.add_argument(*names, help=text, action="store_true", default=argparse.SUPPRESS)


def check_forwarded(given: Mapping[str, Any]) -> None:
    """Check what can be checked quickly of flags for mlx-lm: paths of models and adapter.

    Raises:
        InputError: names the flag.
    """
    check_paths(given.get("model"), given.get("adapter_path"))
    check_paths(given.get("draft_model"), flag="--draft-model")


def prepare_forwarded(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the files of models and adapter before mlx-lm loads them; return the flags with ~ expanded.

    Raises:
        InputError: names the file and what is wrong with it.
    """
    from nalora_mlx.adapters.files import check_adapter
    from nalora_mlx.models.loading import check_files

    for name, check in (
        ("model", check_files),
        ("adapter_path", check_adapter),
        ("draft_model", check_files),
    ):
        if name in given:
            check(given[name])
    if {"model", "adapter_path"} <= given.keys():
        note_merged(given["model"], given["adapter_path"])
    paths = ("model", "adapter_path", "draft_model")
    return {name: str(expanded(value)) if name in paths else value for name, value in given.items()}


def note_merged(model: str, adapter: str | Path | None) -> None:
    """Print a notice if `nalora fuse` merged an adapter into a model before.

    Args:
        model: directory or Hugging Face repo of the model.
        adapter: directory of the adapter, or the file of its weights; None without one.
    """
    from nalora_mlx.adapters.merge_record import contains_adapter
    from nalora_mlx.models.loading import local_directory

    if adapter is not None and contains_adapter(local_directory(model), Path(adapter).expanduser()):
        print(f"note: {model} already contains {adapter}, which is applied twice now", file=sys.stderr)


def loading_configured(
    load: Callable[..., Any], given: dict[str, Any], notices: bool = True
) -> Callable[..., Any]:
    """Return mlx-lm's `load`, which reads configs as `load_model` does and renders chats as the flags in `given` say.

    The flags are removed from `given`. With `notices`, settings of config.json that mlx-lm does not apply are printed.
    """
    from mlx_lm.utils import load_tokenizer

    from nalora_mlx.models.chat_templates import configure_chat_template
    from nalora_mlx.models.loading import check_files, print_notice, translated

    template, args = given.pop("chat_template"), given.pop("chat_template_args")
    adapter = given.get("adapter_path")

    def load_configured(name: str, **options: Any) -> Any:
        translation = translated(check_files(name), name)
        for notice in translation.notices if notices else ():
            print_notice(notice)
        model_config = {**translation.overrides, **(options.pop("model_config", None) or {})}
        loaded = load(name, model_config=model_config, **options)
        if "tokenizer_config" not in options:  # the draft model
            return loaded
        model, tokenizer, config = loaded
        settings = configure_chats(tokenizer, template, args, adapter)
        if settings.template is not None:
            # On loading, mlx-lm finds out how the template writes tool calls.
            given_with_template = {**options["tokenizer_config"], "chat_template": settings.template}
            tokenizer = load_tokenizer(name, given_with_template, config.get("eos_token_id"))
            configure_chat_template(tokenizer, settings)
        return model, tokenizer, config

    return load_configured


def forwarded_argv(given: Mapping[str, Any]) -> list[str]:
    """Return flags as command-line arguments for mlx-lm."""
    argv = []
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            argv.append(flag)
        elif isinstance(value, list):
            argv += [flag, *value]
        else:
            argv.append(f"{flag}={value}")  # with =, because a value may start with a dash
    return argv
