"""nalora fuse on checkpoints with tensors that mlx-lm does not use: what is left behind, and what --keep-all keeps."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_moe
from mlx_lm.utils import load

from nalora_mlx.adapters import merge_quality
from nalora_mlx.adapters.attach import adapt
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.core.tensor_files import copy_with_replaced, open_tensor_file
from nalora_mlx.export.merged_model import keep_names
from nalora_mlx.models.loading import load_module
from nalora_mlx.models.stored_tensors import StoredTensors, find_stored_tensors
from tests.adapters.test_vlm import TEXT, VISION
from tests.commands.test_fuse import MOE, fuse, save_adapter
from tests.commands.test_fuse_files import config_of
from tests.conftest import build_model, random_adapters
from tests.logit_comparison import close

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
}
PIXELS = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64}
IDS = {"image_token_id": 60, "video_token_id": 62, "vision_start_token_id": 61}
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT |= {"image_size": 16, "patch_size": 4}
# Classes of transformers with their configs, and the prefixes of what mlx-lm does not use.
CASES = {
    "Gemma3": (
        {
            "text_config": SMALL | {"num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 16},
            "vision_config": VIT,
            "mm_tokens_per_image": 16,
        },
        ["multi_modal_projector", "vision_tower"],
    ),
    "Qwen3VL": (
        {
            "text_config": SMALL
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
            "vision_config": PIXELS
            | {"depth": 1, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **IDS,
        },
        ["model.visual"],
    ),
    "Qwen3_5": (  # mlx-lm adds 1 to its norms and transposes its convolutions
        {
            "text_config": SMALL
            | {"num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2}
            | {"linear_key_head_dim": 16, "linear_value_head_dim": 16},
            "vision_config": PIXELS | {"depth": 1, "num_position_embeddings": 16},
            **IDS,
        },
        ["model.visual"],
    ),
}
X = [1, 5, 11, 14, 8, 9, 30, 2]


@pytest.fixture(autouse=True)
def _short_comparison(monkeypatch):
    monkeypatch.setattr(merge_quality, "PROMPTS", merge_quality.PROMPTS[:1])
    monkeypatch.setattr(merge_quality, "ANSWER_TOKENS", 4)


def logits(model):
    return np.array(model(mx.array([X])))[0]


def add_adapter(base, directory, **settings):
    """Save an adapter for a base; return its directory and the logits of the base alone and with it."""
    model, _ = load_module(str(base))
    alone = logits(model)
    adapt(model, NALoRAConfig(num_layers=-1, rank=4, scale=4.0, **settings))
    random_adapters(model)
    return save_adapter(model, directory), alone, logits(model)


def tensors(directory):
    """Return dtype, shape and bytes of all tensors in a directory's files."""
    found = {}
    for path in Path(directory).glob("*.safetensors"):
        file, content = open_tensor_file(path), path.read_bytes()
        for name, entry in file.tensors.items():
            begin, end = (file.start + offset for offset in entry["data_offsets"])
            found[name] = (entry["dtype"], entry["shape"], content[begin:end])
    return found


@pytest.mark.parametrize("kind", CASES)
def test_a_model_with_its_vision_tower_loads_in_transformers(tokenizer_directory, tmp_path, capsys, kind):
    torch = pytest.importorskip("torch")
    import transformers

    config, prefixes = CASES[kind]
    torch.manual_seed(0)
    transformer = getattr(transformers, f"{kind}ForConditionalGeneration")
    theirs = transformer(getattr(transformers, f"{kind}Config")(**config)).eval()
    for parameter in theirs.parameters():
        spread, mean = (0.3, 0) if parameter.ndim > 1 else (0.1, 0.9)
        torch.nn.init.normal_(parameter, mean, spread)
    base, fused, kept = tmp_path / "base", tmp_path / "fused", tmp_path / "kept"
    theirs.save_pretrained(base)
    shutil.copytree(tokenizer_directory, base, dirs_exist_ok=True)
    adapter, alone, tuned = add_adapter(base, tmp_path / "adapter")
    capsys.readouterr()
    assert fuse(base, adapter, fused) == 0
    err = capsys.readouterr().err
    before, after = tensors(base), tensors(fused)
    assert not any(prefix in name for name in after for prefix in prefixes)
    for prefix in prefixes:
        group = {name: size for name, (_, _, size) in before.items() if name.startswith(f"{prefix}.")}
        assert f"{prefix} ({len(group)} tensors, {sum(map(len, group.values())) / 1000:.3g} kB)" in err
    assert "; --keep-all keeps it" in err
    same_names = kind == "Gemma3"
    assert ("only programs based on mlx-lm load the model" in err) != same_names

    assert fuse(base, adapter, kept, "--keep-all") == 0
    assert "--keep-all" not in capsys.readouterr().err
    after = tensors(kept)
    assert {name: value[:2] for name, value in after.items()} == {n: value[:2] for n, value in before.items()}
    changed = {name for name in before if before[name] != after[name]}
    assert len(changed) == len(
        {name.rpartition(".")[0] for name in mx.load(str(adapter / "adapters.safetensors"))}
    )
    assert not any(name.startswith(tuple(prefixes)) for name in changed)
    for path in base.iterdir():
        if path.name == "config.json":
            assert config_of(kept) == json.loads(path.read_text())
        elif path.name not in ("model.safetensors", "README.md"):
            assert (kept / path.name).read_bytes() == path.read_bytes()
    for directory in (fused, kept):
        close(logits(load_module(str(directory))[0]), tuned, alone, 1e-5)
    with torch.no_grad():
        again = transformer.from_pretrained(kept)(torch.tensor([X])).logits[0].numpy()
    close(again, tuned, alone, 1e-4)


def save_mlx_vlm_model(base, tokenizer_directory, quantized):
    """Save a model of mlx-vlm in two shards; its language tower may be quantized."""
    from mlx_vlm.models.qwen2_5_vl import Model
    from mlx_vlm.models.qwen2_5_vl.config import ModelConfig, TextConfig, VisionConfig

    text = TEXT | {"hidden_size": 64, "intermediate_size": 128}
    vision = VISION | {"out_hidden_size": 64, "hidden_size": 64, "model_type": "qwen2_5_vl"}
    config = {
        "model_type": "qwen2_5_vl",
        "image_token_id": 60,
        "vision_start_token_id": 61,
        "video_token_id": 62,
    }
    mx.random.seed(0)
    model = Model(ModelConfig(text_config=TextConfig(**text), vision_config=VisionConfig(**vision), **config))
    how = {"group_size": 64, "bits": 4, "mode": "affine"}
    if quantized:
        tower = "vision_tower" if quantized == "vision" else "language_model"
        nn.quantize(
            model,
            64,
            4,
            class_predicate=lambda p, m: (
                p.startswith(tower) and isinstance(m, nn.Linear) and m.weight.shape[-1] % 64 == 0
            ),
        )
        config |= {"quantization": how, "quantization_config": how}
    shutil.copytree(tokenizer_directory, base)
    # Flat, as it was when the model was published.
    (base / "config.json").write_text(json.dumps(text | config | {"vision_config": vision}))
    weights = dict(tree_flatten(model.parameters()))
    names, half = list(weights), len(weights) // 2
    files = {
        "model-00001-of-00002.safetensors": names[:half],
        "model-00002-of-00002.safetensors": names[half:],
    }
    for file, part in files.items():
        mx.save_safetensors(str(base / file), {name: weights[name] for name in part}, {"format": "mlx"})
    weight_map = {name: file for file, part in files.items() for name in part}
    size = sum(array.nbytes for array in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("quantized", [None, "language"])
def test_a_model_with_its_vision_tower_loads_in_mlx_vlm(tokenizer_directory, tmp_path, quantized):
    utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed (pip install '.[vlm]')")
    base, kept = tmp_path / "base", tmp_path / "kept"
    save_mlx_vlm_model(base, tokenizer_directory, quantized)
    adapter, alone, tuned = add_adapter(base, tmp_path / "adapter")
    assert fuse(base, adapter, kept, "--keep-all") == 0
    model = utils.load_model(kept)
    found = np.array(model(mx.array([X])).logits)[0]
    # In 8 bits, a merge loses about 6 % of an effect of this size.
    error = np.linalg.norm(found - tuned) / np.linalg.norm(alone - tuned)
    assert error < (0.06 if quantized else 1e-5)
    np.testing.assert_allclose(found, logits(load_module(str(kept))[0]), rtol=0, atol=1e-5)
    before, after = tensors(base), tensors(kept)
    assert before.keys() == after.keys()
    assert all(before[name] == after[name] for name in before if "vision_tower" in name or "norm" in name)
    index = json.loads((kept / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        names = {name for name, home in index["weight_map"].items() if home == file}
        assert open_tensor_file(kept / file).tensors.keys() == names
        assert open_tensor_file(kept / file).metadata == {"format": "mlx"}
    assert index["metadata"]["total_size"] == sum(len(content) for _, _, content in after.values())
    same = config_of(kept) == json.loads((base / "config.json").read_text())
    assert same == (quantized is None)
    if quantized:
        assert fuse(base, adapter, tmp_path / "dense", "--keep-all", "--dequantize") == 0
        model = utils.load_model(tmp_path / "dense")
        close(np.array(model(mx.array([X])).logits)[0], tuned, alone, 1e-4)
        dense = tensors(tmp_path / "dense")
        assert not any(name.endswith((".scales", ".biases")) for name in dense)
        index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == dense.keys()
        assert index["metadata"]["total_size"] == sum(len(content) for _, _, content in dense.values())
        assert "quantization" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_bits_of_layers_stand_under_the_names_of_the_files_too():
    """mlx-vlm looks them up there; a base in mxfp4 gets biases when a layer is merged in 8 bits."""
    names = {f"language_model.up.{leaf}": f"model.up.{leaf}" for leaf in ("weight", "scales")}
    kept = keep_names(StoredTensors([], names, []), ["language_model.up"], [])
    assert kept.arrays["language_model.up.biases"] == "model.up.biases"
    bits = {"bits": 4, "language_model.up": {"bits": 8}}
    assert kept.quantization(bits) == bits | {"model.up": {"bits": 8}}
    assert kept.quantization(None) is None


def one_error(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_kept_tensors_stay_quantized(tokenizer_directory, tmp_path, capsys):
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (pip install '.[vlm]')")
    base = tmp_path / "base"
    save_mlx_vlm_model(base, tokenizer_directory, "vision")
    adapter, *_ = add_adapter(base, tmp_path / "adapter")
    assert fuse(base, adapter, tmp_path / "kept", "--keep-all", "--dequantize") == 2
    assert "vision_tower.blocks.0.attn.proj is quantized and kept" in one_error(capsys)


def stacked_experts(directory, tokenizer_directory):
    """Save a model with one tensor per expert, as transformers 4 does; mlx-lm stacks them."""
    base = shutil.copytree(tokenizer_directory, directory)
    model = build_model(module=qwen3_moe, args=MOE, gain=1.0)
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        if "switch_mlp" in name:
            for i, part in enumerate(array):
                weights[name.replace("switch_mlp", f"experts.{i}")] = part
        else:
            weights[name] = array
    # A layer for multi-token prediction, which mlx-lm does not load, and a buffer.
    weights |= {"mtp.layers.0.norm.weight": mx.ones(64), "mtp.fc.weight": mx.ones((64, 64))}
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "pt"})
    (base / "config.json").write_text(json.dumps(MOE))
    return base, set(weights)


def test_experts_that_are_stored_one_by_one_cannot_be_kept(
    tokenizer_directory, tmp_path, capsys, monkeypatch
):
    # mlx-lm's class refuses unknown tensors; others drop those of a layer for multi-token prediction as this one.
    sanitize = qwen3_moe.Model.sanitize

    def without_mtp(self, weights):
        return sanitize(self, {name: array for name, array in weights.items() if not name.startswith("mtp.")})

    monkeypatch.setattr(qwen3_moe.Model, "sanitize", without_mtp)
    base, names = stacked_experts(tmp_path / "base", tokenizer_directory)
    stored = find_stored_tensors(load(str(base))[0], base)
    assert set(stored.unused) == {name for name in names if name.startswith("mtp.")}
    assert stored.describe_unused() == "mtp (2 tensors, 16.6 kB)"
    assert set(stored.names.values()) == {
        n for n in names if ".experts." not in n and not n.startswith("mtp.")
    }
    adapter, *_ = add_adapter(base, tmp_path / "adapter")
    capsys.readouterr()
    assert fuse(base, adapter, tmp_path / "kept", "--keep-all") == 2
    error = one_error(capsys)
    assert "model.layers.0.mlp.switch_mlp.up_proj.weight" in error
    assert "self_attn" not in error
    assert not (tmp_path / "kept").exists()
    # Without adapters on experts, they are copied as they are.
    adapter, alone, tuned = add_adapter(base, tmp_path / "attention", keys=("self_attn.q_proj",))
    assert fuse(base, adapter, tmp_path / "kept", "--keep-all") == 0
    before, after = tensors(base), tensors(tmp_path / "kept")
    assert {name for name in before if before[name] != after[name]} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)
    }
    close(logits(load(str(tmp_path / "kept"))[0]), tuned, alone, 1e-5)


def test_a_copy_with_replaced_tensors_keeps_the_others_in_any_dtype(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    original = {
        "f8": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "f64": torch.randn(2, 3, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
        "changed": torch.randn(4, 4).bfloat16(),
        "gone": torch.ones(3),
    }
    save_file(original, tmp_path / "a.safetensors", {"format": "pt", "x": "é"})
    turned = mx.arange(16).reshape(4, 4).astype(mx.bfloat16).T
    new = {"changed": turned, "gone": None, "bytes": mx.array([1, 2, 3], mx.uint8), "one": mx.array(2.0)}
    copy_with_replaced(open_tensor_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", new)
    assert open_tensor_file(tmp_path / "b.safetensors").metadata == {"format": "pt", "x": "é"}
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == (original.keys() | new.keys()) - {"gone"}
    for name in ("f8", "f64", "flags", "empty", "scalar"):
        assert found[name].dtype == original[name].dtype
        assert found[name].shape == original[name].shape
        assert tensors(tmp_path)[name][2] == bytes(
            original[name].contiguous().view(-1).view(torch.uint8).numpy()
        )
    np.testing.assert_array_equal(found["changed"].float().numpy(), np.arange(16).reshape(4, 4).T)
    assert found["changed"].dtype == torch.bfloat16
    assert found["bytes"].tolist() == [1, 2, 3]
    assert found["one"].item() == 2
    # Elements are aligned, as programs that map the file expect.
    for entry in open_tensor_file(tmp_path / "b.safetensors").tensors.values():
        assert entry["data_offsets"][0] % {"F64": 8, "F32": 4, "BF16": 2}.get(entry["dtype"], 1) == 0
