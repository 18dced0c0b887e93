"""The examples: data in the documented format, configs that load, programs that run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nalora_mlx.__main__ import main
from nalora_mlx.core.config import load_run_config
from nalora_mlx.data.sources.loading import SPLITS

ROOT = Path(__file__).parents[2]
BAKERY, MANNERS = ROOT / "examples" / "bakery", ROOT / "examples" / "manners"


def rows(name, directory=BAKERY):
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def test_the_bakery_data_has_its_documented_format():
    form = re.compile((BAKERY / "format.txt").read_text().strip())
    counts = {name: len(rows(name)) for name in SPLITS}
    assert counts["train"] >= 200
    assert min(counts.values()) >= 40
    prompts = [row["prompt"] for name in SPLITS for row in rows(name)]
    assert len(set(prompts)) == len(prompts)  # no duplicates, also between splits
    for name in SPLITS:
        for row in rows(name):
            assert set(row) == {"prompt", "completion"}
            assert form.fullmatch(row["completion"]), row
            # The order slip agrees with the message.
            customer = re.search(r"NAME: (.*)", row["completion"])[1]
            day = re.search(r"PICKUP: (\w+)", row["completion"])[1]
            assert customer in row["prompt"]
            assert day in row["prompt"]


def test_the_bakery_config_loads():
    config = load_run_config(BAKERY / "config.yaml", {})
    config.check()
    assert config.fine_tune_type == "na-lora"
    assert config.lora_config().active


# --- preferences ------------------------------------------------------------------------------------------------------


def test_the_pairs_equal_the_output_of_their_program(tmp_path):
    subprocess.run([sys.executable, MANNERS / "make.py", tmp_path], check=True)
    for name in SPLITS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (MANNERS / f"{name}.jsonl").read_bytes()


def test_the_pairs_have_their_documented_format():
    counts = {name: len(rows(name, MANNERS)) for name in SPLITS}
    assert counts == {"train": 252, "valid": 50, "test": 120}
    prompts = [row["prompt"] for name in SPLITS for row in rows(name, MANNERS)]
    assert len(set(prompts)) == len(prompts)  # no duplicates, also between splits
    for name in SPLITS:
        for row in rows(name, MANNERS):
            assert set(row) == {"prompt", "chosen", "rejected"}
            assert row["chosen"] != row["rejected"]
            assert len(re.findall(r"[.!?](?= |$)", row["chosen"])) <= 2, row  # sentences


def test_no_topic_of_the_pairs_is_in_two_splits():
    """The questions of topics.txt are each in the prompts of one split."""
    topics = (MANNERS / "topics.txt").read_text().splitlines()
    questions = [part.strip() for line in topics if "|" in line[1:] for part in line.split("|")[:2]]
    questions = [question for question in questions if not question.startswith("#")]
    assert len(questions) == 2 * (84 + 25 + 60)
    prompts = {name: [row["prompt"] for row in rows(name, MANNERS)] for name in SPLITS}
    for question in questions:
        found = {name for name in SPLITS if any(question in prompt for prompt in prompts[name])}
        assert len(found) == 1, question


@pytest.mark.parametrize("name", SPLITS)
def test_neither_length_nor_courtesy_tells_the_answers_apart(name):
    courteous = re.compile(r"of course|gladly|certainly|thank|happy|wonderful|delighted|pleasure", re.I)
    pairs = rows(name, MANNERS)
    shorter = sum(len(row["chosen"].split()) < len(row["rejected"].split()) for row in pairs) / len(pairs)
    assert 0.4 <= shorter <= 0.65
    assert sum(bool(courteous.search(row["rejected"])) for row in pairs) >= 0.1 * len(pairs)


@pytest.mark.parametrize("mode", ["dpo", "orpo", "simpo", "kto"])
def test_the_example_of_preferences_trains(mode, model_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the path of the data in the config is relative to it
    adapters = tmp_path / "adapters"
    flags = ["--config", MANNERS / "config.yaml", "--train-mode", mode, "--model", model_directory]
    few = [
        "--iters",
        2,
        "--val-batches",
        2,
        "--steps-per-report",
        1,
        "--no-samples",
        "--adapter-path",
        adapters,
    ]
    assert main(["lora", *map(str, (*flags, *few))]) == 0
    records = [json.loads(line) for line in (adapters / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["split"] == "train"] == [1, 2]
    assert all(0 <= record["accuracy"] <= 1 for record in records)
    assert (adapters / "adapters.safetensors").exists()


# --- programs ---------------------------------------------------------------------------------------------------------


def run_example(name, *arguments, directory):
    """Run a program of examples/ in a directory; return what it prints."""
    command = [sys.executable, ROOT / "examples" / name, *map(str, arguments)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_finetune_runs(model_directory, tmp_path):
    printed = run_example("finetune.py", model_directory, "adapters", 8, directory=tmp_path)
    before, after = map(float, re.search(r"validation loss ([\d.]+) -> ([\d.]+)", printed).groups())
    assert after < before
    assert len(re.findall(r"^> .*\nbefore: .*\nafter: ", printed, re.M)) == 3
    assert printed.endswith("adapters-merged\n")
    assert (tmp_path / "adapters-merged" / "model.safetensors").exists()


def test_the_training_loop_runs(model_directory, data_directory, tmp_path):
    printed = run_example("training_loop.py", model_directory, data_directory, 8, directory=tmp_path)
    assert "model.layers.0.mlp: silu" in printed
    before, after = map(float, re.search(r"validation loss ([\d.]+) -> ([\d.]+)", printed).groups())
    assert after < before
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_page_of_models_is_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "model_table.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
