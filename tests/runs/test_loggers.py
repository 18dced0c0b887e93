"""Services that receive metrics: TensorBoard, mlx-lm's callbacks, and their failures."""

import json
import re
import struct
import sys
import time
from types import SimpleNamespace

import pytest
from mlx_lm.tuner import callbacks

import nalora_mlx
from nalora_mlx.__main__ import main
from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.optional_dependencies import install_command, install_packages
from nalora_mlx.runs.loggers import reporters

FLAGS = ["--batch-size", "3", "--steps-per-report", "2", "--steps-per-eval", "4", "--save-every", "4"]


def train(model_directory, data_directory, output, *flags):
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", output]
    return main(["lora", "--train", *map(str, where), *FLAGS, *flags])


def records(output, split):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


# --- TensorBoard --------------------------------------------------------------------------------------------


def events(path):
    """Read the events of a file. Each record is length, checksum, data, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, place = path.read_bytes(), 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        yield Event.FromString(data[place + 12 : place + 12 + length])
        place += 16 + length


def scalars(directory):
    """Return {tag: {step: value}} as TensorBoard reads them. A session that starts at a step drops later values."""
    found = {}
    for path in sorted(directory.iterdir(), key=lambda p: (p.name.split(".")[3], p.stat().st_mtime_ns)):
        for event in events(path):
            if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                found = {
                    tag: {step: value for step, value in values.items() if step < event.step}
                    for tag, values in found.items()
                }
            for value in event.summary.value:
                values = found.setdefault(value.tag, {})
                assert event.step not in values, (value.tag, event.step)  # written once
                values[event.step] = value.simple_value
    return found


def test_tensorboard_has_all_metrics_after_a_resume(model_directory, data_directory, tmp_path):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX; pip install -e '.[tensorboard]'")
    output = tmp_path / "adapters"
    flags = ["--report-to", "tensorboard"]
    assert train(model_directory, data_directory, output, *flags, "--iters", "8") == 0
    # Resume from iteration 4, so that iterations 5 to 8 are reported again.
    checkpoint = output / "checkpoints" / "step-0000004"
    time.sleep(1.1)  # file names have a resolution of one second
    assert (
        train(model_directory, data_directory, output, *flags, "--iters", "10", "--resume", str(checkpoint))
        == 0
    )
    found = scalars(output / "tensorboard")
    files = list((output / "tensorboard").iterdir())
    assert len(files) == 2
    for split in ("train", "valid"):
        expected = {r["step"]: r["loss"] for r in records(output, split)}
        assert found[f"loss/{split}"] == pytest.approx(expected, rel=1e-5)
    assert sorted(found["loss/train"]) == [2, 4, 6, 8, 10]
    rates = {r["step"]: r["learning_rate"] for r in records(output, "train")}
    assert found["training/learning_rate"] == pytest.approx(rates, rel=1e-5)
    layer = "model.layers.0.mlp"
    expected = {r["step"]: r["layers"][layer]["misalignment"] for r in records(output, "train")}
    assert found[f"misalignment/{layer}"] == pytest.approx(expected, rel=1e-5)


# --- mlx-lm's callbacks -------------------------------------------------------------------------------------


class Service:
    """Stands in for wandb and swanlab; records what it receives."""

    def __init__(self):
        self.started, self.logged = [], []

    def init(self, **settings):
        self.started.append(settings)

    def log(self, values, step):
        self.logged.append((step, values))


def test_the_callbacks_of_mlx_lm_receive_the_metrics(model_directory, data_directory, tmp_path, monkeypatch):
    services = {"wandb": Service(), "swanlab": Service()}
    for name, service in services.items():
        monkeypatch.setattr(callbacks, name, service)
    output = tmp_path / "adapters"
    flags = ["--iters", "4", "--report-to", "wandb, SwanLab", "--project-name", "cats"]
    assert train(model_directory, data_directory, output, *flags) == 0
    assert [s["project"] for service in services.values() for s in service.started] == ["cats", "cats"]
    assert services["wandb"].started[0]["config"]["batch_size"] == 3
    assert services["wandb"].logged == services["swanlab"].logged
    logged = {0: {}, 2: {}, 4: {}}
    for step, values in services["wandb"].logged:
        assert values["iteration"] == step
        logged[step] |= values
    for record in records(output, "train"):
        values = logged[record["step"]]
        assert values["train_loss"] == pytest.approx(record["loss"], rel=1e-5)
        assert values["trained_tokens"] == record["tokens"]
        assert values["peak_memory"] == pytest.approx(record["peak_memory_gb"], rel=1e-5)
        assert values["learning_rate"] == pytest.approx(1e-5)
    for record in records(output, "valid"):
        assert logged[record["step"]]["val_loss"] == pytest.approx(record["loss"], rel=1e-5)
    assert len(services["wandb"].logged) == 4


def test_nothing_starts_before_the_run(model_directory, data_directory, tmp_path, monkeypatch):
    service = Service()
    monkeypatch.setattr(callbacks, "wandb", service)
    assert train(model_directory, data_directory, tmp_path / "a", "--report-to", "wandb", "--plan") == 0
    assert service.started == []


# --- preference training -------------------------------------------------------------------------------------


TRL_TAGS = {
    "rewards/accuracies": "accuracy",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "logps/chosen": "chosen_logp",
    "logps/rejected": "rejected_logp",
}


def test_the_measures_of_preference_training_are_reported(model_directory, tmp_path, monkeypatch):
    """TensorBoard gets them under the tags of TRL, the others and the callbacks of finetune with mlx-lm's prefixes."""
    pytest.importorskip("tensorboardX", reason="needs tensorboardX; pip install -e '.[tensorboard]'")
    service, reports, validations = Service(), [], []
    monkeypatch.setattr(callbacks, "wandb", service)
    animals = ("cat", "dog", "bird")
    rows = [
        {"prompt": f"what is the {a} ?", "chosen": f"the {a} is red", "rejected": "one two"} for a in animals
    ]
    result = nalora_mlx.finetune(
        model_directory,
        {"train": rows, "valid": rows[:2]},
        tmp_path / "run",
        train_mode="dpo",
        iters=4,
        batch_size=3,
        learning_rate=1e-2,
        steps_per_report=2,
        steps_per_eval=4,
        report_to="tensorboard,wandb",
        samples=False,
        progress=False,
        on_report=reports.append,
        on_validation=validations.append,
    )
    assert repr(result).startswith("<FinetuneResult: validation accuracy 0.50 -> 1.00, loss 0.6931 -> ")
    found, logged = scalars(tmp_path / "run" / "tensorboard"), [values for _, values in service.logged]
    for split, prefix, key, infos in (
        ("train", "train", "train", reports),
        ("valid", "eval", "val", validations),
    ):
        written = records(tmp_path / "run", split)
        assert len(written) == len(infos) == 2
        assert all(info in logged for info in infos)
        for tag, name in TRL_TAGS.items():
            expected = {record["step"]: record[name] for record in written}
            assert found[f"{prefix}/{tag}"] == pytest.approx(expected, rel=1e-4)
            assert [info[f"{key}_{name}"] for info in infos] == pytest.approx([*expected.values()], rel=1e-4)
        margins = {record["step"]: record["chosen_reward"] - record["rejected_reward"] for record in written}
        assert found[f"{prefix}/rewards/margins"] == pytest.approx(margins, rel=1e-3)
        assert [info[f"{key}_margin"] for info in infos] == pytest.approx([*margins.values()], rel=1e-3)
        assert margins[4] > 0.1
    assert [info["val_kl"] for info in validations] == pytest.approx([*found["eval/kl"].values()], rel=1e-4)
    assert validations[1]["val_kl"] > 0 == validations[0]["val_kl"]
    assert "train/kl" not in found


def test_supervised_training_reports_no_measures(model_directory, data_directory, tmp_path, monkeypatch):
    service = Service()
    monkeypatch.setattr(callbacks, "wandb", service)
    assert train(model_directory, data_directory, tmp_path / "a", "--iters", "4", "--report-to", "wandb") == 0
    names = "iteration train_loss learning_rate iterations_per_second tokens_per_second trained_tokens peak_memory"
    assert {tuple(values) for _, values in service.logged} == {
        tuple(names.split()),
        ("iteration", "val_loss", "val_time"),
    }


# --- failures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["init", "log"])
def test_a_service_that_fails_does_not_end_the_run(
    model_directory, data_directory, tmp_path, monkeypatch, capsys, when
):
    def fail(*_, **__):
        raise ConnectionError("no network\nmore of it")

    service, other = Service(), Service()
    monkeypatch.setattr(service, when, fail)
    monkeypatch.setattr(callbacks, "wandb", service)
    monkeypatch.setattr(callbacks, "swanlab", other)
    output = tmp_path / "adapters"
    assert train(model_directory, data_directory, output, "--iters", "4", "--report-to", "wandb,swanlab") == 0
    assert (output / "adapters.safetensors").exists()
    out = capsys.readouterr().out
    assert out.count("--report-to wandb fails (no network); the run goes on") == 1
    assert len(other.logged) == 4
    assert service.logged == []


def test_ctrl_c_is_not_a_failure_of_a_service(monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(callbacks, "wandb", SimpleNamespace(init=interrupted))
    (listen,) = reporters(RunConfig(report_to="wandb"))
    with pytest.raises(KeyboardInterrupt):
        listen({"event": "start", "iterations": 1, "done": 0})


def test_unknown_and_missing_services_are_errors(monkeypatch):
    monkeypatch.setattr(callbacks, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    for named, words in (
        ("nothing", "--report-to nothing: choose from swanlab, wandb, tensorboard"),
        ("wandb", re.escape(f"--report-to wandb: needs wandb; {install_packages('wandb')}")),
        (
            "tensorboard",
            re.escape(f"--report-to tensorboard: needs tensorboardX; {install_command('tensorboard')}"),
        ),
    ):
        with pytest.raises(InputError, match=words):
            reporters(RunConfig(report_to=named))
    assert reporters(RunConfig()) == []
