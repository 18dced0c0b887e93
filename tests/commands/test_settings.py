"""What `nalora lora` and `nalora doctor` say of settings that do not suit the run."""

import json
import shutil

import pytest

from nalora_mlx.__main__ import main

RUN = """
lr_schedule: {name: cosine_decay, arguments: [1e-5, 1000], warmup: 100}
optimizer_config: {adamw: {weight_decay: 0.1}}
"""


@pytest.fixture
def short_model(model_directory, tmp_path):
    """Return a model that was made for 8 tokens."""
    directory = tmp_path / "model"
    shutil.copytree(model_directory, directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 8}))
    return directory


def lora(model, data, tmp_path, *flags):
    (tmp_path / "run.yaml").write_text(RUN)
    where = [
        "--model",
        model,
        "--data",
        data,
        "--adapter-path",
        tmp_path / "a",
        "--config",
        tmp_path / "run.yaml",
    ]
    return main(["lora", "--train", *map(str, where), "--batch-size", "2", "--val-batches", "1", *flags])


def test_settings_without_effect_are_said(short_model, data_directory, tmp_path, capsys):
    flags = [
        "--iters",
        "4",
        "--grad-accumulation-steps",
        "4",
        "--learning-rate",
        "1e-3",
        "--keep-fraction",
        "0.5",
    ]
    assert lora(short_model, data_directory, tmp_path, *flags) == 0
    out = capsys.readouterr().out
    for notice in (
        "--keep-fraction has no effect without mask hard",
        "optimizer_config.adamw has no effect with optimizer adam",
        "--learning-rate 0.001 has no effect: lr_schedule sets the learning rate, from 1e-05; change",
        "lr_schedule: the learning rate is 0 throughout: warmup takes 100 optimizer updates, and the run has 1 (4 it",
    ):
        assert f"\nnote: {notice}" in f"\n{out}"
    assert "rows are longer than the 8 tokens that the model was made for" in out
    # The rate was 0, so training did not help.
    assert "note: training did not help: the best adapter, in " in out
    assert "(best)" not in out
    assert (tmp_path / "a" / "best" / "adapters.safetensors").exists()  # the best that was trained


@pytest.mark.parametrize(
    ("flags", "is_said"),
    [
        ([], True),
        (["--fine-tune-type", "lora", "--rank", "2"], True),
        (["--learning-rate", "1e-5"], False),
        (["--preset", "quick"], False),
        (["--optimizer", "sgd"], False),
        (["--fine-tune-type", "full"], False),
        (["--plan"], False),
    ],
)
def test_a_learning_rate_that_nobody_chose(flags, is_said, model_directory, data_directory, tmp_path, capsys):
    where = [
        "--model",
        str(model_directory),
        "--data",
        str(data_directory),
        "--adapter-path",
        str(tmp_path / "a"),
    ]
    assert (
        main(["lora", "--train", *where, "--iters", "1", "--batch-size", "2", "--val-batches", "1", *flags])
        == 0
    )
    out = capsys.readouterr().out
    assert ("note: the learning rate is that of mlx_lm.lora, 1e-05; --preset quick" in out) is is_said
    if is_said:  # the first run's checkpoint continues without it
        assert main(["lora", "--resume", "--adapter-path", str(tmp_path / "a"), "--iters", "2"]) == 0
        assert "the learning rate is" not in capsys.readouterr().out


def test_doctor_says_the_same(short_model, data_directory, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(RUN + "iters: 1\nlearning_rate: 1e-3\n")
    where = ["--model", short_model, "--data", data_directory, "--config", tmp_path / "run.yaml"]
    assert main(["doctor", *map(str, where)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "optimizer_config.adamw has no effect with optimizer adam" in out
    assert "0.001 has no effect: lr_schedule sets the learning rate" in out
    assert "lr_schedule: the learning rate is 0 throughout" in out
    assert "rows are longer than the 8 tokens that the model was made for" in out


def test_a_rank_beyond_the_model_is_refused(model_directory, data_directory, tmp_path, capsys):
    assert lora(model_directory, data_directory, tmp_path, "--rank", "99999") == 2
    assert "error: rank is 99999, larger than the smaller dimension of every layer" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("lr_schedule: {name: cosine}", r"lr_schedule: name is 'cosine'; did you mean 'cosine_decay'?"),
        (
            "optimizer_config: {adam: {weight_decay: 0.1}}",
            "optimizer_config.adam: unknown key 'weight_decay'; known",
        ),
        (
            "optimizer_config: {adam: 3}",
            "optimizer_config.adam must be a mapping of names to values, not int",
        ),
    ],
)
def test_a_wrong_optimizer_is_refused_before_the_model_is_loaded(
    yaml, message, data_directory, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("nalora_mlx.models.loading.load_tokenizer", lambda *_: pytest.fail("loaded"))
    (tmp_path / "run.yaml").write_text(yaml)
    where = ["--model", "some/model", "--data", data_directory, "--adapter-path", tmp_path / "a"]
    assert main(["lora", "--train", *map(str, where), "--config", str(tmp_path / "run.yaml")]) == 2
    assert f"nalora lora: error: {message}" in capsys.readouterr().err
