"""`nalora serve`: the OpenAI-compatible server of mlx-lm, or of mlx-vlm, for one model, with or without adapters."""

import argparse
import errno
import importlib
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from nalora_mlx.arguments import Parser, add_chat_flags, add_forwarded, add_model
from nalora_mlx.cli import (
    check_forwarded,
    forwarded_argv,
    note_merged,
    prepare_forwarded,
    require_model,
)
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.paths import check_paths
from nalora_mlx.core.signals import Stopped
from nalora_mlx.serve.model_names import ServedModels, parse_adapters
from nalora_mlx.vision_models import needs_mlx_vlm, why_blind

HOST, PORT = "127.0.0.1", 8080  # defaults of mlx_lm.server; reachable from this machine only

# The flags of mlx_lm.server: (names, value, help, type). All are forwarded unchanged; a test checks that the list is
# complete but for --adapter-path and those of the chat template.
VALUES = (
    (
        ("--host",),
        "ADDRESS",
        f"address to listen on; 0.0.0.0 accepts connections from other machines (default: {HOST}, this machine only)",
        str,
    ),
    (("--port",), "PORT", f"port to listen on (default: {PORT})", int),
    (("--allowed-origins",), "URL,...", "allowed web origins, separated by commas (default: *)", str),
    (("--draft-model",), "MODEL", "model for speculative decoding", str),
    (("--num-draft-tokens",), "N", "tokens drafted per step (default: 3)", int),
    (("--log-level",), "LEVEL", "DEBUG, INFO, WARNING, ERROR or CRITICAL (default: INFO)", str),
    (("--temp",), "T", "sampling temperature of requests without one (default: 0, greedy)", float),
    (("--top-p",), "P", "top-p sampling threshold of requests without one (default: 1)", float),
    (("--top-k",), "N", "top-k sampling cutoff of requests without one (default: 0, off)", int),
    (("--min-p",), "P", "min-p sampling threshold of requests without one (default: 0, off)", float),
    (("--max-tokens",), "N", "maximum length of an answer, for requests without one (default: 512)", int),
    (("--decode-concurrency",), "N", "answers generated in parallel (default: 32)", int),
    (("--prompt-concurrency",), "N", "prompts processed in parallel (default: 8)", int),
    (("--prefill-step-size",), "N", "prompt tokens processed per step (default: 2048)", int),
    (("--prompt-cache-size",), "N", "maximum number of key-value caches to keep (default: 10)", int),
    (("--prompt-cache-bytes",), "SIZE", "maximum memory of the kept key-value caches, such as 2GB", str),
    (
        ("--kv-bits",),
        "BITS",
        "quantize the key-value cache to this many bits; disables parallel requests",
        int,
    ),
    (("--kv-group-size",), "N", "group size of the quantized key-value cache (default: 64)", int),
    (("--quantized-kv-start",), "N", "quantize the key-value cache from this token on (default: 5000)", int),
)
SWITCHES = (
    (("--trust-remote-code",), "run code that comes with the model"),
    (("--use-default-chat-template",), "use the default chat template"),
)


def build_parser(prog: str) -> Parser:
    """Build a parser with the single-machine flags of mlx_lm.server, which parses them again."""
    parser = Parser(
        prog=prog,
        usage="--model MODEL [--adapter-path [NAME=]DIR] [options]",
        description="Start mlx-lm's OpenAI-compatible HTTP server (/v1/chat/completions and others) for one model. "
        "Every request is answered by this model and adapter, whatever model it names. With several adapters, or one "
        "that has a NAME, a request's model chooses: a NAME, or the base model (its name, base, or none given). A "
        "vision-language model is served by mlx-vlm's server, which reads images as data URIs, with one adapter.",
        examples="""
        serve the tuned model on http://127.0.0.1:8080/v1
          nalora serve --model Qwen/Qwen3-0.6B --adapter-path adapters
        serve two adapters and their base; requests choose by name
          nalora serve --model Qwen/Qwen3-0.6B --adapter-path support=runs/a --adapter-path sales=runs/b
        serve a merged model to other machines
          nalora serve --model tuned --host 0.0.0.0 --port 9000
        """,
        essentials=("model", "adapter_path", "host", "port", "max_tokens", "temp"),
    )
    add_model(parser)
    parser.add_argument(
        "--adapter-path",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="directory of a trained adapter; repeat it to serve several on one base model (default NAME: the last "
        "part of DIR)",
    )
    add_forwarded(parser, VALUES, switches=SWITCHES)
    add_chat_flags(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Check the flags, load the models and serve until Ctrl-C or SIGTERM."""
    given = vars(args)
    require_model(given["model"], next((path.rpartition("=")[2] for path in given["adapter_path"]), None))
    host, port = given.get("host", HOST), given.get("port", PORT)
    served = parse_adapters(given["model"], given.pop("adapter_path"))
    check_forwarded(given)
    for directory in _directories(served):
        check_paths(None, directory)
    _check_address(host, port)
    given = prepare_forwarded(given)
    _check_adapters(served)
    if _sees(served):
        from nalora_mlx.serve import vision

        if unused := [f"--{name.replace('_', '-')}" for name in vision.MLX_LM_ONLY if name in given]:
            raise InputError(
                f"{listed(unused, ', ')}: the server of mlx-vlm, which serves this model, has no such flag; remove it"
            )
        vision.serve(given, served, host, port)
        return
    settings = {name: given.pop(name) for name in ("chat_template", "chat_template_args")}
    mlx_lm_server = importlib.import_module("mlx_lm.server")
    from nalora_mlx.serve.server import check_mlx_lm, patches

    check_mlx_lm()
    stopped_by = []

    def stop(number: int, _frame: Any) -> NoReturn:
        # The server only shuts down its threads properly on KeyboardInterrupt.
        stopped_by.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with (
        mock.patch.object(sys, "argv", ["nalora serve", *forwarded_argv(given)]),
        mock.patch.multiple(mlx_lm_server, **patches(served, settings, f"http://{host}:{port}/v1")),
    ):
        mlx_lm_server.main()
    if stopped_by:
        raise Stopped(signal.SIGTERM, "stopped by SIGTERM")
    raise KeyboardInterrupt  # main() returns after nothing else


def _sees(served: ServedModels) -> bool:
    """Return whether mlx-vlm's server serves the models: one that sees, with one adapter at most.

    Raises:
        InputError: only mlx-vlm can load the model, and it is not installed or there are several adapters.
    """
    blind = why_blind(served.base)
    if not blind and not served.adapters:
        return True
    directories: list[str | None] = [None, *_directories(served)]
    if any(needs_mlx_vlm(served.base, directory) for directory in directories):
        if blind:
            raise InputError(f"--model {served.base}: {blind}")
        raise InputError("--adapter-path: a vision-language model is served with one adapter, without NAME=")
    if not blind:
        print(
            "note: with several adapters, images are not read; give one --adapter-path for images",
            file=sys.stderr,
        )
    return False


def _directories(served: ServedModels) -> list[str]:
    return [*served.adapters.values(), *([served.adapter] if served.adapter is not None else [])]


def _check_adapters(served: ServedModels) -> None:
    """Check the files of the adapters before anything is loaded.

    Raises:
        InputError: a file is missing or damaged, or one of several adapters holds full weights.
    """
    from nalora_mlx.adapters.files import check_adapter, read_adapter_config

    for directory in _directories(served):
        check_adapter(directory)
        note_merged(served.base, directory)
    for name, directory in served.adapters.items():
        if read_adapter_config(Path(directory)).get("fine_tune_type") == "full":
            raise InputError(
                f"--adapter-path {name}={directory}: holds fully trained weights, which cannot share the base model's; "
                f"serve them alone (--adapter-path {directory}), or merge them with nalora fuse"
            )


def _check_address(host: str, port: int) -> None:
    """Raise InputError if the address cannot be bound, before the model is loaded."""
    if not 0 < port < 65536:
        raise InputError(f"--port {port}: must be from 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"--host {host}: no such address ({error.strerror})") from None
    with socket.socket(family, kind, protocol) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise InputError(
                    f"--host {host}: not an address of this machine; use {HOST} for this machine only, or 0.0.0.0 to "
                    "accept connections from others"
                ) from None
            raise InputError(f"--port {port}: {error.strerror}; choose another --port") from None


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["serve", *sys.argv[1:]]))
