"""nalora fuse: how much of the adapter's effect is kept, which files are written, and which errors come first."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import generate
from mlx_lm.models import llama, nanochat, qwen3_moe
from mlx_lm.utils import dequantize_model, load

from nalora_mlx import cli
from nalora_mlx.__main__ import main
from nalora_mlx.adapters import merge_quality
from nalora_mlx.adapters.attach import adapt, adapt_dora
from nalora_mlx.adapters.files import adapter_config, adapter_weights, load_adapter
from nalora_mlx.adapters.merge import fuse_model
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.export.model_card import without_paths
from tests.conftest import build_model, llama_args, random_adapters
from tests.logit_comparison import close

WIDE = llama_args(
    hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, eos_token_id=2
)
QUANTIZED = {"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}}
MOE = WIDE | {
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}


def quantized_model(seed=0, gain=1.0):
    model = build_model(seed, args=WIDE, gain=gain)
    nn.quantize(model, 64, 4)
    mx.eval(model.parameters())
    return model


def set_relative_size(model, size):
    """Scale every update to `size` times the norm of its weight."""
    for path, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(len(path)))
            update = mx.linalg.norm(module.delta())
            module.lora_b = module.lora_b * (size * mx.linalg.norm(plain(module.linear)) / update)


def plain(layer):
    """Return the weight of a layer in float32, dequantized if necessary."""
    if "scales" not in layer:
        return layer.weight.astype(mx.float32)
    how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **how)


@pytest.fixture
def quantized(tokenizer_directory, tmp_path):
    """A 4-bit model in groups of 64 and an adapter of relative size 0.1: (base, adapter)."""
    return save_both(tokenizer_directory, tmp_path, quantized_model(), 0.1)


def save_both(tokenizer_directory, tmp_path, model, size, config=WIDE | QUANTIZED):
    base = shutil.copytree(tokenizer_directory, tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(base / "model.safetensors"), dict(tree_flatten(model.parameters())))
    adapt(model, NALoRAConfig(num_layers=-1, rank=4, scale=2.0))
    set_relative_size(model, size)
    return base, save_adapter(model, tmp_path / "adapter")


def save_adapter(model, directory):
    files = {
        "adapters.safetensors": storage.arrays_writer(adapter_weights(model)),
        "adapter_config.json": storage.json_writer(adapter_config(model)),
    }
    storage.write_directory(directory, files)
    return directory


def fuse(base, adapter, output, *flags):
    return main(
        ["fuse", "--model", str(base), "--adapter-path", str(adapter), "--save-path", str(output), *flags]
    )


X = mx.array([[1, 5, 11, 14, 8, 9, 30, 2]])


# --- how much of the effect is kept ------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "most"), [(8, 0.1), (None, 1.5)])
def test_error_of_the_effect_at_a_relative_update_of_a_tenth(bits, most):
    """The error of the merged weights relative to the update."""
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
    if bits is None:  # why the default is 8 bits
        assert min(errors) > 0.5


def plain_weights(model):
    return {path: plain(m) for path, m in model.named_modules() if "scales" in m}


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
    load_adapter(ours, adapter)
    fuse_model(ours)
    np.testing.assert_array_equal(np.array(ours(X)), np.array(fused(X)))
    # Layers without an adapter keep their bits.
    before, after = (mx.load(str(path / "model.safetensors")) for path in (base, tmp_path / "fused"))
    name = "model.embed_tokens.weight"
    assert before[name].dtype == mx.uint32
    assert mx.array_equal(before[name], after[name])
    done = capsys.readouterr()
    verdict, basis, merged = done.out.splitlines()[:3]
    same = r"(100|9[5-9](\.\d)?)% same first choice"
    assert re.fullmatch(rf"the merged model answers like base \+ adapter: {same}", verdict)
    alone = r"the base alone: [0-9.]+%"
    assert re.fullmatch(rf"  \(over 128 tokens in answers to 8 general questions; {alone}\)", basis)
    assert "KL" not in done.out + done.err
    assert "KL divergence from base + adapter" in (tmp_path / "fused" / "README.md").read_text()
    assert merged.startswith(f"merged 21 layers into {tmp_path / 'fused'} (")
    assert done.err == "merging, and comparing answers before and after; this may take a minute\n"


BASES = {  # (module, args, group size, bits, mode)
    "affine": (llama, WIDE, 64, 4, "affine"),
    "mxfp4": (llama, WIDE, 32, 4, "mxfp4"),
    "experts": (qwen3_moe, MOE, 64, 4, "affine"),
}
# Flags -> maximum error relative to the effect, which is mostly lost at 4 bits.
MODES = {(): 0.1, ("--dequantize",): 0.05, ("--bits", "same", "--force"): 2.0}


@pytest.mark.parametrize("kind", BASES)
def test_every_mode_reloads_in_unmodified_mlx_lm(tokenizer_directory, tmp_path, kind):
    module, args, group_size, bits, mode = BASES[kind]
    model = build_model(module=module, args=args, gain=1.0)

    def predicate(path, layer):
        return hasattr(layer, "to_quantized") and not path.endswith("mlp.gate")

    nn.quantize(model, group_size, bits, mode=mode, class_predicate=predicate)
    config = args | {"quantization": {"group_size": group_size, "bits": bits, "mode": mode}}
    base, adapter = save_both(tokenizer_directory, tmp_path, model, 0.1, config)
    alone, tuned = (load(str(base), adapter_path=a)[0](X) for a in (None, str(adapter)))
    for flags, most in MODES.items():
        output = tmp_path / "-".join(["fused", *flags])
        assert fuse(base, adapter, output, *flags) == 0
        theirs = load(str(output))[0]
        error = mx.linalg.norm(theirs(X) - tuned) / mx.linalg.norm(tuned - alone)
        assert error.item() < most, flags
        ours, _ = load(str(base))
        load_adapter(ours, adapter)
        dequantize = "--dequantize" in flags
        fuse_model(ours, None if "same" in flags else 8, dequantize)
        ours = dequantize_model(ours) if dequantize else ours
        np.testing.assert_array_equal(np.array(theirs(X)), np.array(ours(X)))
        assert any("scales" in m for _, m in theirs.named_modules()) != dequantize


def test_mlx_lm_generate_answers_like_base_and_adapter(quantized, tmp_path):
    base, adapter = quantized
    assert fuse(base, adapter, tmp_path / "fused") == 0
    prompt, count = "what colour is the cat ?", 8
    answers = []
    for path in (None, str(adapter)):
        model, tokenizer = load(str(base), adapter_path=path)
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answers.append(generate(model, tokenizer, text, max_tokens=count))
    assert answers[0] != answers[1]
    flags = ["--prompt", prompt, "--max-tokens", str(count), "--temp", "0", "--verbose", "False"]
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(tmp_path / "fused"), *flags]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == answers[1].strip()


def test_a_merge_that_loses_the_effect_is_refused_before_writing(tokenizer_directory, tmp_path, capsys):
    base, adapter = save_both(tokenizer_directory, tmp_path, quantized_model(gain=2.0), 0.02)
    assert fuse(base, adapter, tmp_path / "fused", "--bits", "same") == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(
        r"--bits same: the merged model loses most of the adapter's effect: [0-9.]+% same first choice", error
    )
    assert "give --bits 8 or --dequantize, or --force" in error
    assert not (tmp_path / "fused").exists()
    assert fuse(base, adapter, tmp_path / "fused", "--bits", "same", "--force") == 0
    assert capsys.readouterr().out.startswith("the merged model loses most of the adapter's effect: ")
    assert fuse(base, adapter, tmp_path / "dense", "--dequantize") == 0
    assert "quantization" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_errors_on_a_full_precision_base_do_not_mention_bits(tokenizer_directory, tmp_path, capsys):
    """An update below the resolution of bfloat16: neither --bits nor --dequantize would help."""
    model = build_model(args=WIDE, dtype=mx.bfloat16, gain=8.0)
    base, adapter = save_both(tokenizer_directory, tmp_path, model, 3e-4, WIDE)
    assert fuse(base, adapter, tmp_path / "fused") == 2
    error = capsys.readouterr().err
    assert f"--model {base}: the merged model loses most of the adapter's effect" in error
    assert "use the adapter unmerged, or give --force" in error
    assert "--bits" not in error
    assert fuse(base, adapter, tmp_path / "fused", "--dequantize") == 2
    assert "--dequantize: the merged model loses" in capsys.readouterr().err


def test_rows_that_are_not_a_multiple_of_the_group_size_are_refused(tokenizer_directory, tmp_path, capsys):
    args = WIDE | {"hidden_size": 48, "intermediate_size": 48}
    model = build_model(args=args, gain=1.0)
    # MLX has no embedding lookup for such rows.
    nn.quantize(model, 16, 4, mode="nvfp4", class_predicate=lambda _, layer: isinstance(layer, nn.Linear))
    config = args | {"quantization": {"group_size": 16, "bits": 4, "mode": "nvfp4"}}
    base, adapter = save_both(tokenizer_directory, tmp_path, model, 0.1, config)
    assert fuse(base, adapter, tmp_path / "fused") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has rows of 48 elements, which is not a multiple of the group size 32" in error
    assert "give --bits same or --dequantize" in error
    assert fuse(base, adapter, tmp_path / "fused", "--dequantize") == 0


def test_experts_with_one_scale_each(tokenizer_directory, tmp_path, capsys):
    """mlx-lm's dequantize_model skips these layers."""
    model = build_model(module=qwen3_moe, args=MOE, gain=1.0)
    special = {"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": True}
    path = "model.layers.1.mlp.switch_mlp.up_proj"
    layer = model.model.layers[1].mlp.switch_mlp
    exact = layer.up_proj.weight = layer.up_proj.weight * mx.array([1.0, 3.0, 0.3, 10.0])[:, None, None]
    layer.up_proj = layer.up_proj.to_quantized(**special)
    config = MOE | {"quantization": {"group_size": 16, "bits": 4, "mode": "nvfp4", path: special}}
    base, adapter = save_both(tokenizer_directory, tmp_path, model, 0.1, config)
    assert fuse(base, adapter, tmp_path / "fused") == 2
    assert f"{path} has one scale per expert; give --dequantize" in capsys.readouterr().err
    assert fuse(base, adapter, tmp_path / "fused", "--dequantize") == 0
    arrays = dict(mx.load(str(adapter / "adapters.safetensors")))
    # MLX runs such a layer on a GPU only, so that the weights are compared.
    update = 2.0 * (arrays[f"{path}.lora_b"] @ arrays[f"{path}.lora_a"])
    fused = dict(mx.load(str(tmp_path / "fused" / "model.safetensors")))[f"{path}.weight"]
    for given, wanted in zip(fused, exact + update, strict=True):
        assert (mx.linalg.norm(given - wanted) / mx.linalg.norm(wanted)).item() < 0.15


def test_an_adapter_without_effect_is_merged(model_directory, tmp_path, capsys):
    model = build_model()
    adapt(model, NALoRAConfig(num_layers=-1))
    assert fuse(model_directory, save_adapter(model, tmp_path / "adapter"), tmp_path / "fused") == 0
    done = capsys.readouterr()
    assert "adapter: 100% same first choice\n" in done.out
    assert "the base alone: 100%)" in done.out
    assert "note: the adapter hardly changes the answers" in done.err


def test_an_adapter_that_is_barely_trained_is_merged(tokenizer_directory, tmp_path, capsys):
    """Rounding is as large as its effect, but no answer shows either."""
    base, adapter = save_both(tokenizer_directory, tmp_path, quantized_model(gain=2.0), 0.003)
    base = base.rename(tmp_path / "a base")
    assert fuse(base, adapter, tmp_path / "fused") == 0
    loss, effect = measured(tmp_path / "fused")
    assert 0.5 * effect < loss < merge_quality.NEGLIGIBLE
    done = capsys.readouterr()
    assert "answers like base + adapter" in done.out
    command = f"nalora chat --model '{base}' --adapter-path {adapter} --compare"
    assert (
        f"note: the adapter hardly changes the answers to these questions; ask it your own: {command}"
        in done.err
    )


def measured(fused):
    """Return the divergences in a model card: of the merged model and of the base from base + adapter."""
    found = re.search(
        r"from base \+ adapter (\S+) nats \(base alone: (\S+)\)", (fused / "README.md").read_text()
    )
    return float(found[1]), float(found[2])


@pytest.mark.parametrize(
    ("loss", "effect", "lost"),
    [(1e-4, 0.0, False), (1.9e-3, 1e-4, False), (2.1e-3, 1e-4, True), (0.4, 1.0, False), (0.6, 1.0, True)],
)
def test_a_merge_is_lost_by_an_absolute_and_a_relative_scale(loss, effect, lost):
    assert merge_quality.MergeQuality(loss, 0.9, effect, 0.5, 100).mostly_lost == lost


def test_only_all_equal_choices_are_a_hundred_percent():
    quality = merge_quality.MergeQuality(1e-3, 1 - 1 / 5000, 1.0, 0.123456, 5000)
    assert quality.verdict.endswith("answers like base + adapter: 99.9% same first choice")
    assert quality.basis.startswith("over 5000 tokens")
    assert quality.basis.endswith("the base alone: 12.3%")
    assert "answers mostly like" in merge_quality.MergeQuality(1e-3, 0.9, 1.0, 0.5, 100).verdict


def test_next_steps_run_as_they_are_printed(model_directory, tmp_path, capsys):
    """Paths are quoted for a shell."""
    model = build_model()
    adapt(model, NALoRAConfig(num_layers=-1))
    random_adapters(model)
    adapter, output = save_adapter(model, tmp_path / "adapter"), tmp_path / "tuned; it's mine"
    assert fuse(model_directory, adapter, output) == 0
    lines = capsys.readouterr().out.partition("\nnext:\n")[2].splitlines()
    chat, export = (shlex.split(line)[1:] for line in lines)
    assert chat == ["nalora", "chat", "--model", str(output)]
    assert export[:6] == ["nalora", "export", "gguf", "--model", str(output), "--type"]
    assert export[-1] == f"{output.name}.gguf"
    for name, *arguments in (chat[1:], export[1:]):
        cli.command(name).build_parser(name).parse_args(arguments)


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
    assert merge_quality._distance(*arrays) == pytest.approx((kl, same), rel=1e-5)
    assert merge_quality._distance(arrays[0], arrays[0]) == (0.0, 1.0)


@pytest.mark.parametrize("attach", [adapt, adapt_dora])
def test_the_reference_holds_the_adapted_model_and_the_base(attach, tokenizer):
    plain = build_model()
    model = build_model()
    attach(model, NALoRAConfig(num_layers=2, scale=4.0, keys=("mlp.gate_proj", "self_attn.q_proj")))
    random_adapters(model)
    model.eval()
    tuned = model(X)
    reference = merge_quality.take_reference(model, tokenizer)
    assert mx.array_equal(model(X), tuned)  # the adapters are back
    sample = reference.samples[0]
    assert 0 < len(sample.tokens) - sample.prompt_length <= merge_quality.ANSWER_TOKENS
    for m, found in ((model, reference.tuned), (plain, reference.base)):
        logits = np.array(m(mx.array([sample.tokens]))[0], np.float64)
        want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(np.array(found[0]), want[sample.prompt_length - 1 : -1], rtol=0, atol=1e-4)
    # The answer is greedy: each token is the adapted model's top token.
    np.testing.assert_array_equal(
        np.array(reference.tuned[0]).argmax(-1), sample.tokens[sample.prompt_length :]
    )
    kept = reference.compare(plain)
    assert kept.loss == pytest.approx(kept.effect, rel=1e-4)
    assert kept.effect > 1e-3
    assert kept.mostly_lost
    assert not reference.compare(model).mostly_lost


# --- files ------------------------------------------------------------------------------------------

GENERATION = {"temperature": 0.3, "eos_token_id": [2]}
HEAD = "---\nlicense: apache-2.0\nlibrary_name: mlx\nbase_model: [somebody/original]\nlanguage: [en]\n---\n# A card\n"


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


def test_a_complete_model_is_written(whole, tmp_path, monkeypatch):
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
    plain, _ = load(str(base))
    close(np.array(theirs(X)), np.array(tuned(X)), np.array(plain(X)), 1e-5)
    message = [{"role": "user", "content": "what is the cat ?"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == original.apply_chat_template(
        message, tokenize=False
    )
    assert tokenizer.eos_token_ids == original.eos_token_ids


def test_the_model_card_describes_the_model_without_local_paths(whole, tmp_path):
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


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/no/such/place", "place"),
        ("~/data", "data"),
        ("../secret/data/", "data"),
        ("home/me/secret/data", "data"),
        ("C:\\Users\\me\\data", "data"),
        ("C:/Users/me/data", "data"),
        (["/home/me/a", "mlp.up_proj"], "a, mlp.up_proj"),
        ({"path": "/home/me/data", "rows": 3}, "path: data, rows: 3"),
        ("owner/data", "owner/data"),
        (0.5, 0.5),
    ],
)
def test_the_model_card_shows_the_last_part_of_a_path(value, shown):
    assert without_paths(value) == shown


# --- the Hub -----------------------------------------------------------------------------------------


def test_upload(whole, tmp_path, hub, capsys):
    assert fuse(*whole, tmp_path / "fused", "--upload-repo", "me/tuned") == 0
    assert hub.calls[0] == ("create", "me/tuned", True)
    assert hub.calls[1][:2] == ("upload", "me/tuned")
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= set(hub.calls[1][2])
    assert "uploaded to https://huggingface.co/me/tuned" in capsys.readouterr().out
    assert "# me/tuned" in (tmp_path / "fused" / "README.md").read_text()


def test_a_failed_upload_keeps_the_model_and_names_its_directory(whole, tmp_path, hub, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(hub, "upload_folder", fail)
    assert fuse(*whole, tmp_path / "fused", "--upload-repo", "me/tuned") == 1
    error = capsys.readouterr().err
    assert "no network" in error
    assert str(tmp_path / "fused") in error
    assert (tmp_path / "fused" / "model.safetensors").exists()


def test_an_impossible_upload_is_refused_first(whole, tmp_path, hub, monkeypatch, capsys):
    import huggingface_hub

    assert fuse(*whole, tmp_path / "fused", "--upload-repo", "a/b/c") == 2
    assert "--upload-repo a/b/c" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert fuse(*whole, tmp_path / "fused", "--upload-repo", "me/tuned") == 2
    assert "hf auth login" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()
    assert hub.calls == []


def test_gguf_of_an_unsupported_architecture_is_refused_before_writing(whole, tmp_path, capsys):
    pytest.importorskip("gguf")
    base, adapter = whole
    other = shutil.copytree(base, tmp_path / "other")
    args = llama_args(model_type="nanochat")
    weights = dict(tree_flatten(build_model(module=nanochat, args=args).parameters()))
    mx.save_safetensors(str(other / "model.safetensors"), weights)
    (other / "config.json").write_text(json.dumps(args))
    assert fuse(other, adapter, tmp_path / "fused", "--export-gguf") == 2
    assert "model_type nanochat: cannot be exported to GGUF" in capsys.readouterr().err
    (tmp_path / "mine.gguf").write_text("mine")
    flags = ["--export-gguf", "--gguf-path", str(tmp_path / "mine.gguf")]
    assert fuse(base, adapter, tmp_path / "fused", *flags) == 2
    assert "mine.gguf: exists" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()


def test_gguf_of_an_unsupported_tokenizer_is_refused_before_writing(whole, tmp_path, capsys):
    pytest.importorskip("gguf")
    base, adapter = whole
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    assert fuse(base, adapter, tmp_path / "fused", "--export-gguf") == 2
    assert "tokenizer.json: is a WordLevel tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()
