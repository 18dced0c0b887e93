"""`nalora serve`: mlx-lm's OpenAI-compatible server on one model, with or without an adapter."""

import argparse
import errno
import importlib
import json
import signal
import socket
import sys
from functools import partial
from typing import Any, NoReturn
from unittest import mock

from nalora_mlx.cli import Parser, add_passed_on, check_content, passed_on
from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.core.paths import check_paths, expanded
from nalora_mlx.core.signals import Stopped

HOST, PORT = "127.0.0.1", 8080  # those of mlx_lm.server: this machine alone

# The flags of mlx_lm.server: (names, what they do, type). All are handed on as they are; a test holds the two equal.
VALUES = (
    (("--adapter-path",), "directory of a trained adapter", str),
    (
        ("--host",),
        f"address to listen on ({HOST}: this machine alone; 0.0.0.0: everyone who reaches it)",
        str,
    ),
    (("--port",), f"port to listen on ({PORT})", int),
    (("--allowed-origins",), "web origins that may ask, with commas between them (*)", str),
    (("--draft-model",), "model for speculative decoding", str),
    (("--num-draft-tokens",), "tokens that it drafts (3)", int),
    (("--log-level",), "DEBUG, INFO, WARNING, ERROR or CRITICAL (INFO)", str),
    (("--chat-template",), "chat template, in the place of the model's own", str),
    (("--temp",), "sampling temperature of a request that names none (0: greedy)", float),
    (("--top-p",), "sampling top-p (1)", float),
    (("--top-k",), "sampling top-k (0: off)", int),
    (("--min-p",), "sampling min-p (0: off)", float),
    (("--max-tokens",), "longest answer in tokens (512)", int),
    (("--chat-template-args",), "JSON of further arguments for the chat template", str),
    (("--decode-concurrency",), "answers that are generated together (32)", int),
    (("--prompt-concurrency",), "prompts that are read together (8)", int),
    (("--prefill-step-size",), "prompt tokens processed at a time (2048)", int),
    (("--prompt-cache-size",), "key-value caches that are kept (10)", int),
    (("--prompt-cache-bytes",), "most memory that they may take, such as 2GB", str),
    (("--kv-bits",), "bits of a quantized key-value cache; requests then wait for each other", int),
    (("--kv-group-size",), "its group size (64)", int),
    (("--quantized-kv-start",), "token from which it is quantized (5000)", int),
)
SWITCHES = (
    (("--trust-remote-code",), "run code that the model brings along"),
    (("--use-default-chat-template",), "use the default chat template"),
)


def build_parser(prog: str) -> Parser:
    """Take the flags of mlx_lm.server for one machine, which parses them again."""
    parser = Parser(
        prog=prog,
        description="Answer over HTTP as OpenAI's interface does (/v1/chat/completions and others), by mlx-lm's "
        "server. Every request is answered by this model and adapter, whatever model it names.",
    )
    parser.add_argument(
        "--model", required=True, metavar="X", help="local model directory or Hugging Face repo"
    )
    add_passed_on(parser, VALUES, (), SWITCHES)
    return parser


def run(args: argparse.Namespace) -> None:
    """Check paths and port, then load the model and serve until Ctrl-C or SIGTERM."""
    given = vars(args)
    host, port = given.get("host", HOST), given.get("port", PORT)
    check_paths(given["model"], given.get("adapter_path"))
    check_paths(given.get("draft_model"), flag="--draft-model")
    _check_json(given.get("chat_template_args", "{}"))
    _check_address(host, port)
    check_content(given["model"], given.get("adapter_path"))
    check_content(given.get("draft_model"))
    for name in ("model", "adapter_path", "draft_model"):
        if name in given:
            given[name] = str(expanded(given[name]))
    peer = importlib.import_module("mlx_lm.server")
    stopped_by = []

    def stop(number: int, _frame: Any) -> NoReturn:
        # The server ends its threads in order on this, and on nothing else.
        stopped_by.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with (
        mock.patch.object(sys, "argv", ["nalora serve", *passed_on(given)]),
        mock.patch.object(
            peer, "ModelProvider", _one_model(peer.ModelProvider, given, f"http://{host}:{port}/v1")
        ),
        mock.patch.object(peer, "scan_cache_dir", partial(_downloaded, given["model"])),
    ):
        peer.main()
    if stopped_by:
        raise Stopped(signal.SIGTERM, "stopped by SIGTERM")
    raise KeyboardInterrupt  # it returns on nothing else


def _one_model(provider: type, given: dict[str, Any], address: str) -> type:
    """mlx-lm's provider of models for one model, which is loaded before the port is opened."""
    import mlx.core as mx

    class OneModel(provider):
        def __init__(self, args: argparse.Namespace):
            super().__init__(args)
            try:
                self.load_default()
                # Another thread generates, and what is not computed yet belongs to this one.
                mx.eval([model.state for model in (self.model, self.draft_model) if model is not None])
            except Exception as error:
                raise InputError(
                    f"--model {given['model']}: cannot be served: {first_line(error)}"
                ) from error
            adapter = f" with {given['adapter_path']}" if "adapter_path" in given else ""
            print(
                f"serving {given['model']}{adapter} at {address} (Ctrl-C stops)", file=sys.stderr, flush=True
            )

        def load(self, *_requested: Any) -> tuple[Any, Any]:
            # mlx-lm would fetch whatever model or adapter a request names, and drop ours for it.
            return super().load("default_model", None, "default_model")

    return OneModel


def _downloaded(name: str) -> argparse.Namespace:
    """What the Hub's cache holds of the model that is served; mlx-lm lists the whole cache, and fails without one."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        repos = frozenset()
    return argparse.Namespace(repos=[repo for repo in repos if repo.repo_id == name])


def _check_json(text: str) -> None:
    try:
        json.loads(text)
    except ValueError as error:
        raise InputError(f"--chat-template-args is no JSON ({error})") from None


def _check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be had, before the model is loaded."""
    if not 0 < port < 65536:
        raise InputError(f"--port {port}: choose one from 1 to 65535")
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
                    f"--host {host}: not an address of this machine; {HOST} is this machine alone, 0.0.0.0 everyone "
                    "who reaches it"
                ) from None
            raise InputError(f"--port {port}: {error.strerror}; choose another --port") from None


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["serve", *sys.argv[1:]]))
