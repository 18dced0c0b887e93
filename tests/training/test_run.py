"""Constructing a run changes nothing; running it does everything."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.core.config import NALoRAConfig, TrainingConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.training.run import Run
from nalora_mlx.training.trainer import train
from tests.conftest import build_examples, build_model

CONFIG = TrainingConfig(iters=4, batch_size=2, save_every=2)


def adapted(seed=0):
    model = build_model()
    mx.random.seed(seed)
    adapt(model, NALoRAConfig(rank=2, num_layers=-1, mask_warmup=0))
    return model


def files(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def copies(tree):
    return {name: np.array(array) for name, array in tree_flatten(tree)}


@pytest.mark.parametrize("resumes", [False, True])
def test_constructing_a_run_changes_nothing(resumes, tmp_path):
    examples, output = build_examples(8), tmp_path / "run"
    train(adapted(), examples, config=CONFIG, optimizer=optim.Adam(1e-2), output=output)
    model = adapted(seed=1)
    mx.random.seed(7)
    parameters, random, on_disk = copies(model.parameters()), np.array(mx.random.state[0]), files(tmp_path)
    checkpoint = output / "checkpoints" / "step-0000002" if resumes else None
    run = Run(model, examples, (), CONFIG, optim.Adam(1e-2), output, resume=checkpoint)
    for name, array in copies(model.parameters()).items():
        np.testing.assert_array_equal(array, parameters[name])
    np.testing.assert_array_equal(np.array(mx.random.state[0]), random)
    assert files(tmp_path) == on_disk
    assert run.progress.iteration == 0
    assert not model.training
    result = run.run()
    assert (result.iterations, run.progress.iteration) == (4, 4)
    assert any((array != parameters[name]).any() for name, array in copies(model.parameters()).items())
    assert files(tmp_path) != on_disk


def test_a_run_that_is_refused_changes_nothing(tmp_path):
    examples, output = build_examples(8), tmp_path / "run"
    train(adapted(), examples, config=CONFIG, optimizer=optim.Adam(1e-2), output=output)
    on_disk, model = files(tmp_path), adapted(seed=1)
    parameters, random = copies(model.parameters()), np.array(mx.random.state[0])
    checkpoint = output / "checkpoints" / "step-0000002"
    run = Run(model, examples[:-1], (), CONFIG, optim.Adam(1e-2), output, resume=checkpoint)
    with pytest.raises(InputError, match="not the same run: the training set had 8 sequences, and has 7"):
        run.run()
    for name, array in copies(model.parameters()).items():
        np.testing.assert_array_equal(array, parameters[name])
    np.testing.assert_array_equal(np.array(mx.random.state[0]), random)
    assert files(tmp_path) == on_disk
