"""nalora serve: requests over HTTP, and errors before the model is loaded."""

import argparse
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from unittest import mock

import mlx.core as mx
import pytest
from mlx_lm.utils import load

from nalora_mlx.__main__ import main
from tests.commands.test_commands import answers, refused

QUESTION = "what colour is the cat one ?"


@pytest.fixture(scope="module")
def adapter(model_directory, data_directory, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "adapters"
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", output]
    flags = ["--mask-prompt", "--iters", "30", "--batch-size", "3", "--learning-rate", "4e-3", "--scale", "4"]
    assert main(["lora", "--train", *map(str, where), *flags]) == 0
    return output


def free_port():
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def ask(port, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


@pytest.fixture(scope="module")
def server(model_directory, adapter, tmp_path_factory):
    port = free_port()
    flags = ["--model", model_directory, "--adapter-path", adapter, "--port", port, "--max-tokens", 8]
    process = subprocess.Popen(
        [sys.executable, "-m", "nalora_mlx.serve", *map(str, flags)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path_factory.mktemp("hub") / "none")},
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            assert json.loads(ask(port, "/health")) == {"status": "ok"}
            break
        except OSError:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
    yield port, process
    process.kill()


@pytest.mark.parametrize("named", ["default_model", "gpt-4o-mini", "../elsewhere"])
def test_every_request_is_answered_by_the_served_model(server, model_directory, adapter, named):
    body = {"model": named, "adapters": "nowhere", "messages": [{"role": "user", "content": QUESTION}]}
    answer = json.loads(ask(server[0], "/v1/chat/completions", body))["choices"][0]["message"]["content"]
    tuned, tokenizer = load(str(model_directory), adapter_path=str(adapter))
    base, _ = load(str(model_directory))
    assert answer.strip() == answers(tuned, tokenizer, [QUESTION])[0].strip()
    assert answer.strip() != answers(base, tokenizer, [QUESTION])[0].strip()


def test_only_the_served_model_is_listed(server, model_directory):
    """mlx-lm lists the whole Hub cache, and fails if there is none."""
    models = json.loads(ask(server[0], "/v1/models"))["data"]
    assert [model["id"] for model in models] == [str(Path(model_directory).resolve())]


def test_answers_are_streamed(server):
    body = {"messages": [{"role": "user", "content": QUESTION}]}
    whole = json.loads(ask(server[0], "/v1/chat/completions", body))["choices"][0]["message"]["content"]
    lines = ask(server[0], "/v1/chat/completions", body | {"stream": True}).splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == whole


def test_a_port_in_use_is_one_line(server, model_directory):
    flags = ["--model", model_directory, "--port", server[0]]
    refused(
        ["nalora_mlx.serve", *flags], f"--port {server[0]}: Address already in use; choose another --port"
    )


def listening(port):
    """Return the addresses that listen on a port: IPv4 in dotted form, IPv6 as the kernel writes it."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not Path(table).exists():
            continue
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, number = local.split(":")
            if state == "0A" and int(number, 16) == port:  # listening
                found.add(socket.inet_ntoa(bytes.fromhex(address)[::-1]) if len(address) == 8 else address)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads the sockets from /proc")
def test_it_listens_on_localhost_only(server):
    assert listening(server[0]) == {"127.0.0.1"}


def test_sigterm_stops_the_server(model_directory):
    port = free_port()
    flags = ["--model", str(model_directory), "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "nalora_mlx.serve", *flags], stderr=subprocess.PIPE, text=True
    )
    head = process.stderr.readline()
    assert head == f"serving {model_directory} at http://127.0.0.1:{port}/v1 (Ctrl-C stops)\n"
    for _ in range(300):
        try:
            ask(port, "/health")
            break
        except OSError:
            time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert process.stderr.read().endswith("nalora serve: terminated: stopped by SIGTERM\n")


def test_bad_input_is_one_line(model_directory, tmp_path):
    serve, model = "nalora_mlx.serve", ["--model", model_directory]
    refused([serve], "--model is missing; give a directory, or a Hugging Face repo")
    refused([serve, "--model", "./nowhere"], "--model ./nowhere: no such directory")
    refused([serve, *model, "--adapter-path", tmp_path], "--adapter-path .* has no adapter_config.json")
    refused([serve, *model, "--port", "0"], "--port 0: must be from 1 to 65535")
    refused([serve, *model, "--host", "192.0.2.1"], "--host 192.0.2.1: not an address of this machine")
    refused([serve, *model, "--chat-template-args", "{x"], "--chat-template-args: not valid JSON")
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"weight": mx.zeros((1,))})
    refused(
        [serve, "--model", tmp_path, "--port", free_port()],
        f"--model {re.escape(str(tmp_path))}: cannot be served",
    )


def test_serve_has_every_flag_of_mlx_lm():
    from nalora_mlx.serve.__main__ import HOST, PORT, build_parser

    class Seen(Exception):
        pass

    def see(parser, *_):
        raise Seen(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", see), pytest.raises(Seen) as seen:
        importlib.import_module("mlx_lm.server").main()
    peer = seen.value.args[0]
    ours = {option for action in build_parser("x")._actions for option in action.option_strings}
    # --pipeline splits a model across machines.
    assert {option for action in peer._actions for option in action.option_strings} - ours == {"--pipeline"}
    assert (peer.get_default("host"), peer.get_default("port")) == (HOST, PORT)
