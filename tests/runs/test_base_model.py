"""The base model that a run names: from its checkpoint, or from run.json."""

import json

import pytest

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.runs.base_model import trained_model
from nalora_mlx.runs.saved_settings import settings_to_save


def write_run(directory, model, recorded=None):
    """Write what a run leaves of its settings. `recorded`: the model in run.json."""
    config = RunConfig(model=str(model), train=True, adapter_path=str(directory))
    for step in (2, 10):
        checkpoint = directory / "checkpoints" / f"step-{step:07d}"
        checkpoint.mkdir(parents=True)
        state = {"config": settings_to_save(config)}
        (checkpoint / "training_state.json").write_text(json.dumps(state))
    (directory / "best").mkdir()
    (directory / "run.json").write_text(json.dumps({"settings": {"model": recorded or str(model)}}))


def test_a_local_model_is_found_from_any_directory_of_the_run(tmp_path, monkeypatch):
    (tmp_path / "models" / "base").mkdir(parents=True)
    write_run(tmp_path / "run", tmp_path / "models" / "base", recorded="base")
    for place in ("run", "run/best", "run/checkpoints/step-0000010"):
        assert trained_model(tmp_path / place) == str(tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    assert trained_model(tmp_path / "run") == "models/base"


def test_run_json_is_asked_if_checkpoints_do_not_say(tmp_path):
    write_run(tmp_path / "run", "owner/name")
    assert trained_model(tmp_path / "run") == "owner/name"
    for content in ("{", json.dumps({"config": {"iters": 3}}), json.dumps({"config": None})):
        for state in tmp_path.rglob("training_state.json"):
            state.write_text(content)
        assert trained_model(tmp_path / "run" / "best") == "owner/name"
    (tmp_path / "run" / "run.json").write_text("[]")
    assert trained_model(tmp_path / "run") is None
    assert trained_model(tmp_path / "nowhere") is None


def test_a_missing_model_is_named(tmp_path, monkeypatch):
    from nalora_mlx.cli import require_model

    monkeypatch.chdir(tmp_path)
    require_model("owner/name", None)
    (tmp_path / "my base").mkdir()
    for number, (model, message) in enumerate(
        (
            ("owner/name", "was trained on owner/name: give --model owner/name$"),
            ("gone", "was trained on a model named gone: give its directory$"),
            ("my base", "was trained on my base: give --model 'my base'$"),
        )
    ):
        write_run(tmp_path / f"run{number}", model)
        with pytest.raises(InputError, match=f"--model is missing; run{number}/best {message}"):
            require_model(None, f"run{number}/best")
    with pytest.raises(InputError, match="--model is missing; give a directory, or a Hugging Face repo"):
        require_model(None)
