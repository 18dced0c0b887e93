"""Prompts with images: their thumbnails, and what answers them in the same process."""

import base64
import io
import json

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
from PIL import Image

from nalora_mlx.runs.samples import choose_prompts, saved_prompt
from tests.runs.test_samples import data, sources, turn


def png(color, size=(8, 8)):
    """Return the bytes of a picture of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def opened(uri):
    header, _, content = uri.partition(";base64,")
    return header, Image.open(io.BytesIO(base64.b64decode(content)))


def test_prompts_with_images_have_thumbnails_and_references(tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(png("red"))
    noise = np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)
    rows = [
        {"prompt": "what?", "completion": "red", "images": [str(path)]},
        {"prompt": "what?", "completion": "red", "images": [str(path)]},
        {"prompt": "what?", "completion": "blue", "images": [Image.fromarray(noise)]},
        {"prompt": "all?", "completion": "no", "images": [png("blue")] * 9},  # too many
        {"prompt": "which?", "completion": "?", "images": [str(tmp_path / "none.png")]},  # unreadable
        {
            "messages": [
                turn("user", [{"type": "image", "image": png("red")}, {"type": "text", "text": "?"}]),
                turn("assistant", "red"),
                turn("user", [{"type": "image", "image": png("blue", (4, 8))}]),
                turn("assistant", "blue"),
                turn("user", [{"type": "image", "image": png("green")}]),
            ]
        },
    ]
    chosen = choose_prompts(data(rows))
    assert sources(chosen) == ["1", "3", "6"]
    first, second, third = chosen
    assert first["messages"] == [turn("user", [{"type": "image"}, {"type": "text", "text": "what?"}])]
    assert (first["prompt"], first["references"]) == ("what?", [str(path)])
    assert third["prompt"] == "user: ?\nassistant: red\nuser: (image)"
    assert third["references"] == [png("red"), png("blue", (4, 8))]  # of the messages before the answer
    assert opened(third["images"][1])[1].size == (4, 8)
    kind, image = opened(second["images"][0])
    assert (kind, image.size) == ("data:image/jpeg", (160, 80))
    assert len(second["images"][0]) <= 20_000
    kind, image = opened(first["images"][0])
    assert (kind, image.convert("RGB").tobytes()) == (
        "data:image/png",
        Image.new("RGB", (8, 8), "red").tobytes(),
    )
    same_question = [
        {"prompt": "what?", "completion": "x", "images": [png(color)]} for color in ("red", "blue")
    ]
    assert sources(choose_prompts(data(same_question))) == ["1", "2"]
    for prompt in map(saved_prompt, chosen):
        assert str(tmp_path) not in json.dumps(prompt)
