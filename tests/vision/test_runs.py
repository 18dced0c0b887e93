"""Whole runs on rows with images: resume, accumulation, features computed once, memory plans, and refusals."""

import json
import shutil
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nalora_mlx
from nalora_mlx.__main__ import main
from nalora_mlx.core.errors import InputError
from nalora_mlx.models.vision.features import FOLDER, ImageEncoder
from nalora_mlx.models.vision.loading import open_vision_model
from nalora_mlx.training.loss import SupervisedLoss

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (pip install '.[vlm]')")

from tests.vision.tiny_models import picture, save_model

SETTINGS = {
    "iters": 6,
    "batch_size": 2,
    "rank": 2,
    "learning_rate": 1e-2,
    "mask_prompt": True,
    "steps_per_report": 2,
    "steps_per_eval": 3,
    "save_every": 3,
    "samples": False,
    "mask_warmup": 1,
    "progress": False,
}


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    return save_model("qwen3_vl", tmp_path_factory.mktemp("models") / "qwen3_vl")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write rows with one, two or no images of different sizes; two rows share an image."""
    directory = tmp_path_factory.mktemp("data")
    for number, size in enumerate([(32, 32), (48, 32), (32, 64), (64, 32)]):
        picture(*size, seed=number).save(directory / f"{number}.png")
    rows = []
    for number in range(8):
        images = [[number % 4], [number % 4, (number + 1) % 4], []][number % 3]
        parts = [{"type": "image", "image": f"{i}.png"} for i in images]
        content = [*parts, {"type": "text", "text": "What is it? " + "x" * number}]
        answer = {"role": "assistant", "content": "It is " + "y" * (number + 1)}
        rows.append({"messages": [{"role": "user", "content": content}, answer]})
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    return directory


def run(model, data, output, **settings):
    return nalora_mlx.finetune(model, data, output, **SETTINGS | settings)


def arrays(output):
    return load_file(output / "adapters.safetensors")


@pytest.fixture(scope="module")
def trained(vision_model, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "a"
    return output, run(vision_model, data, output)


@pytest.mark.parametrize("towers", [{}, {"vision": True}], ids=["language", "vision"])
def test_a_resumed_run_ends_bit_for_bit_the_same(vision_model, data, trained, tmp_path, towers):
    whole = trained[0]
    if towers:
        whole = tmp_path / "whole"
        run(vision_model, data, whole, **towers)
    run(vision_model, data, tmp_path / "a", iters=3, **towers)
    nalora_mlx.finetune(output=tmp_path / "a", resume=True, iters=6, progress=False)
    before, after = arrays(whole), arrays(tmp_path / "a")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    in_tower = [name for name in before if not name.startswith("language_model.")]
    assert bool(in_tower) == bool(towers)
    # The last merger adds to images after the last layer, which no other position reads.
    reached = [name for name in in_tower if name.endswith("lora_b") and "merger_list.1" not in name]
    assert all(before[name].any() for name in reached)


def test_a_run_with_another_picture_is_not_resumed(vision_model, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    run(vision_model, tmp_path / "data", tmp_path / "a", iters=3)
    picture(32, 32, seed=9).save(tmp_path / "data" / "0.png")
    with pytest.raises(InputError, match="rows"):
        nalora_mlx.finetune(output=tmp_path / "a", resume=True, iters=6, progress=False)


@pytest.mark.parametrize("towers", [{}, {"projector": True}], ids=["language", "projector"])
def test_accumulated_batches_are_as_one(vision_model, data, tmp_path, towers):
    """All rows in one batch, and in four accumulated ones; with SGD the update is linear in the gradient."""
    common = {"iters": 1, "fine_tune_type": "lora", "optimizer": "sgd", "learning_rate": 1.0, **towers}
    run(vision_model, data, tmp_path / "one", **common | {"batch_size": 8})
    common["iters"] = 4
    run(vision_model, data, tmp_path / "four", **common | {"grad_accumulation_steps": 4})
    one, four = arrays(tmp_path / "one"), arrays(tmp_path / "four")
    for name in one:
        scale = np.abs(one[name]).max()
        np.testing.assert_allclose(four[name], one[name], atol=1e-4 * scale + 1e-7, err_msg=name)


def test_the_tower_sees_each_image_once(vision_model, data, tmp_path):
    """Four pictures, in ten places; and one more for the fingerprint of the tower."""
    calls = []
    original = ImageEncoder._run_towers

    def counting(self, *arguments):
        calls.append(arguments)
        return original(self, *arguments)

    with patch.object(ImageEncoder, "_run_towers", counting):
        run(vision_model, data, tmp_path / "a", iters=2)
        assert len(calls) == 5
        assert len(list((tmp_path / "a" / FOLDER).iterdir())) == 4
        run(vision_model, data, tmp_path / "a", iters=2)
        assert len(calls) == 6
        run(vision_model, data, tmp_path / "a", iters=2, vision=True)
        assert len(calls) == 6


def test_the_output_head_does_not_run_the_layers(tmp_path):
    """The language model of SmolVLM has norm and head beside its layers. Each layer runs once, head included."""
    model, _ = open_vision_model(str(save_model("smolvlm", tmp_path / "model")))
    nalora_mlx.adapt(model, nalora_mlx.NALoRAConfig(rank=2))
    loss, calls = SupervisedLoss(model), []
    assert loss.has_tiles
    kind = type(model.layers[0])
    original = kind.__call__

    def counting(layer, *args, **kwargs):
        calls.append(args[0].shape)
        return original(layer, *args, **kwargs)

    arrays = {"inputs": mx.array([[9, 10, 11, 12]]), "rows": mx.array([1, 2]), "targets": mx.array([11, 12])}
    arrays["weights"] = mx.ones(2)
    with patch.object(kind, "__call__", counting):
        value, _ = loss(arrays)
    assert calls == [(1, 4, 32)] * len(model.layers)
    logits = model(mx.array([[9, 10, 11, 12]]))[0, 1:3]
    expected = nn.losses.cross_entropy(logits, mx.array([11, 12]), reduction="sum")
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_damaged_features_are_computed_again(vision_model, data, tmp_path):
    run(vision_model, data, tmp_path / "a", iters=3)
    files = sorted((tmp_path / "a" / FOLDER).iterdir())
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_bytes(b"no archive")
    files[2].unlink()
    run(vision_model, data, tmp_path / "b", iters=6)
    nalora_mlx.finetune(output=tmp_path / "a", resume=True, iters=6, progress=False)
    before, after = arrays(tmp_path / "a"), arrays(tmp_path / "b")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_notice_says_that_towers_learn_nothing_from_texts(vision_model, tmp_path, capsys):
    row = {"prompt": "What is it?", "completion": "It is yyy."}
    run(vision_model, [row] * 4, tmp_path / "a", iters=1, projector=True, progress=True, valid_fraction=0)
    assert "no row has images" in capsys.readouterr().out


def test_a_model_without_the_weights_of_its_tower_is_refused(vision_model, data, tmp_path):
    directory = shutil.copytree(vision_model, tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    kept = {name: array for name, array in weights.items() if not name.startswith("vision_tower.")}
    save_file(kept, directory / "model.safetensors", {"format": "mlx"})
    with pytest.raises(InputError, match="without the weights of its vision tower"):
        run(directory, data, tmp_path / "a")


IMAGE = {"type": "image", "image": "0.png"}


@pytest.mark.parametrize("case", ["left out", "as text"])
def test_no_image_takes_the_place_of_another(vision_model, data, tmp_path, case):
    """A template that leaves out the image of one turn, and a placeholder in the text of another turn."""
    question = {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is it?"}]}
    answer = {"role": "assistant", "content": "A mark."}
    if case == "left out":
        settings = {
            "chat_template": "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
            "{% if loop.index == 1 %}<|image_pad|>{% endif %}{{ m['content'][-1]['text'] }}{% endif %}{% endfor %}"
        }
        messages, found = (
            [question, answer, question, answer],
            "stands in it 1 time; the chat template leaves some out",
        )
        template = tmp_path / "template.jinja"
        template.write_text(settings["chat_template"])
        settings["chat_template"] = str(template)
    else:
        settings, found = {}, "stands in it 2 times; remove that text"
        text = {"role": "user", "content": "What is <|image_pad|> ?"}
        messages = [text, answer, question, answer]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": messages}) + "\n")
    shutil.copy(data / "0.png", tmp_path)
    with pytest.raises(InputError, match=rf"rows.jsonl:1: the chat has .*{found}"):
        run(vision_model, rows, tmp_path / "a", valid_fraction=0, **settings)


def test_training_lowers_the_loss(trained):
    result = trained[1]
    losses = [loss for _, loss in result.validation_losses]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("flags", [[], ["--vision"]], ids=["language", "vision"])
def test_plan(vision_model, data, tmp_path, capsys, flags):
    argv = ["lora", "--plan", "--model", vision_model, "--data", data, "--batch-size", "2", *flags]
    assert main([*map(str, argv), "--adapter-path", str(tmp_path / "a")]) == 0
    output = capsys.readouterr().out
    assert "fits" in output
    assert ("image token" in output) == bool(flags)
    assert not (tmp_path / "a" / "adapters.safetensors").exists()


def test_a_test_set_has_the_loss_of_validation(vision_model, data, trained, tmp_path, capsys):
    """The loss on the same rows as the last validation's, from the saved adapter."""
    (tmp_path / "test.jsonl").write_text((data / "valid.jsonl").read_text())
    for image in data.glob("*.png"):
        shutil.copy(image, tmp_path)
    argv = ["lora", "--test", "--model", vision_model, "--data", tmp_path, "--adapter-path", trained[0]]
    assert main([*map(str, argv), "--mask-prompt", "--batch-size", "2"]) == 0
    loss = float(capsys.readouterr().out.split("test loss ")[1].split(",")[0])
    assert loss == pytest.approx(trained[1].validation_losses[-1][1], abs=2e-3)


REFUSED = {
    "packing": ({"packing": True}, "packing: the rows of a vision-language model cannot be packed"),
    "full": ({"fine_tune_type": "full"}, "full fine-tuning does not take images"),
    "short": (
        {"max_seq_length": 12, "mask_prompt": False},
        "an image reaches beyond the maximum of 12 tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_images_is_refused(vision_model, data, tmp_path, name):
    settings, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        run(vision_model, data, tmp_path / "a", **settings)


def test_models_that_do_not_see_refuse_each_row(model_directory, data, tmp_path):
    with pytest.raises(InputError, match=r"train.jsonl:1, :2, :4, .*: holds images") as refused:
        run(model_directory, data, tmp_path / "a")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("setting", ["vision", "projector"])
def test_towers_of_models_without_any_are_refused(model_directory, data_directory, tmp_path, setting):
    with pytest.raises(InputError, match=setting):
        run(model_directory, data_directory, tmp_path / "a", **{setting: True})
