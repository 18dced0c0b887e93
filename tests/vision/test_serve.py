"""nalora serve with a vision-language model: requests over HTTP, answered as mlx-vlm itself answers."""

import base64
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import mlx.core as mx
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (pip install '.[vlm]')")

from nalora_mlx.__main__ import main
from tests.commands.test_serve import ask, free_port
from tests.vision.test_answers import PROMPT, QUESTION, TOKENS, adapter, base, directory, images, truth, tuned

__all__ = ["adapter", "base", "directory", "images", "tuned"]  # fixtures


@pytest.fixture(scope="module")
def server(directory, adapter):
    port = free_port()
    flags = ["--model", directory, "--adapter-path", adapter, "--port", port, "--max-tokens", TOKENS]
    process = subprocess.Popen(
        [sys.executable, "-m", "nalora_mlx.serve", *map(str, flags), "--log-level", "ERROR"],
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    assert line.startswith("serving"), line + process.stderr.read()
    deadline = time.monotonic() + 30  # the line is printed before the port is open
    while True:
        try:
            ask(port, "/health")
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    yield port, process
    process.kill()


def message(text, *urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def data_uri(path):
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def answer(port, messages, **more):
    body = {"model": "any", "messages": messages, **more}
    return json.loads(ask(port, "/v1/chat/completions", body))["choices"][0]["message"]["content"]


def refused(port, path, body):
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(port, path, body)
    return error.value.code, error.value.read().decode()


def test_answers_are_those_of_mlx_vlm(server, tuned, images):
    port, _ = server
    for chosen in (images[:1], images[1:], [], images[:1]):
        expected = truth(tuned, PROMPT.format("<image>" * len(chosen)), chosen)
        assert answer(port, message(QUESTION, *map(data_uri, chosen))) == expected
    first = truth(tuned, PROMPT.format("<image>"), images[:1])
    turns = [
        *message(QUESTION, data_uri(images[0])),
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And now?"},
    ]
    text = (
        PROMPT.format("<image>") + f"{first}<end_of_utterance>\nuser:And now?<end_of_utterance>\nAssistant:"
    )
    assert answer(port, turns) == truth(tuned, text, images[:1])
    streamed = ask(
        port,
        "/v1/chat/completions",
        {"model": "any", "messages": message(QUESTION, data_uri(images[0])), "stream": True},
    )
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    pieces = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(pieces) == first


def test_clients_reach_nothing_but_the_model(server, directory, images):
    port, _ = server
    listed = json.loads(ask(port, "/v1/models"))["data"]
    assert [model["id"] for model in listed] == [str(directory.resolve())]
    for url in (images[0], "http://127.0.0.1:1/a.png", "file:///etc/passwd"):
        code, text = refused(port, "/v1/chat/completions", {"model": "m", "messages": message("?", url)})
        assert (code, "send its data instead" in text) == (400, True)
    body = {"model": "m", "messages": message("?", "data:image/png;base64,AAAA"), "stream": True}
    assert refused(port, "/v1/chat/completions", body | {"stream": False})[0] == 400
    for path in ("/unload", "/v1/embeddings", "/v1/images/generations"):
        assert refused(port, path, {"model": "m"})[0] == 404
    given = {"model": "m", "adapter_path": "/", "messages": message(QUESTION)}
    assert json.loads(ask(port, "/v1/chat/completions", given))["choices"][0]["message"]["content"]


def test_ctrl_c_stops_the_server(server):
    _, process = server
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr.read() == "nalora serve: interrupted: stopped by Ctrl-C\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-p", "0.1", "--draft-model", "{model}"], "--draft-model, --min-p: .*no such flag; remove it"),
        (["--adapter-path", "a={adapter}"], "served with one adapter, without NAME="),
        (["--adapter-path", "{other}"], "does not fit the model"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(directory, adapter, tmp_path, capsys, flags, message):
    places = {"model": directory, "adapter": adapter, "other": tmp_path}
    weights = mx.load(str(adapter / "adapters.safetensors"))
    mx.save_safetensors(
        str(tmp_path / "adapters.safetensors"), {f"other.{name}": array for name, array in weights.items()}
    )
    shutil.copy(adapter / "adapter_config.json", tmp_path)
    flags = [flag.format(**places) for flag in flags]
    assert main(["serve", "--model", str(directory), "--port", str(free_port()), *flags]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err
