"""`nalora lora --resume` alone continues a run with its own settings, and names differences as flags."""

import json
import os
import shutil

import pytest
from safetensors.numpy import load_file

from nalora_mlx.__main__ import main
from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.runs.resume import _seal
from nalora_mlx.runs.saved_settings import resumed_settings, settings_to_save

RUN = {
    "--iters": 6,
    "--batch-size": 2,
    "--rank": 2,
    "--num-layers": 2,
    "--learning-rate": 1e-2,
    "--steps-per-report": 2,
    "--steps-per-eval": 3,
    "--save-every": 3,
}
RUN = ["--mask-prompt", "--no-samples", *(item for flag in RUN.items() for item in flag)]


def lora(*flags):
    return main(["lora", *map(str, flags)])


@pytest.fixture(scope="module")
def whole(model_directory, data_directory, tmp_path_factory):
    """Return the directory of a run of six iterations."""
    output = tmp_path_factory.mktemp("whole") / "a"
    assert (
        lora("--train", "--model", model_directory, "--data", data_directory, "--adapter-path", output, *RUN)
        == 0
    )
    return output


@pytest.fixture
def half(whole, tmp_path):
    """Return the directory of the same run as it was after three iterations."""
    output = tmp_path / "half"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "checkpoints" / "step-0000006")
    return output


def arrays(output):
    return {name: array.tobytes() for name, array in load_file(output / "adapters.safetensors").items()}


def test_resume_alone_continues_with_the_settings_of_the_run(whole, half, capsys):
    assert lora("--resume", "--adapter-path", half) == 0
    assert arrays(half) == arrays(whole)
    assert f"resuming from {half}/checkpoints/step-0000003" in capsys.readouterr().out


def test_it_works_from_another_directory(whole, half, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lora("--resume", "--adapter-path", half.name) == 0
    assert arrays(half) == arrays(whole)


def test_paths_are_relative_and_follow_a_project_that_moves(
    whole, model_directory, data_directory, tmp_path, monkeypatch
):
    project = tmp_path / "project"
    shutil.copytree(model_directory, project / "model")
    shutil.copytree(data_directory, project / "data")
    monkeypatch.chdir(project)
    assert lora("--train", "--model", "model", "--data", project / "data", *RUN, "--iters", 3) == 0
    text = next((project / "adapters").glob("checkpoints/*/training_state.json")).read_text()
    assert str(tmp_path) not in text
    monkeypatch.chdir(tmp_path)
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert lora("--resume", "--iters", 6) == 0
    assert arrays(tmp_path / "moved" / "adapters") == arrays(whole)


def test_a_model_or_data_that_is_gone_is_not_looked_for_on_the_hub(
    half, model_directory, data_directory, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, source in (("models", model_directory), ("rows", data_directory)):
        shutil.copytree(source, tmp_path / name / "x")
    assert lora("--train", "--model", "models/x", "--data", "rows/x", *RUN, "--iters", 3) == 0
    for name in ("models", "rows"):
        (tmp_path / name).rename(tmp_path / f"{name}-moved")
    capsys.readouterr()
    assert lora("--resume", "--iters", 6) == 2
    error = capsys.readouterr().err
    assert "its --model was models/x, which does not exist; give --model" in error
    assert "its --data was rows/x, which does not exist; give --data" in error
    flags = ["--model", "models-moved/x", "--data", "rows-moved/x", "--iters", 6]
    assert lora("--resume", *flags) == 0
    assert arrays(tmp_path / "adapters")


def test_flags_may_change_what_does_not_change_the_run(half, capsys):
    assert lora("--resume", "--adapter-path", half, "--iters", 4, "--save-every", 1) == 0
    assert sorted(path.name for path in (half / "checkpoints").iterdir()) == ["step-0000003", "step-0000004"]
    assert lora("--resume", "--adapter-path", half) == 0  # with the iterations of the last start
    assert "nothing is left to train: the checkpoint is at iteration 4 of 4" in " ".join(
        capsys.readouterr().out.split()
    )


CHANGED = {
    "--rank 4": "--rank was 2, is 4",
    "--learning-rate 2e-2": "--learning-rate was 0.01, is 0.02",
    "--num-layers 3": "--num-layers was 2, is 3",
    "--no-mask-prompt": "--mask-prompt was on, is off",
    "--batch-size 3": "--batch-size was 2, is 3",
    "--fine-tune-type lora": "--fine-tune-type was na-lora, is lora",
    "--mask hard": "--mask was off, is hard",
    "--grad-clip 0.5": "--grad-clip was not given, is 0.5",
    "--optimizer adamw": "--optimizer was adam, is adamw",
    "--prompt-key completion": "--prompt-key was not given, is completion",
    "--rank 4 --seed 3": "--rank was 2, is 4; --seed was 0, is 3",
}


@pytest.mark.parametrize("flags", CHANGED)
def test_differences_are_flags_and_values(flags, whole, capsys):
    assert lora("--resume", "--adapter-path", whole, "--iters", 8, *flags.split()) == 2
    error = capsys.readouterr().err
    assert f"not the same run: {CHANGED[flags]}; change that back, or give --resume-anyway" in error


def test_a_config_file_overrides_the_run(whole, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("lora_parameters: {rank: 4}\niters: 8\n")
    assert lora("--resume", "--adapter-path", whole, "--config", config) == 2
    assert "not the same run: --rank was 2, is 4; change" in capsys.readouterr().err


def edit_settings(output, change):
    """Change the saved settings of the only checkpoint of a run."""
    (state,) = output.glob("checkpoints/*/training_state.json")
    saved = json.loads(state.read_text())
    saved.pop("seal")
    change(saved["config"])
    state.write_text(json.dumps(saved | {"seal": _seal(saved)}))


@pytest.mark.parametrize("name", ["another row", "fewer rows"])
def test_changed_rows_are_told_in_words(name, half, data_directory, tmp_path, capsys):
    rows = (data_directory / "train.jsonl").read_text().splitlines()
    changed, words = {
        "another row": (
            [rows[0].replace("red", "blue"), *rows[1:]],
            "the training rows, or how they are tokenized, have changed",
        ),
        "fewer rows": (rows[1:], f"the training set had {len(rows)} sequences, and has {len(rows) - 1}"),
    }[name]
    data = tmp_path / "data"
    shutil.copytree(data_directory, data)
    (data / "train.jsonl").write_text("\n".join(changed))
    assert lora("--resume", "--adapter-path", half, "--data", data) == 2
    assert f"not the same run: --data was {data_directory}, is {data};" in capsys.readouterr().err
    # As if the file itself had been edited:
    edit_settings(half, lambda config: config["data"][0].update(path=os.path.relpath(data, half)))
    assert lora("--resume", "--adapter-path", half) == 2
    assert f"not the same run: {words}; change that back" in capsys.readouterr().err


def test_a_checkpoint_without_settings_asks_for_the_flags(
    half, model_directory, data_directory, whole, capsys
):
    def keep_few(config):  # as an earlier version did
        for name in config.keys() - {"batch_size", "iters", "seed", "max_seq_length"}:
            del config[name]

    edit_settings(half, keep_few)
    assert lora("--resume", "--adapter-path", half) == 2
    assert "does not hold the run's settings; give its flags again" in capsys.readouterr().err
    assert (
        lora("--resume", "--model", model_directory, "--data", data_directory, "--adapter-path", half, *RUN)
        == 0
    )
    assert arrays(half) == arrays(whole)


def test_code_of_a_model_runs_only_if_this_start_allows_it():
    saved = settings_to_save(RunConfig(trust_remote_code=True, push_to_hub="a/b", resume="latest"))
    assert not {"trust_remote_code", "resume", "adapter_path", "train", "plan"} & saved.keys()
    assert resumed_settings({**saved, "trust_remote_code": True}, None) == resumed_settings(saved, None)


def test_tokens_of_the_hub_are_not_saved():
    entry = {"path": "a/b", "config": {"token": "secret", "use_auth_token": "secret", "name": "en"}}
    saved = settings_to_save(RunConfig(hf_dataset=[entry, {"path": "c/d", "config": {"token": "secret"}}]))
    assert saved["hf_dataset"] == [{"path": "a/b", "config": {"name": "en"}}, {"path": "c/d"}]
    assert "data" not in saved


def test_a_checkpoint_of_an_earlier_version_names_no_other_base_model(
    half, model_directory, data_directory, capsys
):
    def keep_few(config):
        for name in config.keys() - {"batch_size", "iters", "seed", "max_seq_length"}:
            del config[name]

    edit_settings(half, keep_few)
    flags = ["--model", model_directory, "--data", data_directory, "--adapter-path", half, *RUN]
    assert lora("--resume", *flags, "--num-layers", 3) == 2
    error = capsys.readouterr().err
    assert "num layers was 2, is 3" in error
    assert "base model" not in error


def test_no_checkpoint_is_an_error(tmp_path, capsys):
    assert lora("--resume", "--adapter-path", tmp_path / "nothing") == 2
    assert f"--resume: no checkpoint in {tmp_path}/nothing" in capsys.readouterr().err


def test_settings_survive_json(model_directory, data_directory, tmp_path):
    config = RunConfig(
        model=str(model_directory),
        data=[f"{data_directory}=2", {"path": str(data_directory), "prompt_feature": "prompt"}],
        lora_parameters={"rank": 3, "keys": ["mlp.gate_proj"]},
        na_parameters={"gamma": [0.5, 1, 1]},
        optimizer_config={"adam": {"betas": [0.8, 0.9]}},
        lr_schedule={"name": "cosine_decay", "arguments": [1e-4, 10]},
        adapter_path=str(tmp_path / "a"),
        memory_budget=10**9,
    )
    saved = resumed_settings(json.loads(json.dumps(settings_to_save(config))), tmp_path / "a")
    for name in ("lora_parameters", "na_parameters", "optimizer_config", "lr_schedule", "memory_budget"):
        assert saved[name] == getattr(config, name)
    assert [entry["path"] for entry in saved["data"]] == [os.path.realpath(data_directory)] * 2
    assert [entry["ratio"] for entry in saved["data"]] == [2, 1]
    with pytest.raises(InputError):
        RunConfig(**{**saved, "batch_size": 0}).check()
