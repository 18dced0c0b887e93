"""The recipes in examples/: their data is consistent, their configs train, and the notebooks run."""

import csv
import json
import re
import shutil
import subprocess
import sys
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from nalora_mlx.__main__ import main
from nalora_mlx.core.config import load_run_config
from nalora_mlx.data.chats.chat_encoder import ChatEncoder
from nalora_mlx.data.rows.formats import Features, parse_rows
from nalora_mlx.data.sources.loading import SPLITS, load_local
from nalora_mlx.data.tokenization import tokenize_rows
from tests.conftest import CHAT_TEMPLATE

EXAMPLES = Path(__file__).parents[2] / "examples"
PERSONA, CONTINUATION = EXAMPLES / "persona", EXAMPLES / "continuation"
RECIPES = ("bakery", "persona", "continuation")
# Like CHAT_TEMPLATE, but with tools and tool calls, whose content may be missing.
TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system {{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] if m['content'] else '' }}"
    "{% for call in m['tool_calls'] or [] %} {{ call.function | tojson }} {% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
STRICT_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ m['content'] }}", "{{ ' ' + m['content'] }}"
)  # fails without content, like SmolLM2's


def texts(directory, name):
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def all_rows(directory):
    return [row for name in SPLITS for row in texts(directory, name)]


@pytest.fixture(scope="module")
def tools_model(model_directory, tmp_path_factory):
    """Return the tiny model with a chat template that supports tools."""
    return with_template(model_directory, tmp_path_factory.mktemp("tools") / "model", TOOLS_TEMPLATE)


def with_template(model_directory, target, template):
    shutil.copytree(model_directory, target)
    (target / "chat_template.jinja").write_text(template)
    return target


# --- data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["persona", "continuation", "tickets"])
def test_the_data_equals_the_output_of_its_program(recipe, tmp_path):
    program = EXAMPLES / recipe / "make.py"
    subprocess.run([sys.executable, program, tmp_path], check=True)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    for path in written:
        assert path.read_bytes() == (EXAMPLES / recipe / path.relative_to(tmp_path)).read_bytes(), path


def conversation(row):
    """Return the turns of a structured row, including calls and results, as (kind, text or object) pairs."""
    turns = []
    for message in row["messages"]:
        if "tool_calls" in message:
            turns += [("call", call["function"]) for call in message["tool_calls"]]
        elif message["role"] == "tool":
            turns.append(("result", json.loads(message["content"])))
        elif message["role"] != "system":
            turns.append((message["role"], message["content"]))
    return turns


def plain_conversation(row):
    """Return the same of a row that writes calls and results as text."""
    turns = []
    for message in row["messages"]:
        assert set(message) == {"role", "content"}
        tag = re.fullmatch(r"<tool_(call|response)>(.*)</tool_\1>", message["content"])
        if tag:
            kind = {("assistant", "call"): "call", ("user", "response"): "result"}[message["role"], tag[1]]
            turns.append((kind, json.loads(tag[2])))
        elif message["role"] != "system":
            assert "tool_" not in message["content"]
            turns.append((message["role"], message["content"]))
    return turns


def test_both_forms_of_the_persona_agree():
    for name in SPLITS:
        structured, plain = texts(PERSONA, name), texts(PERSONA / "plain", name)
        assert [conversation(row) for row in structured] == [plain_conversation(row) for row in plain]
        system = (PERSONA / "system.txt").read_text().strip()
        assert {row["messages"][0]["content"] for row in plain} == {system}


def test_calls_of_the_persona_match_its_tools():
    types = {"string": str, "integer": int}
    called = []
    for row in all_rows(PERSONA):
        tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row["tools"]}
        for kind, call in conversation(row):
            if kind == "call":
                properties = tools[call["name"]]["properties"]
                assert set(call["arguments"]) == set(properties) == set(tools[call["name"]]["required"])
                for key, value in call["arguments"].items():
                    assert type(value) is types[properties[key]["type"]]
                called.append(call["name"])
    assert set(called) == set(tools)
    assert min(called.count(name) for name in tools) >= 50


def test_answers_of_the_persona_follow_from_tool_results():
    """Every answer has the persona's style, and states only times, berths and prices that a tool returned."""
    count = 0
    for row in all_rows(PERSONA):
        turns = conversation(row)
        for (kind, content), (role, text) in pairwise(turns):
            if role == "assistant":
                assert "skipper" in text
                assert kind in ("result", "user")
                facts = re.findall(r"\d\d:\d\d|\b[ABCD]\d+\b|\d+(?= euros)", text)
                result = json.dumps(content) if kind == "result" else ""
                assert all(fact in result for fact in facts), (text, result)
                count += len(facts)
            elif role == "call":  # other arguments may be from an earlier turn
                assert str(text["arguments"].get("metres") or text["arguments"]["day"]) in content
    assert count > 300


def test_the_persona_has_several_turns_and_no_duplicates():
    conversations = [json.dumps(conversation(row)) for row in all_rows(PERSONA)]
    assert len(set(conversations)) == len(conversations)
    users = [sum(role == "user" for role, _ in conversation(row)) for row in all_rows(PERSONA)]
    assert sum(count >= 2 for count in users) > len(users) / 2
    train = (PERSONA / "train.jsonl").read_text()
    assert "Dunholm" not in train  # a place that occurs only in valid.jsonl and test.jsonl
    assert "Dunholm" in (PERSONA / "valid.jsonl").read_text() + (PERSONA / "test.jsonl").read_text()


def test_the_log_is_consistent():
    form = re.compile((CONTINUATION / "format.txt").read_text().strip())
    seas, lamps, dates = {}, {}, []
    for row in all_rows(CONTINUATION):
        assert set(row) == {"text"}
        title, _, text = row["text"].partition("Light. ")
        assert title == "Log of Tern Rock "
        entries = text.split("\n")
        assert len(entries) == 2
        assert all(form.fullmatch(entry) for entry in entries), row
        days = [datetime.strptime(entry.split(".")[0] + " 2023", "%d %B %Y") for entry in entries]
        assert (days[1] - days[0]).days == 1
        dates.append(days[0])
        glass = [int(re.search(r"Glass (\d+)", entry)[1]) for entry in entries]
        if (tendency := re.search(r"Glass \d+, (\w+)", entries[1])[1]) == "falling":
            assert glass[1] <= glass[0]
        else:
            assert glass[1] >= glass[0] if tendency == "rising" else glass[1] == glass[0]
        for entry, day in zip(entries, days, strict=True):
            force = int(found[1]) if (found := re.search(r"force (\d+)", entry)) else 0
            seas.setdefault(force, set()).add(re.search(r"Sea ([a-z ]+)", entry)[1])
            hours, minutes = map(int, re.search(r"lit (\d\d):(\d\d)", entry).groups())
            lamps.setdefault(day.month, []).append(60 * hours + minutes)
    assert len(set(dates)) == len(dates)  # no duplicates, also between files
    assert all(len(words) == 1 for words in seas.values())  # the wind force determines the sea
    assert all(max(times) - min(times) <= 20 for times in lamps.values())  # the month determines dusk
    assert max(lamps[12]) < min(lamps[6])


def test_the_tickets_are_consistent():
    """A reply addresses the customer by name and repeats the order's number; a category has one kind of reply."""
    with open(EXAMPLES / "tickets" / "tickets.csv", newline="", encoding="utf-8") as file:
        tickets = list(csv.DictReader(file))
    assert len(tickets) == 160
    assert len({ticket["message"] for ticket in tickets}) == len(tickets)
    openings = {}
    for ticket in tickets:
        assert list(ticket) == ["message", "category", "reply"]
        name = ticket["message"].split()[-1]
        (order,) = re.findall(r"\d{4}", ticket["message"])
        assert name in ticket["reply"]
        assert order in ticket["reply"]
        openings.setdefault(ticket["category"], set()).add(ticket["reply"].split()[0])
    assert len(openings) == 5
    assert all(len(words) == 1 for words in openings.values())


# --- chat templates -----------------------------------------------------------------------------------------


def tokenized(rows, tokenizer):
    parsed, problems = parse_rows(rows, Features(mask_prompt=True))
    assert problems == []
    return tokenize_rows(parsed, ChatEncoder(tokenizer, True), 4096)


def test_a_template_with_tools_supervises_every_call(tools_model):
    """The number of supervised tokens is that of the calls and the answers, each with its end-of-turn token."""
    tokenizer = load_tokenizer(tools_model)
    rows = load_local(PERSONA, ["test"])["test"]
    split = tokenized(rows, tokenizer)
    assert split.errors == split.notices == []
    assert len(split) == len(rows)
    for example, (_, row) in zip(split.sequences, rows, strict=True):
        expected = 0
        for kind, content in conversation(row):
            if kind in ("call", "assistant"):
                text = content if kind == "assistant" else json.dumps(content)
                expected += len(tokenizer.encode(text, add_special_tokens=False)) + 1
        assert example.loss_mask.sum() == expected


def test_a_template_without_tools_writes_only_the_plain_rows(model_directory, tmp_path):
    tokenizer = load_tokenizer(with_template(model_directory, tmp_path / "model", STRICT_TEMPLATE))
    rows = load_local(PERSONA, ["test"])["test"]
    split = tokenized(rows, tokenizer)
    with_calls = sum(any(kind == "call" for kind, _ in conversation(row)) for _, row in rows)
    assert with_calls > 0
    assert split.errors == []
    assert any(
        f"{with_calls} of {len(rows)} rows have 'tool_calls' that the chat template leaves out" in notice
        for notice in split.notices
    )
    plain = load_local(PERSONA / "plain", ["test"])["test"]
    split = tokenized(plain, tokenizer)
    assert split.errors == split.notices == []


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [*RECIPES, pytest.param("persona structured", marks=pytest.mark.slow)])
def test_a_recipe_trains(recipe, model_directory, tools_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES.parent)  # paths of data in the configs are relative to it
    name = recipe.split()[0]
    path = EXAMPLES / name / "config.yaml"
    config = load_run_config(path, {})
    config.check()
    assert config.lora_config().active
    assert config.lr_schedule["arguments"][1] == config.iters - config.lr_schedule["warmup"]
    structured = recipe == "persona structured"
    flags = ["--model", str(tools_model if structured else model_directory), "--config", str(path)]
    flags += ["--data", "examples/persona"] if structured else []
    if not structured:
        assert main(["doctor", *flags]) == 0
    adapters = tmp_path / "adapters"
    few = ["--iters", "2", "--val-batches", "2", "--steps-per-report", "1", "--adapter-path", str(adapters)]
    assert main(["lora", *flags, *few]) == 0
    records = [json.loads(line) for line in (adapters / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["split"] == "train"] == [1, 2]
    assert (adapters / "adapters.safetensors").exists()
    output = capsys.readouterr()
    assert "are longer than" not in output.out + output.err


# --- the notebooks ------------------------------------------------------------------------------------------

NOTEBOOKS = {
    "finetune": "model_name = {model!r}\ndata = {data!r}\noutput = {output!r}\niterations = 8",
    "own_csv": "model_name = {model!r}\ntable = 'tickets/tickets.csv'\noutput = {output!r}\niterations = 8",
}


def code_cells(name):
    """Return a notebook and its cells of code."""
    nbformat = pytest.importorskip("nbformat", reason="the extra notebook is not installed")
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed_text(cells):
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_with_its_outputs(name):
    path = EXAMPLES / f"{name}.ipynb"
    _, code = code_cells(name)
    assert path.stat().st_size < 200_000
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert kinds <= {"stream", "display_data"}  # no errors
    printed = printed_text(code)
    assert re.search(r"iteration (\d+)/\1: validation loss", printed)  # trained to the end
    assert not re.search(r"/(tmp|home|root|work|Users|usr)/|site-packages|\x1b|\r|Warning", printed)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, model_directory, data_directory, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="the extra notebook is not installed")
    pytest.importorskip("ipykernel", reason="the extra notebook is not installed")
    notebook, code = code_cells(name)
    committed = printed_text(code)
    (settings,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    path = re.search(r"^(?:data|table) = \"(.*)\"", settings.source, re.M)[1]
    assert (EXAMPLES / path).exists()
    settings.source = NOTEBOOKS[name].format(
        model=str(model_directory), data=str(data_directory), output=str(tmp_path / "adapters")
    )
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": EXAMPLES}}).execute()
    printed = printed_text(code)
    before, after = map(
        float, re.search(r"validation loss ([\d.]+) before training, ([\d.]+) after", printed).groups()
    )
    assert after < before
    assert (tmp_path / "adapters-merged" / "model.safetensors").exists()
    html = [output for cell in code for output in cell.outputs if "text/html" in output.get("data", {})]
    assert not html  # the progress is plain text,
    assert "\x1b" not in printed  # without a bar
    if name == "finetune":
        pictures = [
            output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})
        ]
        assert len(pictures) == 3
        misalignment = r"^model\.layers\.\d+\.mlp: 0\.\d+$"
        assert len(re.findall(misalignment, printed, re.M)) == 3
        assert len(re.findall(misalignment, committed, re.M)) == 12
        for text in (printed, committed):
            assert "3 of 3 answers are the same after merging" in text
