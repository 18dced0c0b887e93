"""Preference runs: resumed bit for bit, one reference however it is computed, two workers like one.

Each worker runs this file as a program.
"""

import json
import math
import shutil
import signal
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

import nalora_mlx
from nalora_mlx.__main__ import main as nalora
from nalora_mlx.adapters.attach import adapt, adapt_dora
from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.core import storage
from nalora_mlx.core.config import TrainingConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.runs import checkpoints
from nalora_mlx.runs.metrics import MetricsFile
from nalora_mlx.runs.progress import Progress
from nalora_mlx.training import distributed
from nalora_mlx.training.preferences.reference import log_probabilities
from nalora_mlx.training.trainer import train
from tests.conftest import VOCABULARY, build_model, llama_args, masked_config
from tests.preference_rows import MODES, preference_rows
from tests.runs.test_resume import assert_same_run, metrics
from tests.training.test_distributed import launch

FLY = {"reference": "on-the-fly"}
PACKED = {"packing": True, "grad_accumulation_steps": 2}
POISON = VOCABULARY - 1  # a token that rows do not have; for some models its embedding is NaN
FULL = {"fine_tune_type": "full", "num_layers": 1}


def rows_of(mode, count, seed):
    return preference_rows(mode, count, seed, vocabulary=POISON)


def start(
    mode,
    output=None,
    kind="na-lora",
    resume=None,
    anyway=False,
    base=None,
    adapter=None,
    rows=None,
    rate=1e-2,
    lora_seed=11,
    scale=4.0,
    optimizer=None,
    **settings,
):
    """Run; return the model, the result and the events."""
    model = base() if base else build_model(args=llama_args(num_hidden_layers=1))
    mx.random.seed(lora_seed)
    lora = {"num_layers": -1, "rank": 4, "scale": scale}
    if kind == "full":
        model.freeze()
        model.layers[-1].unfreeze()
    elif kind == "dora":
        adapt_dora(model, masked_config(mask="off", step_scaling=False, **lora))
    else:
        adapt(model, masked_config(mask_warmup=3, **lora))
    if adapter is not None:
        model.load_weights(str(adapter), strict=False)
    defaults = {"iters": 9, "batch_size": 3, "steps_per_report": 2, "steps_per_eval": 3, "save_every": 4}
    config = TrainingConfig(**(defaults | MODES[mode] | settings))
    events = []
    result = train(
        model,
        rows or rows_of(mode, 11, 4),
        rows_of(mode, 5, 9),
        config,
        optimizer or optim.Adam(rate),
        output,
        [events.append, *([MetricsFile(output / "metrics.jsonl")] if output else [])],
        FULL if kind == "full" else None,
        resume,
        anyway,
    )
    return model, result, events


def computed(events):
    """Return how many batches of the reference were computed."""
    return sum(event["event"] == "reference" for event in events)


def checkpoint(run, step):
    return checkpoints.step_directory(run / "checkpoints", step)


def weights(model):
    return {name: np.array(a.astype(mx.float32)) for name, a in adapter_weights(model).items()}


def relative_error(got, want):
    squares = sum(((got[name] - want[name]) ** 2).sum() for name in want)
    return np.sqrt(squares / sum((array**2).sum() for array in want.values()))


# --- resume ---------------------------------------------------------------------------------------------------

RESUMED = {
    "dpo": ("dpo", "na-lora", {}),
    "on the fly": ("dpo", "dora", FLY),
    "kto packed": ("kto", "na-lora", PACKED | FLY),
    "kto full": ("kto", "full", {}),
    "orpo full": ("orpo", "full", {"grad_checkpoint": True}),
    "simpo": ("simpo", "na-lora", {}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "simpo")) for n in RESUMED]
)
def test_a_resumed_run_equals_the_whole_one(name, tmp_path):
    """From a copy of the run's directory, in the middle of an epoch; and from a checkpoint alone, in another one."""
    mode, kind, settings = RESUMED[name]
    whole, copy, other = tmp_path / "whole", tmp_path / "copy", tmp_path / "other"
    start(mode, whole, kind, **settings)
    shutil.copytree(whole, copy)
    _, _, events = start(mode, copy, kind, checkpoint(copy, 4), **settings)
    assert computed(events) == 0
    assert_same_run(whole, copy)
    alone = tmp_path / "alone"
    shutil.copytree(checkpoint(whole, 8), alone)
    shutil.rmtree(whole / "reference", ignore_errors=True)
    start(mode, other, kind, alone, **settings)
    for file in checkpoint(whole, 9).glob("*.safetensors"):
        assert file.read_bytes() == (checkpoint(other, 9) / file.name).read_bytes(), file.name
    best = "best/adapters.safetensors"
    assert (whole / best).read_bytes() == (other / best).read_bytes()
    has_reference = (checkpoint(whole, 9) / "reference.safetensors").exists()
    assert has_reference == (name != "orpo full")


def test_a_run_from_an_adapter_compares_with_that_adapter(tmp_path):
    """Also when it is resumed. The first rewards are 0, and so is the divergence."""
    start("orpo", tmp_path / "first", rate=3e-2)
    adapter = tmp_path / "first" / "adapters.safetensors"
    _, _, events = start("dpo", tmp_path / "a", adapter=adapter)
    first = next(event for event in events if event.get("split") == "valid")
    assert (first["accuracy"], first["chosen_reward"], first["kl"]) == (0.5, 0.0, 0.0)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    start("dpo", tmp_path / "b", resume=checkpoint(tmp_path / "b", 4))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_the_reference_outlives_the_checkpoint_that_a_run_resumes_from(tmp_path):
    settings = {"keep_last": 1, "save_every": 2}
    start("dpo", tmp_path, **settings, iters=4)
    _, result, events = start("dpo", tmp_path, resume=checkpoint(tmp_path, 4), **settings, iters=10)
    assert result.iterations == 10
    assert not [event for event in events if event["event"] == "notice"]
    assert list(checkpoints.steps(tmp_path / "checkpoints")) == [10]
    start("dpo", tmp_path, resume=checkpoint(tmp_path, 10), **settings, iters=11)


@pytest.mark.parametrize("harm", ["missing", "cut", "other run"])
def test_a_checkpoint_with_another_reference_is_an_error(harm, tmp_path):
    start("dpo", tmp_path / "a", iters=4)
    file = checkpoint(tmp_path / "a", 4) / "reference.safetensors"
    if harm == "missing":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    else:
        start("dpo", tmp_path / "b", iters=4, lora_seed=12)
        shutil.copyfile(checkpoint(tmp_path / "b", 4) / "reference.safetensors", file)
    with pytest.raises(InputError, match=r"reference\.safetensors is not what the run wrote"):
        start("dpo", tmp_path / "a", resume=file.parent)


def test_resuming_anyway_on_other_rows_computes_their_reference(tmp_path):
    """Under the parameters before training, which the checkpoint has. Full fine-tuning does not have them."""
    more = rows_of("dpo", 14, 5)
    for name in ("a", "b"):
        start("dpo", tmp_path / name, iters=4)
    one, _, events = start(
        "dpo", tmp_path / "a", resume=checkpoint(tmp_path / "a", 4), anyway=True, rows=more
    )
    assert computed(events) == 5 + 2  # batches of training and validation rows
    other, *_ = start(
        "dpo", tmp_path / "b", resume=checkpoint(tmp_path / "b", 4), anyway=True, rows=more, **FLY
    )
    assert relative_error(weights(one), weights(other)) < 1e-5
    start("dpo", tmp_path / "c", "full", iters=4)
    with pytest.raises(InputError, match="full fine-tuning keeps no copy"):
        start("dpo", tmp_path / "c", "full", checkpoint(tmp_path / "c", 4), anyway=True, rows=more)


# --- the reference --------------------------------------------------------------------------------------------


def quantized():
    model = build_model(args=llama_args(num_hidden_layers=1, hidden_size=64, intermediate_size=64))
    nn.quantize(model, 32, 4)
    return model


def half():
    return build_model(args=llama_args(num_hidden_layers=1), dtype=mx.float16, gain=1.5)


BASES = {
    "dpo": ("dpo", "na-lora", None, {}),
    "kto": ("kto", "na-lora", None, PACKED),
    "dora": ("ipo", "dora", None, {}),
    "quantized": ("dpo", "na-lora", quantized, {}),
    "half": ("dpo", "na-lora", half, {}),
}


@pytest.mark.parametrize("name", BASES)
def test_a_reference_in_each_iteration_gives_the_same_updates(name):
    mode, kind, base, settings = BASES[name]
    before, *_ = start(mode, kind=kind, base=base, iters=1, rate=1e-30, **settings)
    found = []
    for reference in ("precomputed", "on-the-fly"):
        model, _, events = start(mode, kind=kind, base=base, reference=reference, **settings)
        assert (computed(events) > 0) == (reference == "precomputed")
        moved = {path: array - weights(before)[path] for path, array in weights(model).items()}
        numbers = [e["chosen_reward"] for e in events if e.get("split") == "valid"]
        found.append((moved, numbers))
    assert relative_error(found[1][0], found[0][0]) < 1e-5
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4, abs=1e-5)
    assert found[0][1][0] == 0
    assert abs(found[0][1][-1]) > 1e-3


def test_full_fine_tuning_has_no_reference_in_each_iteration():
    with pytest.raises(InputError, match=r"full fine-tuning keeps no copy .* leave --reference out"):
        start("dpo", kind="full", **FLY)


def test_a_second_run_reads_the_reference_of_the_first(tmp_path):
    """Unless something differs on which it depends."""
    count = 4 + 2  # batches of training and validation rows
    first, _, events = start("dpo", tmp_path, iters=3)
    assert computed(events) == count
    second, _, events = start("dpo", tmp_path, iters=3)
    assert computed(events) == 0
    assert relative_error(weights(second), weights(first)) == 0
    for changes in ({"rate": 1e-3, "preference_beta": 0.3}, {"iters": 2}):
        assert computed(start("dpo", tmp_path, **changes)[2]) == 0, changes
    others = [{"seed": 1}, {"batch_size": 2}, {"rows": rows_of("dpo", 11, 5)}, {"lora_seed": 12}]
    for changes in [*others, {"base": lambda: build_model(1, args=llama_args(num_hidden_layers=1))}]:
        assert computed(start("dpo", tmp_path, **({"iters": 1} | changes))[2]) > 0, changes


def test_another_scale_of_a_starting_adapter_is_another_reference(tmp_path):
    start("orpo", tmp_path / "first", iters=3)
    adapter = tmp_path / "first" / "adapters.safetensors"
    for scale, known in ((4.0, False), (4.0, True), (8.0, False)):
        _, _, events = start("dpo", tmp_path / "a", adapter=adapter, iters=1, scale=scale)
        assert (computed(events) == 0) == known


@pytest.mark.parametrize("harm", ["cut", "a changed number"])
def test_a_damaged_reference_of_an_earlier_run_is_computed_again(harm, tmp_path):
    first, _, events = start("dpo", tmp_path, iters=2)
    (file,) = (tmp_path / "reference").iterdir()
    content = bytearray(file.read_bytes())
    if harm == "cut":
        del content[-4:]
    else:
        content[-40] ^= 1
    file.write_bytes(content)
    second, _, again = start("dpo", tmp_path, iters=2)
    assert computed(again) == computed(events)
    assert relative_error(weights(second), weights(first)) == 0


def test_a_run_killed_while_it_writes_the_reference_can_start_again(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(path):
        if path.parent.name == "reference":
            monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process tidies nothing up
            raise Killed

    with monkeypatch.context() as patches:
        patches.setattr(storage, "flush", kill)
        with pytest.raises(Killed):
            start("dpo", tmp_path)
    monkeypatch.undo()
    (partial,) = (tmp_path / "reference").iterdir()
    hidden, name, _, suffix = partial.name.split(".")
    assert hidden == ""
    partial.rename(partial.with_name(f".{name}.99999.{suffix}"))  # as if by another process
    _, result, events = start("dpo", tmp_path, iters=2)
    assert result.iterations == 2
    assert computed(events) > 0
    assert [path.name[0] != "." for path in (tmp_path / "reference").iterdir()] == [True]


# --- NaN, and what is the best ---------------------------------------------------------------------------------


def poisoned(dtype=mx.float32):
    model = build_model(
        args=llama_args(num_hidden_layers=1, tie_word_embeddings=False), dtype=dtype, gain=1.0
    )
    weight = np.array(model.model.embed_tokens.weight)
    weight[POISON] = np.nan
    model.model.embed_tokens.weight = mx.array(weight)
    return model


def notices(events):
    return [event["text"] for event in events if event["event"] == "notice"]


@pytest.mark.parametrize(
    ("mode", "reference"), [("dpo", "precomputed"), ("dpo", "on-the-fly"), ("kto", "on-the-fly")]
)
def test_a_broken_row_costs_its_own_updates_only(mode, reference, tmp_path):
    """A notice names the rows of its batch. The run goes on, and resumes bit for bit."""
    rows = rows_of(mode, 9, 4)
    for answer in rows[4].answers:
        answer.tokens[0] = POISON
    settings = {"rows": rows, "base": poisoned, "reference": reference, "save_every": 3}
    _, result, events = start(mode, tmp_path / "a", **settings)
    assert (result.updates, result.skipped) == (6, 3)  # three batches in an epoch
    skips = notices(events)
    assert len(skips) == 3
    for text in skips:
        assert "the loss is nan; the update is skipped" in text
        assert ":5" in text.partition("rows: ")[2].replace("rows", "").split(", ")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    start(mode, tmp_path / "b", resume=checkpoint(tmp_path / "b", 3), **settings)
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(("mode", "reference"), [("dpo", "precomputed"), ("kto", "on-the-fly")])
def test_an_update_that_breaks_the_weights_is_undone(mode, reference):
    rate = optim.SGD(lambda step: mx.where(step == 2, 1e6, 1e-3))
    rows = rows_of(mode, 9, 4)
    _, result, events = start(
        mode,
        base=lambda: poisoned(mx.float16),
        rows=rows,
        reference=reference,
        optimizer=rate,
        steps_per_eval=100,
    )
    (text,) = notices(events)
    assert "the weights are at fault, not the rows: an update broke them, and is undone" in text
    assert (result.updates, result.skipped) == (7, 2)


def test_the_best_adapter_has_the_highest_accuracy_then_the_lowest_loss(tmp_path):
    _, result, events = start("dpo", tmp_path, iters=24, steps_per_eval=2, early_stopping=4)
    found = [
        (-e["accuracy"], e["loss"], e["step"]) for e in events if e.get("split") == "valid" and e["step"]
    ]
    best = min(found)
    assert result.best_iteration == best[2]
    assert (result.best_valid_accuracy, result.best_valid_loss) == (-best[0], best[1])
    stale = sum(one[2] > best[2] for one in found)
    assert (result.stopped is not None) == (stale >= 4)
    progress, losses = (
        Progress(),
        [(0.1, 0.9), (0.6, 0.5), (0.7, 0.7), (0.3, 0.6), (0.4, 0.7), (math.nan, 0.8)],
    )
    better = []
    for progress.iteration, (loss, accuracy) in enumerate(losses):
        better.append(progress.record_validation(loss, accuracy))
    assert better == [False, True, True, False, True, False]
    assert progress.stale_validations == 1


# --- the test set -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["from an adapter", "full"])
def test_a_test_alone_equals_that_after_training(kind, model_directory, tmp_path):
    rng = np.random.default_rng(0)

    def answer():
        return " ".join(rng.choice(["red", "blue", "cat", "dog", "one", "is"], int(rng.integers(2, 7))))

    for split, count in (("train", 8), ("valid", 3), ("test", 5)):
        rows = [
            {"prompt": f"what is {answer()} ?", "chosen": answer(), "rejected": answer()}
            for _ in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["lora", "--model", str(model_directory), "--data", str(tmp_path), "--batch-size", "2"]
    common += ["--test-batches", "-1", "--iters", "4", "--learning-rate", "0.02", "--no-samples"]
    flags = ["--fine-tune-type", "full", "--num-layers", "1"]
    if kind != "full":
        first = tmp_path / "first"
        assert not nalora([*common, "--train", "--train-mode", "orpo", "--adapter-path", str(first)])
        flags = ["--resume-adapter-file", str(first)]
    dpo = [*common, "--train-mode", "dpo", "--adapter-path", str(tmp_path / "dpo"), "--test"]
    assert not nalora([*dpo, "--train", *flags])
    assert not nalora(dpo)
    after, alone = [record for record in metrics(tmp_path / "dpo") if record.get("split") == "test"]
    assert alone == after
    assert abs(after["chosen_reward"]) > 1e-3


PAIRS = [{"prompt": f"{word} ?", "chosen": "red cat", "rejected": "one blue dog"} for word in ("is", "what")]


@pytest.mark.parametrize("mode", ["dpo", "orpo"])
def test_full_fine_tuning_needs_no_test_set(mode, model_directory, tmp_path):
    data = {"train": 4 * PAIRS, "valid": PAIRS}
    settings = {"fine_tune_type": "full", "num_layers": 1, "iters": 1, "batch_size": 2, "samples": False}
    found = nalora_mlx.finetune(
        model_directory, data, tmp_path, progress=False, train_mode=mode, **settings
    ).training
    assert found.valid_accuracy is not None


def test_a_run_on_few_rows_says_that_most_of_the_reference_is_not_used(model_directory, tmp_path, capsys):
    for iters, batch_size, said in ((1, 2, True), (4, 2, False)):
        flags = ["--iters", str(iters), "--batch-size", str(batch_size), "--no-samples"]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in 4 * PAIRS))
        (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
        where = [
            "--model",
            str(model_directory),
            "--data",
            str(tmp_path),
            "--adapter-path",
            str(tmp_path / "a"),
        ]
        assert not nalora(["lora", "--train", "--train-mode", "dpo", *where, *flags])
        text = "the reference is computed for all 8 rows, and the run trains on 2 of them"
        assert (text in capsys.readouterr().out) is said


def test_ctrl_c_while_the_reference_is_computed_leaves_nothing_to_resume(
    model_directory, tmp_path, monkeypatch
):
    calls = []

    def interrupting(loss, batch):
        calls.append(batch)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return log_probabilities(loss, batch)

    monkeypatch.setattr(f"{log_probabilities.__module__}.log_probabilities", interrupting)
    data = {"train": 8 * PAIRS, "valid": PAIRS}
    with pytest.raises(KeyboardInterrupt, match=r"^stopped before the first update$"):
        nalora_mlx.finetune(model_directory, data, tmp_path, progress=False, train_mode="dpo", batch_size=2)
    assert len(calls) == 2
    assert not (tmp_path / "checkpoints").exists()


# --- two workers ------------------------------------------------------------------------------------------------

SHARED_WORK = {
    # 11 rows in batches of 2: the last one has a single row, and one worker gets none.
    "kto": ("kto", "na-lora", {"batch_size": 2, "grad_accumulation_steps": 2, "val_batches": -1}),
    "full": ("dpo", "full", {"batch_size": 2}),
    "orpo": ("orpo", "na-lora", {"packing": True, "batch_size": 2}),
}


def run_case(name, output):
    mode, kind, settings = SHARED_WORK[name]
    # Adam would turn the rounding of gradients that are almost 0 into steps.
    model, _, events = start(mode, output, kind, optimizer=optim.SGD(0.1), iters=4, save_every=4, **settings)
    records = [event for event in events if event["event"] == "metrics"]
    timings = ("tokens_per_second", "iterations_per_second", "seconds", "peak_memory_gb", "layers")
    return model, [{k: v for k, v in record.items() if k not in timings} for record in records]


def main(directory: Path) -> None:
    """Run the cases as one of the workers, twice each, and write the results."""
    mx.set_default_device(mx.cpu)
    rank = distributed.workers().rank
    print("started", flush=True)
    for name in SHARED_WORK:
        for _ in range(1 + (name == "kto")):  # a second run finds the first one's files
            model, records = run_case(name, directory / name)
        mx.save_safetensors(str(directory / f"{name}-{rank}.safetensors"), adapter_weights(model))
        (directory / f"{name}-{rank}.json").write_text(json.dumps(records))


def test_two_workers_equal_one(tmp_path):
    done = launch(
        "ring",
        "-m",
        "tests.training.test_preference_runs",
        str(tmp_path),
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    if done.stdout.count("started") != 2:
        pytest.skip(f"two workers cannot be started here: {(done.stderr or done.stdout).strip()[-300:]}")
    assert done.returncode == 0, done.stderr[-2000:]
    for name in SHARED_WORK:
        model, records = run_case(name, None)
        want = weights(model)
        for rank in range(2):
            arrays = mx.load(str(tmp_path / f"{name}-{rank}.safetensors"))
            got = {path: np.array(array) for path, array in arrays.items()}
            assert relative_error(got, want) < 1e-5, name
        found = json.loads((tmp_path / f"{name}-0.json").read_text())
        assert len(found) == len(records) > 3
        for one, two in zip(records, found, strict=True):
            assert one.keys() == two.keys()
            for key, value in one.items():
                if isinstance(value, float) and key != "kl":  # each worker probes tokens of its own
                    assert two[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, key)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
