"""`nalora export peft` and `export mlx --from-peft`: transformers + PEFT give the same logits as mlx."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.convert import convert
from mlx_lm.utils import load

from nalora_mlx.__main__ import main
from nalora_mlx.adapters.attach import adapt, adapt_dora
from nalora_mlx.adapters.files import adapter_config, adapter_weights, load_any_adapter
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.export.peft_names import MODEL_TYPES
from tests.conftest import random_adapters
from tests.interop.gguf_models import CONFIGS, PROMPT, build, logits, save
from tests.interop.test_peft_models import MULTIMODAL, TYPES

torch = pytest.importorskip("torch", reason="needs PyTorch: see CONTRIBUTING.md")
peft = pytest.importorskip("peft", reason="needs PEFT: see CONTRIBUTING.md")

# Config changes for transformers: special tokens inside the vocabulary, and the same GELU as mlx-lm.
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
CONFIG_CHANGES = {
    "gemma": {"hidden_act": "gelu_python"},
    "hunyuan_v1_dense": {"head_dim": 16},
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
FROM_TRANSFORMERS = {t.removesuffix("_text") if t.startswith("qwen") else t for t in TYPES}
FROM_TRANSFORMERS |= {model_type for model_type, *_ in MULTIMODAL.values()}


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


# tests/interop/test_peft_models.py has the others.
FROM_MLX = [t for t in MODEL_TYPES if t not in FROM_TRANSFORMERS]


def test_every_model_type_is_compared():
    assert set(FROM_MLX) <= set(CONFIGS)


@pytest.mark.parametrize("model_type", FROM_MLX)
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


def peft_adapter(base, tmp_path, **settings):
    """Create a random adapter with PEFT; return transformers' model and the directory as PEFT saves it by default."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings)
    theirs = peft.get_peft_model(reference(base, tmp_path), config)
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    return theirs, tmp_path / "theirs"


def change_arrays(adapter, change):
    path = adapter / "adapter_model.safetensors"
    mx.save_safetensors(str(path), change(dict(mx.load(str(path)))), metadata={"format": "pt"})


def check_import(base, adapter, output, expected):
    """Convert a PEFT adapter; mlx-lm's logits must be the expected ones, and far from the base's."""
    assert export("mlx", base, None, output, "--from-peft", adapter) == 0
    back, _ = load(str(base), adapter_path=str(output))
    plain, _ = load(str(base))
    np.testing.assert_allclose(logits(back), expected, rtol=0, atol=TOLERANCE)
    assert np.abs(logits(plain) - expected).max() > 100 * TOLERANCE


# --- copies of the base's embedding in PEFT's files --------------------------------------------------

COPIES = {
    "untied": (UNTIED, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "head": (UNTIED, {"target_modules": ["lm_head"]}),
    "tied": ({}, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
}


@pytest.mark.parametrize("case", COPIES)
def test_copies_of_the_base_are_left_out(tmp_path, capsys, case):
    changes, settings = COPIES[case]
    base = save(tmp_path / "base", *build("llama", **TOKENS | changes))
    theirs, adapter = peft_adapter(base, tmp_path, **settings)
    copies = [
        k for k in mx.load(str(adapter / "adapter_model.safetensors")) if k.endswith(".base_layer.weight")
    ]
    assert copies
    expected = torch_logits(theirs)
    check_import(base, adapter, tmp_path / "back", expected)
    left_out = next(
        line for line in capsys.readouterr().err.splitlines() if line.startswith("note: left out")
    )
    assert all(
        f"{key.removeprefix('base_model.model.').replace('.base_layer', '')}" in left_out for key in copies
    )
    # PEFT on a model in half precision saves these copies in its dtype.
    for dtype in (mx.bfloat16, mx.float16):
        narrow = tmp_path / str(dtype)
        shutil.copytree(adapter, narrow)
        change_arrays(narrow, lambda a, t=dtype: {k: v.astype(t) if k in copies else v for k, v in a.items()})
        check_import(base, narrow, tmp_path / f"back-{dtype}", expected)


def trained(array):
    array[5, 7] += 1e-3
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            trained,
            "lm_head.weight differs from the model's: it was trained, or is another model's; merge the adapter",
        ),
        (
            lambda a: mx.concatenate([a, a[:2]]),
            "lm_head.weight is (322, 64), the model has (320, 64): the vocabulary",
        ),
    ],
)
def test_trained_or_resized_embeddings_are_rejected(tmp_path, capsys, change, message):
    base = save(tmp_path / "base", *build("llama", **TOKENS | UNTIED))
    _, adapter = peft_adapter(base, tmp_path, target_modules=["lm_head"])
    name = "base_model.model.lm_head.base_layer.weight"
    change_arrays(adapter, lambda arrays: arrays | {name: change(arrays[name])})
    assert export("mlx", base, None, tmp_path / "back", "--from-peft", adapter) == 2
    assert message in capsys.readouterr().err
    # As PEFT saves a resized vocabulary, and full copies of modules_to_save.
    change_arrays(
        adapter, lambda a: {k.replace(".base_layer", ""): v for k, v in a.items() if ".lora_" not in k}
    )
    assert export("mlx", base, None, tmp_path / "back", "--from-peft", adapter) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def quantize(base, output, mode):
    convert(
        str(base),
        str(output),
        quantize=True,
        q_group_size=32,
        q_mode=mode,
        q_bits=8 if mode == "affine" else 4,
    )
    return output


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_copies_for_a_quantized_base(tmp_path, capsys, mode):
    """A copy that quantizes to the model's weight is its original; other copies cannot be told from trained ones."""
    base = save(tmp_path / "base", *build("llama", **TOKENS | UNTIED))
    quantized = quantize(base, tmp_path / "quantized", mode)
    _, adapter = peft_adapter(base, tmp_path, target_modules=["lm_head", "k_proj"])
    assert export("mlx", quantized, None, tmp_path / "back", "--from-peft", adapter) == 0
    name = "base_model.model.lm_head.base_layer.weight"
    change_arrays(adapter, lambda arrays: arrays | {name: arrays[name] * 1.1})
    assert export("mlx", quantized, None, tmp_path / "other", "--from-peft", adapter) == 2
    assert "give the unquantized base as --model; the result fits both" in capsys.readouterr().err


# --- DoRA --------------------------------------------------------------------------------------------

DORA = {"use_dora": True, "target_modules": ["k_proj", "gate_proj"]}


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora_with_patterns(tmp_path, name):
    """Magnitudes are named as in old and new versions of PEFT; ranks and scales differ between layers."""
    base = save(tmp_path / "base", *build("llama", **TOKENS))
    patterns = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 5, r".*\.2\.mlp\.gate_proj": 1}}
    theirs, adapter = peft_adapter(base, tmp_path, **DORA | patterns)
    change_arrays(adapter, lambda a: {k.replace("lora_magnitude_vector", name): v for k, v in a.items()})
    check_import(base, adapter, tmp_path / "back", torch_logits(theirs))


def test_dora_on_a_quantized_base(tmp_path):
    """PEFT on the dequantized weights gives the logits of mlx-lm on the quantized ones."""
    base = save(tmp_path / "base", *build("llama", **TOKENS))
    quantized = quantize(base, tmp_path / "quantized", "affine")
    convert(str(quantized), str(tmp_path / "dense"), dequantize=True)
    theirs, adapter = peft_adapter(tmp_path / "dense", tmp_path, **DORA)
    check_import(quantized, adapter, tmp_path / "back", torch_logits(theirs))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            DORA | {"target_modules": ["embed_tokens"]},
            "is a DoRA of an embedding, which PEFT computes differently",
        ),
        ({"target_modules": ["embed_tokens"]}, "the adapter changes only one of them"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias is True"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 6]]}, "layer_replication is"),
    ],
)
def test_what_peft_saves_and_mlx_lm_lacks(tmp_path, capsys, settings, message):
    base = save(tmp_path / "base", *build("llama", **TOKENS))
    _, adapter = peft_adapter(base, tmp_path, **settings)
    assert export("mlx", base, None, tmp_path / "back", "--from-peft", adapter) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", ["LoKrConfig", "LoHaConfig", "VeraConfig", "IA3Config", "OFTConfig", "BOFTConfig"]
)
def test_other_kinds_of_adapters(tmp_path, capsys, kind):
    base = save(tmp_path / "base", *build("llama", **TOKENS))
    settings = {"target_modules": ["q_proj"]} | ({"feedforward_modules": []} if kind == "IA3Config" else {})
    theirs = peft.get_peft_model(reference(base, tmp_path), getattr(peft, kind)(**settings))
    theirs.save_pretrained(tmp_path / "theirs")
    assert export("mlx", base, None, tmp_path / "back", "--from-peft", tmp_path / "theirs") == 2
    assert f"peft_type is '{kind.removesuffix('Config').upper()}'" in capsys.readouterr().err


# --- patterns ----------------------------------------------------------------------------------------


def test_patterns_and_rslora_are_converted(tmp_path):
    """rank_pattern, alpha_pattern and rank-stabilized scaling give the same logits in PEFT and mlx-lm."""
    base = save(tmp_path / "base", *build("llama", **TOKENS))
    theirs, adapter = peft_adapter(
        base,
        tmp_path,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"v_proj": 2, r".*\.1\.mlp\.up_proj": 5},
        alpha_pattern={"v_proj": 3},
        layers_to_transform=[0, 1, 4],
    )
    check_import(base, adapter, tmp_path / "back", torch_logits(theirs))
