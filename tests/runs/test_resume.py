"""A stopped and resumed run equals the uninterrupted run, bit for bit."""

import json
import shutil

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.core.config import TrainingConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.runs import checkpoints
from nalora_mlx.runs.metrics import MetricsFile
from nalora_mlx.runs.resume import _seal, find_checkpoint, read_state
from nalora_mlx.training import selection_limit
from nalora_mlx.training.trainer import train
from tests.adapters.test_miniatures import build as miniature
from tests.conftest import build_examples, build_model, llama_args, masked_config

EXAMPLES = build_examples(11, seed=4, high=12)
VALID = build_examples(5, seed=9, high=9)
LATEST = "latest"


def start_run(
    output,
    stop_at=None,
    resume=None,
    anyway=False,
    adapter=None,
    build=None,
    rows=None,
    valid=None,
    adapter_seed=11,
    base_seed=0,
    base=None,
    **settings,
):
    """Start or resume a run with a model of its own; stop after the update that reaches `stop_at`.

    Return the model, the result, and the texts of the notices.
    """
    model = base() if base else build_model(base_seed, args=llama_args(num_hidden_layers=2))
    mx.random.seed(adapter_seed)
    adapt(
        model,
        masked_config(**({"num_layers": -1, "rank": 4, "scale": 4.0, "mask_warmup": 3} | (adapter or {}))),
    )
    defaults = {"iters": 9, "batch_size": 3, "steps_per_report": 2, "steps_per_eval": 3, "save_every": 4}
    config = TrainingConfig(**(defaults | settings))
    notices, reached = [], 0

    def listen(event):
        nonlocal reached
        if event["event"] == "start":
            reached = event["done"] - config.grad_accumulation_steps
        if event["event"] == "notice":
            notices.append(event["text"])

    def stop():
        """Count: asked before the first update, and once for each."""
        nonlocal reached
        reached += config.grad_accumulation_steps
        return stop_at is not None and reached >= stop_at

    result = train(
        model,
        EXAMPLES if rows is None else rows,
        VALID if valid is None else valid,
        config,
        build() if build else optim.Adam(1e-2),
        output,
        [MetricsFile(output / "metrics.jsonl"), listen],
        resume=find_checkpoint(LATEST, output) if resume is LATEST else resume,
        resume_anyway=anyway,
        stop=stop,
    )
    return model, result, notices


def metrics(output):
    """Return the records of metrics.jsonl without those that depend on the clock."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timings = ("tokens_per_second", "iterations_per_second", "seconds", "peak_memory_gb")
    return [{key: value for key, value in record.items() if key not in timings} for record in records]


def checkpoint_state(directory):
    """Return a checkpoint's state without timings, and the bytes of its array files."""
    content = json.loads((directory / "training_state.json").read_text())
    for name in ("seconds", "loss_seconds"):
        del content["progress"][name]
    del content["config"], content["seal"]
    arrays = {p.name: p.read_bytes() for p in directory.glob("*.safetensors")}
    return content, arrays


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    last = max(checkpoints.steps(one / "checkpoints"))
    (state, arrays), (other_state, other_arrays) = (
        checkpoint_state(checkpoints.step_directory(run / "checkpoints", last)) for run in (one, other)
    )
    assert state == other_state
    assert arrays.keys() == other_arrays.keys()
    for name in arrays:
        assert arrays[name] == other_arrays[name], name
    for name in ("adapters.safetensors", "best/adapters.safetensors", "adapter_config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def cosine():
    return optim.AdamW(
        optim.join_schedules([optim.linear_schedule(0, 1e-2, 3), optim.cosine_decay(1e-2, 9)], [3])
    )


CASES = {
    "plain": {},
    "dropout and a hard mask": {"adapter": {"dropout": 0.3, "mask": "hard", "mask_every": 2}},
    "routed": {"adapter": {"route": True}},
    "accumulated": {"grad_accumulation_steps": 3, "iters": 11},
    "checkpointed": {"grad_checkpoint": True},
    "schedule": {"build": cosine, "grad_clip": 0.5},
    "momentum": {"build": lambda: optim.SGD(0.05, momentum=0.9)},
    "muon": {"build": lambda: optim.Muon(1e-2)},
    "adafactor": {"build": lambda: optim.Adafactor(1e-2, relative_step=False)},
    "packed": {"packing": True},
    "hybrid": {"base": lambda: miniature("qwen3_5"), "packing": True, "grad_checkpoint": True},
    "limited": {"adapter": {"selection_limit": 1e-3}},
    "limited hybrid": {
        "base": lambda: miniature("qwen3_5"),
        "packing": True,
        "grad_checkpoint": True,
        "adapter": {"selection_limit": 1e-3, "dropout": 0.1},
    },
    "without mechanisms": {"adapter": {"mask": "off", "step_scaling": False, "selection_limit": 0.0}},
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_the_uninterrupted_run(name, tmp_path, monkeypatch):
    monkeypatch.setattr(
        selection_limit, "MEASURED_FIRST", 3
    )  # the checkpoint is between two measured updates
    case = CASES[name]
    start_run(tmp_path / "whole", **case)
    _, first, _ = start_run(tmp_path / "parts", stop_at=5, **case)
    assert first.stopped
    assert first.iterations == (6 if name == "accumulated" else 5)
    # Another seed gives different initial adapters and random state, so whatever resume does not restore differs.
    _, second, _ = start_run(tmp_path / "parts", resume=LATEST, adapter_seed=99, **case)
    assert second.iterations == case.get("iters", 9)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_settings_that_may_change_change_no_bit(tmp_path):
    """More iterations, other report and save intervals: parameters and optimizer equal those of the long run."""
    start_run(tmp_path / "whole", iters=9)
    start_run(tmp_path / "parts", iters=5, steps_per_report=5, steps_per_eval=4, save_every=2, keep_last=1)
    _, _, notices = start_run(
        tmp_path / "parts", resume=LATEST, iters=9, steps_per_report=4, save_every=50, max_bad_steps=1
    )
    assert notices == []
    last = "checkpoints/step-0000009"
    for name in ("adapters.safetensors", "training_state.safetensors"):
        one, two = (mx.load(str(tmp_path / run / last / name)) for run in ("whole", "parts"))
        assert one.keys() == two.keys()
        for key in one:
            if not key.endswith("misalignment"):  # measured at reports
                assert mx.array_equal(one[key], two[key]).item(), key


def test_resuming_a_finished_run_does_nothing(tmp_path):
    start_run(tmp_path / "a", iters=4)
    before = {p: p.read_bytes() for p in sorted((tmp_path / "a").rglob("*")) if p.is_file()}
    _, result, _ = start_run(tmp_path / "a", resume=LATEST, iters=4)
    assert result.iterations == 4
    assert {p: p.read_bytes() for p in sorted((tmp_path / "a").rglob("*")) if p.is_file()} == before


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    output = tmp_path_factory.mktemp("stopped") / "run"
    start_run(output, stop_at=5)
    return output


def changed_row(rows):
    row = rows[3]
    tokens = row.tokens.copy()
    tokens[-1] += 1
    return [*rows[:3], type(row)(tokens, row.loss_mask, row.source), *rows[4:]]


REFUSED = {
    "batch size": ({"batch_size": 2}, r"--batch-size was 3, is 2"),
    "accumulation": ({"grad_accumulation_steps": 2}, r"--grad-accumulation-steps was 1, is 2"),
    "seed": ({"seed": 1}, r"--seed was 0, is 1"),
    "checkpointing": ({"grad_checkpoint": True}, r"--grad-checkpoint was off, is on"),
    "clipping": ({"grad_clip": 1.0}, r"--grad-clip was not given, is 1"),
    "packing": ({"packing": True}, r"--packing was off, is on"),
    "rank": ({"adapter": {"rank": 2}}, r"adapter: lora parameters: rank was 4, is 2"),
    "method": ({"adapter": {"mask": "hard"}}, r"adapter: na lora: mask was soft, is hard"),
    "rate": ({"build": lambda: optim.Adam(2e-2)}, r"optimizer: learning rate was 0\.01, is 0\.02;"),
    "schedule": ({"build": cosine}, r"optimizer: kind was Adam, is AdamW.*schedule differs"),
    "betas": (
        {"build": lambda: optim.Adam(1e-2, betas=[0.8, 0.99])},
        r"optimizer: betas was \[0\.9, 0\.999\]",
    ),
    "base model": ({"base_seed": 1}, r"the base model has other weights"),
    "data": ({"rows": changed_row(EXAMPLES)}, r"the training rows, or how they are tokenized, have changed"),
    "fewer rows": ({"rows": EXAMPLES[:-1]}, r"the training set had 11 sequences, and has 10;"),
    "validation": ({"valid": VALID[:3]}, r"the validation set had 5 sequences, and has 3;"),
    "validation batches": ({"val_batches": 1}, r"--val-batches was 25, is 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_different_run_is_refused_with_reasons(name, stopped):
    change, reason = REFUSED[name]
    before = sorted((p, p.stat().st_mtime_ns) for p in stopped.rglob("*"))
    with pytest.raises(InputError, match=rf"not the same run: .*{reason}.*--resume-anyway"):
        start_run(stopped, resume=LATEST, **change)
    assert sorted((p, p.stat().st_mtime_ns) for p in stopped.rglob("*")) == before


def test_resume_anyway_says_what_it_ignores(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "a")
    change = {"batch_size": 2, "build": lambda: optim.Adam(2e-2)}
    _, result, notices = start_run(tmp_path / "a", resume=LATEST, anyway=True, iters=7, **change)
    assert result.iterations == 7
    rates = [r["learning_rate"] for r in metrics(tmp_path / "a") if r["split"] == "train"]
    assert rates[-1] == 0.02  # the new one
    assert any("although --batch-size was 3, is 2" in n for n in notices)
    assert any("although optimizer: learning rate was 0.01, is 0.02" in n for n in notices)
    with pytest.raises(InputError, match=r"training_state.safetensors does not fit this run: .*lora_a"):
        start_run(stopped, resume=LATEST, anyway=True, adapter={"rank": 2})


def test_a_run_that_is_done_says_that_nothing_is_left(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "a")
    _, result, notices = start_run(tmp_path / "a", resume=LATEST, iters=5)
    assert result.iterations == 5
    assert any("nothing is left to train: the checkpoint is at iteration 5 of 5" in n for n in notices)


def test_fewer_iterations_than_done_are_refused(stopped):
    with pytest.raises(InputError, match="it is at iteration 5, beyond --iters 3"):
        start_run(stopped, resume=LATEST, iters=3)


def test_resuming_from_an_earlier_checkpoint_moves_later_files_aside(tmp_path):
    output = tmp_path / "a"
    start_run(output, iters=9)
    whole = tmp_path / "whole"
    shutil.copytree(output, whole)
    _, _, notices = start_run(output, resume=output / "checkpoints" / "step-0000004", stop_at=6)
    aside = output / "previous" / "1"
    assert any(f"moved everything after iteration 4 to {aside}" in n for n in notices)
    assert (aside / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("step-0000008", "step-0000009"):
        assert not (output / "checkpoints" / name).exists()
        moved, original = (checkpoint_state(run / "checkpoints" / name) for run in (aside, whole))
        assert moved == original
    steps = [r["step"] for r in metrics(output)]
    assert steps == sorted(steps)
    assert max(steps) == 6
    # From there it reaches the same end.
    start_run(output, resume=LATEST)
    assert_same_run(output, whole)


def test_resume_restores_the_best_adapter_of_the_checkpoint(tmp_path):
    """A run that was killed between writing a new best adapter and the next checkpoint."""
    output = tmp_path / "a"
    start_run(output, stop_at=4)
    progress = read_state(output / "checkpoints" / "step-0000004").progress
    assert progress.best_iteration == 3
    best = (output / "best" / "adapters.safetensors").read_bytes()
    (output / "best" / "adapters.safetensors").write_bytes(b"a later one")
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "step": 6, "loss": 1.0}\n{"split": "tra')
    start_run(output, resume=LATEST, stop_at=5)
    assert (output / "best" / "adapters.safetensors").read_bytes() == best
    assert (output / "previous" / "1" / "best" / "adapters.safetensors").read_bytes() == b"a later one"
    assert [r["step"] for r in metrics(output)] == [0, 2, 3, 4]


def test_a_checkpoint_from_another_directory_starts_a_new_run(stopped, tmp_path):
    output = tmp_path / "b"
    start_run(output, iters=3)
    old = (output / "adapters.safetensors").read_bytes()
    start_run(output, resume=stopped / "checkpoints" / "step-0000005")
    assert (output / "previous" / "1" / "adapters.safetensors").read_bytes() == old
    assert [r["step"] for r in metrics(output) if r["split"] == "valid"] == [0, 3, 6, 9]
    start_run(tmp_path / "whole")
    assert_same_run(output, tmp_path / "whole")


def test_sample_answers_do_not_outlive_their_adapter(tmp_path):
    output = tmp_path / "a"
    start_run(output, stop_at=5)
    (output / "samples.json").write_text("of iteration 5")
    start_run(output, resume=LATEST, stop_at=7)  # the adapter is trained further
    assert not (output / "samples.json").exists()
    assert not (output / "previous").exists()
    (output / "samples.json").write_text("of iteration 7")
    back = output / "checkpoints" / "step-0000005"
    start_run(output, resume=back, stop_at=6)  # everything later is kept
    assert not (output / "samples.json").exists()
    assert (output / "previous" / "1" / "samples.json").read_text() == "of iteration 7"
    (output / "samples.json").write_text("of iteration 6")
    start_run(output, stop_at=2)  # another run
    assert not (output / "samples.json").exists()
    assert (output / "previous" / "2" / "samples.json").read_text() == "of iteration 6"
    (output / ".samples.123.json").write_text("half")  # of a process that was killed
    start_run(output, resume=LATEST, stop_at=3)
    assert not (output / ".samples.123.json").exists()


def test_resuming_after_a_shorter_accumulation_window_says_so(tmp_path):
    start_run(tmp_path / "a", iters=5, grad_accumulation_steps=3)
    _, _, notices = start_run(tmp_path / "a", iters=8, grad_accumulation_steps=3, resume=LATEST)
    assert any("shorter accumulation window" in n for n in notices)


def test_checkpoints_are_written_at_the_end_of_an_accumulation_window(tmp_path):
    start_run(tmp_path / "a", iters=11, grad_accumulation_steps=3, save_every=4)
    assert list(checkpoints.steps(tmp_path / "a" / "checkpoints")) == [6, 9, 11]


def test_old_checkpoints_are_removed_after_a_new_one_is_written(tmp_path):
    start_run(tmp_path / "a", iters=9, save_every=2, keep_last=2)
    assert list(checkpoints.steps(tmp_path / "a" / "checkpoints")) == [8, 9]
    assert (tmp_path / "a" / "best" / "adapters.safetensors").exists()


def test_mlx_lm_loads_a_checkpoint_and_it_contains_no_paths(stopped):
    from mlx_lm.tuner.utils import load_adapters

    directory = stopped / "checkpoints" / "step-0000005"
    model = load_adapters(build_model(args=llama_args(num_hidden_layers=2)), str(directory))
    saved = mx.load(str(directory / "adapters.safetensors"))
    loaded = adapter_weights(model)  # and base weights, which mlx-lm does not freeze here
    assert saved.keys() == {name for name in loaded if ".lora_" in name}
    for name, array in saved.items():
        assert mx.array_equal(loaded[name], array), name
    for path in directory.glob("*.json"):
        assert str(stopped.parent.parent) not in path.read_text()
    assert not [p for p in directory.iterdir() if p.suffix not in (".json", ".safetensors")]


def test_a_changed_checkpoint_is_refused(stopped, tmp_path):
    for name in ("adapters.safetensors", "training_state.safetensors"):
        output = tmp_path / name
        shutil.copytree(stopped, output)
        path = output / "checkpoints" / "step-0000005" / name
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name} is not what the run wrote"):
            start_run(output, resume=LATEST)
    with pytest.raises(InputError, match=r"no checkpoint in .*start without --resume"):
        find_checkpoint(LATEST, tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["best.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_file_to_copy_back_is_refused_before_anything_moves(name, damage, stopped, tmp_path):
    """These are the files that resume copies back into the run's directory."""
    output = tmp_path / "a"
    shutil.copytree(stopped, output)
    path = output / "checkpoints" / "step-0000005" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            content[:-7]
            if damage == "truncated"
            else content.replace(b'"scale": 4.0', b'"scale": 4.5')[:-4] + b"1}}\n"
        )
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    with pytest.raises(
        InputError, match=rf"{name} (is not what the run wrote|cannot be read)|no file .*{name}"
    ):
        start_run(output, resume=LATEST)
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before


def test_an_incomplete_checkpoint_is_ignored(tmp_path):
    (tmp_path / "half" / "checkpoints" / ".step-0000009.12.new").mkdir(parents=True)
    with pytest.raises(InputError, match="no checkpoint in"):
        find_checkpoint(LATEST, tmp_path / "half")


def test_other_library_versions_are_a_notice(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "a")
    path = tmp_path / "a" / "checkpoints" / "step-0000005" / "training_state.json"
    content = json.loads(path.read_text())
    assert content["versions"]["mlx"] == mx.__version__
    content["versions"]["mlx"] = "0.1"
    del content["seal"]
    path.write_text(json.dumps(content | {"seal": _seal(content)}))
    _, _, notices = start_run(tmp_path / "a", resume=LATEST, iters=6)
    assert any(
        f"results may differ in the last digits: mlx was 0.1, is {mx.__version__}" in n for n in notices
    )
