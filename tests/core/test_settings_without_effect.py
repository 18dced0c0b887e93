"""A setting that was given and has no effect in a run is said, once, with the reason; others are not."""

import re

import pytest

from nalora_mlx.core.config import NALoRAConfig, RunConfig, load_run_config
from nalora_mlx.core.settings_without_effect import RULES, without_effect, without_effect_in_length

TRAIN = {"train": True}


def notices(tmp_path, text="", **flags):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    config = load_run_config(path, TRAIN | flags)
    config.check()
    return [notice.replace(str(path), "FILE") for notice in without_effect(config)]


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("fine_tune_type: full", {"rank": 4}, ["--rank has no effect in full fine-tuning, which has no adapter"]),
        (
            "fine_tune_type: full\nlora_parameters: {scale: 2, dropout: 0.1, rank: 8}",
            {},
            [
                "scale, dropout (lora_parameters in FILE) have no effect in full fine-tuning, which has no adapter"
            ],  # rank is 8 by default
        ),
        ("fine_tune_type: lora", {"beta": 0.9}, ["--beta has no effect without fine_tune_type na-lora"]),
        ("", {"keep_fraction": 0.2}, ["--keep-fraction has no effect without mask hard"]),
        ("na_parameters: {mask: hard}", {"keep_fraction": 0.2}, []),
        ("na_parameters: {mask: 'off'}", {"route": True}, ["--route has no effect while mask is off"]),
        ("", {"step_scaling": False, "gamma": [1.0, 1, 1]}, ["--gamma has no effect while step_scaling is off"]),
        ("", {"grad_checkpoint_every": 1}, ["--grad-checkpoint-every has no effect without --grad-checkpoint"]),
        ("grad_checkpoint: true", {"grad_checkpoint_every": 2}, []),
        ("", {"resume_anyway": True}, ["--resume-anyway has no effect without --resume"]),
        (
            "resume_adapter_file: a",
            {"resume": "latest"},
            ["resume_adapter_file (FILE) has no effect with --resume, which has a checkpoint"],
        ),
        ("project_name: a", {}, ["project_name (FILE) has no effect without report_to"]),
        ("", {"last_turn_only": True}, ["--last-turn-only has no effect without --mask-prompt"]),
        (
            "data: a\nhf_dataset: {path: b}",
            {},
            ["data (FILE) has no effect with hf_dataset, which says where the data is"],
        ),
        ("test_batches: 3", {}, []),  # for another job
        ("", {"test_batches": 3}, ["--test-batches has no effect without --test"]),
        (
            "iters: 3",
            {"train": False, "test": True, "rank": 4, "save_every": 3},
            ["--rank, --save-every have no effect without --train: the adapter is tested as it was trained"],
        ),
        (
            "optimizer_config: {adam: {}, adamw: {weight_decay: 0.1}}",
            {},
            ["optimizer_config.adamw has no effect with optimizer adam"],
        ),
        ("optimizer_config: {adamw: {weight_decay: 0.1}}", {"optimizer": "adamw"}, []),
        (
            "",
            {"preset": "paper", "fine_tune_type": "lora"},
            ["--preset has no effect without fine_tune_type na-lora"],
        ),
        ("preset: paper", {}, []),
        (
            "optimizer: adafactor\nlr_schedule: {name: cosine_decay, arguments: [1e-5, 1000]}",
            {"learning_rate": 0.1},
            [
                f"{name} has no effect with adafactor, which computes its own rate: set optimizer_config: "
                "{adafactor: {relative_step: false}}"
                for name in ("lr_schedule (FILE)", "--learning-rate")
            ],
        ),
        (
            "optimizer: adafactor\noptimizer_config: {adafactor: {relative_step: false}}",
            {"learning_rate": 0.1},
            [],
        ),
    ],
)  # fmt: skip
def test_each_is_said_once(text, flags, expected, tmp_path):
    assert notices(tmp_path, text, **flags) == expected


SCHEDULE = "lr_schedule: {name: cosine_decay, arguments: [1e-5, 1000]}\n"


@pytest.mark.parametrize(
    ("text", "flags", "named"),
    [
        (SCHEDULE, {"learning_rate": 1e-3}, "--learning-rate 0.001"),
        (SCHEDULE + "learning_rate: 2e-5", {}, "learning_rate (FILE) 2e-05"),
        (SCHEDULE, {"learning_rate": 1e-5}, None),  # the same
        (SCHEDULE, {}, None),
        ("", {"learning_rate": 1e-3}, None),
    ],
)
def test_the_rate_that_a_schedule_replaces(text, flags, named, tmp_path):
    expected = (
        f"{named} has no effect: lr_schedule sets the learning rate, from 1e-05; change the arguments of "
        + ("lr_schedule, or remove it")
    )
    assert notices(tmp_path, text, **flags) == ([expected] if named else [])


def test_a_flag_for_the_data_overrides_the_hub_data_set_of_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("hf_dataset: {path: b}\ndata: a")
    assert load_run_config(path, TRAIN | {"data": "mine"}).hf_dataset is None
    assert load_run_config(path, TRAIN).hf_dataset == {"path": "b"}
    assert notices(tmp_path, "hf_dataset: {path: b}\ndata: a", data="mine") == []


def test_defaults_and_settings_in_python_are_not_given(tmp_path):
    assert notices(tmp_path) == []
    assert notices(tmp_path, "fine_tune_type: full\nna_parameters: {beta: 0.9}") == []
    assert without_effect(RunConfig(train=True, fine_tune_type="full", lora_parameters={"rank": 4})) == []


def test_every_name_in_the_rules_is_a_setting():
    known = {*RunConfig.__dataclass_fields__, *NALoRAConfig.__dataclass_fields__}
    assert {name for rule in RULES for name in rule.names} <= known


@pytest.mark.parametrize(
    ("given", "iterations", "has_validation", "expected"),
    [
        ({"steps_per_eval": 5}, 10, False, "--steps-per-eval has no effect: there is no validation set"),
        ({"steps_per_eval": 5}, 10, True, None),
        (
            {"early_stopping": 3, "steps_per_eval": 4},
            10,
            True,
            "early_stopping has no effect: .* the run has 3",
        ),
        ({"early_stopping": 2, "steps_per_eval": 4}, 10, True, None),
        (
            {"grad_accumulation_steps": 4},
            3,
            True,
            "grad_accumulation_steps is 4, but the run has 3 iterations",
        ),
        ({"grad_accumulation_steps": 4}, 6, True, None),
    ],
)
def test_settings_without_effect_in_the_length_of_a_run(given, iterations, has_validation, expected):
    found = without_effect_in_length(load_run_config(None, TRAIN | given), iterations, has_validation)
    assert len(found) == (expected is not None)
    assert all(re.match(expected, notice) for notice in found)
