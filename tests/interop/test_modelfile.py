"""Ollama Modelfiles: their syntax, and that their templates render like the models' own."""

import json
import re
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import load

from nalora_mlx.__main__ import main
from nalora_mlx.export.modelfile import extract_chat_format, write_modelfile
from tests.interop.gguf_models import build, save

INSTRUCTIONS = {"FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE", "REQUIRES"}
PARAMETERS = {
    "stop",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "num_ctx",
    "num_predict",
    "seed",
    "repeat_penalty",
}


def parse(text):
    """Return [(instruction, argument)] of a Modelfile. An argument is a line, or text in triple quotes."""
    found, position = [], 0
    while position < len(text):
        if match := re.compile(r"\s*(#[^\n]*)?\n|\s*\Z").match(text, position):
            position = match.end() or len(text)
            if match.end() == len(text):
                break
            continue
        match = re.compile(r'(\w+) +("""(.*?)"""|[^\n]*)(\n|\Z)', re.DOTALL).match(text, position)
        assert match, f"no instruction at {text[position : position + 60]!r}"
        assert match[1] in INSTRUCTIONS, match[1]
        found.append((match[1], match[2] if match[3] is None else match[3]))
        position = match.end()
    return found


def render(template, messages):
    """Render the few constructs of Go's text/template that Modelfiles use."""
    match = re.fullmatch(
        r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL
    )
    before, body, after = match.groups()
    branches = dict(
        re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else|\Z)', body, re.DOTALL)
    )
    assert "{{" not in re.sub(r"\{\{ (\.Content|(else )?if eq \.Role \"\w+\") \}\}", "", body)
    texts = [
        branches[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages if m["role"] in branches
    ]
    return before + "".join(texts) + after


BOS = "{{ bos_token }}"
EACH = "{% for m in messages %}"
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
ANSWER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
IS_SYSTEM = "messages[0]['role'] == 'system'"
NO_SYSTEM = "{% if " + IS_SYSTEM + " %}{{ raise_exception('no system') }}{% endif %}"
OWN_SYSTEM = "{% if not " + IS_SYSTEM + ' %}<|im_start|>system\nBe "kind".<|im_end|>\n{% endif %}'
TEMPLATES = {
    "chatml": EACH + TURN + ANSWER,
    "default system message": OWN_SYSTEM + EACH + TURN + ANSWER,
    "llama 3": BOS
    + EACH
    + "{{ '[' + m['role'] + ']\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}",
    "gemma": BOS
    + NO_SYSTEM
    + EACH
    + "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    + "{{ '<turn>' + role + '\n' + m['content'] + '<end>\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}",
    "mistral": BOS
    + NO_SYSTEM
    + EACH
    + "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    + "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}",
}
# Templates that are not fixed texts around each message.
NOT_SIMPLE = {
    "last message differs": EACH + "{% if loop.last %}!{% endif %}{{ m['content'] }};{% endfor %}",
    "system message inside the first turn": "{% set s = messages[0]['content'] if "
    + IS_SYSTEM
    + " else '' %}"
    "{% for m in messages if m['role'] != 'system' %}"
    "[{{ m['role'] }}]{{ s if loop.first }}{{ m['content'] }};{% endfor %}",
    "thoughts are removed from earlier answers": EACH
    + "[{{ m['role'] }}]{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'][3:] }}"
    + "{% else %}{{ m['content'] }}{% endif %};{% endfor %}",
    "Go braces": EACH + "{{ '{{' + m['role'] + '}}' + m['content'] }}{% endfor %}",
    "always raises": "{{ raise_exception('never') }}",
}
CONVERSATIONS = [
    ("user",),
    ("user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
]


@pytest.fixture
def tokenizer(tmp_path):
    return load(save(tmp_path / "tokenizer", *build("llama", num_hidden_layers=1)))


def with_template(tokenizer, template):
    tokenizer._tokenizer.chat_template = template
    tokenizer.chat_template = template
    return tokenizer


def conversation(roles):
    return [{"role": role, "content": f"Words {i} of {role},\n\n  and more?"} for i, role in enumerate(roles)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_renders_like_the_models_own(tokenizer, tmp_path, name):
    tokenizer = with_template(tokenizer, TEMPLATES[name])
    path, notes = write_modelfile(tmp_path / "model.gguf", tokenizer)
    assert path == tmp_path / "model.gguf.Modelfile"
    assert notes == []
    found = dict(parse(path.read_text()))
    assert found["FROM"] == "./model.gguf"
    compared = 0
    for roles in CONVERSATIONS:
        messages = conversation(roles)
        try:
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:
            assert "system" in roles
            continue
        if "SYSTEM" in found and roles[0] != "system":  # Ollama puts it first
            messages = [{"role": "system", "content": found["SYSTEM"]}, *messages]
        assert render(found["TEMPLATE"], messages) == expected
        compared += 1
    assert compared >= 2
    after = extract_chat_format(tokenizer).wrappers["assistant"][1].strip()
    assert not after or ("PARAMETER", f'stop "{after}"') in parse(path.read_text())
    for parameter, _, value in (v.partition(" ") for k, v in parse(path.read_text()) if k == "PARAMETER"):
        assert parameter in PARAMETERS
        assert re.fullmatch(r'"[^"\n]+"', value)


def test_bos_is_omitted_if_tokenization_adds_it(tmp_path):
    from tokenizers import Tokenizer, processors

    directory = save(tmp_path / "model", *build("llama", num_hidden_layers=1))
    inner = Tokenizer.from_file(str(directory / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", inner.token_to_id("<|begin|>"))]
    )
    inner.save(str(directory / "tokenizer.json"))
    path, _ = write_modelfile(tmp_path / "a.gguf", with_template(load(directory), TEMPLATES["llama 3"]))
    assert dict(parse(path.read_text()))["TEMPLATE"].startswith("{{ range .Messages }}")


@pytest.mark.parametrize("name", NOT_SIMPLE)
def test_complex_templates_are_omitted_with_a_note(tokenizer, tmp_path, name):
    tokenizer = with_template(tokenizer, NOT_SIMPLE[name])
    assert extract_chat_format(tokenizer) is None
    path, notes = write_modelfile(tmp_path / "model.gguf", tokenizer)
    end = tokenizer.eos_token
    assert parse(path.read_text()) == [("FROM", "./model.gguf"), ("PARAMETER", f'stop "{end}"')]
    assert "Ollama" in notes[0]


def test_adapter_names_its_base(tokenizer, tmp_path):
    path, _ = write_modelfile(
        tmp_path / "lora.gguf", with_template(tokenizer, TEMPLATES["chatml"]), "base.gguf"
    )
    found = parse(path.read_text())
    assert found[:2] == [("FROM", "./base.gguf"), ("ADAPTER", "./lora.gguf")]


def test_existing_modelfile_is_kept(tokenizer, tmp_path):
    (tmp_path / "model.gguf.Modelfile").write_text("FROM mine\n")
    path, notes = write_modelfile(tmp_path / "model.gguf", tokenizer)
    assert path.read_text() == "FROM mine\n"
    assert "was not changed" in notes[0]


def test_export_writes_a_modelfile(tmp_path, capsys):
    pytest.importorskip("gguf", reason="needs gguf: pip install 'nalora-mlx[export]'")
    base = save(tmp_path / "base", *build("llama", num_hidden_layers=1))
    ends = load(base).convert_tokens_to_ids(["<|begin|>", "<|im_end|>"])
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    where = ["--model", str(base), "--output", str(tmp_path / "model.gguf")]
    assert main(["export", "gguf", *where]) == 0
    assert "model.gguf.Modelfile" in capsys.readouterr().out
    found = parse(Path(tmp_path / "model.gguf.Modelfile").read_text())
    assert found[0] == ("FROM", "./model.gguf")
    assert {value for key, value in found if key == "PARAMETER"} >= {'stop "<|begin|>"', 'stop "<|im_end|>"'}
    assert main(["export", "gguf", *where, "--overwrite"]) == 0
    assert "was not changed" in capsys.readouterr().err
