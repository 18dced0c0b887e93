"""Models of mlx-vlm: adapters on the language tower and a gated vision tower, trained on an image-text batch."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.adapters.merge import fuse_model
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.data.batches import Batch
from nalora_mlx.training.loss import SupervisedLoss
from nalora_mlx.training.step import TrainingStep

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
    config = NALoRAConfig(num_layers=-1, rank=4, mask_warmup=1)
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
