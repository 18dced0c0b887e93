"""Models of mlx-vlm: adapters on the language tower and a gated vision tower, trained on an image-text batch."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.adapters.merge import fuse_model
from nalora_mlx.data.batches import Batch
from nalora_mlx.training.importance import importance
from nalora_mlx.training.loss import SupervisedLoss
from nalora_mlx.training.step import TrainingStep
from tests.conftest import masked_config

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (pip install '.[vlm]')")

IMAGE = 60  # token id of an image patch
TEXT = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 64,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}


def build():
    from mlx_vlm.models.qwen2_5_vl import Model
    from mlx_vlm.models.qwen2_5_vl.config import ModelConfig, TextConfig, VisionConfig

    mx.random.seed(0)
    config = ModelConfig(
        text_config=TextConfig(**TEXT),
        vision_config=VisionConfig(**VISION),
        model_type="qwen2_5_vl",
        image_token_id=IMAGE,
        vision_start_token_id=61,
        video_token_id=62,
    )
    model = Model(config)
    model.eval()
    mx.eval(model.parameters())
    return model


def image_text_batch():
    """Return a batch with one image, of 4 x 4 patches merged 2 x 2 into 4 tokens, and some text; [1, 12] tokens."""
    grid = mx.array([[1, 4, 4]])
    pixels = mx.random.normal((16, 3 * 2 * 4 * 4), key=mx.random.key(3))
    tokens = np.array([[5, 61, IMAGE, IMAGE, IMAGE, IMAGE, 7, 8, 9, 10, 11, 12, 13]], np.int32)
    supervised = np.zeros((1, 12), np.float32)
    supervised[:, 6:] = 1
    batch = Batch(tokens[:, :-1], tokens[:, 1:], supervised, np.ones((1, 12), np.float32), (0,))
    return batch, {"pixel_values": pixels, "image_grid_thw": grid}


def test_both_towers_adapt_and_train_on_an_image():
    model = build()
    batch, image = image_text_batch()

    def forward(ids):
        return model(ids, **image).logits

    before = np.array(forward(mx.array(batch.inputs)))
    config = masked_config(num_layers=-1, rank=4, mask_warmup=1, vision=True)
    report = adapt(model, config)
    assert sorted(g.path for g in report.gated) == [
        "language_model.model.layers.0.mlp",
        "language_model.model.layers.1.mlp",
        "vision_tower.blocks.0.mlp",
        "vision_tower.blocks.1.mlp",
    ]
    np.testing.assert_allclose(np.array(forward(mx.array(batch.inputs))), before, rtol=1e-5, atol=1e-5)
    start = {path: np.array(a) for path, a in adapter_weights(model).items()}
    # Not compiled: to merge the image, the model reads values of the token ids.
    step = TrainingStep(model, optim.Adam(5e-3), config, compiled=False, loss=SupervisedLoss(model, forward))
    losses = []
    for _ in range(25):
        total, _ = step(batch, batch.supervised_tokens, None, True)
        mx.eval(step.state, total)
        losses.append(total.item() / batch.supervised_tokens)
    assert losses[-1] < 0.7 * losses[0]
    moved = {
        path for path, a in adapter_weights(model).items() if not np.array_equal(np.array(a), start[path])
    }
    for path in (
        "vision_tower.blocks.0.mlp.gate_proj.lora_b",
        "language_model.model.layers.1.mlp.gate_proj.lora_b",
    ):
        assert path in moved
    for state in step.importance["layers"].values():
        assert state.updates.item() == 25
        assert 0 < np.array(state.importance).mean() < 1.2
    tuned = np.array(forward(mx.array(batch.inputs)))
    fuse_model(model)
    np.testing.assert_allclose(np.array(forward(mx.array(batch.inputs))), tuned, rtol=1e-4, atol=1e-4)


class Tap(nn.Module):
    """A module that keeps its last input."""

    def __init__(self, module):
        super().__init__()
        self.module, self.seen = module, None

    def __call__(self, x):
        object.__setattr__(self, "seen", np.array(x, np.float64))
        return self.module(x)


@pytest.mark.parametrize("accumulated", [False, True])
def test_statistics_of_a_vision_tower_are_means_over_patches(accumulated):
    """There are as many patches as tokens, of which four are padding; the mask of tokens is not one of patches."""
    batch, image = image_text_batch()
    padding = np.zeros((1, 4), np.int32)
    fields = (batch.inputs, batch.targets, batch.loss_mask, batch.token_mask)
    batch = Batch(*(np.concatenate([x, padding.astype(x.dtype)], axis=1) for x in fields), (0,))
    assert batch.inputs.size == image["pixel_values"].shape[0] == 16
    reference = build()
    tower, text = reference.vision_tower.blocks[0], reference.language_model.model.layers[0]
    tower.mlp, text.mlp = Tap(tower.mlp), Tap(text.mlp)
    reference(mx.array(batch.inputs), **image)

    model = build()
    config = masked_config(num_layers=-1, rank=4, vision=True)
    adapt(model, config)
    loss = SupervisedLoss(model, lambda ids: model(ids, **image).logits)
    step = TrainingStep(model, optim.SGD(0.0), config, compiled=False, loss=loss)
    first = step(batch, 2 * batch.supervised_tokens, None, False)[1] if accumulated else None
    step(batch, (1 + accumulated) * batch.supervised_tokens, first, True)
    mx.eval(step.state)
    layers = step.importance["layers"]
    for path, mlp, rows in (
        ("vision_tower.blocks.0.mlp", tower.mlp, slice(None)),
        ("language_model.model.layers.0.mlp", text.mlp, slice(12)),
    ):
        weight, x = np.array(mlp.module.gate_proj.weight, np.float64), mlp.seen.reshape(-1, 32)[rows]
        z = x @ weight.T + np.array(mlp.module.gate_proj.get("bias", 0), np.float64)
        sigmoid = 1 / (1 + np.exp(-z))
        expected = np.abs(sigmoid * (1 + z * (1 - sigmoid))).mean(axis=0)
        found = np.array(importance(layers[path], config.beta))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_towers_without_gated_mlps_are_announced():
    """Gemma 3's tower has plain MLPs: NA-LoRA acts on the language model, and the run says so."""
    from mlx_vlm.models import gemma3

    text = gemma3.TextConfig(
        "gemma3_text", 16, 2, 24, 2, head_dim=8, vocab_size=32, num_key_value_heads=2, mm_tokens_per_image=1
    )
    vision = gemma3.VisionConfig("siglip_vision_model", 2, 16, 24, 2, patch_size=4, image_size=8)
    model = gemma3.Model(gemma3.ModelConfig(text, vision, "gemma3", hidden_size=16))
    result = adapt(model, masked_config(num_layers=-1, rank=2, vision=True))
    assert {gated.path.split(".")[0] for gated in result.gated} == {"language_model"}
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1" in result.plain
    (notice,) = result.notices
    assert "acts on the language model only: the vision tower has no gated MLP" in notice
