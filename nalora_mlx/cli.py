"""What all commands share: one-line errors, exit statuses, and flags made from settings. Imports nothing heavy."""

import argparse
import dataclasses
import importlib
import io
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

from nalora_mlx import __version__
from nalora_mlx.core.errors import InputError, RunError
from nalora_mlx.core.parsing import did_you_mean
from nalora_mlx.core.signals import SIGNALS, Stopped

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

COMMANDS = {
    "lora": "fine-tune a model, evaluate it",
    "fuse": "merge adapters into the weights",
    "export": "write what other tools read: GGUF, PEFT, mlx-lm",
    "generate": "answer one prompt",
    "chat": "talk to a model, or to base and tuned side by side",
    "serve": "answer over HTTP, as OpenAI's interface does",
    "report": "show a run, or compare several: an HTML page and pictures",
    "doctor": "check the machine, and what NA-LoRA would do with a model",
    "completion": "print what lets a shell complete these commands and their flags",
}
PACKAGES = ("export", "report")  # the commands that are more than one file


def command(name: str) -> ModuleType:
    """The module of a command: build_parser(prog) makes its parser, run(args) does it."""
    return importlib.import_module(f"nalora_mlx.{name}" + (".__main__" if name in PACKAGES else ""))


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Print one line, with the flag that may be meant, and exit with status 2."""
        if message.startswith("unrecognized arguments:"):
            flags = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
            message += next(filter(None, (did_you_mean(flag, _flags(self)) for flag in flags)), "")
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    """All flags of a parser and of those below it."""
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags += [flag for below in action.choices.values() for flag in _flags(below)]
    return flags


def execute(
    prog: str, build_parser: Callable[[str], Parser], run: Callable[..., None], argv: list[str]
) -> int:
    """Parse the arguments and run a command; every error becomes one line on stderr and an exit status.

    0 done, 1 failed while running, 2 usage or bad input, 130 after Ctrl-C, 143 after SIGTERM; --debug lets a
    traceback through.
    """
    parser = build_parser(prog)
    add_common(parser)
    args = parser.parse_args(argv)
    debug = vars(args).pop("debug")
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a row may hold what the terminal's encoding has not
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
        known = isinstance(error, FloatingPointError | RunError)
        kind = "" if known else f" ({type(error).__name__}; --debug shows where)"
        return _fail(prog, "failed", f"{error}{kind}", EXIT_FAILED)


def add_common(parser: Parser) -> None:
    """Add the flags that every command has."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument(
        "--version", action="version", version=f"nalora {__version__}", help="show the version and exit"
    )


def _terminate(_signal: int, _frame: Any) -> NoReturn:
    raise Stopped(signal.SIGTERM, "stopped by SIGTERM")


def _fail(prog: str, what: str, message: str, status: int) -> int:
    line = " ".join(message.split())
    print(f"{prog}: {what}: {line}", file=sys.stderr)
    return status


def add_settings(parser: argparse._ActionsContainer, settings: type, skip: tuple[str, ...] = ()) -> None:
    """Add a flag for each field of a settings dataclass; a flag that is not given leaves no trace.

    The dataclass's metadata holds help, choices and nargs; its defaults are shown in the help and stay there.
    """
    for field in dataclasses.fields(settings):
        metadata = field.metadata
        if field.name in skip or metadata.get("yaml_only"):
            continue
        flag = "--" + field.name.replace("_", "-")
        text = metadata["help"]
        if field.default is not None:
            default = field.default
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            text += f" (default: {str(shown).lower() if isinstance(shown, bool) else shown})"
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        declared = str(field.type).removesuffix(" | None")
        if declared == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            continue
        if metadata.get("choices"):
            options["choices"] = metadata["choices"]
        if metadata.get("nargs"):
            options["nargs"] = metadata["nargs"]
            declared = declared.removeprefix("tuple[").split(",")[0]
        if "const" in metadata:  # the value of a flag that is given without one
            options["const"] = metadata["const"]
            options["metavar"] = "PATH"
        if not metadata.get("size"):
            options["type"] = {"int": int, "float": float}.get(declared, str)
        if metadata.get("size") or declared in ("int", "float"):
            options["metavar"] = "SIZE" if metadata.get("size") else "N"
        parser.add_argument(flag, **options)


def add_passed_on(
    parser: Parser,
    values: Sequence[tuple[tuple[str, ...], str, type]],
    lists: Sequence[tuple[tuple[str, ...], str]],
    switches: Sequence[tuple[tuple[str, ...], str]],
) -> None:
    """Add flags that another program parses again; one that is not given leaves no trace."""
    for names, text, kind in values:
        parser.add_argument(*names, help=text, type=kind, metavar="X", default=argparse.SUPPRESS)
    for names, text in lists:
        parser.add_argument(*names, help=text, metavar="X", nargs="+", default=argparse.SUPPRESS)
    for names, text in switches:
        parser.add_argument(*names, help=text, action="store_true", default=argparse.SUPPRESS)


def passed_on(given: Mapping[str, Any]) -> list[str]:
    """The command line that says the same to that program."""
    argv = []
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            argv.append(flag)
        elif isinstance(value, list):
            argv += [flag, *value]
        else:
            argv.append(f"{flag}={value}")  # with =, a value may begin with a dash
    return argv


def check_content(model: str | None, adapter: str | None = None) -> None:
    """Look into a model and an adapter from strangers before mlx-lm makes anything of them.

    Raises:
        InputError: what is wrong with which file.
    """
    from nalora_mlx.adapters.files import check_adapter
    from nalora_mlx.models.loading import check_files

    if model is not None:
        check_files(model)
    if adapter is not None:
        check_adapter(adapter)
