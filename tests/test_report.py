"""What a report reads and says: against numbers that are known, and a run that was really trained."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from nalora_mlx.errors import InputError
from nalora_mlx.metrics import METRICS_FILE
from tests.report_runs import write_run

pytest.importorskip("matplotlib", reason="the extra report is not installed")
pytest.importorskip("plotly", reason="the extra report is not installed")

from nalora_mlx.report import tables
from nalora_mlx.report.data import read_run, read_runs, short_layers
from nalora_mlx.report.page import page
from nalora_mlx.report.palette import RUNS_DARK, RUNS_LIGHT
from nalora_mlx.report.series import binned, running_mean, thinned


def nalora(*argv, **settings):
    return subprocess.run(
        [sys.executable, "-m", "nalora_mlx", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=300,
        **settings,
    )


def payload(html):
    return json.loads(html.split('<script type="application/json" id="data">')[1].split("</script>")[0])


# --- series -------------------------------------------------------------------------------------------------


def test_thinning_loses_no_spike_and_no_end():
    rng = np.random.default_rng(0)
    steps, values = np.arange(10_000.0), rng.normal(size=10_000)
    values[[1234, 8765]] = 50, -50
    values[4000] = np.nan
    x, y = thinned(steps, values, 400)
    assert len(x) <= 410
    assert (np.diff(x) > 0).all()
    assert (x[0], x[-1]) == (0, 9999)
    assert y[x == 1234] == 50
    assert y[x == 8765] == -50
    assert np.isnan(y[x == 4000]).all()
    assert (x == 4000).sum() == 1
    assert all(values[int(a)] == b for a, b in zip(x, y, strict=True) if not np.isnan(b))
    short = thinned(steps[:10], values[:10], 400)
    assert len(short[0]) == 10


def test_running_mean_is_the_mean_of_what_came_before():
    values = np.array([1.0, 2, np.nan, 4, 5, 6])
    expected = [np.nanmean(values[max(0, i - 2) : i + 1]) for i in range(6)]
    assert np.allclose(running_mean(values, 3), expected)
    assert np.isnan(running_mean(np.array([np.nan, np.nan]), 3)).all()


def test_bins_are_means_of_what_was_measured():
    rng = np.random.default_rng(1)
    grid = rng.normal(size=(3, 1003))
    grid[1, :500] = np.nan
    steps, means = binned(np.arange(1003.0), grid, 200)
    parts = np.array_split(np.arange(1003), 200)
    for column, part in enumerate(parts):
        assert steps[column] == part[-1]
        for row in range(3):
            known = grid[row, part][~np.isnan(grid[row, part])]
            assert (
                np.isclose(means[row, column], known.mean()) if len(known) else np.isnan(means[row, column])
            )


# --- what is read -------------------------------------------------------------------------------------------


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = read_run(write_run(tmp_path / "a", 40, every=5), "a")
    assert run.best == (100, 0.25)
    assert run.last_step == 200
    assert run.tokens == 40_000
    assert list(run.train["step"]) == [5 * t for t in range(1, 41)]
    assert len(run.valid["step"]) == 11
    assert short_layers(run.layers) == ["0", "1", "2", "3"]
    grid = run.grids["importance.mean"]
    shares = np.arange(1, 41) / 40
    assert np.allclose(grid.values, 0.5 + 0.05 * np.arange(4)[:, None] - 0.1 * shares, atol=1e-5)
    assert np.allclose(run.grids["occupancy.transition"].values, 0.7)
    assert run.settings["rank"] == 8
    assert "sparsity" not in run.grids


def test_a_hard_mask_shows_its_sparsity(tmp_path):
    run = read_run(write_run(tmp_path / "a", mask="hard"), "a")
    assert np.allclose(run.grids["sparsity"].values, 1 - run.grids["mask.mean"].values)


def test_a_report_that_is_being_written_is_left_out_and_a_broken_one_named(tmp_path):
    path = write_run(tmp_path / "a") / METRICS_FILE
    whole = path.read_text()
    path.write_text(whole + '{"split": "train", "st')
    assert read_run(tmp_path / "a", "a").last_step == 40
    lines = whole.splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "not JSON\n", *lines[2:]]))
    with pytest.raises(InputError, match=r"metrics\.jsonl:3 is no record"):
        read_run(tmp_path / "a", "a")


def test_of_two_records_of_a_step_the_later_one_counts(tmp_path):
    path = write_run(tmp_path / "a") / METRICS_FILE
    record = {"split": "valid", "step": 20, "loss": 0.125, "tokens": 1, "seconds": 1, "best_loss": 0.125}
    path.write_text(path.read_text() + json.dumps(record) + "\n")
    assert read_run(tmp_path / "a", "a").best == (20, 0.125)


def test_losses_that_are_no_numbers_become_gaps(tmp_path):
    path = write_run(tmp_path / "a") / METRICS_FILE
    path.write_text(path.read_text().replace('"loss": 0.25', '"loss": null'))
    run = read_run(tmp_path / "a", "a")
    assert np.isnan(run.valid["loss"]).sum() == 1
    assert run.best[1] == 1.1
    assert None in payload(page([run]))["runs"][0]["valid"][1]


def test_an_old_or_plain_run_without_layers_has_its_losses(tmp_path):
    path = write_run(tmp_path / "a", layers=0)
    (path / "adapter_config.json").unlink()
    rows = [json.loads(line) for line in (path / METRICS_FILE).read_text().splitlines()]
    for row in rows:
        for name in ("layers", "gradient_norm", "skipped", "peak_memory_gb"):
            row.pop(name, None)
    (path / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = page([read_run(path, "a")])
    assert 'id="chart-loss"' in html
    assert 'id="statistic"' not in html
    assert "chart-peak_memory_gb" not in html


def test_names_are_as_short_as_tells_runs_apart(tmp_path):
    paths = [write_run(tmp_path / a / b) for a, b in (("x", "run"), ("y", "run"))]
    assert [run.name for run in read_runs(paths)] == ["x/run", "y/run"]
    with pytest.raises(InputError, match="given twice"):
        read_runs([paths[0], paths[0]])
    assert short_layers(["model.layers.1.mlp.a", "model.layers.1.mlp.b"]) == ["1 mlp.a", "1 mlp.b"]
    assert short_layers(["something.else"]) == ["something.else"]


# --- what is said -------------------------------------------------------------------------------------------


def test_the_best_of_all_runs_is_marked_once_and_settings_that_differ_come_first(tmp_path):
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", beta=0.5)])
    runs[1].valid["loss"][:] = 2.0
    best = dict(tables.summary(runs))["Best validation loss"]
    assert [cell.best for cell in best] == [True, False]
    rows = tables.settings_table(runs)["rows"]
    assert [row["differs"] for row in rows] == [True] + [False] * (len(rows) - 1)
    assert rows[0] == {"name": "beta", "cells": ["0.9", "0.5"], "differs": True}


def test_names_cannot_break_the_page(tmp_path):
    html = page([read_run(write_run(tmp_path / "a"), "</script><img src=x onerror=alert(1)>")])
    assert "<img" not in html
    assert payload(html)["runs"][0]["name"].startswith("</script>")


def test_the_page_asks_nobody_for_anything(tmp_path):
    html = page([read_run(write_run(tmp_path / "a"), "a")])
    assert "default-src 'none'" in html
    for asks in ("<link", "<iframe", " src=", "@import", "url("):
        assert asks not in html.split("<script")[0], asks


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize(("colours", "ground"), [(RUNS_LIGHT, "#ffffff"), (RUNS_DARK, "#191e26")])
def test_lines_stand_out_from_their_ground(colours, ground):
    for colour in colours:
        high, low = sorted((luminance(colour), luminance(ground)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 3, colour


# --- the command --------------------------------------------------------------------------------------------


def test_a_run_that_was_trained(model_directory, data_directory, tmp_path):
    run = tmp_path / "run"
    train = [
        "lora", "--train", "--model", model_directory, "--data", data_directory, "--adapter-path", run, "--iters", 8,
        "--steps-per-report", 2, "--steps-per-eval", 4, "--save-every", 4, "--batch-size", 3, "--num-layers", -1,
    ]  # fmt: skip
    done = nalora(*train)
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "run.json").read_text())
    assert record["data"]["train"]["rows"] == 9
    assert record["settings"]["model"] == "model"
    assert str(tmp_path) not in (run / "run.json").read_text()

    done = nalora("report", run, "--model", model_directory, "--prompt", "what colour is the cat one ?")
    assert done.returncode == 0, done.stderr
    html = (run / "report" / "report.html").read_text()
    for name in ("loss.png", "speed.png", "layers.png"):
        assert (run / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert "Answers before and after" in html
    assert "9 rows, 162 tokens, 94% of them supervised" in html
    (found,) = payload(html)["runs"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert np.allclose(found["train"]["loss"], [[2, 4, 6, 8], losses], rtol=1e-4)
    assert found["grids"]["misalignment"]["x"] == [2, 4, 6, 8]

    # Channels in order of the last importance, as the state of the last checkpoint has it.
    from safetensors.numpy import load_file

    state = load_file(run / "checkpoints" / "step-0000008" / "training_state.safetensors")
    raw = state["importance.layers.model.layers.1.mlp.importance"] / (1 - 0.9**8)
    channels = found["channels"]["1"]
    assert channels["x"] == [4, 8]
    assert np.allclose([row[-1] for row in channels["z"]], np.sort(raw)[::-1], rtol=1e-4)

    # A new run moves the old one away whole, its report too.
    done = nalora(*train)
    assert done.returncode == 0, done.stderr
    assert (run / "previous" / "1" / "report" / "report.html").exists()
    assert (run / "previous" / "1" / "run.json").exists()
    assert not (run / "report").exists()


def test_every_refusal_is_one_line(tmp_path):
    run = write_run(tmp_path / "a")
    empty = tmp_path / "empty"
    empty.mkdir()
    foreign = tmp_path / "out" / "report.html"
    foreign.parent.mkdir()
    foreign.write_text("<p>mine</p>")
    for argv, said in (
        ([empty], "holds no metrics.jsonl"),
        ([tmp_path / "none"], "is no directory"),
        ([run, run], "given twice"),
        ([run, "--output", foreign.parent], "not a report of ours"),
        ([run, "--model", "m"], "go together"),
        ([run, "--watch", "--every", "0"], "--every 0"),
        ([run] * 9, "at most 8"),
    ):
        done = nalora("report", *argv)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr
        assert done.stderr.startswith("nalora report: error: ")
    assert foreign.read_text() == "<p>mine</p>"


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    from nalora_mlx.report import __main__ as command

    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "plotly" else name)
    with pytest.raises(InputError, match=r"needs plotly: pip install 'nalora-mlx\[report\]'"):
        command.run(command.build_parser("x").parse_args([str(tmp_path)]))


def test_watch_writes_anew_until_the_run_is_over(tmp_path):
    """The run is a claim on its directory, which another process holds until it is told to stop."""
    run = write_run(tmp_path / "a")
    hold = (
        "import sys; from pathlib import Path; from nalora_mlx.checkpoint import claim\n"
        f"with claim(Path({str(run)!r})): print('held', flush=True); sys.stdin.read()"
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
        assert payload(page_file.read_text())["refresh"] == 1
        record = {"split": "valid", "step": 44, "loss": 0.2, "tokens": 1, "seconds": 1, "best_loss": 0.2}
        with (run / METRICS_FILE).open("a") as file:
            file.write(json.dumps(record) + "\n")
        lines = iter(watch.stdout.readline, "")
        assert any(line.startswith("iteration 44: ") for line in lines)
    finally:
        holder.communicate("")
    assert watch.wait(60) == 0
    assert payload(page_file.read_text())["refresh"] is None
    assert 'id="pause"' not in page_file.read_text()
