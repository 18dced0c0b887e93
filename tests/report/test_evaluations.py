"""The section of a report with the results of `nalora evaluate`."""

import json
import re
from html.parser import HTMLParser

import mlx.core as mx
import pytest

pytest.importorskip("plotly", reason="the extra report is not installed")

from nalora_mlx.report.evaluations import evaluation_sections
from nalora_mlx.report.page import render_page
from nalora_mlx.report.run_data import read_runs
from tests.report.report_evaluations import answer, evaluated_run, measure, measures, write_evaluations
from tests.report.report_runs import write_run


def section(html):
    """Return the HTML of the section; an empty text without it."""
    found = re.search(r'<section aria-labelledby="evaluation">.*?</section>', html, re.DOTALL)
    return found[0] if found else ""


class Tables(HTMLParser):
    """The tables of a page, each as rows of texts."""

    def __init__(self, html):
        super().__init__()
        self.tables = []
        self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.in_cell:
            self.tables[-1][-1][-1] += data


def test_a_run_without_evaluations_has_no_section(tmp_path):
    html = render_page(read_runs([write_run(tmp_path / "a")]))
    assert section(html) == ""
    assert 'href="#evaluation"' not in html


def test_the_table_of_a_result(tmp_path):
    run = evaluated_run(tmp_path / "run")
    html = render_page(read_runs([run]))
    assert html.count('href="#evaluation">Evaluation</a>') == 1
    (table,) = Tables(section(html)).tables
    assert table == [
        ["", "base", "tuned", "difference", "95 % interval", "verdict"],
        ["data, test: 14 rows"],
        ["loss", "2.310", "1.040", "-1.270", "-1.400 to -1.100", "better"],
        ["perplexity", "10.07", "2.829", "", "", ""],
        ["exact match", "7.0%", "64.0%", "+57.0", "+30.0 to +80.0", "better, McNemar p = 0.008"],
        ["token F1", "0.410", "0.440", "+0.030", "-0.100 to +0.100", "no difference can be told"],
        ["general text: 40 passages"],
        ["loss", "2.900", "3.150", "+0.250", "+0.200 to +0.300", "worse"],
        ["perplexity", "18.17", "23.34", "", "", ""],
        ["KL(base || tuned)", "-", "0.170", "", "", ""],
    ]
    assert re.findall(r'<td class="(\w+)">', section(html)) == ["better", "better", "worse"]
    assert "Forgetting" not in section(html)
    assert "<details" not in section(html)


def test_a_result_on_general_text_alone(tmp_path):
    run = evaluated_run(tmp_path / "run", data=None, measures=measures()[3:])
    (found,) = evaluation_sections(read_runs([run]))
    assert (found.title, [part.title for part in found.parts]) == (
        "run on general text and tasks",
        ["general text: 40 passages"],
    )


def test_several_results_of_a_run_have_different_titles(tmp_path):
    run = evaluated_run(tmp_path / "run", data="words", created="2026-03-03")
    write_evaluations(run, {"": "data"}, created="2026-03-02")
    (run / "best").mkdir()
    mx.save_safetensors(str(run / "best" / "adapters.safetensors"), {"a.lora_b": mx.ones((3, 3))})
    write_evaluations(run, {"best": "words"}, created="2026-03-01")
    html = section(render_page(read_runs([run])))
    assert re.findall(r"<h3>(.*?)</h3>", html) == [
        "run/best on words, test",
        "run on data, test",
        "run on words, test",
    ]
    labels = re.findall(r'aria-label="(.*?)"', html)
    assert len(set(labels)) == len(labels) == 3


def test_titles_follow_a_directory_that_was_renamed(tmp_path):
    evaluated_run(tmp_path / "run").rename(tmp_path / "new")
    (found,) = evaluation_sections(read_runs([tmp_path / "new"]))
    assert found.title == "new on data, test"


def test_a_warning_is_a_sentence(tmp_path):
    run = evaluated_run(tmp_path / "run", warning="the model lost 0.25 nats <b>")
    assert "<b>Forgetting.</b> The model lost 0.25 nats &lt;b&gt;.</li>" in section(
        render_page(read_runs([run]))
    )


# --- comparison of runs -------------------------------------------------------------------------------------


def test_runs_are_compared_on_what_they_were_both_measured_on(tmp_path):
    one, two = evaluated_run(tmp_path / "one"), tmp_path / "two"
    loss = measure("loss", (2.31, 2.2, 2.4), (1.5, 1.4, 1.6), (-0.81, -0.9, -0.7), "better")
    evaluated_run(two, measures=[loss, *measures()[3:]])
    write_evaluations(two, {"": "other"})
    runs = read_runs([one, two])
    compared, *others = evaluation_sections(runs)
    assert (compared.title, compared.run, compared.head) == ("All adapters", None, ["base", "one", "two"])
    assert [part.title for part in compared.parts] == ["data, test: 14 rows", "general text: 40 passages"]
    assert [(row.title, *row.cells) for row in compared.parts[0].rows] == [
        ("loss", "2.310", "1.040", "1.500"),
        ("perplexity", "10.07", "2.829", "4.482"),
        ("exact match", "7.0%", "64.0%", "-"),
        ("token F1", "0.410", "0.440", "-"),
    ]
    assert [(each.title, each.run) for each in others] == [
        ("one on data, test", 0),
        ("two on data, test", 1),
        ("two on other, test", 1),
    ]
    html = section(render_page(runs))
    assert html.index("All adapters") < html.index("one on data, test")
    assert re.findall(r"--run-(\d)", html) == ["0", "1", "1"]


@pytest.mark.parametrize(
    "changes", [{"data": "other"}, {"split": "valid"}, {"rows": 13}, {"model": "b"}, "base"]
)
def test_other_test_sets_are_not_compared(tmp_path, changes):
    if changes == "base":  # of one name, but not the same
        changes = {"measures": [measure("loss", (2.32, 2.2, 2.4), (1.5, 1.4, 1.6))]}
    else:
        changes = {"measures": measures()[:2], **changes}
    one = evaluated_run(tmp_path / "one", measures=measures()[:2])
    found = evaluation_sections(read_runs([one, evaluated_run(tmp_path / "two", **changes)]))
    assert [each.run for each in found] == [0, 1]


def test_a_run_is_not_compared_with_itself(tmp_path):
    run = evaluated_run(tmp_path / "one")
    (run / "best").mkdir()
    mx.save_safetensors(str(run / "best" / "adapters.safetensors"), {"a.lora_b": mx.ones((3, 3))})
    write_evaluations(run, {"best": "data"})
    found = evaluation_sections(read_runs([run, write_run(tmp_path / "two")]))
    assert [each.run for each in found] == [0, 0]


# --- answers ------------------------------------------------------------------------------------------------

ANSWERS = [
    answer("a <question>?", "<b>a</b> & b", "", "<b>a</b> & b"),
    answer("q " * 1000, "right", "y" * 1000, "right"),
    answer("third", "x", "  \n", "x", complete=False),
    answer("fourth", "x", "y", "x"),
    answer("fifth", "x", "x", "</script><script>alert(1)</script>"),
]
CHANGED = {"answers": ANSWERS, "metric": "exact", "changed": {"better": [3, 1, 0, 2], "worse": [4]}}


def test_answers_that_changed(tmp_path):
    (found,) = evaluation_sections(read_runs([evaluated_run(tmp_path / "run", **CHANGED)]))
    better, worse = found.changes
    assert better.title == "4 answers became better by exact match; here are 3"
    assert worse.title == "1 answer became worse by exact match"
    assert [question.prompt[:6] for question in better.questions] == [
        "fourth",
        "q q q ",
        "a <que",
    ]  # in their order
    assert [(text.who, text.text) for text in better.questions[0].texts] == [
        ("Base", "y"),
        ("Tuned", "x"),
        ("Expected", "x"),
    ]


def test_texts_of_answers_are_escaped_and_shortened(tmp_path):
    html = section(render_page(read_runs([evaluated_run(tmp_path / "run", **CHANGED)])))
    assert "&lt;b&gt;a&lt;/b&gt; &amp; b" in html
    assert "a &lt;question&gt;?" in html
    assert html.count("<script") == 0
    assert html.count("(an empty answer)") == 1
    assert "y" * 600 + " …" in html
    assert "y" * 601 not in html
    assert html.count("(shortened here)") == 1
    assert "q " * 310 not in html


def test_blank_and_cut_answers_say_so(tmp_path):
    changes = CHANGED | {"changed": {"better": [2], "worse": []}}
    html = section(render_page(read_runs([evaluated_run(tmp_path / "run", **changes)])))
    assert html.count("(an empty answer)") == 1
    assert html.count("(cut off at the maximum length)") == 1


def test_answers_without_an_expected_one(tmp_path):
    records = [answer("q", None, "a", "b"), answer("r", "", "a", "b")]
    changes = {"answers": records, "metric": "json", "changed": {"better": [0, 1], "worse": []}}
    (found,) = evaluation_sections(read_runs([evaluated_run(tmp_path / "run", **changes)]))
    (better,) = found.changes
    assert better.title == "2 answers became better by json"
    assert [[text.who for text in question.texts] for question in better.questions] == [
        ["Base", "Tuned"],
        ["Base", "Tuned", "Expected"],
    ]


def test_choices_that_changed(tmp_path):
    asked = [{"source": f"test.jsonl:{i}", "prompt": f"q{i}", "expected": "yes"} for i in range(5)]
    run = evaluated_run(tmp_path / "run", changed_choices={"better": asked[:1], "worse": asked[1:]})
    (found,) = evaluation_sections(read_runs([run]))
    right, wrong = found.changes
    assert right.title == "1 most likely choice became right"
    assert wrong.title == "4 most likely choices became wrong; here are 3"
    assert (wrong.questions[0].source, wrong.questions[0].prompt) == ("test.jsonl:1", "q1")
    assert [text.who for text in right.questions[0].texts] == ["Expected"]


def test_ids_are_unique(tmp_path):
    run = evaluated_run(tmp_path / "run", **CHANGED)
    write_evaluations(run, {"": "other"}, **CHANGED)
    html = render_page(read_runs([run]))
    ids = re.findall(r'\bid="(.*?)"', section(html))
    assert len(set(ids)) == len(ids) == 5


def test_a_real_result(model_directory, data_directory, tmp_path):
    """The report shows the numbers that the command wrote."""
    from nalora_mlx.__main__ import main

    run, where = tmp_path / "run", ["--model", str(model_directory), "--data", str(data_directory)]
    train = "--iters 2 --batch-size 2 --num-layers 1 --rank 2 --no-samples --steps-per-eval 2"
    (tmp_path / "general.txt").write_text("the cat is one . the dog is two .")
    general = ["--general", str(tmp_path / "general.txt")]
    assert main(["lora", "--train", *where, "--adapter-path", str(run), *train.split()]) == 0
    assert main(["evaluate", *where, "--adapter-path", str(run), "--choices", *general]) == 0
    (path,) = (run / "evaluations").iterdir()
    measured = {entry["name"]: entry for entry in json.loads(path.read_text())["adapters"][0]["measures"]}
    html = section(render_page(read_runs([run])))
    rows = {row[0]: row for row in Tables(html).tables[0][:5]}
    assert rows["loss"][1:3] == [f"{measured['loss'][name][0]:.3f}" for name in ("base", "tuned")]
    assert {"exact match", "most likely choice", "KL(base || tuned)"} <= {
        row[0] for row in Tables(html).tables[0]
    }
