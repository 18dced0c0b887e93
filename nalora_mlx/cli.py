"""What all commands share: one-line errors, exit statuses, and flags made from settings. Imports nothing heavy."""

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from nalora_mlx.errors import InputError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


class _Terminated(BaseException):
    """SIGTERM arrived."""


def execute(
    prog: str, build_parser: Callable[[str], Parser], run: Callable[..., None], argv: list[str]
) -> int:
    """Parse the arguments and run a command; every error becomes one line on stderr and an exit status.

    0 done, 1 failed while running, 2 usage or bad input, 130 after Ctrl-C, 143 after SIGTERM; --debug lets a
    traceback through.
    """
    parser = build_parser(prog)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    debug = vars(args).pop("debug")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        run(args)
        return 0
    except InputError as error:
        if debug:
            raise
        return _fail(prog, "error", str(error), EXIT_USAGE)
    except KeyboardInterrupt:
        return _fail(prog, "interrupted", "stopped by Ctrl-C", EXIT_INTERRUPTED)
    except _Terminated:
        return _fail(prog, "terminated", "stopped by SIGTERM", EXIT_TERMINATED)
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_FAILED
    except Exception as error:
        if debug:
            raise
        kind = (
            "" if isinstance(error, FloatingPointError) else f" ({type(error).__name__}; --debug shows where)"
        )
        return _fail(prog, "failed", f"{error}{kind}", EXIT_FAILED)


def _terminate(_signal: int, _frame: Any) -> NoReturn:
    raise _Terminated


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
        if not metadata.get("size"):
            options["type"] = {"int": int, "float": float}.get(declared, str)
        if metadata.get("size") or declared in ("int", "float"):
            options["metavar"] = "SIZE" if metadata.get("size") else "N"
        parser.add_argument(flag, **options)
