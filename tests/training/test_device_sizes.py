"""The sizes for each kind of device give the same results, and decide who computes attention."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.data.batches import collate
from nalora_mlx.data.tokenization import Example
from nalora_mlx.ops import attention, cross_entropy
from nalora_mlx.ops.attention import lean_attention
from nalora_mlx.ops.device_sizes import SIZES, device_sizes, using_sizes
from nalora_mlx.training.step import TrainingStep
from tests.conftest import build_model, llama_args, random_adapters

LENGTH = 600  # more than one block of attention on every device


def loss_and_gradients(sizes):
    mx.random.seed(0)
    model = build_model(args=llama_args(num_hidden_layers=2, vocab_size=3000, max_position_embeddings=1024))
    adapt(model, NALoRAConfig(rank=4, num_layers=-1))
    random_adapters(model, size=0.05)
    tokens = np.random.default_rng(0).integers(1, 3000, (2, LENGTH + 1), dtype=np.int32)
    batch = collate([Example(row, np.arange(LENGTH + 1) > 20, "") for row in tokens], range(2))
    step = TrainingStep(model, optim.SGD(1.0), NALoRAConfig(), compiled=False)
    with using_sizes(sizes):
        loss, window = step(batch, batch.supervised_tokens, None, False)
        mx.eval(loss, window)
    arrays = tree_flatten([loss, step.weights.stacks.unstack(window.gradients), window.statistics])
    return {name: np.array(array) for name, array in arrays if isinstance(array, mx.array)}


@pytest.mark.parametrize("ours", [False, True], ids=["mlx's attention", "our attention"])
@pytest.mark.parametrize("kind", ["metal", "cuda"])
def test_the_sizes_for_a_gpu_give_the_results_of_those_for_a_cpu(kind, ours):
    sizes = SIZES[kind]._replace(score_bytes=0) if ours else SIZES[kind]
    want = loss_and_gradients("cpu")
    got = loss_and_gradients(sizes)
    assert got.keys() == want.keys()
    for name, array in want.items():
        # A token whose gate is at a boundary may be counted on either side.
        limit = 1.0 if (array == array.round()).all() else 2e-5 * np.abs(array).max()
        assert np.abs(got[name] - array).max() <= limit, name


def test_sizes_can_be_scaled_and_end_with_their_context():
    half = device_sizes().scaled(0.5)
    assert (half.head_rows, half.head_elements) == (256, 2**19)
    assert half.group_positions == SIZES["cpu"].group_positions // 2
    assert half.attention_queries == SIZES["cpu"].attention_queries
    with using_sizes(half):
        assert device_sizes() == half
    assert device_sizes() == SIZES["cpu"]


@pytest.mark.parametrize("rows", [1, 40, 256, 300, 512, 2048, 5000])
@pytest.mark.parametrize("kind", SIZES)
def test_tiles_of_the_head(rows, kind):
    """They cover everything once, are no larger than the device's, and are as wide as matrix products like."""
    with using_sizes(kind):
        row_tiles, columns = cross_entropy.head_tiles(rows, 151_936)
    sizes = SIZES[kind]
    for tiles, size in ((row_tiles, rows), (columns, 151_936)):
        ends = [0, *(min(tile.stop, size) for tile in tiles)]
        assert [tile.start for tile in tiles] == ends[:-1]
        assert ends[-1] == size
    width = columns[0].stop
    assert width % 128 == 0
    assert len(row_tiles) * len(columns) < 1.1 * cross_entropy.MAX_TILES
    if len(row_tiles) * len(columns) > 0.9 * cross_entropy.MAX_TILES:
        return  # wider, so that there are not too many
    assert width <= sizes.head_columns
    assert min(rows, sizes.head_rows) * width <= 1.05 * sizes.head_elements + 128 * sizes.head_rows


# (kind, dtype, rows, length, key length, width, mask) -> whether MLX computes attention
CASES = [
    ("cpu", mx.bfloat16, 1, 16, 16, 64, "causal", False),
    ("metal", mx.bfloat16, 4, 512, 512, 128, "causal", True),  # 32 MB of scores
    ("metal", mx.bfloat16, 4, 513, 513, 128, "causal", False),
    ("metal", mx.float32, 4, 512, 512, 128, "causal", False),
    ("cuda", mx.bfloat16, 1, 2048, 2048, 128, "causal", True),  # by cuDNN
    ("cuda", mx.float32, 1, 2048, 2048, 128, "causal", False),
    ("cuda", mx.bfloat16, 1, 2000, 2000, 128, "causal", False),  # no multiple of 128
    ("cuda", mx.float16, 1, 2048, 2048, 256, None, False),  # too wide
    ("cuda", mx.float16, 1, 2048, 1024, 128, "causal", False),  # queries that see no key
    ("cuda", mx.float16, 1, 2048, 1024, 128, None, True),
]


@pytest.mark.parametrize(("kind", "dtype", "rows", "queries", "keys", "width", "mask", "theirs"), CASES)
def test_who_computes_attention(kind, dtype, rows, queries, keys, width, mask, theirs, monkeypatch):
    called = []
    monkeypatch.setattr(attention, "attention", lambda *a, **k: called.append("ours"))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda *a, **k: called.append("theirs"))
    q = mx.zeros((rows, 16, queries, width), dtype)
    k = mx.zeros((rows, 8, keys, width), dtype)
    with using_sizes(kind), lean_attention():
        mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0, mask=mask)
    assert called == ["theirs" if theirs else "ours"]
