"""The training benchmark: what it counts of a run, for the peer and for our trainers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_training.py"


@pytest.mark.parametrize("trainer", ["mlx_lm.lora", "lora", "na-lora"])
def test_a_measurement_counts_tokens_and_graphs(trainer, model_directory, tmp_path):
    rows = [{"prompt": "one two", "completion": " three four five"}] * 16
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = [sys.executable, SCRIPT, "--model", model_directory, "--data", tmp_path, "--batch-size", "2"]
    run += ["--report", "2", "--warmup", "2", "--iters", "2", "--num-layers", "1", "--worker", trainer, "0"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # There is one batch shape, and reports compile nothing. mlx-lm compiles again once its optimizer has a state.
    assert found["compiled"] == (2 if trainer == "mlx_lm.lora" else 1)
    assert found["tokens"] > 0
    assert found["tokens"] % 4 == 0  # four equal rows
    assert found["above_weights_gb"] > 0
