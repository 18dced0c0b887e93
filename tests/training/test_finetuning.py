"""`finetune` does the same job as `nalora lora`, from files or from rows in memory."""

import json
import math
import signal
import threading

import mlx.core as mx
import mlx_lm
import pytest
from safetensors.numpy import load_file

import nalora_mlx
from nalora_mlx.__main__ import main
from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.finetuning import SETTINGS, python_names

SETTINGS_OF_RUN = {
    "iters": 6,
    "batch_size": 2,
    "rank": 2,
    "num_layers": 2,
    "learning_rate": 1e-2,
    "mask_prompt": True,
    "steps_per_report": 2,
    "steps_per_eval": 3,
    "save_every": 3,
    "samples": False,
}


def flags(settings):
    """Return settings as a command line."""
    found = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            found.append(flag if value else "--no-" + flag[2:])
        else:
            found += [flag, str(value)]
    return found


def rows_of(directory, name):
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def by_command(model_directory, data_directory, tmp_path_factory):
    """Train with `nalora lora`; return the adapter's arrays."""
    output = tmp_path_factory.mktemp("command") / "a"
    argv = ["lora", "--train", "--model", str(model_directory), "--data", str(data_directory)]
    assert main([*argv, "--adapter-path", str(output), *flags(SETTINGS_OF_RUN)]) == 0
    return load_file(output / "adapters.safetensors")


def equal(output, arrays):
    found = load_file(output / "adapters.safetensors")
    return found.keys() == arrays.keys() and all((found[name] == arrays[name]).all() for name in arrays)


def test_finetune_gives_the_same_adapter_as_the_command(
    model_directory, data_directory, by_command, tmp_path, capsys
):
    result = nalora_mlx.finetune(model_directory, data_directory, tmp_path / "a", **SETTINGS_OF_RUN)
    assert equal(tmp_path / "a", by_command)
    assert "iteration 6" in capsys.readouterr().out  # progress is shown
    assert result.path == tmp_path / "a"
    assert [step for step, _ in result.losses] == [2, 4, 6]
    assert [step for step, _ in result.validation_losses] == [0, 3, 6]
    assert result.training.valid_loss == result.validation_losses[-1][1]
    assert f"{result.training.first_valid_loss:.4g}" in repr(result)


def test_rows_in_memory_give_the_same_adapter_as_their_files(
    model_directory, data_directory, by_command, tmp_path, capsys
):
    rows = {name: rows_of(data_directory, name) for name in ("train", "valid")}
    data = {"train": rows["train"], "validation": rows["valid"]}
    result = nalora_mlx.finetune(model_directory, data, tmp_path / "a", progress=False, **SETTINGS_OF_RUN)
    assert equal(result.path, by_command)
    assert capsys.readouterr().out == ""


def test_a_list_of_rows_holds_out_validation_rows(model_directory, data_directory, tmp_path):
    rows = rows_of(data_directory, "train")
    for data in (rows, DataFrame(rows)):
        result = nalora_mlx.finetune(model_directory, data, tmp_path / "a", progress=False, **SETTINGS_OF_RUN)
        recorded = json.loads((result.path / "run.json").read_text())["data"]
        assert {name: recorded[name]["rows"] for name in recorded} == {"train": len(rows) - 1, "valid": 1}


class DataFrame:
    """The part of pandas.DataFrame that matters, with an empty cell in each row."""

    iloc = columns = None

    def __init__(self, rows):
        self.rows = rows

    def to_dict(self, orient):
        assert orient == "records"
        return [row | {"system": math.nan} for row in self.rows]


class NAType:
    """What pandas.NA does."""

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")

    __eq__ = __ne__ = lambda self, other: self


def test_cells_of_a_data_frame_may_be_arrays_and_missing(model_directory, data_directory, tmp_path):
    """As pandas reads chats from Parquet: arrays of dicts, whose keys may be null."""
    import numpy as np

    chats = [
        {"messages": np.array([{"role": "user", "content": row["prompt"], "name": None},
                               {"role": "assistant", "content": row["completion"], "name": None}]),
         "tools": NAType()}
        for row in rows_of(data_directory, "train")
    ]  # fmt: skip
    settings = SETTINGS_OF_RUN | {"iters": 2}
    results = [
        nalora_mlx.finetune(model_directory, data, tmp_path / "a", progress=False, **settings)
        for data in (DataFrame(chats), rows_of(data_directory, "train"))
    ]
    assert results[0].losses == results[1].losses


def test_callbacks_get_what_those_of_mlx_lm_get(model_directory, data_directory, tmp_path):
    reports, validations, saves = [], [], []
    result = nalora_mlx.finetune(
        model_directory,
        data_directory,
        tmp_path / "a",
        progress=False,
        on_report=reports.append,
        on_validation=validations.append,
        on_save=saves.append,
        **SETTINGS_OF_RUN,
    )
    keys = "iteration train_loss learning_rate iterations_per_second tokens_per_second trained_tokens peak_memory"
    assert all(set(report) == set(keys.split()) for report in reports)
    assert [(report["iteration"], report["train_loss"]) for report in reports] == result.losses
    assert all(set(info) == {"iteration", "val_loss", "val_time"} for info in validations)
    assert [(info["iteration"], info["val_loss"]) for info in validations] == result.validation_losses
    assert [save["iteration"] for save in saves] == [3, 6]


def test_a_callback_that_fails_does_not_end_the_run(model_directory, data_directory, tmp_path, capsys):
    def on_report(_):
        raise ValueError("no plot")

    result = nalora_mlx.finetune(
        model_directory, data_directory, tmp_path / "a", on_report=on_report, **SETTINGS_OF_RUN
    )
    assert result.training.iterations == 6
    assert len(result.losses) == 3
    assert "on_report failed (ValueError: no plot)" in capsys.readouterr().err


def test_stop_ends_the_run_after_the_update_and_resume_completes_it(
    model_directory, data_directory, by_command, tmp_path
):
    asked = iter([False, False, False, True])
    result = nalora_mlx.finetune(
        model_directory,
        data_directory,
        tmp_path / "a",
        progress=False,
        stop=lambda: next(asked),
        **SETTINGS_OF_RUN,
    )
    assert 0 < result.training.iterations < 6
    result = nalora_mlx.finetune(output=tmp_path / "a", resume=True, progress=False)
    assert result.training.iterations == 6
    assert equal(tmp_path / "a", by_command)


def test_rows_in_memory_must_be_given_again(model_directory, data_directory, by_command, tmp_path):
    data = {name: rows_of(data_directory, name) for name in ("train", "valid")}
    settings = SETTINGS_OF_RUN | {"iters": 3}
    nalora_mlx.finetune(model_directory, data, tmp_path / "a", progress=False, **settings)
    with pytest.raises(InputError, match="rows given in Python; give them again"):
        nalora_mlx.finetune(output=tmp_path / "a", resume=True, progress=False)
    nalora_mlx.finetune(data=data, output=tmp_path / "a", resume=True, iters=6, progress=False)
    assert equal(tmp_path / "a", by_command)


def test_ctrl_c_saves_and_is_raised(model_directory, data_directory, by_command, tmp_path):
    def interrupt(info):
        if info["iteration"] == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        nalora_mlx.finetune(
            model_directory,
            data_directory,
            tmp_path / "a",
            progress=False,
            on_report=interrupt,
            **SETTINGS_OF_RUN,
        )
    result = nalora_mlx.finetune(output=tmp_path / "a", resume=True, progress=False)
    assert [step for step, _ in result.losses][-1] == 6
    assert equal(tmp_path / "a", by_command)


def test_it_runs_in_a_thread(model_directory, data_directory, by_command, tmp_path):
    def work():
        nalora_mlx.finetune(
            model_directory, data_directory, tmp_path / "a", progress=False, **SETTINGS_OF_RUN
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert equal(tmp_path / "a", by_command)


def test_generate_and_fuse_answer_as_mlx_lm_does(model_directory, data_directory, tmp_path, capsys):
    settings = SETTINGS_OF_RUN | {"iters": 30}
    result = nalora_mlx.finetune(model_directory, data_directory, tmp_path / "a", progress=False, **settings)
    question = rows_of(data_directory, "train")[0]["prompt"]
    answer = result.generate(question, max_tokens=8)
    assert answer
    fused = result.fuse(tmp_path / "fused")
    capsys.readouterr()
    for path, adapter in ((model_directory, str(result.path)), (fused, None)):
        model, tokenizer = mlx_lm.load(str(path), adapter_path=adapter)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True
        )
        assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=8) == answer
    chat = [{"role": "user", "content": question}]
    assert result.generate(chat, max_tokens=8) == answer


def test_sample_answers_are_those_of_mlx_lm(model_directory, data_directory, tmp_path):
    settings = SETTINGS_OF_RUN | {"iters": 30, "samples": True}
    data = {"train": rows_of(data_directory, "train"), "valid": rows_of(data_directory, "valid")}
    result = nalora_mlx.finetune(model_directory, data, tmp_path / "a", progress=False, **settings)
    assert len(result.samples) == 3
    for adapter, key in ((None, "before"), (str(result.path), "after")):
        model, tokenizer = mlx_lm.load(str(model_directory), adapter_path=adapter)
        for sample, row in zip(result.samples, data["valid"], strict=False):
            assert (sample["prompt"], sample["expected"]) == (row["prompt"], row["completion"])
            prompt = tokenizer.apply_chat_template(sample["messages"], add_generation_prompt=True)
            answer = mlx_lm.generate(model, tokenizer, prompt, max_tokens=96)
            assert sample[key] == answer.strip()
    assert any(sample["before"] != sample["after"] for sample in result.samples)


def test_report_writes_a_page(model_directory, data_directory, tmp_path):
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    result = nalora_mlx.finetune(
        model_directory, data_directory, tmp_path / "a", progress=False, **SETTINGS_OF_RUN
    )
    page = result.report(tmp_path / "page")
    assert page.read_text().startswith("<!")


BAD = {
    "unknown": ({"lr": 1e-4}, "unknown key 'lr'; did you mean 'learning_rate'"),
    "nothing": ({}, "give model and data, or resume=True"),
    "no data": ({"model": "x"}, "give data, or resume=True"),
    "train": ({"train": True}, "train is not a setting: it always trains"),
    "path": ({"adapter_path": "a"}, "adapter_path is called output here"),
    "output": ({"model": "x", "data": "y", "output": None}, "output is None; give a directory"),
    "hub": ({"hf_dataset": {"path": "a/b"}}, "give model, or resume=True"),
    "number": ({"model": "x", "data": 5}, "data is int; give a path, or a list of dicts"),
    "columns": ({"model": "x", "data": {"prompt": ["a"]}}, "a mapping with prompt; give a list of dicts"),
    "row": ({"model": "x", "data": [{"text": "a"}, "b"]}, "row 2 is str; give a dict"),
    "form": ({"model": "x", "data": [{"a": 1}]}, r"row 1: no known format.*prompt_feature.*\(found 'a'\)"),
    "no rows": ({"model": "x", "data": []}, "no rows for train"),
    "type": (
        {"model": "x", "data": "y", "batch_size": "two"},
        "batch_size is 'two'; it takes a whole number",
    ),
    "range": ({"model": "x", "data": "y", "rank": 0}, "rank is 0"),
    "no run": ({"resume": True, "output": "nowhere"}, "resume: no checkpoint in nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_get_one_clear_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        nalora_mlx.finetune(**arguments)
    assert "--" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_every_setting_is_an_argument_and_messages_name_it_so():
    names = {
        name for name in RunConfig.__dataclass_fields__ if name not in ("lora_parameters", "na_parameters")
    }
    assert names - set(SETTINGS) == {"model", "data", "adapter_path", "train", "plan"}
    text = "--mask-prompt, --prompt-key and --no-such; write --grad-clip 1, or a--b"
    assert python_names(text) == "mask_prompt, prompt_feature and --no-such; write grad_clip 1, or a--b"
    text = "--data x: saved; nalora lora --resume --adapter-path a continues"
    assert python_names(text) == "data x: saved; nalora lora --resume --adapter-path a continues"


def test_a_run_leaves_the_process_as_it_was(model_directory, data_directory, tmp_path, monkeypatch):
    handler, limit = signal.getsignal(signal.SIGINT), mx.set_memory_limit(2**40)
    mx.set_memory_limit(limit)
    monkeypatch.chdir(tmp_path)
    settings = SETTINGS_OF_RUN | {"iters": 2, "memory_budget": 10**9, "samples": True}
    result = nalora_mlx.finetune(model_directory, data_directory, "a", progress=False, **settings)
    assert signal.getsignal(signal.SIGINT) == handler
    assert mx.set_memory_limit(limit) == limit
    monkeypatch.chdir(tmp_path.parent)
    assert result.samples
    with pytest.raises(InputError, match="unrecognized arguments: --overwrte"):
        result.fuse(tmp_path / "fused", "--overwrte")


def test_ctrl_c_while_samples_are_answered_leaves_a_finished_run(
    model_directory, data_directory, tmp_path, monkeypatch
):
    from nalora_mlx.training import job

    def write_samples(*arguments):
        signal.raise_signal(signal.SIGINT)
        return []

    monkeypatch.setattr(job, "write_samples", write_samples)
    settings = SETTINGS_OF_RUN | {"iters": 2, "samples": True}
    result = nalora_mlx.finetune(model_directory, data_directory, tmp_path / "a", progress=False, **settings)
    assert result.training.iterations == 2


def test_train_takes_dicts_with_a_tokenizer_and_previews(data_directory, model_directory):
    from nalora_mlx import NALoRAConfig, TrainingConfig, adapt, preview, train

    rows, valid = rows_of(data_directory, "train"), rows_of(data_directory, "valid")
    results = []
    for as_dicts in (True, False):
        model, tokenizer = mlx_lm.load(str(model_directory))
        mx.random.seed(0)
        adapt(model, NALoRAConfig(rank=2, num_layers=-1))
        settings = TrainingConfig(iters=3, batch_size=2)
        if as_dicts:
            result = train(model, rows, valid, settings, tokenizer=tokenizer, mask_prompt=True)
        else:
            result = train(model, preview(rows, tokenizer), preview(valid, tokenizer), settings)
        results.append((result.train_loss, result.first_valid_loss, result.valid_loss))
    assert results[0] == results[1]
    with pytest.raises(InputError, match="train_set holds dict; give rows as dicts with tokenizer="):
        train(model, rows)
    with pytest.raises(InputError, match=r"train_set: row 1: no known format"):
        train(model, preview([{"a": "b"}], tokenizer))


def test_tokenize_split_takes_dicts_and_has_defaults(data_directory, model_directory):
    from nalora_mlx.data import tokenize_split

    _, tokenizer = mlx_lm.load(str(model_directory))
    rows = rows_of(data_directory, "train")
    plain = tokenize_split(rows, tokenizer)
    with_sources = tokenize_split([(f"row {i}", row) for i, row in enumerate(rows, 1)], tokenizer)
    assert [s.source for s in plain.sequences] == [s.source for s in with_sources.sequences]
    assert all(
        (a.tokens == b.tokens).all() and (a.loss_mask == b.loss_mask).all()
        for a, b in zip(plain.sequences, with_sources.sequences, strict=True)
    )
    with pytest.raises(InputError, match="row 2 is str"):
        tokenize_split([rows[0], "x"], tokenizer)


def test_a_slow_machine_is_announced_before_training(
    model_directory, data_directory, tmp_path, monkeypatch, capsys
):
    from nalora_mlx.training import job

    settings = SETTINGS_OF_RUN | {"iters": 1}
    monkeypatch.setattr(job, "matmul_gflops", lambda: 3.0)
    nalora_mlx.finetune(model_directory, data_directory, tmp_path / "a", **settings)
    assert "matrix products are slow" not in capsys.readouterr().out  # a tiny model: nobody would notice
    monkeypatch.setattr(job, "REAL_MODEL", 0)
    nalora_mlx.finetune(model_directory, data_directory, tmp_path / "a", **settings)
    said = " ".join(capsys.readouterr().out.split())
    assert said.index("matrix products are slow") < said.index("validation loss")
