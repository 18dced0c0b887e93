"""Answers in a report: cards and their differences, and those generated for runs that have none."""

import json
import re
import shutil

import mlx.core as mx
import pytest
from mlx_lm import generate
from mlx_lm.utils import load

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.files import adapter_config, adapter_weights
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.report.answers import cards, mark_differences, similarity, summary
from nalora_mlx.report.missing_answers import add_answers
from nalora_mlx.report.page import render_page
from nalora_mlx.report.run_data import read_runs
from tests.conftest import random_adapters
from tests.report.report_runs import sample, write_run

QUESTION, TEXT = "what colour is the cat one ?", "the dog is"
SLIP, WRONG = "ORDER: 1 x rye loaf\nNOTE: bill to the school", "ORDER: 8 x rye loaf\nNOTE: call when ready"


def shown(pieces):
    """Return pieces as one text with the differing parts in brackets."""
    return "".join(f"[{text}]" if differs else text for text, differs in pieces)


@pytest.mark.parametrize(
    ("expected", "answer", "left", "right"),
    [
        ("a b c", "a b c", "a b c", "a b c"),
        (
            SLIP,
            WRONG,
            "ORDER: [1] x rye loaf\nNOTE: [bill to the school]",
            "ORDER: [8] x rye loaf\nNOTE: [call when ready]",
        ),
        ("one two three", "seven, eight!", "one two three", "seven, eight!"),  # marking all helps nobody
        ("東京は晴れ", "東京は雨", "東京は[晴れ]", "東京は[雨]"),
        ("a b", "  a b\n", "a b", "a b"),
        ("a b c d", "a b c d e", "a b c d", "a b c d[ e]"),
    ],
)
def test_differences_are_marked(expected, answer, left, right):
    one, other = mark_differences(expected, answer)
    assert (shown(one), shown(other)) == (left, right)


def test_similarity_counts_common_words():
    assert similarity("a b c d", "a b c d") == 1
    assert similarity("a b c d", "a x c y") == 0.5
    assert similarity("", "a") == 0


def test_card_of_a_run(tmp_path):
    samples = [sample("q1", SLIP, "Hi", WRONG, complete=False), sample("q2", "same", "Hi", " same\n")]
    (run,) = read_runs([write_run(tmp_path / "a", samples=samples)])
    wrong, right = cards([run])
    assert [answer.who for answer in wrong.answers] == ["Before training", "After training"]
    assert [answer.same for answer in right.answers] == [False, True]
    assert (wrong.answers[1].cut, right.answers[1].cut) == (True, False)
    assert (wrong.all_same, right.all_same) == (False, True)
    assert shown(wrong.expected) == "ORDER: [1] x rye loaf\nNOTE: [bill to the school]"
    share = similarity(WRONG, SLIP)
    assert summary([run]).startswith("1 of 2 answers are word for word as expected; ")
    assert f"{(1 + share) / 2:.0%} of their words" in summary([run])
    html = render_page([run])
    assert "<mark>call when ready</mark>" in html
    assert html.count("as expected</b>") == 1
    assert html.count("<h4>Expected</h4>") == 1  # an answer as expected is not repeated
    assert html.count("(cut off here)") == 1


def test_card_without_expected_answer_or_base(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "a", samples=[sample("q", None, None, "<b>&")])])
    (card,) = cards([run])
    assert [(answer.who, answer.same) for answer in card.answers] == [("After training", False)]
    assert card.expected is None
    html = render_page([run])
    assert "&lt;b&gt;&amp;" in html
    assert "<b>&" not in html
    assert "Expected</h4>" not in html


def test_runs_answer_the_same_question_on_one_card(tmp_path):
    one = [sample("only one", "x", "b", "x"), sample("both", "y", "b", "y")]
    paths = [
        write_run(tmp_path / "a", samples=one),
        write_run(tmp_path / "b", samples=[sample("both", "y", "b", "z")]),
    ]
    runs = read_runs(paths)
    both, single = cards(runs)
    assert (both.prompt, single.prompt) == ("both", "only one")
    assert [(answer.who, answer.run, answer.same) for answer in both.answers] == [
        ("Before training", None, False),
        ("a", 0, True),
        ("b", 1, False),
    ]
    assert summary(runs) == "Answers that are word for word as expected: a 2 of 2, b 0 of 1."


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLv"
    "AAAAAElFTkSuQmCC"
)


def test_images_of_a_question_are_shown_with_it(tmp_path):
    """The same question about other images is another question. Nothing is loaded from elsewhere."""
    other = PIXEL.replace("png", "jpeg")
    samples = [
        sample("what?", None, "b", "a") | {"images": [PIXEL]},
        sample("what?", None, "b", "c") | {"images": [PIXEL, other]},
        sample("what?", None, "b", "d"),
    ]
    for count in (1, 2):
        paths = [write_run(tmp_path / f"{count}{i}", samples=samples) for i in range(count)]
        runs = read_runs(paths)
        assert [card.images for card in cards(runs)] == [[PIXEL], [PIXEL, other], []]
        assert [len(card.answers) for card in cards(runs)] == [1 + count] * 3
        html = render_page(runs)
        found = re.findall(r'<img src="([^"]*)" alt="([^"]*)">', html)
        assert found == [
            (PIXEL, "Image of question 1"),
            (PIXEL, "Image 1 of question 2"),
            (other, "Image 2 of question 2"),
        ]


def test_answers_survive_every_report(tmp_path):
    run = write_run(tmp_path / "a", samples=[sample("q", None, "before it", "after it")])
    for _ in range(2):
        from nalora_mlx.__main__ import main

        assert main(["report", str(run)]) == 0
        assert "after it" in (run / "report" / "report.html").read_text()
        shutil.rmtree(run / "report")


# --- answers for runs that have none -----------------------------------------------------------------


@pytest.fixture
def runs(model_directory, tmp_path):
    """Two runs with random adapters and prompts, without answers."""
    prompts = [{"messages": [{"role": "user", "content": QUESTION}]}, {"text": TEXT}]
    for seed in (1, 2):
        model, _ = load(str(model_directory))
        adapt(model, NALoRAConfig(rank=4, scale=4.0))
        random_adapters(model, seed, size=0.3)
        path = write_run(tmp_path / str(seed))
        mx.save_safetensors(str(path / "adapters.safetensors"), adapter_weights(model))
        (path / "adapter_config.json").write_text(json.dumps(adapter_config(model)))
        record = json.loads((path / "run.json").read_text())
        (path / "run.json").write_text(json.dumps({**record, "samples": prompts}))
    return [tmp_path / "1", tmp_path / "2"]


def test_added_answers_are_those_of_separately_loaded_models(model_directory, runs):
    notices = []
    add_answers(str(model_directory), read_runs(runs), notices.append)
    assert [notice.partition(":")[0] for notice in notices[1:]] == ["1", "2"]
    tokens = json.loads((runs[0] / "samples.json").read_text())["max_tokens"]
    texts = []
    for adapter in (None, *map(str, runs)):
        model, tokenizer = load(str(model_directory), adapter_path=adapter)
        message = {"role": "user", "content": QUESTION}
        chat = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
        texts.append([generate(model, tokenizer, p, max_tokens=tokens).strip() for p in (chat, TEXT)])
    for run, after in zip(read_runs(runs), texts[1:], strict=True):
        assert [each["prompt"] for each in run.samples] == [QUESTION, TEXT]
        assert [each["before"] for each in run.samples] == texts[0]
        assert [each["after"] for each in run.samples] == after
    assert len({tuple(each) for each in texts}) == 3


def test_existing_answers_are_kept(model_directory, runs):
    shutil.rmtree(runs[1])
    write_run(runs[1], samples=[sample("mine", None, None, "kept")])
    add_answers(str(model_directory), read_runs(runs), lambda _: None)
    first, second = read_runs(runs)
    assert len(first.samples) == 2
    assert [each["after"] for each in second.samples] == ["kept"]
    with pytest.raises(InputError, match="have answers already"):
        add_answers(str(model_directory), read_runs(runs))
    (runs[0] / "samples.json").unlink()
    (runs[0] / "run.json").unlink()
    with pytest.raises(InputError, match="has saved no prompts"):
        add_answers(str(model_directory), read_runs(runs))
