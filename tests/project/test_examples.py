"""The examples: data in the documented format, configs that load, programs that run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nalora_mlx.core.config import load_run_config
from nalora_mlx.data.sources.loading import SPLITS

ROOT = Path(__file__).parents[2]
BAKERY = ROOT / "examples" / "bakery"


def rows(name):
    return [json.loads(line) for line in (BAKERY / f"{name}.jsonl").read_text().splitlines()]


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
