"""Model cards: the objective of preference runs with its accuracy, and results of `nalora evaluate`."""

import json

import mlx.core as mx
import pytest

from nalora_mlx.export.model_card import adapter_card, write_card
from tests.report.report_evaluations import evaluated_run, measure, measures, write_evaluations
from tests.report.report_runs import write_preference_run, write_run


def cards(run, tmp_path, **more):
    """Return the cards of a run's adapter and of its merged model."""
    config = json.loads((run / "adapter_config.json").read_text())
    merged = tmp_path / "merged"
    merged.mkdir(exist_ok=True)
    write_card(
        merged, title="m", base="a/b", inherited={}, adapter=run, adapter_config=config, merge_quality=None
    )
    adapter = adapter_card("me/m", base="a/b", inherited={}, config=config, run=run, **more)
    return adapter, (merged / "README.md").read_text()


@pytest.mark.parametrize(
    ("mode", "name", "objective"),
    [
        ("dpo", "DPO", "DPO (sigmoid loss, beta 0.1)"),
        ("orpo", "ORPO", "ORPO (beta 0.1)"),
        ("kto", "KTO", "KTO (beta 0.1, weights 1 and 1)"),
        ("simpo", "SimPO", "SimPO (beta 0.1, margin 1)"),
    ],
)
def test_cards_name_the_objective_and_the_accuracy(tmp_path, mode, name, objective):
    run = write_preference_run(tmp_path / "run", [0.5, 0.9], mode=mode)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"split": "test", "loss": 0.25, "accuracy": 0.875, "tokens": 9}\n')
    for text in cards(run, tmp_path):
        assert f"with NA-LoRA on preferences ({name}), by nalora-mlx" in text
        assert f"| objective | {objective} |" in text
        assert "| validation accuracy before | 0.50 |" in text
        assert "| validation accuracy after | 0.90 (iteration 40) |" in text
        assert "| validation loss after | 0.6000 (iteration 40) |" in text
        assert "| test accuracy | 0.88 |" in text


def test_cards_of_supervised_runs_do_not(tmp_path):
    for text in cards(write_run(tmp_path / "run"), tmp_path):
        assert "with NA-LoRA, by nalora-mlx" in text
        for word in ("objective", "accuracy", "preferences"):
            assert word not in text


# --- evaluations --------------------------------------------------------------------------------------------

EVALUATION = """## Evaluation

`nalora evaluate` measured the base model, and the adapter on it, on the same rows. Differences of shares are in \
percentage points.

data, test: 14 rows

| | base | tuned | difference (95 % interval) | |
|---|---|---|---|---|
| loss | 2.310 | 1.040 | -1.270 (-1.400 to -1.100) | better |
| perplexity | 10.07 | 2.829 |  |  |
| exact match | 7.0% | 64.0% | +57.0 (+30.0 to +80.0) | better, McNemar p = 0.008 |
| token F1 | 0.410 | 0.440 | +0.030 (-0.100 to +0.100) | no difference can be told |

general text: 40 passages

| | base | tuned | difference (95 % interval) | |
|---|---|---|---|---|
| loss | 2.900 | 3.150 | +0.250 (+0.200 to +0.300) | worse |
| perplexity | 18.17 | 23.34 |  |  |
| KL(base \\|\\| tuned) | - | 0.170 |  |  |
"""


def test_cards_have_the_results_of_evaluations(tmp_path):
    for text in cards(evaluated_run(tmp_path / "run"), tmp_path):
        assert text.count(EVALUATION) == text.count("## Evaluation") == 1


def test_cards_without_evaluations_have_no_section(tmp_path):
    for text in cards(write_run(tmp_path / "run"), tmp_path):
        assert "Evaluation" not in text
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert "Evaluation" not in adapter_card("me/m", base="a/b", inherited={}, config=config, run=None)


def test_results_about_other_adapters_are_left_out(tmp_path):
    run = evaluated_run(tmp_path / "run", data="own")
    (run / "best").mkdir()
    (run / "best" / "adapter_config.json").write_text((run / "adapter_config.json").read_text())
    mx.save_safetensors(str(run / "best" / "adapters.safetensors"), {"a.lora_b": mx.zeros((2, 3))})
    write_evaluations(run, {"best": "of the best"})
    for text in cards(run, tmp_path):
        assert "own, test: 14 rows" in text
        assert "of the best" not in text
    for text in cards(run / "best", tmp_path):
        assert "own, test" not in text
        assert "of the best, test: 14 rows" in text
    mx.save_safetensors(str(run / "adapters.safetensors"), {"a.lora_b": mx.zeros((2, 3)) + 5})
    for text in cards(run, tmp_path):
        assert "## Evaluation" not in text


def test_scaled_adapters_have_no_results(tmp_path):
    adapter, _ = cards(evaluated_run(tmp_path / "run"), tmp_path, losses=False)
    assert "## Evaluation" not in adapter


def test_several_test_sets_have_a_table_each(tmp_path):
    """What two results have in common, such as general text, is there once."""
    run = evaluated_run(tmp_path / "run", data="one", created="2026-03-02")
    write_evaluations(run, {"": "two"}, created="2026-03-01")
    for text in cards(run, tmp_path):
        assert text.count("## Evaluation") == text.count("general text: 40 passages") == 1
        assert 0 < text.index("two, test: 14 rows") < text.index("one, test: 14 rows")


def test_names_do_not_break_the_table(tmp_path):
    odd = measure("m", (0.5, 0, 1), (0.5, 0, 1), (0, -0.1, 0.1), title="a|b\nc", unit="score")
    run = evaluated_run(tmp_path / "run", data="my\n\n# data|x", measures=[odd, *measures()[:1]])
    for text in cards(run, tmp_path):
        assert "\nmy # data|x, test: 14 rows\n\n| |" in text
        assert "| a\\|b c | 0.500 | 0.500 | 0.000 (-0.100 to +0.100) | no difference can be told |" in text


def test_infinite_intervals_are_left_out(tmp_path):
    few = measure("loss", (2, None, None), (1, None, None), (-1, None, None))
    for text in cards(evaluated_run(tmp_path / "run", measures=[few]), tmp_path):
        assert "| loss | 2.000 | 1.000 | -1.000 | no difference can be told |" in text
