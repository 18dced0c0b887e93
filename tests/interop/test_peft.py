"""`nalora export peft` and `export mlx --from-peft`: transformers + PEFT give the same logits as mlx."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load

from nalora_mlx.__main__ import main
from nalora_mlx.adapters.attach import adapt, adapt_dora
from nalora_mlx.adapters.files import adapter_config, adapter_weights, load_any_adapter
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.export.peft import MODEL_TYPES
from tests.conftest import random_adapters
from tests.interop.gguf_models import PROMPT, build, logits, save

torch = pytest.importorskip("torch", reason="needs PyTorch: see CONTRIBUTING.md")
peft = pytest.importorskip("peft", reason="needs PEFT: see CONTRIBUTING.md")

# Config changes for transformers: special tokens inside the vocabulary, and the same GELU as mlx-lm.
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
CONFIG_CHANGES = {
    "gemma": {"hidden_act": "gelu_python"},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "starcoder2": {"hidden_act": "gelu"},
}
# Names of an expert's projections in transformers. mlx-lm stacks all experts of a layer in one tensor.
EXPERTS = {
    "mixtral": ("block_sparse_moe", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}),
    "qwen3_moe": ("mlp", {name: name for name in ("gate_proj", "down_proj", "up_proj")}),
}
# PEFT has no adapters of experts.
KEYS = {
    "mixtral": ("self_attn.q_proj", "self_attn.o_proj"),
    "qwen3_moe": ("self_attn.q_proj", "self_attn.v_proj"),
}
TOLERANCE = 1e-4


def save_adapter(model, directory):
    files = {
        "adapters.safetensors": storage.arrays_writer(adapter_weights(model)),
        "adapter_config.json": storage.json_writer(adapter_config(model)),
    }
    storage.write_directory(directory, files)


def export(format, base, adapter, output, *flags):
    where = ["--model", str(base), "--output", str(output)]
    source = ["--adapter-path", str(adapter)] if adapter else []
    return main(["export", format, *where, *source, *map(str, flags)])


def reference(base, tmp_path):
    """Load the base model in transformers, with its weights renamed and experts unstacked."""
    from transformers import AutoModelForCausalLM

    model_type = json.loads((base / "config.json").read_text())["model_type"]
    if model_type in EXPERTS:
        parent, names = EXPERTS[model_type]
        weights = {}
        for path, array in dict(mx.load(str(base / "model.safetensors"))).items():
            stem, _, rest = path.partition(f".{parent}.switch_mlp.")
            if rest:
                name = names[rest.removesuffix(".weight")]
                for expert, part in enumerate(array):
                    weights[f"{stem}.{parent}.experts.{expert}.{name}.weight"] = part
            else:
                weights[path] = array
        base = shutil.copytree(base, tmp_path / "unstacked")
        mx.save_safetensors(str(base / "model.safetensors"), weights, metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0].numpy()


def prepare(tmp_path, model_type, attach=adapt, **settings):
    """Create a base and an adapter; return their directories and the logits of base and base + adapter."""
    changes = settings.pop("changes", {})
    model, config = build(model_type, **TOKENS | CONFIG_CHANGES.get(model_type, {}) | changes)
    base = save(tmp_path / "base", model, config)
    plain = logits(model)
    attach(model, NALoRAConfig(**{"num_layers": -1, "rank": 4, "scale": 3.0} | settings))
    random_adapters(model, size=0.1)
    model.eval()
    save_adapter(model, tmp_path / "adapter")
    tuned = logits(model)
    assert np.abs(tuned - plain).max() > 100 * TOLERANCE
    return base, tmp_path / "adapter", plain, tuned


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_peft_gives_the_same_logits(tmp_path, model_type):
    base, adapter, plain, tuned = prepare(tmp_path, model_type, keys=KEYS.get(model_type))
    assert export("peft", base, adapter, tmp_path / "peft") == 0
    theirs = reference(base, tmp_path)
    np.testing.assert_allclose(torch_logits(theirs), plain, rtol=0, atol=TOLERANCE)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft")
    np.testing.assert_allclose(torch_logits(theirs), tuned, rtol=0, atol=TOLERANCE)


# --- both directions ---------------------------------------------------------------------------------

UNTIED = {"tie_word_embeddings": False}
WITH_HEAD = ("self_attn.q_proj", "mlp.down_proj", "model.embed_tokens", "lm_head")
CASES = {
    "untied embedding and head": (adapt, {"keys": WITH_HEAD, "changes": UNTIED}),
    "tied embedding": (adapt, {"keys": ("mlp.up_proj", "model.embed_tokens")}),
    "last layers": (adapt, {"num_layers": 2, "scale": 0.7}),
    "dora": (adapt_dora, {"keys": ("self_attn.k_proj", "mlp.gate_proj"), "rank": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip(tmp_path, case):
    attach, settings = CASES[case]
    base, adapter, _, tuned = prepare(tmp_path, "llama", attach, **settings)
    if attach is adapt_dora:  # magnitudes as after training
        adapter, tuned = move_magnitudes(tmp_path, base, adapter)
    assert export("peft", base, adapter, tmp_path / "peft") == 0
    theirs = peft.PeftModel.from_pretrained(reference(base, tmp_path), tmp_path / "peft")
    np.testing.assert_allclose(torch_logits(theirs), tuned, rtol=0, atol=TOLERANCE)
    # An adapter saved by PEFT converts back to the same logits.
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert export("mlx", base, None, tmp_path / "back", "--from-peft", tmp_path / "theirs") == 0
    back, _ = load(str(base))
    load_any_adapter(back, tmp_path / "back")
    back.eval()
    np.testing.assert_allclose(logits(back), tuned, rtol=0, atol=1e-5)
    theirs, _ = load(str(base), adapter_path=str(tmp_path / "back"))
    np.testing.assert_allclose(logits(theirs), tuned, rtol=0, atol=1e-5)


def move_magnitudes(tmp_path, base, adapter):
    moved = shutil.copytree(adapter, tmp_path / "moved")
    arrays = dict(mx.load(str(adapter / "adapters.safetensors")))
    arrays |= {
        name: a * (1 + 0.3 * mx.sin(mx.arange(a.size))) for name, a in arrays.items() if name.endswith(".m")
    }
    mx.save_safetensors(str(moved / "adapters.safetensors"), arrays)
    model, _ = load(str(base))
    load_any_adapter(model, moved)
    model.eval()
    return moved, logits(model)


def test_patterns_and_rslora_are_converted(tmp_path):
    """rank_pattern, alpha_pattern and rank-stabilized scaling give the same logits in PEFT and mlx-lm."""
    base = save(tmp_path / "base", *build("llama", **TOKENS))
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"v_proj": 2, r".*\.1\.mlp\.up_proj": 5},
        alpha_pattern={"v_proj": 3},
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(reference(base, tmp_path), config)
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    theirs.eval()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    expected = torch_logits(theirs)
    assert export("mlx", base, None, tmp_path / "back", "--from-peft", tmp_path / "theirs") == 0
    back, _ = load(str(base), adapter_path=str(tmp_path / "back"))
    plain, _ = load(str(base))
    np.testing.assert_allclose(logits(back), expected, rtol=0, atol=TOLERANCE)
    assert np.abs(logits(plain) - expected).max() > 100 * TOLERANCE
