"""Code that commands share: one-line errors, exit statuses, models and chats. Imports nothing heavy."""

import importlib
import io
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from nalora_mlx.arguments import EXIT_USAGE, Parser, add_common
from nalora_mlx.core.device_faults import explain
from nalora_mlx.core.errors import InputError, RunError
from nalora_mlx.core.paths import check_paths, expanded, is_hub_name
from nalora_mlx.core.signals import SIGNALS, Stopped

if TYPE_CHECKING:
    from nalora_mlx.models.chat_templates import ChatSettings

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130

# What one does -> the commands for it, in the order in which a new user meets them.
COMMAND_GROUPS = {
    "train": {
        "doctor": "check the machine, and a model and data before training",
        "lora": "fine-tune and evaluate a model",
    },
    "try the result": {
        "chat": "chat with a model, or with base and tuned model side by side",
        "generate": "answer one prompt",
        "evaluate": "compare base and tuned model on a test set, general text and standard tasks",
        "report": "write an HTML report of one run, or of several compared",
    },
    "use it elsewhere": {
        "fuse": "merge an adapter into the weights of its base model",
        "export": "write GGUF, PEFT and mlx-lm files",
        "serve": "start an OpenAI-compatible HTTP server",
    },
    "set up": {"completion": "print a completion script for a shell"},
}
COMMANDS = {name: text for group in COMMAND_GROUPS.values() for name, text in group.items()}
PACKAGES = ("chat", "doctor", "evaluate", "export", "report", "serve")  # commands that are packages


def command(name: str) -> ModuleType:
    """Import the module of a command; it has `build_parser(prog)` and `run(args)`."""
    return importlib.import_module(f"nalora_mlx.{name}" + (".__main__" if name in PACKAGES else ""))


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


def require_model(model: str | None, adapter: str | Path | None = None) -> None:
    """Raise InputError if --model is not given; the message names the model that the adapter was trained on.

    Args:
        model: value of --model.
        adapter: directory of the adapter; None without one.
    """
    if model is not None:
        return
    from nalora_mlx.runs.base_model import trained_model

    trained = None if adapter is None else trained_model(Path(adapter).expanduser())
    if trained is None:
        raise InputError("--model is missing; give a directory, or a Hugging Face repo (OWNER/NAME)")
    if not is_hub_name(trained) and not Path(trained).exists():
        raise InputError(
            f"--model is missing; {adapter} was trained on a model named {trained}: give its directory"
        )
    raise InputError(
        f"--model is missing; {adapter} was trained on {trained}: give --model {shlex.quote(trained)}"
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
    """Print a notice if `nalora fuse` merged an adapter, or another one of its run, into a model before.

    Args:
        model: directory or Hugging Face repo of the model.
        adapter: directory of the adapter, or the file of its weights; None without one.
    """
    from nalora_mlx.adapters.merge_record import twice_notice
    from nalora_mlx.models.loading import local_directory

    if adapter is not None and (text := twice_notice(model, local_directory(model), adapter)):
        print(f"note: {text}", file=sys.stderr)


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
