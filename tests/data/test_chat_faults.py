"""Faults of chats that public reports describe, each with a small template that behaves like the one reported.

The numbers are those of the list of cases.
"""

import pytest

from nalora_mlx import preview
from tests.data.chat_cases import BERN, BERN_RESULT, CHATS, TOOLS, answer, call, system, user
from tests.data.chat_checks import decode, spans, supervised
from tests.data.small_tokenizers import small_tokenizer

HEADER = "<|im_start|>assistant\n"
CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
)
PROMPT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
SYSTEM_LAST = (
    "{%- if messages[0].role == 'system' %}{%- set sys = messages[0].content %}{%- set ms = messages[1:] %}"
    "{%- else %}{%- set ms = messages %}{%- endif %}{%- for m in ms %}{%- if m.role == 'user' %}"
    "{{- '[INST]' + (sys + '\n\n' if loop.last and sys is defined else '') + m.content + '[/INST]' }}"
    "{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)


def trained(row, template, **options):
    """Return the tokenizer, what is trained of a row, and the texts of the supervised spans."""
    tokenizer = small_tokenizer("chatml_markers", template=template)
    split = preview([row], tokenizer, mask_prompt=True, **options)
    return tokenizer, split, supervised(split, tokenizer)


@pytest.mark.parametrize(
    "text", ["The fast train needs two hours and you change once in Olten.", "Two hours."]
)
def test_1_a_system_prompt_before_the_last_user_message(text):
    row = {"messages": [system("You answer in one sentence."), user("How far is Bern?"), answer(text)]}
    tokenizer, split, (span,) = trained(row, SYSTEM_LAST)
    assert span.lstrip() == text + "<|im_end|>"
    assert decode(tokenizer, split.sequences[0].tokens) == (
        f"[INST]You answer in one sentence.\n\nHow far is Bern?[/INST] {text}<|im_end|>"
    )
    assert not any("earlier" in notice or "later" in notice for notice in split.notices)
    # As a whole, the chat has no system prompt.
    assert "system" in " ".join(preview([row], tokenizer, mask_prompt=False).notices)


def test_1_a_prompt_that_ends_in_a_blank():
    template = (
        "{%- for m in messages %}{%- if m.role == 'user' %}{{- 'Q: ' + m.content + ' A: ' }}"
        "{%- else %}{{- m.content + eos_token }}{%- endif %}{%- endfor %}"
    )
    _, split, spans_of_turns = trained({"prompt": "How far is Bern?", "completion": "Two hours."}, template)
    assert not split.errors
    assert spans_of_turns == ["Two hours.<|im_end|>"]


def test_2_a_chat_that_ends_in_a_token_of_its_own():
    template = CHATML + PROMPT + "{%- if not add_generation_prompt %}{{- '<|endoftext|>' }}{%- endif %}"
    _, split, texts = trained(
        {"messages": [user("Far?"), answer("No."), user("How far?"), answer("a")]}, template
    )
    assert texts == ["No.<|im_end|>", "a<|im_end|>"]
    assert len(split.sequences) == 1
    assert not split.notices
    _, split, texts = trained({"prompt": "Far?", "completion": "No."}, template)
    assert texts == ["No.<|im_end|>"]
    assert not split.notices


def test_2_turns_that_are_joined_by_blanks():
    template = (
        "{%- for m in messages %}{{- m.role|upper + ': ' + m.content + ' ' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"
    )
    row = {"messages": [user("Is Bern far?"), answer("It is."), user("How far?"), answer("Two hours.")]}
    _, split, texts = trained(row, template)
    assert [text.strip() for text in texts] == ["It is.", "Two hours."]
    assert any("sequences" in notice for notice in split.notices) == (len(split.sequences) > 1)


def test_3_a_template_that_needs_a_user_message():
    template = (
        "{%- if 'user' not in messages|map(attribute='role') %}{{- raise_exception('No user.') }}{%- endif %}"
        + CHATML
        + PROMPT
    )
    row = {"messages": [system(), answer("Good day."), user("Is Bern far?"), answer("Yes.")]}
    tokenizer, split, texts = trained(row, template)
    assert not split.errors
    assert texts == ["Good day.<|im_end|>", "Yes.<|im_end|>"]
    (sequence,) = split.sequences
    (first, _), _ = spans(sequence.loss_mask)
    assert decode(tokenizer, sequence.tokens[:first]).endswith("You answer briefly.<|im_end|>\n" + HEADER)


def test_3_a_template_that_counts_calls_against_results():
    template = (
        """
{%- set calls = namespace(open=0) %}
{%- for m in messages %}
{%- set calls.open = calls.open + (m.tool_calls or [])|length - (m.role == 'tool')|int %}
{%- endfor %}
{%- if calls.open %}{{- raise_exception('Calls without results.') }}{%- endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content }}
{%- for c in m.tool_calls or [] %}
{{- '<tool_call>' + c.function.name + ' ' + c.function.arguments|tojson + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}{%- endfor %}"""
        + PROMPT
    )
    row = {"messages": CHATS["parallel calls"].messages}
    _, split, texts = trained(row, template)
    assert not split.errors
    assert texts == [
        '<tool_call>distance {"to": "Bern"}</tool_call>'
        '<tool_call>weather {"to": "Olten", "days": 2}</tool_call><|im_end|>',
        "120 km, fog.<|im_end|>",
        "The same.<|im_end|>",
    ]


def test_4_a_first_turn_after_a_default_system_prompt():
    tokenizer = small_tokenizer("qwen2_5")
    split = preview([{"messages": CHATS["begins with assistant"].messages}], tokenizer, mask_prompt=True)
    assert supervised(split, tokenizer) == ["Good day.<|im_end|>", "Yes.<|im_end|>"]


def test_5_a_call_before_an_answer_with_an_empty_think_block():
    tokenizer = small_tokenizer("qwen3")
    messages = [user("How far is Bern?"), call(BERN), BERN_RESULT, answer("120 km.")]
    split = preview([{"messages": messages, "tools": TOOLS}], tokenizer, mask_prompt=True)
    first, last = supervised(split, tokenizer)
    assert first.endswith(
        '<tool_call>\n{"name": "distance", "arguments": {"to": "Bern"}}\n</tool_call><|im_end|>'
    )
    assert last == "<think>\n\n</think>\n\n120 km.<|im_end|>"


@pytest.mark.parametrize("content", ["m.content if m.content is string else ''", "m.content|trim"])
def test_6_text_parts_are_joined(content):
    template = CHATML.replace("m.content", f"({content})") + PROMPT
    parts = [{"type": "text", "text": "Two "}, {"type": "text", "text": "hours."}]
    row = {"messages": [{"role": "user", "content": parts[:1]}, {"role": "assistant", "content": parts}]}
    tokenizer, split, texts = trained(row, template)
    assert texts == ["Two hours.<|im_end|>"]
    assert decode(tokenizer, split.sequences[0].tokens).startswith("<|im_start|>user\nTwo")


def test_6_images_are_an_error_of_text_models():
    content = [{"type": "image", "image": "bern.png"}, {"type": "text", "text": "Where?"}]
    _, split, _ = trained(
        {"messages": [{"role": "user", "content": content}, answer("Bern.")]}, CHATML + PROMPT
    )
    assert not split.sequences
    assert "image" in split.errors[0]


def test_6_a_role_that_the_template_does_not_know():
    template = (
        CHATML.replace("messages %}", "messages if m.role in ['system', 'user', 'assistant'] %}", 1) + PROMPT
    )
    row = {"messages": [{"role": "developer", "content": "Be brief."}, user("Is Bern far?"), answer("Yes.")]}
    _, split, texts = trained(row, template)
    assert texts == ["Yes.<|im_end|>"]
    assert any("developer" in notice and "row 1" in notice for notice in split.notices)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("m.content.split('</think>')[-1]", answer("<think>\nIt is far.\n</think>Two hours.")),
        ("m.content", answer("Two hours.", "It is far.")),
    ],
)
def test_7_reasoning_that_the_template_drops(content, message):
    template = CHATML.replace("m.content", content) + PROMPT
    _, split, texts = trained({"messages": [user("How far?"), message]}, template)
    assert texts == ["Two hours.<|im_end|>"]
    assert any("reasoning" in notice and "row 1" in notice for notice in split.notices)


@pytest.mark.parametrize("swapped", [False, True])
def test_8_content_or_calls(swapped):
    template = (
        CHATML.replace(
            "m.content", "(m.tool_calls[0].function|tojson if m.tool_calls and not m.content else m.content)"
        )
        + PROMPT
    )
    rows = [
        {"messages": [user("How far?"), call(BERN, text=text), BERN_RESULT, answer("120 km.")]}
        for text in ("", "I look.", "I wait.")
    ]
    tokenizer = small_tokenizer("chatml_markers", template=template)
    split = preview(rows[::-1] if swapped else rows, tokenizer, mask_prompt=True)
    (notice,) = (notice for notice in split.notices if "tool_calls" in notice)
    assert "2 of 3 rows" in notice
    assert ("row 1, row 2" if swapped else "row 2, row 3") in notice
    assert "I look.<|im_end|>" in supervised(split, tokenizer)


@pytest.mark.parametrize("knows", [False, True])
def test_9_a_generation_prompt_that_opens_a_thought(knows):
    opened = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
    template = CHATML + (
        opened.replace("<think>\n'", "' + ('<think>\n' if enable_thinking|default(true) else '')")
        if knows
        else opened
    )
    row = {"prompt": "How far is Bern?", "completion": "Two hours."}
    tokenizer, split, texts = trained(row, template)
    assert texts == ["Two hours.<|im_end|>"]
    assert decode(tokenizer, split.sequences[0].tokens) == (
        "<|im_start|>user\nHow far is Bern?<|im_end|>\n<|im_start|>assistant\n<think>\nTwo hours.<|im_end|>"
    )
    (notice,) = split.notices
    assert "'<think>'" in notice
    assert "row 1" in notice
    assert ('{"enable_thinking": false}' in notice) == knows


def test_9_a_prompt_and_a_turn_whose_tokens_begin_alike():
    template = CHATML.replace("m.content", "('<|tool>' if m.role == 'assistant' else '') + m.content")
    template += "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<|turn>' }}{%- endif %}"
    _, split, texts = trained({"prompt": "How far is Bern?", "completion": "Two hours."}, template)
    assert texts in (["<|tool>Two hours.<|im_end|>"], ["Two hours.<|im_end|>"])
    assert "'<|turn>'" in split.notices[0]


@pytest.mark.parametrize("thought", ["Hm.", "\nHm.\n"])
def test_9_a_thought_with_other_white_space_than_the_prompt(thought):
    template = (
        CHATML + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n\n' }}{%- endif %}"
    )
    row = {"prompt": "How far is Bern?", "completion": f"<think>{thought}</think>Two hours."}
    tokenizer, split, (span,) = trained(row, template)
    assert span.lstrip() == thought.lstrip() + "</think>Two hours.<|im_end|>"
    assert decode(tokenizer, split.sequences[0].tokens).count("<think>") == 1
    assert not split.notices
