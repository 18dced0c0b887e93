"""Chat templates: which one is used, with which arguments, at which date, and what adapter_config.json may hold."""

import inspect
import json
import re
import shutil
from datetime import datetime

import pytest
from mlx_lm.tokenizer_utils import load
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from nalora_mlx.adapters.files import CHAT_KEY, chat_entry, parse_adapter_config, read_chat_settings
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.template_args import RESERVED, parse_template_args, template_args_problems
from nalora_mlx.models.chat_templates import (
    ChatSettings,
    check_template,
    choose_settings,
    configure_chat_template,
    reads_date,
    resolve_template,
)
from tests.conftest import CHAT_TEMPLATE

CHAT = [{"role": "user", "content": "red"}]
DATED = "{{ strftime_now('%d %b %Y %H:%M:%S') }}"
DATE = "2025-03-04T05:06:07"


@pytest.fixture
def directory(tokenizer_directory, tmp_path):
    return shutil.copytree(tokenizer_directory, tmp_path / "tokenizer")


@pytest.fixture
def tokenizer(directory):
    return load(directory)


def render(tokenizer, messages=CHAT, **kwargs):
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


# --- which template -----------------------------------------------------------------------------------------


def test_templates_come_from_a_file_a_name_or_a_text(directory, tmp_path):
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("{{ 'rag' }}")
    (tmp_path / "mine.txt").write_text("{{ 'mine' }}")
    tokenizer = load(directory)
    assert resolve_template(str(tmp_path / "mine.txt"), tokenizer) == "{{ 'mine' }}"
    assert resolve_template("rag", tokenizer) == "{{ 'rag' }}"
    assert resolve_template("{{ 'text' }}", tokenizer) == "{{ 'text' }}"
    assert resolve_template("default", tokenizer) is None
    configure_chat_template(tokenizer, ChatSettings(resolve_template("rag", tokenizer)))
    assert render(tokenizer) == "rag"


def test_the_tokenizers_own_template_is_not_an_override(directory, tokenizer):
    assert resolve_template(str(directory / "chat_template.jinja"), tokenizer) is None
    assert choose_settings(tokenizer, "default") == (ChatSettings(), [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("chatmll", "--chat-template chatmll: no such file, .* did you mean 'chatml'"),
        ("rag", "--chat-template rag: no such file, .*known names: chatml, default"),
        ("x" * 5000, "no such file"),
        ("~nobody-at-all/x", "no such file"),
        ("", "no such file"),
        ("a\n{{ x ", "--chat-template:2: not a valid chat template: unexpected end of template"),
    ],
)
def test_an_unknown_or_broken_template_is_one_line(tokenizer, given, message):
    with pytest.raises(InputError, match=message):
        resolve_template(given, tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\n{% if x %}", r"t\.jinja:3: not a valid chat template: Unexpected end of template"),
        (b"a\n{{ x | nofilter }}", r"t\.jinja:2: not a valid chat template: No filter named"),
        (b"\xff\xfe", r"t\.jinja: cannot be read as text"),
        (b"{{ " + b"(" * 5000 + b")" * 5000 + b" }}", r"t\.jinja.*: not a valid chat template"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tokenizer, tmp_path, content, message):
    (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(InputError, match=message):
        resolve_template(str(tmp_path / "t.jinja"), tokenizer)


def test_generation_markers_and_loop_controls_are_valid(tokenizer):
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    configure_chat_template(tokenizer, ChatSettings(resolve_template(text, tokenizer)))
    assert render(tokenizer, CHAT * 2) == "red"


@pytest.mark.parametrize(("eos", "end"), [("<|im_end|>", "<|im_end|>"), ("<pad>", "<pad>")])
@pytest.mark.parametrize("bos", ["", "w60"])
def test_chatml_gives_a_base_model_chats_that_end_where_generation_stops(directory, eos, end, bos):
    if bos:  # a tokenizer that puts it before every text
        content = json.loads((directory / "tokenizer.json").read_text())
        single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [60], "tokens": [bos]}},
        }
        (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "chat_template.jinja").unlink()
    settings = json.loads((directory / "tokenizer_config.json").read_text()) | {"eos_token": eos}
    settings |= {"bos_token": bos} if bos else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load(directory)
    assert not tokenizer.has_chat_template
    chosen, notices = choose_settings(tokenizer, "chatml")
    configure_chat_template(tokenizer, chosen)
    assert tokenizer.has_chat_template
    assert notices == []
    messages = [*CHAT, {"role": "assistant", "content": "blue"}]
    want = f"{bos}<|im_start|>user\nred{end}\n<|im_start|>assistant\nblue{end}\n"
    assert render(tokenizer, messages) == want
    assert render(tokenizer, messages, add_generation_prompt=True) == f"{want}<|im_start|>assistant\n"
    assert end in {tokenizer.decode([token]) for token in tokenizer.eos_token_ids}


def test_a_template_replaces_a_renderer_of_mlx_lm(tokenizer):
    tokenizer._chat_template = lambda *_args, **_kwargs: "theirs"
    assert render(tokenizer) == "theirs"
    configure_chat_template(tokenizer, ChatSettings("{{ 'mine' }}"))
    assert render(tokenizer) == "mine"


# --- arguments ----------------------------------------------------------------------------------------------

THINKING = "{{ enable_thinking }}{{ a }}"


def test_arguments_are_defaults_of_every_call(tokenizer):
    configure_chat_template(tokenizer, ChatSettings(THINKING))
    assert render(tokenizer) == "False"  # mlx-lm's default for this vocabulary
    configure_chat_template(tokenizer, ChatSettings(THINKING, {"enable_thinking": True, "a": 1}))
    assert render(tokenizer) == "True1"
    assert tokenizer.apply_chat_template(CHAT) == tokenizer.encode("True1", add_special_tokens=False)
    assert render(tokenizer, a=2) == "True2"
    configure_chat_template(tokenizer, ChatSettings(THINKING, {"a": 3}))  # the earlier arguments are gone
    assert render(tokenizer) == "False3"


def test_reserved_names_are_those_that_rendering_sets():
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert {*parameters, "messages"} - {"kwargs", "documents"} == RESERVED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{x", "not valid JSON"),
        ("[1]", "is not an object"),
        ('"a"', "is not an object"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"tokenize": true}', "tokenize cannot be given"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_invalid_arguments_are_one_line(text, message):
    with pytest.raises(InputError, match=message):
        parse_template_args(text)


def test_arguments_from_yaml_must_fit_into_json():
    args = {"date_string": datetime(2024, 7, 26), 1: 2, "fine": [1, {"a": None}], "nan": float("nan")}
    problems = template_args_problems(args)
    assert [problem.split()[0] for problem in problems] == ["date_string", "1", "nan"]


def test_an_argument_without_effect_is_named(tokenizer):
    template = "{% if not a is defined %}{% set a = 1 %}{% endif %}{{ bos_token }}{{ a }}"
    _, notices = choose_settings(tokenizer, template, {"a": 1, "bos_token": "x", "enable_thinking": False})
    assert notices == [
        "--chat-template-args: the chat template does not read enable_thinking, so it has no effect"
    ]
    _, notices = choose_settings(tokenizer, None, {"a": 1})
    assert len(notices) == 1


def test_flags_win_over_the_training_and_say_so(tokenizer):
    trained = ChatSettings(THINKING, {"a": 1}, DATE)
    assert choose_settings(tokenizer, trained=trained) == (ChatSettings(THINKING, {"a": 1}), [])
    assert choose_settings(tokenizer, THINKING, {"a": 1}, trained) == (ChatSettings(THINKING, {"a": 1}), [])
    chosen, notices = choose_settings(tokenizer, "default", {}, trained)
    assert chosen == ChatSettings()
    assert notices == [
        "--chat-template differs from the template that the adapter was trained with",
        "the adapter was trained with --chat-template-args '{\"a\": 1}'",
    ]


# --- the date -----------------------------------------------------------------------------------------------


def test_a_date_is_kept_for_one_tokenizer_only(directory, tokenizer):
    other = load(directory)
    configure_chat_template(other, ChatSettings(DATED))
    assert configure_chat_template(tokenizer, ChatSettings(DATED, date=DATE)) == []
    assert reads_date(tokenizer)
    for _ in range(2):
        assert render(tokenizer) == "04 Mar 2025 05:06:07"
        assert render(other).split()[2] == f"{datetime.now():%Y}"
    configure_chat_template(tokenizer, ChatSettings(DATED))
    assert render(tokenizer).split()[2] == f"{datetime.now():%Y}"


def test_the_current_date_is_back_after_an_error_in_the_template(tokenizer):
    failing = DATED + "{{ raise_exception('no') }}"
    configure_chat_template(tokenizer, ChatSettings(failing, date=DATE))
    with pytest.raises(Exception, match="no"):
        render(tokenizer)
    compiled = chat_template_utils._compile_jinja_template(failing)
    assert compiled.globals["strftime_now"]("%Y") == f"{datetime.now():%Y}"


@pytest.mark.parametrize("name", ["default", "tool_use"])
def test_the_date_of_every_named_template_is_kept(directory, name):
    (directory / "chat_template.jinja").write_text("default " + DATED)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tool_use " + DATED)
    tokenizer = load(directory)
    assert configure_chat_template(tokenizer, ChatSettings(date=DATE)) == []
    tools = [{"type": "function", "function": {"name": "f"}}] if name == "tool_use" else None
    assert render(tokenizer, tools=tools) == f"{name} 04 Mar 2025 05:06:07"


class Hidden:
    """A compiled template whose globals cannot be reached."""

    def __init__(self, text):
        compiled = chat_template_utils._cached_compile_jinja_template(text)
        self.render, self.environment = compiled.render, compiled.environment


@pytest.mark.parametrize("compiled", [chat_template_utils._cached_compile_jinja_template, Hidden])
def test_a_transformers_that_keeps_the_date_to_itself_is_a_notice(tokenizer, monkeypatch, compiled):
    monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", compiled)
    notices = configure_chat_template(tokenizer, ChatSettings(DATED, date=DATE))
    assert [notice.split(",")[0] for notice in notices] == ["the chat template prints the current date"]
    assert render(tokenizer).split()[2] == f"{datetime.now():%Y}"


def test_nothing_changes_without_a_template_that_prints_the_date(tokenizer):
    assert not reads_date(tokenizer)
    before = render(tokenizer)
    assert configure_chat_template(tokenizer, ChatSettings(date=DATE)) == []
    assert render(tokenizer) == before


# --- adapter_config.json ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        ChatSettings(),
        ChatSettings(CHAT_TEMPLATE),
        ChatSettings(None, {"enable_thinking": False, "a": [1, {"b": None}]}, DATE),
    ],
)
def test_settings_are_saved_and_read_back(tmp_path, settings):
    entry = chat_entry(settings)
    assert set(entry) <= {CHAT_KEY}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", **entry}))
    assert read_chat_settings(tmp_path) == settings
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert parse_adapter_config(content, tmp_path).chat == settings


def test_the_tokenizers_own_way_leaves_no_trace():
    assert chat_entry(ChatSettings()) == chat_entry(None) == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "must be a mapping"),
        (None, "must be a mapping"),
        ({"tmplate": "x"}, "unknown key 'tmplate'; did you mean 'template'"),
        ({"template": 1}, "template is 1, not text"),
        ({"template": "a\n{% if"}, "line:2: not a valid chat template"),
        ({"args": [1]}, "is not an object"),
        ({"args": {"tokenize": True}}, "tokenize cannot be given"),
        ({"args": None}, "is not an object"),
        ({"date": "tomorrow"}, "date is 'tomorrow', not a date"),
        ({"date": 20250304}, "date is 20250304, not a date"),
    ],
)
def test_broken_settings_in_an_adapter_are_one_line(tmp_path, value, message):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", CHAT_KEY: value}))
    with pytest.raises(InputError, match=f"adapter_config.json: chat_template.*{re.escape(message)}"):
        read_chat_settings(tmp_path)


def test_an_adapters_template_cannot_leave_the_sandbox(tmp_path, tokenizer):
    template = "{{ ''.__class__.__mro__ }}"
    (tmp_path / "adapter_config.json").write_text(json.dumps({CHAT_KEY: {"template": template}}))
    configure_chat_template(tokenizer, read_chat_settings(tmp_path))
    with pytest.raises(Exception, match="unsafe"):
        render(tokenizer)


def test_checking_a_template_does_not_compute_its_constants():
    check_template("{% if false %}{{ 'x' * (2 * 10**12) }}{% endif %}", "t.jinja")
