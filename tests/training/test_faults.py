"""Faults of a run: NaN, loss spikes, no progress, a full disk."""

import json
import math
import re
import shutil
import subprocess
import sys
import threading

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from nalora_mlx.__main__ import main
from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.core import storage
from nalora_mlx.core.config import RunConfig, TrainingConfig
from nalora_mlx.core.errors import InputError, RunError
from nalora_mlx.core.locks import lock_directory
from nalora_mlx.data import batches as batching
from nalora_mlx.data.tokenization import Example
from nalora_mlx.runs import checkpoints, directory
from nalora_mlx.runs.loggers import reporters
from nalora_mlx.runs.metrics import MetricsFile
from nalora_mlx.runs.progress import SPIKE_HISTORY, Progress
from nalora_mlx.runs.record import record
from nalora_mlx.training import job
from nalora_mlx.training.step import TrainingStep
from nalora_mlx.training.trainer import train
from tests.conftest import VOCABULARY, build_examples, build_model, llama_args, masked_config

POISON = VOCABULARY - 1  # a token whose embedding is NaN


def adapted(poisoned=False, **settings):
    model = build_model(args=llama_args(num_hidden_layers=2, tie_word_embeddings=False))
    if poisoned:
        weight = np.array(model.model.embed_tokens.weight)
        weight[POISON] = np.nan
        model.model.embed_tokens.weight = mx.array(weight)
    mx.random.seed(11)
    adapt(model, masked_config(**({"num_layers": -1, "rank": 4, "scale": 4.0, "mask_warmup": 0} | settings)))
    mx.eval(model.parameters())
    return model


def rows(count=12, poisoned=()):
    examples = []
    for i, example in enumerate(build_examples(count, seed=3, high=9)):
        tokens = np.minimum(example.tokens, POISON - 1)
        if i in poisoned:
            tokens[1] = POISON
        examples.append(Example(tokens, example.loss_mask, f"train.jsonl:{i + 1}"))
    return examples


def snapshot(step):
    """Copy everything that a step changes, by name."""
    trees = [step.model.trainable_parameters(), step.state_tree()]
    return {name: np.array(array) for name, array in tree_flatten(trees)}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def run_window(step, window):
    """Run one accumulation window; return the loss of its last batch."""
    accumulated, tokens = None, sum(batch.supervised_tokens for batch in window)
    for i, batch in enumerate(window, 1):
        total, accumulated = step(batch, tokens, accumulated, i == len(window))
        mx.eval(step.state, total, accumulated)
    return total.item()


# --- NaN and infinity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("build", [lambda: optim.Adam(1e-2), lambda: optim.Muon(1e-2)], ids=["adam", "muon"])
def test_a_nan_update_changes_nothing(build, compiled):
    examples = rows(poisoned=[5])
    good = [batching.collate(examples, part) for part in ((0, 1), (2, 3), (6, 7), (8, 9))]
    bad = batching.collate(examples, (4, 5))
    step = TrainingStep(adapted(poisoned=True), build(), masked_config(mask_warmup=0), compiled)
    undisturbed = TrainingStep(adapted(poisoned=True), build(), masked_config(mask_warmup=0), compiled)
    for one in (step, undisturbed):
        assert math.isfinite(run_window(one, good[:2]))
        assert one.health.finite.item()
    before = snapshot(step)
    for window in ([bad], [good[0], bad], [bad, good[0], good[1]]):
        run_window(step, window)
        assert not step.health.finite.item()
        assert_equal(snapshot(step), before)
    for one in (step, undisturbed):
        run_window(one, good[2:])
        assert one.health.finite.item()
    assert_equal(snapshot(step), snapshot(undisturbed))
    assert any((snapshot(step)[name] != before[name]).any() for name in before)


def test_nan_gradients_and_weights_skip_the_update():
    batch = batching.collate(rows(), (0, 1))
    step = TrainingStep(adapted(), optim.SGD(1.0), masked_config(), compiled=False)
    run_window(step, [batch])
    before, inner = snapshot(step), step._loss_and_gradients

    def infinite_gradient(*arguments):
        value, gradients = inner(*arguments)
        name = "model.layers.1.mlp.down_proj.lora_b"
        stack, members = next(item for item in step.weights.stacks.members.items() if name in item[1])
        parts = gradients[stack].reshape(len(members), -1)
        parts = parts.at[members.index(name), 0].add(math.inf)
        return value, gradients | {stack: parts.reshape(gradients[stack].shape)}

    def infinite_loss(*arguments):
        (weighted, (_, *rest)), gradients = inner(*arguments)
        return (weighted, (mx.array(math.inf), *rest)), gradients

    step._loss_and_gradients = infinite_gradient
    assert math.isfinite(run_window(step, [batch]))
    assert not step.health.finite.item()
    assert_equal(snapshot(step), before)
    # An infinite loss earlier in the window counts for the whole window.
    step._loss_and_gradients = infinite_loss
    accumulated = step(batch, 2 * batch.supervised_tokens, None, False)[1]
    step._loss_and_gradients = inner
    step(batch, 2 * batch.supervised_tokens, accumulated, True)
    assert not step.health.finite.item()
    assert_equal(snapshot(step), before)
    # A learning rate so high that the new weights overflow.
    step = TrainingStep(adapted(), optim.SGD(1e38), masked_config())
    before = snapshot(step)
    assert math.isfinite(run_window(step, [batch]))
    assert not step.health.finite.item()
    assert_equal(snapshot(step), before)


def named_rows(notice):
    """Return the line numbers in a notice's list of rows."""
    return {int(number) for number in re.findall(r":(\d+)", notice.partition("rows: ")[2])}


def watched(model, examples, output=None, valid=(), optimizer=None, **settings):
    """Run `train`; return its result, its events and the texts of its notices."""
    events = []
    config = TrainingConfig(**({"iters": 12, "batch_size": 2, "steps_per_report": 4} | settings))
    adapter_config = {"fine_tune_type": "lora"} if output else None
    result = train(
        model, examples, valid, config, optimizer or optim.Adam(1e-2), output, [events.append], adapter_config
    )
    return result, events, [e["text"] for e in events if e["event"] == "notice"]


def test_a_skipped_update_names_its_rows_and_the_run_goes_on(monkeypatch):
    losses, record_loss = [], Progress.record_loss
    monkeypatch.setattr(Progress, "record_loss", lambda p, loss: losses.append(loss) or record_loss(p, loss))
    result, events, notices = watched(adapted(poisoned=True), rows(poisoned=[7]), iters=18)
    assert result.skipped == 3  # once per epoch
    assert result.updates == 15
    assert len(notices) == 3
    for notice in notices:
        assert "the loss is nan; the update is skipped; rows: " in notice
        assert 8 in named_rows(notice)
    assert math.isfinite(result.train_loss)
    assert len(losses) == 15
    assert all(map(math.isfinite, losses))  # NaN would spoil the detection of spikes
    reports = [e for e in events if e.get("split") == "train"]
    assert reports[-1]["skipped"] == 3
    assert all(math.isfinite(e["loss"]) for e in reports)


def test_too_many_skipped_updates_stop_the_run_and_save_the_last_good_state(tmp_path):
    examples = rows(poisoned=range(12))
    examples[:4] = rows()[:4]
    model = adapted(poisoned=True)
    with pytest.raises(FloatingPointError, match=r"3 updates in a row were skipped, up to .*lower the"):
        watched(model, examples, tmp_path / "a", iters=40, save_every=1000)
    (checkpoint,) = checkpoints.steps(tmp_path / "a" / "checkpoints").values()
    state = json.loads((checkpoint / "training_state.json").read_text())["progress"]
    assert state["skipped"] >= 3
    for path in (tmp_path / "a").rglob("*.safetensors"):
        assert all(mx.isfinite(a).all().item() for a in mx.load(str(path)).values() if a.dtype == mx.float32)
    with pytest.raises(FloatingPointError, match="2 updates in a row"):
        watched(adapted(poisoned=True), examples, max_bad_steps=2, iters=40)


def test_the_error_says_where_the_last_good_state_is(tmp_path, monkeypatch):
    """Without naming a directory that nothing could be written to."""
    examples = rows(poisoned=range(12))
    with pytest.raises(FloatingPointError, match=rf"; the state before them is in {tmp_path / 'a'}; lower"):
        watched(adapted(poisoned=True), examples, tmp_path / "a")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_directory", fail)
    with pytest.raises(FloatingPointError) as raised:
        watched(adapted(poisoned=True), examples, tmp_path / "b")
    assert (
        "; the state before them could not be saved (No space left on device), there is no checkpoint yet; "
        in str(raised.value)
    )
    assert "is in" not in str(raised.value)


def test_all_rows_of_a_skipped_update_are_named():
    examples = rows(poisoned=range(12))
    _, _, notices = watched(adapted(poisoned=True), examples, batch_size=12, iters=2)
    assert len(notices) == 2
    assert named_rows(notices[0]) == set(range(1, 13))
    assert "more" not in notices[0]


# --- a previous run -----------------------------------------------------------------------------------------


def test_train_moves_a_previous_run_aside(tmp_path):
    """Pruning only removes checkpoints of the new run, and nothing of the previous one is lost."""
    output = tmp_path / "a"
    watched(adapted(), rows(), output, save_every=4)
    (output / "best").mkdir()
    (output / "best" / "adapters.safetensors").write_bytes((output / "adapters.safetensors").read_bytes())
    before = {p.relative_to(output): p.read_bytes() for p in output.rglob("*") if p.is_file()}
    _, _, notices = watched(adapted(rank=2), rows(), output, save_every=2, keep_last=1, iters=6)
    aside = output / "previous" / "1"
    assert notices == [f"moved the previous run in {output} to {aside}"]
    assert list(checkpoints.steps(output / "checkpoints")) == [6]
    assert {p.relative_to(aside): p.read_bytes() for p in aside.rglob("*") if p.is_file()} == before


def test_train_refuses_a_directory_in_use(tmp_path):
    output = tmp_path / "a"
    watched(adapted(), rows(), output, iters=2)
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    with lock_directory(output), pytest.raises(InputError, match="another run is writing there"):
        watched(adapted(), rows(), output, iters=2)
    (tmp_path / "b" / "best").mkdir(parents=True)
    (tmp_path / "b" / "best" / "theirs").write_text("x")
    with pytest.raises(InputError, match="has a 'best' that no run wrote"):
        watched(adapted(), rows(), tmp_path / "b", iters=2)
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before


def test_a_foreign_run_json_is_moved_aside(tmp_path, model_directory, data_directory):
    output = tmp_path / "a"
    output.mkdir()
    (output / "run.json").write_text('{"mine": true}')
    assert main(command(model_directory, data_directory, output)) == 0
    assert json.loads((output / "previous" / "1" / "run.json").read_text()) == {"mine": True}
    assert "settings" in json.loads((output / "run.json").read_text())


def test_a_notice_says_why_the_logits_take_memory():
    assert watched(adapted(), rows(), iters=1)[2] == []
    model = adapted()
    model.lm_head.unfreeze()
    assert [n[:32] for n in watched(model, rows(), iters=1)[2]] == ["the model's output head is train"]

    class WithoutHead(type(model)):
        """A model whose logits depend on more than its last hidden states."""

        def __call__(self, inputs, cache=None):
            return super().__call__(inputs, cache) + inputs[..., None]

    model = adapted()
    model.__class__ = WithoutHead
    assert TrainingStep(model, optim.Adam(1e-2)).loss.head is None
    notices = watched(model, rows(), iters=1)[2]
    assert [n[:44] for n in notices] == ["the model's output head was not found, so lo"]


def test_a_nan_validation_loss_is_reported_and_never_best(tmp_path):
    valid = rows(4, poisoned=[1])
    result, _, notices = watched(
        adapted(poisoned=True), rows(), tmp_path / "a", valid, steps_per_eval=6, val_batches=-1
    )
    assert result.best_valid_loss is None
    assert not (tmp_path / "a" / "best").exists()
    assert [n for n in notices if "validation loss is nan" in n] == [
        f"iteration {i}: the validation loss is nan" for i in (0, 6, 12)
    ]


# --- clipping, listeners, spikes, no progress -----------------------------------------------------------------


def sgd_step(accumulate, **settings):
    """Return the change of each weight in one update of SGD, and the gradient norm that the run reports."""
    model = adapted(mask="off", step_scaling=False)
    before = {k: np.array(v, np.float64) for k, v in adapter_weights(model).items()}
    events = watched(
        model,
        rows(6),
        optimizer=optim.SGD(1.0),
        iters=accumulate,
        grad_accumulation_steps=accumulate,
        **settings,
    )[1]
    after = {k: np.array(v, np.float64) for k, v in adapter_weights(model).items()}
    norm = next(e["gradient_norm"] for e in events if e.get("split") == "train")
    return {k: after[k] - before[k] for k in before}, norm


@pytest.mark.parametrize("accumulate", [1, 3])
def test_clipping_uses_the_norm_of_the_accumulated_gradient(accumulate):
    step, reported = sgd_step(accumulate)
    norm = math.sqrt(sum(float((a**2).sum()) for a in step.values()))
    assert reported == pytest.approx(norm, rel=1e-3)
    clipped, reported_again = sgd_step(accumulate, grad_clip=norm / 3)
    assert reported_again == reported  # the norm before clipping
    length = math.sqrt(sum(float((a**2).sum()) for a in clipped.values()))
    assert length == pytest.approx(norm / 3, rel=1e-4)
    for name in step:
        np.testing.assert_allclose(clipped[name], step[name] / 3, rtol=2e-3, atol=1e-6)
    unclipped, _ = sgd_step(accumulate, grad_clip=norm * 2)
    for name in step:
        np.testing.assert_array_equal(unclipped[name], step[name])


@pytest.mark.parametrize(
    ("error", "listener"),
    [(ConnectionError("no network"), 0), (UnicodeEncodeError("latin-1", "█", 0, 1, "no"), 1)],
    ids=["a service", "the display"],
)
def test_a_failing_listener_is_dropped_and_the_run_goes_on(error, listener, tmp_path, capsys):
    received = [[], []]

    def listener_of(number):
        def listen(event):
            received[number].append(event["event"])
            if number == listener and event.get("step") == 4:
                raise error

        return listen

    config = TrainingConfig(iters=12, batch_size=2, steps_per_report=4, save_every=4)
    result = train(
        adapted(), rows(), (), config, optim.Adam(1e-2), tmp_path / "a", list(map(listener_of, (0, 1)))
    )
    assert result.iterations == 12
    assert list(checkpoints.steps(tmp_path / "a" / "checkpoints")) == [4, 8, 12]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: listen failed ({type(error).__name__}: ")
    assert line.endswith("); the run goes on without it")
    assert received[listener].count("step") == 4
    assert received[1 - listener].count("step") == 12
    assert received[1 - listener][-1] == "end"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=["Ctrl-C", "exit"])
def test_a_listener_can_end_the_process(error):
    def listen(event):
        raise error

    with pytest.raises(type(error)):
        train(adapted(), rows(), (), TrainingConfig(iters=2), listeners=[listen])


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_clipping_equals_mlx(limit):
    received = []

    class Recording(optim.SGD):
        def apply_gradients(self, gradients, parameters):
            received.append(gradients)
            return super().apply_gradients(gradients, parameters)

    batch = batching.collate(rows(), (0, 1))
    for grad_clip in (None, limit):
        step = TrainingStep(adapted(), Recording(0.1), compiled=False, grad_clip=grad_clip)
        run_window(step, [batch])
    unclipped, clipped = received
    expected, norm = optim.clip_grad_norm(unclipped, limit)
    assert 1e-2 < norm.item() < 1e2
    for (name, a), (_, b) in zip(tree_flatten(clipped), tree_flatten(expected), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, err_msg=name)


def test_repeated_loss_spikes_are_reported():
    progress, reported = Progress(), []
    rng = np.random.default_rng(0)
    for iteration in range(400):
        loss = 2 + 0.1 * rng.standard_normal()
        if iteration in (70, 120, 160, 300, 320):
            loss *= 5  # three within a hundred iterations, then two
        progress.record_batch(loss, 1, 0.1)
        if progress.record_loss(loss):
            reported.append(iteration)
    assert reported == [160]
    assert len(progress.recent) == SPIKE_HISTORY
    falling = Progress()
    for iteration in range(300):
        falling.record_batch(1, 1, 0.1)
        assert not falling.record_loss(8 * 0.98**iteration + rng.random())


def test_early_stopping(tmp_path):
    settings = {"steps_per_eval": 3, "early_stopping": 2, "val_batches": -1, "iters": 40}
    result, _, _ = watched(
        adapted(), rows(), tmp_path / "a", rows(4), optim.SGD(0.0), grad_accumulation_steps=4, **settings
    )
    assert result.stopped == "no better validation loss in 2 validations"
    assert result.best_iteration == 4  # the end of the accumulation window with iteration 3
    assert result.iterations == 12
    assert list(checkpoints.steps(tmp_path / "a" / "checkpoints")) == [12]
    assert (tmp_path / "a" / "adapters.safetensors").exists()
    with pytest.raises(InputError, match="early_stopping needs a validation set"):
        watched(adapted(), rows(), early_stopping=2)


# --- a full disk --------------------------------------------------------------------------------------------


def test_a_run_survives_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch):
    failures = [True] * 2
    write = storage.write_directory

    def fail_twice(path, files):
        if path.name.startswith("step-") and failures:
            failures.pop()
            raise OSError(28, "No space left on device")
        write(path, files)

    monkeypatch.setattr(storage, "write_directory", fail_twice)
    result, events, notices = watched(adapted(), rows(), tmp_path / "a", save_every=4)
    assert [e["step"] for e in events if e["event"] == "saved"] == [12]
    assert notices == [
        "iteration 4 could not be saved (No space left on device); there is no checkpoint yet",
        "iteration 8 could not be saved (No space left on device); there is no checkpoint yet",
    ]
    assert result.iterations == 12


def test_failing_to_save_the_end_of_a_run_is_an_error(tmp_path, monkeypatch):
    write = storage.write_directory

    def fail_late(path, files):
        if path.name == "step-0000012":
            raise OSError(28, "No space left on device")
        write(path, files)

    monkeypatch.setattr(storage, "write_directory", fail_late)
    with pytest.raises(
        RunError, match=r"the last complete checkpoint is iteration 8; free some disk space.*--resume"
    ):
        watched(adapted(), rows(), tmp_path / "a", save_every=4)
    assert list(checkpoints.steps(tmp_path / "a" / "checkpoints")) == [4, 8]


def test_a_best_adapter_that_was_not_saved_does_not_count(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    write = storage.write_directory
    monkeypatch.setattr(
        storage, "write_directory", lambda path, f: fail() if path.name == "best" else write(path, f)
    )
    result, _, notices = watched(
        adapted(), rows(), tmp_path / "a", rows(4), steps_per_eval=6, val_batches=-1, save_every=6
    )
    assert result.best_valid_loss is None
    assert sum("the best adapter could not be saved" in n for n in notices) == 2


def test_disk_space_is_checked_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "free_space", lambda _: 10_000)
    with pytest.raises(
        InputError, match=r"0\.0 MB free, but a checkpoint and the adapters take .* MB; free some disk space"
    ):
        watched(adapted(), rows(), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    # A checkpoint holds the adapter, the best adapter and the state; the run directory up to three more adapters.
    checkpoint, adapters = 2 * 1000 + 3000, 3 * 1000
    monkeypatch.setattr(storage, "free_space", lambda _: 4 * checkpoint + adapters)
    assert directory.check_space(tmp_path, 1000, 3000, 4, None) is None
    assert "--keep-last 3 fits" in directory.check_space(tmp_path, 1000, 3000, 5, None)
    assert directory.check_space(tmp_path, 1000, 3000, 500, 3) is None


def test_a_checkpoint_has_the_predicted_size(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("nalora_mlx.training.run_files.check_space", lambda _, *sizes: calls.append(sizes))
    watched(adapted(), rows(), tmp_path / "a", rows(4), iters=2, save_every=2, steps_per_eval=1)
    adapter, state, saves, keep = calls[0]
    directory = tmp_path / "a" / "checkpoints" / "step-0000002"
    arrays = sum(p.stat().st_size for p in directory.glob("*.safetensors"))
    assert (saves, keep) == (1, None)
    headers = 200 * len(tree_flatten(adapted().trainable_parameters()))
    assert 0 <= arrays - (2 * adapter + state) < 5 * headers


def test_metrics_that_could_not_be_written_are_written_later(tmp_path, monkeypatch):
    notices = []
    metrics = MetricsFile(tmp_path / "metrics.jsonl", notices.append)
    metrics({"event": "metrics", "split": "train", "step": 1, "loss": 1.0})
    path_open = type(metrics.path).open

    class HalfWritten:
        """A file on a disk that fills up in the middle of each write."""

        def __enter__(self):
            self.file = path_open(metrics.path, "a")
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[: len(text) // 2])
            self.file.flush()
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(metrics.path), "open", lambda *_, **__: HalfWritten())
        for step in (2, 3):
            metrics({"event": "metrics", "split": "train", "step": step, "loss": 1.0})
    assert len(notices) == 1
    assert "No space left" in notices[0]
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1]
    metrics({"event": "metrics", "split": "train", "step": 4, "loss": math.nan})
    records = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert records[-1]["loss"] is None


# --- the command --------------------------------------------------------------------------------------------


def command(model_directory, data_directory, output, *flags):
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", output]
    small = ["--batch-size", "2", "--iters", "4", "--val-batches", "1"]
    return ["lora", "--train", *map(str, where), *small, *map(str, flags)]


def test_resume_continues_and_says_so(model_directory, data_directory, tmp_path, capsys):
    output = tmp_path / "a"
    assert main(command(model_directory, data_directory, output, "--steps-per-report", "1")) == 0
    first = (output / "metrics.jsonl").read_text()
    assert main(command(model_directory, data_directory, output, "--resume", "--iters", "6", "--test")) == 0
    out = capsys.readouterr().out
    assert f"resuming from {output / 'checkpoints' / 'step-0000004'}" in out
    assert "moved" not in out
    steps = [json.loads(line).get("step") for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert (output / "metrics.jsonl").read_text().startswith(first)
    assert steps[-2:] == [6, None]
    assert main(command(model_directory, data_directory, output, "--resume", "--rank", "4")) == 2
    assert "rank was 8, is 4" in capsys.readouterr().err
    assert main(command(model_directory, data_directory, tmp_path / "none", "--resume")) == 2
    assert "no checkpoint in" in capsys.readouterr().err
    assert (
        main(["lora", "--resume", "--adapter-path", str(output)]) == 0
    )  # alone, it has all settings of the run


def test_foreign_files_are_not_touched(model_directory, data_directory, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "theirs.pt").write_text("x")
    assert main(command(model_directory, data_directory, tmp_path)) == 2
    assert "has a 'checkpoints' that no run wrote" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]
    (tmp_path / "file").write_text("x")
    assert main(command(model_directory, data_directory, tmp_path / "file" / "a")) == 2
    assert "is a file; give a directory" in capsys.readouterr().err


def test_a_run_survives_a_closed_pipe(model_directory, data_directory, tmp_path):
    argv = command(
        model_directory, data_directory, tmp_path / "a", "--steps-per-report", "1", "--iters", "30"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "nalora_mlx", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (tmp_path / "a" / "checkpoints" / "step-0000030").is_dir()


def test_files_of_a_run_contain_no_paths(model_directory, data_directory, tmp_path):
    """No file of a run contains an absolute path. Only what resume reads contains relative ones."""
    data = tmp_path / "secret-place" / "data"
    shutil.copytree(data_directory, data)
    assert main(command(model_directory, data, tmp_path / "a", "--save-every", "2")) == 0
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for place in (str(tmp_path), str(model_directory), "secret-place"):
                if path.name != "training_state.json" or place != "secret-place":
                    assert place.encode() not in content, path


def test_run_json_contains_no_tokens_and_paths(tmp_path):
    """run.json gets the name of a dataset, but not the arguments of load_dataset."""
    secret = {"name": "en", "token": "hf_secret", "data_files": str(tmp_path / "private.jsonl")}
    entry = {"path": "owner/set", "train_split": "train[:9]", "chat_feature": "turns", "config": secret}
    for hf_dataset in (entry, [entry]):
        config = RunConfig(
            train=True, hf_dataset=hf_dataset, model=str(tmp_path), resume_adapter_file=str(tmp_path / "x")
        )
        content = record(config, {})
        recorded = content["settings"]["hf_dataset"]
        assert (recorded if hf_dataset is entry else recorded[0]) == {
            k: v for k, v in entry.items() if k != "config"
        }
        assert "hf_secret" not in json.dumps(content)
        assert str(tmp_path) not in json.dumps(content)


def test_services_get_no_tokens_and_paths(tmp_path, monkeypatch):
    from mlx_lm.tuner import callbacks

    given = {}

    class Service:
        def __init__(self, **arguments):
            given.update(arguments)

    monkeypatch.setitem(callbacks.SUPPORT_CALLBACK, "wandb", lambda **arguments: Service(**arguments))
    monkeypatch.setattr(callbacks, "get_reporting_callbacks", lambda *_, **arguments: Service(**arguments))
    monkeypatch.setattr(callbacks, "wandb", object(), raising=False)
    entry = {"path": "owner/set", "config": {"token": "hf_secret"}}
    config = RunConfig(
        train=True,
        report_to="wandb",
        hf_dataset=entry,
        model=str(tmp_path),
        data=str(tmp_path),
        adapter_path=str(tmp_path / "a"),
        resume_adapter_file=str(tmp_path / "x"),
    )
    for listener in reporters(config):
        listener({"event": "start", "iterations": 1, "done": 0})
    shown = json.dumps(given["config"])
    assert "hf_secret" not in shown
    assert str(tmp_path) not in shown
    assert given["config"]["hf_dataset"] == {"path": "owner/set"}


def test_a_plan_contacts_no_service(model_directory, data_directory, tmp_path, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(job, "reporters", lambda *_: called.append(1) or [])
    assert main(command(model_directory, data_directory, tmp_path / "a", "--plan")) == 0
    assert called == []
    assert main(command(model_directory, data_directory, tmp_path / "a")) == 0
    assert called == [1]


def test_rows_are_tokenized_while_the_model_loads(
    model_directory, data_directory, tmp_path, monkeypatch, capsys
):
    started, loaded = threading.Event(), []
    tokenize, load = job.tokenize, job.load_run_model

    def tokenize_and_signal(*arguments):
        started.set()
        return tokenize(*arguments)

    def load_slowly(*arguments):
        loaded.append(started.wait(20))
        return load(*arguments)

    monkeypatch.setattr(job, "tokenize", tokenize_and_signal)
    monkeypatch.setattr(job, "load_run_model", load_slowly)
    assert main(command(model_directory, data_directory, tmp_path / "a")) == 0
    assert loaded == [True]
    # An error in that thread ends the command like any other.
    monkeypatch.setattr(job, "tokenize", lambda *_: (_ for _ in ()).throw(InputError("row 7 is strange")))
    capsys.readouterr()
    assert main(command(model_directory, data_directory, tmp_path / "b")) == 2
    assert capsys.readouterr().err == "nalora lora: error: row 7 is strange\n"


def test_optimizer_settings_that_fail_in_a_step_are_refused(
    model_directory, data_directory, tmp_path, capsys
):
    (tmp_path / "c.yaml").write_text("optimizer_config: {adam: {eps: 9223372036854775808}}\n")
    assert (
        main(command(model_directory, data_directory, tmp_path / "a", "--config", tmp_path / "c.yaml")) == 2
    )
    assert "nalora lora: error: optimizer_config.adam: " in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
