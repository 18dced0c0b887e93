"""Settings: compatibility with mlx_lm.lora's flags, keys, defaults and config files; error messages."""

import importlib
import math
from dataclasses import dataclass, field, fields
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from nalora_mlx.arguments import Parser, add_settings
from nalora_mlx.cli import COMMANDS, command
from nalora_mlx.core.config import (
    FINE_TUNE_TYPES,
    OPTIMIZERS,
    NALoRAConfig,
    NAParameters,
    RunConfig,
    load_run_config,
)
from nalora_mlx.core.config_presets import PRESETS
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.parsing import coerce, parse_size
from nalora_mlx.core.synonyms import COMMANDS as COMMAND_SYNONYMS
from nalora_mlx.core.synonyms import RESULTS, SYNONYMS, VALUES
from nalora_mlx.core.yaml_files import read_yaml
from nalora_mlx.lora import build_parser
from nalora_mlx.training.optimizers import configured_optimizer

# A config for mlx_lm.lora 0.32 with all keys of its documentation.
MLX_LM_CONFIG = """
model: "mlx-community/Llama-3.2-1B-Instruct-bf16"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    weight_decay: 0.05
    bias_correction: true
data: "mlx-community/WikiSQL"
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
report_to: wandb
project_name: "mine"
steps_per_report: 10
steps_per_eval: 200
grad_accumulation_steps: 1
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
clear_cache_threshold: 0
trust_remote_code: false
mask_prompt: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
hf_dataset:
  path: "billsum"
  train_split: "train[:1000]"
  valid_split: "train[-100:]"
  prompt_feature: "text"
  completion_feature: "summary"
prompt_feature: "input"
completion_feature: "output"
"""


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_a_config_of_mlx_lm_runs_unchanged(tmp_path):
    config = load_run_config(write(tmp_path, MLX_LM_CONFIG), {})
    config.check()
    assert config.learning_rate == 1e-5
    assert config.optimizer_config["adamw"]["eps"] == 1e-6
    assert config.lr_schedule["arguments"] == [1e-5, 1000, 1e-7]
    adapter = config.lora_config()
    assert adapter.keys == ("self_attn.q_proj", "self_attn.v_proj")
    assert (adapter.rank, adapter.scale, adapter.num_layers) == (8, 20.0, 16)
    assert not adapter.active  # fine_tune_type is lora, which means plain LoRA


def test_all_flags_and_defaults_of_mlx_lm():
    peer = importlib.import_module("mlx_lm.lora")
    ours = {option for action in build_parser("x")._actions for option in action.option_strings}
    for action in peer.build_parser()._actions:
        assert set(action.option_strings) <= ours, action.option_strings
    config = RunConfig()
    deviations = ("fine_tune_type", "clear_cache_threshold")  # documented
    for key, default in peer.CONFIG_DEFAULTS.items():
        if key in (*deviations, "config", "optimizer_config", "lora_parameters"):
            continue
        assert getattr(config, key) == default, key
    lora = peer.CONFIG_DEFAULTS["lora_parameters"]
    assert {key: getattr(NALoRAConfig(), key) for key in lora} == lora
    assert (config.fine_tune_type, config.clear_cache_threshold) == ("na-lora", None)


def test_flags_override_the_file(tmp_path):
    path = write(tmp_path, "iters: 5\nlora_parameters: {rank: 4, scale: 10}\nna_parameters: {mask: hard}\n")
    args = build_parser("x").parse_args(
        ["--train", "--iters", "7", "--rank", "2", "--beta", "0.5", "--no-step-scaling"]
    )
    config = load_run_config(path, {k: v for k, v in vars(args).items() if k != "config"})
    adapter = config.lora_config()
    assert config.iters == 7
    assert (adapter.rank, adapter.scale) == (2, 10.0)
    assert (adapter.mask, adapter.beta, adapter.step_scaling) == ("hard", 0.5, False)


def test_a_file_and_flags_override_a_preset(tmp_path):
    paper = load_run_config(None, {"preset": "paper"}).lora_config()
    assert (paper.mask, paper.step_scaling, paper.selection_limit) == ("soft", True, 0.0)
    path = tmp_path / "config.yaml"
    path.write_text("preset: paper\nna_parameters: {mask: hard, keep_fraction: 0.25}\n")
    config = load_run_config(path, {"keep_fraction": 0.75}).lora_config()
    assert (config.mask, config.keep_fraction, config.step_scaling) == ("hard", 0.75, True)


def test_a_preset_changes_only_what_it_names():
    for name, settings in PRESETS.items():
        config, default = load_run_config(None, {"preset": name}), RunConfig()
        changed = {f.name for f in fields(RunConfig) if getattr(config, f.name) != getattr(default, f.name)}
        assert changed == {"preset", *settings}, name


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize(("name", "rate"), [("quick", 3e-4), ("careful", 3e-5)])
def test_presets_with_a_rate_correct_bias(name, rate, optimizer):
    """Adam's first step is then as long as the learning rate."""
    built = configured_optimizer(load_run_config(None, {"preset": name, "optimizer": optimizer}))
    one = {"one": mx.ones(3)}
    new = built.apply_gradients(one, {"one": mx.zeros(3)})
    np.testing.assert_allclose(np.array(new["one"]), -rate, rtol=1e-5)


def test_full_fine_tuning_does_not_take_the_rate_of_a_preset(tmp_path):
    full = {"preset": "quick", "fine_tune_type": "full", "train": True}
    path = tmp_path / "config.yaml"
    path.write_text("learning_rate: 1e-5")
    assert load_run_config(None, full).problems() == [
        "preset quick has a learning rate for adapters; give --learning-rate, too"
    ]
    for config in (
        load_run_config(path, full),
        load_run_config(None, full | {"learning_rate": 1e-5}),
        load_run_config(None, full | {"preset": "paper"}),
    ):
        assert config.problems() == []


def test_a_preset_is_not_applied_again_to_a_resumed_run():
    saved = {"preset": "paper", "na_parameters": {"mask": "hard"}}
    assert load_run_config(None, {}, saved).na_parameters == {"mask": "hard"}


def test_an_unknown_preset_is_refused():
    config = load_run_config(None, {"preset": "papers", "train": True})
    assert any("preset is 'papers'; choose from" in problem for problem in config.problems())


def test_flags_of_every_kind():
    parser = Parser(prog="x")
    add_settings(parser, NAParameters)
    args = parser.parse_args(["--gamma", "0", "1", "2", "--branches", "gate", "up", "--route"])
    assert (args.gamma, args.branches, args.route) == ([0.0, 1.0, 2.0], ["gate", "up"], True)
    assert vars(parser.parse_args([])) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-5", r"unknown key 'learning_rat'; did you mean 'learning_rate'\?"),
        (
            "lora_layers: 4\nbatchsize: 2",
            r"'lora_layers'; did you mean 'num_layers'\?; unknown key 'batchsize'; did you mean 'batch_size'\?",
        ),
        ("per_device_train_batch_size: 4", r"; did you mean 'batch_size'\?"),
        ("max_steps: 4", r"; did you mean 'iters'\?; iters counts batches, not optimizer updates"),
        ("lora_rank: 4", "; write 'rank' under 'lora_parameters'$"),
        ("mask: soft", "; write 'mask' under 'na_parameters'$"),
        ("prompt_key: q", r"unknown key 'prompt_key'; did you mean 'prompt_feature'\?"),
        ("output_dir: a", r"; did you mean 'adapter_path'\?"),
        ("optim: adam", r"; did you mean 'optimizer'\?"),
        ("lora_alpha: 4", "; set scale to alpha / rank$"),
        ("lora_parameters: {r: 4}\ntrain: true", r"lora_parameters: unknown key 'r'; did you mean 'rank'\?"),
        ("warmup_steps: 4", r"did you mean 'lr_schedule', as in lr_schedule: \{name: cosine_decay, warmup: "),
        (
            "iters: 1\nseed: 1\niters: 2",
            "config.yaml:3: not valid YAML: key 'iters' is given twice, first in line 1",
        ),
        (
            "train: true\nlora_parameters:\n  rank: 4\n  'rank': 8",
            "config.yaml:4: not valid YAML: key 'rank' is given twice, first in line 3",
        ),
        ("iters: 1:30", "iters is '1:30'; it takes a whole number"),
        ("iters: 3\nepochs: 0.5", "iters and epochs both set the length of the run; give one of them"),
        ("learning_rate: [1e-5]", "learning_rate is .*; it takes a number"),
        ("a: " + "[" * 5000, "config.yaml: not valid YAML: nested too deeply"),
        ("iters: many", "iters is 'many'; it takes a whole number"),
        ("iters: 1.5", "iters is 1.5; it takes a whole number"),
        ("train: 1", "train is 1; it takes true or false"),
        ("model: [a]", "model is .*it takes text"),
        ("a: b: c", r"config.yaml:1: not valid YAML"),
        ("- a", "must hold 'key: value' lines"),
        ("clear_cache_threshold: lots", "'lots' is not a size"),
        ("iters: .inf", "iters is inf; it takes a whole number"),
        ("lora_parameters: [1, 2]", "lora_parameters is .*; it takes a mapping"),
        ("optimizer_config: [adam]", "optimizer_config is .*; it takes a mapping"),
    ],
)
def test_invalid_files(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load_run_config(write(tmp_path, text), {}).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": False}, "nothing to do"),
        ({"lora_parameters": {"rank": 0}}, "rank is 0; it must be at least 1"),
        ({"lora_parameters": {"rank": 8, "alpha": 16}}, r"'scale' \(= alpha / rank\)"),
        ({"lora_parameters": {"ranks": 8}}, r"did you mean 'rank'\?"),
        ({"na_parameters": {"mask": "firm"}}, "mask is 'firm'; choose from soft, hard, off"),
        ({"na_parameters": {"gamma": [1, 2]}}, "gamma is .* takes three numbers"),
        ({"na_parameters": {"beta": 1}}, "beta is 1.0"),
        ({"na_parameters": {"branches": ["down"]}}, "branches is 'down'"),
        ({"optimizer_config": {"adamx": {}}}, "adamx"),
        ({"batch_size": 0, "seed": -1}, r"batch_size is 0.*seed is -1"),
        ({"lora_parameters": {"rank": 8, "scale": float("inf")}}, "scale is inf"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        (
            {"fine_tune_type": "qlora"},
            r"fine_tune_type is 'qlora'; .*; did you mean 'na-lora' with quantize 4\?",
        ),
        ({"optimizer": "paged_adamw_8bit"}, r"optimizer is .*; did you mean 'adamw'\?"),
        ({"epochs": -1.0}, "epochs is -1.0"),
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"val_batches": 0}, "val_batches is 0"),
    ],
)
def test_invalid_values(settings, message):
    config = RunConfig(**({"train": True} | settings))
    with pytest.raises(InputError, match=message) as caught:
        config.check()
    assert "\n" not in str(caught.value)


def test_values_that_mlx_lm_accepts(tmp_path):
    config = load_run_config(
        write(tmp_path, "train: true\noptimizer: AdamW\nnum_layers: 0\nepochs: 3"), {"iters": 5}
    )
    config.check()
    assert config.optimizer == "adamw"
    assert config.epochs is None  # --iters overrides epochs in the file
    assert load_run_config(None, {"epochs": 2.0}).epochs == 2.0


def test_integers_written_as_floats_and_nulls(tmp_path):
    config = load_run_config(write(tmp_path, "iters: 1e3\nseed: null\ngrad_clip: 2"), {})
    assert config.iters == 1000
    assert isinstance(config.iters, int)
    assert config.seed == 0
    assert config.grad_clip == 2.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("-007", -7),
        ("0", 0),
        ("1_000", 1000),
        ("0x10", 16),
        ("0o10", 8),
        ("0b11", 3),
        ("+3", 3),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("5.", 5.0),
        ("-.inf", -math.inf),
        ("1e3", 1000.0),
        ("1e400", math.inf),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("", None),
        ("-", [None]),
        ("'010'", "010"),
    ],
)
def test_plain_values_mean_what_people_mean(tmp_path, text, value):
    (found,) = read_yaml(write(tmp_path, f"a:\n  {text}")).values()
    assert (found, type(found)) == (value, type(value))


def test_merged_keys_are_not_given_twice(tmp_path):
    found = read_yaml(write(tmp_path, "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: [*a, *b]}"))
    assert found["b"] == {"x": 3, "y": 2}


def test_both_lengths_on_the_command_line():
    with pytest.raises(InputError, match="command line: iters and epochs both set the length"):
        load_run_config(None, {"iters": 3, "epochs": 0.5})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--lora-layers", "did you mean '--num-layers'?"),
        ("--lr", "did you mean '--learning-rate'?"),
        ("--lora_rank", "did you mean '--rank'?"),
        ("--max-steps=3", "did you mean '--iters'?; iters counts batches, not optimizer updates"),
        ("--output-dir", "did you mean '--adapter-path'?"),
        ("--num-train-epochs", "did you mean '--epochs'?"),
        ("--warmup-steps", "write lr_schedule: {name: cosine_decay, warmup: UPDATES, "),
        ("--lora-alpha", "set scale to alpha / rank"),
        ("--batchsize", "did you mean '--batch-size'?"),
        ("--max-step", "did you mean '--iters'?"),
        ("-lr", "did you mean '--learning-rate'?"),
        ("--output", "did you mean '--adapter-path'?"),
        ("--prompt-feature", "did you mean '--prompt-key'?"),
        ("--dataset-text-field", "did you mean '--text-key'?"),
        ("--weight-decay", "write optimizer_config: {adamw: {weight_decay: 0.01}} into the file of --config"),
        ("--lr-schedule", "write lr_schedule: {name: cosine_decay, "),
        ("--bits", "did you mean '--quantize'?"),
        ("--max-length", "did you mean '--max-seq-length'?"),
        ("--zzz", "arguments: --zzz 3; see x --help-all"),
    ],
)
def test_flags_of_other_tools_are_understood(flag, message, capsys):
    with pytest.raises(SystemExit):
        build_parser("x").parse_args([flag, "3"])
    assert message in capsys.readouterr().err


def test_every_wrong_flag_gets_its_own_suggestion(capsys):
    with pytest.raises(SystemExit):
        build_parser("x").parse_args(["--lr", "1e-4", "--train", "--max-steps", "-5"])
    error = capsys.readouterr().err
    assert error.index("'--learning-rate'") < error.index("'--iters'")
    assert error.count("did you mean") == 2


FIRST = {"export": ["gguf"], "report": ["RUN"], "completion": ["bash"]}  # arguments that come before flags


def options_of(name):
    """Return the flags of a command and their settings, as names."""
    actions = command(name).build_parser(name)._actions
    flags = {option.lstrip("-").replace("-", "_") for action in actions for option in action.option_strings}
    return flags | {action.dest for action in actions}


def test_every_synonym_names_a_setting_or_a_flag():
    known = {*RunConfig.__dataclass_fields__, *NALoRAConfig.__dataclass_fields__}
    for name in COMMANDS:
        known |= options_of(name)
    assert {ours for meanings in SYNONYMS.values() for ours in meanings} <= known
    assert {ours for (ours,) in COMMAND_SYNONYMS.values()} == set(COMMANDS)
    assert not set(COMMAND_SYNONYMS) & set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_synonym_is_suggested_by_its_command(name, capsys):
    """Except where the first meaning that the command has is another, or the name is a flag of the command."""
    parser, options = command(name).build_parser("x"), options_of(name)
    for word, meanings in SYNONYMS.items():
        if word in options or not (meant := next((m for m in meanings if m in options), None)):
            continue
        if meant == "adapter_path" and word in RESULTS and name != "lora":
            continue
        with pytest.raises(SystemExit):
            parser.parse_args([*FIRST.get(name, ()), f"--{word.replace('_', '-')}"])
        error = capsys.readouterr().err
        named = "--" + meant.replace("_", "-")
        flags = next(
            a.option_strings for a in parser._actions if a.dest == meant or named in a.option_strings
        )
        assert any(f"did you mean '{flag}'?" in error for flag in flags), (word, error)


@pytest.mark.parametrize(
    ("name", "flag", "message"),
    [
        ("chat", "--output", None),  # chat writes nothing
        ("chat", "--lr", None),
        ("chat", "--adapter", "--adapter-path"),
        ("generate", "--max-length", "--max-tokens"),
        ("generate", "--temperature", "--temp"),
        ("generate", "--model-path", "--model"),
        ("fuse", "--output", "--save-path"),
        ("fuse", "--quantize", "--bits"),
        ("export", "--out", "--output"),
        ("export", "--quantize", "--type"),
        ("report", "--out-dir", "--output"),
        ("serve", "--lora", "--adapter-path"),
        ("doctor", "--dataset", "--data"),
    ],
)
def test_a_suggestion_suits_the_command(name, flag, message, capsys):
    with pytest.raises(SystemExit):
        command(name).build_parser("x").parse_args([*FIRST.get(name, ()), flag, "3"])
    error = capsys.readouterr().err
    assert ("did you mean" in error) == (message is not None)
    assert message is None or f"did you mean '{message}'?" in error


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("lora", ["--optimizer", "adamw8bit"], "did you mean 'adamw'?"),
        ("lora", ["--fine-tune-type", "QLoRA"], "did you mean 'na-lora' with quantize 4?"),
        ("lora", ["--optimizer", "zzz"], "(choose from adam, adamw, muon, sgd, adafactor); see"),
        ("export", ["gguf", "--type", "int4"], "did you mean 'q4_k_m'?"),
        ("export", ["gguf", "--type", "q4_k_s"], "did you mean 'q4_k_m'?"),
        ("export", ["gguff"], "did you mean 'gguf'?"),
    ],
)
def test_values_of_other_tools_are_understood(name, argv, message, capsys):
    with pytest.raises(SystemExit):
        command(name).build_parser("x").parse_args(argv)
    assert message in capsys.readouterr().err


def test_choices_may_be_written_in_capitals():
    args = build_parser("x").parse_args(["--optimizer", "AdamW", "--branches", "Gate", "UP"])
    assert (args.optimizer, args.branches) == ("adamw", ["gate", "up"])
    args = command("export").build_parser("x").parse_args(["gguf", "--type", "Q4_K_M"])
    assert args.type == "q4_k_m"


def test_values_of_other_tools_name_choices():
    from nalora_mlx.export.arguments import TYPES

    choices = {"optimizer": OPTIMIZERS, "fine_tune_type": FINE_TUNE_TYPES, "type": TYPES}
    for setting, values in VALUES.items():
        assert set(values.values()) <= set(choices[setting])
        assert not set(values) & set(choices[setting])


def test_the_yaml_resolver_is_not_global(tmp_path):
    import yaml

    assert read_yaml(write(tmp_path, "a: 1e-5\nb: e5\nc: 1.e3\nd: .5e-2")) == {
        "a": 1e-5,
        "b": "e5",
        "c": 1e3,
        "d": 5e-3,
    }
    # 1.5 and not 1e-5, because mlx_lm.lora changes the global loader if it is imported
    assert yaml.safe_load("a: 1.5") == {"a": 1.5}


def test_types():
    """Every kind of annotation that occurs in a settings dataclass."""

    @dataclass
    class Settings:
        number: float = 0.0
        size: int | None = field(default=None, metadata={"size": True})
        names: tuple[str, ...] | None = None
        losses: list[float] = field(default_factory=list)
        dataset: dict[str, Any] | list[Any] | None = None

    given = {"number": 1, "size": "2KB", "names": ["a"], "losses": [1, 2.5], "dataset": [{}, 1]}
    found = coerce(given, Settings, "here")
    assert found == {"number": 1.0, "size": 2000, "names": ("a",), "losses": [1.0, 2.5], "dataset": [{}, 1]}
    assert isinstance(found["number"], float)
    assert coerce({"size": None, "names": None}, Settings, "here") == {"size": None, "names": None}
    assert coerce({"dataset": {"path": "a"}}, Settings, "here") == {"dataset": {"path": "a"}}
    wrong = {"number": True, "names": "a", "losses": {"a": 1}, "dataset": "a", "size": True}
    with pytest.raises(InputError) as caught:
        coerce(wrong, Settings, "here")
    assert str(caught.value) == (
        "here: number is True; it takes a number; names is 'a'; it takes a list; losses is {'a': 1}; it takes a list; "
        "dataset is 'a'; it takes a mapping or a list; size is True; it takes a whole number"
    )


def test_sizes():
    assert [parse_size(s) for s in (7, "7", "1KB", "1.5GB", "2MiB", "3m")] == [
        7,
        7,
        1000,
        1_500_000_000,
        2 * 1024**2,
        3_000_000,
    ]


def test_missing_config_file(tmp_path):
    with pytest.raises(InputError, match="no config file at"):
        load_run_config(tmp_path / "none.yaml", {})
