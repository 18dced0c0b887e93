"""Batches, padded shapes and packs: every row once per epoch, little padding, few shapes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalora_mlx.data.batches import (
    batches_per_epoch,
    collate,
    collate_packs,
    epoch_batches,
    evaluation_batches,
    row_shapes,
    sorted_batches,
    training_batches,
)
from nalora_mlx.data.padding import PAD_TO, fit_shapes, rounded_length
from nalora_mlx.data.preferences import JOINED, SEPARATE, SHARED, laid_out
from nalora_mlx.data.tokenization import Example
from tests.conftest import build_examples
from tests.preference_rows import preference_rows


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 70), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_every_row_once_in_batches_of_similar_length(lengths, batch_size, seed, epoch):
    examples = [Example(np.arange(n, dtype=np.int32), np.ones(n, bool), str(n)) for n in lengths]
    batches = epoch_batches(examples, batch_size, seed, epoch)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    assert len(batches) == batches_per_epoch(examples, batch_size)
    assert batches == epoch_batches(examples, batch_size, seed, epoch)
    assert sum(len(rows) < batch_size for rows in batches) <= 1
    # Sorted by padded length, the ranges of the batches do not overlap.
    ranges = sorted(
        (min(p), max(p)) for p in ([-(-(lengths[r] - 1) // PAD_TO) for r in rows] for rows in batches)
    )
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_collate_shifts_pads_and_masks(lengths, seed):
    rng = np.random.default_rng(seed)
    examples = [Example(rng.integers(1, 99, n, dtype=np.int32), rng.random(n) < 0.5, str(n)) for n in lengths]
    batch = collate(examples, range(len(examples)))
    assert batch.inputs.shape[1] % PAD_TO == 0
    assert batch.inputs.shape[1] - max(lengths) + 1 < PAD_TO
    for i, example in enumerate(examples):
        n = len(example.tokens) - 1
        np.testing.assert_array_equal(batch.inputs[i, :n], example.tokens[:-1])
        np.testing.assert_array_equal(batch.targets[i, :n], example.tokens[1:])
        np.testing.assert_array_equal(batch.loss_mask[i, :n], example.loss_mask[1:])
        # Padding is neither supervised nor counted as tokens.
        assert batch.loss_mask[i, n:].sum() == 0
        assert batch.token_mask[i].sum() == n


def test_padding_is_low_for_chat_like_lengths():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 0.9, 512), 4, 2048).astype(int)
    examples = [Example(np.zeros(n, np.int32), np.ones(n, bool), "") for n in lengths]
    real = total = 0
    for batch in itertools.islice(training_batches(examples, 8, 0), batches_per_epoch(examples, 8)):
        real += batch.token_mask.sum()
        total += batch.token_mask.size
    assert real / total > 0.85  # half of mlx-lm's batches of such rows is padding


def test_few_shapes_for_rows_of_any_length():
    """Each shape costs a compiled graph that stays in memory."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.7, 0.8, 2000), 16, 2047).astype(int)
    answers = np.maximum(1, lengths * np.clip(rng.normal(0.4, 0.15, 2000), 0.05, 0.95)).astype(int)
    examples = [
        Example(np.zeros(n, np.int32), np.arange(n) >= n - m, "")
        for n, m in zip(lengths, answers, strict=True)
    ]
    batches = list(itertools.islice(training_batches(examples, 4, 0), 500))
    shapes = {(batch.inputs.shape, batch.loss_positions()[0].size) for batch in batches}
    assert len(shapes) < 60  # of 500 batches
    for batch in batches:
        positions, _, weights = batch.loss_positions()
        assert batch.supervised_tokens <= positions.size <= batch.inputs.size
        assert weights.sum() == batch.supervised_tokens
        assert positions.size <= 2 * batch.supervised_tokens + PAD_TO
    capacity = sum(batch.loss_positions()[0].size for batch in batches)
    assert capacity < 1.5 * sum(batch.supervised_tokens for batch in batches)


@settings(max_examples=100, deadline=None)
@given(inputs=st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_fewest_lengths_with_low_padding(inputs):
    """Compare with an exhaustive search."""
    lengths = sorted({rounded_length(n) for n in inputs})

    def positions(chosen):
        return sum(min(n for n in chosen if n >= one) for one in inputs)

    least = 1 - sum(inputs) / positions(lengths)
    allowed = max(0.05, least + 0.01)
    best = {
        count: min(
            positions((*some, lengths[-1])) for some in itertools.combinations(lengths[:-1], count - 1)
        )
        for count in range(1, len(lengths) + 1)
    }
    fewest = min(count for count, total in best.items() if 1 - sum(inputs) / total <= allowed + 1e-12)
    shapes = fit_shapes(inputs, [1] * len(inputs))
    assert len(shapes.lengths) == fewest
    assert sum(map(shapes.length_for, inputs)) == best[fewest]
    assert set(shapes.lengths) <= set(lengths)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=20), data=st.data()
)
def test_loss_capacity_holds_all_supervised_tokens_and_rarely_changes(rows, data):
    inputs = [max(a, b) for a, b in rows]
    shapes = fit_shapes(inputs, [b for _, b in rows])
    length = data.draw(st.sampled_from(shapes.lengths))
    sequences = data.draw(st.integers(1, 8))
    supervised = data.draw(st.integers(0, sequences * length))
    capacity = shapes.loss_capacity(supervised, sequences, length)
    assert supervised <= capacity <= sequences * length
    own = [b for one, (_, b) in zip(inputs, rows, strict=True) if shapes.length_for(one) == length]
    usual = sequences * np.mean(own) + 2.5 * sequences**0.5 * np.std(own)
    if max(1, usual / 2) < supervised <= usual:
        assert capacity == min(-(-usual // PAD_TO) * PAD_TO, sequences * length)


def test_batches_keep_the_shapes_of_all_rows():
    examples = build_examples(60, low=5, high=90)
    shapes = row_shapes(examples)
    for batch in itertools.islice(training_batches(examples, 4, 0), 30):
        assert batch.inputs.shape[1] in shapes.lengths
        assert batch.loss_capacity == shapes.loss_capacity(
            batch.supervised_tokens, len(batch.rows), batch.inputs.shape[1]
        )
    chosen = evaluation_batches(examples, 4, 5, 0)
    inputs, supervised = (
        [int(n) for batch in chosen for n in array(batch).sum(axis=1)]
        for array in (lambda batch: batch.token_mask, lambda batch: batch.loss_mask)
    )
    own = fit_shapes(inputs, supervised)
    for batch in chosen:
        length = batch.inputs.shape[1]
        assert length == own.length_for(int(batch.token_mask.sum(axis=1).max()))
        assert batch.loss_capacity == own.loss_capacity(batch.supervised_tokens, len(batch.rows), length)


def test_epochs_differ_and_follow_one_another():
    examples = build_examples(40, low=5, high=9)
    first, second = epoch_batches(examples, 4, 0, 0), epoch_batches(examples, 4, 0, 1)
    assert {frozenset(rows) for rows in first} != {frozenset(rows) for rows in second}
    stream = training_batches(examples, 4, 0)
    drawn = [list(next(stream).rows) for _ in range(20)]
    assert drawn == first + second


def test_the_evaluation_set_is_fixed_and_complete():
    examples = build_examples(10)
    whole = evaluation_batches(examples, 4, -1, 0)
    assert sum(len(b.rows) for b in whole) == 10
    part = [evaluation_batches(examples, 2, 3, 0) for _ in range(2)]
    assert sum(len(b.rows) for b in part[0]) == 6
    for a, b in zip(*part, strict=True):
        np.testing.assert_array_equal(a.inputs, b.inputs)
    other = evaluation_batches(examples, 2, 3, 1)
    assert any(not np.array_equal(a.inputs, b.inputs) for a, b in zip(part[0], other, strict=True))
    assert sorted_batches([], 4) == []


# --- preference rows ----------------------------------------------------------------------------------------

PREFERENCES = {
    "separate": ("dpo", SEPARATE, False, 20),
    "shared": ("dpo", SHARED, False, 16),
    "joined packs": ("orpo", JOINED, True, 4),
    "shared packs": ("dpo", SHARED, True, 4),
    "kto": ("kto", SEPARATE, False, 48),
    "kto packs": ("kto", SEPARATE, True, 12),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_batches_of_preference_rows(name):
    """Each row once in an epoch, in few shapes; every answer with its tokens, and with its own log-probability."""
    mode, layout, packing, most = PREFERENCES[name]
    rows = preference_rows(mode, 200, prompt=(1, 90), answer=(2, 60), vocabulary=1000, known=True)
    rows = laid_out(rows, layout)
    each, shapes = len(rows[0].answers), set()
    for epoch in range(2):
        per_epoch = batches_per_epoch(rows, 4, packing)
        drawn, labels = [], []
        for batch in itertools.islice(
            training_batches(rows, 4, 0, packing, start=epoch * per_epoch), per_epoch
        ):
            answers = batch.answers
            drawn += answers.rows
            labels.append(answers.desirable[: len(answers.rows)].mean())
            shapes.add((batch.inputs.shape, batch.loss_capacity, answers.present.size))
            assert batch.loss_mask.sum() <= batch.loss_capacity
            assert batch.answers.present.sum() == len(answers.rows)
            assert answers.sft_tokens == sum(rows[row].sft_tokens for row in answers.rows)
            for i, row in enumerate(answers.rows):
                for k, answer in enumerate(rows[row].answers):
                    is_answer = answers.numbers == each * i + k
                    np.testing.assert_array_equal(batch.targets[is_answer], answer.tokens[answer.loss_mask])
                    if rows[row].reference:
                        assert answers.reference[each * i + k] == np.float32(rows[row].reference[k])
            if answers.mismatched is not None:
                others = answers.mismatched.answers
                shapes.add(
                    (answers.mismatched.inputs.shape, answers.mismatched.loss_capacity, others.present.size)
                )
                assert sorted(others.rows) == list(range(len(answers.rows)))
                for i, own in enumerate(others.rows):
                    row = rows[answers.rows[own]]
                    tokens = answers.mismatched.targets[others.numbers == i]
                    np.testing.assert_array_equal(tokens, row.mismatched.tokens[row.mismatched.loss_mask])
                    assert others.reference[i] == np.float32(row.reference[1])
        assert sorted(drawn) == list(range(200))
        if mode == "kto" and not packing:
            assert min(labels) >= 0.25  # both labels in every batch, half of them each
            assert max(labels) <= 0.75
    assert len(shapes) <= most


def test_rows_that_share_no_prompt_keep_their_answers_apart():
    """Alone and next to rows that share one: each answer attends to itself only, from position 0."""
    rows = laid_out(preference_rows("dpo", 3, prompt=(1, 9)), SHARED)
    assert rows[0].shareable == 0 < rows[1].shareable
    for batch in (collate(rows, [0]), collate(rows, [0, 1]), collate_packs(rows, [[0, 1], [2]], 64)):
        first, second = (answer.inputs for answer in rows[0].answers)
        numbers, places = batch.branches[0, : first + second], batch.positions[0, : first + second]
        assert numbers.tolist() == [1] * first + [2] * second
        assert places.tolist() == [*range(first), *range(second)]
        assert set(batch.segment_ids[0, : first + second]) == {1}
    joined = collate(laid_out(rows, JOINED), [1])
    first, second = (answer.inputs for answer in rows[1].answers)
    assert joined.segment_ids[0, : first + second].tolist() == [1] * first + [2] * second


def test_a_worker_without_rows_has_what_the_others_have():
    rows = preference_rows("kto", 3, known=True)
    whole, empty = collate(rows, [0]), collate(rows, [0], slice(1, None, 2))
    assert empty.rows == whole.rows == (0,)
    assert empty.answers.rows == ()
    assert empty.answers.present.tolist() == [0]
    assert empty.answers.reference.shape == whole.answers.reference.shape
    assert empty.remote_tokens == whole.supervised_tokens == empty.supervised_tokens
    assert empty.loss_counts == whole.loss_counts
