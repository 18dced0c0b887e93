"""The training benchmark: tokens and compiled graphs that it counts, for mlx-lm and for our trainers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_training.py"


@pytest.mark.parametrize("trainer", ["mlx_lm.lora", pytest.param("lora", marks=pytest.mark.slow), "na-lora"])
def test_the_benchmark_counts_tokens_and_graphs(trainer, model_directory, tmp_path):
    rows = [{"prompt": "one two", "completion": " three four five"}] * 16
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, SCRIPT, "--model", model_directory, "--data", tmp_path, "--batch-size", "2"]
    command += [
        "--report",
        "2",
        "--warmup",
        "2",
        "--iters",
        "2",
        "--num-layers",
        "1",
        "--worker",
        trainer,
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    # There is one batch shape, and reports compile nothing. mlx-lm compiles again once its optimizer has a state.
    assert result["compiled"] == (2 if trainer == "mlx_lm.lora" else 1)
    assert result["tokens"] > 0
    assert result["tokens"] % 4 == 0  # four equal rows
    assert result["above_weights_gb"] > 0
