"""nalora doctor and vision-language models: their towers, their processor, and the images of the rows."""

import json

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (pip install '.[vlm]')")

from nalora_mlx.core import optional_dependencies
from nalora_mlx.models.vision import loading
from tests.commands.test_doctor import SMALL, fast_machine, page_of
from tests.vision.tiny_models import picture, save_model

__all__ = ["fast_machine"]  # a fixture of all tests here
SIZES = ((16, 16), (24, 16), (32, 32))  # of pictures: 2 x 2, 3 x 2 and 4 x 4 tokens of Qwen2.5-VL


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_model("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    return save_model("smolvlm", tmp_path_factory.mktemp("smolvlm"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return a directory of rows with pictures. The fourth does not exist, and the fifth is not one."""
    directory = tmp_path_factory.mktemp("pictures")
    for i, (width, height) in enumerate(SIZES):
        picture(width, height, i).save(directory / f"{i}.png")
    (directory / "4.png").write_text("no picture")
    rows = []
    for i in range(5):
        content = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "what?"}]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": content},
                    {"role": "assistant", "content": "a cat<eos>"},
                ]
            }
        )
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_towers_are_listed_with_what_is_adapted_in_each(qwen, smolvlm, capsys):
    sections, _ = page_of(capsys, "--model", qwen, *SMALL)
    first, _, *towers, gated, plain = sections["Model"]
    assert first.startswith("✓ it reads images, with Qwen2_5_VLProcessor of mlx-vlm ")
    assert towers == [
        "· language model: 2 layers, 2 gated MLPs (NA-LoRA)",
        "· vision tower: 2 layers, 2 gated MLPs (NA-LoRA), frozen; --vision adapts 10 modules of it",
        "· projector: 2 linear layers (plain LoRA), frozen; --projector or --vision adapts it",
    ]
    assert gated.startswith("✓ NA-LoRA: language_model.model.layers.0-1.mlp, silu")
    attention = "language_model.model.layers.0-1.self_attn.k_proj, .o_proj, .q_proj, .v_proj"
    assert plain == f"· LoRA: 8 other modules, {attention}"
    assert sections["Memory"][-1].startswith("✓ upper bound ")

    sections, _ = page_of(capsys, "--model", qwen, "--vision", *SMALL)
    assert "· vision tower: 2 layers, 2 gated MLPs (NA-LoRA), adapted" in sections["Model"]
    assert "· projector: 2 linear layers (plain LoRA), adapted" in sections["Model"]
    assert sum(line.startswith("✓ NA-LoRA: ") for line in sections["Model"]) == 2

    sections, _ = page_of(capsys, "--model", smolvlm, *SMALL)
    tower = "· vision tower: 2 layers, 2 plain MLPs (plain LoRA), frozen; --vision adapts 12 modules of it"
    assert tower in sections["Model"]


def test_images_are_counted_in_tokens_and_bad_ones_named(qwen, pictures, capsys):
    sections, _ = page_of(capsys, "--model", qwen, "--data", pictures, *SMALL[:2], status=2)
    problems = [line for line in sections["Data"] if line.startswith("✗ ")]
    assert len(problems) == 2
    assert f"{pictures / 'train.jsonl'}:4: image 3.png does not exist" in problems[0]
    assert f"{pictures / 'train.jsonl'}:5: image " in problems[1]
    assert "✓ 3 images, 4 to 16 tokens each, median 6" in sections["Data"]
    assert any("<|image_pad|>" in line for line in sections["Masks"])


def test_models_that_do_not_see_and_rows_without_images(qwen, pictures, model_directory, tmp_path, capsys):
    sections, _ = page_of(capsys, "--model", model_directory, "--data", pictures, *SMALL, status=2)
    (refused,) = [line for line in sections["Data"] if ":1, :2, :3" in line]
    assert refused.startswith(
        f"✗ {pictures / 'train.jsonl'}:1, :2, :3: holds images, which only vision-language"
    )
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "a", "completion": "b<eos>"}\n' * 4)
    sections, _ = page_of(capsys, "--model", qwen, "--data", texts, *SMALL)
    assert sections["Model"][0] == (
        "· it reads images too, but no row has any: mlx-lm loads the language model alone"
    )
    assert not any("tower" in line for line in sections["Model"])


def test_without_mlx_vlm_the_page_says_how_to_install_it(qwen, smolvlm, pictures, monkeypatch, capsys):
    is_installed = optional_dependencies.is_installed
    for module in (optional_dependencies, loading):
        monkeypatch.setattr(module, "is_installed", lambda name: name != "mlx-vlm" and is_installed(name))
    sections, _ = page_of(capsys, "--model", qwen, *SMALL)
    assert sections["Model"][0].startswith("· it reads images too, for which mlx-vlm is needed: ")
    assert "[vlm]" in sections["Model"][0]
    for flags in (["--model", smolvlm], ["--model", qwen, "--data", pictures], ["--model", qwen, "--vision"]):
        sections, _ = page_of(capsys, *flags, *SMALL, status=2)
        assert sections["Model"][0].startswith("✗ ")
        assert "for which mlx-vlm is needed; install it: " in sections["Model"][0]
