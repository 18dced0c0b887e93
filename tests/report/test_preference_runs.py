"""Reports of preference runs: the accuracy decides, and their measures, settings and failures are shown."""

import json

import numpy as np
import pytest

from nalora_mlx.report.formatting import format_share
from tests.report.report_runs import preference_measures, write_preference_run, write_run

pytest.importorskip("matplotlib", reason="the extra report is not installed")
pytest.importorskip("plotly", reason="the extra report is not installed")

from nalora_mlx.report import result, tables
from nalora_mlx.report.advice import advise
from nalora_mlx.report.chart_data import chart_data
from nalora_mlx.report.page import render_page
from nalora_mlx.report.plots import draw_plots
from nalora_mlx.report.preferences import caption, preference_charts
from nalora_mlx.report.run_data import read_run, read_runs
from nalora_mlx.runs.metrics import METRICS_FILE
from tests.report.test_result import draw


@pytest.fixture
def made(tmp_path):
    """Return a function that writes and reads a preference run."""

    def make(accuracies, losses=None, name="a", **more):
        return read_run(write_preference_run(tmp_path / name, accuracies, losses, **more), name)

    return make


def titles(run):
    return [(advice.level, advice.title) for advice in advise(run)]


# --- result ------------------------------------------------------------------------------------------


def test_shares_are_formatted_for_people():
    shares = (0.0, 0.001, 0.5, 0.974, 0.996, 1.0)
    assert list(map(format_share, shares)) == ["0%", "0.1%", "50%", "97%", "99.6%", "100%"]


def test_the_headline_is_the_accuracy_before_and_at_its_best(made):
    run = made([0.5, 0.9, 0.8], [0.7, 0.4, 0.3])
    assert run.best_validation == (20, 0.4)
    found = result.headline(run)
    assert (found.name, found.text) == ("Validation accuracy", "50% → 90%")
    assert found.words == (
        "Share of 40 pairs kept out of training in which the model prefers the chosen answer, at iteration 20."
    )
    assert found.detail.startswith(
        "Validation loss from 0.7 to 0.4. Before training, the accuracy is one half by def"
    )
    assert "erplexity" not in found.detail


def test_among_equal_accuracies_the_loss_decides(made):
    assert made([0.5, 0.9, 0.9, 0.9], [0.7, 0.4, 0.3, 0.35]).best_validation == (27, 0.3)


def test_headlines_of_other_objectives_and_runs(made):
    kto = result.headline(made([0.5, 0.9], name="kto", mode="kto"))
    assert kto.words == "Share of 40 answers kept out of training that the model judges as their labels say."
    simpo = result.headline(made([0.6, 0.9], name="simpo", mode="simpo"))
    assert (simpo.text, simpo.detail) == ("60% → 90%", "Validation loss from 0.7 to 0.6.")
    # A run that did not help shows what it ended with.
    assert result.headline(made([0.5, 0.4, 0.45], name="worse")).text == "50% → 45%"
    before = result.headline(made([0.5], name="before"))
    assert (before.text, before.words.rpartition(", ")[2]) == ("50%", "before training.")
    late = made([0.5, 0.9], name="late")
    late.valid = {key: column[1:] for key, column in late.valid.items()}
    assert (result.headline(late).text, result.headline(late).words[-15:]) == ("90%", "n iteration 40.")


def test_a_run_without_validation_shows_its_loss(made):
    run = made([0.5, 0.9])
    run.valid = {key: column[:0] for key, column in run.valid.items()}
    assert result.headline(run).name == "Training loss"
    assert [advice.title for advice in advise(run)] == ["No validation"]
    assert "Accuracy" in render_page([run])


def test_the_method_names_the_objective(made):
    assert result.facts(made([0.5, 0.9]))[0][:2] == ("Method", "DPO with NA-LoRA")
    assert result.facts(made([0.5, 0.9], name="b", mode="simpo"))[0][1] == "SimPO with NA-LoRA"


# --- comparison --------------------------------------------------------------------------------------


def test_runs_are_compared_by_their_accuracy(made):
    runs = [made([0.5, 0.6], [0.7, 0.1], name="a"), made([0.5, 0.9], [0.7, 0.5], name="b")]
    assert result.best_runs(runs) == [1]
    assert result.comparison(runs) == (
        "b is best",
        "Its validation accuracy is 90%; the next best is 60%.",
    )
    runs = [made([0.5, 0.9], name="c"), made([0.5, 0.85], name="d")]
    assert "may be chance" in result.comparison(runs)[1]
    runs = [made([0.5, 0.9], name=name) for name in "ef"]
    assert result.comparison(runs) == (
        "e and f are equally good",
        "Each reaches a validation accuracy of 90%.",
    )
    runs = [made([0.5, 0.9], name="g"), made([0.5, 0.6], name="h", mode="simpo")]
    assert result.comparison(runs)[1].endswith(
        "its own measure of what is preferred: compare the answers, too."
    )
    runs = [made([0.5, 0.9], name="i"), made([0.5, 0.6], name="j", rows=20)]
    assert "different rows, so their accuracies do not" in result.comparison(runs)[1]


def test_preference_runs_are_not_compared_with_supervised_ones(made, tmp_path):
    runs = [made([0.5, 0.9]), read_run(write_run(tmp_path / "sft"), "sft")]
    assert result.best_runs(runs) == []
    assert result.comparison(runs)[0] == "No run is best"
    assert "trained on preferences" in result.comparison(runs)[1]
    assert "Accuracy" in render_page(runs)
    draw(runs)


# --- advice ------------------------------------------------------------------------------------------


def test_advice_on_the_accuracy(made):
    held = ("good", "The accuracy held")
    assert titles(made([0.5, 0.8, 0.9], name="a")) == [held]
    # Neither chance nor a loss that rises a little is a failure.
    assert titles(made([0.5, 0.9, 0.89], [0.7, 0.4, 0.41], name="b")) == [held]
    run = made([0.5, 0.9, 0.8], [0.7, 0.4, 0.3], name="c")
    assert titles(run) == [("warning", "Less accurate after iteration 20")]
    assert (
        "best at iteration 20 (90%) and fell to 80% at the end. Use the adapter in c/best"
        in advise(run)[0].text
    )
    run = made([0.5, 0.45, 0.4], name="d")
    assert titles(run) == [("warning", "Training did not help")]
    assert "was 50% before training and is 40% at the end" in advise(run)[0].text
    run = made([0.5, 0.9, 0.9], [0.7, 0.3, 0.5], name="e")
    assert titles(run) == [("note", "Overconfident after iteration 20")]
    assert "rose from 0.30 to 0.50 while the accuracy stayed" in advise(run)[0].text
    assert titles(made([0.5], name="f")) == []


def test_the_known_failures_are_shown(made):
    failures = {
        "The good answers became unlikely": {"chosen_logp": -4.0},
        "The model has moved far": {"kl": 2.5},
        "Answers are told apart by their length": {"accuracy_longer": 1.0, "accuracy_shorter": 0.1},
    }
    for i, (title, last) in enumerate(failures.items()):
        run = made([0.5, 0.9], name=str(i), last=last)
        assert titles(run) == [("warning", title), ("good", "The accuracy held")]
    text = advise(run)[0].text
    assert text.startswith("The model prefers long answers: accuracy is 1.00 where")
    assert "it is the shorter one. Add rows whose chosen answer is the shorter one" in text


# --- charts, captions, tables ------------------------------------------------------------------------


def test_the_charts_have_the_recorded_measures(made):
    run = made([0.5, 0.8, 0.9])
    data = chart_data([run], [], [], None)
    assert [chart["key"] for chart in data["preferences"]] == ["accuracy", "margin", "logps", "kl"]
    assert data["preferences"][2]["measures"] == [("chosen_logp", "chosen"), ("rejected_logp", "rejected")]
    assert data["lossAxis"] == "loss"
    (drawn,) = data["runs"]
    assert drawn["validMeasures"]["accuracy"] == [[0, 20, 40], [0.5, 0.8, 0.9]]
    assert drawn["validMeasures"]["margin"] == [[0, 20, 40], [0, 1.5, 3]]
    done = np.arange(1, 41) / 40
    assert np.allclose(drawn["train"]["margin"][1], 3 * done)
    assert np.allclose(drawn["train"]["rejected_logp"][1], -3 - done)
    assert "kl" not in drawn["train"]


def test_a_kto_run_whose_rows_have_one_label(tmp_path):
    path = write_preference_run(tmp_path / "a", [0.5, 0.9], mode="kto")
    lines = [json.loads(line) for line in (path / METRICS_FILE).read_text().splitlines()]
    for line in lines:
        del line["rejected_reward"], line["rejected_logp"]
    (path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = read_runs([path])
    assert list(preference_charts([run])) == ["accuracy", "logps", "kl"]
    assert caption([run], "logps").startswith("Chosen from -2 to -1 in validation.")
    page = render_page([run])
    assert "judges as their labels say; one half is chance" in page
    assert "preferences.png" in draw_plots([run])


def test_captions_say_what_the_measures_were(made):
    run = made([0.5, 0.9], last={"accuracy_longer": 0.95, "accuracy_shorter": 0.75})
    assert caption([run], "accuracy") == (
        "From 50% to 90% in validation. At the end, 95% where the chosen answer is the longer one and 75% where it is "
        "the shorter one. Share of pairs whose chosen answer has the higher reward; one half is chance."
    )
    assert caption([run], "margin").startswith("From 0 to 3 in validation.")
    assert caption([run], "logps").startswith(
        "Chosen from -2 to -1 in validation, rejected from -3 to -4 in valid"
    )
    assert "preferring the good answers; lower is better" in tables.loss_caption([run])
    run.valid = {key: column[:0] for key, column in run.valid.items()}
    first, last = (preference_measures(done)["chosen_logp"] for done in (1 / 40, 1))
    assert caption([run], "logps").startswith(f"Chosen from {first:.3g} to {last:.3g} in training")


def test_the_tables_have_the_measures(made, tmp_path):
    table = tables.loss_table(made([0.5, 0.9]), "valid")
    assert table["head"] == [
        "iteration",
        "validation loss",
        *("accuracy", "margin", "chosen reward", "rejected reward", "chosen logp", "rejected logp", "kl"),
    ]
    assert table["rows"][1] == ["40", "0.6", "0.9", "3", "2", "-1", "-1", "-4", "0.5"]
    assert tables.loss_table(read_run(write_run(tmp_path / "b"), "b"), "valid")["head"] == [
        "iteration",
        "validation loss",
    ]


def test_a_supervised_run_shows_nothing_of_preferences(tmp_path):
    path = write_run(tmp_path / "a")
    state = path / "checkpoints" / "step-0000040"
    state.mkdir(parents=True)
    # A checkpoint keeps all settings, with the defaults of preference training.
    settings = {"train_mode": "sft", "dpo_loss": "sigmoid", "desirable_weight": 1.0, "batch_size": 4}
    (state / "training_state.json").write_text(json.dumps({"config": settings}))
    (run,) = read_runs([path])
    page = render_page([run])
    assert run.settings["batch_size"] == 4
    for word in ("dpo loss", "train mode", "desirable", "Preferences", "reward", 'id="chart-accuracy"'):
        assert word not in page, word
    assert "loss (nats per token)" in page
    assert "preferences.png" not in draw_plots([run])
    (path / "run.json").unlink()
    assert "train_mode" not in read_runs([path])[0].settings


def test_the_settings_of_a_preference_run_are_those_with_an_effect(tmp_path):
    path = write_preference_run(tmp_path / "a", [0.5, 0.9], mode="simpo")
    state = path / "checkpoints" / "step-0000040"
    state.mkdir(parents=True)
    settings = {"train_mode": "simpo", "dpo_loss": "sigmoid", "simpo_margin": 1.0}
    (state / "training_state.json").write_text(json.dumps({"config": settings}))
    names = [row["name"] for row in tables.settings_table(read_runs([path]))["rows"]]
    assert {"train mode", "preference beta"} <= set(names)
    assert names.index("train mode") < names.index("rank")
    assert "dpo loss" not in names


def test_the_card_shows_the_accuracy(made):
    run = made([0.5, 0.8, 0.9, 0.95, 1.0])
    pixels, texts = draw([run])
    assert pixels.shape[:2] == (630, 1200)
    for text in (
        "Validation accuracy",
        "50%",
        "100%",
        "DPO with NA-LoRA (rank 8, last 4 layers) · 320 rows · 27 s",
    ):
        assert text in texts
    _, texts = draw([run, made([0.5, 0.6], name="b")])
    assert "a is best" in texts
    assert "50% → 100%" in texts
