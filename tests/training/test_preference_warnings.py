"""Warnings of preference training: when, once, and with advice that fits the loss; and the line of a test."""

import json
import math
from dataclasses import asdict

import pytest

import nalora_mlx
from nalora_mlx.core.config import PreferenceConfig
from nalora_mlx.runs.progress import Progress
from nalora_mlx.training.evaluation import Evaluation
from nalora_mlx.training.preferences.loss import MEASURES
from nalora_mlx.training.preferences.warnings import MIN_ROWS, new_warnings
from nalora_mlx.training.test_set import describe_test

BEFORE = {"accuracy": 0.5, "chosen_logp": -2.0, "accuracy_longer": 0.5, "accuracy_shorter": 0.5, "kl": 0.0}
LONG = {"accuracy_longer": 0.75, "accuracy_shorter": 0.25}
COLLAPSED = {"chosen_logp": -2.75}
FAR = {"kl": 1.25}


def warnings(later, mode="dpo", rows=MIN_ROWS, before=BEFORE, **settings):
    """Return the warnings at a validation that follows one before training."""
    progress, config = Progress(), PreferenceConfig(train_mode=mode, **settings)
    assert new_warnings(progress, before, config, rows) == []
    return new_warnings(progress, {**before, **later}, config, rows)


def test_each_failure_is_found():
    assert warnings({}) == []
    assert warnings({"chosen_logp": -2.4, "accuracy_longer": 0.9, "accuracy_shorter": 0.8, "kl": 0.9}) == []
    assert warnings(COLLAPSED) == [
        "the chosen answers have become less likely, too, by 0.75 nats per token; lower the learning rate, raise "
        "--preference-beta, or use --train-mode orpo, which also trains on the chosen answers"
    ]
    assert warnings(LONG) == [
        "the model prefers long answers: accuracy is 0.75 where the chosen answer is the longer one, and 0.25 where "
        "it is the shorter one; add rows whose chosen answer is the shorter one, or use --length-normalized or "
        "--train-mode simpo"
    ]
    assert warnings({"accuracy_longer": 0.25, "accuracy_shorter": 0.75})[0].startswith(
        "the model prefers short answers: accuracy is 0.75 where the chosen answer is the shorter one, and 0.25 "
    )
    assert warnings(FAR) == [
        "the model has moved far from what it was before training, by a KL divergence of 1.25 nats per token; lower "
        "the learning rate, or raise --preference-beta"
    ]
    assert len(warnings(COLLAPSED | LONG | FAR)) == 3


def test_lengths_need_enough_rows_and_a_change():
    assert warnings(LONG, rows=MIN_ROWS - 1) == []
    # SimPO has no reference, so the accuracies before training are those of the model.
    before = BEFORE | {"accuracy_longer": 0.9, "accuracy_shorter": 0.1}
    assert warnings(LONG, "simpo", before=before) == []
    assert len(warnings(LONG, "simpo", before=before | {"accuracy_shorter": 0.3})) == 1


@pytest.mark.parametrize(
    ("mode", "settings", "collapse", "normalize"),
    [
        ("dpo", {}, "raise --preference-beta, or use --train-mode orpo", True),
        ("dpo", {"dpo_loss": "ipo"}, "raise --preference-beta, or use --train-mode orpo", False),
        ("dpo", {"length_normalized": True}, "raise --preference-beta, or use --train-mode orpo", False),
        ("simpo", {}, "raise --preference-beta, or use --train-mode orpo", False),
        ("orpo", {}, "lower --preference-beta, or train fewer iterations", False),
        ("kto", {}, "raise --preference-beta, or raise --desirable-weight", False),
    ],
)
def test_the_advice_fits_the_loss(mode, settings, collapse, normalize):
    (text,) = warnings(COLLAPSED, mode, **settings)
    assert collapse in text
    assert ("answers with label true" in text) == (mode == "kto")
    (text,) = warnings(LONG, mode, **settings)
    assert ("--length-normalized" in text) == normalize
    # ORPO also trains on the chosen answers as supervised training does, so that it is meant to move.
    assert len(warnings(FAR, mode, **settings)) == (mode != "orpo")


def test_each_kind_is_given_once_also_after_a_resume():
    config, progress = PreferenceConfig(train_mode="dpo"), Progress()
    new_warnings(progress, BEFORE, config, 50)
    assert len(new_warnings(progress, BEFORE | FAR, config, 50)) == 1
    assert new_warnings(progress, BEFORE | FAR, config, 50) == []
    resumed = Progress(**json.loads(json.dumps(asdict(progress))))
    assert new_warnings(resumed, BEFORE | FAR, config, 50) == []
    assert resumed.warned == ["drift"]
    assert len(new_warnings(resumed, BEFORE | FAR | COLLAPSED, config, 50)) == 1


@pytest.mark.parametrize("mode", ["dpo", "kto"])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_missing_and_broken_measures_never_raise_or_warn(mode, bad):
    """KTO's rows may all have one label, and weights may break."""
    everything = dict.fromkeys((*MEASURES, "kl"), 0.0)
    for name in everything:
        broken = (
            {**everything, name: bad}
            if bad is not None
            else {k: everything[k] for k in everything if k != name}
        )
        for before, later in ((broken, broken), (everything, broken), (broken, everything)):
            assert warnings(later, mode, before=before) == []
    progress, config = Progress(), PreferenceConfig(train_mode=mode)
    new_warnings(progress, dict.fromkeys(everything, math.nan if bad is None else bad), config, 50)
    json.dumps(asdict(progress), allow_nan=False)


def test_a_missing_measure_before_training_is_no_collapse():
    assert warnings({"chosen_logp": -9.0}, "kto", before={"accuracy": 0.5}) == []
    assert warnings({"chosen_logp": -9.0}, "kto", before={"accuracy": 0.5, "chosen_logp": math.nan}) == []


def test_a_run_warns_once_also_after_a_resume(model_directory, tmp_path, capsys):
    words = {"cat": "red", "dog": "blue", "bird": "green"}
    rows = [
        {"prompt": f"what is the {a} ?", "chosen": f"the {a} is {b}", "rejected": "one two"}
        for a, b in words.items()
    ]
    settings = {"train_mode": "dpo", "iters": 4, "batch_size": 3, "learning_rate": 0.1, "steps_per_eval": 2}
    run = {"train": rows, "valid": rows}, tmp_path / "run"
    nalora_mlx.finetune(model_directory, *run, **settings, save_every=2, samples=False)
    assert capsys.readouterr().out.count("the model has moved far from what it was before training") == 1
    metrics = [json.loads(line) for line in (run[1] / "metrics.jsonl").read_text().splitlines()]
    valid = [record for record in metrics if record["split"] == "valid"]
    assert [record["first_accuracy"] for record in valid] == [0.5] * 3
    assert valid[-1]["kl"] > 1
    nalora_mlx.finetune(None, run[0], run[1], resume=True, iters=6)
    shown = capsys.readouterr().out
    assert "validation loss" in shown
    assert "moved far" not in shown


def test_the_line_of_a_test():
    assert describe_test(Evaluation(0.5, 1200, {})) == "test loss 0.5000, perplexity 1.649, over 1,200 tokens"
    found = {"accuracy": 0.875, "chosen_reward": 0.5, "rejected_reward": -0.25, "chosen_logp": -1.0}
    assert describe_test(Evaluation(0.5, 1, found)) == (
        "test loss 0.5000, accuracy 0.88, margin 0.750, over 1 token"
    )
    assert describe_test(Evaluation(0.5, 9, {"accuracy": 1.0, "chosen_reward": 0.5})) == (
        "test loss 0.5000, accuracy 1.00, over 9 tokens"
    )
