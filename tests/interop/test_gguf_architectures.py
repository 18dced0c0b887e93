"""GGUF export of every model type: llama.cpp and mlx-lm give the same logits."""

import dataclasses
import importlib
import pkgutil

import mlx_lm.models
import pytest
from mlx_lm.utils import MODEL_REMAPPING

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf.architecture import Architecture
from nalora_mlx.export.gguf.architectures import ARCHITECTURES, UNSUPPORTED, find_architecture
from tests.interop import configs_experts, configs_recurrent, llama_cpp
from tests.interop.gguf_models import CONFIGS, VARIANTS, build, logits, prompt, save
from tests.logit_comparison import relative_error

pytest.importorskip("gguf", reason="needs gguf: pip install 'nalora-mlx[export]'")
llama_cpp.require()

from nalora_mlx.export.gguf.model import export_gguf  # noqa: E402 - needs gguf

CASES = {model_type: (model_type, {}) for model_type in CONFIGS} | VARIANTS


def error_in_llama_cpp(tmp_path, model_type, changes, type="f32"):
    model, config = build(model_type, **changes)
    ids = prompt(model_type)
    expected = logits(model, ids)
    result = export_gguf(save(tmp_path / "model", model, config), tmp_path / "model.gguf", type)
    with llama_cpp.Llama(result.path) as llama:
        return relative_error(llama.logits(ids), expected)


# Cases that differ little from others, or have 64 layers.
SECONDARY = {"gemma4_unified", "iquestcoder", "llava", "pixtral", "qwen2_5_vl", "xverse"}
SECONDARY |= configs_experts.SECONDARY | configs_recurrent.SECONDARY
SECONDARY |= {"cohere 64", "exaone4 64", "gpt_bigcode many", "helium tied biases", "mimo tied yarn"}


def marked(cases):
    return [pytest.param(case, marks=pytest.mark.slow) if case in SECONDARY else case for case in cases]


@pytest.mark.parametrize("case", marked(CASES))
def test_llama_cpp_gives_the_same_logits(tmp_path, case):
    model_type, changes = CASES[case]
    tolerance = 1e-3 if ARCHITECTURES[model_type].gelu else 1e-5
    assert error_in_llama_cpp(tmp_path, model_type, changes) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("type", ["q8_0", "q4_k_m"])
@pytest.mark.parametrize("case", [*CONFIGS, "cohere 64", "stablelm norms", "gemma4 large"])
def test_quantized_types_load_and_answer(tmp_path, case, type):
    assert error_in_llama_cpp(tmp_path, *CASES[case], type) < (0.5 if type == "q8_0" else 1.0)


def test_every_architecture_is_compared():
    assert CONFIGS.keys() == ARCHITECTURES.keys()


def test_every_model_type_of_mlx_lm_is_supported_or_has_a_reason():
    names = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    modules = {name: importlib.import_module(f"mlx_lm.models.{name}") for name in names}
    model_types = {name for name, module in modules.items() if hasattr(module, "Model")}
    assert model_types | MODEL_REMAPPING.keys() == ARCHITECTURES.keys() | UNSUPPORTED.keys()
    assert not ARCHITECTURES.keys() & UNSUPPORTED.keys()


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_unsupported_model_types_are_rejected_with_the_reason(model_type):
    with pytest.raises(InputError, match=f"model_type {model_type}: cannot be exported to GGUF: ") as raised:
        find_architecture({"model_type": model_type})
    assert UNSUPPORTED[model_type] in str(raised.value)


SLIDING, FULL = "sliding_attention", "full_attention"
EQUAL_LAYERS = [SLIDING, FULL] * 3
ROPE = CONFIGS["gemma4_text"]["rope_parameters"]
BLOCKS = CONFIGS["nemotron-nas"]["block_configs"]
PLAIN_BLOCK = BLOCKS[0]
# Model type, changes of its config, and what the refusal must mention.
REFUSED = [
    ("ministral3", {"layer_types": EQUAL_LAYERS, "sliding_window": 8}, "sliding_attention"),
    ("olmo2", {"head_dim": 32}, "head_dim is 32"),
    ("olmo3", {"head_dim": 32}, "head_dim is 32"),
    ("exaone4", {"head_dim": 32}, "head_dim is 32"),
    ("exaone4", {"sliding_window": 8, "sliding_window_pattern": "LLLG"}, "sliding_window_pattern.*64 layers"),
    ("exaone4", {"num_hidden_layers": 64}, "sliding_window_pattern.*64 layers"),
    ("glm", {"head_dim": 32}, "head_dim is 32"),
    ("nemotron", {"head_dim": 32}, "head_dim is 32"),
    ("hunyuan_v1_dense", {"use_qk_norm": False}, "use_qk_norm is False"),
    ("hunyuan_v1_dense", {"attention_bias": True}, "no place for tensor.*bias"),
    ("seed_oss", {"attention_out_bias": True}, "no place for tensor.*bias"),
    ("ernie4_5", {"use_bias": True}, "no place for tensor.*bias"),
    ("qwen", {"no_bias": False}, "no place for tensor.*bias"),
    ("qwen3_vl", {"text_config": CONFIGS["qwen3_vl"]["text_config"] | {"head_dim": 32}}, "mrope_section"),
    ("cohere", {"use_qk_norm": True}, "use_qk_norm is True"),
    ("cohere", {"attention_bias": True}, "no place for tensor.*bias"),
    ("nanbeige", {"attention_bias": True}, "no place for tensor.*bias"),
    ("apertus", {"mlp_bias": True}, "no place for tensor.*bias"),
    ("openelm", {"normalize_qk_projections": False}, "normalize_qk_projections"),
    ("openelm", {"share_input_output_layers": False}, "share_input_output_layers"),
    ("minicpm3", {"scale_emb": 10}, "scale_emb is 10.* 12"),
    ("minicpm3", {"scale_depth": 1.0}, "scale_depth is 1.*1.4"),
    ("minicpm3", {"dim_model_base": 64}, "dim_model_base is 64.* 256"),
    ("minicpm3", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("minicpm3", {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
    ("nemotron-nas", {"hidden_act": "relu"}, "hidden_act is relu"),
    (
        "nemotron-nas",
        {"block_configs": [PLAIN_BLOCK | {"ffn": {"no_op": True}}] * 6},
        "attention without an MLP",
    ),
    (
        "nemotron-nas",
        {"block_configs": [PLAIN_BLOCK | {"ffn": {"replace_with_linear": True}}] * 6},
        "replaces an MLP by a linear layer",
    ),
    ("gemma4_text", {"layer_types": [FULL, SLIDING] * 3}, "shares keys and values"),
    (
        "gemma4_text",
        {"layer_types": [SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL]},
        "shares keys and values",
    ),
    ("gemma4_text", {"vocab_size_per_layer_input": 100}, "vocab_size_per_layer_input"),
    (
        "gemma4_text",
        {"rope_parameters": ROPE | {SLIDING: {"rope_type": "linear", "factor": 2.0}}},
        "sliding_attention has type linear",
    ),
    (
        "gemma4_text",
        {"rope_parameters": ROPE | {FULL: {"rope_type": "linear", "factor": 2.0}}},
        "full_attention has type linear",
    ),
    (
        "gemma3n",
        {"altup_num_inputs": 3, "num_hidden_layers": 21},
        "altup_num_inputs is 3: .* 4.*num_hidden_layers",
    ),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), REFUSED)
def test_configs_that_llama_cpp_computes_differently_are_refused(tmp_path, model_type, changes, message):
    if model_type == "gemma3n":
        changes = {"text_config": CONFIGS["gemma3n"]["text_config"] | changes}
    directory = save(tmp_path / "model", *build(model_type, **changes))
    with pytest.raises(InputError, match=message):
        export_gguf(directory, tmp_path / "model.gguf", "f32")


# Fields without which the comparison above must fail. Otherwise it would not test them.
NEEDED_FIELDS = {
    "interleaved_rope": ["llama", "mixtral", "granite", "smollm3", "ministral3", "minicpm", "nemotron-nas"],
    "traditional_rope": ["helium", "glm", "ernie4_5", "cohere"],
    "norm_offset": ["gemma", "gemma2", "gemma3_text", "nemotron"],
    "arguments": ["hunyuan_v1_dense", "helium"],
    "placements": ["plamo", "plamo3", "gpt_neox", "internlm2"],
    "sizes": ["minicpm3"],
    "extra_metadata": [
        *(
            "gemma3_text",
            "granite",
            "cohere2",
            "gemma2",
            "cohere",
            "minicpm",
            "ministral3",
            "olmo3",
            "plamo3",
        ),
        *("gpt_neox", "nanbeige", "spark2_5"),
    ],
}
# Fields that say which models are refused, or what else is known.
DESCRIPTIVE = {"name", "gelu", "biases", "rope_scaling", "ignores_scaling"}
DESCRIPTIVE |= {"extra_checks", "extra_notes", "other_name"}


def is_needed(tmp_path, monkeypatch, field, case):
    model_type, changes = CASES[case]
    plain = getattr(Architecture("any"), field)
    broken = dataclasses.replace(ARCHITECTURES[model_type], **{field: plain})
    monkeypatch.setitem(ARCHITECTURES, model_type, broken)
    try:
        return error_in_llama_cpp(tmp_path, model_type, changes) > 2e-3
    except (llama_cpp.LoadError, InputError, AttributeError, TypeError, KeyError):
        return True


@pytest.mark.parametrize(
    ("field", "model_type"), [(f, m) for f, models in NEEDED_FIELDS.items() for m in models]
)
def test_comparison_fails_without_a_needed_field(tmp_path, monkeypatch, field, model_type):
    assert is_needed(tmp_path, monkeypatch, field, model_type)


# Fields that matter only to quantized types, to adapters, or to other versions of llama.cpp.
NOT_COMPARED = {("cohere", "placements"), ("gpt_bigcode", "placements"), ("minicpm3", "placements")}
NOT_COMPARED |= {("phi3", "extra_metadata")}
NOT_COMPARED |= {("mistral4", "sizes")}  # llama.cpp aborts
# llama.cpp crashes, because it reads biases that are not there.
NOT_COMPARED |= {(name, "extra_tensors") for name in ("nemotron_h", "falcon_h1", "granitemoehybrid")}


def own_fields():
    """Yield every field of every row that has another value than by default."""
    default = Architecture("any")
    for model_type, arch in ARCHITECTURES.items():
        names = {
            f.name for f in dataclasses.fields(arch) if getattr(arch, f.name) != getattr(default, f.name)
        }
        if arch.traditional_rope:
            names -= {"interleaved_rope"}  # both together mean that nothing is reordered
        yield from (
            (model_type, name)
            for name in sorted(names - DESCRIPTIVE)
            if (model_type, name) not in NOT_COMPARED
        )


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "field"), own_fields())
def test_some_comparison_fails_without_each_field(tmp_path, monkeypatch, model_type, field):
    cases = [case for case, (of, _) in CASES.items() if of == model_type]
    assert any(is_needed(tmp_path / case, monkeypatch, field, case) for case in cases)
