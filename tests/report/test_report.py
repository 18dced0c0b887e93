"""Reports: data, tables, plots and the command, on synthetic runs and a trained one."""

import json
import os
import re
import subprocess
import sys
from html import escape

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from nalora_mlx.__main__ import main
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.optional_dependencies import install_command
from nalora_mlx.runs.metrics import METRICS_FILE
from nalora_mlx.training.diagnostics import describe_layers
from tests.conftest import build_model, masked_config
from tests.report.report_runs import CHANNELS, channel, sample, write_run

pytest.importorskip("matplotlib", reason="the extra report is not installed")
pytest.importorskip("plotly", reason="the extra report is not installed")

from matplotlib.axes import Axes

from nalora_mlx.adapters.attach import adapt_result
from nalora_mlx.report import run_data, style, tables
from nalora_mlx.report.downsampling import average_columns, downsample, running_mean
from nalora_mlx.report.page import render_page
from nalora_mlx.report.plots import draw_plots
from nalora_mlx.report.result import comparison
from nalora_mlx.report.result import headline as headline_of
from nalora_mlx.report.run_data import read_run, read_runs, short_layers
from nalora_mlx.report.style import RUN_COLORS_DARK, RUN_COLORS_LIGHT


def nalora(*argv):
    """Run a command in this process; return its exit status."""
    return main(list(map(str, argv)))


def chart_data(html):
    """Return the JSON data that the page's script draws."""
    return json.loads(html.split('<script type="application/json" id="data">')[1].split("</script>")[0])


# --- downsampling ------------------------------------------------------------------------------------


def test_downsampling_keeps_spikes_and_ends():
    rng = np.random.default_rng(0)
    steps, values = np.arange(10_000.0), rng.normal(size=10_000)
    values[[1234, 8765]] = 50, -50
    values[4000] = np.nan
    x, y = downsample(steps, values, 400)
    assert len(x) <= 410
    assert (np.diff(x) > 0).all()
    assert (x[0], x[-1]) == (0, 9999)
    assert y[x == 1234] == 50
    assert y[x == 8765] == -50
    assert np.isnan(y[x == 4000]).all()
    assert (x == 4000).sum() == 1
    assert all(values[int(a)] == b for a, b in zip(x, y, strict=True) if not np.isnan(b))
    short = downsample(steps[:10], values[:10], 400)
    assert len(short[0]) == 10


def test_running_mean():
    values = np.array([1.0, 2, np.nan, 4, 5, 6])
    expected = [np.nanmean(values[max(0, i - 2) : i + 1]) for i in range(6)]
    assert np.allclose(running_mean(values, 3), expected)
    assert np.isnan(running_mean(np.array([np.nan, np.nan]), 3)).all()


def test_averaged_columns_ignore_nan():
    rng = np.random.default_rng(1)
    grid = rng.normal(size=(3, 1003))
    grid[1, :500] = np.nan
    steps, means = average_columns(np.arange(1003.0), grid, 200)
    parts = np.array_split(np.arange(1003), 200)
    for column, part in enumerate(parts):
        assert steps[column] == part[-1]
        for row in range(3):
            known = grid[row, part][~np.isnan(grid[row, part])]
            assert (
                np.isclose(means[row, column], known.mean()) if len(known) else np.isnan(means[row, column])
            )


# --- data --------------------------------------------------------------------------------------------


def test_run_data(tmp_path):
    run = read_run(write_run(tmp_path / "a", 40, every=5), "a")
    assert run.best_validation == (100, 0.25)
    assert run.last_step == 200
    assert run.tokens == 40_000
    assert list(run.train["step"]) == [5 * t for t in range(1, 41)]
    assert len(run.valid["step"]) == 11
    assert short_layers(run.layers) == ["0", "1", "2", "3"]
    grid = run.grids["importance.mean"]
    progress = np.arange(1, 41) / 40
    assert np.allclose(grid.values, 0.5 + 0.05 * np.arange(4)[:, None] - 0.1 * progress, atol=1e-5)
    assert np.allclose(run.grids["occupancy.transition"].values, 0.7)
    assert np.allclose(run.grids["step_scale.mean"].values, 0.8 - 0.01 * np.arange(4)[:, None])
    assert np.allclose(run.grids["sparsity"].values, 0.02 * np.arange(4)[:, None] + 0.1 * progress, atol=1e-5)
    assert run.settings["rank"] == 8
    assert (run.settings["beta"], run.method) == (0.9, "NA-LoRA")


def test_channels_are_sorted_by_final_importance(tmp_path):
    run = read_run(write_run(tmp_path / "a", 40, every=5), "a")
    assert list(run.channels) == run.layers
    grid = run.channels["model.layers.2.mlp"]
    assert list(grid.steps) == [5 * t for t in range(1, 41)]
    order = sorted(range(CHANNELS), key=lambda c: -channel(2, c, 1))
    assert order == [6, 4, 2, 0, 7, 5, 3, 1]
    expected = [[channel(2, c, t / 40) for t in range(1, 41)] for c in order]
    assert np.allclose(grid.values, expected, atol=1e-9)


def test_long_run_keeps_all_losses_and_the_last_layer_report(tmp_path, monkeypatch):
    path = write_run(tmp_path / "a", 200)
    whole = read_run(path, "a")
    monkeypatch.setattr(run_data, "MAX_LAYER_REPORTS", 30)
    run = read_run(path, "a")
    assert np.array_equal(run.train["loss"], whole.train["loss"])
    steps = run.grids["misalignment"].steps
    assert 30 <= len(steps) <= 60
    assert steps[-1] == 200
    columns = np.searchsorted(whole.grids["misalignment"].steps, steps)
    assert np.array_equal(run.grids["misalignment"].values, whole.grids["misalignment"].values[:, columns])


@pytest.mark.parametrize("mask", ["soft", "hard", "off"])
def test_layer_statistics_of_a_training_step(mask):
    """Compare with statistics of the state's arrays, computed in float64."""
    from nalora_mlx import adapt
    from nalora_mlx.training.step import TrainingStep

    model = build_model()
    adapt(model, masked_config(rank=2, mask=mask, keep_fraction=0.25, mask_warmup=0, gamma=(0.5, 1, 2)))
    step = TrainingStep(model, optim.Adam(1e-3), adapt_result(model).config)
    rng = np.random.default_rng(0)
    layers = step.importance["layers"]
    s = rng.lognormal(size=48)
    m = {"soft": s / s.mean(), "hard": (s >= np.sort(s)[-12]).astype(float), "off": np.ones(48)}[mask]
    above = np.sort(rng.random((2, 48)), axis=0)[::-1]
    k = 3
    layers["model.layers.1.mlp"] = layers["model.layers.1.mlp"]._replace(
        importance=mx.array(s * (1 - 0.9**k)),
        updates=mx.array(float(k)),
        mask=mx.array(m),
        above_boundary=mx.array(above * (1 - 0.9**k)),
    )
    step.set_layers(layers)
    statistics = describe_layers(step)["model.layers.1.mlp"]
    assert statistics["sparsity"] == pytest.approx(np.mean(m < 0.1), abs=1e-6)
    assert statistics["sparsity"] == pytest.approx(
        {"soft": statistics["sparsity"], "hard": 0.75, "off": 0}[mask]
    )
    assert statistics["effective"] == pytest.approx(m.sum() ** 2 / (48 * (m**2).sum()), rel=1e-5)
    g = 0.5 * (1 - above[0]) + (above[0] - above[1]) + 2 * above[1]
    spread = {"mean": g.mean(), **{f"p{p}": np.percentile(g, p) for p in (10, 50, 90)}}
    assert statistics["step_scale"] == pytest.approx(spread, rel=1e-5)
    assert len(statistics["channels"]) == 32
    assert np.allclose(statistics["channels"], s[[i * 48 // 32 for i in range(32)]], rtol=1e-3)
    assert all(len(f"{value:g}".replace(".", "").lstrip("0")) <= 4 for value in statistics["channels"])


def test_no_step_scale_without_step_scaling(tmp_path):
    from nalora_mlx import adapt
    from nalora_mlx.training.step import TrainingStep

    model = build_model()
    adapt(model, masked_config(rank=2, step_scaling=False))
    step = TrainingStep(model, optim.Adam(1e-3), adapt_result(model).config)
    assert all("step_scale" not in layer for layer in describe_layers(step).values())


def test_incomplete_last_record_is_ignored_and_a_damaged_one_reported(tmp_path):
    path = write_run(tmp_path / "a") / METRICS_FILE
    whole = path.read_text()
    path.write_text(whole + '{"split": "train", "st')
    assert read_run(tmp_path / "a", "a").last_step == 40
    lines = whole.splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "not JSON\n", *lines[2:]]))
    with pytest.raises(InputError, match=r"metrics\.jsonl:3 is not a record"):
        read_run(tmp_path / "a", "a")


def test_later_record_of_a_step_replaces_the_earlier(tmp_path):
    path = write_run(tmp_path / "a") / METRICS_FILE
    record = {"split": "valid", "step": 20, "loss": 0.125, "tokens": 1, "seconds": 1, "best_loss": 0.125}
    path.write_text(path.read_text() + json.dumps(record) + "\n")
    assert read_run(tmp_path / "a", "a").best_validation == (20, 0.125)


def test_a_run_that_did_not_help_says_so(tmp_path):
    """The validation before training is the lowest."""
    path = write_run(tmp_path / "a") / METRICS_FILE
    record = {"split": "valid", "step": 0, "loss": 0.01, "tokens": 1, "seconds": 1, "best_loss": None}
    path.write_text(path.read_text() + json.dumps(record) + "\n")
    run = read_run(tmp_path / "a", "a")
    assert run.best_validation == (0, 0.01)
    headline = headline_of(run)
    assert (headline.before, headline.after) == ("0.01", "1.50")
    assert headline.words == "14900% higher on 40 rows kept out of training."
    assert "best validation loss 0.01 before training, which did not lower it" in tables.loss_caption([run])


def test_nan_losses_become_gaps(tmp_path):
    path = write_run(tmp_path / "a") / METRICS_FILE
    path.write_text(path.read_text().replace('"loss": 0.25', '"loss": null'))
    run = read_run(tmp_path / "a", "a")
    assert np.isnan(run.valid["loss"]).sum() == 1
    assert run.best_validation[1] == 1.1
    assert None in chart_data(render_page([run]))["runs"][0]["valid"][1]


def test_run_without_layer_statistics(tmp_path):
    path = write_run(tmp_path / "a", layers=0)
    (path / "adapter_config.json").unlink()
    rows = [json.loads(line) for line in (path / METRICS_FILE).read_text().splitlines()]
    for row in rows:
        for name in ("layers", "gradient_norm", "skipped", "peak_memory_gb"):
            row.pop(name, None)
    (path / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = render_page([read_run(path, "a")])
    assert 'id="chart-loss"' in html
    assert 'id="statistic"' not in html
    assert "chart-peak_memory_gb" not in html


def test_names_are_short_and_distinct(tmp_path):
    paths = [write_run(tmp_path / a / b) for a, b in (("x", "run"), ("y", "run"))]
    assert [run.name for run in read_runs(paths)] == ["x/run", "y/run"]
    with pytest.raises(InputError, match="given twice"):
        read_runs([paths[0], paths[0]])
    assert short_layers(["model.layers.1.mlp.a", "model.layers.1.mlp.b"]) == ["1 mlp.a", "1 mlp.b"]
    assert short_layers(["something.else"]) == ["something.else"]


# --- page and plots ----------------------------------------------------------------------------------


def test_best_run_is_named_and_differing_settings_come_first(tmp_path):
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", beta=0.5)])
    assert comparison(runs) == ("a and b are equally good", "Each reaches a validation loss of 0.25.")
    runs[1].valid["loss"][:] = 2.0
    assert comparison(runs) == ("a is best", "Its validation loss is 0.25; the next best is 2.00.")
    runs[1].valid["loss"][:] = 0.26
    assert "the next best is 0.260. So small a difference may be chance" in comparison(runs)[1]
    rows = tables.settings_table(runs)["rows"]
    assert [row["differs"] for row in rows] == [True] + [False] * (len(rows) - 1)
    assert rows[0] == {"name": "beta", "cells": ["0.9", "0.5"], "differs": True}
    assert tables.differing_settings(runs)["rows"] == rows[:1]
    runs[1].settings |= {"val_batches": 2, "batch_size": 4}
    assert "validated on different rows" in comparison(runs)[1]
    runs[1].valid["loss"][:] = np.nan
    assert comparison(runs)[0] == "No run is best"


def test_advice_for_several_runs_is_given_once(tmp_path):
    paths = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    for path in paths[1:]:
        metrics = (path / METRICS_FILE).read_text()
        (path / METRICS_FILE).write_text(metrics.replace('"skipped": 0', '"skipped": 1'))
    html = render_page(read_runs(paths))
    advice = html.split('<ul class="advice">')[1].split("</ul>")[0]
    texts = [re.sub("<.*?>", "", item.partition(">")[2]) for item in advice.split("<li")[1:]]
    assert [text.partition(".")[0] for text in texts] == [
        "a: Overfitting after iteration 20",
        "b, c: 1 update was skipped",
        *(f"{name}: Overfitting after iteration 20" for name in "bc"),
    ]


def test_names_are_escaped(tmp_path):
    html = render_page([read_run(write_run(tmp_path / "a"), "</script><img src=x onerror=alert(1)>")])
    assert "<img" not in html
    assert chart_data(html)["runs"][0]["name"].startswith("</script>")


def test_page_loads_nothing(tmp_path):
    html = render_page([read_run(write_run(tmp_path / "a"), "a")])
    assert "default-src 'none'" in html
    for reference in ("<link", "<iframe", " src=", "@import", "url("):
        assert reference not in html.split("<script")[0], reference


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize(
    ("colors", "background"), [(RUN_COLORS_LIGHT, "#ffffff"), (RUN_COLORS_DARK, "#191e26")]
)
def test_lines_contrast_with_the_background(colors, background):
    for color in colors:
        high, low = sorted((luminance(color), luminance(background)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 3, color


# Simulation of color vision deficiency in linear RGB, full severity: Machado, Oliveira, Fernandes (2009).
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def lab(colors, matrix):
    """Return CIE L*a*b* (D65) of colors seen with a color vision deficiency; [N, 3]."""
    parts = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colors])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(matrix).T, 0, 1)
    to_xyz = [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
    f = seen @ np.array(to_xyz).T / [0.95047, 1, 1.08883]
    f = np.where(f > 216 / 24389, np.cbrt(f), (24389 / 27 * f + 16) / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


@pytest.mark.parametrize("colors", [RUN_COLORS_LIGHT, RUN_COLORS_DARK], ids=["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_run_colors_are_distinct(colors, vision):
    seen = lab(colors, VISION[vision])
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert distance[~np.eye(len(seen), dtype=bool)].min() >= 15


def test_dashes_and_markers_are_distinct():
    for shapes in (
        style.PLOTLY_MARKERS,
        style.PLOTLY_DASHES,
        style.MATPLOTLIB_MARKERS,
        style.MATPLOTLIB_DASHES,
    ):
        assert len(set(shapes)) == style.MAX_RUNS == len(RUN_COLORS_DARK)


def test_page_names_the_method(tmp_path):
    for kind, words in (
        ("na-lora", "NA-LoRA"),
        ("lora", "LoRA"),
        ("dora", "DoRA"),
        ("full", "full fine-tuning"),
    ):
        assert f"<dt>Method</dt><dd>{words}<" in render_page(
            [read_run(write_run(tmp_path / kind, kind=kind), "a")]
        )
    (tmp_path / "na-lora" / "run.json").unlink()  # a run by train() has none
    assert read_run(tmp_path / "na-lora", "a").method == "NA-LoRA"


def test_plots_show_masks_channels_and_regions(tmp_path, monkeypatch):
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b", layers=6, mask="hard")
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **_: titles.append(text))
    for runs in (read_runs([one]), read_runs([one, two])):
        titles.clear()
        plots = draw_plots(runs)
        assert set(plots) == {"loss.png", "speed.png", "layers.png", "occupancy.png", "channels.png"}
        assert all(content.startswith(b"\x89PNG") for content in plots.values())
        shown = " ".join(titles)
        for title in ("Mask sparsity", "Channels in effect", "Mask\n90th", "Step scale", "Step multiplier"):
            assert shown.count(title) == len(runs), title
        for region in ("suppressed", "transition", "homogeneous"):
            assert shown.count(region) == len(runs)
        assert "Importance, layer 0" in shown
        assert "Importance, layer 3" in shown
    (one / "metrics.jsonl").write_text('{"split": "valid", "step": 0, "loss": 1}\n')
    assert list(draw_plots([read_run(one, "a")])) == ["loss.png"]


# --- the command --------------------------------------------------------------------------------------------


def test_report_of_a_trained_run(model_directory, data_directory, tmp_path):
    run = tmp_path / "run"
    config = tmp_path / "config.yaml"
    config.write_text(
        "lr_schedule: {name: cosine_decay, arguments: [0.0001, 8]}\noptimizer: adamw\n"
        "optimizer_config: {adamw: {weight_decay: 0.03}}\npreset: paper\n"
    )
    train = [
        "lora", "--config", config, "--train", "--model", model_directory, "--data", data_directory,
        "--adapter-path", run, "--iters", 8,
        "--steps-per-report", 2, "--steps-per-eval", 4, "--save-every", 4, "--batch-size", 3, "--num-layers", -1,
    ]  # fmt: skip
    assert nalora(*train) == 0
    record = json.loads((run / "run.json").read_text())
    assert record["data"]["train"]["rows"] == 9
    assert record["settings"]["model"] == "model"
    assert record["settings"]["na_parameters"]["gamma"] == [0.5, 1, 1]
    first = json.loads((data_directory / "valid.jsonl").read_text().splitlines()[0])["prompt"]
    assert record["samples"][0]["messages"] == [{"role": "user", "content": first}]
    assert len(record["samples"]) == 3
    assert str(tmp_path) not in (run / "run.json").read_text()

    assert nalora("report", run) == 0
    html = (run / "report" / "report.html").read_text()
    samples = json.loads((run / "samples.json").read_text())["samples"]
    assert len(samples) == 3
    for each in samples:
        assert escape(each["prompt"]) in html
        assert escape(each["expected"]) in html
    for text in (
        "arguments: (0.0001, 8), name: cosine_decay",
        "weight_decay: 0.03",
        "<td>0.5, 1.0, 1.0</td>",
    ):
        assert text in html
    for name in ("card.png", "loss.png", "speed.png", "layers.png", "occupancy.png", "channels.png"):
        assert (run / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert "Answers before and after" in html
    assert record["model"]["type"] == "llama"
    assert f" fine-tuned on {data_directory.name}</h1>" in html
    assert "<h1>A llama model (" in html  # "model" names nothing
    assert "9 rows, 162 tokens, 94% supervised" in html
    (found,) = chart_data(html)["runs"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert np.allclose(found["train"]["loss"], [[2, 4, 6, 8], losses], rtol=1e-4)
    assert found["grids"]["misalignment"]["x"] == [2, 4, 6, 8]

    # Channels are sorted by their final importance, which the last checkpoint contains too.
    from safetensors.numpy import load_file

    state = load_file(run / "checkpoints" / "step-0000008" / "training_state.safetensors")
    raw = state["importance.layers.model.layers.1.mlp.importance"] / (1 - 0.9**8)
    channels = found["channels"]["1"]
    assert channels["x"] == [2, 4, 6, 8]
    some = raw[[i * 48 // 32 for i in range(32)]]
    assert np.allclose([row[-1] for row in channels["z"]], np.sort(some)[::-1], rtol=1e-3)

    # A new run archives the old one with its report.
    assert nalora(*train) == 0
    assert (run / "previous" / "1" / "report" / "report.html").exists()
    assert (run / "previous" / "1" / "run.json").exists()
    assert not (run / "report").exists()


def test_errors_are_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    answered = write_run(tmp_path / "answered", samples=[sample("q", None, None, "a")])
    empty = tmp_path / "empty"
    empty.mkdir()
    foreign = tmp_path / "out" / "report.html"
    foreign.parent.mkdir()
    foreign.write_text("<p>mine</p>")
    for argv, message in (
        ([empty], "contains no metrics.jsonl"),
        ([tmp_path / "none"], "is not a directory"),
        ([run, run], "given twice"),
        ([run, "--output", foreign.parent], "was not written by nalora report"),
        ([run, "--model", "a/b"], "has no adapters.safetensors"),
        ([answered, "--model", "a/b"], "have answers already"),
        ([run, "--model", "./nowhere"], "no such directory"),
        ([foreign], "is a file"),
        ([run, "--watch", "--every", "0"], "--every 0"),
        ([run] * 7, "at most 6"),
    ):
        assert nalora("report", *argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("nalora report: error: ")
        assert error.count("\n") == 1
        assert message in error
    assert foreign.read_text() == "<p>mine</p>"


def test_missing_package_is_reported(tmp_path, monkeypatch):
    from nalora_mlx.report import __main__ as command

    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "plotly" else name)
    with pytest.raises(InputError, match=re.escape(f"needs plotly: {install_command('report')}")):
        command.run(command.build_parser("x").parse_args([str(tmp_path)]))


def test_watch_updates_until_the_run_ends(tmp_path):
    """Another process simulates the run by locking its directory."""
    run = write_run(tmp_path / "a")
    hold = (
        "import sys; from pathlib import Path; from nalora_mlx.core.locks import lock_directory\n"
        f"with lock_directory(Path({str(run)!r})): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    watch = subprocess.Popen(
        [sys.executable, "-m", "nalora_mlx", "report", run, "--watch", "--every", "1"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    page_file = run / "report" / "report.html"
    try:
        assert watch.stdout.readline().startswith("iteration 40: ")
        assert chart_data(page_file.read_text())["refresh"] == 1
        record = {"split": "valid", "step": 44, "loss": 0.2, "tokens": 1, "seconds": 1, "best_loss": 0.2}
        with (run / METRICS_FILE).open("a") as file:
            file.write(json.dumps(record) + "\n")
        lines = iter(watch.stdout.readline, "")
        assert any(line.startswith("iteration 44: ") for line in lines)
    finally:
        holder.communicate("")
    assert watch.wait(60) == 0
    assert chart_data(page_file.read_text())["refresh"] is None
    assert 'id="pause"' not in page_file.read_text()


def watch(run, monkeypatch, meanwhile, *flags, running=True):
    """Run `nalora report RUN --watch` here, without plots. Each sleep calls the next function of `meanwhile`."""
    from nalora_mlx.report import __main__ as command

    steps = iter(meanwhile)
    alive = {"running": running}
    monkeypatch.setattr("nalora_mlx.report.plots.draw_plots", lambda runs: {})
    monkeypatch.setattr("nalora_mlx.report.card.draw_card", lambda runs: b"")
    monkeypatch.setattr(command, "_any_running", lambda _: alive["running"])

    def sleep(_):
        step = next(steps, None)
        if step is None:
            alive["running"] = False
        else:
            step()

    monkeypatch.setattr(command.time, "sleep", sleep)
    command.run(command.build_parser("x").parse_args([str(run), "--watch", *flags]))


def test_watch_waits_for_the_first_report(tmp_path, monkeypatch, capsys):
    run, existed = tmp_path / "later", []
    made = write_run(tmp_path / "made")

    def absent():
        existed.append(run.exists())

    def empty():
        run.mkdir()
        (run / METRICS_FILE).touch()

    def first():
        (run / METRICS_FILE).write_text((made / METRICS_FILE).read_text())

    watch(run, monkeypatch, [absent, absent, empty, first], running=False)
    assert existed == [False, False]  # waiting does not create the run's directory
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["waiting", str(run / "report" / "report.html")]
    assert chart_data((run / "report" / "report.html").read_text())["refresh"] is None


def test_watch_continues_if_files_disappear_while_reading(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "a")
    state = run / "checkpoints" / "step-0000010" / "training_state.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    read, html = run_data.storage.read_json, run / "report" / "report.html"
    dates = []

    def pruned(path):
        """Simulate a checkpoint that is deleted after it was listed."""
        if path == state:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return read(path)

    def remove():
        dates.append(html.stat().st_mtime_ns)
        monkeypatch.setattr(run_data.storage, "read_json", pruned)

    def restore():
        dates.append(html.stat().st_mtime_ns)
        monkeypatch.setattr(run_data.storage, "read_json", read)

    watch(run, monkeypatch, [remove, restore])
    assert dates[0] == dates[1] < html.stat().st_mtime_ns
    words = [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()]
    assert words == ["iteration", "note:", "iteration", str(html)]


def test_interrupted_watch_leaves_a_page_without_refresh(tmp_path, monkeypatch):
    run = write_run(tmp_path / "a")
    html = run / "report" / "report.html"

    def interrupt():
        assert chart_data(html.read_text())["refresh"] == 10
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(run, monkeypatch, [interrupt])
    assert chart_data(html.read_text())["refresh"] is None


def test_models_answer_after_the_run(tmp_path, monkeypatch):
    from nalora_mlx.report import __main__ as command

    run, events = write_run(tmp_path / "a"), []
    monkeypatch.setattr("nalora_mlx.report.plots.draw_plots", lambda runs: {})
    monkeypatch.setattr(command, "_any_running", lambda _: not events)
    monkeypatch.setattr(command.time, "sleep", lambda _: events.append("slept"))

    def answer(model, runs, _):
        events.append(f"{model} answered")
        runs[0].samples = [sample("p", None, "x", "y")]

    monkeypatch.setattr("nalora_mlx.report.missing_answers.add_answers", answer)
    command.run(command.build_parser("x").parse_args([str(run), "--watch", "--model", "a/b"]))
    assert events == ["slept", "a/b answered"]
    assert "Answers before and after" in (run / "report" / "report.html").read_text()


class Browser:
    """A browser that only records what it opens."""

    def __init__(self):
        self.opened = []

    def open(self, url):
        self.opened.append(url)


def test_open_shows_the_page_and_fails_quietly(tmp_path, monkeypatch, capsys):
    from nalora_mlx.report import __main__ as command

    run, browser = write_run(tmp_path / "a"), Browser()
    page = run / "report" / "report.html"
    monkeypatch.setattr(command.webbrowser, "get", lambda: browser)
    watch(run, monkeypatch, [])
    assert browser.opened == []
    watch(run, monkeypatch, [], "--open")
    assert browser.opened == [page.resolve().as_uri()]  # once, and not for each update

    def no_browser():
        raise command.webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(command.webbrowser, "get", no_browser)
    capsys.readouterr()
    command.run(command.build_parser("x").parse_args([str(run), "--open"]))
    assert capsys.readouterr().out.startswith(str(page))
    # A browser that would take over the terminal is not started.
    started = []
    terminal_browser = command.webbrowser.GenericBrowser("lynx")
    monkeypatch.setattr(terminal_browser, "open", started.append, raising=False)
    monkeypatch.setattr(command.webbrowser, "get", lambda: terminal_browser)
    monkeypatch.delenv("BROWSER", raising=False)
    command.run(command.build_parser("x").parse_args([str(run), "--open"]))
    assert started == []
    monkeypatch.setenv("BROWSER", "lynx")
    command.run(command.build_parser("x").parse_args([str(run), "--open"]))
    assert started == [page.resolve().as_uri()]


def test_watching_processes_are_not_taken_for_runs(tmp_path):
    import fcntl

    from nalora_mlx.core.locks import lock_directory
    from nalora_mlx.report.__main__ import _any_running

    assert not _any_running([tmp_path, tmp_path / "none"])
    assert not (tmp_path / "none").exists()
    with lock_directory(tmp_path):
        assert _any_running([tmp_path])
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert not _any_running([tmp_path])
    os.close(other)
