"""The preference benchmark: the rows that it makes, what it counts, and its comparison with mlx-lm-lora."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_preference.py"
sys.path.append(str(SCRIPT.parent))

import benchmark_preference  # noqa: E402
from benchmark_preference import Recorder, question_pair, table  # noqa: E402


def measure(contender, model, tmp_path):
    """Return what a worker of the benchmark measures on four pairs of equal lengths."""
    rows = [{"prompt": "one two", "chosen": "three cat dog", "rejected": "red blue"}] * 4
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, SCRIPT, "--model", model, "--data", tmp_path, "--batch-size", "2"]
    command += ["--report", "2", "--warmup", "2", "--iters", "2", "--num-layers", "1"]
    done = subprocess.run([*command, "--worker", contender, "0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "contender",
    [
        "na-lora",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora-on-the-fly", "kto-without-z")),
    ],
)
def test_the_benchmark_counts_tokens_graphs_and_batches_of_the_reference(
    contender, model_directory, tmp_path
):
    result = measure(contender, model_directory, tmp_path)
    assert result["compiled"] == 1
    tokens = {tokens for _, _, tokens, _ in result["steps"]}
    assert len(result["steps"]) == 2
    assert tokens == {result["tokens_per_step"]}
    assert 0 < result["above_weights_gb"] < result["peak_gb"]
    precomputed = "on-the-fly" not in contender
    assert (result["reference_seconds"] > 0) == (result["reference_seconds_per_batch"] > 0) == precomputed
    assert (result["ms_per_token_with_reference"] > result["ms_per_token"]) == precomputed


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm_lora") is None, reason="needs mlx-lm-lora (pip install mlx-lm-lora)"
)
def test_both_programs_compute_the_same_loss(model_directory, tmp_path):
    losses = measure(benchmark_preference.CHECK, model_directory, tmp_path)
    assert losses["loss"] == pytest.approx(losses["their_loss"], rel=benchmark_preference.TOLERANCE)
    assert losses["tokens"] == losses["their_tokens"]
    assert losses["answer_tokens"] == losses["their_answer_tokens"]


def test_a_step_that_compiles_is_not_counted():
    recorder = Recorder()
    recorder.reference_times = [0.0, 5.0, 6.0, 7.0]
    for step, wall in enumerate((0, 10, 20, 28, 32)):
        recorder.marks.append((wall, 2 * wall))
        if step < 4:
            recorder.sizes.append((100, 50))
        if step in (0, 2):
            recorder.add_graph()
    result = recorder.result(warmup=1)  # of the steps of 10, 8 and 4 seconds, that of 8 compiles
    assert result["seconds_per_step"] == 7
    assert result["ms_per_token"] == 70
    assert result["cpu_ms_per_token"] == 140
    assert result["reference_seconds_per_batch"] == 1
    assert result["reference_seconds"] == 7
    assert result["ms_per_token_with_reference"] == 80
    assert result["ms_per_token_with_compiling"] == pytest.approx(22e3 / 300)
    assert result["inputs_per_token"] == 0.5


def test_questions_become_pairs():
    choices = "Answer1: a cat Answer2: a dog Answer3: a red bird Answer4: none"
    row = {"prompt": f"Please choose: question: What barks?\n\n{choices}\n\nAnswer format: answer1"}
    pair = question_pair([row | {"answer": "answer2"}])
    assert pair == {
        "prompt": "What barks?\n- a cat\n- a dog\n- a red bird\n- none",
        "chosen": "a dog",
        "rejected": "a red bird",
    }
    both = question_pair([row | {"answer": "answer2"}, row | {"answer": "answer4"}])
    assert both["chosen"] == "What barks? a dog\nWhat barks? none"
    assert both["rejected"] == "What barks? a red bird\nWhat barks? a cat"


def test_the_table_compares_rounds_with_the_targets():
    names = set(benchmark_preference.MEASURES.values())
    results = [
        {"contender": contender, "repeat": repeat, **dict.fromkeys(names, value)}
        for repeat, (theirs, ours) in enumerate([(10.0, 4.0), (20.0, 10.0), (5.0, 3.0)])
        for contender, value in ((benchmark_preference.THEIRS, theirs), ("lora", ours))
    ]
    text = table(results, [benchmark_preference.THEIRS, "lora"])
    assert "| ms per token | 10 | 4 (0.50) |" in text
    assert "lora / mlx-lm-lora, ms_per_token: 0.50 (target 0.6: met)" in text
    assert "lora / mlx-lm-lora, peak_gb: 0.50 (target 0.5: met)" in text
