"""Formats, masks and batches, compared with mlx-lm's datasets, and with the errors of its trainer fixed."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import load
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset

from nalora_mlx.core.errors import InputError
from nalora_mlx.data.batches import (
    batches_per_epoch,
    collate,
    epoch_batches,
    evaluation_batches,
    row_shapes,
    sorted_batches,
    training_batches,
)
from nalora_mlx.data.formats import Features
from nalora_mlx.data.padding import PAD_TO, fit_shapes, rounded_length
from nalora_mlx.data.sources import load_hub_entry, load_local, read_jsonl
from nalora_mlx.data.tokenization import Example, tokenize_split
from tests.conftest import CHAT_TEMPLATE, build_examples

CHAT = {
    "messages": [
        {"role": "system", "content": "the cat"},
        {"role": "user", "content": "what is red ?"},
        {"role": "assistant", "content": "the bird is red"},
        {"role": "user", "content": "what is blue ?"},
        {"role": "assistant", "content": "the dog"},
    ]
}
COMPLETION = {"prompt": "what is the cat ?", "completion": "the cat is green"}


def tokenize_one(row, tokenizer, mask_prompt=False, longest=100):
    return tokenize_split([("x:1", row)], tokenizer, Features(mask_prompt=mask_prompt), longest).examples[0]


def words(example, tokenizer):
    return tokenizer.decode([int(t) for t, s in zip(example.tokens, example.loss_mask, strict=True) if s])


# --- formats and masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_prompt", [False, True])
def test_completions_match_mlx_lm(tokenizer, mask_prompt):
    tokens, offset = CompletionsDataset([COMPLETION], tokenizer, "prompt", "completion", mask_prompt).process(
        COMPLETION
    )
    example = tokenize_one(COMPLETION, tokenizer, mask_prompt)
    assert example.tokens.tolist() == tokens
    # mlx-lm supervises the tokens from `offset` on and, by mistake, one padding token after the end.
    assert np.flatnonzero(example.loss_mask).tolist() == list(range(max(offset, 1), len(tokens)))


def test_unmasked_chats_match_mlx_lm(tokenizer):
    tokens, _ = ChatDataset([CHAT], tokenizer).process(CHAT)
    example = tokenize_one(CHAT, tokenizer)
    assert example.tokens.tolist() == tokens
    assert example.loss_mask.sum() == len(tokens) - 1


def test_masked_chats_train_on_every_assistant_turn(tokenizer):
    example = tokenize_one(CHAT, tokenizer, mask_prompt=True)
    assert words(example, tokenizer) == "the bird is red <|im_end|> the dog <|im_end|>"
    _, offset = ChatDataset([CHAT], tokenizer, mask_prompt=True).process(CHAT)
    last = np.flatnonzero(example.loss_mask)[-3:]
    assert last[0] == offset


class RewritingTokenizer:
    """A chat template that drops earlier answers, as reasoning templates do."""

    eos_token_id = 3

    def apply_chat_template(self, messages, tools=None, add_generation_prompt=False, return_dict=False):
        tokens = []
        for i, message in enumerate(messages):
            kept = message["role"] != "assistant" or i == len(messages) - 1
            tokens += [1, *([ord(c) for c in message["content"]] if kept else [2]), 3]
        return tokens + ([1] if add_generation_prompt else [])


def test_a_template_that_rewrites_earlier_turns_falls_back_to_the_last(tokenizer):
    split = tokenize_split([("x:1", CHAT)], RewritingTokenizer(), Features(mask_prompt=True), 1000)
    example = split.examples[0]
    supervised = "".join(
        chr(t) for t, s in zip(example.tokens, example.loss_mask, strict=True) if s and t > 3
    )
    assert supervised == "the dog"
    assert "1 of 1 rows have earlier turns that the chat template rewrites (x:1)" in split.notices[0]


def rendered(messages, mask_prompt=True, tokenizer=None):
    example = tokenize_one(
        {"messages": messages}, tokenizer or RewritingTokenizer(), mask_prompt, longest=1000
    )
    return "".join(chr(t) for t, s in zip(example.tokens, example.loss_mask, strict=True) if s and t > 3)


def test_a_final_user_turn_is_not_supervised():
    """Not even if the beginning of the rendered chat depends on its length."""

    class Counting(RewritingTokenizer):
        def apply_chat_template(self, messages, tools=None, add_generation_prompt=False, return_dict=False):
            tokens = [t for m in messages for t in (1, *[ord(c) for c in m["content"]], 3)]
            return [1000 + len(messages), *tokens] + ([1] if add_generation_prompt else [])

    roles = ("user", "assistant", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, "abcde", strict=True)]
    assert rendered(messages, tokenizer=Counting()) == "d"
    assert rendered(messages[:4], tokenizer=Counting()) == "d"
    assert rendered(messages[:4]) == "d"


def test_a_generation_prompt_that_opens_a_thought():
    """The whole answer is supervised, although the finished turn lacks the thought."""

    class Thinking(RewritingTokenizer):
        def apply_chat_template(self, messages, tools=None, add_generation_prompt=False, return_dict=False):
            tokens = [t for m in messages for t in (1, *[ord(c) for c in m["content"]], 3)]
            return tokens + ([1, 200, 201, 202, 203, 204] if add_generation_prompt else [])

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    split = tokenize_split([("x:1", {"messages": messages})], Thinking(), Features(mask_prompt=True), 100)
    assert split.notices == []
    assert rendered(messages, tokenizer=Thinking()) == "yes"


def test_chats_need_a_chat_template():
    class Bare(RewritingTokenizer):
        has_chat_template = False

    with pytest.raises(InputError, match="x:1: the model has no chat template; use 'text' rows"):
        tokenize_one(COMPLETION, Bare())


def test_texts_end_with_one_end_token(tokenizer):
    for text in ("the cat is red", "the cat is red <|im_end|>"):
        row = {"text": text}
        example = tokenize_one(row, tokenizer)
        assert example.tokens.tolist() == TextDataset([row], tokenizer).process(row)[0]
        assert example.tokens.tolist().count(tokenizer.eos_token_id) == 1


def test_tools_reach_the_template():
    seen = []

    class Tokenizer(RewritingTokenizer):
        def apply_chat_template(self, messages, tools=None, **kwargs):
            seen.append(tools)
            return super().apply_chat_template(messages, tools, **kwargs)

    tokenize_one(CHAT | {"tools": [{"type": "function"}]}, Tokenizer(), mask_prompt=True, longest=1000)
    *trained, compared = seen
    assert trained
    assert all(tools == [{"type": "function"}] for tools in trained)
    assert compared is None


TOOLS = [{"name": "cat"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "dog"}]}
ASKED = [{"role": "user", "content": "what is red ?"}]
WRITES_TOOLS = "{% for t in tools or [] %}{{ t['name'] }} {% endfor %}"
WRITES_CALLS = CHAT_TEMPLATE.replace(
    "{{ m['content'] }}",
    "{{ m['content'] or '' }} {% for c in m['tool_calls'] or [] %}{{ c['name'] }} {% endfor %}",
)


def with_template(tokenizer_directory, template):
    """The tiny tokenizer with another chat template, and a list that grows with each rendering."""
    tokenizer, rendered = load(tokenizer_directory), []
    tokenizer._tokenizer.chat_template = template
    render = tokenizer._tokenizer.apply_chat_template

    def counting(*args, **kwargs):
        rendered.append(1)
        return render(*args, **kwargs)

    tokenizer._tokenizer.apply_chat_template = counting
    return tokenizer, rendered


def unused_in(rows, tokenizer, mask_prompt=True):
    pairs = [(f"x:{i}", row) for i, row in enumerate(rows, 1)]
    split = tokenize_split(pairs, tokenizer, Features(mask_prompt=mask_prompt), 100, "train")
    return [notice for notice in split.notices if "leaves out" in notice]


@pytest.mark.parametrize(
    ("template", "missing"),
    [
        (CHAT_TEMPLATE, ["tools", "tool_calls"]),
        (WRITES_TOOLS + CHAT_TEMPLATE, ["tool_calls"]),
        (WRITES_CALLS, ["tools"]),
        (WRITES_TOOLS + WRITES_CALLS, []),
    ],
)
def test_notices_of_parts_that_a_chat_template_ignores(tokenizer_directory, template, missing):
    tokenizer, _ = with_template(tokenizer_directory, template)
    rows = [
        {"messages": [*ASKED, CALL], "tools": TOOLS},
        {"messages": [*ASKED, {"role": "assistant", "content": "red"}]},
        COMPLETION | {"tools": TOOLS},
        COMPLETION | {"tools": []},
        {"messages": [*ASKED, CALL]},
        {"messages": [*ASKED, CALL | {"content": None}], "tools": None},
    ]
    want = {
        "tools": "train: 2 of 6 rows have 'tools' that the chat template leaves out (x:1, :3); they are "
        "trained on without tools; use a model whose template renders tools, or put the tools into a system message",
        "tool_calls": "train: 3 of 6 rows have 'tool_calls' that the chat template leaves out (x:1, :5, :6); "
        "these turns are trained on without their calls, and are empty if they have no other content; use a model "
        "whose template renders tool calls, or put the calls into 'content'",
    }
    assert unused_in(rows, tokenizer) == [want[part] for part in missing]


def test_a_template_is_checked_once_for_similar_rows(tokenizer_directory):
    tokenizer, rendered = with_template(tokenizer_directory, CHAT_TEMPLATE)
    rows = [{"messages": [*ASKED, CALL], "tools": TOOLS}] * 20
    (tools, calls) = unused_in(rows, tokenizer, mask_prompt=False)
    assert "20 of 20" in tools
    assert "20 of 20" in calls
    assert len(rendered) == 20 + 2 * 2


def test_a_template_that_renders_tools_for_some_roles_only(tokenizer_directory):
    with_system = "{% if messages[0]['role'] == 'system' %}" + WRITES_TOOLS + "{% endif %}" + CHAT_TEMPLATE
    tokenizer, _ = with_template(tokenizer_directory, with_system)
    for rows in ([CHAT, COMPLETION], [COMPLETION, CHAT]):
        (notice,) = unused_in([row | {"tools": TOOLS} for row in rows], tokenizer)
        assert (
            f"1 of 2 rows have 'tools' that the chat template leaves out (x:{rows.index(COMPLETION) + 1})"
            in notice
        )


def test_a_template_that_fails_without_a_part_does_not_ignore_it(tokenizer_directory):
    """This one fails without tool calls if there is no content either."""
    strict = CHAT_TEMPLATE.replace(
        "{{ m['content'] }}",
        "{{ m['content'] if m['content'] is defined else m['tool_calls'][0]['name'] }}",
    )
    tokenizer, _ = with_template(tokenizer_directory, strict)
    assert unused_in([{"messages": [*ASKED, CALL | {"content": None}]}], tokenizer) == []


def test_custom_feature_names(tokenizer):
    row = {"input": "what is the cat ?", "output": "the cat is green"}
    split = tokenize_split([("x:1", row)], tokenizer, Features(prompt="input", completion="output"), 100)
    assert split.examples[0].tokens.tolist() == tokenize_one(COMPLETION, tokenizer).tokens.tolist()


def test_long_rows_are_cut_and_unsupervised_rows_dropped(tokenizer):
    rows = [(f"d:{i}", COMPLETION) for i in (1, 2)] + [
        ("d:3", {"prompt": "the cat " * 30, "completion": "red"})
    ]
    split = tokenize_split(rows, tokenizer, Features(mask_prompt=True), 16, "train")
    assert len(split) == 2
    assert any("1 of 3 rows are longer than 16" in n for n in split.notices)
    assert any("1 of 3 rows have no supervised token" in n and "d:3" in n for n in split.notices)
    with pytest.raises(InputError, match=r"no row has a supervised token within 16 tokens .*first: d:3"):
        tokenize_split(rows[2:], tokenizer, Features(mask_prompt=True), 16, "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3, "completion": "x"}, "'prompt' must be a string, not int"),
        ({"messages": "hello"}, "must be a list of messages"),
        ({"messages": [{"content": "x"}]}, "must be a list of messages"),
        ({"question": "x"}, r"no known format; .*found 'question'"),
        ({}, "found nothing"),
        ({"text": None}, "'text' must be a string, not NoneType"),
    ],
)
def test_invalid_rows_are_named(tokenizer, row, message):
    with pytest.raises(InputError, match=rf"x:1: .*{message}"):
        tokenize_one(row, tokenizer)


def test_a_template_error_is_one_line():
    class Tokenizer(RewritingTokenizer):
        def apply_chat_template(self, *_args, **_kwargs):
            raise ValueError("roles must alternate\nmore")

    with pytest.raises(InputError, match=r"x:1: .*refuses this row \(roles must alternate\)"):
        tokenize_one(CHAT, Tokenizer())


# --- files --------------------------------------------------------------------------------------------------


def test_byte_order_mark_carriage_returns_and_blank_lines(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "\xc3\xa9"}\r\n')
    assert read_jsonl(path) == [(f"{path}:1", {"text": "a"}), (f"{path}:3", {"text": "é"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', ":2: not valid JSON"),
        (b'{"text": "a"}\n[1]\n', ":2: holds a list"),
        (b'{"text": "\xff"}\n', ":1: not UTF-8"),
        (b"[" * 100000, ":1: not valid JSON"),
    ],
)
def test_broken_lines_are_named(tmp_path, content, message):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_jsonl(path)


def test_missing_splits_are_empty(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    rows = load_local(tmp_path, ("train", "valid"))
    assert len(rows["train"]) == 1
    assert rows["valid"] == []


# --- batches ------------------------------------------------------------------------------------------------


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


def test_hub_datasets_through_the_datasets_library(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.disable_progress_bars()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(COMPLETION) + "\n" for _ in range(10)))
    entry = {
        "path": "json",
        "config": {"data_files": str(path), "cache_dir": str(tmp_path / "cache")},
        "train_split": "train[:80%]",
        "valid_split": "train[-20%:]",
    }
    rows = load_hub_entry(entry, ("train", "valid"))
    assert len(rows["train"]) == 8
    assert rows["valid"][0] == ("json[train[-20%:]]:1", COMPLETION)
    with pytest.raises(InputError, match="give test_split"):
        load_hub_entry(entry, ("test",))
    with pytest.raises(InputError, match="needs a 'path'"):
        load_hub_entry({}, ("train",))
    with pytest.raises(InputError, match="must be a mapping"):
        load_hub_entry(["json"], ("train",))
    with pytest.raises(InputError, match=r"unknown key 'tst_split'; did you mean 'test_split'"):
        load_hub_entry(entry | {"tst_split": "train"}, ("train",))
