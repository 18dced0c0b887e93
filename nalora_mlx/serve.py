"""`nalora serve`: mlx-lm's OpenAI-compatible server for one model, with or without an adapter."""

import argparse
import errno
import importlib
import signal
import socket
import sys
from functools import partial
from typing import Any, NoReturn
from unittest import mock

from nalora_mlx.cli import (
    Parser,
    add_chat_flags,
    add_forwarded,
    check_forwarded,
    forwarded_argv,
    loading_configured,
    prepare_forwarded,
)
from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.core.signals import Stopped

HOST, PORT = "127.0.0.1", 8080  # defaults of mlx_lm.server; reachable from this machine only

# The flags of mlx_lm.server: (names, help, type). All are forwarded unchanged; a test checks that the list is complete
# but for those of the chat template.
VALUES = (
    (("--adapter-path",), "directory of a trained adapter", str),
    (
        ("--host",),
        f"address to listen on; 0.0.0.0 accepts connections from other machines (default: {HOST}, this machine only)",
        str,
    ),
    (("--port",), f"port to listen on (default: {PORT})", int),
    (("--allowed-origins",), "allowed web origins, separated by commas (default: *)", str),
    (("--draft-model",), "model for speculative decoding", str),
    (("--num-draft-tokens",), "tokens drafted per step (default: 3)", int),
    (("--log-level",), "DEBUG, INFO, WARNING, ERROR or CRITICAL (default: INFO)", str),
    (("--temp",), "sampling temperature of requests without one (default: 0, greedy)", float),
    (("--top-p",), "top-p sampling threshold of requests without one (default: 1)", float),
    (("--top-k",), "top-k sampling cutoff of requests without one (default: 0, off)", int),
    (("--min-p",), "min-p sampling threshold of requests without one (default: 0, off)", float),
    (("--max-tokens",), "maximum length of an answer, for requests without one (default: 512)", int),
    (("--decode-concurrency",), "answers generated in parallel (default: 32)", int),
    (("--prompt-concurrency",), "prompts processed in parallel (default: 8)", int),
    (("--prefill-step-size",), "prompt tokens processed per step (default: 2048)", int),
    (("--prompt-cache-size",), "maximum number of key-value caches to keep (default: 10)", int),
    (("--prompt-cache-bytes",), "maximum memory of the kept key-value caches, such as 2GB", str),
    (("--kv-bits",), "quantize the key-value cache to this many bits; disables parallel requests", int),
    (("--kv-group-size",), "group size of the quantized key-value cache (default: 64)", int),
    (("--quantized-kv-start",), "quantize the key-value cache from this token on (default: 5000)", int),
)
SWITCHES = (
    (("--trust-remote-code",), "run code that comes with the model"),
    (("--use-default-chat-template",), "use the default chat template"),
)


def build_parser(prog: str) -> Parser:
    """Build a parser with the single-machine flags of mlx_lm.server, which parses them again."""
    parser = Parser(
        prog=prog,
        description="Start mlx-lm's OpenAI-compatible HTTP server (/v1/chat/completions and others) for one model. "
        "Every request is answered by this model and adapter, whatever model it names.",
    )
    parser.add_argument(
        "--model", required=True, metavar="X", help="local model directory or Hugging Face repo"
    )
    add_forwarded(parser, VALUES, (), SWITCHES)
    add_chat_flags(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Check the flags, load the model and serve until Ctrl-C or SIGTERM."""
    given = vars(args)
    host, port = given.get("host", HOST), given.get("port", PORT)
    check_forwarded(given)
    _check_address(host, port)
    given = prepare_forwarded(given)
    server = importlib.import_module("mlx_lm.server")
    stopped_by = []

    def stop(number: int, _frame: Any) -> NoReturn:
        # The server only shuts down its threads properly on KeyboardInterrupt.
        stopped_by.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    load = loading_configured(server.load, given)
    provider = _one_model(server.ModelProvider, given, f"http://{host}:{port}/v1")
    with (
        mock.patch.object(sys, "argv", ["nalora serve", *forwarded_argv(given)]),
        mock.patch.object(server, "ModelProvider", provider),
        mock.patch.object(server, "load", load),
        mock.patch.object(server, "scan_cache_dir", partial(_scan_cache, given["model"])),
    ):
        server.main()
    if stopped_by:
        raise Stopped(signal.SIGTERM, "stopped by SIGTERM")
    raise KeyboardInterrupt  # main() returns after nothing else


def _one_model(provider: type, given: dict[str, Any], address: str) -> type:
    """Return a subclass of mlx-lm's model provider that loads one model at once and serves no other."""
    import mlx.core as mx

    class OneModel(provider):
        def __init__(self, args: argparse.Namespace):
            super().__init__(args)
            try:
                self.load_default()
                # Another thread generates, and only this one can evaluate what is still lazy here.
                mx.eval([model.state for model in (self.model, self.draft_model) if model is not None])
            except InputError:
                raise
            except Exception as error:
                raise InputError(
                    f"--model {given['model']}: cannot be served: {first_line(error)}"
                ) from error
            adapter = f" with {given['adapter_path']}" if "adapter_path" in given else ""
            print(
                f"serving {given['model']}{adapter} at {address} (Ctrl-C stops)", file=sys.stderr, flush=True
            )

        def load(self, *_requested: Any) -> tuple[Any, Any]:
            # mlx-lm would replace our model with any model or adapter that a request names.
            return super().load("default_model", None, "default_model")

    return OneModel


def _scan_cache(name: str) -> argparse.Namespace:
    """Return the Hub cache's entries for the served model; mlx-lm's own scan lists all and fails without a cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        repos = frozenset()
    return argparse.Namespace(repos=[repo for repo in repos if repo.repo_id == name])


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
