"""Fuse: what is kept of an adapter, what is written beside the weights, and what is refused before anything is."""

import json
import math
import shutil
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load

from nalora_mlx import checkpoint, fidelity
from nalora_mlx.__main__ import main
from nalora_mlx.adapters import adapt, adapt_dora, adapter_description, adapter_weights, fuse_model
from nalora_mlx.config import NALoRAConfig
from tests.conftest import build_model, llama_args, random_adapters

WIDE = llama_args(
    hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, eos_token_id=2
)


def quantized_model(seed=0):
    model = build_model(seed, args=WIDE, gain=1.0)
    nn.quantize(model, 64, 4)
    mx.eval(model.parameters())
    return model


def set_relative_size(model, size):
    """Give every update a norm of `size` times that of the weight that it changes."""
    for path, module in model.named_modules():
        if "lora_b" in module:
            linear = module.linear
            weight = mx.dequantize(
                linear.weight, linear.scales, linear.biases, linear.group_size, linear.bits
            )
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(len(path)))
            update = mx.linalg.norm(module.lora_a @ module.lora_b) * module.scale
            module.lora_b = module.lora_b * (size * mx.linalg.norm(weight) / update)


@pytest.fixture
def quantized(tokenizer_directory, tmp_path):
    """A 4-bit model in groups of 64 and an adapter of relative size 0.1: (base, adapter)."""
    return save_both(tokenizer_directory, tmp_path, quantized_model(), 0.1)


def save_both(tokenizer_directory, tmp_path, model, size):
    base = shutil.copytree(tokenizer_directory, tmp_path / "base")
    config = WIDE | {"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}}
    (base / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(base / "model.safetensors"), dict(tree_flatten(model.parameters())))
    adapt(model, NALoRAConfig(num_layers=-1, rank=4, scale=2.0))
    set_relative_size(model, size)
    return base, save_adapter(model, tmp_path / "adapter")


def save_adapter(model, directory):
    files = {
        "adapters.safetensors": checkpoint.arrays_writer(adapter_weights(model)),
        "adapter_config.json": checkpoint.json_writer(adapter_description(model)),
    }
    checkpoint.write_directory(directory, files)
    return directory


def fuse(base, adapter, output, *flags):
    return main(
        ["fuse", "--model", str(base), "--adapter-path", str(adapter), "--save-path", str(output), *flags]
    )


X = mx.array([[1, 5, 11, 14, 8, 9, 30, 2]])


# --- how much of the effect is left ------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "most"), [(8, 0.1), (None, 1.5)])
def test_error_of_the_effect_at_a_relative_update_of_a_tenth(bits, most):
    """Weights, so that nothing else is in it: the error of the merged update, relative to the update."""
    model = quantized_model()
    before = plain_weights(model)
    adapt(model, NALoRAConfig(num_layers=-1, rank=4, scale=2.0))
    set_relative_size(model, 0.1)
    updates = {
        path: module.scale * (module.lora_a @ module.lora_b).T
        for path, module in model.named_modules()
        if "lora_a" in module
    }
    fuse_model(model, bits)
    after = plain_weights(model)
    errors = [
        (mx.linalg.norm(after[p] - before[p] - u) / mx.linalg.norm(u)).item() for p, u in updates.items()
    ]
    assert max(errors) < most
    if bits is None:  # what the default is there for
        assert min(errors) > 0.5


def plain_weights(model):
    return {
        path: mx.dequantize(m.weight, m.scales, m.biases, m.group_size, m.bits)
        for path, m in model.named_modules()
        if "scales" in m
    }


def test_fusing_a_quantized_base_keeps_the_effect_and_reloads_in_unmodified_mlx_lm(
    quantized, tmp_path, capsys
):
    base, adapter = quantized
    assert fuse(base, adapter, tmp_path / "fused") == 0
    plain, _ = load(str(base))
    tuned, _ = load(str(base), adapter_path=str(adapter))
    fused, _ = load(str(tmp_path / "fused"))
    effect = mx.linalg.norm(tuned(X) - plain(X))
    assert (mx.linalg.norm(fused(X) - tuned(X)) / effect).item() < 0.1
    ours, _ = load(str(base))
    from nalora_mlx.adapters import load_adapter

    load_adapter(ours, adapter)
    fuse_model(ours)
    np.testing.assert_array_equal(np.array(ours(X)), np.array(fused(X)))
    # Layers without an adapter have the bits that they had.
    before, after = (mx.load(str(path / "model.safetensors")) for path in (base, tmp_path / "fused"))
    name = "model.embed_tokens.weight"
    assert before[name].dtype == mx.uint32
    assert mx.array_equal(before[name], after[name])
    assert "kept: KL divergence" in capsys.readouterr().out


def test_a_merge_that_loses_the_effect_is_refused_before_anything_is_written(
    tokenizer_directory, tmp_path, capsys
):
    base, adapter = save_both(tokenizer_directory, tmp_path, quantized_model(), 0.02)
    assert fuse(base, adapter, tmp_path / "fused", "--bits", "same") == 2
    assert "loses most of what the adapter does" in (error := capsys.readouterr().err)
    assert "give --bits 8 or --dequantize, or --force" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "fused").exists()
    assert fuse(base, adapter, tmp_path / "fused", "--bits", "same", "--force") == 0
    assert fuse(base, adapter, tmp_path / "dense", "--dequantize") == 0
    assert "quantization" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_an_adapter_without_effect_is_no_reason_to_refuse(model_directory, tmp_path, capsys):
    model = build_model()
    adapt(model, NALoRAConfig(num_layers=-1))
    assert fuse(model_directory, save_adapter(model, tmp_path / "adapter"), tmp_path / "fused") == 0
    assert "no measurable effect" in capsys.readouterr().out


# --- the measure -------------------------------------------------------------------------------------


def test_divergence_and_agreement_against_float64():
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(n, 7)) for n in (3, 5)]
    tuned = [a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in logits]
    shifted = [a + rng.normal(size=a.shape) for a in logits]
    other = [a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in shifted]
    kl = np.concatenate([(np.exp(p) * (p - q)).sum(-1) for p, q in zip(tuned, other, strict=True)]).mean()
    same = np.concatenate([p.argmax(-1) == q.argmax(-1) for p, q in zip(tuned, other, strict=True)]).mean()
    arrays = [[mx.array(a.astype(np.float32)) for a in part] for part in (tuned, other)]
    assert fidelity._distance(*arrays) == pytest.approx((kl, same), rel=1e-5)
    assert fidelity._distance(arrays[0], arrays[0]) == (0.0, 1.0)


@pytest.mark.parametrize("attach", [adapt, adapt_dora])
def test_the_reference_is_the_adapted_model_and_the_base_alone(attach, tokenizer):
    plain = build_model()
    model = build_model()
    attach(model, NALoRAConfig(num_layers=2, scale=4.0, keys=("mlp.gate_proj", "self_attn.q_proj")))
    random_adapters(model)
    model.eval()
    tuned = model(X)
    reference = fidelity.take_reference(model, tokenizer)
    assert mx.array_equal(model(X), tuned)  # the adapters are back
    text = reference.texts[0]
    assert 0 < len(text.tokens) - text.prompt <= fidelity.ANSWER
    for m, found in ((model, reference.tuned), (plain, reference.base)):
        logits = np.array(m(mx.array([text.tokens]))[0], np.float64)
        want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(np.array(found[0]), want[text.prompt - 1 : -1], rtol=0, atol=1e-4)
    # The answer is the adapted model's own: each token is its first choice.
    np.testing.assert_array_equal(np.array(reference.tuned[0]).argmax(-1), text.tokens[text.prompt :])
    kept = reference.compare(plain)
    assert kept.loss == pytest.approx(kept.effect, rel=1e-4)
    assert kept.effect > 1e-3
    assert kept.mostly_lost
    assert not reference.compare(model).mostly_lost


# --- what stands beside the weights ------------------------------------------------------------------

GENERATION = {"temperature": 0.3, "eos_token_id": [2]}
HEAD = "---\nlicense: apache-2.0\nbase_model: [somebody/original]\nlanguage: [en]\n---\n# A card\n"


@pytest.fixture
def whole(model_directory, tmp_path):
    """A base with a generation config and a card, and an adapter with metrics: (base, adapter)."""
    base = shutil.copytree(model_directory, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(GENERATION))
    (base / "README.md").write_text(HEAD)
    model = build_model()
    adapt(model, NALoRAConfig(num_layers=-1, rank=4, scale=4.0))
    random_adapters(model)
    adapter = save_adapter(model, tmp_path / "adapter")
    description = json.loads((adapter / "adapter_config.json").read_text())
    description |= {"data": str(tmp_path / "secret" / "bakery"), "model": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(description))
    run = {
        "settings": {"iters": 40, "learning_rate": 1e-3},
        "data": {"train": {"rows": 60, "supervised": 512}},
    }
    (adapter / "run.json").write_text(json.dumps(run))
    lines = [
        {"split": "valid", "step": 0, "loss": 3.5},
        {"split": "train", "step": 4, "loss": 2.0, "layers": {}},
    ]
    lines += [{"split": "valid", "step": 40, "loss": 0.25}, {"split": "test", "loss": 0.5}]
    (adapter / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{cut")
    return base, adapter


def test_everything_that_a_model_needs_is_written(whole, tmp_path, monkeypatch):
    import mlx_lm.utils

    def small_shards(weights, **_):
        names = list(weights)
        return [{n: weights[n] for n in names[i : i + 12]} for i in range(0, len(names), 12)]

    monkeypatch.setattr(mlx_lm.utils, "make_shards", small_shards)
    base, adapter = whole
    assert fuse(base, adapter, tmp_path / "fused") == 0
    written = {path.name for path in (tmp_path / "fused").iterdir()}
    count = math.ceil(len(tree_flatten(build_model().parameters())) / 12)
    shards = {f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
    assert count > 1
    index = json.loads((tmp_path / "fused" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards
    assert written >= shards | {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert json.loads((tmp_path / "fused" / "generation_config.json").read_text()) == GENERATION
    theirs, tokenizer = load(str(tmp_path / "fused"))
    tuned, original = load(str(base), adapter_path=str(adapter))
    np.testing.assert_allclose(np.array(theirs(X)), np.array(tuned(X)), rtol=0, atol=2e-5)
    message = [{"role": "user", "content": "what is the cat ?"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == original.apply_chat_template(
        message, tokenize=False
    )
    assert tokenizer.eos_token_ids == original.eos_token_ids


def test_the_card_says_what_it_is_and_nothing_of_this_machine(whole, tmp_path):
    from huggingface_hub import ModelCard

    base, adapter = whole
    assert fuse(base, adapter, tmp_path / "my-tune") == 0
    text = (tmp_path / "my-tune" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert "secret" not in text
    for row in ("data | bakery", "iters | 40", "training rows | 60", "supervised tokens | 512"):
        assert f"| {row} |" in text
    assert "validation loss before | 3.5000" in text
    assert "validation loss after | 0.2500 (iteration 40)" in text
    assert "test loss | 0.5000" in text
    assert "| rank | 4 |" in text
    assert "NA-LoRA" in text
    assert "KL divergence" in text
    card = ModelCard.load(tmp_path / "my-tune" / "README.md").data
    assert (card.base_model, card.license, card.library_name) == ("somebody/original", "apache-2.0", "mlx")
    assert {"mlx", "lora"} <= set(card.tags)


# --- the Hub -----------------------------------------------------------------------------------------


class FakeApi:
    """Records what would be sent."""

    calls: ClassVar[list] = []

    def create_repo(self, repo_id, exist_ok):
        self.calls.append(("create", repo_id, exist_ok))

    def upload_folder(self, folder_path, repo_id, commit_message):
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return FakeApi


def test_upload(whole, tmp_path, hub, capsys):
    assert fuse(*whole, tmp_path / "fused", "--upload-repo", "me/tuned") == 0
    assert hub.calls[0] == ("create", "me/tuned", True)
    assert hub.calls[1][:2] == ("upload", "me/tuned")
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= set(hub.calls[1][2])
    assert "uploaded to https://huggingface.co/me/tuned" in capsys.readouterr().out
    assert "# me/tuned" in (tmp_path / "fused" / "README.md").read_text()


def test_a_failed_upload_keeps_the_model_and_says_so(whole, tmp_path, hub, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(hub, "upload_folder", fail)
    assert fuse(*whole, tmp_path / "fused", "--upload-repo", "me/tuned") == 1
    error = capsys.readouterr().err
    assert "no network" in error
    assert str(tmp_path / "fused") in error
    assert (tmp_path / "fused" / "model.safetensors").exists()


def test_an_upload_that_cannot_work_is_refused_first(whole, tmp_path, hub, monkeypatch, capsys):
    import huggingface_hub

    assert fuse(*whole, tmp_path / "fused", "--upload-repo", "a/b/c") == 2
    assert "--upload-repo a/b/c" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert fuse(*whole, tmp_path / "fused", "--upload-repo", "me/tuned") == 2
    assert "hf auth login" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()
    assert hub.calls == []


def test_gguf_of_an_unknown_architecture_is_refused_before_the_model_is_written(whole, tmp_path, capsys):
    pytest.importorskip("gguf")
    base, adapter = whole
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "seed_oss", "head_dim": 8}))
    assert fuse(base, adapter, tmp_path / "fused", "--export-gguf") == 2
    assert "no GGUF export for it" in capsys.readouterr().err
    (base / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.gguf").write_text("mine")
    flags = ["--export-gguf", "--gguf-path", str(tmp_path / "mine.gguf")]
    assert fuse(base, adapter, tmp_path / "fused", *flags) == 2
    assert "mine.gguf: exists" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()
