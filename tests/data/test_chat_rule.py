"""The rule for chats: each assistant turn is trained once, after exactly the tokens that generation starts from.

The templates behave as those of the field do. `chat_oracle` says by hand, for each, what precedes each turn and what
the model has to write.
"""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from nalora_mlx import preview
from tests.data.chat_cases import CHATS, TOOLS, with_string_arguments
from tests.data.chat_checks import ExpectedTurn, check_sequences, encode, expected_turns
from tests.data.chat_oracle import FORMATS, REAL_FORMATS
from tests.data.small_tokenizers import REAL, small_tokenizer


def modes_of(formats):
    return [
        pytest.param(name, mode, id="-".join([name, *("silent" for _ in mode)]))
        for name, form in formats.items()
        for mode in form.modes
    ]


CASES = modes_of(FORMATS)


def row_of(chat, form, **template_args):
    messages = with_string_arguments(chat.messages) if form.string_arguments else chat.messages
    row = {"messages": messages} | ({"tools": chat.tools} if chat.tools else {})
    return row | ({"chat_template_kwargs": template_args} if template_args else {})


def rendered(tokenizer, row, count, prompt):
    return tokenizer.apply_chat_template(
        row["messages"][:count],
        tools=row.get("tools"),
        add_generation_prompt=prompt,
        tokenize=False,
        **row.get("chat_template_kwargs", {}),
    )


@contextmanager
def failing_at(title):
    """Say which chat an assertion fails at."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{title}: {error}") from None


def rendered_chats(form):
    """Yield the chats that a template renders."""
    for name, chat in CHATS.items():
        if not chat.features & (form.refuses | form.drops):
            yield name, chat


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_the_oracle_says_what_the_template_renders(name, mode):
    tokenizer, form = small_tokenizer(name), FORMATS[name](mode.get("enable_thinking", True))
    for title, chat in rendered_chats(form):
        row = row_of(chat, form, **mode)
        for index, message in enumerate(chat.messages):
            if index and message["role"] == "assistant":
                before, through = chat.messages[:index], chat.messages[: index + 1]
                context, target = form.context(before, chat.tools), form.target(through)[0]
                finished = rendered(tokenizer, row, index + 1, False)
                if name == "glm4":  # a turn ends where the next message begins
                    finished += "<|observation|>" if message.get("tool_calls") else "<|user|>"
                assert rendered(tokenizer, row, index, True) == context, title
                assert finished.startswith(context) == form.continues(through), title
                assert (context + target if form.continues(through) else target) in finished, title


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_each_turn_is_trained_once_after_its_context(name, mode):
    tokenizer, form = small_tokenizer(name), FORMATS[name](mode.get("enable_thinking", True))
    for title, chat in rendered_chats(form):
        split = preview([row_of(chat, form, **mode)], tokenizer, mask_prompt=True)
        with failing_at(f"{title}, notices {split.notices}"):
            assert not split.errors
            check_sequences(split.sequences, expected_turns(form, chat), tokenizer)
            warns = any(
                form.warns(chat.messages[: index + 1])
                for index, message in enumerate(chat.messages)
                if index and message["role"] == "assistant"
            )
            opened = [notice for notice in split.notices if "before each answer in use" in notice]
            if warns:  # about what the prompt opens, or about reasoning after a prompt that closes it
                assert opened or any("reasoning" in notice for notice in split.notices)
            else:
                assert not opened
            several = [
                notice for notice in split.notices if f"gives {len(split.sequences)} sequences" in notice
            ]
            assert len(several) == (len(split.sequences) > 1)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_the_last_turn_only(name, mode):
    tokenizer, form = small_tokenizer(name), FORMATS[name](mode.get("enable_thinking", True))
    chats = dict(rendered_chats(form))
    rows = [row_of(chat, form, **mode) for chat in chats.values()]
    split = preview(rows, tokenizer, mask_prompt=True, last_turn_only=True)
    assert len(split.sequences) == len(rows)
    for sequence, (title, chat) in zip(split.sequences, chats.items(), strict=True):
        with failing_at(title):
            check_sequences([sequence], expected_turns(form, chat)[-1:], tokenizer)


@pytest.mark.parametrize("kind", ["always", "first", "stripping"])
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_tokenizers_that_add_or_absorb_blanks(name, mode, kind):
    tokenizer, form = small_tokenizer(name, kind), FORMATS[name](mode.get("enable_thinking", True))
    chats = dict(rendered_chats(form))
    # All chats at once, so that texts which were encoded for one chat are used for others.
    split = preview([row_of(chat, form, **mode) for chat in chats.values()], tokenizer, mask_prompt=True)
    for number, (title, chat) in enumerate(chats.items(), 1):
        sequences = [sequence for sequence in split.sequences if sequence.source == f"row {number}"]
        with failing_at(title):
            check_sequences(sequences, expected_turns(form, chat), tokenizer)


@pytest.mark.parametrize("name", ["qwen3", "vicuna"])
def test_a_tokenizer_of_transformers(name):
    wrapper, form = small_tokenizer(name), FORMATS[name]()
    rows = [row_of(chat, form) for _, chat in rendered_chats(form)]
    split, same = preview(rows, wrapper._tokenizer), preview(rows, wrapper)
    assert split.notices == same.notices
    for a, b in zip(split.sequences, same.sequences, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.loss_mask.tolist() == b.loss_mask.tolist()


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_without_masks_the_whole_chat_is_one_sequence(name, mode):
    tokenizer, form = small_tokenizer(name), FORMATS[name](mode.get("enable_thinking", True))
    for title, chat in rendered_chats(form):
        row = row_of(chat, form, **mode)
        (sequence,) = preview([row], tokenizer, mask_prompt=False).sequences
        whole = encode(tokenizer, rendered(tokenizer, row, len(chat.messages), False))
        assert sequence.tokens.tolist() == whole, title
        assert sequence.loss_mask.tolist() == [False] + [True] * (len(whole) - 1), title


@pytest.mark.parametrize("name", FORMATS)
def test_chats_that_a_template_refuses_are_errors(name):
    tokenizer, form = small_tokenizer(name), FORMATS[name]()
    for title, chat in CHATS.items():
        if chat.features & form.refuses and not chat.features & (form.drops - form.refuses):
            split = preview([row_of(chat, form)], tokenizer, mask_prompt=True)
            assert not split.sequences, title
            assert len(split.errors) == 1, title


@pytest.mark.parametrize(
    "name", [name for name, form in FORMATS.items() if "tools" not in form.drops | form.refuses]
)
def test_string_arguments_are_trained_as_objects_are(name):
    tokenizer = small_tokenizer(name)
    chat = CHATS["tool loop"]
    rows = [
        {"messages": messages, "tools": TOOLS}
        for messages in (chat.messages, with_string_arguments(chat.messages))
    ]
    as_objects, as_strings = (preview([row], tokenizer, mask_prompt=True).sequences for row in rows)
    assert len(as_objects) == len(as_strings) > 0
    for a, b in zip(as_objects, as_strings, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.loss_mask.tolist() == b.loss_mask.tolist()


def short_identifiers(chat):
    """Return a chat whose calls have identifiers of nine characters, as Mistral's templates demand."""
    text = json.dumps(chat.messages)
    text = text.replace("functions.distance:0", "distance0").replace("functions.weather:1", "weather01")
    return chat._replace(messages=json.loads(text))


@pytest.mark.parametrize(("name", "mode"), modes_of(REAL_FORMATS))
def test_real_tokenizers_with_their_own_templates(name, mode):
    directory = Path(os.environ.get("NALORA_TOKENIZERS", REAL)) / name
    if not directory.is_dir():
        pytest.skip("the tokenizers of real models are not here; set NALORA_TOKENIZERS to their directory")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    form = REAL_FORMATS[name](mode.get("enable_thinking", True))
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"),
        eos_token=form.ends[0],
        bos_token=form.bos or None,
        chat_template=config["chat_template"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer = TokenizerWrapper(fast)
    chats = [
        (title, short_identifiers(chat) if name == "mistral_nemo" else chat)
        for title, chat in rendered_chats(form)
    ]
    rows = [row_of(chat, form, **mode) for _, chat in chats]
    split = preview(rows, tokenizer, mask_prompt=True)
    assert not split.errors
    for number, ((title, chat), row) in enumerate(zip(chats, rows, strict=True), 1):
        messages = chat.messages
        turns = [
            ExpectedTurn(rendered(tokenizer, row, index, True), form.target(messages[: index + 1]))
            if index
            else ExpectedTurn(*form.first(messages[:1], chat.tools))
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        with failing_at(title):
            sequences = [sequence for sequence in split.sequences if sequence.source == f"row {number}"]
            check_sequences(sequences, turns, tokenizer)
