"""RUN/evaluations/: where results of `nalora evaluate` are, which of them hold, and their rows as text."""

import json
import os
import re
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from nalora_mlx.__main__ import main
from nalora_mlx.adapters.merge_record import adapter_digest
from nalora_mlx.report.page import render_page
from nalora_mlx.report.run_data import read_runs
from nalora_mlx.runs import evaluations
from nalora_mlx.runs.evaluation_rows import by_part, format_value, measure_rows, part_title
from nalora_mlx.runs.evaluations import (
    evaluation_file,
    evaluations_of,
    read_evaluations,
    run_of,
    write_evaluation,
)
from tests.report.report_evaluations import evaluation, measure, write_evaluations
from tests.report.report_runs import write_run

STEP = "step-0000020"


@pytest.fixture
def run(tmp_path):
    """Return a run with three different adapters: its own, the best one, and that of a checkpoint."""
    path = write_run(tmp_path / "tuned")
    for number, directory in enumerate((path, path / "best", path / "checkpoints" / STEP)):
        write_adapter(directory, number + 1.0)
    return path


def write_adapter(directory, value):
    directory.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(directory / "adapters.safetensors"), {"a.lora_b": mx.full((2, 3), value)})


# --- where results are --------------------------------------------------------------------------------------


def test_the_run_of_an_adapter(run, monkeypatch):
    best, step = run / "best", run / "checkpoints" / STEP
    assert run_of(run) == (run, "")
    assert run_of(best) == (run, "best")
    assert run_of(step) == (run, STEP)
    assert run_of(Path(f"{best}/")) == (run, "best")
    monkeypatch.chdir(run.parent)
    assert run_of(Path("tuned")) == (Path("tuned"), "")
    assert run_of(Path("tuned/best")) == (Path("tuned"), "best")
    assert run_of(Path("./tuned/checkpoints") / STEP) == (Path("tuned"), STEP)
    monkeypatch.chdir(run)
    assert run_of(Path("best")) == (Path(), "best")
    assert run_of(Path("checkpoints") / STEP) == (Path(), STEP)
    for directory, name in ((best, "best"), (step, STEP)):
        monkeypatch.chdir(directory)
        assert run_of(Path()) == (run.resolve(), name)
    monkeypatch.setenv("HOME", str(run.parent))
    assert run_of(Path("~/tuned/best")) == (run, "best")


def test_links_lead_to_the_run(run, tmp_path):
    for target in (run, run / "best", run / "checkpoints" / STEP):
        (tmp_path / f"link to {target.name}").symlink_to(target)
    assert run_of(tmp_path / "link to tuned") == (tmp_path / "link to tuned", "")
    assert run_of(tmp_path / "link to tuned" / "best") == (tmp_path / "link to tuned", "best")
    assert run_of(tmp_path / "link to best") == (run.resolve(), "best")
    assert run_of(tmp_path / f"link to {STEP}") == (run.resolve(), STEP)
    (run / "latest").symlink_to(run / "checkpoints" / STEP)
    assert run_of(run / "latest") == (run.resolve(), STEP)


def test_directories_may_have_the_names_of_a_runs_parts(tmp_path):
    """A run called best, a download called best, and runs in a directory called checkpoints."""
    for path in (tmp_path / "a" / "best", tmp_path / "a" / "checkpoints" / "small"):
        assert run_of(write_run(path)) == (path, "")
    inner = write_run(write_run(tmp_path / "b") / "best")
    assert run_of(inner) == (inner, "")
    download = tmp_path / "best"
    write_adapter(download, 1.0)
    assert run_of(download) == (download, "")


NAMES = {  # name of a test set -> start of its file's name
    "data": "data-test",
    "test.jsonl": "test.jsonl-test",
    "Prüfung.jsonl": "Prüfung.jsonl-test",
    "my data.jsonl": "my_data.jsonl-",
    "my_data.jsonl": "my_data.jsonl-test",
    "my  data.jsonl": "my_data.jsonl-",
    "my\ndata.jsonl": "my_data.jsonl-",
    "org/data": "org_data-",
    "other/data": "other_data-",
    "org/data, other/data": "org_data_other_data-",
    "a.jsonl, b.jsonl": "a.jsonl_b.jsonl-",
    "../../data": "_.._data-",
    ".data": "data-",
    "???": "_-",
    "..": "",
    "x" * 300: "x" * 48 + "-",
    "x" * 301: "x" * 48 + "-",
    "東" * 300: "東" * 48 + "-",
}


def test_each_test_set_has_its_file(run):
    files = {}
    for name, start in NAMES.items():
        for adapter in (run, run / "best", run / "checkpoints" / STEP):
            path = evaluation_file(adapter, name, "test")
            assert path.parent == run / "evaluations"
            assert path.name.startswith(start)
            assert path.name.endswith(f"-{run_of(adapter)[1]}.json" if adapter != run else "-test.json")
            assert not path.name.startswith((".", "-"))
            write_evaluation(path.with_name(f"{path.stem}-checkpoints.json"), {})  # the longest name in use
            write_evaluation(path, {"name": name})
            assert files.setdefault(path, (name, adapter)) == (name, adapter)
    assert len(files) == 3 * len(NAMES)
    assert all(json.loads(path.read_text())["name"] == name for path, (name, _) in files.items())
    general = [evaluation_file(each, None, "test").name for each in (run, run / "best")]
    assert general == ["general.json", "general-best.json"]
    assert evaluation_file(run, "data", "valid").name == "data-valid.json"


def test_an_unwritable_directory_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r".+"):
        write_evaluation(tmp_path / "file" / "evaluations" / "data-test.json", {})


# --- which results hold -------------------------------------------------------------------------------------


def names(found):
    return [content["adapters"][0]["name"] for content in found]


def test_results_of_the_runs_adapters_are_read(run):
    write_evaluations(run, {"": "a", "best": "b", f"checkpoints/{STEP}": "c"})
    assert sorted(names(read_evaluations(run))) == ["tuned", "tuned/best"]
    assert names(evaluations_of(run)) == ["tuned"]
    assert names(evaluations_of(run / "best")) == ["tuned/best"]
    assert names(evaluations_of(run / "checkpoints" / STEP)) == [f"tuned/{STEP}"]
    html = render_page(read_runs([run]))
    assert html.count("a, test: 14 rows") == html.count("b, test: 14 rows") > 0
    assert "c, test: 14 rows" not in html


def test_the_oldest_comes_first(run):
    for name, created in (("a", "2026-03-02"), ("b", "2026-03-01"), ("c", "2026-03-03")):
        write_evaluations(run, {"": name}, created=created)
    assert [content["data"] for content in read_evaluations(run)] == ["b", "a", "c"]


def test_of_equal_adapters_the_newest_result_holds(run):
    """The best adapter may be the last one. The report names both, and a card is about the adapter."""
    shutil.copy(run / "adapters.safetensors", run / "best")
    write_evaluations(run, {"": "data"}, created="2026-03-02")
    write_evaluations(run, {"best": "data"}, created="2026-03-01")
    assert names(read_evaluations(run)) == ["tuned/best", "tuned"]
    assert names(evaluations_of(run)) == names(evaluations_of(run / "best")) == ["tuned"]


def test_a_changed_adapter_has_no_results(run):
    write_evaluations(run, {"": "data", "best": "data"})
    write_adapter(run, 7.0)
    assert names(read_evaluations(run)) == ["tuned/best"]
    write_adapter(run, 1.0)  # as before: what counts are the values, not the file
    assert sorted(names(read_evaluations(run))) == ["tuned", "tuned/best"]
    (run / "adapters.safetensors").unlink()
    shutil.rmtree(run / "best")
    assert read_evaluations(run) == evaluations_of(run) == []
    (run / "adapters.safetensors").write_bytes(b"damaged")
    assert read_evaluations(run) == []


DAMAGED = {
    "empty": "",
    "cut": json.dumps(evaluation("tuned", "0"))[:-200],
    "no object": "[1, 2]",
    "binary": b"\xff\xfe\x00",
    "null": "null",
    "checkpoints": json.dumps(evaluation("tuned", "0") | {"adapters": []}),
}
CHANGED = {
    "newer": {"format": 2},
    "no format": {"format": None},
    "adapters": {"adapters": {"name": "tuned"}},
    "adapter": {"adapters": ["tuned"]},
    "no digest": {"adapters": [{"name": "tuned", "measures": []}]},
    "null digest": {"adapters": [{"name": "tuned", "digest": None, "measures": []}]},
    "measures": {"adapters": [{"name": "tuned", "digest": "0", "measures": None}]},
    "measure": {"adapters": [{"name": "tuned", "digest": "0", "measures": [{"name": "loss"}]}]},
}


@pytest.mark.parametrize("case", [*DAMAGED, *CHANGED])
def test_damaged_and_newer_files_are_left_out(run, case):
    write_evaluations(run, {"": "data"})
    (good,) = (run / "evaluations").iterdir()
    content = json.loads(good.read_text())
    if case in CHANGED:
        digest = content["adapters"][0]["digest"]
        text = json.dumps(content | CHANGED[case]).replace('"digest": "0"', f'"digest": "{digest}"')
    else:
        text = DAMAGED[case]
    path = run / "evaluations" / "another.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_evaluations(run) == [content]
    render_page(read_runs([run]))


@pytest.mark.parametrize("key", ["created", "model", "data", "split", "rows", "of", "passages", "adapters"])
def test_results_without_a_key_are_left_out(run, key):
    content = evaluation("tuned", adapter_digest(run / "adapters.safetensors"))
    del content[key]
    write_evaluation(run / "evaluations" / "a.json", content)
    assert read_evaluations(run) == []


def test_unfinished_files_are_left_out(run):
    write_evaluations(run, {"": "data"})
    (path,) = (run / "evaluations").iterdir()
    shutil.copy(path, path.with_name(f".{path.stem}.123.json"))
    assert len(read_evaluations(run)) == 1


def test_a_result_about_no_adapter_is_left_out(tmp_path):
    """Neither the run nor its result has a digest."""
    run = write_run(tmp_path / "run")
    write_evaluation(run / "evaluations" / "a.json", evaluation("run", None))
    assert read_evaluations(run) == evaluations_of(run) == []


def test_adapters_are_read_only_if_there_are_results(run, monkeypatch):
    """They may have gigabytes, and a report is written again and again during training."""
    monkeypatch.setattr(evaluations, "adapter_digest", pytest.fail)
    assert read_evaluations(run) == evaluations_of(run) == []


# --- later runs ---------------------------------------------------------------------------------------------

FLAGS = "--iters 4 --batch-size 2 --save-every 2 --steps-per-eval 2 --num-layers 1 --rank 2 --no-samples"


def test_training_again_archives_results_and_resuming_leaves_out_outdated_ones(
    model_directory, data_directory, tmp_path
):
    run, model = tmp_path / "run", ["--model", str(model_directory)]
    train = ["lora", "--train", *model, "--data", str(data_directory), "--adapter-path", str(run)]
    evaluate = ["evaluate", *model, "--adapter-path", str(run), "--metric", "none", "--general", "none"]
    assert main([*train, *FLAGS.split()]) == 0
    assert main(evaluate) == 0
    (path,) = (run / "evaluations").iterdir()
    assert re.fullmatch(rf"{data_directory.name}-test-[0-9a-f]{{6}}\.json", path.name)
    assert names(read_evaluations(run)) == ["run"]
    # Longer training changes the adapter, and its result no longer holds.
    assert main(["lora", "--resume", "--adapter-path", str(run), "--iters", "6"]) == 0
    assert path.exists()
    assert read_evaluations(run) == []
    assert main(evaluate) == 0
    text = path.read_text()
    assert names(read_evaluations(run)) == ["run"]
    # A new run in the same directory moves the old one aside, with its results.
    assert main([*train, *FLAGS.split(), "--seed", "1"]) == 0
    assert not (run / "evaluations").exists()
    archive = run / "previous" / os.listdir(run / "previous")[-1]
    assert (archive / "evaluations" / path.name).read_text() == text
    assert names(read_evaluations(archive)) == ["run"]


# --- rows ---------------------------------------------------------------------------------------------------


def rows(*entries):
    return list(measure_rows(entries))


def test_a_loss_has_its_perplexity():
    loss, perplexity = rows(measure("loss", (2.0, 1.9, 2.1), (1.5, 1.4, 1.6), (-0.5, -0.6, -0.4), "better"))
    assert loss == ("loss", "2.000", "1.500", "-0.500", "-0.600 to -0.400", "better", "better")
    assert perplexity == ("perplexity", "7.389", "4.482", "", "", "", "")
    _, perplexity = rows(measure("general_loss", (1e6, None, None), None))
    assert perplexity[1:3] == ("1.014e+304", "-")


def test_shares_differ_by_points():
    share = measure(
        "exact", (0.125, 0, 0.3), (1.0, 0.9, 1), (0.875, 0.8, 0.9), "better", unit="share", p=0.0004
    )
    assert rows(share) == [
        ("exact", "12.5%", "100.0%", "+87.5", "+80.0 to +90.0", "better", "better, McNemar p < 0.001")
    ]
    score = measure("rouge", (0.125, 0, 0.3), (0.1, 0, 1), (-0.025, -0.03, -0.01), "worse", unit="score")
    assert rows(score) == [("rouge", "0.125", "0.100", "-0.025", "-0.030 to -0.010", "worse", "worse")]


@pytest.mark.parametrize(
    ("p", "text"),
    [(1.0, "= 1.000"), (0.0499, "= 0.050"), (0.001, "= 0.001"), (0.00099, "< 0.001"), (0, "< 0.001")],
)
def test_p_values(p, text):
    (row,) = rows(measure("exact", (0, 0, 0), (0, 0, 0), (0, 0, 0), p=p, unit="share"))
    assert row.verdict == f"no difference can be told, McNemar p {text}"


@pytest.mark.parametrize("unit", ["share", "score"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-5, -1e-5])
def test_zero_has_no_sign(unit, value):
    (row,) = rows(measure("exact", (0, 0, 0), (0, 0, 0), (value, value, value), unit=unit))
    zero = {"share": "0.0", "score": "0.000"}[unit]
    assert (row.difference, row.interval) == (zero, f"{zero} to {zero}")


def test_infinite_intervals_are_left_out():
    """They are null in JSON."""
    row, _ = rows(measure("loss", (2, None, None), (1, None, None), (-1, None, None)))
    assert row == ("loss", "2.000", "1.000", "-1.000", "", "", "no difference can be told")


def test_what_is_not_compared_has_no_difference():
    (kl,) = rows(measure("kl", None, (0.25, 0.2, 0.3)))
    assert kl == ("kl", "-", "0.250", "", "", "", "")
    (row,) = rows(measure("exact", (0, 0, 0), None, (None, None, None)))
    assert (row.tuned, row.difference, row.interval) == ("-", "-", "")
    assert format_value([None, None, None], "score") == "-"


def test_parts_keep_their_order():
    entries = [
        measure(name, None, None, part=part)
        for name, part in zip("abcd", ("test", "general") * 2, strict=True)
    ]
    found = by_part(entries)
    assert {part: [entry["name"] for entry in of] for part, of in found.items()} == {
        "test": ["a", "c"],
        "general": ["b", "d"],
    }
    content = {"data": "words", "split": "valid", "rows": 1, "of": 1, "passages": 1}
    titles = [part_title(content, part) for part in ("test", "general", "tasks")]
    assert titles == ["words, valid: 1 row", "general text: 1 passage", "standard tasks"]
    content |= {"rows": 1000, "of": 2000, "passages": 1000}
    assert [part_title(content, part) for part in ("test", "general")] == [
        "words, valid: 1,000 of 2,000 rows",
        "general text: 1,000 passages",
    ]
