"""Two workers, with ring and MPI, against one process with the same global batches.

Each worker runs this file as a program. It trains the cases below and writes its results to a directory.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.core.config import NALoRAConfig, TrainingConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.batches import collate, evaluation_batches, training_batches
from nalora_mlx.runs import checkpoints
from nalora_mlx.training import distributed
from nalora_mlx.training.distributed import Workers
from nalora_mlx.training.evaluation import evaluate
from nalora_mlx.training.run import Run
from nalora_mlx.training.trainer import train
from tests.conftest import build_examples, build_model

ROWS = 13
ITERATIONS = 12
HARD = {"mask": "hard", "keep_fraction": 0.5, "mask_warmup": 2}
CASES = {
    # 13 rows in batches of 5: the last one has 3, of which one worker gets two and the other one.
    "hard mask": (HARD, {"batch_size": 5}),
    # In batches of 4 the last one has a single row, and one worker gets none.
    "accumulated": (HARD, {"batch_size": 4, "grad_accumulation_steps": 3, "grad_checkpoint": True}),
    "packed": ({"mask_warmup": 2}, {"batch_size": 3, "packing": True}),
    # The selection is measured on one row of each worker, here the same row. In each fourth batch one worker gets none.
    "limited": ({"selection_limit": 1e-4}, {"batch_size": 4}),
}


def run_case(name, output, stop_at=None, resume=None):
    """Train one case, up to an iteration or from a checkpoint.

    Return this worker's adapters and masks, and its result and number of events.
    """
    method, settings = CASES[name]
    model = build_model()
    mx.random.seed(11)
    config = NALoRAConfig(num_layers=-1, rank=4, scale=4.0, **method)
    adapt(model, config)
    examples = build_examples(ROWS, seed=5, low=4, high=30)
    if name == "limited":
        examples = examples[:1] * ROWS
    settings = TrainingConfig(
        iters=ITERATIONS, steps_per_report=3, steps_per_eval=6, save_every=6, val_batches=-1, **settings
    )
    events = []
    run = Run(
        model,
        examples,
        examples[:5],
        settings,
        optim.Adam(1e-3),
        output,
        [events.append],
        resume=resume,
        # Only the first worker gets events. When it asks to stop, both stop.
        stop=lambda: stop_at is not None and any(event.get("step") == stop_at for event in events),
    )
    result = asdict(run.run())
    arrays = {f"adapter {k}": a for k, a in adapter_weights(model).items()}
    arrays |= {f"mask {k}": state.mask for k, state in run.step.importance["layers"].items()}
    del result["seconds"], result["stopped"]
    return arrays, {"result": result, "events": len(events)}


def main(directory: Path) -> None:
    """Run all cases as one of the workers, and write the results."""
    mx.set_default_device(mx.cpu)
    rank = distributed.workers().rank
    for name in CASES:
        arrays, report = run_case(name, directory / name / f"rank-{rank}")
        mx.save_safetensors(str(directory / f"{name}-{rank}.safetensors"), arrays)
        (directory / f"{name}-{rank}.json").write_text(json.dumps(report))
    output = directory / "resumed"
    run_case("hard mask", output / f"rank-{rank}", stop_at=ITERATIONS // 2)
    mx.eval(mx.distributed.all_sum(mx.ones(1)))  # wait until the checkpoint is written
    checkpoint = checkpoints.step_directory(output / "rank-0" / "checkpoints", ITERATIONS // 2)
    arrays, report = run_case("hard mask", output / f"rank-{rank}", resume=checkpoint)
    mx.save_safetensors(str(directory / f"resumed-{rank}.safetensors"), arrays)
    (directory / f"resumed-{rank}.json").write_text(json.dumps(report))
    examples = build_examples(ROWS, seed=5)
    try:
        model = build_model()
        adapt(model, NALoRAConfig(num_layers=-1))
        train(model, examples[rank:], config=TrainingConfig(iters=1))
        message = "none"
    except InputError as error:
        message = str(error)
    (directory / f"error-{rank}").write_text(message)


def launch(backend, *command, **options):
    """Run a Python command in two workers. For MPI this calls mpirun, because mlx.launch needs that of Open MPI 5."""
    if backend == "mpi":
        start = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", "2"]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start = [Path(sys.executable).with_name("mlx.launch"), "-n", "2", "--backend", backend]
        start += ["-p", str(port), "--"]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment = {"MLX_MPI_LIBNAME": "libmpi.so.40"} | as_root if sys.platform == "linux" else {}
    return subprocess.run(
        [*start, sys.executable, *command],
        capture_output=True,
        text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"} | environment,  # the workers share the cores
        **options,
    )


@pytest.fixture(scope="module", params=["ring", "mpi"])
def two_workers(request, tmp_path_factory):
    """Run `main` in two workers; return the directory with their results."""
    backend = request.param
    if backend == "mpi" and shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun here")
    try:
        probe = "import mlx.core as mx; assert mx.distributed.all_sum(mx.ones(1)).item() == 2; print('both')"
        done = launch(backend, "-c", probe, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"two workers cannot be started with the {backend} backend here: {error}")
    if done.stdout.count("both") != 2:
        pytest.skip(
            f"the {backend} backend does not start here: {(done.stderr or done.stdout).strip()[-200:]}"
        )
    directory = tmp_path_factory.mktemp(backend)
    done = launch(
        backend,
        "-m",
        "tests.training.test_distributed",
        str(directory),
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert (directory / "error-1").exists(), done.stdout + done.stderr
    return directory


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Return a function that trains a case in this process, once, and returns its directory and results."""

    @cache
    def run(name):
        directory = tmp_path_factory.mktemp("one")
        return directory, *run_case(name, directory)

    return run


@pytest.mark.parametrize("name", CASES)
def test_two_workers_equal_one(name, two_workers, one_process):
    directory, expected, reference = one_process(name)
    arrays = [mx.load(str(two_workers / f"{name}-{rank}.safetensors")) for rank in (0, 1)]
    reports = [json.loads((two_workers / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    assert arrays[0].keys() == arrays[1].keys() == expected.keys()
    squares = np.zeros(2)
    for path in expected:
        first, second, one = np.array(arrays[0][path]), np.array(arrays[1][path]), np.array(expected[path])
        np.testing.assert_array_equal(first, second, err_msg=f"{path}: the workers differ")
        if path.startswith("mask ") and CASES[name][0] is HARD:
            np.testing.assert_array_equal(first, one)
            assert 0 < first.mean() < 1
        elif path.startswith("mask "):
            np.testing.assert_allclose(first, one, rtol=1e-4)
        else:
            squares += [np.square(first - one).sum(), np.square(one).sum()]
    assert np.sqrt(squares[0] / squares[1]) < 1e-4
    for report in reports:
        for key, value in reference["result"].items():
            assert report["result"][key] == (value and pytest.approx(value, rel=1e-5)), key
    # Only the first worker writes files and sends events.
    assert [report["events"] for report in reports] == [reference["events"], 0]
    files = {p.relative_to(directory) for p in directory.rglob("*") if p.is_file()}
    output = two_workers / name / "rank-0"
    assert {p.relative_to(output) for p in output.rglob("*") if p.is_file()} == files
    assert not (two_workers / name / "rank-1").exists()


def test_two_resumed_workers_equal_uninterrupted_ones(two_workers, tmp_path):
    """Bit for bit. One process would sum in another order, and cannot resume."""
    for rank in (0, 1):
        uninterrupted = mx.load(str(two_workers / f"hard mask-{rank}.safetensors"))
        resumed = mx.load(str(two_workers / f"resumed-{rank}.safetensors"))
        assert resumed.keys() == uninterrupted.keys()
        for path, array in uninterrupted.items():
            np.testing.assert_array_equal(np.array(resumed[path]), np.array(array), err_msg=path)
        results = [
            json.loads((two_workers / f"{kind}-{rank}.json").read_text())["result"]
            for kind in ("hard mask", "resumed")
        ]
        assert results[0] == results[1]
    saved = checkpoints.steps(two_workers / "resumed" / "rank-0" / "checkpoints")
    assert list(saved) == [ITERATIONS // 2, ITERATIONS]
    with pytest.raises(
        InputError, match=r"not the same run: it ran on 2 workers, and runs on 1; .*--resume-anyway"
    ):
        run_case("hard mask", tmp_path, resume=saved[ITERATIONS // 2])


def test_workers_with_different_data_are_refused(two_workers):
    for rank in (0, 1):
        assert "the workers have different data" in (two_workers / f"error-{rank}").read_text()


@pytest.mark.parametrize("packing", [False, True])
def test_shares_of_a_batch_make_up_the_batch(packing):
    """Every sequence goes to one worker with the same padding. A worker without a sequence gets only padding."""
    examples = build_examples(7)
    whole = training_batches(examples, 3, 0, packing)
    parts = [training_batches(examples, 3, 0, packing, Workers(rank, 4).share) for rank in range(4)]
    for _ in range(6):
        batch, shares = next(whole), [next(part) for part in parts]
        assert {share.supervised_tokens for share in shares} == {batch.supervised_tokens}
        assert {share.rows for share in shares} == {batch.rows}
        for rank, share in enumerate(shares):
            if rank < len(batch.inputs):
                for name in ("inputs", "targets", "loss_mask", "token_mask"):
                    np.testing.assert_array_equal(getattr(share, name), getattr(batch, name)[rank::4])
                if packing:
                    np.testing.assert_array_equal(share.segment_ids, batch.segment_ids[rank::4])
            else:
                assert share.inputs.shape == (1, batch.inputs.shape[1])
                assert share.token_mask.sum() == share.loss_mask.sum() == 0


def test_a_share_without_rows_has_zero_loss():
    model = build_model()
    examples = build_examples(3)
    shares = [evaluation_batches(examples, 1, -1, 0, Workers(rank, 2).share) for rank in (0, 1)]
    assert evaluate(model, shares[0])[0] > 0
    mean, tokens, _ = evaluate(model, shares[1])
    assert mean == 0
    assert tokens == sum(int(e.loss_mask.sum()) for e in examples)
    assert collate(examples, [0, 1], Workers(1, 2).share).remote_tokens == int(examples[0].loss_mask.sum())


def test_one_process_sums_nothing():
    tree = {"a": mx.ones(3), "b": [mx.zeros(2)]}
    assert Workers().sum(tree) is tree
    assert distributed.workers() == Workers(0, 1)
    Workers().agree({"data": []})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
