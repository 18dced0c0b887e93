"""`nalora export mlx` and `peft`: scaling, summing and converting adapters, rejected input, and interruption."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_moe
from mlx_lm.utils import load

from nalora_mlx.__main__ import main
from nalora_mlx.adapters.attach import adapt, adapt_dora
from nalora_mlx.adapters.files import adapter_config, adapter_weights, load_any_adapter, load_weights
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.export import updates
from nalora_mlx.export.lazy_model import open_model
from tests.conftest import build_model, llama_args, random_adapters
from tests.interop import gguf_models
from tests.logit_comparison import close

X = mx.array([[1, 5, 11, 14, 8, 9, 30, 2]])
MOE = llama_args(
    model_type="qwen3_moe",
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    norm_topk_prob=True,
    max_position_embeddings=64,
    rope_theta=10000.0,
)
ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")


def save_adapter(model, directory):
    files = {
        "adapters.safetensors": storage.arrays_writer(adapter_weights(model)),
        "adapter_config.json": storage.json_writer(adapter_config(model)),
    }
    storage.write_directory(directory, files)
    return directory


def make(base, directory, attach=adapt, seed=7, **settings):
    model, _ = load(str(base))
    mx.random.seed(seed)  # whether a token changes must not depend on earlier tests
    attach(model, NALoRAConfig(**{"num_layers": -1, "rank": 4, "scale": 3.0} | settings))
    random_adapters(model, seed=seed)
    model.eval()
    return save_adapter(model, directory)


def logits(base, adapter=None):
    """Return logits computed by unmodified mlx-lm."""
    model, _ = load(str(base), adapter_path=str(adapter) if adapter else None)
    return np.array(model(X))


def export(base, output, *flags, format="mlx"):
    return main(["export", format, "--model", str(base), "--output", str(output), *map(str, flags)])


@pytest.fixture(scope="module")
def moe(tokenizer_directory, tmp_path_factory):
    directory = shutil.copytree(tokenizer_directory, tmp_path_factory.mktemp("moe") / "model")
    model = build_model(module=qwen3_moe, args=MOE)
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (directory / "config.json").write_text(json.dumps(MOE))
    return directory


# --- one adapter -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attach", [adapt, adapt_dora])
def test_checkpoint_is_exported_as_adapter(model_directory, tmp_path, attach):
    """Only the adapter's two files are read, whatever else the checkpoint contains."""
    adapter = make(model_directory, tmp_path / "step-0000010", attach, num_layers=2)
    (adapter / "optimizer.safetensors").write_text("not a safetensors file")
    (adapter / "state.json").write_text("{")
    assert export(model_directory, tmp_path / "out", "--adapter-path", adapter) == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["adapter_config.json", "adapters.safetensors"]
    before, after = (dict(mx.load(str(p / "adapters.safetensors"))) for p in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    np.testing.assert_array_equal(logits(model_directory, tmp_path / "out"), logits(model_directory, adapter))
    again, _ = load(str(model_directory))
    load_any_adapter(again, tmp_path / "out")


@pytest.mark.parametrize("factor", [0.5, -1.0, 2.0])
def test_scale(model_directory, tmp_path, factor):
    adapter = make(model_directory, tmp_path / "a", scale=12.0)  # half of it still changes tokens
    assert export(model_directory, tmp_path / "out", "--adapter-path", adapter, "--scale", factor) == 0
    model, _ = load(str(model_directory), adapter_path=str(adapter))
    for _, module in model.named_modules():
        if "lora_a" in module:
            module.scale *= factor
    close(logits(model_directory, tmp_path / "out"), np.array(model(X)), logits(model_directory), 1e-5)


# --- sums --------------------------------------------------------------------------------------------


def delta(base, adapter):
    """Return the adapter's change of every weight, in float64."""
    found = {}
    content = json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"]
    arrays = {
        k: np.array(v, np.float64) for k, v in dict(mx.load(str(adapter / "adapters.safetensors"))).items()
    }
    for name, a in arrays.items():
        if name.endswith("lora_a"):
            b = arrays[name[:-1] + "b"]
            found[name.rpartition(".")[0]] = content["scale"] * (b @ a if a.ndim == 3 else a @ b)
    return found


def test_sum_of_adapters_is_exact(moe, tmp_path):
    """The adapters differ in rank, scale, layers and modules, including experts and an embedding."""
    first = make(moe, tmp_path / "a", rank=2, scale=2.0, keys=("mlp.switch_mlp.gate_proj", *ATTENTION))
    second = make(
        moe,
        tmp_path / "b",
        seed=8,
        num_layers=1,
        rank=3,
        scale=0.7,
        keys=("self_attn.q_proj", "mlp.switch_mlp.up_proj"),
    )
    third = make(moe, tmp_path / "c", seed=9, rank=1, keys=("model.embed_tokens", "self_attn.k_proj"))
    flags = [x for path in (first, second, third) for x in ("--adapter-path", path)]
    weights = (0.5, -2.0, 1.0)
    flags += [x for w in weights for x in ("--weight", w)]
    assert export(moe, tmp_path / "sum", *flags, "--scale", 1.5) == 0
    expected: dict = {}
    for path, weight in zip((first, second, third), weights, strict=True):
        for name, change in delta(moe, path).items():
            expected[name] = expected.get(name, 0) + 1.5 * weight * change
    actual = delta(moe, tmp_path / "sum")
    assert expected.keys() <= actual.keys()
    for name, change in actual.items():
        np.testing.assert_allclose(change, expected.get(name, 0 * change), rtol=0, atol=1e-6, err_msg=name)
    theirs = logits(moe, tmp_path / "sum")
    ours, _ = load(str(moe))
    load_any_adapter(ours, tmp_path / "sum")
    ours.eval()
    np.testing.assert_allclose(np.array(ours(X)), theirs, rtol=0, atol=2e-5)
    assert np.abs(theirs - logits(moe)).max() > 0.1


def test_adapter_minus_itself_is_the_base(model_directory, tmp_path):
    adapter = make(model_directory, tmp_path / "a")
    flags = ["--adapter-path", adapter, "--adapter-path", adapter, "--weight", "1", "--weight=-1"]
    assert export(model_directory, tmp_path / "none", *flags) == 0
    alone = logits(model_directory, adapter)
    close(logits(model_directory, tmp_path / "none"), logits(model_directory), alone, 1e-5)


# --- PEFT's files ------------------------------------------------------------------------------------


def test_peft_files(model_directory, tmp_path):
    base = shutil.copytree(model_directory, tmp_path / "base")
    (base / "README.md").write_text("---\nlibrary_name: mlx\nbase_model: somebody/original\n---\n")
    adapter = make(base, tmp_path / "a", keys=("mlp.up_proj", "model.embed_tokens"), num_layers=1)
    assert export(base, tmp_path / "peft", "--adapter-path", adapter, format="peft") == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/original"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 12, "LORA")
    assert config["target_modules"] == ["lm_head", "model.embed_tokens", "model.layers.2.mlp.up_proj"]
    assert str(tmp_path) not in json.dumps(config)
    arrays = dict(mx.load(str(tmp_path / "peft" / "adapter_model.safetensors")))
    shapes = {name.removeprefix("base_model.model."): a.shape for name, a in arrays.items()}
    assert shapes == {
        "model.embed_tokens.lora_embedding_A": (4, 64),
        "model.embed_tokens.lora_embedding_B": (32, 4),
        "lm_head.lora_A.weight": (4, 32),
        "lm_head.lora_B.weight": (64, 4),
        "model.layers.2.mlp.up_proj.lora_A.weight": (4, 32),
        "model.layers.2.mlp.up_proj.lora_B.weight": (48, 4),
    }
    assert export(base, tmp_path / "back", "--from-peft", tmp_path / "peft") == 0
    np.testing.assert_array_equal(logits(base, tmp_path / "back"), logits(base, adapter))


MLX = "library_name: mlx\nbase_model: "
OURS = "library_name: mlx\ntags: [mlx, nalora-mlx]\nbase_model: a/b"
QUANTIZED = {"quantization": {"bits": 4}}


@pytest.mark.parametrize(
    ("base", "config", "card", "name"),
    [
        # A full-precision model on the Hub is its own original, whatever its card says.
        ("me/model", {}, "base_model: a/b", "me/model"),
        ("me/model", {}, MLX + "a/b", "me/model"),
        ("me/model", {}, OURS, "me/model"),
        # Quantized: the model it was converted from.
        ("me/model-4bit", QUANTIZED, MLX + "a/b", "a/b"),
        ("me/model-4bit", QUANTIZED, MLX + "[a/b, c/d]", "a/b"),
        ("me/model-4bit", {"quantization_config": {"quant_method": "awq"}}, MLX + "a/b", "a/b"),
        ("me/model-4bit", QUANTIZED, "base_model: a/b", None),
        ("me/model-4bit", QUANTIZED, "", None),
        # A local directory: known only if mlx-lm converted it.
        (None, QUANTIZED, MLX + "a/b", "a/b"),
        (None, {}, MLX + "a/b", "a/b"),
        (None, {}, "base_model: a/b", None),
        (None, {}, MLX + "/home/me/model", None),
        (None, {}, MLX + "../model", None),
        (None, {}, "tags: [x", None),
        # A merged model differs from its base, whatever its precision.
        (None, {}, OURS, None),
        (None, QUANTIZED, OURS, None),
        ("me/tuned-4bit", QUANTIZED, OURS, None),
    ],
)
def test_name_of_the_original(tmp_path, base, config, card, name):
    from nalora_mlx.models.hub import original_name

    (tmp_path / "README.md").write_text(f"---\n{card}\n---\ntext")
    assert original_name(base or str(tmp_path), tmp_path, config) == name


def test_local_directory_that_looks_like_a_hub_name(tmp_path, monkeypatch):
    from nalora_mlx.models.hub import original_name

    monkeypatch.chdir(tmp_path)
    assert original_name("me/model", tmp_path, {}) == "me/model"
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert original_name("me/model", tmp_path / "me" / "model", {}) is None


def peft_adapter(directory, base, **changes):
    """Create a PEFT adapter with changed settings."""
    adapter = make(base, directory / "source", keys=("mlp.up_proj",))
    assert export(base, directory / "peft", "--adapter-path", adapter, format="peft") == 0
    path = directory / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory / "peft"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"peft_type": name}, f"peft_type is '{name}'")
            for name in ("IA3", "LOKR", "VERA", "ADALORA", "XLORA")
        ),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}, "peft_type is 'PROMPT_TUNING'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"bias": "all", "use_qalora": True}, "bias is 'all'; use_qalora is True"),
        ({"use_next_year": {"a": 1}}, "use_next_year is {'a': 1}, a setting unknown here"),
        ({"power": 0.5}, "power is 0.5, a setting unknown here"),
        ({"r": 5}, "model.layers.0.mlp.up_proj has rank 4, adapter_config.json says 5"),
        (
            {"rank_pattern": {"1.mlp.up_proj": 2}},
            "model.layers.1.mlp.up_proj has rank 4, adapter_config.json says 2",
        ),
        ({"use_dora": True}, "model.layers.0.mlp.up_proj has no lora_magnitude_vector"),
    ],
)
def test_unsupported_peft_settings_are_rejected(model_directory, tmp_path, capsys, changes, message):
    adapter = peft_adapter(tmp_path, model_directory, **changes)
    assert export(model_directory, tmp_path / "out", "--from-peft", adapter) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        *({"init_lora_weights": value} for value in (True, False, "gaussian", "eva", "orthogonal", "mica")),
        {"use_next_year": None, "and_the_next": False, "sizes": {}, "names": []},
        {"lora_dropout": 0.1, "layers_to_transform": [0, 1], "auto_mapping": {"base_model_class": "X"}},
    ],
)
def test_settings_without_effect_are_accepted(model_directory, tmp_path, changes):
    adapter = peft_adapter(tmp_path, model_directory, **changes)
    assert export(model_directory, tmp_path / "out", "--from-peft", adapter) == 0


def test_every_setting_of_peft_is_known():
    """A new version of PEFT may add settings; each must be read, refused or known to be irrelevant."""
    peft = pytest.importorskip("peft", reason="needs PEFT: see CONTRIBUTING.md")
    from nalora_mlx.export.peft_config import IRRELEVANT, PLAIN_VALUES, READ

    fields = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    assert fields.keys() <= READ | IRRELEVANT | PLAIN_VALUES.keys()
    for name, plain in PLAIN_VALUES.items():
        assert name == "peft_type" or fields[name].default in plain, name


def test_adapters_in_subdirectories(model_directory, tmp_path, capsys):
    """PEFT saves adapters that are not named default in subdirectories."""
    adapter = peft_adapter(tmp_path, model_directory)
    place = tmp_path / "several"
    shutil.copytree(adapter, place / "first")
    shutil.copytree(adapter, place / "second")
    assert export(model_directory, tmp_path / "out", "--from-peft", place) == 2
    assert "give one of the adapters in it: first, second" in capsys.readouterr().err
    shutil.copytree(adapter, place, dirs_exist_ok=True)
    assert export(model_directory, tmp_path / "out", "--from-peft", place) == 0
    printed = capsys.readouterr().err
    assert "note: first is another adapter" in printed
    assert "note: second is another adapter" in printed


def test_ours_is_not_a_peft_adapter(model_directory, tmp_path, capsys):
    adapter = make(model_directory, tmp_path / "a")
    assert export(model_directory, tmp_path / "out", "--from-peft", adapter) == 2
    assert "has no peft_type" in capsys.readouterr().err


def test_peft_adapter_that_does_not_fit_is_rejected(model_directory, moe, tmp_path, capsys):
    adapter = peft_adapter(tmp_path, model_directory)
    assert export(moe, tmp_path / "out", "--from-peft", adapter) == 2
    assert "model.layers.0.mlp.up_proj is not a linear layer of the model" in capsys.readouterr().err
    path = adapter / "adapter_model.safetensors"
    arrays = dict(mx.load(str(path)))
    head = {"base_model.model.lm_head.lora_A.weight": mx.ones((4, 32))}
    head |= {"base_model.model.lm_head.lora_B.weight": mx.ones((64, 4))}
    mx.save_safetensors(str(path), arrays | head)
    assert export(model_directory, tmp_path / "out", "--from-peft", adapter) == 2
    assert "embedding is also its output head" in capsys.readouterr().err
    path.rename(adapter / "adapter_model.bin")
    assert export(model_directory, tmp_path / "out", "--from-peft", adapter) == 2
    error = capsys.readouterr().err
    assert "pickled" in error
    assert "save_pretrained" in error


@pytest.mark.parametrize(
    ("keys", "attach", "message"),
    [
        (("mlp.switch_mlp.gate_proj",), adapt, "PEFT has no adapters of experts"),
        (("mlp.gate",), adapt, "is a router"),
        (("model.embed_tokens",), adapt_dora, "DoRA of an embedding"),
    ],
)
def test_adapters_without_a_peft_format_are_rejected(moe, tmp_path, capsys, keys, attach, message):
    adapter = make(moe, tmp_path / "a", attach, keys=keys)
    assert export(moe, tmp_path / "out", "--adapter-path", adapter, format="peft") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- rejected input ----------------------------------------------------------------------------------


def test_contradicting_flags_are_rejected(model_directory, tmp_path, capsys):
    adapter = make(model_directory, tmp_path / "a")
    one = ["--adapter-path", adapter]
    cases = [
        ("mlx", [], "nothing to export; give --adapter-path"),
        ("mlx", [*one, "--type", "f16"], "--type f16: only export gguf"),
        ("peft", ["--from-peft", adapter], "--from-peft: only export mlx"),
        ("mlx", [*one, "--from-peft", adapter], "--from-peft: only export mlx"),
        ("mlx", [*one, "--weight", "1", "--weight", "2"], "--weight: given 2 times, --adapter-path 1 times"),
        ("mlx", [*one, "--scale", "nan"], "must be finite"),
        ("gguf-lora", [], "nothing to export"),
        ("mlx", ["--adapter-path", tmp_path], "has no adapter_config.json"),
        ("mlx", ["--from-peft", tmp_path], "has no adapter_config.json"),
    ]
    for format, flags, message in cases:
        assert export(model_directory, tmp_path / "out", *flags, format=format) == 2, flags
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces_only_adapters(model_directory, tmp_path, capsys):
    adapter = make(model_directory, tmp_path / "a")
    output = tmp_path / "out"
    flags = ["--adapter-path", adapter]
    assert export(model_directory, output, *flags) == 0
    assert export(model_directory, output, *flags) == 2
    assert "exists; choose another, or give --overwrite" in capsys.readouterr().err
    assert export(model_directory, output, *flags, "--overwrite", "--scale", "2") == 0
    (output / "notes.txt").write_text("mine")
    assert export(model_directory, output, *flags, "--overwrite") == 2
    assert "is not just an adapter" in capsys.readouterr().err
    assert (output / "notes.txt").read_text() == "mine"


def test_all_misfits_are_listed(model_directory, tmp_path):
    adapter = make(model_directory, tmp_path / "a", num_layers=1, keys=("mlp.up_proj", "mlp.down_proj"))
    path = adapter / "adapters.safetensors"
    arrays = dict(mx.load(str(path)))
    arrays["model.layers.2.mlp.up_proj.lora_b"] = mx.zeros((4, 7))
    arrays["model.layers.9.mlp.up_proj.lora_a"] = mx.zeros((32, 4))
    arrays["model.norm.lora_a"], arrays["model.norm.lora_b"] = mx.zeros((32, 4)), mx.zeros((4, 32))
    mx.save_safetensors(str(path), arrays)
    with pytest.raises(Exception) as raised:
        updates.read_updates(adapter, open_model(model_directory).weights)
    for part in (
        "model.layers.2.mlp.up_proj has factors (7, 4) and (4, 32), its weight is (48, 32)",
        "model.layers.9.mlp.up_proj has lora_a, not lora_a, lora_b",
        "model.norm is not a linear or embedding layer",
    ):
        assert part in str(raised.value)


def test_dora_and_full_weights_cannot_be_summed(model_directory, tmp_path, capsys):
    dora = make(model_directory, tmp_path / "dora", adapt_dora, keys=("mlp.up_proj",))
    assert export(model_directory, tmp_path / "out", "--adapter-path", dora, "--scale", "0.5") == 2
    assert "a dora adapter cannot be scaled or summed" in capsys.readouterr().err
    full = fully_trained(tmp_path / "full", "model.layers.0.mlp.up_proj.weight", mx.zeros((48, 32)))
    for format in ("mlx", "peft"):
        assert export(model_directory, tmp_path / "out", "--adapter-path", full, format=format) == 2
        assert "fully trained weights, not an adapter" in capsys.readouterr().err


# --- NaN and wrong ranks -----------------------------------------------------------------------------

NAME = "model.layers.1.mlp.up_proj.lora_b"


def damage(path, name, value=math.nan):
    """Replace one value of one array of a file."""
    arrays = dict(mx.load(str(path)))
    flat = arrays[name].flatten()
    flat[flat.size // 2] = value
    arrays[name] = flat.reshape(arrays[name].shape)
    mx.save_safetensors(str(path), arrays)


def fully_trained(directory, name, array):
    files = {
        "adapters.safetensors": storage.arrays_writer({name: array}),
        "adapter_config.json": storage.json_writer({"fine_tune_type": "full", "num_layers": 3}),
    }
    storage.write_directory(directory, files)
    return directory


@pytest.fixture(scope="module")
def gguf_directory(tmp_path_factory):
    """Return the directory of a model that can be exported to GGUF."""
    pytest.importorskip("gguf")
    return gguf_models.save(tmp_path_factory.mktemp("gguf") / "model", *gguf_models.build("llama"))


@pytest.fixture
def base(request, model_directory):
    """Return the base model for the format of a test."""
    name = next(
        request.node.callspec.params[name] for name in ("reader", "format") if name in request.fixturenames
    )
    return request.getfixturevalue("gguf_directory") if "gguf" in name else model_directory


READERS = {
    "export mlx": ("export", "mlx", "--output", "OUT"),
    "export peft": ("export", "peft", "--output", "OUT"),
    "export gguf-lora": ("export", "gguf-lora", "--output", "OUT"),
    "export gguf": ("export", "gguf", "--output", "OUT"),
    "fuse": ("fuse", "--save-path", "OUT"),
    "generate": ("generate", "--prompt", "the cat"),
    "chat": ("chat",),
    "serve": ("serve", "--port", "PORT"),
    "lora --test": ("lora", "--test", "--data", "DATA"),
}


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("reader", READERS)
def test_nan_is_refused_and_named(tmp_path, base, capsys, monkeypatch, reader, kind):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("chat started"))
    name = {
        "lora": NAME,
        "dora": "model.layers.1.mlp.up_proj.m",
        "full": "model.layers.1.mlp.up_proj.weight",
    }[kind]
    if kind == "full":
        adapter = fully_trained(tmp_path / "a", name, open_model(base).weights[name].weight)
    else:
        attach = adapt if kind == "lora" else adapt_dora
        adapter = make(base, tmp_path / "a", attach, keys=("mlp.up_proj",))
    damage(adapter / "adapters.safetensors", name, math.inf if reader == "fuse" else math.nan)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text(json.dumps({"text": "the cat is red"}) + "\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    replaced = {"OUT": str(tmp_path / "out"), "DATA": str(tmp_path / "data"), "PORT": str(port)}
    command = [replaced.get(word, word) for word in READERS[reader]]
    assert main([*command, "--model", str(base), "--adapter-path", str(adapter)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert f"adapters.safetensors: NaN or infinite values in {name};" in line
    assert not (tmp_path / "out").exists()


def test_nan_in_a_peft_adapter(model_directory, tmp_path, capsys):
    adapter = peft_adapter(tmp_path, model_directory)
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"
    damage(adapter / "adapter_model.safetensors", name)
    assert export(model_directory, tmp_path / "out", "--from-peft", adapter) == 2
    assert f"NaN or infinite values in {name}" in capsys.readouterr().err


def test_values_that_a_narrow_model_cannot_hold(model_directory, tmp_path):
    """Full fine-tuning in float32 can give values beyond float16."""
    name = "model.layers.1.mlp.up_proj.weight"
    model, _ = load(str(model_directory))
    model.set_dtype(mx.float16)
    with pytest.raises(InputError, match=f"NaN or infinite values in {name}"):
        load_any_adapter(model, fully_trained(tmp_path / "a", name, mx.full((48, 32), 1e6)))


def test_resumed_weights_must_be_finite(model_directory, tmp_path):
    adapter = make(model_directory, tmp_path / "a", keys=("mlp.up_proj",))
    model, _ = load(str(model_directory))
    load_any_adapter(model, adapter)
    damage(adapter / "adapters.safetensors", NAME)
    with pytest.raises(InputError, match=f"NaN or infinite values in {NAME}"):
        load_weights(model, adapter / "adapters.safetensors")
    assert mx.isfinite(adapter_weights(model)[NAME]).all().item()


@pytest.mark.parametrize("format", ["mlx", "peft", "gguf-lora"])
@pytest.mark.parametrize(("weight", "scale"), [("1e38", "1e38"), ("1e39", "1"), ("1e30", "1e200")])
def test_sums_beyond_float32_are_rejected(base, tmp_path, capsys, format, weight, scale):
    adapter = make(base, tmp_path / "a", keys=("mlp.up_proj",))
    flags = ["--adapter-path", adapter, "--weight", weight, "--scale", scale]
    assert export(base, tmp_path / "out", *flags, format=format) == 2
    assert "too large for float32; give a smaller --scale or --weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_magnitudes_of_a_damaged_model(model_directory, tmp_path, capsys):
    """A DoRA of fewer modules than mlx-lm adapts gets magnitudes from the model's weights."""
    adapter = make(model_directory, tmp_path / "a", adapt_dora, keys=("mlp.up_proj",))
    arrays = dict(mx.load(str(adapter / "adapters.safetensors")))
    rest = {name: array for name, array in arrays.items() if ".1." not in name}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), rest)
    base = shutil.copytree(model_directory, tmp_path / "base")
    damage(base / "model.safetensors", "model.layers.1.mlp.up_proj.weight")
    assert export(base, tmp_path / "out", "--adapter-path", adapter) == 2
    assert "NaN or infinite weights in model.layers.1.mlp.up_proj.m" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["mlx", "peft", "gguf-lora", "gguf"])
def test_wrong_rank_is_rejected(base, tmp_path, capsys, format):
    adapter = make(base, tmp_path / "a", keys=("mlp.up_proj",))
    path = adapter / "adapter_config.json"
    content = json.loads(path.read_text())
    content["lora_parameters"]["rank"] = 6
    path.write_text(json.dumps(content))
    assert export(base, tmp_path / "out", "--adapter-path", adapter, format=format) == 2
    error = capsys.readouterr().err
    assert "rank is 6, but the weights have [4] (model.layers.0.mlp.up_proj, " in error
    assert not (tmp_path / "out").exists()


# --- interruption ------------------------------------------------------------------------------------


DIRECTORY = ((mx, "save_safetensors"), (os, "fsync"), (Path, "rename"))
FILE = ((os, "fsync"), (os, "replace"))


@pytest.mark.parametrize(
    ("format", "steps", "error"),
    [
        ("mlx", DIRECTORY, KeyboardInterrupt),
        ("mlx", DIRECTORY, OSError("disk")),
        ("peft", DIRECTORY, KeyboardInterrupt),
        ("peft", DIRECTORY, OSError("disk")),
        ("gguf-lora", FILE, KeyboardInterrupt),
        ("gguf-lora", FILE, OSError("disk")),
        ("fuse", DIRECTORY, OSError("disk")),
        pytest.param("fuse", DIRECTORY, KeyboardInterrupt, marks=pytest.mark.slow),
    ],
)
def test_interrupted_export_leaves_nothing(model_directory, tmp_path, monkeypatch, format, steps, error):
    """tests/interop/test_gguf_export.py does the same for whole models."""
    base, output = model_directory, tmp_path / "place" / "out"
    if format == "gguf-lora":
        writer = pytest.importorskip("gguf").GGUFWriter
        steps = ((writer, "write_tensor_data"), *steps)
        base = gguf_models.save(tmp_path / "base", *gguf_models.build("llama"))
    adapter = make(base, tmp_path / "a")
    where = ["--model", base, "--adapter-path", adapter]
    where += ["--save-path", output] if format == "fuse" else ["--output", output]
    command = [*(["fuse"] if format == "fuse" else ["export", format]), *map(str, where)]

    def fail(*_, **__):
        raise error

    for place, name in steps:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            assert main(command) in (1, 130)
        assert list(output.parent.iterdir()) == []
    assert main(command) == 0


KILLED = """
import os, signal, sys
import mlx.core as mx
from nalora_mlx.__main__ import main
mx.save_safetensors = lambda path, *a, **k: (open(path, "w").write("half"), os.kill(os.getpid(), signal.SIGKILL))
main(sys.argv[1:])
"""


def test_killed_export_leaves_only_a_temporary_directory(model_directory, tmp_path):
    adapter = make(model_directory, tmp_path / "a")
    place = tmp_path / "place"
    place.mkdir()
    flags = [
        "export",
        "mlx",
        "--model",
        model_directory,
        "--adapter-path",
        adapter,
        "--output",
        place / "out",
    ]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, flags)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert [path.name[:5] for path in place.iterdir()] == [".out."]


# --- docs/export.md ----------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
COMMANDS = re.findall(r"nalora (?:export|fuse) [^`\n]*", PAGE)


@pytest.mark.parametrize("line", COMMANDS)
def test_documented_commands_parse(line):
    from nalora_mlx import fuse
    from nalora_mlx.export import __main__ as export_command

    _, name, *flags = line.split()
    command = fuse if name == "fuse" else export_command
    if "--output" in flags or name == "fuse":
        command.build_parser(name).parse_args(flags)


def test_documentation_lists_all_types_and_models():
    from nalora_mlx.export.arguments import FORMATS, TYPES
    from nalora_mlx.export.gguf.architectures import ARCHITECTURES
    from nalora_mlx.export.peft_names import MODEL_TYPES

    assert set(TYPES) | set(FORMATS) <= set(re.findall(r"[\w-]+", PAGE))
    models = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    table = models.split("## Exports of every model type")[1].split("##")[0]
    rows = {
        name: (gguf, peft)
        for name, gguf, peft in re.findall(r"^\| (\S+) \| (.+) \| (yes|no) \|$", table, re.M)
    }
    assert {name for name, (gguf, _) in rows.items() if not gguf.startswith("no: ")} == set(ARCHITECTURES)
    assert {name for name, (_, peft) in rows.items() if peft == "yes"} == set(MODEL_TYPES)
