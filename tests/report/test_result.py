"""The top of a report: numbers, words, names and facts; and card.png."""

import base64
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the extra report is not installed")

from matplotlib.figure import Figure
from matplotlib.image import imread, imsave

from nalora_mlx.report import card, result
from nalora_mlx.report.formatting import (
    format_count,
    format_duration,
    format_loss,
    format_number,
    format_pair,
)
from nalora_mlx.report.run_data import SCALARS, RunData, read_run, read_runs
from nalora_mlx.runs.metrics import METRICS_FILE
from tests.report.report_runs import sample, write_run


def run(valid=(), train=(), **more):
    steps = 100.0 * np.arange(len(train) or len(valid))
    columns = {name: np.full(len(train), np.nan) for name in SCALARS}
    return RunData(
        "name",
        Path("name"),
        {**columns, "step": steps[: len(train)], "loss": np.array(train, dtype=float)},
        {"step": steps[: len(valid)], "loss": np.array(valid, dtype=float)},
        **more,
    )


def test_numbers_are_formatted_for_people():
    assert [format_number(value) for value in (1234.5, 0.123456, None, float("nan"))] == [
        "1,234",
        "0.1235",
        "-",
        "-",
    ]
    assert format_pair(3.27518, 0.0897884) == ("3.28", "0.09")
    assert format_pair(1.5231, 1.4822) == ("1.523", "1.482")
    assert format_pair(0.004, 0.0021) == ("0.0040", "0.0021")
    assert format_pair(0.5, 0.5) == ("0.50", "0.50")
    assert [format_loss(loss) for loss in (0.5, 0.0123, 0.00456, 12.345)] == [
        "0.50",
        "0.01",
        "0.005",
        "12.35",
    ]
    assert [format_count(n) for n in (134_515_008, 1_540_000_000, 70e9, 9000)] == [
        "135M",
        "1.5B",
        "70B",
        "9,000",
    ]
    durations = [format_duration(s) for s in (4.4, 59.7, 339, 3600, 7800)]
    assert durations == ["4 s", "1 min", "5 min 39 s", "1 h", "2 h 10 min"]


def test_headline_shows_the_loss_before_and_at_its_best():
    found = result.headline(run([3.27518, 0.0897884, 0.12], data={"valid": {"rows": 40}}))
    assert (found.name, found.text) == ("Validation loss", "3.28 → 0.09")
    assert found.words == "97% lower on 40 rows kept out of training, at iteration 100."
    assert found.detail.startswith(f"Perplexity from {np.exp(3.27518):.3g} to {np.exp(0.0897884):.3g}: ")


def test_headline_counts_the_rows_that_were_validated():
    settings = {"val_batches": 4, "batch_size": 4}
    assert "on 16 rows" in result.headline(run([3, 1], data={"valid": {"rows": 40}}, settings=settings)).words
    assert "on 10 rows" in result.headline(run([3, 1], data={"valid": {"rows": 10}}, settings=settings)).words
    settings["val_batches"] = -1
    assert "on 40 rows" in result.headline(run([3, 1], data={"valid": {"rows": 40}}, settings=settings)).words


def test_headline_without_a_validation_before_or_at_all():
    late = run([2.0, 1.0])
    late.valid["step"] += 50
    assert result.headline(late).text == "1.00"
    assert "iteration 150" in result.headline(late).words
    training = result.headline(run(train=[3.0, 2.0, 0.5]))
    assert (training.name, training.text) == ("Training loss", "3.00 → 0.50")
    assert result.headline(run([3.0])).text == "3.00"
    assert result.headline(run()).text == "-"


@pytest.mark.parametrize(
    ("model", "settings", "label"),
    [
        ({}, {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"}, "SmolLM2-135M-Instruct"),
        ({}, {"model": "my-llama"}, "my-llama"),
        ({}, {"model": "model"}, None),
        ({}, {"model": "8f" * 20}, None),
        ({"type": "llama"}, {"model": "model"}, "llama model"),
        ({"type": "llama", "parameters": 134_515_008}, {"model": "model"}, "llama model (135M parameters)"),
        ({"name": "a/b", "type": "llama", "parameters": 1e9}, {"model": "model"}, "b"),
    ],
)
def test_model_is_named_if_its_name_tells_something(model, settings, label):
    found = run(model=model, settings=settings)
    assert result.model_label(found) == label
    name = f"A {label or 'model'}" if label is None or " " in label else label
    assert result.title([found]) == f"{name} fine-tuned on its own data"


def test_data_is_named_without_directories():
    def label(**settings):
        return result.data_label(run(settings=settings))

    assert label(data="bakery") == "bakery"
    assert label(data=[{"path": "a/x.csv", "ratio": 1}, {"path": "y.jsonl"}]) == "x.csv and y.jsonl"
    assert label(data=["a", "b", "c"]) == "a and 2 other data sets"
    assert label(hf_dataset={"path": "owner/set"}) == "set"
    assert label() is None


def test_facts_are_at_most_four(tmp_path):
    path = write_run(tmp_path / "a")
    facts = result.facts(read_run(path, "a"))
    # 40 iterations at 1.5 per second, and 11 validations of 0.1 s.
    assert facts == [
        ("Method", "NA-LoRA", "rank 8, last 4 layers"),
        ("Data", "320 rows", "words, 40 iterations"),
        ("Time", "28 s", "12 GB peak memory"),
    ]
    record = json.loads((path / "run.json").read_text())
    record["model"] = {"name": "a/SmolLM2", "type": "llama", "parameters": 134_515_008}
    (path / "run.json").write_text(json.dumps(record))
    assert result.facts(read_run(path, "a"))[1] == ("Base model", "SmolLM2", "llama, 135M parameters")


# --- card.png ----------------------------------------------------------------------------------------


def draw(runs):
    """Return the pixels of a card and its texts. A missing character would be a warning."""
    texts = []
    original = Figure.text

    def text(self, x, y, content, **more):
        texts.append(content)
        return original(self, x, y, content, **more)

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(Figure, "text", text)
        png = card.draw_card(runs)
    return imread(io.BytesIO(png)), texts


def test_card_shows_the_first_image_of_the_question(tmp_path):
    plain, uri = sample("what?", None, "b", "a"), "data:image/png;base64,"
    buffer = io.BytesIO()
    imsave(buffer, np.full((4, 8, 3), (1.0, 0.5, 0.0)), format="png")
    seen = plain | {"images": [uri + base64.b64encode(buffer.getvalue()).decode()]}
    paths = [write_run(tmp_path / name / "a", samples=[each]) for name, each in (("1", plain), ("2", seen))]
    without, with_image = (draw([read_run(path, "a")])[0] for path in paths)
    assert without.shape == with_image.shape
    assert not np.allclose(without, with_image)
    # It is 76 pixels wide and half as high.
    assert np.allclose(with_image[428:462, 58:130, :3], (1.0, 0.5, 0.0), atol=0.01)


def test_card_has_the_result_and_a_pair_of_answers(tmp_path):
    samples = [
        sample("wrong", "right", "before", "not that"),
        sample("Why $\\bad{ or $6?", "this", "before_ that", "this"),
    ]
    (run,) = read_runs([write_run(tmp_path / "a", samples=samples)])
    pixels, texts = draw([run])
    assert pixels.shape[:2] == (630, 1200)
    assert "1.50" in texts
    assert "0.25" in texts
    assert "Why $\\bad{ or $6?" in texts
    assert "After ✓ as expected" in texts
    assert "not that" not in texts
    # Nothing but white within 24 pixels of the frame: no text is cut off.
    for edge in (pixels[:24], pixels[-24:], pixels[:, :24], pixels[:, -24:]):
        assert edge[..., :3].min() == 1


def test_card_of_long_texts_stays_in_its_frame(tmp_path):
    long = "word " * 300
    samples = [sample(long, "x", "y" * 500, "many\nlines\n" * 50)]
    (run,) = read_runs([write_run(tmp_path / "a", samples=samples)])
    run.settings |= {"model": "a-long-name-" * 20, "data": "more-words-" * 20}
    pixels, texts = draw([run])
    assert any(text.endswith("…") for text in texts)
    for edge in (pixels[:24], pixels[-24:], pixels[:, :24], pixels[:, -24:]):
        assert edge[..., :3].min() == 1


@pytest.mark.parametrize("text", ["مرحبا", "שלום", "नमस्ते", "👍🏽", "a\u0007b"])
def test_card_leaves_out_what_it_cannot_draw(tmp_path, text):
    samples = [sample(text, None, "before", "after")]
    _, texts = draw(read_runs([write_run(tmp_path / "a", samples=samples)]))
    assert text not in texts
    assert "after" not in texts
    samples.append(sample("Größe, naïve, Ωμέγα, Привет", None, "before", "later"))
    _, texts = draw(read_runs([write_run(tmp_path / "b", samples=samples)]))
    assert "later" in texts
    assert text not in texts


@pytest.mark.filterwarnings("ignore:Glyph")  # the system may have no font for Japanese
def test_card_of_text_without_spaces_wraps():
    canvas = card._Card()
    for words in ("東京は晴れです。" * 30, "x" * 300):
        lines = canvas.wrapped(words, 20, 300, 4)
        assert len(lines) == 4
        assert all(canvas.width(line, 20) <= 300 for line in lines)
        assert lines[-1].endswith("…")


def test_card_compares_runs(tmp_path):
    runs = read_runs([write_run(tmp_path / f"run {i}", seed=i) for i in range(6)])
    runs[3].valid["loss"] /= 2
    pixels, texts = draw(runs)
    assert pixels.shape[:2] == (630, 1200)
    assert "run 3 is best" in texts
    assert {f"run {i}" for i in range(6)} <= set(texts)
    assert "0.75 → 0.12" in texts or "0.75 → 0.13" in texts


def test_card_of_a_run_that_has_just_begun(tmp_path):
    path = write_run(tmp_path / "a")
    (path / METRICS_FILE).write_text('{"split": "valid", "step": 0, "loss": 1}\n')
    _, texts = draw([read_run(path, "a")])
    assert "1.00" in texts
