"""Metrics of answers: values against hand-made tables and other implementations; metrics of the user; general text."""

# ruff: noqa: RUF001

import ast
import itertools
import json
import re
import string
import sys
import timeit
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nalora_mlx.evaluate
from nalora_mlx.core.errors import InputError
from nalora_mlx.evaluate.last_number import last_number
from nalora_mlx.evaluate.metrics import (
    BUILT_IN,
    MetricError,
    choose_metrics,
    default_metrics,
    regex_metric,
    schema_metric,
)
from nalora_mlx.evaluate.user_metrics import check, load_user_metric

ROW = {"source": "test.jsonl:3"}
GENERAL = Path(nalora_mlx.evaluate.__file__).with_name("general.jsonl")


def score(name, answer, expected):
    return BUILT_IN[name].score(answer, expected, ROW)


# --- texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected", "exact", "normalized", "contains", "f1"),
    [
        ("Paris", "Paris", 1, 1, 1, 1),
        (" Paris\n", "Paris", 1, 1, 1, 1),
        ("paris.", "Paris", 0, 1, 1, 1),
        ("It is Paris.", "Paris", 0, 0, 1, 0.5),
        ("It is Paris\u2014the capital", "Paris", 0, 0, 1, 0.4),
        ("Parisian", "Paris", 0, 0, 0, 0),
        ("The Eiffel Tower", "Eiffel Tower", 0, 1, 1, 1),
        ("a  b\tc", "b c", 0, 1, 1, 1),
        ("3.5", "5", 0, 0, 0, 0),
        ("142", "42", 0, 0, 0, 0),
        ("x x y", "x y y", 0, 0, 0, 2 / 3),  # a bag of words: each counts as often as in both
        ("", "", 1, 1, 1, 1),
        ("", "Paris", 0, 0, 0, 0),
        ("Paris", "", 0, 0, 0, 0),
        ("the", "", 0, 0, 0, 0),
        # Nothing but articles or punctuation is still an answer.
        ("A", "A", 1, 1, 1, 1),
        ("a.", "A", 0, 1, 1, 1),
        ("B", "A", 0, 0, 0, 0),
        ("The", "A", 0, 0, 0, 0),
        ("Answer: A", "A", 0, 0, 1, 2 / 3),
        ("+", "-", 0, 0, 0, 0),
        ("+", "+", 1, 1, 1, 1),
        # Case, compatibility and composition in other scripts.
        ("STRASSE", "Straße", 0, 1, 1, 1),
        ("ΣΟΦΟΣ", "σοφός", 0, 0, 0, 0),
        ("ΟΔΟΣ", "οδος", 0, 1, 1, 1),
        ("МОСКВА!", "Москва", 0, 1, 1, 1),
        ("Cafe\u0301", "café", 0, 1, 1, 1),
        ("\uff21\uff22\uff11", "ab1", 0, 1, 1, 1),
        ("50 \u3390", "50 hz", 0, 1, 1, 1),  # one character for Hz
        ("«oui»", "oui", 0, 1, 1, 1),
        ("¿Qué?", "qué", 0, 1, 1, 1),
        ("في باريس", "باريس", 0, 0, 1, 2 / 3),
        ("नई दिल्ली।", "दिल्ली", 0, 0, 1, 2 / 3),
        ("می\u200cخواهم", "میخواهم", 0, 1, 1, 1),  # an invisible joiner
        ("co\u00adoperate", "cooperate", 0, 1, 1, 1),
        ("5 €", "5 £", 0, 0, 0, 0.5),
        ("👍", "👎", 0, 0, 0, 0),
        # Scripts without spaces.
        ("首都は東京です。", "東京", 0, 0, 1, 4 / 9),
        ("京东", "東京", 0, 0, 0, 0.5),
        ("กรุงเทพ มหานคร", "กรุงเทพมหานคร", 0, 1, 1, 1),
        ("東京2020大会", "2020", 0, 0, 1, 1 / 3),
        ("서울은 수도다", "서울", 0, 0, 0, 0),
    ],
)
def test_values_of_texts(answer, expected, exact, normalized, contains, f1):
    names = ("exact", "normalized", "contains", "f1")
    values = [score(name, answer, expected) for name in names]
    assert values == pytest.approx([exact, normalized, contains, f1])
    assert all(isinstance(value, float) for value in values)


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("the cat sat", "the cat sat", 1),
        ("THE CAT", "the cat", 1),
        ("a b c d", "a c b d", 0.75),
        ("b a", "a b", 0.5),
        ("a b", "c d", 0),
        ("snake_case", "snake case", 1),
        ("", "", 1),
        ("!", "!", 1),
        ("!", "?", 0),
        ("", "a", 0),
        ("Ça va bien", "ça va mal", 2 / 3),
        ("東京は晴れ", "東京は雨", 2 * 3 / 9),
        ("नई दिल्ली", "दिल्ली", 2 / 3),
        ("привет, мир", "Привет мир", 1),
    ],
)
def test_values_of_rouge_l(answer, expected, value):
    assert score("rouge-l", answer, expected) == pytest.approx(value)


PRINTABLE = st.text(st.sampled_from("aAbB theTHE1.5-_'!?+$\n"), max_size=40)


def squad_f1(answer, expected):
    """Return SQuAD's token F1, by removing every common word once; None where a text has no words."""
    sides = []
    for text in (answer, expected):
        kept = "".join(c for c in text.lower() if c not in string.punctuation)
        sides.append(re.sub(r"\b(a|an|the)\b", " ", kept).split())
    words, left = sides[0], [*sides[1]]
    if not words or not left:
        return None
    common = 0
    for word in words:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(sides[1])
    return 2 * precision * recall / (precision + recall)


@given(PRINTABLE, PRINTABLE)
def test_f1_is_that_of_squad(answer, expected):
    value = squad_f1(answer, expected)
    if value is not None:
        assert score("f1", answer, expected) == pytest.approx(value)


def lcs_by_table(one, other):
    lengths = [0] * (len(other) + 1)
    for word in one:
        above = lengths[:]
        for j, candidate in enumerate(other):
            lengths[j + 1] = above[j] + 1 if word == candidate else max(above[j + 1], lengths[j])
    return lengths[-1]


@given(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=80),
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=80),
)
def test_rouge_l_counts_the_longest_common_subsequence(one, other):
    expected = 2 * lcs_by_table(one, other) / (len(one) + len(other))
    assert score("rouge-l", " ".join(one), " ".join(other)) == pytest.approx(expected)


def test_rouge_l_of_long_answers_is_fast():
    one, other = (" ".join(str(i * step % 499) for i in range(2000)) for step in (7, 11))
    assert min(timeit.repeat(lambda: score("rouge-l", one, other), number=1, repeat=3)) < 0.1


def test_rouge_l_is_that_of_the_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)

    @given(st.text(st.characters(max_codepoint=127), max_size=60) | PRINTABLE, PRINTABLE)
    def same(answer, expected):
        if re.search("[a-zA-Z0-9]", answer + expected):  # the package gives 0 for two texts without words
            package = scorer.score(expected, answer)["rougeL"].fmeasure
            assert score("rouge-l", answer, expected) == pytest.approx(package)

    same()
    passages = [json.loads(line)["text"] for line in GENERAL.read_text("utf-8").splitlines()]
    for answer, expected in itertools.pairwise(passages):
        if (answer + expected).isascii():
            package = scorer.score(expected, answer)["rougeL"].fmeasure
            assert score("rouge-l", answer, expected) == pytest.approx(package)


ANY_TEXT = (
    st.text(max_size=30) | PRINTABLE | st.text(st.sampled_from("東京はกthe -+.é\u0301\u200d😀"), max_size=20)
)
TEXT_METRICS = ("exact", "normalized", "contains", "f1", "rouge-l")


@settings(max_examples=300)
@given(ANY_TEXT, ANY_TEXT)
def test_properties_of_texts(answer, expected):
    values = {name: score(name, answer, expected) for name in TEXT_METRICS}
    assert all(0 <= value <= 1 for value in values.values())
    for name in ("exact", "normalized", "f1", "rouge-l"):
        assert values[name] == score(name, expected, answer)
    if values["exact"]:
        assert set(values.values()) == {1}
    if values["normalized"]:
        assert values["contains"] == values["f1"] == 1
    assert {score(name, answer, f" {answer}\n") for name in TEXT_METRICS} == {1}


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("The answer is 42.", 42),
        ("First 7, then 42!", 42),
        ("**42**", 42),
        ("x = -5", -5),
        ("\u22125 or \u2013", -5),
        ("+5", 5),
        ("10-5", 5),
        ("7 - 5", 5),
        ("pages 3\u20135", 5),
        ("covid-19", 19),
        ("1,234,567", 1234567),
        ("12,34,567 rupees", 1234567),
        ("1 234 567", 1234567),
        ("1\u202f234", 1234),
        ("1'234'567.5", 1234567.5),
        ("1\u2019234", 1234),
        ("1.234.567,89", 1234567.89),
        ("1.234.567", 1234567),
        ("1.234", 1.234),
        ("3,14", 3.14),
        ("0,125", 0.125),
        (".5", 0.5),
        ("1, 2, 3", 3),
        ("50%", 50),
        ("-$5.20", -5.2),
        ("$-5", -5),
        ("\\$1,234.50", 1234.5),
        ("5 €", 5),
        ("1.5e-3", 0.0015),
        ("1.5 × 10⁶", 1.5e6),
        (r"2\times10^{-3}", 0.002),
        ("10^6", 1e6),
        ("2**10", 1024),
        ("3/4", 0.75),
        ("-1/2", -0.5),
        ("1 1/2 cups", 1.5),
        ("3½", 3.5),
        (r"\frac{3}{4}", 0.75),
        (r"\boxed{-\dfrac{1}{2}}", -0.5),
        ("12/25/2024", 2024),
        ("٤٢", 42),
        ("४२.५", 42.5),
        ("\uff0d\uff14\uff12\uff0e\uff15\uff05", -42.5),
        ("答えは-42です", -42),
        ("답은42입니다", 42),
        ("42 kg of CO2", 42),
        ("42 m^2", 42),
        ("42 m²", 42),
        (r"42 \text{ cm}^{2}", 42),
        ("let x_1 be 9", 9),
        ("#### 42\nThat is 7 more.", 42),
        ("#### $1,000", 1000),
        ("#### 1. First\nso it is 9", 9),
        ("#### 12. Next\nso it is 9", 9),
        ("#### Result\nso it is 9", 9),
        (r"\boxed{42} of 50", 42),
        (r"\boxed{1} or \boxed{42\text{ of }50}, not 3", 50),
        (r"\boxed{x}, so 9", 9),
        (r"\boxed{8} #### 9", 9),
        (r"1{,}234\,567", 1234567),
        ("no number", None),
        ("CO2 and x_1", None),
        ("1e999", None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_last_number(text, value):
    assert last_number(text) == (None if value is None else pytest.approx(value, rel=1e-12))


@given(st.integers(-(10**12), 10**12), st.sampled_from([",", " ", "'", "\u202f"]))
def test_whole_numbers_are_read_in_any_grouping(number, separator):
    assert last_number(f"so it is {number:,}.".replace(",", separator)) == number


@given(st.floats(-1e12, 1e12))
def test_floats_are_read(number):
    for text in (repr(number), f"{number:.17e}"):
        assert last_number(text) == number


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("It costs $1,234.", "1234", 1),
        ("42.0", "#### 42", 1),
        ("0.5", "1/2", 1),
        ("0.33333333", "1/3", 1),
        ("0.333", "1/3", 0),
        ("1000001", "1000000", 0),  # whole numbers are equal or not
        ("3.1415927", "3.1415926", 1),
        ("-5", "5", 0),
        ("0", "-0", 1),
        ("nothing", "0", 0),
        ("", "0", 0),
    ],
)
def test_equal_numbers(answer, expected, value):
    assert score("number", answer, expected) == value


def test_expected_answer_without_a_number():
    with pytest.raises(MetricError, match=r"^test\.jsonl:3: the expected answer 'none' has no number"):
        score("number", "42", "none")
    with pytest.raises(InputError, match=r"^the expected answer 'x{37}\.\.\.' has"):
        BUILT_IN["number"].score("42", "x" * 90, {})


# --- forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ('{"a": [1, null, true]}', 1),
        ("3", 1),
        ('```json\n{"a": 1}\n```', 1),
        ('\n```\n{"a": 1}\n```\n', 1),
        ('```JSON\n{"a":\n 1}```', 1),
        ('```python\n{"a": 1}\n```', 0),
        ('Here: {"a": 1}', 0),
        ('```json\n{"a": 1}\n```\nDone.', 0),
        ("```json\n1\n```\n```json\n2\n```", 0),
        ("{'a': 1}", 0),
        ('{"a": 1,}', 0),
        ('{"a": NaN}', 0),
        ('{"a": 1} {"b": 2}', 0),
        ("[" * 100_000, 0),
        ("", 0),
    ],
)
def test_json(answer, value):
    assert score("json", answer, "") == value


def test_regex():
    metric = regex_metric(r"(yes|no)(, \w+)?")
    assert (metric.name, metric.is_binary, metric.needs_expected) == ("regex", True, False)
    answers = (" yes\n", "no, thanks", "yes!", "", "oh yes")
    assert [metric.score(answer, "", {}) for answer in answers] == [1, 1, 0, 0, 0]
    assert regex_metric("").score(" ", "", {}) == 1


@pytest.mark.parametrize(
    ("pattern", "problem"), [("a(b", "at character 2"), ("*", "at character 1"), ("a{9999999999999}", "")]
)
def test_wrong_regex(pattern, problem):
    with pytest.raises(
        InputError, match=re.escape(repr(pattern)) + f" is no regular expression: .*{problem}$"
    ):
        regex_metric(pattern)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"$ref": "#/$defs/word"}, "size": {"enum": ["S", "M"]}},
    "required": ["name"],
    "$defs": {"word": {"type": "string", "pattern": "^[a-z]+$"}},
}


def schema_file(folder, schema):
    path = folder / "schema.json"
    path.write_text(schema if isinstance(schema, str) else json.dumps(schema))
    return path


def test_schema(tmp_path):
    pytest.importorskip("jsonschema")
    metric = schema_metric(schema_file(tmp_path, SCHEMA))
    assert (metric.name, metric.is_binary, metric.needs_expected) == ("json-schema", True, False)
    answers = {
        '{"name": "bo"}': 1,
        '```json\n{"name": "bo", "size": "M"}\n```': 1,
        '{"name": "Bo"}': 0,
        '{"name": "bo", "size": "L"}': 0,
        '{"size": "S"}': 0,
        "[]": 0,
        "bo": 0,
        "": 0,
    }
    assert {answer: metric.score(answer, "", ROW) for answer in answers} == answers


def test_schema_chooses_the_draft(tmp_path):
    pytest.importorskip("jsonschema")
    # Draft 4 has a boolean exclusiveMaximum, newer ones a number.
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 5, "exclusiveMaximum": True}
    metric = schema_metric(schema_file(tmp_path, old))
    assert [metric.score(answer, "", ROW) for answer in ("4", "5")] == [1, 0]
    with pytest.raises(InputError, match=r"schema\.json: no valid JSON schema at exclusiveMaximum: "):
        schema_metric(schema_file(tmp_path, {"exclusiveMaximum": True}))
    # The references of a part with an address of its own are relative to it.
    parts = {
        "b": {"$id": "https://example.com/in/b", "$ref": "c"},
        "c": {"$id": "https://example.com/in/c", "type": "null"},
    }
    nested = schema_metric(
        schema_file(tmp_path, {"$id": "https://example.com/a", "$ref": "in/b", "$defs": parts})
    )
    assert [nested.score(answer, "", ROW) for answer in ("null", "5")] == [1, 0]
    drafts = schema_metric(schema_file(tmp_path, {"$ref": "https://json-schema.org/draft/2020-12/schema"}))
    assert [drafts.score(answer, "", ROW) for answer in ('{"type": "array"}', '{"type": 3}')] == [1, 0]


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "objekt"}, "no valid JSON schema at type: 'objekt'"),
        ({"properties": {"a": {"pattern": "("}}}, "no valid JSON schema at properties/a/pattern: "),
        ("{", "not JSON"),
        ("[]", "is an object, not list"),
        ({"$schema": "https://example.com/mine"}, "is no draft of JSON Schema"),
        ({"$schema": 7}, "is no draft of JSON Schema"),
        (
            {"items": {"$ref": "https://example.com/x.json"}},
            "refers to 'https://example.com/x.json', which is not in this",
        ),
        ({"items": {"$ref": "#/$defs/none"}}, "refers to '/\\$defs/none'|refers to '#/\\$defs/none'"),
    ],
)
def test_wrong_schema(tmp_path, schema, problem):
    pytest.importorskip("jsonschema")
    with pytest.raises(InputError, match=problem) as error:
        schema_metric(schema_file(tmp_path, schema))
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_schema_that_cannot_be_used(tmp_path, monkeypatch):
    pytest.importorskip("jsonschema")
    with pytest.raises(InputError, match=r"none\.json: cannot be read as a JSON schema \(No such file"):
        schema_metric(tmp_path / "none.json")
    endless = schema_metric(schema_file(tmp_path, {"$ref": "#"}))
    with pytest.raises(InputError, match="leads back to itself"):
        endless.score("1", "", ROW)
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(InputError, match=r"^checking a JSON schema needs jsonschema; .*\[eval\]"):
        schema_metric(tmp_path / "none.json")


# --- choice -------------------------------------------------------------------------------------------------


def test_names_of_metrics():
    assert [metric.name for metric in choose_metrics(["f1", "exact", "f1"])] == ["f1", "exact"]
    assert all(metric.name == name for name, metric in BUILT_IN.items())
    assert len({metric.title for metric in BUILT_IN.values()}) == len(BUILT_IN)
    with pytest.raises(InputError, match="'rouge' is no metric; did you mean 'rouge-l'") as error:
        choose_metrics(["exact", "rouge", "ROUGE_L", "bleu"])
    assert "'ROUGE_L' is no metric; did you mean 'rouge-l'" in str(error.value)
    assert "'bleu' is no metric; known names: contains, exact, f1," in str(error.value)


LONG = "a sentence of more than five words"


@pytest.mark.parametrize(
    ("expected", "names"),
    [
        ([], []),
        ([LONG], ["exact", "f1", "rouge-l"]),
        (["Paris", "the Eiffel Tower"], ["exact", "f1", "rouge-l", "contains"]),
        (["one two three four five"], ["exact", "f1", "rouge-l", "contains"]),
        (["Paris", LONG], ["exact", "f1", "rouge-l"]),
        ([""], ["exact", "f1", "rouge-l", "contains"]),
        (["42", "-1,200.5", "$3", "7%"], ["number", "exact", "f1", "rouge-l", "contains"]),
        (["42", "forty"], ["exact", "f1", "rouge-l", "contains"]),
        (["42 apples"], ["exact", "f1", "rouge-l", "contains"]),
        ([f"{LONG}\n#### 42"], ["number", "exact", "f1", "rouge-l"]),
        ([f"#### {LONG}"], ["exact", "f1", "rouge-l"]),
        (['{"a": "one two three four five"}', "[1, 2]"], ["json", "exact", "f1", "rouge-l"]),
        (['{"a": 1}', LONG], ["exact", "f1", "rouge-l"]),
        (['"text"'], ["exact", "f1", "rouge-l", "contains"]),
    ],
)
def test_default_metrics(expected, names):
    assert default_metrics(expected) == names
    if expected:
        rows = [{"source": "x:1", "expected": text} for text in expected]
        for metric in choose_metrics(names):
            check(metric, rows)  # numbers are there


# --- metrics of the user ------------------------------------------------------------------------------------


def user_metric(folder, source, name="score"):
    (folder / "mine.py").write_text(source)
    return load_user_metric(f"{folder}/mine.py:{name}")


@pytest.mark.parametrize(
    ("source", "value", "is_binary"),
    [
        ("def score(answer, expected): return len(answer)", 3, False),
        ("def score(answer, expected): return answer == expected", 0, False),
        ("def score(answer, expected) -> bool: return answer != expected", 1, True),
        ("from __future__ import annotations\ndef score(a, b) -> bool: return True", 1, True),
        ("def score(answer, expected, row): return len(row['messages'])", 2, False),
        ("def score(answer, expected, line): return len(line['messages'])", 2, False),
        ("def score(answer, expected, row=None): return len(row['messages'])", 2, False),
        ("def score(answer, expected, factor=4): return factor", 4, False),
        ("def score(answer, expected, /, *, factor=4): return factor", 4, False),
        ("def score(*args): return len(args)", 2, False),
        ("score = lambda one, other: 0.25", 0.25, False),
        ("class Score:\n def __call__(self, a, b): return 7\nscore = Score()", 7, False),
        ("import numpy as np\ndef score(a, b): return np.float32(0.5)", 0.5, False),
        ("import numpy as np\ndef score(a, b): return np.bool_(True)", 1, False),
        (
            "from dataclasses import dataclass\n@dataclass\nclass C:\n x: 'int' = 2\ndef score(a, b): return C().x",
            2,
            False,
        ),
    ],
)
def test_user_metric(tmp_path, source, value, is_binary):
    metric = user_metric(tmp_path, source)
    result = metric.score("abc", "x", ROW | {"messages": [1, 2]})
    assert (result, type(result)) == (value, float)
    assert metric.is_binary == is_binary
    assert metric.needs_expected
    assert metric.name == f"{tmp_path}/mine.py:score"
    assert metric.title == "score"


def test_user_metric_imports_its_neighbours_and_leaves_no_traces(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_metric.py").write_text("FACTOR = 3")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = [*sys.path]
    metric = user_metric(tmp_path, "from neighbour_of_metric import FACTOR\ndef score(a, b): return FACTOR")
    del sys.modules["neighbour_of_metric"]
    assert metric.score("", "", {}) == 3
    assert (sys.path, sys.dont_write_bytecode) == (path, False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.py", "neighbour_of_metric.py"]
    # A second file of the same name, and one named like a known module, are modules of their own.
    (tmp_path / "json.py").write_text("def score(a, b): return 5")
    assert load_user_metric(f"{tmp_path}/json.py:score").score("", "", {}) == 5
    assert user_metric(tmp_path, "def score(a, b): return 4").score("", "", {}) == 4
    assert metric.score("", "", {}) == 3
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("source", "name", "problem"),
    [
        ("def score(a, b):\n  return (", "score", r"mine\.py: line 2: not Python: "),
        ("x = '\0'", "score", r"mine\.py: not Python: |mine\.py: line 1: not Python: "),
        (
            "x = 1\nimport no_such_module",
            "score",
            r"importing it raises ModuleNotFoundError: No module .* \(line 2\)",
        ),
        ("import sys\nsys.exit(3)", "score", r"mine\.py: importing it raises SystemExit: 3 \(line 2\)"),
        ("def score(a, b): return 1", "scor", r"mine\.py: has no function 'scor'; did you mean 'score'\?"),
        ("from os.path import join\ndef mine(a, b): return 1", "scor", "'scor'; known names: mine$"),
        ("", "score", "has no function 'score'; it defines no function"),
        (
            "score = 3\ndef scored(a, b): return 1",
            "score",
            "'score' is no function but int; did you mean 'scored'",
        ),
        (
            "def score(answer): return 1",
            "score",
            r"score: takes \(answer\); it must take \(answer, expected\) or",
        ),
        ("def score(a, b, c, d): return 1", "score", r"takes \(a, b, c, d\)"),
        ("def score(a, b, *, c): return 1", "score", r"takes \(a, b, c\)"),
        ("def score(): return 1", "score", r"takes \(\)"),
    ],
)
def test_user_metric_that_cannot_be_loaded(tmp_path, source, name, problem):
    path, modules = [*sys.path], {*sys.modules}
    with pytest.raises(InputError, match=problem) as error:
        user_metric(tmp_path, source, name)
    assert str(tmp_path / "mine.py") in str(error.value)
    assert "\n" not in str(error.value)
    assert sys.path == path
    assert all(
        not m.startswith("nalora_user") or "importing" not in problem for m in {*sys.modules} - modules
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("score", "'score' is no metric of your own; write FILE.py:FUNCTION"),
        ("mine.py", "write FILE.py:FUNCTION"),
        ("mine.py:", "write FILE.py:FUNCTION"),
        (":score", "write FILE.py:FUNCTION"),
        ("mine.py:a.b", "write FILE.py:FUNCTION"),
        ("mine.txt:score", "mine.txt: a metric of your own is in a Python file"),
        ("none.py:score", r"none\.py: cannot be read as a file of metrics \(No such file"),
        ("folder.py:score", r"folder\.py: cannot be read as a file of metrics \(Is a directory"),
    ],
)
def test_wrong_names_of_user_metrics(tmp_path, monkeypatch, text, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(InputError, match=problem):
        load_user_metric(text)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def score(a, b):\n\n  return 1 / 0", r"raises ZeroDivisionError: division by zero \(line 3\)"),
        ("import json\ndef score(a, b):\n  return json.loads(a)", r"raises JSONDecodeError: .* \(line 3\)"),
        ("def score(a, b):\n  raise KeyError", r"raises KeyError \(line 2\)"),
        ("def score(a, b):\n  raise SystemExit", r"raises SystemExit \(line 2\)"),
        ("def score(a, b): raise ValueError('one\\ntwo')", r"raises ValueError: one \(line 1\)"),
        ("def score(a, b): return None", "returns NoneType, not a number"),
        ("def score(a, b): return '0.5'", "returns str, not a number"),
        ("def score(a, b): return [1]", "returns list, not a number"),
        ("def score(a, b): return 1j", "returns complex, not a number"),
        ("def score(a, b): return float('nan')", "returns nan, which has no mean"),
        ("def score(a, b): return float('inf')", "returns inf, which has no mean"),
    ],
)
def test_user_metric_that_fails_on_a_row(tmp_path, source, problem):
    metric = user_metric(tmp_path, source)
    with pytest.raises(MetricError, match=rf"mine\.py:score on test\.jsonl:3: {problem}") as error:
        check(metric, [{"source": "test.jsonl:2"}, ROW | {"expected": "text"}])
    assert "\n" not in str(error.value)
    with pytest.raises(MetricError, match=rf"mine\.py:score: {problem}"):
        metric.score("text", "text", {})


def test_check_computes_expected_answers(tmp_path):
    metric = user_metric(
        tmp_path, "seen = []\ndef score(a, b, row): seen.append((a, b, row['n'])); return len(seen)"
    )
    check(metric, [{"expected": "x", "n": 1}, {"expected": None, "n": 2}, {"expected": "", "n": 3}])
    assert metric.score("y", "z", {"n": 4}) == 3
    with pytest.raises(InputError, match="b:2: the expected answer 'x' has no number"):
        check(BUILT_IN["number"], [{"source": "a:1", "expected": "1"}, {"source": "b:2", "expected": "x"}])


# --- general text -------------------------------------------------------------------------------------------


def test_general_text():
    data = GENERAL.read_bytes()
    assert data.endswith(b"}\n")
    rows = [json.loads(line) for line in data.decode("utf-8").splitlines()]
    assert all(set(row) == {"kind", "text"} for row in rows)
    texts = {row["kind"]: row["text"] for row in rows}
    assert 34 <= len(texts) == len(rows) == len({text.strip().casefold() for text in texts.values()}) <= 40
    for kind, text in texts.items():
        assert text.strip() == text.rstrip("\n"), kind
        assert "\ufffd" not in text
        assert 140 <= len(text.encode()) <= 560, kind
        sentences = [s for s in re.split(r"[.!?\n。]+\s*", text) if len(s) > 25]
        assert len(sentences) == len(set(sentences)), kind
    words = sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in texts.values())
    assert 2800 <= words <= 3600
    languages = ("german", "french", "spanish", "italian", "portuguese", "russian", "chinese", "japanese")
    assert set(languages) < set(texts)


def test_code_and_data_of_the_general_text():
    texts = {row["kind"]: row["text"] for row in map(json.loads, GENERAL.read_text("utf-8").splitlines())}
    names: dict = {}
    ast.parse(texts["python"])
    exec(compile(texts["python"], "passage", "exec"), names)
    assert names["merge_intervals"]([(5, 8), (1, 3), (2, 4)]) == [(1, 4), (5, 8)]
    order = json.loads(texts["json"])
    assert order["total"] == sum(item["quantity"] * item["price"] for item in order["items"])
    assert len({line.count(",") for line in texts["csv"].split()}) == 1
    for left, right in re.findall(r"^(\d+ [×−] \d+) = (?:.*= )?(\d+)$", texts["arithmetic"], re.MULTILINE):
        assert eval(left.replace("×", "*").replace("−", "-")) == int(right)
    assert Counter(texts["c"])["{"] == Counter(texts["c"])["}"]
