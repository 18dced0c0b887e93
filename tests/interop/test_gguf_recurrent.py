"""GGUF export of recurrent and hybrid models: each transform and key is needed, and what is refused would be wrong."""

import dataclasses
import re

import numpy as np
import pytest
from mlx_lm.utils import quantize_model

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf.architecture import Architecture, arguments
from nalora_mlx.export.gguf.architectures import ARCHITECTURES, find_architecture, for_config
from nalora_mlx.export.gguf.placement import Placement
from tests.interop import llama_cpp
from tests.interop.configs_recurrent import CONFIGS, IGNORED_LAYERS, NEMOTRON_EXPERTS, SECONDARY, VARIANTS
from tests.interop.gguf_models import LONG_PROMPT, build, logits, save
from tests.interop.test_gguf_lora import export, llama_cpp_logits, prepare
from tests.logit_comparison import close, relative_error

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'nalora-mlx[export]'")
llama_cpp.require()

from nalora_mlx.export.gguf import model as gguf_model  # noqa: E402
from nalora_mlx.export.lazy_model import open_model  # noqa: E402

# Enough for a wrong order, sign or size to change the logits.
TOKENS = LONG_PROMPT[:32]
CASES = {name: (name, {}) for name in CONFIGS} | VARIANTS
TRANSFORMED = sorted(CONFIGS.keys() - SECONDARY | {"nemotron_h with experts"})


class Exporter:
    """A model, and the error of llama.cpp's logits after exports of it that were tampered with."""

    def __init__(self, tmp_path, monkeypatch, model_type, changes=None):
        monkeypatch.setattr(gguf_model, "compare_with_mlx_lm", lambda *_: [])  # slow, and of no interest here
        model, config = build(model_type, **(changes or {}))
        self.expected, self.output = logits(model, TOKENS), tmp_path / "model.gguf"
        self.directory = save(tmp_path / "model", model, config)

    def error(self, type="f32"):
        gguf_model.export_gguf(self.directory, self.output, type, overwrite=True)
        try:
            with llama_cpp.Llama(self.output, context=64) as llama:
                return relative_error(llama.logits(TOKENS), self.expected)
        except llama_cpp.LoadError:
            return np.inf


def broken(placement, field):
    """Return a placement without its change of values, or with rows or columns in another order."""
    value = getattr(placement, field)
    if field == "values":
        return dataclasses.replace(placement, values=None)
    other = np.sort(value)
    return dataclasses.replace(placement, **{field: value[::-1].copy() if (other == value).all() else other})


@pytest.mark.parametrize("case", TRANSFORMED)
def test_every_transform_is_needed(tmp_path, monkeypatch, case):
    exporter, place = Exporter(tmp_path, monkeypatch, *CASES[case]), gguf_model.place
    opened = open_model(exporter.directory)
    arch = for_config(find_architecture(opened.config), opened.config)
    args = arguments(arch, opened.args)
    transforms = {
        (placement.name.partition(".")[2].lstrip("0123456789."), field)
        for path in opened.weights
        for placement in place(arch, args, path)
        for field in ("rows", "columns", "values")
        if getattr(placement, field) is not None
    }
    for stem, field in sorted(transforms):

        def tamper(arch, args, path, stem=stem, field=field):
            return [
                broken(p, field) if p.name.endswith(stem) and getattr(p, field) is not None else p
                for p in place(arch, args, path)
            ]

        monkeypatch.setattr(gguf_model, "place", tamper)
        assert exporter.error() > 1e-3, f"{field} of {stem} has no effect"


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("qwen3_5", "full_attention_interval"),
        ("qwen3_5", "rope.dimension_sections"),
        ("lfm2_moe", "expert_gating_func"),
        ("lfm2_moe", "leading_dense_block_count"),
        ("falcon_mamba", "ssm.dt_b_c_rms"),
        ("nemotron_h with experts", "expert_weights_norm"),
        ("nemotron_h with experts", "expert_weights_scale"),
        ("granitemoehybrid", "attention.scale"),
        ("granitemoehybrid", "embedding_scale"),
        ("granitemoehybrid", "residual_scale"),
        ("granitemoehybrid", "logit_scale"),
        ("granitemoehybrid", "rope.scaling.finetuned"),
        ("kimi_linear", "expert_weights_scale"),
        ("bailing_moe_v3", "expert_weights_scale"),
        ("bailing_moe_v3", "expert_group_count"),
        ("bailing_moe_v3", "kda.gate_lower_bound"),
    ],
)
def test_key_is_needed(tmp_path, monkeypatch, case, key):
    exporter, add = Exporter(tmp_path, monkeypatch, *CASES[case]), gguf.GGUFWriter.add_key_value
    skipped = []

    def skip(self, name, *rest, **options):
        if name.endswith(f".{key}"):
            skipped.append(name)
        else:
            add(self, name, *rest, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", skip)
    assert not exporter.error() <= 1e-3  # NaN counts as a difference
    assert skipped


# Model type, changes of its config, message. Without the check, llama.cpp would compute something else.
REFUSED = [
    ("qwen3_5_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
    ("qwen3_next", {"decoder_sparse_step": 2}, "no place for tensor model.layers.0.mlp.gate_proj.weight"),
    ("lfm2", {"conv_bias": True}, "no place for tensor model.layers.0.conv.conv.bias"),
    ("lfm2_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
    ("lfm2_moe", {"routed_scaling_factor": 2.0}, "routed_scaling_factor is not 1"),
    ("mamba", {"use_bias": True}, "no place for tensor backbone.layers.0.mixer.in_proj.bias"),
    ("mamba", {"use_bcdt_rms": True, "mixer_rms_eps": 1e-1}, "mixer_rms_eps is 0.1"),
    ("mamba2", {"n_groups": 2}, "2 groups of heads"),
    ("mamba2", {"layer_norm_epsilon": 1e-1}, "layer_norm_epsilon is 0.1"),
    ("mamba2", {"time_step_limit": [0.7, 0.8]}, "time_step_limit is [0.7, 0.8]"),
    ("granitemoehybrid", {"mamba_n_groups": 2}, "2 groups of heads"),
    ("falcon_h1", {"mamba_rms_norm": True, "mamba_n_groups": 2}, "2 groups of heads"),
    ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": True}, "mamba_norm_before_gate is true"),
    ("falcon_h1", {"projectors_bias": True}, "no place for tensor model.layers.0.mamba.out_proj.bias"),
    ("jamba", {"num_experts": 4, "num_experts_per_tok": 2}, "num_experts is above 1"),
    ("nemotron_h", NEMOTRON_EXPERTS | {"n_group": 2}, "n_group is 2"),
    ("nemotron_h", NEMOTRON_EXPERTS | {"hybrid_override_pattern": "ME-*"}, "with and without experts"),
    ("kimi_linear", {"moe_renormalize": False}, "norm_topk_prob is false"),
    ("rwkv7", {"head_dim": 16}, "head_dim is 16"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_models_differ_in_llama_cpp(tmp_path, monkeypatch, model_type, changes, message):
    exporter = Exporter(tmp_path, monkeypatch, model_type, changes)
    with pytest.raises(InputError, match=re.escape(message)):
        exporter.error()
    unchecked = dataclasses.replace(ARCHITECTURES[model_type], extra_checks=Architecture("any").extra_checks)
    monkeypatch.setitem(ARCHITECTURES, model_type, unchecked)
    if "no place for tensor" in message:
        return
    assert not exporter.error() <= 1e-3  # NaN counts as a difference


@pytest.mark.parametrize(("case", "key"), IGNORED_LAYERS)
def test_adapters_that_llama_cpp_ignores_are_refused(tmp_path, monkeypatch, capsys, case, key):
    model_type, changes = CASES[case]
    base, adapter, plain, _ = prepare(tmp_path, model_type, changes, (key,))
    assert export("gguf-lora", base, tmp_path / "lora.gguf", "--adapter-path", adapter) == 2
    assert "cannot have an adapter here" in capsys.readouterr().err
    monkeypatch.setattr(Placement, "takes_lora", True)
    _, both = llama_cpp_logits(tmp_path, base, adapter, LONG_PROMPT)
    assert relative_error(both, plain) < 1e-5  # llama.cpp loads the adapter without applying it


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("qwen3_5", "qwen35"),
        ("qwen3_5 with experts", "qwen35moe"),
        ("qwen3_5 as published", "qwen35"),
        ("nemotron_h", "nemotron_h"),
        ("nemotron_h with experts", "nemotron_h_moe"),
        ("granitemoehybrid dense with RoPE", "granitehybrid"),
        ("granitemoehybrid without Mamba", "granitemoe"),
        ("granitemoehybrid without Mamba and experts", "granite"),
    ],
)
def test_name_of_the_architecture_follows_the_config(case, name):
    model_type, changes = CASES[case]
    config = CONFIGS[model_type] | {"model_type": model_type} | changes
    assert for_config(find_architecture(config), config).name == name


def test_layers_under_the_names_of_transformers_5(tmp_path, monkeypatch):
    exporter = Exporter(tmp_path, monkeypatch, "granitemoehybrid", {})
    path = exporter.directory / "config.json"
    text = path.read_text()
    renamed = text.replace('"mamba"', '"linear_attention"').replace('"attention"', '"full_attention"')
    assert renamed != text
    path.write_text(renamed)
    assert exporter.error() < 1e-5


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("qwen3_5_moe", ("linear_attn.in_proj_qkv", "linear_attn.out_proj", "mlp.shared_expert_gate")),
        ("qwen3_next", ("linear_attn.in_proj_qkvz", "mlp.switch_mlp.up_proj")),
        ("lfm2", None),
        ("nemotron_h", None),
        ("granitemoehybrid", ("shared_mlp.input_linear", "self_attn.q_proj", "mamba.in_proj")),
        ("kimi_linear", ("self_attn.q_proj", "self_attn.g_b_proj")),
        ("rwkv7", ("attn.w_lora.lora.0", "attn.a_lora.lora.2")),
    ],
)
def test_merge_is_exact(tmp_path, model_type, keys):
    base, adapter, plain, tuned = prepare(tmp_path, model_type, {}, keys)
    assert export("gguf", base, tmp_path / "whole.gguf", "--type", "f32", "--adapter-path", adapter) == 0
    with llama_cpp.Llama(tmp_path / "whole.gguf") as llama:
        close(llama.logits(LONG_PROMPT), tuned, plain, 1e-5)


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_next", "granitemoehybrid"])
def test_quantized_base_is_exported(tmp_path, model_type):
    """Rows and columns of packed weights are reordered as those of others."""
    model, config = build(model_type)
    model, config = quantize_model(model, config, group_size=32, bits=4)
    gguf_model.export_gguf(save(tmp_path / "model", model, config), tmp_path / "model.gguf", "f32")
    with llama_cpp.Llama(tmp_path / "model.gguf") as llama:
        assert relative_error(llama.logits(LONG_PROMPT), logits(model, LONG_PROMPT)) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "changes", "note"),
    [
        ("granitemoehybrid", {"time_step_limit": [0.001, 100.0]}, "keeps Mamba's step sizes above 0.001"),
        ("falcon_mamba", {"mixer_rms_eps": 1e-6}, "uses the epsilon 1e-05 in all norms"),
    ],
)
def test_small_differences_are_noted(tmp_path, model_type, changes, note):
    directory = save(tmp_path / "model", *build(model_type, **changes))
    notes = gguf_model.export_gguf(directory, tmp_path / "model.gguf", "f32").notes
    assert any(note in line for line in notes)
