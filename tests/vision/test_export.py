"""`nalora export` of adapters of vision-language models: transformers + PEFT give the same logits as mlx-vlm."""

import json

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (pip install '.[vlm]')")

from mlx_vlm.trainer.peft.utils import apply_lora_layers
from mlx_vlm.utils import load_model

from nalora_mlx.__main__ import main
from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.files import adapter_config, adapter_files, adapter_weights, load_any_adapter
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.export.lazy_model import open_vision
from nalora_mlx.export.peft_names import VISION_LANGUAGE, our_path, their_path
from nalora_mlx.models.vision.loading import open_vision_model
from tests.conftest import random_adapters
from tests.vision.tiny_models import FAMILIES, IMAGE, SIDE, save_model

torch = pytest.importorskip("torch", reason="needs PyTorch: see CONTRIBUTING.md")
peft = pytest.importorskip("peft", reason="needs PEFT: see CONTRIBUTING.md")

TOKENS = [60, 61, IMAGE + 3, IMAGE, IMAGE, IMAGE, IMAGE, 70, 71, 72]  # the third is Qwen's vision start
ARRAYS = {
    "qwen2_5_vl": {"pixel_values": (16, 3 * 2 * 4 * 4), "image_grid_thw": [[1, 4, 4]]},
    "smolvlm": {"pixel_values": (1, 1, 3, SIDE, SIDE)},
}
TOLERANCE = 1e-4


def their_config(name, **changes):
    """Return a family's config as transformers reads it."""
    from transformers import AutoConfig

    config = json.loads(json.dumps(FAMILIES[name].config)) | changes
    if name == "qwen2_5_vl":  # published with the settings of the text model at the top level
        config["text_config"] = {
            key: config.pop(key) for key in list(config) if key != "vision_config" and not key.endswith("_id")
        }
    if name == "gemma4":  # where the defaults differ
        layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "use_double_wide_mlp": True}
        config["text_config"] |= layers
    if name == "paligemma":
        config["text_config"] |= {"head_dim": 8}
        config["projection_dim"] = 32
    return AutoConfig.for_model(config.pop("model_type", name), **config)


def save_adapter(model, directory):
    storage.write_directory(directory, adapter_files(model, adapter_config(model)))


def export(kind, base, output, *flags):
    return main(["export", kind, "--model", str(base), "--output", str(output), *map(str, flags)])


def save_tiny(name, directory, **settings):
    """Save a tiny model and an adapter; return the model with the adapter, and both directories."""
    base = save_model(name, directory / "base")
    model, _ = open_vision_model(str(base))
    adapt(model, NALoRAConfig(rank=2, num_layers=-1, **settings))
    random_adapters(model)
    save_adapter(model, directory / "adapter")
    return model, base, directory / "adapter"


@pytest.mark.parametrize("name", sorted(VISION_LANGUAGE))
def test_layers_have_the_names_and_shapes_of_transformers(name, tmp_path):
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        theirs = AutoModelForImageTextToText.from_config(their_config(name))
    expected = {path: tuple(array.shape) for path, array in theirs.state_dict(keep_vars=True).items()}
    model = open_vision(save_model(name, tmp_path / "base"))
    layers = [path for path, w in model.weights.items() if w.kind in ("linear", "embedding")]
    assert len(layers) > 20
    for path in layers:
        path = path.removesuffix(".weight")
        assert expected.get(f"{their_path(path, model)}.weight") == model.weights[f"{path}.weight"].shape, (
            path
        )
        assert our_path(their_path(path, model), model) == path


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_peft_gives_the_same_logits_of_text_and_image(name, tmp_path):
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    untied = {"tie_word_embeddings": False}  # the only kind of these models that mlx-vlm knows
    theirs = AutoModelForImageTextToText.from_config(their_config(name, **untied)).eval()
    base = tmp_path / "base"
    theirs.save_pretrained(base)
    config = {"model_type": name, **FAMILIES[name].config, **untied}
    (base / "config.json").write_text(json.dumps(config))
    model, _ = open_vision_model(str(base))
    adapt(model, NALoRAConfig(rank=2, num_layers=-1, vision=True))
    random_adapters(model)
    save_adapter(model, tmp_path / "adapter")

    arrays = {
        key: np.array(value) if isinstance(value, list) else np.random.default_rng(0).normal(size=value)
        for key, value in ARRAYS[name].items()
    }
    arrays = {key: a.astype(np.float32 if key == "pixel_values" else np.int64) for key, a in arrays.items()}

    def ours(model):
        ids = mx.array([TOKENS])
        inputs = {key: mx.array(array) for key, array in arrays.items()}
        given = model.get_input_embeddings(ids, mask=mx.ones_like(ids), **inputs).to_dict()
        rest = {key: value for key, value in given.items() if value is not None}
        return np.array(model.language_model(ids, **rest).logits)

    expected, plain = ours(model), ours(open_vision_model(str(base))[0])
    assert np.abs(expected - plain).max() > 0.1
    assert export("peft", base, tmp_path / "peft", "--adapter-path", tmp_path / "adapter") == 0
    tuned = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    with torch.no_grad():
        found = tuned(
            input_ids=torch.tensor([TOKENS]),
            mm_token_type_ids=torch.tensor([[int(token == IMAGE) for token in TOKENS]]),
            **{key: torch.from_numpy(array) for key, array in arrays.items()},
        ).logits
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=TOLERANCE)

    assert export("mlx", base, tmp_path / "back", "--from-peft", tmp_path / "peft") == 0
    again, _ = open_vision_model(str(base))
    load_any_adapter(again, tmp_path / "back")
    np.testing.assert_allclose(ours(again), expected, rtol=0, atol=1e-5)


def test_adapters_are_scaled_and_summed(tmp_path, capsys):
    model, base, adapter = save_tiny("smolvlm", tmp_path, vision=True)
    assert export("mlx", base, tmp_path / "copy", "--adapter-path", adapter) == 0
    assert "mlx-vlm reads the adapter as it is" in capsys.readouterr().err
    assert export("mlx", base, tmp_path / "half", "--adapter-path", adapter, "--scale", "0.5") == 0
    assert "as it is" not in capsys.readouterr().err
    for name, factor in (("copy", 1), ("half", 0.5)):
        found, config = (
            open_vision_model(str(base))[0],
            storage.read_json(tmp_path / name / "adapter_config.json"),
        )
        assert config["images"] is True
        load_any_adapter(found, tmp_path / name)
        loaded = apply_lora_layers(load_model(base), tmp_path / name)  # needs whole paths
        assert adapter_weights(loaded).keys() == adapter_weights(model).keys()
        arrays, before = adapter_weights(found), adapter_weights(model)
        assert arrays.keys() == before.keys()
        scale = config["lora_parameters"]["scale"]
        for path in (path.removesuffix(".lora_a") for path in arrays if path.endswith(".lora_a")):
            a, b = (
                factor * 20 * before[f"{path}.lora_a"] @ before[f"{path}.lora_b"],
                scale * arrays[f"{path}.lora_a"],
            )
            np.testing.assert_allclose(b @ arrays[f"{path}.lora_b"], a, rtol=1e-5, atol=1e-6)


def test_adapters_of_the_language_model_become_gguf(tmp_path, capsys):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install '.[export]')")
    model, base, adapter = save_tiny("qwen2_5_vl", tmp_path)
    assert export("gguf-lora", base, tmp_path / "lora.gguf", "--adapter-path", adapter) == 0
    assert "give llama.cpp the base's mmproj file too" in capsys.readouterr().err
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "lora.gguf").tensors}
    assert len(tensors) == len(adapter_weights(model))
    # llama.cpp does not permute the rows of Qwen's projections.
    expected = np.array(adapter_weights(model)["language_model.model.layers.1.self_attn.q_proj.lora_b"]).T
    np.testing.assert_allclose(tensors["blk.1.attn_q.weight.lora_b"], expected)


def test_what_cannot_be_exported_is_refused_by_name(tmp_path, capsys):
    _, base, adapter = save_tiny("pixtral", tmp_path / "pixtral", vision=True)
    assert export("peft", base, tmp_path / "out", "--adapter-path", adapter) == 2
    assert "model_type pixtral: not supported for PEFT" in capsys.readouterr().err
    for kind in ("gguf", "gguf-lora"):
        assert export(kind, base, tmp_path / "out.gguf", "--adapter-path", adapter) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith(f"nalora export: error: export {kind}: ")
        assert "multi_modal_projector.linear_1" in error
        assert "mmproj" in error
    _, base, adapter = save_tiny("smolvlm", tmp_path / "smolvlm")
    assert export("gguf", base, tmp_path / "out.gguf", "--adapter-path", adapter) == 2
    assert "smolvlm not supported" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
