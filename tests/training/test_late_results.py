"""Results that are read one step late change nothing: every run equals one that reads them at once, bit for bit."""

import itertools
import json
from dataclasses import asdict

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.core.config import NALoRAConfig, TrainingConfig
from nalora_mlx.runs import checkpoints
from nalora_mlx.runs.metrics import MetricsFile
from nalora_mlx.training import trainer
from nalora_mlx.training.run import Run
from nalora_mlx.training.step import TrainingStep
from tests.conftest import VOCABULARY, build_examples, build_model, llama_args
from tests.training.test_faults import POISON, rows
from tests.training.test_last_good import FULL, HUGE, last_layer, spiking

TIMES = ("tokens_per_second", "iterations_per_second", "seconds", "loss_seconds", "peak_memory_gb")
RARELY = {"steps_per_report": 100, "save_every": 100}  # nothing waits, so every fault is found one step late


class Synchronous(Run):
    """A run that reads the results of an iteration before anything else happens."""

    def start(self, *arguments):
        self.settle()
        return super().start(*arguments)

    def update(self, *arguments):
        super().update(*arguments)
        self.settle()


def adapted(dtype=mx.float32, poisoned=False, **settings):
    """Return a tiny model with adapters. If it is poisoned, the embedding of one token is NaN."""
    args = llama_args(num_hidden_layers=1, tie_word_embeddings=False)
    model = build_model(args=args, dtype=dtype, gain=1.0)
    if poisoned:
        bad = mx.arange(VOCABULARY)[:, None] == POISON
        model.model.embed_tokens.weight = mx.where(bad, mx.nan, model.model.embed_tokens.weight)
    mx.random.seed(11)
    adapt(model, NALoRAConfig(num_layers=-1, rank=2, scale=1.0, mask_warmup=0, **settings))
    mx.eval(model.parameters())
    return model


def poisoned():
    return adapted(poisoned=True)


def half_precision():
    """Return a model whose activations overflow after an update with a learning rate of HUGE, which nothing limits."""
    return adapted(mx.float16, selection_limit=0)


def run(kind, output, model, examples, valid, monkeypatch, optimizer=None, stop_at=None, resume=None, **more):
    """Train; return all that a run leaves: events, error, weights, random state and files, without times."""
    monkeypatch.setattr(trainer, "Run", kind)
    settings = {"iters": 9, "batch_size": 2, "steps_per_report": 4, "steps_per_eval": 5, "save_every": 6}
    # Clearing the cache of a CPU waits for what is in flight.
    config = TrainingConfig(**(settings | {"val_batches": -1, "clear_cache_threshold": 2**40} | more))
    model, events, asked, error = model(), [], itertools.count(), ""
    adapter_config = FULL if model.layers[-1].trainable_parameters().get("input_layernorm") else None
    try:
        trainer.train(
            model,
            examples,
            valid,
            config,
            optimizer() if optimizer else optim.Adam(1e-2),
            output,
            [
                lambda event: events.append(as_json(event).replace(str(output), "")),
                MetricsFile(output / "metrics.jsonl"),
            ],
            adapter_config,
            resume,
            stop=lambda: next(asked) == stop_at,
        )
    except FloatingPointError as raised:
        error = str(raised).replace(str(output), "")
    weights = {name: np.array(array) for name, array in adapter_weights(model).items()}
    return events, error, weights, np.array(mx.random.state[0]), contents(output)


def as_json(event):
    event = {key: value for key, value in event.items() if key not in TIMES}
    if "result" in event:
        event["result"] = {key: value for key, value in asdict(event["result"]).items() if key not in TIMES}
    return json.dumps(event, default=str)


def contents(directory):
    """Return the files of a run, by relative path."""
    found = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name == "metrics.jsonl":
            content = [as_json(json.loads(line)) for line in content.splitlines()]
        elif path.name == "training_state.json":
            content = json.loads(content)
            content["seal"] = None
            for name in TIMES:
                content["progress"].pop(name, None)
        found[str(path.relative_to(directory))] = content
    return found


def assert_same(one, other):
    for mine, theirs in zip(one[0], other[0], strict=False):
        assert mine == theirs
    assert len(one[0]) == len(other[0])
    assert one[1] == other[1]
    np.testing.assert_equal(one[2], other[2])
    np.testing.assert_array_equal(one[3], other[3])
    assert one[4].keys() == other[4].keys()
    for name in one[4]:
        assert one[4][name] == other[4][name], name


def hardly_varied(count=60):
    """Rows of which nearly all are the same, so that their loss gets small and that of the others stands out."""
    varied = rows(count)
    return [row if i % 8 == 7 else varied[0] for i, row in enumerate(varied)]


def good_then_bad():
    """Rows after which every update is skipped, except for some good ones in between."""
    good, bad = rows(), rows(poisoned=range(12))
    return good[:5] + bad[5:]


CASES = {
    "plain": (adapted, rows(), {}, ""),
    "accumulation": (adapted, rows(), {"grad_accumulation_steps": 3, "iters": 11}, ""),
    "dropout, packed": (lambda: adapted(dropout=0.3), rows(), {"packing": True}, ""),
    "bad rows": (poisoned, rows(poisoned=[3, 9]), {"iters": 13}, "the update is skipped"),
    "bad rows, late": (poisoned, rows(poisoned=[0, 5]), RARELY | {"iters": 13}, "the update is skipped"),
    "bad rows, accumulation": (
        poisoned,
        rows(poisoned=[1]),
        RARELY | {"iters": 13, "grad_accumulation_steps": 2, "valid": ()},
        "the update is skipped",
    ),
    "too many in a row": (
        poisoned,
        good_then_bad(),
        RARELY | {"iters": 40, "valid": (), "max_bad_steps": 2},
        "2 updates in a row were skipped",
    ),
    "undone": (
        half_precision,
        build_examples(),
        RARELY | {"optimizer": lambda: spiking(3), "valid": ()},
        "iteration 4: the loss is nan",
    ),
    "undone, accumulation": (
        half_precision,
        build_examples(),
        RARELY | {"optimizer": lambda: spiking(3), "grad_accumulation_steps": 2, "iters": 11, "valid": ()},
        "iteration 8: the loss is nan",
    ),
    "undone before saves": (
        half_precision,
        build_examples(),
        {"optimizer": lambda: spiking(3, 6), "steps_per_report": 3, "save_every": 3, "max_bad_steps": 9},
        "is undone",
    ),
    "undone to the end": (
        half_precision,
        build_examples(),
        RARELY | {"optimizer": lambda: optim.SGD(HUGE), "valid": ()},
        "updates in a row were skipped",
    ),
    "full fine-tuning": (
        last_layer,
        build_examples(),
        {"optimizer": lambda: spiking(6, huge=1e17), "steps_per_report": 100, "save_every": 4, "valid": ()},
        "the last complete checkpoint is iteration 4",
    ),
    "spikes": (
        adapted,
        hardly_varied(),
        RARELY | {"optimizer": lambda: optim.Adam(0.1), "iters": 100, "batch_size": 1},
        "jumps repeatedly",
    ),
    "early stopping": (
        adapted,
        rows(),
        {"optimizer": lambda: optim.SGD(0.0), "early_stopping": 2, "steps_per_eval": 3, "iters": 20},
        "no better validation loss",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_equals_one_that_reads_its_results_at_once(name, tmp_path, monkeypatch):
    model, examples, settings, said = CASES[name]
    settings = {"valid": rows(4)} | settings
    late, synchronous = (
        run(kind, tmp_path / kind.__name__, model, examples, monkeypatch=monkeypatch, **settings)
        for kind in (Run, Synchronous)
    )
    assert said in "".join([*late[0], late[1]])
    assert_same(late, synchronous)


@pytest.mark.parametrize("name", ["bad rows, late", "undone", "undone, accumulation"])
def test_a_run_that_is_stopped_equals_one_that_reads_its_results_at_once(name, tmp_path, monkeypatch):
    """Whichever update is running when it is asked to stop: the run ends after that one."""
    model, examples, settings, _ = CASES[name]
    size, iterations = settings.get("grad_accumulation_steps", 1), settings.get("iters", 9)
    for stop_at in range(7):
        late, synchronous = (
            run(
                kind,
                tmp_path / f"{kind.__name__} {stop_at}",
                model,
                examples,
                monkeypatch=monkeypatch,
                stop_at=stop_at,
                **settings | {"valid": ()},
            )
            for kind in (Run, Synchronous)
        )
        ended = json.loads(late[0][-1])["result"]
        assert (ended["stopped"] is None) is (size * (stop_at - 1) >= iterations)
        assert ended["iterations"] == min(size * stop_at, iterations)
        assert_same(late, synchronous)


def test_a_run_resumed_from_any_checkpoint_ends_like_one_that_saves_none(tmp_path, monkeypatch):
    examples, often, last = rows(poisoned=[4]), tmp_path / "often", "checkpoints/step-0000009/"
    settings = {"steps_per_report": 4, "steps_per_eval": 100}
    whole = run(Run, tmp_path / "whole", poisoned, examples, (), monkeypatch, save_every=100, **settings)
    run(Run, often, poisoned, examples, (), monkeypatch, save_every=1, **settings)
    saved = checkpoints.steps(often / "checkpoints")
    assert list(saved) == list(range(1, 10))
    for iteration, checkpoint in list(saved.items())[:-1]:
        output = tmp_path / str(iteration)
        resumed = run(
            Run, output, poisoned, examples, (), monkeypatch, resume=checkpoint, save_every=3, **settings
        )
        np.testing.assert_equal(resumed[2], whole[2])
        for name in ("training_state.safetensors", "training_state.json"):
            one, other = resumed[4][last + name], whole[4][last + name]
            if name.endswith("json"):
                one["config"] = other["config"] = None
            assert one == other, (iteration, name)


def test_an_iteration_starts_before_the_results_of_the_one_before_are_read(monkeypatch):
    order, step = [], TrainingStep.__call__

    def starting(self, *arguments):
        order.append("start")
        return step(self, *arguments)

    def listen(event):
        if event["event"] == "start":
            order.clear()
        if event["event"] in ("step", "metrics"):
            order.append(f"{event['event']}-{event['step']}")

    def waiting(*arrays):
        order.append("wait")
        evaluate(*arrays)

    evaluate = mx.eval
    monkeypatch.setattr(TrainingStep, "__call__", starting)
    monkeypatch.setattr(mx, "eval", waiting)
    config = TrainingConfig(iters=5, batch_size=2, steps_per_report=3)
    trainer.train(adapted(), rows(), (), config, optim.Adam(1e-2), listeners=[listen])
    # A report waits for its iteration, and measures misalignment.
    expected = (
        "start start step-1 start step-2 wait step-3 metrics-3 start start step-4 wait step-5 metrics-5"
    )
    assert order == expected.split()


def test_the_time_of_iterations_is_that_between_their_ends(monkeypatch):
    """Tokens per second are right, although an iteration starts before the one before it has ended."""
    clock = itertools.count()  # seconds; each look at the clock takes one
    monkeypatch.setattr("nalora_mlx.training.run.time.perf_counter", lambda: float(next(clock)))
    reports = []
    config = TrainingConfig(iters=6, batch_size=2, steps_per_report=3)
    trainer.train(adapted(), rows(), (), config, optim.Adam(1e-2), listeners=[reports.append])
    speeds = [event["iterations_per_second"] for event in reports if event["event"] == "metrics"]
    # Six looks from the first start to the third end: three starts and three ends.
    assert speeds == [3 / 5, 3 / 5]
