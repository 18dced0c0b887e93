"""Prompts of a run's data, and samples.json."""

import json

import pytest

from nalora_mlx.core.errors import InputError
from nalora_mlx.data.checks import RunData
from nalora_mlx.data.rows.formats import Features, parse_row
from nalora_mlx.runs.samples import SAMPLES_FILE, choose_prompts, read_samples, write_samples_file


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def data(valid=(), train=(), name="data/valid.jsonl"):
    """Return a run's data with these rows."""
    return RunData(
        False,
        sources=[
            {
                split: [parse_row(f"{name}:{i + 1}", row, Features()) for i, row in enumerate(rows)]
                for split, rows in (("train", train), ("valid", valid))
            }
        ],
    )


def ask(number, length=0):
    return {"prompt": f"q{number} " + "x" * length, "completion": f"a{number}"}


WORDS = " ".join(f"w{i}" for i in range(100))
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
# name -> a row, what of it is asked, and what it expects
ROWS = {
    "chat": (
        {"messages": [turn("system", "s"), turn("user", "q"), turn("assistant", "a")], "tools": TOOLS},
        {"messages": [turn("system", "s"), turn("user", "q")], "tools": TOOLS, "prompt": "q"},
        "a",
    ),
    "turns": (
        {
            "messages": [
                turn("user", "q"),
                turn("assistant", "a"),
                turn("user", "r"),
                turn("assistant", "b"),
            ],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {
            "messages": [turn("user", "q"), turn("assistant", "a"), turn("user", "r")],
            "chat_template_kwargs": {"enable_thinking": False},
            "prompt": "user: q\nassistant: a\nuser: r",
        },
        "b",
    ),
    "unanswered": (
        {"messages": [turn("user", "q"), turn("assistant", "a"), turn("user", "r")]},
        {"messages": [turn("user", "q")], "prompt": "q"},
        "a",
    ),
    "no answer": ({"messages": [turn("user", "q")]}, {"messages": [turn("user", "q")], "prompt": "q"}, None),
    "tool call": (
        {"messages": [turn("user", "q"), turn("assistant", "", tool_calls=[CALL])]},
        {"messages": [turn("user", "q")], "prompt": "q"},
        '{"name": "add", "arguments": {"x": 1}}',
    ),
    "completion": (
        {"prompt": "q", "completion": "a"},
        {"messages": [turn("user", "q")], "prompt": "q"},
        "a",
    ),
    "text": (
        {"text": WORDS},
        {"text": " ".join(WORDS.split()[:12]), "prompt": " ".join(WORDS.split()[:12])},
        " ".join(WORDS.split()[12:72]),
    ),
    "leading spaces": ({"text": "\n    one two three"}, {"text": "one", "prompt": "one"}, "two three"),
    "no spaces": (
        {"text": "吾輩は猫である" * 40},
        {"text": ("吾輩は猫である" * 40)[:60], "prompt": ("吾輩は猫である" * 40)[:60]},
        "吾輩は猫である".join([""] * 41)[60:],
    ),
    "short text": ({"text": "one two three"}, {"text": "one", "prompt": "one"}, "two three"),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_a_row_asks_and_expects(name):
    row, asked, expected = ROWS[name]
    (prompt,) = choose_prompts(data([row], name="/home/x/my data/valid.jsonl"))
    assert prompt == {"source": "valid.jsonl:1", "split": "valid", **asked, "expected": expected}
    json.dumps(prompt)


def sources(chosen):
    return [prompt["source"].rpartition(":")[2] for prompt in chosen]


def test_prompts_are_different_short_and_of_the_validation_set():
    rows = [ask(0), ask(0), ask(1, 2000), ask(2, 800), ask(3), ask(4)]
    assert sources(choose_prompts(data(rows, [ask(9)]))) == ["1", "4", "5"]
    assert sources(choose_prompts(data(rows[:4], [ask(9)]))) == ["1", "4", "3"]  # long ones only if need be
    assert sources(choose_prompts(data([ask(0), ask(1, 9000)]))) == ["1"]
    (prompt,) = choose_prompts(data([], [ask(9)]))
    assert (prompt["prompt"], prompt["split"]) == ("q9 ", "train")
    assert choose_prompts(data()) == []
    # The same question after another conversation is another prompt.
    chats = [
        {"messages": [turn("system", s), turn("user", "q"), turn("assistant", "a")]} for s in ("s", "t", "s")
    ]
    assert sources(choose_prompts(data(chats))) == ["1", "2"]


def test_only_the_first_rows_are_looked_at():
    rows = [{"messages": [turn("user", "q")]}] * 100 + [ask(1)]
    assert sources(choose_prompts(data(rows))) == ["1"]


SAMPLE = {
    **{"source": "valid.jsonl:1", "split": "valid", "messages": [turn("user", "q")], "prompt": "q"},
    **{"expected": None, "before": None, "before_complete": False, "after": "a", "complete": True},
}


def test_the_file_is_read_as_it_was_written(tmp_path):
    assert read_samples(tmp_path) == []
    write_samples_file(tmp_path, [SAMPLE], 96)
    assert read_samples(tmp_path) == [SAMPLE]
    assert json.loads((tmp_path / SAMPLES_FILE).read_text())["max_tokens"] == 96
    assert [path.name for path in tmp_path.iterdir()] == [SAMPLES_FILE]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": 2}, "has format 2, and this version reads 1; update"),
        ({"format": 1}, "is damaged"),
        ({"format": 1, "samples": [{"prompt": "q"}]}, "is damaged"),
        ({"format": 1, "samples": [SAMPLE | {"after": None}]}, "is damaged"),
        ({"format": 1, "samples": [SAMPLE | {"images": ["https://example.org/a.png"]}]}, "is damaged"),
        ([], "must hold a JSON object"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path, content, message):
    (tmp_path / SAMPLES_FILE).write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"samples\.json {message}"):
        read_samples(tmp_path)
