"""Model cards of preference runs: the objective, its settings, and the accuracy."""

import json

import pytest

from nalora_mlx.export.model_card import adapter_card, write_card
from tests.report.report_runs import write_preference_run, write_run


def cards(run, tmp_path):
    """Return the cards of a run's adapter and of its merged model."""
    config = json.loads((run / "adapter_config.json").read_text())
    merged = tmp_path / "merged"
    merged.mkdir()
    write_card(
        merged, title="m", base="a/b", inherited={}, adapter=run, adapter_config=config, merge_quality=None
    )
    adapter = adapter_card("me/m", base="a/b", inherited={}, config=config, run=run)
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
