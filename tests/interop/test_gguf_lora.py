"""`nalora export gguf-lora`: llama.cpp gives the logits of base + adapter, from two GGUF files."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load

from nalora_mlx.__main__ import main
from nalora_mlx.adapters.attach import adapt, adapt_dora
from nalora_mlx.adapters.files import adapter_config, adapter_weights
from nalora_mlx.adapters.targets import select_targets
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.export.gguf import adapter as gguf_adapter
from nalora_mlx.export.gguf.architectures import ARCHITECTURES
from nalora_mlx.export.gguf.placement import Placement
from tests.conftest import random_adapters
from tests.interop import configs_recurrent, llama_cpp
from tests.interop.configs_experts import ADAPTED_LAYERS, IGNORED_LAYERS
from tests.interop.gguf_models import PROMPT, VARIANTS, build, logits, prompt, save
from tests.logit_comparison import close, effect_of, relative_error

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'nalora-mlx[export]'")
llama_cpp.require()

UNTIED = {"tie_word_embeddings": False}
HEAD = ("mlp.down_proj", "model.embed_tokens", "lm_head")
TIED_OLMO2 = ("mlp.up_proj", "model.embed_tokens")
# Case -> (model type, changes of its config, keys; None for all linear layers).
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# llama.cpp applies no adapter to the other linear layers, see IGNORED.
KEYS = (
    ADAPTED_LAYERS
    | configs_recurrent.ADAPTED_LAYERS
    | {
        "gemma3n": (
            *MLP,
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *("laurel.linear_left", "laurel.linear_right", "per_layer_input_gate", "per_layer_projection"),
        ),
        "minicpm3": (*MLP, "self_attn.o_proj"),
    }
)
CASES = {name: (name, {}, KEYS.get(name)) for name in ARCHITECTURES}
CASES |= {
    "nemotron_h with experts": (*VARIANTS["nemotron_h with experts"], None),
    "gemma4 with experts": ("gemma4_text", VARIANTS["gemma4 large"][1], None),
    "untied embedding and head": ("llama", UNTIED, HEAD),
    "tied embedding with output.weight in GGUF": ("olmo2", {"tie_word_embeddings": True}, TIED_OLMO2),
    "eight experts": ("mixtral", {"num_local_experts": 8}, ("block_sparse_moe.switch_mlp.gate_proj",)),
}


def prepare(tmp_path, model_type, changes, keys, attach=adapt, seed=7):
    """Create a base model and an adapter; return their directories and the logits of base and base + adapter."""
    model, config = build(model_type, **changes)
    base = save(tmp_path / "base", model, config)
    ids = prompt(model_type)
    plain = logits(model, ids)
    mx.random.seed(seed)
    if keys is None:  # as mlx-lm's adapters, with routers and the gates of recurrences
        targets = select_targets(model, NALoRAConfig(num_layers=-1, rank=4))
        keys = (*targets.keys, *targets.left_out)
    attach(model, NALoRAConfig(num_layers=-1, rank=4, scale=3.0, keys=keys))
    random_adapters(model, seed=seed, size=0.1)
    model.eval()
    files = {
        "adapters.safetensors": storage.arrays_writer(adapter_weights(model)),
        "adapter_config.json": storage.json_writer(adapter_config(model)),
    }
    storage.write_directory(tmp_path / "adapter", files)
    return base, tmp_path / "adapter", plain, logits(model, ids)


def export(format, base, output, *flags):
    return main(["export", format, "--model", str(base), "--output", str(output), *map(str, flags)])


def llama_cpp_logits(tmp_path, base, adapter, ids=PROMPT):
    """Return llama.cpp's logits for the base and for base + adapter."""
    assert export("gguf", base, tmp_path / "base.gguf", "--type", "f32") == 0
    assert export("gguf-lora", base, tmp_path / "lora.gguf", "--adapter-path", adapter) == 0
    with llama_cpp.Llama(tmp_path / "base.gguf") as llama:
        alone = llama.logits(ids)
    with llama_cpp.Llama(tmp_path / "base.gguf", loras={tmp_path / "lora.gguf": 1.0}) as llama:
        return alone, llama.logits(ids)


# Cases that differ from others in their name only.
SECONDARY = {"gemma4_unified", "iquestcoder", "llava", "pixtral", "qwen2_5_vl", "xverse"}
SECONDARY |= configs_recurrent.SECONDARY


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SECONDARY else case for case in CASES]
)
def test_llama_cpp_gives_logits_of_base_plus_adapter(tmp_path, case):
    model_type, changes, keys = CASES[case]
    base, adapter, plain, tuned = prepare(tmp_path, model_type, changes, keys)
    alone, both = llama_cpp_logits(tmp_path, base, adapter, prompt(model_type))
    tolerance = 1e-3 if ARCHITECTURES[model_type].gelu else 1e-5
    assert relative_error(alone, plain) < tolerance
    close(both, tuned, plain, tolerance)


def test_comparison_fails_if_rows_are_not_reordered(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_adapter, "place", lambda arch, args, path: [Placement(path)])
    base, adapter, _, tuned = prepare(tmp_path, "llama", {}, ("self_attn.q_proj", "self_attn.k_proj"))
    assert relative_error(llama_cpp_logits(tmp_path, base, adapter)[1], tuned) > 2e-3


def test_sum_of_two_adapters(tmp_path):
    """llama.cpp with both files or with their sum gives the same logits as mlx-lm with the exported sum."""
    base, first, plain, _ = prepare(tmp_path, "llama", {}, ("self_attn.q_proj",))
    (tmp_path / "two").mkdir()
    _, second, _, _ = prepare(tmp_path / "two", "llama", {}, ("self_attn.q_proj", "mlp.up_proj"), seed=8)
    flags = ["--adapter-path", first, "--weight", "1", "--adapter-path", second, "--weight", "0.5"]
    assert export("mlx", base, tmp_path / "sum", *flags) == 0
    tuned = logits(load(str(base), adapter_path=str(tmp_path / "sum"))[0])
    assert export("gguf", base, tmp_path / "base.gguf", "--type", "f32") == 0
    assert export("gguf-lora", base, tmp_path / "sum.gguf", *flags) == 0
    files = {tmp_path / "first.gguf": (first, 1.0), tmp_path / "second.gguf": (second, 0.5)}
    for file, (adapter, _) in files.items():
        assert export("gguf-lora", base, file, "--adapter-path", adapter) == 0
    apart = {file: factor for file, (_, factor) in files.items()}
    for loras in ({tmp_path / "sum.gguf": 1.0}, apart):
        with llama_cpp.Llama(tmp_path / "base.gguf", loras=loras) as llama:
            close(llama.logits(PROMPT), tuned, plain, 1e-5)
    one = {tmp_path / "first.gguf": 1.0}  # the second adapter has an effect
    with llama_cpp.Llama(tmp_path / "base.gguf", loras=one) as llama:
        effect_of(tuned, llama.logits(PROMPT), 1e-5)


@pytest.mark.parametrize(
    ("model_type", "changes", "keys", "attach", "message"),
    [
        ("llama", {}, ("model.embed_tokens",), adapt, "both embedding and output head"),
        ("llama", {}, ("mlp.up_proj",), adapt_dora, "no dora adapters"),
        ("iquestloopcoder", {}, ("mlp.up_proj",), adapt, "cannot be exported to GGUF"),
    ],
)
def test_unsupported_adapters_are_rejected(tmp_path, capsys, model_type, changes, keys, attach, message):
    base, adapter, *_ = prepare(tmp_path, "llama", changes, keys, attach)
    path = base / "config.json"
    path.write_text(path.read_text().replace('"llama"', f'"{model_type}"'))
    if model_type != "llama":
        path.write_text(path.read_text().replace("{", '{"head_dim": 16, "attention_bias": false, ', 1))
    assert export("gguf-lora", base, tmp_path / "out" / "lora.gguf", "--adapter-path", adapter) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("attach", [adapt, adapt_dora])
def test_merge_into_gguf_is_exact(tmp_path, attach):
    """LoRA and DoRA, on linear layers, embedding and head."""
    base, adapter, plain, tuned = prepare(tmp_path, "llama", UNTIED, (*HEAD, "self_attn.k_proj"), attach)
    assert export("gguf", base, tmp_path / "whole.gguf", "--type", "f32", "--adapter-path", adapter) == 0
    with llama_cpp.Llama(tmp_path / "whole.gguf") as llama:
        close(llama.logits(PROMPT), tuned, plain, 1e-5)


# Linear layers where llama.cpp would load an adapter and not apply it.
IGNORED = [
    ("gemma3n", "altup.modality_router", 1e-3),
    ("gemma4_text", "model.per_layer_model_projection", 1e-3),
    *((model_type, key, 1e-5) for model_type, key in IGNORED_LAYERS),
    *(
        ("minicpm3", f"self_attn.{name}", 1e-5)
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    ),
]


@pytest.mark.parametrize(("model_type", "key", "tolerance"), IGNORED)
def test_adapters_that_llama_cpp_ignores_are_rejected(
    tmp_path, monkeypatch, capsys, model_type, key, tolerance
):
    base, adapter, plain, tuned = prepare(tmp_path, model_type, {}, (key,))
    flags = ["--adapter-path", adapter]
    assert export("gguf-lora", base, tmp_path / "lora.gguf", *flags) == 2
    assert "cannot have an adapter here" in capsys.readouterr().err
    monkeypatch.setattr(Placement, "takes_lora", True)
    alone, both = llama_cpp_logits(tmp_path, base, adapter)
    assert relative_error(both, alone) == 0
    assert export("gguf", base, tmp_path / "whole.gguf", "--type", "f32", *flags) == 0
    with llama_cpp.Llama(tmp_path / "whole.gguf") as llama:
        assert relative_error(llama.logits(PROMPT), tuned) < tolerance < relative_error(plain, tuned) / 10


@pytest.mark.parametrize(
    "model_type",
    ["mixtral", "internlm2", "phi3", "openelm", "lille-130m", "plamo", "gpt_neox", "nemotron-nas"],
)
def test_merge_of_experts_and_fused_projections_is_exact(tmp_path, model_type):
    base, adapter, plain, tuned = prepare(tmp_path, model_type, {}, KEYS.get(model_type))
    assert export("gguf", base, tmp_path / "whole.gguf", "--type", "f32", "--adapter-path", adapter) == 0
    with llama_cpp.Llama(tmp_path / "whole.gguf") as llama:
        close(llama.logits(PROMPT), tuned, plain, 1e-3 if ARCHITECTURES[model_type].gelu else 1e-5)


def test_fully_trained_weights_are_exported(tmp_path):
    model, config = build("llama")
    base = save(tmp_path / "base", model, config)
    plain = logits(model)
    name = "model.layers.5.mlp.up_proj.weight"
    weight = -model.model.layers[5].mlp.up_proj.weight
    files = {
        "adapters.safetensors": storage.arrays_writer({name: weight}),
        "adapter_config.json": storage.json_writer({"fine_tune_type": "full", "num_layers": 1}),
    }
    storage.write_directory(tmp_path / "full", files)
    model.model.layers[5].mlp.up_proj.weight = weight
    assert (
        export("gguf", base, tmp_path / "whole.gguf", "--type", "f32", "--adapter-path", tmp_path / "full")
        == 0
    )
    with llama_cpp.Llama(tmp_path / "whole.gguf") as llama:
        close(llama.logits(PROMPT), logits(model), plain, 1e-5)


def test_metadata_describes_the_adapter_without_local_paths(tmp_path):
    base, adapter, *_ = prepare(tmp_path, "llama", {}, ("mlp.up_proj",))
    assert export("gguf-lora", base, tmp_path / "lora.gguf", "--adapter-path", adapter) == 0
    fields = gguf.GGUFReader(tmp_path / "lora.gguf").fields
    metadata = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert metadata["general.type"] == "adapter"
    assert metadata["general.architecture"] == "llama"
    assert metadata["adapter.type"] == "lora"
    np.testing.assert_allclose(metadata["adapter.lora.alpha"], 12)
    assert str(tmp_path).encode() not in (tmp_path / "lora.gguf").read_bytes()
