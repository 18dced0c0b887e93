"""GGUF export of every model type: llama.cpp and mlx-lm give the same logits."""

import dataclasses

import pytest

from nalora_mlx.export.gguf.architecture import Architecture
from nalora_mlx.export.gguf.architectures import ARCHITECTURES
from tests.interop import llama_cpp
from tests.interop.gguf_models import CONFIGS, PROMPT, VARIANTS, build, logits, save
from tests.logit_comparison import relative_error

pytest.importorskip("gguf", reason="needs gguf: pip install 'nalora-mlx[export]'")
llama_cpp.require()

CASES = {model_type: (model_type, {}) for model_type in CONFIGS} | VARIANTS


def error_in_llama_cpp(tmp_path, model_type, changes):
    from nalora_mlx.export.gguf.model import export_gguf

    model, config = build(model_type, **changes)
    expected = logits(model)
    result = export_gguf(save(tmp_path / "model", model, config), tmp_path / "model.gguf", "f32")
    with llama_cpp.Llama(result.path) as llama:
        return relative_error(llama.logits(PROMPT), expected)


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_the_same_logits(tmp_path, case):
    model_type, changes = CASES[case]
    tolerance = 1e-3 if ARCHITECTURES[model_type].gelu else 1e-5
    assert error_in_llama_cpp(tmp_path, model_type, changes) < tolerance


def test_every_architecture_is_compared():
    assert CONFIGS.keys() == ARCHITECTURES.keys()


# Fields without which the comparison above must fail. Otherwise it would not test them.
NEEDED_FIELDS = {
    "interleaved_rope": ["llama", "mixtral", "granite", "smollm3"],
    "norm_offset": ["gemma", "gemma2", "gemma3_text"],
    "extra_metadata": ["gemma3_text", "granite", "cohere2", "gemma2"],
}


@pytest.mark.parametrize(
    ("field", "model_type"), [(f, m) for f, models in NEEDED_FIELDS.items() for m in models]
)
def test_comparison_fails_without_a_needed_field(tmp_path, monkeypatch, field, model_type):
    plain = getattr(Architecture("any"), field)
    broken = dataclasses.replace(ARCHITECTURES[model_type], **{field: plain})
    monkeypatch.setitem(ARCHITECTURES, model_type, broken)
    try:
        error = error_in_llama_cpp(tmp_path, model_type, {})
    except llama_cpp.LoadError:
        return
    assert error > 2e-3
