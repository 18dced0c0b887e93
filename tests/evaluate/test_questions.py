"""Test rows as questions: prompts as generation and training have them, expected answers, choices."""

import json

import numpy as np
import pytest

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.chats.chat_encoder import ChatEncoder
from nalora_mlx.data.checks import read_rows, tokenize
from nalora_mlx.evaluate.questions import (
    default_max_tokens,
    draw_rows,
    expected_answers,
    read_questions,
    require_expected,
)
from nalora_mlx.models.conversation import render_prompt

PAIR = {"prompt": "what colour is the cat one ?", "completion": "the cat is red"}
CHAT = {
    "messages": [
        {"role": "user", "content": "what is one ?"},
        {"role": "assistant", "content": "the cat"},
        {"role": "user", "content": "what colour is the cat ?"},
        {"role": "assistant", "content": "the cat is blue"},
    ]
}
OPEN = {"messages": [{"role": "user", "content": "what is two ?"}]}
PREFERENCE = {"prompt": "what is the cat ?", "chosen": "the cat is red", "rejected": "the dog is blue"}


def write(directory, rows, name="test"):
    path = directory / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions_of(rows, tokenizer, directory, choices=None, notices=None, **settings):
    config = RunConfig(data=str(write(directory, rows)), test=True, **settings)
    data = read_rows(config, ["test"], unsplit="test")
    assert not data.problems
    encoder = ChatEncoder(tokenizer, True, True)
    found = [] if notices is None else notices
    return read_questions(data, "test", encoder, config, found.append, choices)


def test_prompts_are_those_of_generation(tokenizer, tmp_path):
    pair, chat, opened = questions_of([PAIR, CHAT, OPEN], tokenizer, tmp_path)
    assert pair.prompt == render_prompt(tokenizer, [{"role": "user", "content": PAIR["prompt"]}])
    assert chat.prompt == render_prompt(tokenizer, CHAT["messages"][:3])  # the last answer is asked for
    assert opened.prompt == render_prompt(tokenizer, OPEN["messages"])
    assert [question.expected for question in (pair, chat, opened)] == [
        "the cat is red",
        "the cat is blue",
        None,
    ]
    assert chat.text == "user: what is one ?\nassistant: the cat\nuser: what colour is the cat ?"
    assert pair.source.endswith("test.jsonl:1")
    assert pair.answer_tokens == len(tokenizer.encode("the cat is red")) + 1  # and the end token
    assert opened.answer_tokens == 0


def test_texts_ask_nothing_and_long_prompts_are_left_out(tokenizer, tmp_path):
    notices = []
    long = {"prompt": "the cat " * 40, "completion": "red"}
    found = questions_of([{"text": "the cat is red"}], tokenizer, tmp_path)
    assert found == []
    found = questions_of([PAIR, long], tokenizer, tmp_path, notices=notices, max_seq_length=30)
    assert len(found) == 1
    (notice,) = notices
    assert "test: 1 row left out of the answers" in notice
    assert "test.jsonl:2" in notice
    assert "--max-seq-length" in notice


def test_choices_are_encoded_as_training_encodes_answers(tokenizer, tmp_path):
    texts = ["the cat is red", "the cat is blue"]
    first, second = questions_of([PAIR, CHAT], tokenizer, tmp_path, choices=texts)
    assert (first.correct, second.correct) == (0, 1)
    for text, choice in zip(texts, first.choices, strict=True):
        config = RunConfig(
            data=str(write(tmp_path, [PAIR | {"completion": text}])), test=True, mask_prompt=True
        )
        (trained,) = tokenize(read_rows(config, ["test"], unsplit="test"), tokenizer, 2048)["test"].sequences
        assert np.array_equal(choice.tokens, trained.tokens)
        assert np.array_equal(choice.loss_mask, trained.loss_mask)


def test_the_different_answers_of_the_rows_are_the_choices(tokenizer, tmp_path):
    questions = questions_of([PAIR, CHAT, PAIR], tokenizer, tmp_path, choices=[])
    assert all(question.texts == ("the cat is red", "the cat is blue") for question in questions)
    assert [question.correct for question in questions] == [0, 1, 0]


def test_an_answer_outside_the_choices_is_named(tokenizer, tmp_path):
    with pytest.raises(
        InputError, match=r"test.jsonl:2: its answer is none of the choices; name all answers"
    ):
        questions_of([PAIR, CHAT], tokenizer, tmp_path, choices=["the cat is red", "no"])
    many = [PAIR | {"completion": f"the cat is {'red ' * n}"} for n in range(1, 60)]
    with pytest.raises(InputError, match="59 different answers, more than 50"):
        questions_of(many, tokenizer, tmp_path, choices=[])


def test_preference_rows_ask_for_the_chosen_answer(tokenizer, tmp_path):
    (question,) = questions_of([PREFERENCE], tokenizer, tmp_path, train_mode="dpo")
    assert question.expected == "the cat is red"
    assert question.texts == ("the cat is red", "the dog is blue")
    assert question.correct == 0
    assert question.prompt == render_prompt(tokenizer, [{"role": "user", "content": "what is the cat ?"}])
    assert len(question.choices) == 2


def test_preferences_part_at_any_answer(tokenizer, tmp_path):
    """The chats part at the first answer, and go on after it."""
    first, later = CHAT["messages"][:1], CHAT["messages"][2:]
    answers = [{"role": "assistant", "content": text} for text in ("the cat", "the dog")]
    row = {"chosen": [*first, answers[0], *later], "rejected": [*first, answers[1], *later]}
    (question,) = questions_of([row], tokenizer, tmp_path, train_mode="dpo")
    assert question.expected == "the cat"
    assert question.texts == ("the cat", "the dog")
    assert question.prompt == render_prompt(tokenizer, first)


def test_answers_that_are_not_trained_on_are_asked_for(tokenizer, tmp_path):
    messages = [*CHAT["messages"][:3], CHAT["messages"][3] | {"weight": 0}]
    (question,) = questions_of([{"messages": messages}], tokenizer, tmp_path)
    assert question.expected == "the cat is blue"
    assert question.prompt == render_prompt(tokenizer, messages[:3])


def test_bad_answers_of_kto_ask_nothing(tokenizer, tmp_path):
    rows = [PAIR | {"label": True}, PAIR | {"label": False, "completion": "the dog"}]
    found = questions_of(rows, tokenizer, tmp_path, train_mode="kto")
    assert [question.expected for question in found] == ["the cat is red"]


def test_rows_without_an_answer_are_named_if_a_metric_compares(tokenizer, tmp_path):
    questions = questions_of([PAIR, OPEN], tokenizer, tmp_path)
    require_expected(questions, [])
    with pytest.raises(InputError, match=r"test.jsonl:2: has no answer to compare with \(exact, f1\); add"):
        require_expected(questions, ["exact", "f1"])


def test_rows_are_drawn_by_seed_and_content(tmp_path):
    rows = [PAIR | {"prompt": f"what is {n} ?"} for n in range(20)]

    def drawn(rows, seed, samples=5):
        config = RunConfig(data=str(write(tmp_path, rows)), test=True)
        data = read_rows(config, ["test"], unsplit="test")
        assert draw_rows(data, "test", samples, seed) == 20
        return [row["messages"][0]["content"] for row in expected_answers(data, "test")]

    first = drawn(rows, 0)
    assert len(set(first)) == 5
    assert sorted(drawn(rows[::-1], 0)) == sorted(first)
    assert sorted(drawn(rows, 1)) != sorted(first)
    places = [int(text.split()[2]) for text in first]
    assert places == sorted(places)  # in the order of the file
    assert len(drawn(rows, 0, -1)) == len(drawn(rows, 0, 20)) == 20


def test_the_default_length_leaves_room(tokenizer, tmp_path):
    questions = questions_of([PAIR, CHAT], tokenizer, tmp_path)
    longest = max(question.answer_tokens for question in questions)
    assert default_max_tokens(questions) == longest + longest // 2 + 16
    assert default_max_tokens(questions_of([OPEN], tokenizer, tmp_path)) == 256
