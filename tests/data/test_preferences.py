"""Preference rows, from files and data sets as people have them to the tokens that are compared."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from nalora_mlx import preview, train
from nalora_mlx.adapters.attach import adapt
from nalora_mlx.core.config import RunConfig, TrainingConfig
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.notices import Note
from nalora_mlx.data.checks import RunData, read_rows, tokenize
from nalora_mlx.data.rows.formats import LABELS, PREFERENCES, Features, parse_rows
from nalora_mlx.data.splits import digest
from nalora_mlx.data.summary import histogram, length_statistics, mask_pieces, summary, titled_sequences
from nalora_mlx.models.context_length import context_notices
from nalora_mlx.runs.samples import choose_prompts
from tests.conftest import build_model
from tests.data.chat_cases import BERN, BERN_RESULT, OLTEN, OLTEN_RESULT, TOOLS, answer, call, system, user
from tests.data.chat_checks import encode
from tests.data.chat_oracle import FORMATS, REAL_FORMATS
from tests.data.small_tokenizers import REAL, small_tokenizer

BOTH = {PREFERENCES, LABELS}
A, B, Q = answer("a"), answer("b"), user("q")


def parsed(content, accepted=(PREFERENCES,), **features):
    """Return the row of a JSON object that has no problem."""
    before = json.dumps(content)
    ((row,), problems) = parse_rows([("x:1", content)], Features(**features), accepted=accepted)
    assert problems == []
    assert json.dumps(content) == before
    return row


def problem_of(content, accepted=(PREFERENCES,), **features):
    """Return the problem of a JSON object that is no row, without its place."""
    (rows, (problem,)) = parse_rows([("x:1", content)], Features(**features), accepted=accepted)
    assert rows == []
    assert problem.startswith("x:1: ")
    assert "\n" not in problem
    return problem.removeprefix("x:1: ")


def sides(row):
    """Return the prompt and the two answers of a pair."""
    return row.messages[: row.answer_start], row.messages[row.answer_start :], row.rejected


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, mode="dpo", names=("train",), **settings):
    return read_rows(RunConfig(data=str(path), train_mode=mode, valid_fraction=0.0, **settings), names)


# --- pairs --------------------------------------------------------------------------------------------------

SHARED = [user("q"), answer("a"), user("r")]
SHOWN = [user("r"), answer("c")]
# name -> a row, and what its parts are
PAIRS = {
    "texts": ({"prompt": "q", "chosen": "a", "rejected": "b"}, [Q], [A], [B]),
    "messages": ({"prompt": [system(), Q], "chosen": [A], "rejected": [B]}, [system(), Q], [A], [B]),
    "one message": ({"prompt": Q, "chosen": A, "rejected": B}, [Q], [A], [B]),
    "a text and messages": ({"prompt": "q", "chosen": [A], "rejected": [B]}, [Q], [A], [B]),
    "several turns per side": (
        {"prompt": [Q], "chosen": [A, *SHOWN], "rejected": [B, user("no?"), answer("no")]},
        [Q], [A, *SHOWN], [B, user("no?"), answer("no")]),
    "answers with a common beginning": (
        {"prompt": "q", "chosen": [A, user("r"), B], "rejected": [A, user("r"), answer("c")]},
        SHARED, [B], [answer("c")]),
    "whole chats": ({"chosen": [Q, A], "rejected": [Q, B]}, [Q], [A], [B]),
    "chats of several turns": (
        {"chosen": [system(), *SHARED, A], "rejected": [system(), *SHARED, B]}, [system(), *SHARED], [A], [B]),
    "chats that part early": (
        {"chosen": [Q, A, user("r"), A], "rejected": [Q, B]}, [Q], [A, user("r"), A], [B]),
    "chats that begin with the assistant": (
        {"chosen": [answer("hi"), Q, A], "rejected": [answer("hi"), Q, B]}, [answer("hi"), Q], [A], [B]),
    "chats beside their prompt": (
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]}, [Q], [A], [B]),
    "keys of messages that no template reads": (
        {"chosen": [Q | {"id": 1}, A], "rejected": [Q | {"id": 2}, B]}, [Q | {"id": 1}], [A], [B]),
    "a system prompt": (
        {"system": "You answer briefly.", "prompt": "q", "chosen": "a", "rejected": "b"}, [system(), Q], [A], [B]),
    "a system prompt beside chats": (
        {"system": "You answer briefly.", "chosen": [Q, A], "rejected": [Q, B]}, [system(), Q], [A], [B]),
    "an empty system prompt": ({"system": "", "question": "q", "chosen": "a", "rejected": "b"}, [Q], [A], [B]),
    "an instruction": (
        {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"}, [user("q\n\ni")], [A], [B]),
    "an instruction with an empty input": (
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, [Q], [A], [B]),
    "an input": ({"input": "q", "chosen": "a", "rejected": "b"}, [Q], [A], [B]),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
         "rejected": {"from": "gpt", "value": "b"}}, [Q], [A], [B]),
    "ShareGPT chats": (
        {name: [{"from": "system", "value": "You answer briefly."}, {"from": "human", "value": "q"},
                {"from": "gpt", "value": text}] for name, text in (("chosen", "a"), ("rejected", "b"))},
        [system(), Q], [A], [B]),
    "tool calls": (
        {"prompt": [Q], "chosen": [call(BERN), BERN_RESULT, A], "rejected": [call(OLTEN), OLTEN_RESULT, B],
         "tools": TOOLS}, [Q], [call(BERN), BERN_RESULT, A], [call(OLTEN), OLTEN_RESULT, B]),
    "the same tool call": (
        {"prompt": [Q], "chosen": [call(BERN), BERN_RESULT, A], "rejected": [call(BERN), BERN_RESULT, B],
         "tools": TOOLS}, [Q, call(BERN), BERN_RESULT], [A], [B]),
    "JSON in the cells of a table": (
        {"prompt": json.dumps([Q]), "chosen": json.dumps([A]), "rejected": json.dumps([B])}, [Q], [A], [B]),
    "JSON of chats": ({"chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, B])}, [Q], [A], [B]),
    "JSON that is an answer": (
        {"prompt": "q", "chosen": '[{"from": "Bern", "to": "Olten"}]', "rejected": '{"role": 1}'},
        [Q], [answer('[{"from": "Bern", "to": "Olten"}]')], [answer('{"role": 1}')]),
    "capitals": ({"Prompt": "q", "Chosen": "a", "Rejected": "b"}, [Q], [A], [B]),
    "transcripts": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\nAssistant: x\n\nAssistant: b",
         "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\nAssistant: x\n\nAssistant: c\n\nd"},
        [Q, A, user("r\nAssistant: x")], [B], [answer("c\n\nd")]),
    "a transcript with two turns in a row": (
        {"chosen": "Human: q\n\nHuman: r\n\nAssistant: a", "rejected": "Human: q\n\nHuman: r\n\nAssistant: b"},
        [user("q\n\nr")], [A], [B]),
    "a transcript that the answers continue": (
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"}, [Q], [A], [B]),
    "an answer about a transcript": (
        {"prompt": "Human: who?", "chosen": "Human: q\n\nAssistant: a", "rejected": "b"},
        [user("Human: who?")], [answer("Human: q\n\nAssistant: a")], [B]),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    content, prompt, chosen, rejected = PAIRS[name]
    row = parsed(content)
    assert sides(row) == (prompt, chosen, rejected)
    assert row.tools == content.get("tools")
    assert row.label is None
    # In a run for KTO pairs mean the same, and the answers are the chosen ones for supervised runs.
    assert parsed(content, BOTH) == row


def test_keys_that_the_user_names():
    row = {"topic": "q", "prompt": "x", "chosen": "a", "rejected": "b"}
    assert sides(parsed(row, prompt="topic")) == ([Q], [A], [B])
    assert sides(parsed(row, named=frozenset({"prompt"})))[0] == [user("x")]
    assert "there is no 'topic'; add it" in problem_of(
        {"prompt": "x", "chosen": "a", "rejected": "b"}, prompt="topic"
    )
    # Keys of supervised training in a file of settings do not hide the rejected answer.
    row = {"prompt": "q", "completion": "x", "chosen": "a", "rejected": "b"}
    for features in ({"completion": "chosen"}, {"named": frozenset({"prompt", "completion"})}):
        assert sides(parsed(row, **features)) == ([Q], [A], [B])
    assert sides(parsed({"chosen": [Q, A], "rejected": [Q, B]}, chat="chosen")) == ([Q], [A], [B])


def test_what_stands_beside_a_pair():
    row = parsed({"prompt": "q", "chosen": "a", "rejected": "b", "weight": "2",
                  "chat_template_kwargs": {"enable_thinking": False}})  # fmt: skip
    assert (row.weight, row.template_args) == (2, {"enable_thinking": False})


def test_a_row_of_weight_two_is_compared_twice(tmp_path, tokenizer):
    rows = [
        {"prompt": "the cat", "chosen": "red", "rejected": "blue", "weight": weight} for weight in (2, 0, 1)
    ]
    rows[2]["prompt"] = "the dog"
    for mode, each in (("dpo", 1), ("kto", 2)):
        split = tokenize(read(write(tmp_path / "train.jsonl", rows), mode), tokenizer, 64)["train"]
        assert [s.source.rpartition(":")[2] for s in split.sequences] == ["1"] * 2 * each + ["3"] * each
        assert split.rows == 3


# --- labels -------------------------------------------------------------------------------------------------

# name -> a row, its prompt and the answer that the label is about
LABELLED = {
    "texts": ({"prompt": "q", "completion": "a"}, [Q], [A]),
    "messages": ({"prompt": [system(), Q], "completion": [A]}, [system(), Q], [A]),
    "JSON in the cells of a table": ({"prompt": json.dumps([Q]), "completion": json.dumps([A])}, [Q], [A]),
    "a chat": ({"messages": [Q, A]}, [Q], [A]),
    "a chat of several turns": ({"messages": [*SHARED, A]}, SHARED, [A]),
    "a tool loop": ({"prompt": [Q], "completion": [call(BERN), BERN_RESULT, A], "tools": TOOLS},
                    [Q], [call(BERN), BERN_RESULT, A]),
    "a tool loop in a chat": ({"messages": [*SHARED, call(BERN), BERN_RESULT, A], "tools": TOOLS},
                              SHARED, [call(BERN), BERN_RESULT, A]),
    "a system prompt": ({"system": "You answer briefly.", "question": "q", "answer": "a"}, [system(), Q], [A]),
    "an instruction": ({"instruction": "q", "input": "i", "output": "a"}, [user("q\n\ni")], [A]),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [Q], [A]),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_answers(name):
    content, prompt, answered = LABELLED[name]
    for label in (True, False):
        row = parsed(content | {"label": label}, BOTH)
        assert (row.messages, row.answer_start) == ([*prompt, *answered], len(prompt))
        assert (row.label, row.rejected) == (label, None)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        *((value, True) for value in (True, 1, 1.0, "True", "true", " TRUE", "1", "1.0", "yes", "good", np.True_)),
        *((value, False) for value in (False, 0, 0.0, "False", "0", "0.0", "no", "bad", np.float64(0))),
    ],
)  # fmt: skip
def test_labels(value, label):
    ((row,), _) = parse_rows(
        [("x:1", {"prompt": "q", "completion": "a", "label": value})], Features(), accepted=BOTH
    )
    assert row.label is label


def test_a_label_is_read_in_runs_on_labels_only():
    content = {"prompt": "q", "completion": "a", "label": "positive"}
    ((row,), problems) = parse_rows([("x:1", content)], Features())
    assert (row.label, row.answer_start, problems) == (None, 0, [])
    assert "'label' is 'positive'; it must be true or false" in problem_of(content, BOTH)
    # The label of a pair is none of the two answers'.
    assert parsed({"prompt": "q", "chosen": "a", "rejected": "b", "label": "positive"}, BOTH).label is None


def test_keys_of_labelled_answers():
    row = {"ask": "q", "say": "a", "label": 1}
    assert parsed(row, BOTH, prompt="ask", completion="say").messages == [Q, A]
    assert problem_of({"prompt": "q", "say": "a", "label": 1}, BOTH, prompt="ask", completion="say") == (
        "no 'ask', the key of the prompt (found 'prompt', 'say', 'label'); --prompt-key names another"
    )


# --- bad rows -----------------------------------------------------------------------------------------------

# what the problem says -> the row
BAD_PAIRS = {
    "'chosen' and 'rejected' are the same; remove the row, or correct": {"prompt": "q", "chosen": "a", "rejected": "a"},
    "'chosen' and 'rejected' are the same": {"chosen": [Q, A], "rejected": [Q, A]},
    "'chosen' is empty; remove the row, or write an answer": {"prompt": "q", "chosen": "", "rejected": "a"},
    "'rejected' is empty;": {"prompt": "q", "chosen": "a", "rejected": " \n"},
    "'rejected' is empty; remove": {"chosen": [Q, A], "rejected": [Q, answer("")]},
    "'rejected' is empty; remove the row": {"prompt": "q", "chosen": "a", "rejected": None},
    "'rejected' is missing or an empty cell, and 'chosen' needs it; fill it, or remove": {"prompt": "q", "chosen": "a"},
    "'chosen' is missing or an empty cell, and 'rejected' needs it": {"prompt": "q", "rejected": "a"},
    "begin with different messages; they must be answers to the same prompt": {
        "chosen": [Q, A], "rejected": [user("x"), B]},
    "part at a message of role 'user'; they must be answers to the same prompt": {
        "chosen": [Q, A, user("r"), A], "rejected": [Q, A, user("s"), B]},
    "part at a message of role 'tool'": {
        "prompt": "q", "chosen": [call(BERN), BERN_RESULT, A], "rejected": [call(BERN), OLTEN_RESULT, B]},
    "there is no 'prompt'; add it, or name its key with --prompt-key": {"chosen": "a", "rejected": "b"},
    "there is no 'prompt'": {"prompt": "", "chosen": "a", "rejected": "b"},
    "one of 'chosen' and 'rejected' is a whole chat and the other an answer": {"chosen": [Q, A], "rejected": "b"},
    "'rejected' ends in a message of role 'user'; it must end in an assistant message": {
        "chosen": [Q, A], "rejected": [Q, B, user("r")]},
    "'rejected' has no answer of its own; it ends where the other goes on": {
        "chosen": [Q, A, user("r"), A], "rejected": [Q, A]},
    "ends in an assistant message; it must end in what they answer": {
        "prompt": [Q, answer("x")], "chosen": "a", "rejected": "b"},
    "message 2 has 'weight' 0 or 'train' false, but preference training compares all turns of 'rejected'": {
        "chosen": [Q, A], "rejected": [Q, B | {"weight": 0}]},
    "holds images, and preference training takes none; remove the images, or the row": {
        "prompt": "q", "chosen": "a", "rejected": "b", "image": "a.png"},
    "holds images, and preference training takes none": {
        name: [user([{"type": "image", "image": "a.png"}, {"type": "text", "text": "q"}]), one]
        for name, one in (("chosen", A), ("rejected", B))},
    "'rejected' holds images, and preference training takes none": {
        "prompt": "q", "chosen": "a", "rejected": [answer([{"type": "image", "image": "a.png"}])]},
    "'chosen' is a text that looks like messages and is not JSON; write the messages with json.dumps": {
        "prompt": "q", "chosen": str([A]), "rejected": str([B])},
    "has one answer, and nothing to compare it with; give 'prompt', 'chosen' and 'rejected', or use --train-mode sft": {
        "prompt": "q", "completion": "a"},
    "has one answer, and nothing to compare it": {"messages": [Q, A]},
    "has one answer with a 'label', which --train-mode kto reads": {"prompt": "q", "completion": "a", "label": True},
    "is a text, and preference training compares answers; give 'prompt', 'chosen' and 'rejected'": {"text": "t"},
    "no known format; give 'prompt', 'chosen' and 'rejected' (found 'a')": {"a": 1},
    "give 'prompt', 'chosen' and 'rejected' (found 'prompt')": {"prompt": "q"},
    "'chosen' must be a string, not int": {"prompt": "q", "chosen": 1, "rejected": "b"},
    "'chosen' must be a list of messages": {"prompt": "q", "chosen": ["a"], "rejected": "b"},
    "'prompt' must be a string, not int": {"prompt": 3, "chosen": "a", "rejected": "b"},
}  # fmt: skip
BAD_LABELS = {
    "'label' is 'perhaps'; it must be true or false": {"prompt": "q", "completion": "a", "label": "perhaps"},
    "'label' is '2'": {"prompt": "q", "completion": "a", "label": 2},
    "has no 'label' (true for a good answer, false for a bad one), nor a 'chosen' and a 'rejected' answer": {
        "prompt": "q", "completion": "a"},
    "has no 'label'": {"messages": [Q, A], "label": None},
    "the answer is empty; remove the row": {"prompt": "q", "completion": " ", "label": True},
    "the chat ends in a message of role 'user'": {"messages": [Q, A, Q], "label": True},
    "an answer with a label, and no prompt before it": {"messages": [A], "label": True},
    "has 'weight' 0 or 'train' false": {"messages": [Q, A | {"train": False}], "label": True},
    "preference training compares answers; give 'prompt', 'chosen' and 'rejected', or 'completion' and 'label'": {
        "text": "t", "label": True},
    "holds images, and preference training takes none": {
        "prompt": "q", "completion": "a", "label": 1, "image": "a.png"},
    "give 'prompt', 'chosen' and 'rejected', or 'prompt', 'completion' and 'label' (found 'a')": {"a": 1},
    "'completion' is missing or an empty cell, and 'prompt' needs it": {"prompt": "q", "label": True},
    "'chosen' and 'rejected' are the same": {"prompt": "q", "chosen": "a", "rejected": "a"},
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_PAIRS)
def test_bad_pairs(what):
    assert what in problem_of(BAD_PAIRS[what])


@pytest.mark.parametrize("what", BAD_LABELS)
def test_bad_labelled_answers(what):
    assert what in problem_of(BAD_LABELS[what], BOTH)


def test_supervised_runs_say_how_to_train_on_transcripts():
    row = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    assert problem_of(row, ()).endswith(
        "; --train-mode dpo trains on both, --text-key chosen on the chosen texts"
    )
    assert parse_rows([("x:1", row)], Features(text="chosen"))[0][0].text == row["chosen"]


def test_a_file_of_bad_rows_lists_them_all(tmp_path, tokenizer):
    rows = [row for row in BAD_PAIRS.values() if row.get("rejected", "") is not None] * 2
    path = write(tmp_path / "train.jsonl", rows)
    for mode in ("dpo", "orpo", "simpo"):
        found = read(path, mode)
        assert [p.split(": ")[0] for p in found.problems] == [f"{path}:{n + 1}" for n in range(len(rows))]
        assert found.sources == [{"train": []}]
        assert tokenize(found, tokenizer, 64)["train"].errors == []
        assert re.fullmatch(r"[^\n]* and \d+ more", listed(found.problems))
    same = write(tmp_path / "same.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "a"}] * 3)
    assert listed(read(same).problems) == (
        f"{same}:1, :2, :3: 'chosen' and 'rejected' are the same; remove the row, or correct one of them"
    )
    with pytest.raises(InputError, match=r"^row 1: 'chosen' and 'rejected' are the same"):
        train(
            adapted(),
            [{"prompt": "q", "chosen": "a", "rejected": "a"}],
            [],
            settings("dpo"),
            tokenizer=tokenizer,
        )


# --- tables and data sets of the Hub ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_tables(tmp_path, kind):
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": json.dumps([system(), Q]), "chosen": json.dumps([A]), "rejected": json.dumps([B])},
    ]
    labelled = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False)]
    path, labels = tmp_path / f"train.{kind}", tmp_path / f"labels.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        from pyarrow import parquet

        rows = [
            {"prompt": [system(), Q], "chosen": [A], "rejected": [B]},
            {"prompt": [Q], "chosen": [A], "rejected": [B]},
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        parquet.write_table(pyarrow.Table.from_pylist(labelled), labels)
    else:
        for table, content in ((path, rows), (labels, labelled)):
            with open(table, "w", newline="") as file:
                writer = csv.DictWriter(file, content[0], delimiter={"csv": ",", "tsv": "\t"}[kind])
                writer.writeheader()
                writer.writerows(content)
    found = read(path)
    assert found.problems == []
    prompts = [[Q], [system(), Q]][:: -1 if kind == "parquet" else 1]
    assert [sides(row) for row in found.sources[0]["train"]] == [(prompt, [A], [B]) for prompt in prompts]
    found = read(labels, "kto")
    assert [row.label for row in found.sources[0]["train"]] == [True, False]


def test_empty_cells_are_one_line_each(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("prompt,chosen,rejected\nq,a,b\nq,,b\nq,a,\n,a,b\nq,,\n")
    assert [p.removeprefix(f"{path}:")[:40] for p in read(path).problems] == [
        "3: 'chosen' is missing or an empty cell,",
        "4: 'rejected' is missing or an empty cel",
        "5: 'chosen' and 'rejected' are answers, ",
        "6: no known format; give 'prompt', 'chos",
    ]


TURNS, PARTED = [user("q"), answer("x"), user("r")], [("chosen", "a"), ("rejected", "b")]


def transcript(*turns):
    return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {turn}" for i, turn in enumerate(turns))


# The columns and splits of data sets on the Hub: splits, a row, its prompt, and the train mode.
HUB = {
    "HuggingFaceH4/ultrafeedback_binarized": (
        ("train_prefs", "train_sft", "test_prefs", "test_sft", "train_gen", "test_gen"),
        {"prompt": "q", "prompt_id": "0f", **{name: [Q, answer(text)] for name, text in PARTED},
         "messages": [Q, A], "score_chosen": 8.5, "score_rejected": 7.0},
        [Q], "dpo"),
    "trl-lib/ultrafeedback_binarized": (
        ("train", "test"),
        {**{name: [Q, answer(text)] for name, text in PARTED}, "score_chosen": 8.5, "score_rejected": 7.0}, [Q], "dpo"),
    "argilla/dpo-mix-7k": (
        ("train", "test"),
        {"dataset": "argilla/capybara", **{name: [*TURNS, answer(text)] for name, text in PARTED},
         "chosen_rating": 5.0, "rejected_rating": 4.0}, TURNS, "dpo"),
    "Intel/orca_dpo_pairs": (
        ("train",),
        {"system": "You answer briefly.", "question": "q", "chosen": "a", "rejected": "b"}, [system(), Q], "dpo"),
    "jondurbin/truthy-dpo-v0.1": (
        ("train",),
        {"id": "0f", "source": "truthy", "system": "You answer briefly.", "prompt": "q", "chosen": "a",
         "rejected": "b"}, [system(), Q], "dpo"),
    "Anthropic/hh-rlhf": (
        ("train", "test"), {name: transcript("q", "x", "r", text) for name, text in PARTED}, TURNS, "dpo"),
    "trl-lib/kto-mix-14k": (
        ("train", "test"), {"prompt": TURNS, "completion": [A], "label": True}, TURNS, "kto"),
}  # fmt: skip


def check_hub_rows(found, prompt, mode, count):
    assert found.problems == []
    rows = found.sources[0]["train"]
    assert len(rows) == count
    for row in rows:
        assert row.messages[: row.answer_start] == prompt
        assert row.messages[row.answer_start :] == [A]
        assert (row.rejected, row.label) == ((None, True) if mode == "kto" else ([B], None))


@pytest.mark.parametrize("name", HUB)
def test_data_sets_of_the_hub(tmp_path, monkeypatch, name):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    splits, content, prompt, mode = HUB[name]
    loaded = datasets.DatasetDict({split: datasets.Dataset.from_list([content] * 3) for split in splits})
    asked = []

    def load_dataset(path, split=None, **_):
        asked.append((path, split))
        return loaded if split is None else loaded[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = ("train", "valid", "test") if len(splits) > 1 else ("train", "valid")
    found = read(name, mode, names)
    check_hub_rows(found, prompt, mode, 3)
    assert found.sources[0]["valid"] == []
    if len(splits) > 1:
        assert len(found.sources[0]["test"]) == 3
    renamed = [notice for notice in found.notices if "is read as the" in notice]
    assert renamed == (
        [f"{name}: '{part}_prefs' is read as the {part} split" for part in ("train", "test")]
        if "train_prefs" in splits
        else []
    )
    entry = {"path": name, "train_split": splits[0], "valid_split": splits[-1]}
    check_hub_rows(
        read_rows(RunConfig(hf_dataset=entry, train_mode=mode), ("train", "valid")), prompt, mode, 3
    )
    assert asked == [(name, None), (name, splits[0]), (name, splits[-1])]
    # The same rows in files, named as the splits are.
    for split in splits:
        write(tmp_path / f"{split}.jsonl", [content])
    found = read(tmp_path, mode, names)
    check_hub_rows(found, prompt, mode, 1)
    assert len(found.sources[0].get("test", ())) == (len(splits) > 1)


@pytest.mark.parametrize("bad", [2, 3])
def test_a_few_bad_rows_of_a_data_set_on_the_hub_are_left_out(tmp_path, monkeypatch, bad):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [{"prompt": "q", "chosen": "a", "rejected": "a" if i < bad else "b"} for i in range(20)]
    loaded = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    found = read("owner/name")
    places = ", :".join(str(i + 1) for i in range(bad))
    what = "'chosen' and 'rejected' are the same; remove the row, or correct one of them"
    problem = f"owner/name[train]:{places}: {what}"
    if bad == 2:  # a tenth
        assert len(found.sources[0]["train"]) == 18
        assert found.problems == []
        (notice,) = (notice for notice in found.notices if "left out" in notice)
        assert notice == f"train: 2 of 20 rows cannot be compared and are left out: {problem}"
        assert not isinstance(notice, Note)
    else:
        assert listed(found.problems) == problem
    # In a file, the user can correct them.
    assert len(read(write(tmp_path / "train.jsonl", rows)).problems) == bad


# --- tokens and masks ---------------------------------------------------------------------------------------


def check_answers(split, rows, tokenizer, ends, mode):
    """Check that each answer follows what generation starts from, and ends in an end-of-turn token."""
    assert split.errors == []
    examples = iter(split.sequences)
    for prompt, *answers in rows:
        row = {"tools": TOOLS} if any("tool_calls" in m for messages in answers for m in messages) else {}
        context = encode(
            tokenizer,
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **row),
        )
        found = (
            [next(examples).answers[0] for _ in answers] if mode == "kto" else list(next(examples).answers)
        )
        for example, messages in zip(found, answers, strict=True):
            start = int(example.loss_mask.argmax())
            assert example.tokens[:start].tolist() == context
            text = tokenizer.decode(
                example.tokens[start:][example.loss_mask[start:]].tolist(), skip_special_tokens=False
            )
            position = 0
            for message in messages:
                if message["role"] == "assistant":
                    assert message["content"] in text[position:]
                    position += text[position:].index(message["content"]) + len(message["content"])
                else:
                    assert message["content"] not in text
            last = tokenizer.decode(
                example.tokens[example.loss_mask][-2:].tolist(), skip_special_tokens=False
            )
            assert any(end in last for end in ends)
            assert example.loss_mask[-1]
    assert next(examples, None) is None


def check_shareable(example):
    """Check that the inputs two answers share are their common beginning less one, and not supervised."""
    chosen, rejected = example.answers
    start = min(int(chosen.loss_mask.argmax()), int(rejected.loss_mask.argmax()))
    common = start
    while not np.array_equal(chosen.tokens[:common], rejected.tokens[:common]):
        common -= 1
    assert example.shareable == common - 1
    assert example.shareable > 0
    for one in (
        chosen,
        rejected,
    ):  # the first target after what is shared is still in the prompt or begins the answer
        assert not one.loss_mask[: example.shareable + 1].any()
    assert chosen.tokens[: example.shareable].tolist() == rejected.tokens[: example.shareable].tolist()


ROWS = [
    ([user("How far is Bern?")], [answer("Two hours.")], [answer("Far away, I think.")]),
    ([system(), user("How far is Bern?")], [answer("Two hours by train.")], [answer("Two hours, by car.")]),
    (
        [user("How far is Bern?"), answer("Two hours."), user("And Rome?")],
        [answer("Ten hours.")],
        [answer("Ten.")],
    ),
    ([user("Wo liegt 東京? 🚆")], [answer("東京は遠い。🇨🇭")], [answer("東 Café")]),
]
TURNS_ROW = (
    [user("How far is Bern?")],
    [answer("Two hours."), user("By train?"), answer("Yes.")],
    [answer("Far."), user("How far?"), answer("Very far.")],
)
CALLS_ROW = (
    [user("How far is Bern?")],
    [call(BERN, reasoning="I look it up."), BERN_RESULT, answer("Two hours.", "Now I know.")],
    [answer("I do not know.")],
)


def pair_of(prompt, chosen, rejected):
    tools = {"tools": TOOLS} if any("tool_calls" in message for message in [*chosen, *rejected]) else {}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **tools}


@pytest.mark.parametrize("mode", ["dpo", "kto"])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_2", "gemma3", "phi3", "deepseek_v3"])
def test_answers_follow_what_generation_starts_from(name, mode):
    tokenizer, form = small_tokenizer(name), FORMATS[name]()
    rows = [row for row in ROWS if "system" not in form.refuses | form.drops or row[0][0]["role"] != "system"]
    if name in ("qwen2_5", "phi3", "deepseek_v3"):
        rows = [*rows, TURNS_ROW]
    split = preview([pair_of(*row) for row in rows], tokenizer, train_mode=mode)
    check_answers(split, rows, tokenizer, form.ends, mode)
    if mode == "dpo":
        for example in split.sequences:
            check_shareable(example)


@pytest.mark.parametrize("name", REAL_FORMATS)
def test_real_tokenizers_with_their_own_templates(name):
    directory = Path(os.environ.get("NALORA_TOKENIZERS", REAL)) / name
    if not directory.is_dir():
        pytest.skip("the tokenizers of real models are not here; set NALORA_TOKENIZERS to their directory")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    form = REAL_FORMATS[name]()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"),
        eos_token=form.ends[0],
        bos_token=form.bos or None,
        chat_template=config["chat_template"],
        clean_up_tokenization_spaces=False,
    )
    rows = [row for row in ROWS if "system" not in form.drops or row[0][0]["role"] != "system"]
    rows += {"qwen3": [CALLS_ROW], "deepseek_v3": [TURNS_ROW], "mistral_nemo": [TURNS_ROW]}[name]
    for mode in ("dpo", "kto"):
        split = preview([pair_of(*row) for row in rows], tokenizer, train_mode=mode)
        check_answers(split, rows, tokenizer, form.ends, mode)
        if mode == "dpo":
            for example in split.sequences:
                check_shareable(example)


def test_chats_that_part_give_the_same_tokens_as_prompt_and_answers():
    tokenizer = small_tokenizer("qwen2_5")
    rows = [pair_of(*row) for row in (*ROWS, TURNS_ROW)]
    whole = [{name: [*row["prompt"], *row[name]] for name in ("chosen", "rejected")} for row in rows]
    for mode in ("dpo", "orpo", "simpo", "kto"):
        apart, together = (preview(one, tokenizer, train_mode=mode).sequences for one in (rows, whole))
        for a, b in zip(apart, together, strict=True):
            assert [one.tokens.tolist() for one in a.answers] == [one.tokens.tolist() for one in b.answers]
            assert [one.loss_mask.tolist() for one in a.answers] == [
                one.loss_mask.tolist() for one in b.answers
            ]


def test_turns_that_the_template_renders_anew_are_left_out():
    """Qwen3 drops the reasoning of earlier turns, so two turns of an answer need two sequences."""
    tokenizer = small_tokenizer("qwen3")
    turns = [answer("Far.", "Hm."), user("How?"), answer("Very.", "Oh.")]
    row = pair_of([user("Bern?")], turns, [answer("Near.")])
    split = preview([row, pair_of(*ROWS[0])], tokenizer, train_mode="dpo")
    assert [example.source for example in split.sequences] == ["row 2"]
    problem = (
        "has answers of several turns that are rendered differently once later turns follow and was left out (row 1); "
        "let the chats part at their last answer"
    )
    assert any(notice.startswith(f"rows: 1 of 2 rows {problem}") for notice in warnings(split))
    (error,) = preview([row], tokenizer, train_mode="dpo").errors
    assert error.startswith(f"rows: 1 of 1 row {problem}")


WORDS = {"prompt": "what colour is the cat ?", "chosen": "the cat is red", "rejected": "the cat is blue"}


@pytest.fixture
def length(tokenizer):
    """Return the number of tokens of the prompt of WORDS."""
    (example,) = preview([WORDS], tokenizer, train_mode="dpo").sequences
    return int(example.answers[0].loss_mask.argmax())


def warnings(split):
    return [notice for notice in split.notices if not isinstance(notice, Note)]


def test_answers_beyond_the_maximum_length(tokenizer, length):
    rows = [WORDS, WORDS | {"rejected": "the cat"}, WORDS | {"chosen": "red"}]
    split = preview(rows, tokenizer, max_seq_length=length + 5, train_mode="dpo")
    assert [len(a.tokens) for example in split.sequences for a in example.answers] == [
        length + n for n in (5, 5, 5, 3, 2, 5)
    ]
    assert not any("cut" in notice for notice in split.notices)
    # Cut before the end token, then before the only word that differs.
    split = preview(rows, tokenizer, max_seq_length=length + 4, train_mode="dpo")
    assert [len(a.tokens) for example in split.sequences for a in example.answers] == [
        length + n for n in (4, 4, 4, 3, 2, 4)
    ]
    assert warnings(split) == [
        f"rows: 3 of 3 rows are longer than {length + 4} tokens (the longest has {length + 5}) and were cut "
        "(row 1, row 2, row 3); raise --max-seq-length to keep them whole"
    ]
    split = preview(rows, tokenizer, max_seq_length=length + 3, train_mode="dpo")
    assert [example.source for example in split.sequences] == ["row 2", "row 3"]
    assert split.rows == 2
    (notice,) = (notice for notice in split.notices if "do not differ" in notice)
    assert notice == (
        f"rows: 1 of 3 rows has answers that do not differ within {length + 3} tokens and was left out (row 1); "
        "raise --max-seq-length, or shorten the prompts"
    )
    split = preview(rows, tokenizer, max_seq_length=length, train_mode="dpo")
    assert split.sequences == warnings(split) == []
    (error,) = split.errors
    assert error.startswith(
        "rows: 3 of 3 rows have no supervised token and were left out (row 1, row 2, row 3)"
    )
    split = preview(rows[:1], tokenizer, max_seq_length=length + 1, train_mode="dpo")
    assert split.errors[0].startswith(
        f"rows: 1 of 1 row has answers that do not differ within {length + 1} tokens"
    )


def test_a_turn_beyond_the_maximum_length_is_cut(tokenizer, length):
    """The second turn of the chosen answer is lost, because its context fills the length."""
    row = {"prompt": WORDS["prompt"], "rejected": "blue",
           "chosen": [answer("red"), user("what ?"), answer("the cat")]}  # fmt: skip
    (example,) = preview([row], tokenizer, train_mode="dpo").sequences
    whole = example.answers[0]
    second = int(np.flatnonzero(whole.loss_mask)[2])
    split = preview([row], tokenizer, max_seq_length=second, train_mode="dpo")
    (example,) = split.sequences
    assert example.answers[0].tokens.tolist() == whole.tokens[: length + 2].tolist()
    assert f"(the longest has {second + 1}) and was cut (row 1)" in warnings(split)[0]


def test_answers_that_are_rendered_alike():
    """Qwen3's template strips blanks, and so nothing is left to compare."""
    tokenizer = small_tokenizer("gemma3")
    rows = [pair_of([Q], [A], [answer(" a\n")]), pair_of([Q], [A], [B])]
    split = preview(rows, tokenizer, train_mode="dpo")
    assert [example.source for example in split.sequences] == ["row 2"]
    (notice,) = (notice for notice in split.notices if "left out" in notice)
    assert (
        "1 of 2 rows has answers that are the same once the chat template has rendered them and was left out"
        in notice
    )
    assert "raise" not in notice


def test_answers_without_an_end_token(tokenizer):
    plain = small_tokenizer("qwen2_5", template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    split = preview([pair_of([Q], [A], [B])], plain, train_mode="dpo")
    assert any("do not end" in n or "does not end in a supervised end" in n for n in split.notices)
    assert not any("does not end" in n for n in preview([WORDS], tokenizer, train_mode="dpo").notices)


def test_kto_rows_from_pairs_and_labels(tokenizer):
    rows = [WORDS, {"prompt": "the dog", "completion": "green", "label": False}]
    split = preview(rows, tokenizer, train_mode="kto")
    assert [(e.source, e.desirable) for e in split.sequences] == [
        ("row 1", True),
        ("row 1", False),
        ("row 2", False),
    ]
    assert split.rows == 2
    pair = preview(rows[:1], tokenizer, train_mode="dpo").sequences[0]
    for example, one in zip(split.sequences, pair.answers, strict=False):
        assert example.answers[0].tokens.tolist() == one.tokens.tolist()
        assert example.answers[0].loss_mask.tolist() == one.loss_mask.tolist()


def test_mismatched_answers_are_those_of_another_prompt(tokenizer):
    """Rows with the same prompt follow each other, as where several answers to each prompt were judged."""
    asked = [
        ("the cat", "red"),
        ("the cat", "blue"),
        ("the dog", "green"),
        ("the dog", "one"),
        ("the cat", "two"),
    ]
    rows = [{"prompt": p, "completion": c, "label": i % 2} for i, (p, c) in enumerate(asked)]

    def mismatched(rows):
        found = preview(rows, tokenizer, train_mode="kto").sequences
        texts = []
        for example in found:
            own, other = example.answers[0], example.mismatched
            start = int(own.loss_mask.argmax())
            assert other.tokens[:start].tolist() == own.tokens[:start].tolist()
            assert int(other.loss_mask.argmax()) == start
            texts.append(tokenizer.decode(other.tokens[start:-1].tolist()).strip())
            assert other.loss_mask[start:].all()
        return texts

    assert mismatched(rows) == ["one", "one", "blue", "blue", "one"]
    assert mismatched(rows[:2]) == ["blue", "red"]  # there is no other prompt
    assert mismatched(rows[:1]) == ["red"]
    assert mismatched([rows[0], rows[2], rows[1], rows[4]]) == ["green", "red", "green", "green"]
    assert mismatched(rows[1:4]) == ["one", "blue", "blue"]


def test_orpo_trains_on_the_chosen_answer_too(tokenizer, length):
    for mask_prompt in (True, False):
        (example,) = preview([WORDS], tokenizer, mask_prompt, train_mode="orpo").sequences
        expected = np.arange(length + 5) >= (length if mask_prompt else 1)
        assert example.sft_mask.tolist() == expected.tolist()
        assert example.answers[0].loss_mask.tolist() == (np.arange(length + 5) >= length).tolist()


# --- hold-out and duplicates --------------------------------------------------------------------------------


def test_rejected_answers_and_labels_tell_rows_apart():
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    labelled = {"prompt": "q", "completion": "a", "label": True}
    chat = {"chosen": [*SHARED, A], "rejected": [*SHARED, B]}
    contents = [
        pair,
        pair | {"rejected": "c"},
        pair | {"prompt": "r"},
        {"prompt": "q", "chosen": "b", "rejected": "a"},
        labelled,
        labelled | {"label": False},
        chat,
        {"chosen": [*SHARED, A], "rejected": [user("q"), B]},  # the same end, but it begins earlier
    ]
    rows = [parsed(content, BOTH) for content in contents]
    assert len({digest(row) for row in rows}) == len(rows)
    (supervised,), _ = parse_rows([("x:1", labelled)], Features())
    assert digest(supervised) not in {digest(row) for row in rows}
    same = {"chosen": [Q, A], "rejected": [Q, B | {"id": 3}], "score": 3}
    assert digest(parsed(same)) == digest(rows[0])


def test_pairs_in_two_splits_are_found(tmp_path):
    pairs = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    write(tmp_path / "train.jsonl", pairs)
    write(tmp_path / "test.jsonl", [pairs[1], pairs[2] | {"rejected": "c"}])
    for names in (("train", "test"), ("train",)):
        found = read_rows(RunConfig(data=str(tmp_path), train_mode="dpo"), names, compare_with_test=True)
        (notice,) = (notice for notice in found.notices if "in train too" in notice)
        assert notice.startswith(
            f"test: 1 row is in train too ({tmp_path}/test.jsonl:1 is {tmp_path}/train.jsonl:2)"
        )


def test_equal_pairs_are_held_out_together(tmp_path):
    rows = [{"prompt": f"q{i % 5}", "chosen": "a", "rejected": f"b{i % 10}"} for i in range(20)]
    path = write(tmp_path / "train.jsonl", rows)
    found = read_rows(RunConfig(data=str(path), train_mode="dpo", valid_fraction=0.2), ("train", "valid"))
    train_rows, valid_rows = (found.sources[0][name] for name in ("train", "valid"))
    assert len(valid_rows) == 4
    parts = [
        {(row.messages[0]["content"], row.rejected[0]["content"]) for row in rows}
        for rows in (train_rows, valid_rows)
    ]
    assert not parts[0] & parts[1]


# --- what is shown, and training on dicts -------------------------------------------------------------------


def settings(mode, **others):
    return TrainingConfig(train_mode=mode, iters=2, batch_size=2, **others)


def adapted():
    model = build_model()
    adapt(model)
    return model


DICTS = {
    "dpo": [WORDS, WORDS | {"prompt": "the dog"}],
    "kto": [WORDS, {"prompt": "the dog", "completion": "red", "label": False}],
}


@pytest.mark.parametrize("mode", ["dpo", "orpo", "simpo", "kto"])
def test_training_takes_dicts_and_previews(tokenizer, mode):
    rows = DICTS.get(mode, DICTS["dpo"])
    losses = [
        train(adapted(), given, [], settings(mode), tokenizer=tokenizer).train_loss
        for given in (rows, preview(rows, tokenizer, False, train_mode=mode))
    ]
    assert losses[0] == losses[1]
    other = {"dpo": "orpo", "orpo": "dpo", "simpo": "kto", "kto": "dpo"}[mode]
    for wrong in (
        preview([{"text": "the cat"}], tokenizer, False),
        preview(DICTS.get(other, DICTS["dpo"]), tokenizer, train_mode=other),
    ):
        with pytest.raises(
            InputError, match=f"was not tokenized for train_mode {mode}; .* train_mode='{mode}'"
        ):
            train(adapted(), wrong, [], settings(mode), tokenizer=tokenizer)
    with pytest.raises(InputError, match="was not tokenized for train_mode sft"):
        train(adapted(), preview(rows, tokenizer, train_mode=mode), [], settings("sft"), tokenizer=tokenizer)


def test_previews_of_bad_rows(tokenizer):
    split = preview([WORDS, WORDS | {"rejected": WORDS["chosen"]}, {"a": 1}], tokenizer, train_mode="dpo")
    assert [error.split(":")[0] for error in split.errors] == ["row 2", "row 3"]
    assert len(split) == 1
    with pytest.raises(InputError, match="train_mode is 'ppo'; it must be one of sft, dpo, orpo, kto, simpo"):
        preview([WORDS], tokenizer, train_mode="ppo")


def test_summaries_count_answers(tokenizer, length):
    rows = [WORDS, WORDS | {"rejected": "blue"}]
    split = preview(rows, tokenizer, train_mode="dpo")
    total = 4 * length + 5 + 5 + 5 + 2
    assert summary("train", split) == (
        f"train: 2 rows with 4 answers, {total} tokens, {17 / total:.0%} supervised; "
        f"lengths {length + 2} to {length + 5}, median {length + 5}"
    )
    assert length_statistics(split.sequences)["longest"] == length + 5
    assert sum(int(line.rsplit(" ", 1)[1]) for line in histogram(split.sequences)) == 4
    labelled = [*rows, {"prompt": "the dog", "completion": "red", "label": True}]
    split = preview(labelled, tokenizer, train_mode="kto")
    assert summary("train", split).startswith("train: 3 rows with 5 answers, 3 of them good, ")
    assert length_statistics(split.sequences)["supervised"] == 17 + 2
    limits = {"max_position_embeddings": length + 4}
    (notice,) = context_notices({"train": preview(rows, tokenizer, train_mode="dpo")}, limits)
    assert f"2 rows are longer than the {length + 4} tokens" in notice
    assert f"the longest has {length + 5}: row 1, row 2" in notice
    assert context_notices({"train": split}, {"max_position_embeddings": length + 5}) == []


def test_masks_are_shown_for_each_answer(tokenizer):
    def shown(row, mode, mask_prompt=True):
        (example, *_) = preview([row], tokenizer, mask_prompt, train_mode=mode).sequences
        return {
            title: "".join(text for text, supervised in mask_pieces(one, tokenizer) if supervised).strip()
            for title, one in titled_sequences(example).items()
        }

    red, blue = (f"the cat is {colour} <|im_end|>" for colour in ("red", "blue"))
    assert shown(WORDS, "dpo") == {"row 1 (chosen)": red, "row 1 (rejected)": blue}
    assert shown(WORDS, "kto") == {"row 1 (label true)": red}
    assert shown(WORDS, "orpo")["row 1 (chosen)"] == red
    whole = shown(WORDS, "orpo", False)
    assert whole["row 1 (chosen)"].startswith("user what colour")
    assert whole["row 1 (rejected)"] == blue


def test_samples_expect_good_answers():
    def prompts(*contents, accepted=BOTH):
        rows, problems = parse_rows(
            [(f"x:{i}", row) for i, row in enumerate(contents, 1)], Features(), accepted=accepted
        )
        assert problems == []
        return [
            (p["messages"], p["expected"]) for p in choose_prompts(RunData(False, sources=[{"train": rows}]))
        ]

    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    turns = {"prompt": "q2", "chosen": [A, user("r"), B], "rejected": "c"}
    assert prompts(pair, turns) == [([Q], "a"), ([user("q2")], "a")]
    bad, good = ({"prompt": "q", "completion": c, "label": label} for c, label in (("b", False), ("a", True)))
    assert prompts(bad, good, {"prompt": "r", "completion": "b", "label": False}) == [([Q], "a")]
    assert prompts(*[bad] * 150, good) == [([Q], "a")]
    assert prompts(bad) == []
