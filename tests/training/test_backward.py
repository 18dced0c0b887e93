"""The matrix count_products of a step, counted in its graph, and memory over a long run."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.core.config import NALoRAConfig, TrainingConfig
from nalora_mlx.training import step
from nalora_mlx.training.loss import SupervisedLoss
from nalora_mlx.training.trainer import train
from tests.conftest import build_examples, build_model, llama_args

OFF = {"mask": "off", "step_scaling": False}
TOKENS = mx.array(np.arange(2 * 16).reshape(2, 16) + 1)


def count_products(tmp_path, *arrays):
    """Count the matrix count_products in the graph of these arrays."""
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), *arrays)
    text = path.read_text()
    return sum(text.count(f'label ="{name}"') for name in ("Matmul", "AddMM", "GatherMM"))


def gradients(model):
    loss = SupervisedLoss(model)
    model.train()
    arrays = {"inputs": TOKENS, "rows": mx.arange(8), "targets": mx.arange(8), "weights": mx.ones(8)}
    return nn.value_and_grad(model, lambda: loss(arrays)[0])()


def adapted(layers, keys, count=1):
    model = build_model(args=llama_args(num_hidden_layers=layers))
    adapt(model, NALoRAConfig(num_layers=count, rank=2, keys=keys, **OFF))
    return model


def test_an_adapter_adds_five_matrix_products(tmp_path):
    """Forward: x A and (x A) B. Backward: the gradients of B, of x A and of A, but none of x or of a frozen weight."""
    model = adapted(3, ("mlp.down_proj",))
    forward = count_products(tmp_path, build_model(args=llama_args(num_hidden_layers=3))(TOKENS))
    value, grads = gradients(model)
    assert len(tree_flatten(grads)) == 2
    head = 3  # the targets' logits, their gradient, and the gradient of the hidden states
    assert count_products(tmp_path, value, *(g for _, g in tree_flatten(grads))) == forward + head + 5


@pytest.mark.parametrize("keys", [("mlp.gate_proj", "mlp.down_proj"), ("self_attn.q_proj",)], ids=str)
def test_layers_below_the_adapters_have_no_backward(tmp_path, keys):
    """Three more frozen layers below the adapters add only the count_products of their forward."""
    counts, forwards = [], []
    for layers in (1, 4):
        value, grads = gradients(adapted(layers, keys))
        counts.append(count_products(tmp_path, value, *(g for _, g in tree_flatten(grads))))
        forwards.append(
            count_products(tmp_path, build_model(args=llama_args(num_hidden_layers=layers))(TOKENS))
        )
    assert counts[1] - counts[0] == forwards[1] - forwards[0]
    above = gradients(adapted(4, keys, count=4))
    assert count_products(tmp_path, above[0], *(g for _, g in tree_flatten(above[1]))) > counts[1] + 9


def process_memory():
    """Return the resident memory of this process in bytes."""
    if Path("/proc/self/statm").exists():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    done = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return 1024 * int(done.stdout)


@pytest.mark.parametrize("steps", [200, pytest.param(500, marks=pytest.mark.slow)])
def test_memory_does_not_grow_over_a_run_of_mixed_lengths(steps, monkeypatch):
    """Many lengths and numbers of supervised tokens, so graphs are compiled and dropped all the time."""
    monkeypatch.setattr(step, "MAX_GRAPHS", 3)
    traced = []
    backward = step.TrainingStep._backward
    monkeypatch.setattr(
        step.TrainingStep,
        "_backward",
        lambda self, *arguments: traced.append(1) or backward(self, *arguments),
    )
    model = build_model(args=llama_args(num_hidden_layers=1))
    adapt(model, NALoRAConfig(num_layers=-1, rank=2))
    samples = []

    def listen(event):
        if event["event"] == "step" and event["step"] % (steps // 10) == 0:
            gc.collect()
            samples.append((process_memory(), mx.get_active_memory()))

    config = TrainingConfig(iters=steps, batch_size=2, steps_per_report=100)
    train(model, build_examples(80, low=5, high=60), (), config, optim.Adam(1e-3), None, [listen])
    assert len(traced) > steps / 5
    process, active = zip(*samples, strict=True)
    assert max(active) - min(active) < 2**15
    # The allocator of macOS keeps more of what was freed.
    limit = (16 if sys.platform == "darwin" else 4) * 2**20
    assert process[-1] - process[1] < limit, [round(p / 2**20, 1) for p in process]
