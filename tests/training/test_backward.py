"""What the backward pass computes, counted in the graph of a step; and that memory does not grow over a run."""

import gc
import os
import resource
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
from nalora_mlx.training.loss import ScoredLoss
from nalora_mlx.training.trainer import train
from tests.conftest import build_examples, build_model, llama_args

OFF = {"mask": "off", "step_scaling": False}
TOKENS = mx.array(np.arange(2 * 16).reshape(2, 16) + 1)


def products(tmp_path, *arrays):
    """Matrix products in what has to be computed for these arrays."""
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), *arrays)
    text = path.read_text()
    return sum(text.count(f'label ="{name}"') for name in ("Matmul", "AddMM", "GatherMM"))


def gradients(model):
    loss = ScoredLoss(model)
    model.train()
    scored = (mx.arange(8), mx.arange(8), mx.ones(8))
    return nn.value_and_grad(model, lambda: loss(TOKENS, *scored))()


def adapted(layers, keys, count=1):
    model = build_model(args=llama_args(num_hidden_layers=layers))
    adapt(model, NALoRAConfig(num_layers=count, rank=2, keys=keys, **OFF))
    return model


def test_an_adapter_costs_five_products_and_nothing_below_it_any(tmp_path):
    """x A B in the forward; grad B, grad (x A), grad A in the backward. No gradient of a frozen weight, and none of x,
    where nothing below is trained."""
    model = adapted(3, ("mlp.down_proj",))
    forward = products(tmp_path, build_model(args=llama_args(num_hidden_layers=3))(TOKENS))
    value, grads = gradients(model)
    assert len(tree_flatten(grads)) == 2
    head = 3  # the gradient of the hidden states, and the targets' logits and theirs
    assert products(tmp_path, value, *(g for _, g in tree_flatten(grads))) == forward + head + 5


@pytest.mark.parametrize("keys", [("mlp.gate_proj", "mlp.down_proj"), ("self_attn.q_proj",)], ids=str)
def test_layers_below_the_adapters_have_no_backward(tmp_path, keys):
    """Three more frozen layers below cost the products of their forward and no others."""
    counts, forwards = [], []
    for layers in (1, 4):
        value, grads = gradients(adapted(layers, keys))
        counts.append(products(tmp_path, value, *(g for _, g in tree_flatten(grads))))
        forwards.append(products(tmp_path, build_model(args=llama_args(num_hidden_layers=layers))(TOKENS)))
    assert counts[1] - counts[0] == forwards[1] - forwards[0]
    above = gradients(adapted(4, keys, count=4))
    assert products(tmp_path, above[0], *(g for _, g in tree_flatten(above[1]))) > counts[1] + 9


def process_memory():
    """Bytes that the process has in memory now; where the system does not say, the most that it ever had."""
    if Path("/proc/self/statm").exists():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_memory_does_not_grow_over_500_steps_of_mixed_lengths(monkeypatch):
    """Lengths and supervised tokens of many sizes, so that graphs are made and dropped all the time."""
    monkeypatch.setattr(step, "MAX_GRAPHS", 3)
    made = []
    backward = step.TrainingStep._backward
    monkeypatch.setattr(
        step.TrainingStep, "_backward", lambda self, *arguments: made.append(1) or backward(self, *arguments)
    )
    model = build_model(args=llama_args(num_hidden_layers=1))
    adapt(model, NALoRAConfig(num_layers=-1, rank=2))
    seen = []

    def listen(event):
        if event["event"] == "step" and event["step"] % 50 == 0:
            gc.collect()
            seen.append((process_memory(), mx.get_active_memory()))

    config = TrainingConfig(iters=500, batch_size=2, steps_per_report=100)
    train(model, build_examples(80, low=5, high=60), (), config, optim.Adam(1e-3), None, [listen])
    assert len(made) > 100
    process, active = zip(*seen, strict=True)
    assert max(active) - min(active) < 2**15
    assert process[-1] - process[1] < 4 * 2**20, [round(p / 2**20, 1) for p in process]
