"""nalora chat: answers compared with mlx-lm's own, chat commands, and Ctrl-C."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import generate
from mlx_lm.utils import load
from rich.console import Console

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.comparison import load_tuned
from nalora_mlx.adapters.files import adapter_config, adapter_weights
from nalora_mlx.chat.loop import COMMANDS, Chat
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.models.conversation import Conversation
from tests.commands.test_commands import refused, run
from tests.conftest import random_adapters

QUESTION, SECOND = "what colour is the cat one ?", "what colour is the bird two ?"
SETTINGS = {"max_tokens": 8}


@pytest.fixture(scope="module")
def adapter(model_directory, tmp_path_factory):
    """A random adapter, which changes every answer."""
    output = tmp_path_factory.mktemp("run") / "adapters"
    output.mkdir()
    model, _ = load(str(model_directory))
    adapt(model, NALoRAConfig(rank=4, scale=4.0))
    random_adapters(model, size=0.3)
    mx.save_safetensors(str(output / "adapters.safetensors"), adapter_weights(model))
    (output / "adapter_config.json").write_text(json.dumps(adapter_config(model)))
    return output


@pytest.fixture(scope="module")
def base(model_directory):
    return load(str(model_directory))


@pytest.fixture(scope="module")
def tuned(model_directory, adapter):
    return load(str(model_directory), adapter_path=str(adapter))


def greedy(model, *messages, tokens=8):
    """Return mlx-lm's answer to messages of user and assistant in turn; a leading (text,) is the system message."""
    model, tokenizer = model
    system = [{"role": "system", "content": messages[0][0]}] if isinstance(messages[0], tuple) else []
    roles = ("user", "assistant") * len(messages)
    turns = [{"role": r, "content": m} for r, m in zip(roles, messages[len(system) :], strict=False)]
    prompt = tokenizer.apply_chat_template(system + turns, add_generation_prompt=True, return_dict=False)
    return generate(model, tokenizer, prompt, max_tokens=tokens)


def talk(base, tuned, capsys, monkeypatch, *lines, **console):
    """Pass lines to a chat; return its output, its notes and the chat."""
    remaining = iter(lines)
    monkeypatch.setattr("builtins.input", lambda _: next(remaining, "/quit"))
    conversations = [Conversation(*tuned, None), Conversation(*base, None) if base else None]
    chat = Chat(Console(highlight=False, **console), *conversations, SETTINGS)
    chat.interactive = False
    chat.loop()
    done = capsys.readouterr()
    return done.out, done.err, chat


# --- answers ------------------------------------------------------------------------------------------------


def test_compare_answers_as_the_base_and_as_the_tuned_model(model_directory, adapter, base, tuned):
    flags = ["--model", model_directory, "--adapter-path", adapter, "--compare", "--max-tokens", "8"]
    done = run("nalora_mlx.chat", *flags, text=f"{QUESTION}\n{SECOND}\n")
    assert done.returncode == 0, done.stderr
    first, second = [greedy(model, QUESTION) for model in (base, tuned)]
    assert first != second
    # Each continues from its own answer.
    third, fourth = greedy(base, QUESTION, first, SECOND), greedy(tuned, QUESTION, second, SECOND)
    assert done.stdout == f"base:\n{first}\ntuned:\n{second}\nbase:\n{third}\ntuned:\n{fourth}\n"


def test_base_and_tuned_model_share_their_arrays(model_directory, adapter):
    base, _ = load(str(model_directory))
    kept = dict(tree_flatten(base.parameters()))
    before = mx.get_active_memory()
    tuned = load_tuned(base, str(model_directory), adapter)
    own = sum(a.nbytes for name, a in tree_flatten(tuned.parameters()) if "lora_" in name)
    x = mx.array([[1, 5, 11, 14]])
    mx.eval(tuned.parameters())
    assert mx.get_active_memory() - before <= own + 4096
    assert not mx.allclose(base(x), tuned(x))
    assert all(a is kept[name] for name, a in tree_flatten(base.parameters()))


def test_an_answer_is_streamed_in_pieces(tuned):
    conversation = Conversation(*tuned, None)
    pieces = conversation.answer(QUESTION, **SETTINGS)
    first = next(pieces)
    assert conversation.messages == []  # the answer is not complete
    rest = list(pieces)
    assert len(rest) > 2
    assert first + "".join(rest) == greedy(tuned, QUESTION)


def test_history_system_and_reset(tuned, capsys, monkeypatch):
    lines = [QUESTION, SECOND, "/system the dog", SECOND, "/reset", QUESTION, "/system", QUESTION]
    out, err, _ = talk(None, tuned, capsys, monkeypatch, *lines)
    first = greedy(tuned, QUESTION)
    second = greedy(tuned, QUESTION, first, SECOND)
    third = greedy(tuned, ("the dog",), QUESTION, first, SECOND, second, SECOND)
    fourth = greedy(tuned, ("the dog",), QUESTION)
    fifth = greedy(tuned, QUESTION, fourth, QUESTION)
    assert out.splitlines() == [first, second, third, fourth, fifth]
    assert len({greedy(tuned, (words,), QUESTION) for words in ("the dog", "two blue")} | {first}) > 1
    assert re.sub("cut at 8 tokens; raise --max-tokens for longer answers\n", "", err) == ""


THIRD = "the dog is red"


def transcript(model, *questions, system=()):
    """Return mlx-lm's answers to questions, each with the model's own earlier answers as its history."""
    history = [*system]
    for question in questions:
        history += [question, greedy(model, *history, question)]
    return history[len(system) + 1 :: 2]


def test_each_model_has_its_own_history_when_compare_is_switched(base, tuned, capsys, monkeypatch):
    """Off, on, off and on again: the base answers what it has missed, as if it had been there from the start."""
    lines = [QUESTION, SECOND, "/compare", THIRD, "/compare", QUESTION, "/compare", SECOND]
    out, err, chat = talk(base, tuned, capsys, monkeypatch, *lines)
    questions = [QUESTION, SECOND, THIRD, QUESTION, SECOND]
    theirs, ours = transcript(base, *questions), transcript(tuned, *questions)
    # With the tuned model's answers as its history, the base would say something else.
    assert theirs[2] != greedy(base, QUESTION, ours[0], SECOND, ours[1], THIRD)
    both = [f"base:\n{theirs[i]}\ntuned:\n{ours[i]}" for i in (2, 4)]
    assert out == "\n".join([ours[0], ours[1], both[0], ours[3], both[1], ""])
    assert [line for line in err.splitlines() if "model" in line] == [
        "the base model first answers your 2 earlier messages, unseen",
        "base and tuned model both answer, each with its own history",
        "only the tuned model answers",
        "the base model first answers your earlier message, unseen",
        "base and tuned model both answer, each with its own history",
    ]
    assert [m["content"] for m in chat.base.turns[1::2]] == theirs


def test_reset_and_system_keep_both_histories_in_step(base, tuned, capsys, monkeypatch):
    lines = [QUESTION, "/compare", SECOND, "/reset", "/system the dog", THIRD, "/compare", "/compare", SECOND]
    out, err, _ = talk(base, tuned, capsys, monkeypatch, *lines)
    texts = {}
    for name, model in (("base", base), ("tuned", tuned)):
        after = transcript(model, THIRD, SECOND, system=[("the dog",)])
        texts[name] = [transcript(model, QUESTION, SECOND)[1], *after]
    answers = zip(texts["base"], texts["tuned"], strict=True)
    shown = "".join(f"base:\n{theirs}\ntuned:\n{ours}\n" for theirs, ours in answers)
    assert out == f"{greedy(tuned, QUESTION)}\n{shown}"
    assert err.count("first answers") == 1  # after the reset, the base has missed nothing


def test_ctrl_c_while_the_base_catches_up_leaves_comparing_off(base, tuned, capsys, monkeypatch):
    _, _, chat = talk(base, tuned, capsys, monkeypatch, QUESTION, SECOND)
    whole = chat.base.answer

    def stopped(text, *images, **settings):
        if text == SECOND:
            raise KeyboardInterrupt
        yield from whole(text, *images, **settings)

    chat.interactive = True
    monkeypatch.setattr(chat.base, "answer", stopped)
    chat.handle("/compare")
    assert not chat.comparing
    assert chat.base.messages == []
    assert capsys.readouterr().out.splitlines()[-1] == "only the tuned model answers"
    monkeypatch.undo()
    chat.handle("/compare")
    assert [m["content"] for m in chat.base.turns[1::2]] == transcript(base, QUESTION, SECOND)


@pytest.mark.parametrize("width", [100, 60])
def test_answers_stand_side_by_side_on_a_wide_terminal(base, tuned, capsys, monkeypatch, width):
    out, _, _ = talk(base, tuned, capsys, monkeypatch, "/compare", QUESTION, force_terminal=True, width=width)
    screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out)
    theirs, ours = greedy(base, QUESTION), greedy(tuned, QUESTION)
    side_by_side = re.search(rf"{re.escape(theirs.split()[0])} .*  {re.escape(ours.split()[0])} ", screen)
    assert bool(side_by_side) == (width == 100)
    assert bool(re.search("base +tuned", screen)) == (width == 100)
    if width == 60:
        assert f"{theirs}\n" in screen
        assert f"{ours}\n" in screen


def test_a_cut_answer_is_marked(model_directory, base):
    done = run("nalora_mlx.chat", "--model", model_directory, "--max-tokens", "3", text=QUESTION)
    assert done.stdout == greedy(base, QUESTION, tokens=3) + "\n"
    assert done.stderr == "cut at 3 tokens; raise --max-tokens for longer answers\n"
    whole = Conversation(*base, None)
    assert "".join(whole.answer(QUESTION, max_tokens=3))
    assert whole.cut


def test_a_complete_answer_is_not_marked(base):
    conversation = Conversation(*base, None)
    pieces = list(conversation.answer(QUESTION, max_tokens=400))
    assert len(pieces) < 400
    assert "".join(pieces) == greedy(base, QUESTION, tokens=400)
    assert not conversation.cut


# --- commands -----------------------------------------------------------------------------------------------


def test_an_unknown_command_does_not_reach_the_model(tuned, capsys, monkeypatch):
    out, err, chat = talk(None, tuned, capsys, monkeypatch, "/sytem the dog", "/help", "/compare", "/ x")
    assert out == ""
    assert chat.tuned.messages == []
    lines = err.splitlines()
    names = "/system, /image, /images, /compare, /reset, /help, /quit"
    assert lines[0].startswith(f"no command /sytem; the commands are {names}")
    assert [line.split("  ")[0] for line in lines[1:8]] == [command.usage for command in COMMANDS]
    assert lines[8].split() == ["Ctrl-C", "stop", "an", "answer"]
    assert lines[9] == "comparing needs --model BASE with --adapter-path ADAPTER"
    assert lines[10].startswith("no command /;")


def test_a_model_of_text_is_not_shown_images(tuned, capsys, monkeypatch):
    out, err, chat = talk(None, tuned, capsys, monkeypatch, "/image photo.jpg", "/images")
    assert (out, chat.tuned.messages, chat.pending) == ("", [], [])
    assert err == "/image: this model does not see images\nthis model does not see images\n"


def test_a_message_can_start_with_a_space_and_a_slash(tuned, capsys, monkeypatch):
    _, _, chat = talk(None, tuned, capsys, monkeypatch, " /compare the dog")
    assert chat.tuned.messages[0]["content"] == "/compare the dog"


def test_a_template_without_system_messages_is_an_error(tuned, capsys, monkeypatch):
    model, tokenizer = tuned
    refusing = (
        "{% for m in messages %}{{ raise_exception('no') if m['role'] == 'system' else 'x' }}{% endfor %}"
    )
    ignoring = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    for template in (refusing, ignoring):
        monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
        with pytest.raises(InputError, match="does not support a system message"):
            Conversation(model, tokenizer, "the dog")
        _, err, chat = talk(None, tuned, capsys, monkeypatch, "/system the dog")
        assert err == "the model's chat template does not support a system message\n"
        assert chat.tuned.messages == []


def test_compare_without_an_adapter_is_one_line(model_directory):
    refused(["nalora_mlx.chat", "--model", model_directory, "--compare"], "--compare needs --adapter-path")


# --- Ctrl-C -------------------------------------------------------------------------------------------------


def test_an_abandoned_answer_changes_nothing(tuned):
    conversation = Conversation(*tuned, None)
    first = "".join(conversation.answer(QUESTION, **SETTINGS))
    left = conversation.answer("the dog", **SETTINGS)
    next(left)
    left.close()
    assert len(conversation.messages) == 2
    second = "".join(conversation.answer(SECOND, **SETTINGS))
    assert second == greedy(tuned, QUESTION, first, SECOND)


@pytest.mark.parametrize("width", [100, 60])
def test_a_stopped_turn_is_removed_from_both(base, tuned, capsys, monkeypatch, width):
    """Stopped during the tuned model's answer, neither model keeps the turn, and the next answers are right."""
    _, _, chat = talk(
        base, tuned, capsys, monkeypatch, "/compare", QUESTION, force_terminal=True, width=width
    )
    before = chat.base.messages, chat.tuned.messages
    whole = chat.tuned.answer

    def stopped(*arguments, **settings):
        yield next(whole(*arguments, **settings))
        raise KeyboardInterrupt

    chat.interactive = True
    monkeypatch.setattr(chat.tuned, "answer", stopped)
    chat.answer("the dog")
    assert "stopped; this turn is removed from the history" in capsys.readouterr().out
    assert (chat.base.messages, chat.tuned.messages) == before
    monkeypatch.undo()
    chat.answer(SECOND)
    for one, model in ((chat.base, base), (chat.tuned, tuned)):
        assert one.messages[-1]["content"] == greedy(model, QUESTION, one.messages[1]["content"], SECOND)


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *argv, **environment):
        self.screen = ""
        pid, self.fd = pty.fork()
        if pid == 0:
            os.environ.update(environment)
            os.execv(sys.executable, [sys.executable, *map(str, argv)])
        self.pid = pid

    def until(self, pattern, seconds=60):
        """Read until the text since the last call matches the pattern."""
        seen, deadline = "", time.monotonic() + seconds
        while not re.search(pattern, seen):
            assert time.monotonic() < deadline, (pattern, seen)
            if select.select([self.fd], [], [], 0.1)[0]:
                if not (piece := self.read()):
                    break
                seen += piece
        self.screen += seen
        assert re.search(pattern, seen), (pattern, seen)
        return seen

    def read(self):
        """Return the next piece of output, or "" if there is no more."""
        try:
            return os.read(self.fd, 4096).decode()
        except OSError:  # end of output, on Linux
            return ""

    def type(self, text):
        os.write(self.fd, text.encode())

    def status(self):
        while self.read():  # macOS ends a process only after its output was read
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture(scope="module")
def endless(model_directory, tmp_path_factory):
    """Flags of a chat with a model whose answers never end."""
    directory = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(model_directory, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": 9999}))
    return ["--model", str(directory), "--max-tokens", "1000000"]


def test_ctrl_c_stops_the_answer_and_not_the_chat(endless):
    terminal = Terminal("-m", "nalora_mlx", "chat", *endless, TERM="xterm")
    terminal.until("/help")
    terminal.type(QUESTION + "\r")
    terminal.until(r"(\w+ ){20}")
    terminal.type("\x03")
    terminal.until("stopped; this turn is removed from the history[^>]*> ")
    terminal.type("/quti\x7f\x7fit\r")  # two backspaces: the line can be edited
    assert terminal.status() == 0


def test_the_first_line_names_models_and_ends(model_directory, adapter):
    """At the prompt, an empty line is ignored, one Ctrl-C says how to end the chat, and Ctrl-D ends it."""
    flags = ["--model", model_directory, "--adapter-path", adapter]
    terminal = Terminal("-m", "nalora_mlx", "chat", *flags, TERM="xterm", COLUMNS="500")
    first = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.until("> "))
    assert f"{model_directory} with {adapter}\r\n" in first
    assert "Type a message. /compare: the base model answers too; /help: commands; Ctrl-D: end\r\n" in first
    terminal.type("\r")
    terminal.until("> ")
    terminal.type("/reset\r")
    terminal.until("all turns removed[^>]*> ")
    time.sleep(1)  # readline waits for keys only a moment after it has printed the prompt
    terminal.type("\x03")
    terminal.until("Ctrl-D or /quit ends the chat[^>]*> ")
    terminal.type("\x04")
    assert terminal.status() == 0


def test_ctrl_c_twice_at_the_prompt_ends_the_chat(endless):
    terminal = Terminal("-m", "nalora_mlx", "chat", *endless, TERM="xterm")
    terminal.until("/help[^>]*> ")
    time.sleep(1)  # readline waits for keys only a moment after it has printed the prompt
    terminal.type("\x03")
    terminal.until("Ctrl-D or /quit ends the chat[^>]*> ")
    time.sleep(1)
    terminal.type("\x03")
    terminal.until("interrupted: stopped by Ctrl-C")
    assert terminal.status() == 130


def test_ctrl_c_ends_a_chat_that_is_piped(endless):
    process = subprocess.Popen(
        [sys.executable, "-m", "nalora_mlx.chat", *endless],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(QUESTION.encode() + b"\n")
    process.stdin.flush()
    process.stdout.read(50)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1] == b"nalora chat: interrupted: stopped by Ctrl-C"
