"""`nalora export gguf-lora`: llama.cpp computes base + adapter, from the base's GGUF and the adapter's."""

import numpy as np
import pytest
from mlx_lm.utils import load

from nalora_mlx.__main__ import main
from nalora_mlx.adapters.attach import adapt, adapt_dora
from nalora_mlx.adapters.files import adapter_config, adapter_weights
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.export import gguf_adapter
from nalora_mlx.export.gguf_architectures import ARCHITECTURES
from tests.conftest import random_adapters
from tests.effect import close, effect_of, relative_error
from tests.interop import llama_cpp
from tests.interop.gguf_models import PROMPT, build, logits, save

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'nalora-mlx[export]'")
llama_cpp.require()

GELU = {"gemma", "gemma2", "gemma3_text", "starcoder2"}  # ggml looks GELU up in a table of float16
UNTIED = {"tie_word_embeddings": False}
HEAD = ("mlp.down_proj", "model.embed_tokens", "lm_head")
TIED_OLMO2 = ("mlp.up_proj", "model.embed_tokens")
# Case: (model type, changes of its config, keys; None for all linear layers).
CASES = {name: (name, {}, None) for name in ARCHITECTURES}
CASES |= {
    "untied embedding and head": ("llama", UNTIED, HEAD),
    "embedding that has its own head in GGUF": ("olmo2", {"tie_word_embeddings": True}, TIED_OLMO2),
    "eight experts": ("mixtral", {"num_local_experts": 8}, ("block_sparse_moe.switch_mlp.gate_proj",)),
}


def prepare(tmp_path, model_type, changes, keys, attach=adapt, seed=7):
    """(base directory, adapter directory, logits of the base, of base + adapter)."""
    model, config = build(model_type, **changes)
    base = save(tmp_path / "base", model, config)
    plain = logits(model)
    attach(model, NALoRAConfig(num_layers=-1, rank=4, scale=3.0, keys=keys))
    random_adapters(model, seed=seed, size=0.1)
    model.eval()
    files = {
        "adapters.safetensors": storage.arrays_writer(adapter_weights(model)),
        "adapter_config.json": storage.json_writer(adapter_config(model)),
    }
    storage.write_directory(tmp_path / "adapter", files)
    return base, tmp_path / "adapter", plain, logits(model)


def export(format, base, output, *flags):
    return main(["export", format, "--model", str(base), "--output", str(output), *map(str, flags)])


def with_adapter(tmp_path, base, adapter):
    """llama.cpp's logits for the base and for base + adapter."""
    assert export("gguf", base, tmp_path / "base.gguf", "--type", "f32") == 0
    assert export("gguf-lora", base, tmp_path / "lora.gguf", "--adapter-path", adapter) == 0
    with llama_cpp.Llama(tmp_path / "base.gguf") as llama:
        alone = llama.logits(PROMPT)
    with llama_cpp.Llama(tmp_path / "base.gguf", loras={tmp_path / "lora.gguf": 1.0}) as llama:
        return alone, llama.logits(PROMPT)


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_base_plus_adapter(tmp_path, case):
    model_type, changes, keys = CASES[case]
    base, adapter, plain, tuned = prepare(tmp_path, model_type, changes, keys)
    alone, both = with_adapter(tmp_path, base, adapter)
    tolerance = 1e-3 if model_type in GELU else 1e-5
    assert relative_error(alone, plain) < tolerance
    close(both, tuned, plain, tolerance)


def test_the_comparison_notices_rows_that_are_not_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_adapter, "tensor_rows", lambda arch, args, path: [(path, None)])
    base, adapter, _, tuned = prepare(tmp_path, "llama", {}, ("self_attn.q_proj", "self_attn.k_proj"))
    assert relative_error(with_adapter(tmp_path, base, adapter)[1], tuned) > 2e-3


def test_two_adapters_in_one_file(tmp_path):
    """With factors: what llama.cpp makes of both files, and mlx-lm of the sum that `export mlx` writes."""
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
    one = {tmp_path / "first.gguf": 1.0}  # that the second matters too
    with llama_cpp.Llama(tmp_path / "base.gguf", loras=one) as llama:
        effect_of(tuned, llama.logits(PROMPT), 1e-5)


@pytest.mark.parametrize(
    ("model_type", "changes", "keys", "attach", "message"),
    [
        ("llama", {}, ("model.embed_tokens",), adapt, "embedding and head in one"),
        ("llama", {}, ("mlp.up_proj",), adapt_dora, "no dora adapters"),
        ("seed_oss", {}, ("mlp.up_proj",), adapt, "no GGUF export"),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused(tmp_path, capsys, model_type, changes, keys, attach, message):
    base, adapter, *_ = prepare(tmp_path, "llama", changes, keys, attach)
    path = base / "config.json"
    path.write_text(path.read_text().replace('"llama"', f'"{model_type}"'))
    if model_type != "llama":
        path.write_text(path.read_text().replace("{", '{"head_dim": 16, "attention_bias": false, ', 1))
    assert export("gguf-lora", base, tmp_path / "out" / "lora.gguf", "--adapter-path", adapter) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("attach", [adapt, adapt_dora])
def test_a_merge_on_the_way_to_gguf_is_exact(tmp_path, attach):
    """LoRA and DoRA, experts and fused projections apart, weight by weight in float32."""
    base, adapter, plain, tuned = prepare(tmp_path, "llama", UNTIED, (*HEAD, "self_attn.k_proj"), attach)
    assert export("gguf", base, tmp_path / "whole.gguf", "--type", "f32", "--adapter-path", adapter) == 0
    with llama_cpp.Llama(tmp_path / "whole.gguf") as llama:
        close(llama.logits(PROMPT), tuned, plain, 1e-5)


@pytest.mark.parametrize("model_type", ["mixtral", "internlm2", "phi3"])
def test_a_merge_of_experts_and_shared_projections_is_exact(tmp_path, model_type):
    base, adapter, plain, tuned = prepare(tmp_path, model_type, {}, None)
    assert export("gguf", base, tmp_path / "whole.gguf", "--type", "f32", "--adapter-path", adapter) == 0
    with llama_cpp.Llama(tmp_path / "whole.gguf") as llama:
        close(llama.logits(PROMPT), tuned, plain, 1e-5)


def test_fully_trained_weights_go_into_gguf(tmp_path):
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


def test_the_file_says_what_it_is_and_not_where_it_was_made(tmp_path):
    base, adapter, *_ = prepare(tmp_path, "llama", {}, ("mlp.up_proj",))
    assert export("gguf-lora", base, tmp_path / "lora.gguf", "--adapter-path", adapter) == 0
    fields = gguf.GGUFReader(tmp_path / "lora.gguf").fields
    said = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert said["general.type"] == "adapter"
    assert said["general.architecture"] == "llama"
    assert said["adapter.type"] == "lora"
    np.testing.assert_allclose(said["adapter.lora.alpha"], 12)
    assert str(tmp_path).encode() not in (tmp_path / "lora.gguf").read_bytes()
