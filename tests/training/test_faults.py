"""What goes wrong in a run: numbers that are none, jumps, no progress, no room, no memory."""

import json
import math
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from nalora_mlx.__main__ import main
from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig, RunConfig, TrainingConfig
from nalora_mlx.core.errors import InputError, RunError
from nalora_mlx.data import batches as batching
from nalora_mlx.data import checks
from nalora_mlx.data.tokenization import Example
from nalora_mlx.models import loading
from nalora_mlx.runs import checkpoints, directory
from nalora_mlx.runs.loggers import reporters
from nalora_mlx.runs.metrics import MetricsFile
from nalora_mlx.runs.progress import SPIKE_HISTORY, Progress
from nalora_mlx.runs.record import record
from nalora_mlx.training.out_of_memory import remedy
from nalora_mlx.training.step import TrainingStep
from nalora_mlx.training.trainer import train
from tests.conftest import VOCABULARY, build_examples, build_model, llama_args

POISON = VOCABULARY - 1  # a token whose embedding is not a number


def adapted(poisoned=False, **settings):
    model = build_model(args=llama_args(num_hidden_layers=2, tie_word_embeddings=False))
    if poisoned:
        weight = np.array(model.model.embed_tokens.weight)
        weight[POISON] = np.nan
        model.model.embed_tokens.weight = mx.array(weight)
    mx.random.seed(11)
    adapt(model, NALoRAConfig(**({"num_layers": -1, "rank": 4, "scale": 4.0, "mask_warmup": 0} | settings)))
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


def everything(step):
    """Copies of all that a step changes."""
    trees = [step.model.trainable_parameters(), step.optimizer.state, step.importance]
    return {name: np.array(array) for name, array in tree_flatten(trees)}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def take(step, window):
    carry, tokens = None, sum(batch.tokens for batch in window)
    for i, batch in enumerate(window, 1):
        total, carry = step(batch, tokens, carry, i == len(window))
        mx.eval(step.state, total, carry)
    return total.item()


# --- numbers that are none ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("build", [lambda: optim.Adam(1e-2), lambda: optim.Muon(1e-2)], ids=["adam", "muon"])
def test_a_bad_update_changes_nothing_and_the_next_is_as_if_it_had_not_been(build, compiled):
    examples = rows(poisoned=[5])
    good = [batching.collate(examples, part) for part in ((0, 1), (2, 3), (6, 7), (8, 9))]
    bad = batching.collate(examples, (4, 5))
    step = TrainingStep(adapted(poisoned=True), build(), NALoRAConfig(mask_warmup=0), compiled)
    other = TrainingStep(adapted(poisoned=True), build(), NALoRAConfig(mask_warmup=0), compiled)
    for one in (step, other):
        assert math.isfinite(take(one, good[:2]))
        assert one.health["finite"].item()
    before = everything(step)
    for window in ([bad], [good[0], bad], [bad, good[0], good[1]]):
        take(step, window)
        assert not step.health["finite"].item()
        assert_equal(everything(step), before)
    for one in (step, other):
        take(one, good[2:])
        assert one.health["finite"].item()
    assert_equal(everything(step), everything(other))
    assert any((everything(step)[name] != before[name]).any() for name in before)


def test_a_gradient_or_a_new_weight_that_is_no_number_counts_too():
    batch = batching.collate(rows(), (0, 1))
    step = TrainingStep(adapted(), optim.SGD(1.0), NALoRAConfig(), compiled=False)
    take(step, [batch])
    before, inner = everything(step), step._loss_and_gradients

    def one_infinite(*arguments):
        value, gradients = inner(*arguments)
        name = "model.layers.1.mlp.down_proj.lora_b"
        *way, last = name.split(".")
        place = gradients
        for key in way:
            place = place[int(key)] if isinstance(place, list) else place[key]
        place[last] = place[last].at[0, 0].add(math.inf)
        return value, gradients

    step._loss_and_gradients = one_infinite
    assert math.isfinite(take(step, [batch]))
    assert not step.health["finite"].item()
    assert_equal(everything(step), before)
    step._loss_and_gradients = lambda *a: (
        (inner(*a)[0][0], (mx.array(math.inf), inner(*a)[0][1][1])),
        inner(*a)[1],
    )
    carry = step(batch, 2 * batch.tokens, None, False)[1]
    step._loss_and_gradients = inner
    step(batch, 2 * batch.tokens, carry, True)  # a loss that was infinite earlier in the window
    assert not step.health["finite"].item()
    assert_equal(everything(step), before)
    step = TrainingStep(adapted(), optim.SGD(1e38), NALoRAConfig())
    take(step, [batch])
    before = everything(step)
    assert not step.health["finite"].item()
    assert math.isfinite(take(step, [batch]))
    assert_equal(everything(step), before)


def watched(model, examples, output=None, valid=(), optimizer=None, **settings):
    """A run, its events by kind, and the notices."""
    events = []
    config = TrainingConfig(**({"iters": 12, "batch_size": 2, "steps_per_report": 4} | settings))
    description = {"fine_tune_type": "lora"} if output else None
    result = train(
        model, examples, valid, config, optimizer or optim.Adam(1e-2), output, [events.append], description
    )
    return result, events, [e["text"] for e in events if e["event"] == "notice"]


def test_rows_of_a_bad_update_are_named_and_the_run_goes_on():
    result, events, notices = watched(adapted(poisoned=True), rows(poisoned=[7]), iters=18)
    assert result.skipped == 3  # once an epoch
    assert result.updates == 15
    assert len(notices) == 3
    for notice in notices:
        assert "the loss is nan; the update is not applied; rows: " in notice
        assert "train.jsonl:8" in notice.replace("train.jsonl:", ":").replace(":", "train.jsonl:")
    assert math.isfinite(result.train_loss)
    reports = [e for e in events if e.get("split") == "train"]
    assert reports[-1]["skipped"] == 3
    assert all(math.isfinite(e["loss"]) for e in reports)


def test_too_many_bad_updates_stop_the_run_with_what_was_good(tmp_path):
    examples = rows(poisoned=range(12))
    examples[:4] = rows()[:4]
    model = adapted(poisoned=True)
    with pytest.raises(FloatingPointError, match=r"3 updates in a row were not applied, up to .*lower the"):
        watched(model, examples, tmp_path / "a", iters=40, save_every=1000)
    (step,) = checkpoints.steps(tmp_path / "a" / "checkpoints")
    kept = tmp_path / "a" / "checkpoints" / f"step-{step:07d}"
    state = json.loads((kept / "training_state.json").read_text())["progress"]
    assert state["skipped"] >= 3
    for path in (tmp_path / "a").rglob("*.safetensors"):
        assert all(mx.isfinite(a).all().item() for a in mx.load(str(path)).values() if a.dtype == mx.float32)
    with pytest.raises(FloatingPointError, match="2 updates in a row"):
        watched(adapted(poisoned=True), examples, max_bad_steps=2, iters=40)


def test_a_stop_says_where_the_good_state_is(tmp_path, monkeypatch):
    """Not in a directory into which nothing could be written."""
    examples = rows(poisoned=range(12))
    with pytest.raises(
        FloatingPointError, match=rf", and the state before them is in {tmp_path / 'a'}; lower"
    ):
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


def test_all_rows_of_a_bad_update_are_named():
    examples = rows(poisoned=range(12))
    _, _, notices = watched(adapted(poisoned=True), examples, batch_size=12, iters=2)
    assert len(notices) == 2
    assert {int(n) for n in re.findall(r":(\d+)", notices[0].partition("rows: ")[2])} == set(range(1, 13))
    assert "more" not in notices[0]


# --- an earlier run -----------------------------------------------------------------------------------------


def test_a_run_in_python_moves_an_earlier_one_aside(tmp_path):
    """Pruning is of its own checkpoints, and nothing of the earlier run is lost."""
    output = tmp_path / "a"
    watched(adapted(), rows(), output, save_every=4)
    (output / "best").mkdir()
    (output / "best" / "adapters.safetensors").write_bytes((output / "adapters.safetensors").read_bytes())
    before = {p.relative_to(output): p.read_bytes() for p in output.rglob("*") if p.is_file()}
    _, _, notices = watched(adapted(rank=2), rows(), output, save_every=2, keep_last=1, iters=6)
    aside = output / "previous" / "1"
    assert notices == [f"moved the run that was in {output} to {aside}"]
    assert list(checkpoints.steps(output / "checkpoints")) == [6]
    assert {p.relative_to(aside): p.read_bytes() for p in aside.rglob("*") if p.is_file()} == before


def test_a_run_in_python_is_refused_where_another_one_writes(tmp_path):
    output = tmp_path / "a"
    watched(adapted(), rows(), output, iters=2)
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    with storage.lock_directory(output), pytest.raises(InputError, match="another run is writing there"):
        watched(adapted(), rows(), output, iters=2)
    (tmp_path / "b" / "best").mkdir(parents=True)
    (tmp_path / "b" / "best" / "theirs").write_text("x")
    with pytest.raises(InputError, match="holds a 'best' that is not of a run"):
        watched(adapted(), rows(), tmp_path / "b", iters=2)
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before


def test_a_run_json_of_somebody_else_is_not_overwritten(tmp_path, model_directory, data_directory):
    output = tmp_path / "a"
    output.mkdir()
    (output / "run.json").write_text('{"mine": true}')
    assert main(command(model_directory, data_directory, output)) == 0
    assert json.loads((output / "previous" / "1" / "run.json").read_text()) == {"mine": True}
    assert "settings" in json.loads((output / "run.json").read_text())


def test_a_run_says_once_that_its_head_takes_memory():
    assert watched(adapted(), rows(), iters=1)[2] == []
    model = adapted()
    model.lm_head.unfreeze()
    assert [n[:32] for n in watched(model, rows(), iters=1)[2]] == ["the model's head is trained, so "]

    class Whole(type(model)):
        """A model whose logits come from more than its last hidden states."""

        def __call__(self, inputs, cache=None):
            return super().__call__(inputs, cache) + inputs[..., None]

    model = adapted()
    model.__class__ = Whole
    assert TrainingStep(model, optim.Adam(1e-2)).loss.head is None
    notices = watched(model, rows(), iters=1)[2]
    assert [n[:44] for n in notices] == ["the model's head cannot be told from its bod"]


def test_a_validation_loss_that_is_no_number_is_said_and_never_best(tmp_path):
    valid = rows(4, poisoned=[1])
    result, _, notices = watched(
        adapted(poisoned=True), rows(), tmp_path / "a", valid, steps_per_eval=6, val_batches=-1
    )
    assert result.best_valid_loss is None
    assert not (tmp_path / "a" / "best").exists()
    assert [n for n in notices if "validation loss is nan" in n] == [
        f"iteration {i}: the validation loss is nan" for i in (0, 6, 12)
    ]


# --- clipping, jumps, no progress ---------------------------------------------------------------------------


def moved(accumulate, **settings):
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
def test_clipping_is_of_the_whole_gradient_of_an_update(accumulate):
    step, said = moved(accumulate)
    norm = math.sqrt(sum(float((a**2).sum()) for a in step.values()))
    assert said == pytest.approx(norm, rel=1e-3)
    clipped, said_again = moved(accumulate, grad_clip=norm / 3)
    assert said_again == said  # the norm before clipping
    length = math.sqrt(sum(float((a**2).sum()) for a in clipped.values()))
    assert length == pytest.approx(norm / 3, rel=1e-4)
    for name in step:
        np.testing.assert_allclose(clipped[name], step[name] / 3, rtol=2e-3, atol=1e-6)
    loose, _ = moved(accumulate, grad_clip=norm * 2)
    for name in step:
        np.testing.assert_array_equal(loose[name], step[name])


@pytest.mark.parametrize(
    ("error", "listener"),
    [(ConnectionError("no network"), 0), (UnicodeEncodeError("latin-1", "█", 0, 1, "no"), 1)],
    ids=["a service", "the display"],
)
def test_a_listener_that_fails_is_left_out_and_the_run_goes_on(error, listener, tmp_path, capsys):
    heard = [[], []]

    def watcher(number):
        def listen(event):
            heard[number].append(event["event"])
            if number == listener and event.get("step") == 4:
                raise error

        return listen

    config = TrainingConfig(iters=12, batch_size=2, steps_per_report=4, save_every=4)
    result = train(adapted(), rows(), (), config, optim.Adam(1e-2), tmp_path / "a", [watcher(0), watcher(1)])
    assert result.iterations == 12
    assert list(checkpoints.steps(tmp_path / "a" / "checkpoints")) == [4, 8, 12]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: listen failed ({type(error).__name__}: ")
    assert line.endswith("); the run goes on without it")
    assert heard[listener].count("step") == 4
    assert heard[1 - listener].count("step") == 12
    assert heard[1 - listener][-1] == "end"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=["Ctrl-C", "exit"])
def test_what_asks_to_end_the_process_still_does(error):
    def listen(event):
        raise error

    with pytest.raises(type(error)):
        train(adapted(), rows(), (), TrainingConfig(iters=2), listeners=[listen])


def test_clipping_is_that_of_mlx():
    gradients = {"a": mx.random.normal((30, 4)), "b": [mx.random.normal((7,))]}
    theirs, norm = optim.clip_grad_norm(gradients, 0.5)
    factor = 0.5 / max(norm.item(), 0.5)
    ours = tree_map(lambda g: g * factor, gradients)
    for (_, a), (_, b) in zip(tree_flatten(ours), tree_flatten(theirs), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-5)


def test_jumps_are_reported_when_they_repeat():
    progress, said = Progress(), []
    rng = np.random.default_rng(0)
    for iteration in range(400):
        loss = 2 + 0.1 * rng.standard_normal()
        if iteration in (70, 120, 160, 300, 320):
            loss *= 5  # three within a hundred, then two
        progress.count(loss, 1, 0.1)
        if progress.record_loss(loss):
            said.append(iteration)
    assert said == [160]
    assert len(progress.recent) == SPIKE_HISTORY
    falling = Progress()
    for iteration in range(300):
        falling.count(1, 1, 0.1)
        assert not falling.record_loss(8 * 0.98**iteration + rng.random())


def test_a_run_stops_when_validation_gets_no_better(tmp_path):
    settings = {"steps_per_eval": 3, "early_stopping": 2, "val_batches": -1, "iters": 40}
    result, _, _ = watched(
        adapted(), rows(), tmp_path / "a", rows(4), optim.SGD(0.0), grad_accumulation_steps=4, **settings
    )
    assert result.stopped == "2 validations brought no better loss"
    assert result.best_iteration == 4  # the update in which iteration 3 falls
    assert result.iterations == 12
    assert list(checkpoints.steps(tmp_path / "a" / "checkpoints")) == [12]
    assert (tmp_path / "a" / "adapters.safetensors").exists()
    with pytest.raises(InputError, match="early_stopping needs a validation set"):
        watched(adapted(), rows(), early_stopping=2)


# --- no room ------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_for_a_while_stops_no_run(tmp_path, monkeypatch):
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


def test_an_end_that_cannot_be_saved_is_a_failure(tmp_path, monkeypatch):
    write = storage.write_directory

    def fail_late(path, files):
        if path.name == "step-0000012":
            raise OSError(28, "No space left on device")
        write(path, files)

    monkeypatch.setattr(storage, "write_directory", fail_late)
    with pytest.raises(RunError, match=r"the last whole checkpoint is of iteration 8; make room.*--resume"):
        watched(adapted(), rows(), tmp_path / "a", save_every=4)
    assert list(checkpoints.steps(tmp_path / "a" / "checkpoints")) == [4, 8]


def test_a_best_adapter_that_cannot_be_saved_is_none(tmp_path, monkeypatch):
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


def test_room_is_counted_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "free_space", lambda _: 10_000)
    with pytest.raises(
        InputError, match=r"0\.0 MB free, but a checkpoint and the adapters take .* MB; make room"
    ):
        watched(adapted(), rows(), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    each, others = 2 * 1000 + 3000, 3 * 1000
    monkeypatch.setattr(storage, "free_space", lambda _: 4 * each + others)
    assert directory.check_space(tmp_path, 1000, 3000, 4, None) is None
    assert "--keep-last 3 fits" in directory.check_space(tmp_path, 1000, 3000, 5, None)
    assert directory.check_space(tmp_path, 1000, 3000, 500, 3) is None


def test_the_size_of_a_checkpoint_is_what_was_counted(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("nalora_mlx.training.run.check_space", lambda _, *sizes: said.append(sizes))
    watched(adapted(), rows(), tmp_path / "a", rows(4), iters=2, save_every=2, steps_per_eval=1)
    adapter, state, saves, keep = said[0]
    directory = tmp_path / "a" / "checkpoints" / "step-0000002"
    arrays = sum(p.stat().st_size for p in directory.glob("*.safetensors"))
    assert (saves, keep) == (1, None)
    headers = 200 * len(tree_flatten(adapted().trainable_parameters()))
    assert 0 <= arrays - (2 * adapter + state) < 5 * headers


def test_records_wait_for_room(tmp_path, monkeypatch):
    said = []
    metrics = MetricsFile(tmp_path / "metrics.jsonl", said.append)
    metrics({"event": "metrics", "split": "train", "step": 1, "loss": 1.0})
    path_open = type(metrics.path).open

    class Half:
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
        patch.setattr(type(metrics.path), "open", lambda *_, **__: Half())
        for step in (2, 3):
            metrics({"event": "metrics", "split": "train", "step": step, "loss": 1.0})
    assert len(said) == 1
    assert "No space left" in said[0]
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1]
    metrics({"event": "metrics", "split": "train", "step": 4, "loss": math.nan})
    records = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert records[-1]["loss"] is None


def command(model_directory, data_directory, output, *flags):
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", output]
    small = ["--batch-size", "2", "--iters", "4", "--val-batches", "1"]
    return ["lora", "--train", *map(str, where), *small, *map(str, flags)]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[metal::malloc] Attempting to allocate 48736917632 bytes which is greater than the maximum "
            "allowed buffer size of 30150672384 bytes."
        ),
        RuntimeError("[malloc] Unable to allocate 123 bytes."),
        RuntimeError(
            "[METAL] Command buffer execution failed: Insufficient Memory (00000008:...OutOfMemory)"
        ),
        MemoryError(),
    ],
    ids=["metal", "malloc", "command buffer", "Python"],
)
def test_no_memory_is_one_line_with_the_flags_that_help(
    error, model_directory, data_directory, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise error

    monkeypatch.setattr(TrainingStep, "__call__", fail)
    assert main(command(model_directory, data_directory, tmp_path / "a")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nalora lora: failed: out of memory (")
    assert "what helps: --batch-size 1 or --grad-checkpoint or --max-seq-length 1024 or --quantize 4" in line


def test_no_memory_later_names_a_checkpoint_and_what_its_run_allows(
    model_directory, data_directory, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "a"
    step, calls = TrainingStep.__call__, []

    def fail(*arguments, **more):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        return step(*arguments, **more)

    monkeypatch.setattr(TrainingStep, "__call__", fail)
    assert main(command(model_directory, data_directory, output, "--save-every", "1", "--iters", "6")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    kept = output / "checkpoints" / "step-0000003"
    advice = "go on with --resume --resume-anyway and --batch-size 1 or --grad-checkpoint"
    assert line.endswith(f"); {kept} is whole: {advice}")
    # the advice works, and when nothing smaller is left it names the adapter
    flags = ["--resume", "--resume-anyway", "--batch-size", "1", "--grad-checkpoint", "--iters", "6"]
    assert main(command(model_directory, data_directory, output, *flags)) == 0
    calls[:] = [1] * 3
    assert main(command(model_directory, data_directory, output, *flags[2:])) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--resume" not in line  # the earlier run is set aside, and this one has no checkpoint
    assert "what helps: --max-seq-length 1024 or --quantize 4" in line
    calls[:] = [1] * 2
    flags += ["--save-every", "1", "--max-seq-length", "200"]
    assert main(command(model_directory, data_directory, output, *flags[2:])) == 1
    (line,) = capsys.readouterr().err.splitlines()
    kept = output / "checkpoints" / "step-0000001"
    assert line.endswith(
        f"{kept} is whole: start from its adapter with --resume-adapter-file {kept} and --quantize 4"
    )
    monkeypatch.undo()
    assert main(command(model_directory, data_directory, tmp_path / "b", "--resume-adapter-file", kept)) == 0


def test_memory_advice_is_never_empty_and_quantizes_once():
    small = RunConfig(batch_size=1, grad_checkpoint=True, max_seq_length=200, num_layers=4)
    assert remedy(small, True, None) == "what helps: a smaller --model"
    assert remedy(small, False, None) == "what helps: --quantize 4"
    assert remedy(small, True, Path("x")).endswith("--resume-adapter-file x and a smaller --model")


def test_no_memory_for_the_model_is_said_as_such(
    model_directory, data_directory, tmp_path, monkeypatch, capsys
):
    def fail(*_, **__):
        raise RuntimeError("[malloc] Unable to allocate 123 bytes.")

    monkeypatch.setattr("mlx_lm.utils.load_model", fail)
    assert main(command(model_directory, data_directory, tmp_path / "a")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "out of memory while it is loaded ([malloc] Unable to allocate 123 bytes.); take a smaller model"
        in line
    )


def test_other_errors_are_not_taken_for_no_memory(
    model_directory, data_directory, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(TrainingStep, "__call__", fail)
    assert main(command(model_directory, data_directory, tmp_path / "a")) == 1
    assert "shapes do not match (RuntimeError; --debug shows where)" in capsys.readouterr().err


# --- the command --------------------------------------------------------------------------------------------


def test_resume_goes_on_and_says_so(model_directory, data_directory, tmp_path, capsys):
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
    assert main(command(model_directory, data_directory, output, "--resume", "--no-train", "--test")) == 2
    assert "resume needs --train" in capsys.readouterr().err


def test_what_is_not_of_a_run_is_not_touched(model_directory, data_directory, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "theirs.pt").write_text("x")
    assert main(command(model_directory, data_directory, tmp_path)) == 2
    assert "holds a 'checkpoints' that is not of a run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]
    (tmp_path / "file").write_text("x")
    assert main(command(model_directory, data_directory, tmp_path / "file" / "a")) == 2
    assert "is a file; give a directory" in capsys.readouterr().err


def test_a_run_outlives_the_one_who_reads_it(model_directory, data_directory, tmp_path):
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


def test_nothing_that_is_shared_knows_the_machine(model_directory, data_directory, tmp_path):
    """Adapter, metrics, and checkpoints with a bad row: names of files, no paths."""
    data = tmp_path / "secret-place" / "data"
    shutil.copytree(data_directory, data)
    assert main(command(model_directory, data, tmp_path / "a", "--save-every", "2")) == 0
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for place in (str(tmp_path), str(model_directory), "secret-place"):
                assert place.encode() not in content, path


def test_what_a_run_was_given_is_told_without_tokens_and_paths(tmp_path):
    """run.json and the services get the names of a dataset, not what load_dataset is given besides."""
    secret = {"name": "en", "token": "hf_secret", "data_files": str(tmp_path / "private.jsonl")}
    entry = {"path": "owner/set", "train_split": "train[:9]", "chat_feature": "turns", "config": secret}
    for given in (entry, [entry]):
        config = RunConfig(
            train=True, hf_dataset=given, model=str(tmp_path), resume_adapter_file=str(tmp_path / "x")
        )
        told = record(config, {})
        found = told["settings"]["hf_dataset"]
        assert (found if given is entry else found[0]) == {k: v for k, v in entry.items() if k != "config"}
        assert "hf_secret" not in json.dumps(told)
        assert str(tmp_path) not in json.dumps(told)


def test_a_service_gets_no_tokens_and_paths(tmp_path, monkeypatch):
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


def test_a_plan_speaks_to_no_service(model_directory, data_directory, tmp_path, monkeypatch, capsys):
    called = []
    monkeypatch.setattr("nalora_mlx.runs.loggers.reporters", lambda *_: called.append(1) or [])
    assert main(command(model_directory, data_directory, tmp_path / "a", "--plan")) == 0
    assert called == []
    assert main(command(model_directory, data_directory, tmp_path / "a")) == 0
    assert called == [1]


def test_rows_become_tokens_while_the_model_is_loaded(
    model_directory, data_directory, tmp_path, monkeypatch, capsys
):
    began, loaded = threading.Event(), []
    tokenize, load = checks.tokenize, loading.load_module

    def tokenizing(*arguments):
        began.set()
        return tokenize(*arguments)

    def load_slowly(*arguments):
        loaded.append(began.wait(20))
        return load(*arguments)

    monkeypatch.setattr(checks, "tokenize", tokenizing)
    monkeypatch.setattr(loading, "load_module", load_slowly)
    assert main(command(model_directory, data_directory, tmp_path / "a")) == 0
    assert loaded == [True]
    # what goes wrong there ends the command as it would have anywhere else
    monkeypatch.setattr(checks, "tokenize", lambda *_: (_ for _ in ()).throw(InputError("row 7 is strange")))
    capsys.readouterr()
    assert main(command(model_directory, data_directory, tmp_path / "b")) == 2
    assert capsys.readouterr().err == "nalora lora: error: row 7 is strange\n"


def test_settings_of_an_optimizer_that_fail_in_a_step_are_refused(
    model_directory, data_directory, tmp_path, capsys
):
    (tmp_path / "c.yaml").write_text("optimizer_config: {adam: {eps: 9223372036854775808}}\n")
    assert (
        main(command(model_directory, data_directory, tmp_path / "a", "--config", tmp_path / "c.yaml")) == 2
    )
    assert "nalora lora: error: optimizer_config.adam: " in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
