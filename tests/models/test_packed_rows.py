"""Packed rows train exactly like separate rows, or packing is an error."""

from itertools import chain, islice

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.forward_pass import recompute_activations
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.data.batches import batches_per_epoch, collate, collate_packs, pack_shapes, training_batches
from nalora_mlx.data.packing import epoch_packs
from nalora_mlx.data.padding import PAD_TO, padded_length
from nalora_mlx.data.tokenization import Example
from nalora_mlx.models.output_head import find_output_head
from nalora_mlx.models.packed_rows import Branches, PackedCache, packed_caches, packing_error, sharing_error
from nalora_mlx.models.recurrences import TrainingForms
from nalora_mlx.ops.rope import rope_positions
from nalora_mlx.training.step import TrainingStep
from tests.adapters.test_miniatures import build
from tests.conftest import build_examples, masked_config, random_adapters

# Full and sliding-window attention, latent attention, experts, joint projections, attention sinks, recurrences, short
# convolutions.
PACKABLE = ["llama", "qwen3", "phi3", "gemma3_text", "cohere2", "olmo2", "mixtral", "deepseek_v3", "gpt_oss"]
PACKABLE += ["qwen3_5", "falcon_h1", "lfm2"]
NOT_PACKABLE = {
    "baichuan_m1": "outputs change when another row precedes it",  # a convolution of keys and values
    "longcat_flash_ngram": "outputs change when another row precedes it",  # embeddings of n-grams
    "deepseek_v41": r"keep more of earlier positions .* \(LayerCache\)",
    "deepseek_v32": "does not take a packed sequence .*keys",
    "gemma2": "outputs change when another row precedes it",  # uses one mask for all sequences
    "gpt2": "outputs change when another row precedes it",
    "phi3small": "outputs change when another row precedes it",
    "iquestloopcoder": "outputs change when another row precedes it",
    "gemma3n": "does not take a packed sequence .*keys_and_values",
}


def packing_error_of(model, length=64):
    head = find_output_head(model)
    return packing_error(model, head.hidden if head else model, length)


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_and_unpacked_training_are_equal(name):
    """Loss, gradients and importance statistics, for one row at a time and for all rows in two sequences."""
    model = build(name)
    assert packing_error_of(model) is None
    report = adapt(model, masked_config(num_layers=-1, rank=2, scale=2.0))
    random_adapters(model, size=0.05)
    examples = build_examples(5, seed=4, low=5, high=14)
    length = padded_length(examples) + 2 * PAD_TO
    packed = collate_packs(examples, [[3, 0], [1, 4, 2]], length)
    assert packed.supervised_tokens == sum(int(e.loss_mask.sum()) for e in examples)
    captured = []
    step = TrainingStep(model, optim.SGD(1.0), report.config, compiled=False)
    step._update = lambda window, _probe: captured.append(
        {k: np.array(a) for k, a in tree_flatten(window) if a is not None}
    )
    model.train()
    got, _ = step(packed, packed.supervised_tokens, None, True)
    want, accumulated = 0.0, None
    for row in range(5):
        total, accumulated = step(collate(examples, [row]), packed.supervised_tokens, accumulated, row == 4)
        want += total.item()
    assert got.item() == pytest.approx(want, rel=1e-5)
    in_one, alone = captured
    assert in_one.keys() == alone.keys()
    largest = max(np.abs(a).max() for k, a in alone.items() if k.startswith("0."))
    for path, a in alone.items():
        # Gradients are compared relative to the model's largest one, which bounds the accuracy of the small ones.
        size = largest if path.startswith("0.") else np.abs(a).max()
        assert np.abs(in_one[path] - a).max() <= 1e-5 * size, path


@pytest.mark.parametrize("name", sorted(NOT_PACKABLE))
def test_models_that_cannot_keep_rows_apart_are_an_error(name):
    import re

    assert re.search(NOT_PACKABLE[name], packing_error_of(build(name)) or "no error")


def test_a_small_leak_is_detected():
    """One layer of three adds a little of the previous position."""

    class Mixing(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __call__(self, x):
            return self.inner(x + 0.05 * mx.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0)]))

    model = build("llama")
    assert packing_error_of(model) is None
    layer = model.model.layers[1]
    layer.mlp = Mixing(layer.mlp)
    assert "another row precedes it" in packing_error_of(model)


def test_positions_are_checked_up_to_the_length():
    """A model whose attention changes after position 100 is an error for longer sequences only."""

    class Late(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __call__(self, x, *rest, **more):
            scale = mx.where(mx.arange(x.shape[1]) < 100, 1.0, 1.2)
            return self.inner(x * scale[:, None], *rest, **more)

    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn = Late(layer.self_attn)
    assert packing_error_of(model, 100) is None
    assert "another row precedes it" in packing_error_of(model, 120)


def test_the_check_needs_no_more_memory_than_training():
    """Attention must not hold the scores of whole sequences, as MLX's own does without gradients."""
    model = build("llama")
    length, heads = 2048, model.args.num_attention_heads
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert packing_error_of(model, length) is None
    assert mx.get_peak_memory() - before < 2 * heads * length**2 * 4


def test_the_mask_is_block_diagonal_and_causal():
    segments = [1, 1, 1, 2, 2, 0]
    cache = PackedCache(mx.array([segments]))
    mask = np.array(cache.make_mask(6))[0, 0]
    windowed = np.array(cache.make_mask(6, window_size=2))[0, 0]
    for i in range(6):
        for j in range(6):
            assert mask[i, j] == (segments[i] == segments[j] and j <= i)
            assert windowed[i, j] == (mask[i, j] and i - j < 2)


def test_compiled_checkpointed_and_eager_agree():
    found = []
    examples = build_examples(6, seed=4, low=5, high=14)
    packed = collate_packs(examples, [[3, 0], [1, 4, 2, 5]], 48)
    for compiled, checkpointing in ((False, False), (True, False), (True, True), (False, True)):
        model = build("llama")
        mx.random.seed(1)
        config = NALoRAConfig(num_layers=-1, rank=2, scale=2.0, mask_warmup=0)
        adapt(model, config)
        random_adapters(model, size=0.05)
        step = TrainingStep(model, optim.SGD(0.1), config, compiled)
        model.train()
        for _ in range(2):
            with recompute_activations(list(model.layers) if checkpointing else []):
                total, _ = step(packed, packed.supervised_tokens, None, True)
            mx.eval(step.state, total)
        found.append({k: np.array(a) for k, a in tree_flatten(model.trainable_parameters())})
    for other in found[1:]:
        for path, want in found[0].items():
            assert np.abs(other[path] - want).max() < 1e-5 * np.abs(want).max(), path


# --- packs --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 70), min_size=1, max_size=40),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_an_epoch_of_packs_holds_every_row_once(lengths, batch_size, seed, epoch):
    examples = [Example(np.arange(n, dtype=np.int32), np.ones(n, bool), str(n)) for n in lengths]
    batches = epoch_packs(examples, batch_size, seed, epoch)
    packs = [pack for batch in batches for pack in batch]
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert batches == epoch_packs(examples, batch_size, seed, epoch)
    assert len(batches) == batches_per_epoch(examples, batch_size, packing=True)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    length = padded_length(examples)
    filled = [sum(examples[row].inputs for row in pack) for pack in packs]
    assert max(filled) <= length
    # No two packs fit into one.
    assert len(filled) < 2 or sum(sorted(filled)[:2]) > length
    first = next(training_batches(examples, batch_size, seed, packing=True))
    assert first.inputs.shape == (len(epoch_packs(examples, batch_size, seed, 0)[0]), length)


def test_a_packed_sequence_concatenates_its_rows():
    examples = build_examples(3, low=4, high=9)
    batch = collate_packs(examples, [[2, 0], [1]], 24)
    for i, rows in enumerate([[2, 0], [1]]):
        at = 0
        for number, row in enumerate(rows, 1):
            here = slice(at, at := at + examples[row].inputs)
            np.testing.assert_array_equal(batch.inputs[i, here], examples[row].tokens[:-1])
            np.testing.assert_array_equal(batch.targets[i, here], examples[row].tokens[1:])
            np.testing.assert_array_equal(batch.loss_mask[i, here], examples[row].loss_mask[1:])
            assert (batch.segment_ids[i, here] == number).all()
        assert batch.token_mask[i].sum() == at
        assert batch.loss_mask[i, at:].sum() == batch.segment_ids[i, at:].sum() == 0


def test_packs_are_full_and_differ_from_epoch_to_epoch():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4, 0.9, 512), 4, 512).astype(int)
    examples = [Example(np.zeros(n, np.int32), np.ones(n, bool), "") for n in lengths]
    epochs = [epoch_packs(examples, 4, 0, epoch) for epoch in (0, 1)]
    packs = [pack for batch in epochs[0] for pack in batch]
    assert sum(lengths - 1) / (len(packs) * padded_length(examples)) > 0.97
    assert len(epochs[0]) == len(epochs[1])
    # The longest rows share packs with the same rows in every epoch, but batches differ.
    first, second = ({frozenset(chain.from_iterable(batch)) for batch in epoch} for epoch in epochs)
    assert not first & second


def test_loss_capacities_are_fitted_to_all_packs():
    rng = np.random.default_rng(0)
    examples = [
        Example(np.ones(n, np.int32), np.arange(n) >= n - m, "")
        for n, m in zip(rng.integers(5, 90, 80), rng.integers(1, 40, 80), strict=True)
    ]
    length = padded_length(examples)
    packs = [pack for batch in epoch_packs(examples, 2, 7, 0) for pack in batch]
    shapes = pack_shapes(examples, packs, length)
    batches = list(islice(training_batches(examples, 2, 7, packing=True), 30))
    for batch in batches:
        assert batch.loss_capacity == shapes.loss_capacity(batch.supervised_tokens, len(batch.inputs), length)
    # One of whole batches, one of the last batch, and one for a batch with more supervised tokens.
    assert len({batch.loss_capacity for batch in batches}) <= 3


def test_a_stream_of_batches_can_start_anywhere():
    examples = build_examples(13)
    for packing in (False, True):
        whole = training_batches(examples, 2, 7, packing)
        drawn = [next(whole).rows for _ in range(20)]
        for start in (0, 3, 6, 7, 15):
            later = training_batches(examples, 2, 7, packing, start=start)
            assert [next(later).rows for _ in range(20 - start)] == drawn[start:]


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next", "mamba", "rwkv7", "falcon_h1"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_a_state_that_leaks_is_an_error(name, dtype):
    model = build(name)
    if dtype == mx.bfloat16 and name == "qwen3_next":
        pytest.skip("experts need float32 on a CPU")
    model.set_dtype(dtype)
    head = find_output_head(model)
    forms = TrainingForms(model)
    assert packing_error(model, head.hidden if head else model, 224, forms) is None
    forms.patches = []
    error = packing_error(model, head.hidden if head else model, 224, forms)
    assert "another row precedes it" in error


def test_a_recurrence_without_its_training_form_is_an_error():
    model = build("mamba2")
    forms = TrainingForms(model)
    forms.notices = ["ssm_update keeps mlx-lm's own form"]
    assert "carries a state" in packing_error(model, model, 64, forms)


# --- several answers after one prompt -------------------------------------------------------------------------

SHAREABLE = ["llama", "qwen3", "phi3", "gemma3_text", "cohere2", "mixtral", "deepseek_v3", "gpt_oss"]
NOT_SHAREABLE = {
    "qwen3_5": r"keep more of earlier positions than keys and values \(ArraysCache\)",
    "lfm2": r"keep more of earlier positions than keys and values \(ArraysCache\)",
    "gemma2": "outputs of a branch change",  # uses one mask for all sequences
    "gpt2": "outputs of a branch change",  # learned positions
    "gemma3n": "does not take a packed sequence .*keys_and_values",
}


def sharing_error_of(model, length=64):
    head = find_output_head(model)
    return sharing_error(model, head.hidden if head else model, length)


@pytest.mark.parametrize("name", SHAREABLE)
def test_branches_compute_what_each_text_does_alone(name):
    """Outputs of the model itself, three branches after one prompt, after another row and before padding."""
    model = build(name)
    assert sharing_error_of(model) is None
    rng = np.random.default_rng(0)
    prompt, branches = rng.integers(1, 32, 21), [rng.integers(1, 32, n) for n in (9, 1, 12)]
    other = rng.integers(1, 32, 5)
    tokens = np.concatenate([other, prompt, *branches, [0, 0]])
    segment_ids = np.repeat([1, 2, 0], [5, tokens.size - 7, 2])
    numbers = np.repeat([0, 0, 1, 2, 3, 0], [5, 21, 9, 1, 12, 2])
    place = np.concatenate([np.arange(5), np.arange(21), *(21 + np.arange(b.size) for b in branches), [0, 0]])
    ids, numbers_of, places = (mx.array(a.astype(np.int32))[None] for a in (segment_ids, numbers, place))
    with rope_positions(places):
        caches = packed_caches(model, ids, Branches(numbers_of, places))
        joined = np.array(model(mx.array(tokens)[None], cache=caches).astype(mx.float32))[0]
    for number, branch in enumerate(branches, 1):
        alone = np.array(model(mx.array(np.concatenate([prompt, branch]))[None]).astype(mx.float32))[0]
        found = joined[(segment_ids == 2) & ((numbers == 0) | (numbers == number))]
        np.testing.assert_allclose(found, alone, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize("name", sorted(NOT_SHAREABLE))
def test_models_that_cannot_keep_branches_apart_are_an_error(name):
    import re

    assert re.search(NOT_SHAREABLE[name], sharing_error_of(build(name)) or "no error")


def test_positions_that_do_not_reach_the_attention_are_an_error():
    """A rotary embedding that computes the rotation itself, from the order of the tokens."""

    class Own(nn.Module):
        def __call__(self, x, offset=0):
            angles = (offset + mx.arange(x.shape[2]))[:, None] * mx.power(100.0, -mx.arange(x.shape[-1] // 2))
            a, b = mx.split(x, 2, axis=-1)
            c, s = mx.cos(angles), mx.sin(angles)
            return mx.concatenate([a * c - b * s, a * s + b * c], axis=-1)

    model = build("llama")
    for layer in model.layers:
        layer.self_attn.rope = Own()
    assert packing_error_of(model) is None
    assert "outputs of a branch change" in sharing_error_of(model)


def test_the_mask_of_branches_is_a_tree():
    numbers, place = [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 3, 4, 3, 4, 5]
    cache = PackedCache(
        mx.ones((1, 8), mx.int32), Branches(mx.array([numbers], mx.int32), mx.array([place], mx.int32))
    )
    mask, windowed = (np.array(cache.make_mask(8, window_size=size))[0, 0] for size in (None, 3))
    for i in range(8):
        for j in range(8):
            seen = numbers[j] in (0, numbers[i]) and place[j] <= place[i]
            assert mask[i, j] == seen
            assert windowed[i, j] == (seen and place[i] - place[j] < 3)
