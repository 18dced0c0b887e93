"""--chat-template and --chat-template-args: every command feeds the model what the adapter was trained after."""

import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from datetime import datetime
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import generate
from mlx_lm.utils import load

from nalora_mlx.__main__ import main
from nalora_mlx.adapters.files import read_chat_settings

QUESTION = "what colour is the cat one ?"
# "shade" and "count" are the template's own arguments; the tests' tokenizer knows the words red, blue, two and so on.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ shade }} {{ count }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant {{ shade }} {% endif %}"
)
ARGS = {"count": "two", "shade": "red"}
PROMPT = f"user red two {QUESTION}<|im_end|>assistant red "  # what TEMPLATE writes, by hand
ROW = "user red two what colour is the cat one ?<|im_end|>assistant red two the cat is red<|im_end|>"
TOKENS = 8
FAST = ["--batch-size", "3", "--steps-per-report", "100", "--steps-per-eval", "100", "--val-batches", "1"]
LEARN = ["--learning-rate", "1e-2", "--scale", "8", "--mask-prompt"]


def nalora(command, *argv):
    return main([command, *map(str, argv)])


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "mine.jinja"
    file.write_text(TEMPLATE)
    return ["--chat-template", file, "--chat-template-args", json.dumps(ARGS)]


@pytest.fixture(scope="module")
def adapter(model_directory, data_directory, flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "adapters"
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", output]
    assert nalora("lora", "--train", *where, *FAST, *LEARN, "--iters", 12, "--save-every", 6, *flags) == 0
    return output


@pytest.fixture(scope="module")
def want(model_directory, adapter):
    """The answers of unmodified mlx-lm after the prompt by hand, and after that of the model's own template."""
    model, tokenizer = load(str(model_directory), adapter_path=str(adapter))
    own = f"<|im_start|>user {QUESTION}<|im_end|><|im_start|>assistant "
    found = [
        generate(model, tokenizer, tokenizer.encode(prompt), max_tokens=TOKENS) for prompt in (PROMPT, own)
    ]
    assert found[0] != found[1]
    return [text.strip() for text in found]


# --- saved with the adapter ---------------------------------------------------------------------------------


def test_the_settings_are_in_the_adapter_the_best_one_and_each_checkpoint(adapter):
    for directory in (adapter, adapter / "best", adapter / "checkpoints" / "step-0000006"):
        settings = read_chat_settings(directory)
        assert (settings.template, settings.args, settings.date) == (TEMPLATE, ARGS, None)
    record = json.loads((adapter / "run.json").read_text())["settings"]
    assert (record["chat_template"], record["chat_template_args"]) == ("mine.jinja", ARGS)


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_other_fine_tune_types_save_them_too(model_directory, data_directory, flags, tmp_path, kind):
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", tmp_path / "out"]
    assert nalora("lora", "--train", *where, *FAST, "--iters", 1, "--fine-tune-type", kind, *flags) == 0
    assert read_chat_settings(tmp_path / "out").template == TEMPLATE
    load(str(model_directory), adapter_path=str(tmp_path / "out"))


def test_an_adapter_trained_in_the_models_own_way_has_no_settings(model_directory, data_directory, tmp_path):
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", tmp_path]
    assert nalora("lora", "--train", *where, *FAST, "--iters", 1, "--chat-template", "default") == 0
    assert "chat_template" not in json.loads((tmp_path / "adapter_config.json").read_text())


# --- the same prompt in every command ------------------------------------------------------------------------


def ask(command, capsys, monkeypatch, *argv):
    """Return a command's answer to the question, and its notes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
    extra = ["--prompt", QUESTION, "--verbose", "False"] if command == "generate" else []
    capsys.readouterr()
    assert nalora(command, *argv, "--max-tokens", TOKENS, *extra) == 0
    done = capsys.readouterr()
    return done.out.strip(), [line for line in done.err.splitlines() if line.startswith("note:")]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_generate_and_chat_render_as_in_training(
    model_directory, adapter, want, capsys, monkeypatch, command
):
    model = ["--model", model_directory, "--adapter-path", adapter]
    assert ask(command, capsys, monkeypatch, *model) == (want[0], [])
    best = ["--model", model_directory, "--adapter-path", adapter / "checkpoints" / "step-0000012"]
    assert ask(command, capsys, monkeypatch, *best) == (want[0], [])
    answer, notes = ask(
        command, capsys, monkeypatch, *model, "--chat-template", "default", "--chat-template-args", "{}"
    )
    assert answer == want[1]
    assert len(notes) == 2
    assert "--chat-template differs from the template that the adapter was trained with" in notes[0]


def test_flags_render_without_saved_settings(
    model_directory, adapter, flags, want, tmp_path, capsys, monkeypatch
):
    plain = shutil.copytree(adapter, tmp_path / "plain", ignore=lambda *_: {"best", "checkpoints"})
    config = json.loads((plain / "adapter_config.json").read_text())
    del config["chat_template"]
    (plain / "adapter_config.json").write_text(json.dumps(config))
    model = ["--model", model_directory, "--adapter-path", plain]
    assert ask("generate", capsys, monkeypatch, *model)[0] == want[1]
    template, args = flags[:2], flags[2:]
    alias = ["--chat-template-config", args[1]]  # the name in mlx_lm.generate
    assert ask("generate", capsys, monkeypatch, *model, *template, *alias)[0] == want[0]
    assert ask("chat", capsys, monkeypatch, *model, *template, *args)[0] == want[0]


def test_serve_renders_as_in_training_and_a_request_may_differ(model_directory, adapter, want):
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    serve = [sys.executable, "-m", "nalora_mlx.serve", "--model", model_directory, "--adapter-path", adapter]
    limits = ["--port", str(port), "--max-tokens", str(TOKENS)]
    process = subprocess.Popen([*serve, *limits], stderr=subprocess.PIPE, text=True)

    def post(**body):
        body["messages"] = [{"role": "user", "content": QUESTION}]
        address = f"http://127.0.0.1:{port}/v1/chat/completions"
        request = urllib.request.Request(
            address, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    deadline = time.monotonic() + 60
    try:
        while True:
            try:
                found = post()
                break
            except OSError:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        longer = post(chat_template_kwargs={"count": "two two"})
    finally:
        process.kill()
    assert found["choices"][0]["message"]["content"].strip() == want[0]
    assert longer["usage"]["prompt_tokens"] == found["usage"]["prompt_tokens"] + 1


def test_tool_calls_are_parsed_as_the_given_template_writes_them(model_directory):
    from nalora_mlx.cli import loading_configured

    for template, parsed in ((None, False), ("{{ '[TOOL_CALLS]' }}{{ messages }}", True)):
        given = {"chat_template": template, "chat_template_args": None}
        configured = loading_configured(load, given)
        _, tokenizer, _ = configured(str(model_directory), tokenizer_config={}, return_config=True)
        assert tokenizer.has_tool_calling == parsed
        assert given == {}


def test_a_report_asks_as_in_training(model_directory, adapter, want, tmp_path):
    from nalora_mlx.report.missing_answers import add_answers
    from nalora_mlx.report.run_data import read_runs

    run = shutil.copytree(adapter, tmp_path / "run")
    (run / "samples.json").unlink()
    record = json.loads((run / "run.json").read_text())
    record["samples"] = [{"messages": [{"role": "user", "content": QUESTION}]}]
    (run / "run.json").write_text(json.dumps(record))
    runs = read_runs([run])
    add_answers(str(model_directory), runs)
    base, tokenizer = load(str(model_directory))
    before = generate(base, tokenizer, tokenizer.encode(PROMPT), max_tokens=TOKENS).strip()
    (sample,) = runs[0].samples
    assert sample["before"].startswith(before)
    assert sample["after"].startswith(want[0])


def test_a_fused_model_has_the_template_for_every_tool(
    model_directory, adapter, tmp_path, capsys, monkeypatch
):
    import nalora_mlx.adapters.merge_quality as merge_quality

    prompts = []
    monkeypatch.setattr(
        merge_quality,
        "render_prompt",
        lambda tokenizer, messages: prompts.append(tokenizer.apply_chat_template(messages)) or [1, 2],
    )
    fused = tmp_path / "fused"
    assert nalora("fuse", "--model", model_directory, "--adapter-path", adapter, "--save-path", fused) == 0
    done = capsys.readouterr()
    assert f"use it with --chat-template-args '{json.dumps(ARGS)}'" in done.err
    assert f"  nalora chat --model {fused} --chat-template-args '{json.dumps(ARGS)}'\n" in done.out
    assert (fused / "chat_template.jinja").read_text() == TEMPLATE
    _, tokenizer = load(str(fused))
    messages = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **ARGS)
    assert text == PROMPT
    assert prompts
    assert all(tokens[:3] == tokenizer.encode("user red two") for tokens in prompts)


@pytest.mark.parametrize("command", ["lora", "doctor"])
def test_training_and_doctor_show_the_same_rows(
    model_directory, data_directory, flags, capsys, command, tmp_path
):
    show = ["--model", model_directory, "--data", data_directory, *flags, "--show-masks", 1]
    extra = ["--train", "--adapter-path", tmp_path / "a", "--iters", 1, *FAST] if command == "lora" else []
    capsys.readouterr()
    assert nalora(command, *show, "--num-layers", 1, *extra) == 0
    shown = capsys.readouterr().out.replace("⟦", "").replace("⟧", "")
    assert "".join(ROW.split()) in "".join(shown.split())


def test_the_test_loss_of_an_adapter_is_that_of_its_training(
    model_directory, data_directory, adapter, flags, capsys
):
    where = [
        "--model",
        model_directory,
        "--data",
        data_directory,
        "--adapter-path",
        adapter,
        "--batch-size",
        3,
    ]

    def loss(*more):
        capsys.readouterr()
        assert nalora("lora", "--test", *where, "--mask-prompt", *more) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("test loss"))

    assert loss() == loss(*flags) != loss("--chat-template", "default")


def test_the_settings_survive_an_export_to_mlx(model_directory, adapter, tmp_path, capsys):
    where = ["--model", model_directory, "--adapter-path", adapter, "--output"]
    assert nalora("export", "mlx", *where, tmp_path / "mlx") == 0
    assert read_chat_settings(tmp_path / "mlx") == read_chat_settings(adapter)
    assert nalora("export", "peft", *where, tmp_path / "peft") == 0
    printed = capsys.readouterr().err
    assert "holds no chat template" in printed
    assert json.dumps(ARGS) in printed


def test_a_gguf_has_the_adapters_template(model_directory, adapter, tmp_path, capsys, monkeypatch):
    gguf = pytest.importorskip("gguf")
    import nalora_mlx.export.gguf.model as gguf_model
    from nalora_mlx.export.gguf.vocabulary.tokenizer import Vocabulary

    # The tests' word-level tokenizer has no form in GGUF.
    vocabulary = Vocabulary([f"w{i}" for i in range(64)], [1] * 64, merges=[], notes=[])
    monkeypatch.setattr(gguf_model, "read_vocabulary", lambda *_: vocabulary)
    monkeypatch.setattr(gguf_model, "compare_with_mlx_lm", lambda *_: [])
    base = shutil.copytree(model_directory, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 512}
    (base / "config.json").write_text(json.dumps(config))
    where = ["--model", base, "--adapter-path", adapter, "--output", tmp_path / "m.gguf"]
    assert nalora("export", "gguf", *where) == 0
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.chat_template"]
    assert field.contents() == TEMPLATE
    assert json.dumps(ARGS) in capsys.readouterr().err


# --- what can be wrong ---------------------------------------------------------------------------------------


BAD = [
    (["--chat-template", "BROKEN"], r"broken\.jinja:2: not a valid chat template"),
    (["--chat-template", "chatmll"], "did you mean 'chatml'"),
    (["--chat-template-args", '{"tokenize": false}'], "tokenize cannot be given"),
    (["--chat-template-args", "{x"], "--chat-template-args.*: not valid JSON"),
]


@pytest.mark.parametrize("command", ["lora", "doctor", "generate", "chat", "fuse"])
@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_values_are_one_line(
    model_directory, data_directory, adapter, tmp_path, capsys, command, bad, message
):
    (tmp_path / "broken.jinja").write_text("a\n{% if x %}")
    bad = [str(tmp_path / "broken.jinja") if flag == "BROKEN" else flag for flag in bad]
    required = {
        "lora": ["--train", "--data", data_directory, "--adapter-path", tmp_path / "a"],
        "doctor": ["--data", data_directory, "--max-seq-length", 16, "--batch-size", 1],
        "fuse": ["--adapter-path", adapter, "--save-path", tmp_path / "f"],
    }
    try:
        status = nalora(command, "--model", model_directory, *required.get(command, []), *bad)
    except SystemExit as end:  # from argparse
        status = end.code
    done = capsys.readouterr()
    assert status == 2
    assert re.search(message, done.err + done.out), done


def test_arguments_may_come_from_yaml(model_directory, data_directory, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", tmp_path / "a"]
    config.write_text("chat_template_args: {1: red}\n")
    assert nalora("lora", "--train", "-c", config, *where, *FAST) == 2
    assert "chat_template_args: 1 is not a name" in capsys.readouterr().err
    config.write_text("chat_template_args: {shade: red}\n")
    assert nalora("lora", "--train", "-c", config, *where, *FAST, "--iters", 1) == 0
    printed = "".join(capsys.readouterr().out.split())
    assert "thechattemplatedoesnotreadshade" in printed
    assert read_chat_settings(tmp_path / "a").args == {"shade": "red"}


# --- resume ---------------------------------------------------------------------------------------------------

DATED = "{{ ['red', 'blue', 'green'][strftime_now('%d') | int % 3] }} " + TEMPLATE


def set_day(monkeypatch, day):
    class Day(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 3, day, 12, 30)

    monkeypatch.setattr("nalora_mlx.training.chats.datetime", Day)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Day)


@pytest.mark.parametrize("kind", ["na-lora", "full"])
def test_a_run_continues_on_another_day_bit_for_bit(
    model_directory, data_directory, tmp_path, monkeypatch, kind
):
    template = tmp_path / "dated.jinja"
    template.write_text(DATED)

    def train(output, iterations, *more):
        where = ["--model", model_directory, "--data", data_directory, "--adapter-path", tmp_path / output]
        flags = ["--chat-template", template, *FAST, *LEARN, "--fine-tune-type", kind]
        assert nalora("lora", "--train", *where, *flags, "--iters", iterations, *more) == 0
        return {
            name: array.tolist()
            for name, array in mx.load(str(tmp_path / output / "adapters.safetensors")).items()
        }

    set_day(monkeypatch, 1)
    whole = train("whole", 6)
    train("parts", 3)
    set_day(monkeypatch, 2)
    assert train("parts", 6, "--resume") == whole
    assert train("other day", 6) != whole
    assert read_chat_settings(tmp_path / "parts").date == "2026-03-01T12:30:00"
    set_day(monkeypatch, 3)
    train("parts", 7, "--resume")
    assert read_chat_settings(tmp_path / "parts").date == "2026-03-01T12:30:00"


def test_in_use_the_template_prints_the_day_of_use(model_directory, data_directory, tmp_path, monkeypatch):
    from nalora_mlx.cli import configure_chats

    template, output = tmp_path / "dated.jinja", tmp_path / "a"
    template.write_text(DATED)
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", output, *FAST]
    set_day(monkeypatch, 1)
    assert nalora("lora", "--train", *where, "--iters", 1, "--chat-template", template) == 0
    set_day(monkeypatch, 2)
    _, tokenizer = load(str(model_directory))
    configure_chats(tokenizer, None, None, output)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert text.split()[0] == "green"


def test_other_chat_settings_are_not_the_same_run(
    model_directory, data_directory, adapter, tmp_path, flags, capsys
):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", copy]
    train = ["--train", *where, *FAST, *LEARN, "--iters", 14, "--save-every", 6, "--resume"]
    assert nalora("lora", *train, *flags[:3], json.dumps(ARGS | {"unused": 1})) == 2
    error = capsys.readouterr().err
    assert f"--chat-template-args was {ARGS}, is {ARGS | {'unused': 1}};" in error
    assert nalora("lora", *train) == 0  # with the settings of the run
    assert nalora("lora", *train, *flags) == 0


def test_training_from_an_adapter_renders_as_that_adapter(model_directory, data_directory, adapter, tmp_path):
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", tmp_path / "b"]
    start = ["--resume-adapter-file", adapter / "adapters.safetensors"]
    assert nalora("lora", "--train", *where, *FAST, "--scale", 8, "--iters", 1, *start) == 0
    assert read_chat_settings(tmp_path / "b").template == TEMPLATE
    assert Path(tmp_path / "b" / "adapters.safetensors").exists()
