"""Row formats and loss masks, compared with those of mlx-lm's datasets."""

import copy
import dataclasses
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper, load
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset
from tokenizers import AddedToken

from nalora_mlx.core.errors import InputError
from nalora_mlx.data.chats.chat_encoder import ChatEncoder
from nalora_mlx.data.chats.text_encoder import TextEncoder
from nalora_mlx.data.preview import preview
from nalora_mlx.data.rows.formats import Features, Row
from nalora_mlx.data.tokenization import tokenize_rows, tokenize_split
from tests.conftest import CHAT_TEMPLATE
from tests.data.small_tokenizers import SPECIAL_TOKENS, small_tokenizer

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


def with_template(tokenizer_directory, template):
    """Return the tiny tokenizer with another chat template."""
    tokenizer = load(tokenizer_directory)
    tokenizer.chat_template = template
    return tokenizer


def spans(split, tokenizer):
    """Return the supervised texts of each sequence, separated by |."""
    found = []
    for sequence in split.sequences:
        mask = sequence.loss_mask
        runs = np.split(sequence.tokens, np.flatnonzero(np.diff(mask)) + 1)
        signs = np.split(mask, np.flatnonzero(np.diff(mask)) + 1)
        found.append(
            " | ".join(tokenizer.decode(run) for run, sign in zip(runs, signs, strict=True) if sign[0])
        )
    return found


TURNS = [
    {"role": role, "content": text}
    for role, text in zip(
        ("user", "assistant", "user", "assistant", "user"),
        ("what", "the cat", "what ?", "the dog", "?"),
        strict=True,
    )
]
DROPS_EARLIER_ANSWERS = CHAT_TEMPLATE.replace(
    "m['content']", "m['content'] if m['role'] != 'assistant' or loop.last else 'red'"
)


def test_a_template_that_rewrites_earlier_turns_makes_several_sequences(tokenizer_directory):
    tokenizer = with_template(tokenizer_directory, DROPS_EARLIER_ANSWERS)
    split = preview([{"messages": TURNS[:4]}], tokenizer)
    assert spans(split, tokenizer) == ["the cat <|im_end|>", "the dog <|im_end|>"]
    second = tokenizer.decode(split.sequences[1].tokens)
    assert "assistant red <|im_end|>" in second  # as generation would see it
    assert [example.source for example in split.sequences] == ["row 1", "row 1"]
    assert split.notices[0].startswith(
        "rows: 1 of 1 row is rendered differently once later turns follow (row 1); this gives 2 sequences"
    )
    last = preview([{"messages": TURNS[:4]}], tokenizer, last_turn_only=True)
    assert spans(last, tokenizer) == ["the dog <|im_end|>"]


def test_turns_that_continue_each_other_share_a_sequence(tokenizer):
    split = preview([{"messages": TURNS[:4]}], tokenizer)
    assert spans(split, tokenizer) == ["the cat <|im_end|> | the dog <|im_end|>"]
    assert split.notices == []


def test_a_final_user_turn_is_not_trained_on(tokenizer):
    split = preview([{"messages": TURNS}], tokenizer)
    assert spans(split, tokenizer) == ["the cat <|im_end|> | the dog <|im_end|>"]
    assert "ends in messages that no answer follows" in split.notices[0]


def test_turns_left_out_by_the_row_are_context(tokenizer):
    messages = [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS[2:4]]
    split = preview([{"messages": messages}], tokenizer)
    assert spans(split, tokenizer) == ["the dog <|im_end|>"]
    assert "assistant the cat" in tokenizer.decode(split.sequences[0].tokens)


def test_template_arguments_of_a_row_reach_the_template(tokenizer_directory):
    tokenizer = with_template(tokenizer_directory, "{{ colour }} " + CHAT_TEMPLATE)
    row = {"messages": TURNS[:2], "chat_template_kwargs": {"colour": "green"}}
    assert tokenizer.decode(preview([row], tokenizer).sequences[0].tokens).startswith("green <|im_start|>")


def test_the_end_token_of_a_turn_is_the_last_supervised_token(tokenizer_directory):
    """Not what a template writes after it, here another word and the end of the whole chat."""
    template = CHAT_TEMPLATE.replace("<|im_end|>", "<|im_end|> <pad>")
    tokenizer = with_template(tokenizer_directory, template)
    assert spans(preview([{"messages": TURNS[:4]}], tokenizer), tokenizer) == [
        "the cat <|im_end|> | the dog <|im_end|>"
    ]


def test_chats_need_a_chat_template(tokenizer_directory):
    tokenizer = with_template(tokenizer_directory, None)
    tokenizer.has_chat_template = False
    with pytest.raises(InputError, match="x:1: the model has no chat template; use 'text' rows"):
        tokenize_one(COMPLETION, tokenizer)


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "dog", "arguments": {"colour": "blue"}}}],
}
ASKED = [{"role": "user", "content": "what is red ?"}]
DONE = {"role": "assistant", "content": "the cat"}
TOOLS = [{"type": "function", "function": {"name": "cat", "description": "colour"}}]
WRITES_TOOLS = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
AS_OBJECTS = CHAT_TEMPLATE.replace(
    "{{ m['content'] }}",
    "{{ m['content'] or '' }} {% for c in m['tool_calls'] or [] %}{{ c.function.name }} "
    "{{ c.function.arguments | tojson }} {% endfor %}",
)
AS_TEXTS = AS_OBJECTS.replace("{{ c.function.arguments | tojson }}", "{{ '(' + c.function.arguments + ')' }}")
AS_TEXTS_OR_PYTHON = AS_OBJECTS.replace(" | tojson", "")
ONLY_WITHOUT_CONTENT = AS_OBJECTS.replace(
    "{{ m['content'] or '' }} {%", "{% if m.content is defined %}{{ m.content }}{% else %}{%"
).replace("{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>")


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (AS_OBJECTS, '{"colour": "blue"}'),
        (AS_TEXTS, '({"colour": "blue"})'),
        (AS_TEXTS_OR_PYTHON, '{"colour": "blue"}'),
        (ONLY_WITHOUT_CONTENT, '{"colour": "blue"}'),
    ],
)
@pytest.mark.parametrize("arguments", [{"colour": "blue"}, '{"colour": "blue"}'])
def test_tool_calls_in_the_form_that_the_template_reads(template, written, arguments):
    """Each template writes the call, whichever form the row and the template have; a JSON text is not quoted again."""
    tokenizer = small_tokenizer("chatml_markers", template=template)
    call = {"type": "function", "function": {"name": "dog", "arguments": arguments}}
    split = preview([{"messages": [*ASKED, CALL | {"tool_calls": [call]}]}], tokenizer)
    (span,) = spans(split, tokenizer)
    assert span.split() == f"dog {written} <|im_end|>".split()
    assert split.notices == []


def test_a_call_that_the_template_leaves_out_is_not_trained_as_an_empty_answer(tokenizer):
    split = preview([{"messages": [*ASKED, CALL, *ASKED, DONE]}], tokenizer)
    assert spans(split, tokenizer) == ["the cat <|im_end|>"]
    assert "has 'tool_calls' that the chat template leaves out" in split.notices[0]


THINKING = {"role": "assistant", "content": "red", "reasoning_content": "the bird"}
WRITES_REASONING = CHAT_TEMPLATE.replace(
    "m['content']", "(m['reasoning_content'] or '') + ' ' + (m['content'] or '')"
)
ONLY_KNOWN_ROLES = (
    "{% for m in messages if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }} "
    "{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
ONLY_STRINGS = CHAT_TEMPLATE.replace("m['content']", "m['content'] if m['content'] is string else ''")


@pytest.mark.parametrize(
    ("template", "row", "notice"),
    [
        (CHAT_TEMPLATE, {"messages": [*ASKED, THINKING]}, "has reasoning that the chat template leaves out"),
        (WRITES_REASONING, {"messages": [*ASKED, THINKING]}, None),
        (
            ONLY_KNOWN_ROLES,
            {"prompt": "the bird", "completion": "<think>the bird</think>red"},
            "has reasoning that the chat template leaves out",
        ),
        (CHAT_TEMPLATE, {"prompt": "the bird", "completion": "<think>the bird</think>red"}, None),
        (
            ONLY_KNOWN_ROLES,
            {"messages": [{"role": "system", "content": "the cat"}, *ASKED, DONE | {"content": "red"}]},
            "has a system message that the chat template leaves out",
        ),
        (
            ONLY_KNOWN_ROLES,
            {"messages": [{"role": "developer", "content": "the cat"}, *ASKED, DONE | {"content": "red"}]},
            "has content (of role 'developer') that the chat template leaves out",
        ),
        (
            ONLY_STRINGS,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "blue"}]}, DONE]},
            None,
        ),
        (CHAT_TEMPLATE, {"messages": [*ASKED, CALL]}, "has 'tool_calls' that the chat template leaves out"),
        (
            AS_OBJECTS.replace(
                "{{ m['content'] or '' }} {%", "{% if m.content %}{{ m.content }}{% else %}{%"
            ).replace("{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>"),
            {"messages": [*ASKED, CALL | {"content": "one"}]},
            "has 'tool_calls' that the chat template leaves out",
        ),
        (AS_OBJECTS, {"messages": [*ASKED, CALL]}, None),
        (CHAT_TEMPLATE, COMPLETION | {"tools": TOOLS}, "has 'tools' that the chat template leaves out"),
        (WRITES_TOOLS + CHAT_TEMPLATE, COMPLETION | {"tools": TOOLS}, None),
        (CHAT_TEMPLATE, COMPLETION | {"tools": []}, None),
        (
            CHAT_TEMPLATE,
            {"prompt": "<|im_start|>user what", "completion": "red"},
            "holds control tokens such as '<|im_start|>' in their text",
        ),
        (
            CHAT_TEMPLATE,
            {"prompt": "what", "completion": "red <|im_end|> blue"},
            "holds control tokens such as '<|im_end|>' in their text",
        ),
    ],
)
@pytest.mark.parametrize("mask_prompt", [True, False])
def test_notices_of_content_that_the_template_leaves_out(template, row, notice, mask_prompt):
    tokenizer = small_tokenizer("chatml_markers", template=template)
    row_without = {"messages": [*ASKED, DONE]}
    for rows in ([row, row_without], [row_without, row]):  # whatever row comes first
        notices = preview(rows, tokenizer, mask_prompt=mask_prompt).notices
        left_out = [found for found in notices if "no supervised token" not in found]
        if notice is None:
            assert left_out == []
        else:
            assert len(left_out) == 1
            assert f"1 of 2 rows {notice} (row {rows.index(row) + 1})" in left_out[0]


def test_a_template_that_renders_tools_for_some_roles_only(tokenizer_directory):
    with_system = "{% if messages[0]['role'] == 'system' %}" + WRITES_TOOLS + "{% endif %}" + CHAT_TEMPLATE
    tokenizer = with_template(tokenizer_directory, with_system)
    for rows in ([CHAT, COMPLETION], [COMPLETION, CHAT]):
        (notice,) = preview([row | {"tools": TOOLS} for row in rows], tokenizer).notices
        assert f"'tools' that the chat template leaves out (row {rows.index(COMPLETION) + 1})" in notice


@pytest.mark.parametrize("reads", [True, False])
def test_the_remedy_for_a_generation_prompt_that_opens_a_thought(tokenizer_directory, reads):
    """It names enable_thinking only if the template reads it."""
    opens = (
        "<|im_start|>assistant {% if enable_thinking %}bird {% endif %}"
        if reads
        else "<|im_start|>assistant bird "
    )
    template = CHAT_TEMPLATE.replace("<|im_start|>assistant {% endif %}", opens + "{% endif %}")
    tokenizer = with_template(tokenizer_directory, template)
    row = {"messages": TURNS[:2]}
    thinking = {"chat_template_kwargs": {"enable_thinking": True}} if reads else {}
    split = preview([row | thinking], tokenizer)
    assert spans(split, tokenizer) == ["the cat <|im_end|>"]
    assert tokenizer.decode(split.sequences[0].tokens).endswith("assistant bird the cat <|im_end|>")
    (notice,) = split.notices
    assert "has answers that do not begin with 'bird'" in notice
    assert ("--chat-template-args" in notice) == reads
    if reads:
        assert preview([row | {"chat_template_kwargs": {"enable_thinking": False}}], tokenizer).notices == []


PIECES = [*SPECIAL_TOKENS[:8], "a", "word ", " ", "  ", "\n", "\n\n", "é", "🙂", "x<", "<l>", "<r>", "<w>"]


@cache
def any_tokenizer(kind):
    """Return a small tokenizer; "spaces" has tokens that absorb the white space on one side of them."""
    if kind != "spaces":
        return small_tokenizer("chatml_markers", kind)
    tokenizer = copy.deepcopy(small_tokenizer("phi3")._tokenizer)
    tokenizer.add_tokens(
        [
            AddedToken("<l>", lstrip=True),
            AddedToken("<r>", rstrip=True, normalized=False),
            AddedToken("<w>", single_word=True),
        ]
    )
    return TokenizerWrapper(tokenizer)


@pytest.mark.parametrize("kind", ["bytes", "first", "always", "stripping", "spaces"])
@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [*SPECIAL_TOKENS[:8], "a", "word ", " ", "  ", "\n", "\n\n", "é", "🙂", "x<", "<l>", "<r>", "<w>"]
        ),
        max_size=12,
    )
)
@example(["word ", "<l>"])
@example(["<r>", " ", "a", "<w>"])
def test_texts_are_encoded_as_the_tokenizer_does(kind, parts):
    tokenizer, text = any_tokenizer(kind), "".join(parts)
    encoder = TextEncoder(tokenizer)
    encoder._to_compare = 0  # no way back to the tokenizer's own tokens
    whole = tokenizer.encode(text, add_special_tokens=False)
    assert encoder.encode(text) == whole == encoder.encode(text)
    for cut in range(len(text)):
        before, after = encoder.encode_after(text[:cut], text[cut:])
        assert before == tokenizer.encode(text[:cut], add_special_tokens=False)
        if whole[: len(before)] == before:
            assert before + after == whole


def test_a_tokenizer_that_does_not_encode_piece_by_piece_is_asked_for_whole_texts():
    class Odd:
        """Counts the tokens before each token."""

        eos_token_id, added_tokens_decoder = 1, small_tokenizer("chatml_markers").added_tokens_decoder

        def convert_ids_to_tokens(self, ids):
            return ["<|im_end|>" for _ in ids]

        def encode(self, text, add_special_tokens):
            return list(range(len(text)))

    text = "a<|im_end|>b<|im_end|>"
    assert TextEncoder(Odd()).encode(text) == list(range(len(text)))


def test_long_texts_in_chunks_lose_nothing(tokenizer):
    words = " ".join(["the", "cat", "is", "red", "dog", "two"] * 9)
    row = Row("x:1", [], text=words, chunk=True)
    encoder = ChatEncoder(tokenizer, False)
    whole = tokenize_rows([dataclasses.replace(row, chunk=False)], encoder, 1000).sequences[0].tokens
    for length in (2, 3, 7, 54, 55, 56, 1000):
        split = tokenize_rows([row], encoder, length)
        assert max(len(example.tokens) for example in split.sequences) <= length
        targets = [example.tokens[1:] for example in split.sequences]
        assert np.concatenate([whole[:1], *targets]).tolist() == whole.tolist()
        assert all(example.loss_mask[1:].all() for example in split.sequences)
        assert split.notices == []


def test_one_start_token_for_a_text_that_begins_with_it():
    """Tokenizers that add a start token would begin such a text with two."""
    tokenizer = small_tokenizer("llama3_2")
    start = tokenizer.bos_token_id
    plain = tokenizer.encode

    def encode(text, add_special_tokens=True):
        return [start] * add_special_tokens + plain(text, add_special_tokens=False)

    tokenizer._tokenizer.encode = encode
    rows = [{"text": text} for text in ("the cat", "<|begin_of_text|>the cat")]
    split = preview(rows, tokenizer, mask_prompt=False)
    assert split.sequences[0].tokens.tolist() == split.sequences[1].tokens.tolist()
    assert (
        "1 of 2 rows begins with '<|begin_of_text|>', which the tokenizer adds as well (row 2)"
        in split.notices[0]
    )


def test_a_tokenizer_without_an_end_token(tokenizer_directory):
    tokenizer = load(tokenizer_directory)
    tokenizer._tokenizer.eos_token = None
    tokenizer._eos_token_ids = set()
    split = preview([{"text": "the cat"}], tokenizer, mask_prompt=False)
    assert tokenizer.decode(split.sequences[0].tokens) == "the cat"
    assert "does not end in a supervised end-of-sequence token" in split.notices[0]


def test_texts_end_with_one_end_token(tokenizer):
    for text in ("the cat is red", "the cat is red <|im_end|>"):
        row = {"text": text}
        example = tokenize_one(row, tokenizer)
        assert example.tokens.tolist() == TextDataset([row], tokenizer).process(row)[0]
        assert example.tokens.tolist().count(tokenizer.eos_token_id) == 1


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
    assert any("1 of 3 rows is longer than 16" in n for n in split.notices)
    assert any("1 of 3 rows has no supervised token" in n and "d:3" in n for n in split.notices)
    with pytest.raises(InputError, match=r"no row has a supervised token within 16 tokens .*first: d:3"):
        tokenize_split(rows[2:], tokenizer, Features(mask_prompt=True), 16, "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3, "completion": "x"}, "'prompt' must be a string, not int"),
        ({"messages": "hello"}, "must be a list of messages"),
        ({"messages": [{"content": "x"}]}, "must be a list of messages"),
        ({"question": "x"}, r"'answer' is missing or an empty cell, .*found 'question'"),
        ({}, "found nothing"),
        ({"text": None}, "'text' must be a string, not NoneType"),
    ],
)
def test_invalid_rows_are_named(tokenizer, row, message):
    with pytest.raises(InputError, match=rf"x:1: .*{message}"):
        tokenize_one(row, tokenizer)


def test_a_template_error_is_one_line(tokenizer_directory):
    tokenizer = with_template(tokenizer_directory, "{{ raise_exception('roles must alternate\\nmore') }}")
    with pytest.raises(InputError, match=r"x:1: .*refuses this row \(roles must alternate\)"):
        tokenize_one(CHAT, tokenizer)


def test_answers_after_the_maximum_length_are_left_out_and_counted(tokenizer_directory):
    """Turns that cannot be trained are not rendered: a long chat costs no more than the part that fits."""
    rendered = []
    tokenizer = with_template(tokenizer_directory, DROPS_EARLIER_ANSWERS)
    render = tokenizer._tokenizer.apply_chat_template
    tokenizer._tokenizer.apply_chat_template = lambda *args, **kwargs: (
        rendered.append(1) or render(*args, **kwargs)
    )
    row = Row("x:1", TURNS[:4] * 50)
    split = tokenize_rows([row], ChatEncoder(tokenizer, True), 20)
    assert spans(split, tokenizer) == ["the cat <|im_end|>", "the dog <|im_end|>"]
    assert "this gives 2 sequences" in split.notices[1]
    assert (
        "1 of 1 row has answers after the first 20 tokens (x:1); these answers were left out"
        in split.notices[0]
    )
    assert len(rendered) < 10
    assert split.rows == 1


def test_template_arguments_that_nothing_reads_are_named(tokenizer):
    row = {"messages": TURNS[:2], "chat_template_kwargs": {"mood": "happy"}}
    (notice,) = preview([row], tokenizer).notices
    assert "has chat_template_kwargs such as 'mood' that the chat template does not read" in notice
