"""Row formats and loss masks, compared with those of mlx-lm's datasets."""

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import load
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset

from nalora_mlx.core.errors import InputError
from nalora_mlx.data.formats import Features
from nalora_mlx.data.tokenization import tokenize_split
from tests.conftest import CHAT_TEMPLATE

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
    return tokenize_split([("x:1", row)], tokenizer, Features(mask_prompt=mask_prompt), longest).sequences[0]


def words(example, tokenizer):
    return tokenizer.decode([int(t) for t, s in zip(example.tokens, example.loss_mask, strict=True) if s])


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
    example = split.sequences[0]
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
    assert split.sequences[0].tokens.tolist() == tokenize_one(COMPLETION, tokenizer).tokens.tolist()


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
