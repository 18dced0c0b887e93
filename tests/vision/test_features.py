"""Features of images: computed once, kept by content and processor, and the checks around them."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (pip install '.[vlm]')")

from mlx_vlm.models.base import InputEmbeddingsFeatures

from nalora_mlx.core.errors import InputError
from nalora_mlx.data.batches import collate
from nalora_mlx.data.chats.chat_encoder import ChatEncoder
from nalora_mlx.data.media_batches import first_row
from nalora_mlx.data.rows.formats import Row
from nalora_mlx.data.tokenization import tokenize_rows
from nalora_mlx.models.vision.features import FOLDER, ImageEncoder
from nalora_mlx.models.vision.loading import open_processor, open_vision_model
from nalora_mlx.models.vision.model import (
    as_bits,
    as_floats,
    as_vision_language_model,
    check_embeddings,
    differentiable_assignments,
)
from nalora_mlx.training.loss import media_arrays
from tests.vision.tiny_models import IMAGE, picture, save_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_model("qwen3_vl", tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture(scope="module")
def opened(directory):
    model, config = open_vision_model(str(directory))
    return model, open_processor(str(directory), config)


def build_row(*images, source="x:1", text="What?", reply="A dog."):
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": reply}]
    return Row(source, messages, images=images)


def tokenized(processor, *rows, length=1000):
    split = tokenize_rows(rows, ChatEncoder(processor.tokenizer, True, images=processor), length)
    assert not split.errors
    return split.sequences


def files(directory):
    return sorted(path.name for path in (directory / FOLDER).iterdir())


def towers_run(model, monkeypatch):
    """Return a list to which each run of the vision tower adds an entry."""
    runs, tower = [], type(model.vision_tower)
    original = tower.__call__
    monkeypatch.setattr(
        tower, "__call__", lambda *args, **kwargs: runs.append(1) or original(*args, **kwargs)
    )
    return runs


def test_equal_pictures_are_encoded_once(opened, monkeypatch, tmp_path):
    """However they are given: a picture in memory, its bytes as PNG, and a path have the same pixels."""
    model, processor = opened
    image = picture(24, 16, 5)
    image.save(tmp_path / "a.png")
    given = (image, (tmp_path / "a.png").read_bytes(), str(tmp_path / "a.png"))
    examples = tokenized(processor, *(build_row(one) for one in given), build_row(picture(24, 16, 6)))
    runs = towers_run(model, monkeypatch)
    encoded = ImageEncoder(model, processor, tmp_path).attach(examples)
    assert len(files(tmp_path)) == 2
    assert len(runs) == 3  # and one for the fingerprint
    one, other = (encoded[i].media.features[0].load() for i in (0, 2))
    np.testing.assert_array_equal(one["features"], other["features"])
    ImageEncoder(model, processor, tmp_path).attach(examples)
    assert len(runs) == 4
    assert set(one) == {"features", "deepstack"}
    assert one["deepstack"].shape == (6, 2, 32)


def test_a_changed_file_is_read_again(opened, tmp_path):
    """So is a picture at the address of another one that is gone."""
    _, processor = opened
    for count, size in ((4, (16, 16)), (6, (24, 16)), (16, (32, 32)), (4, (16, 16))):
        picture(*size).save(tmp_path / "a.png")
        assert len(processor.tokens_of(str(tmp_path / "a.png"), "x").tokens) == count
        assert len(processor.tokens_of((tmp_path / "a.png").read_bytes(), "x").tokens) == count
        for seed in range(5):
            assert len(processor.tokens_of(picture(*size, seed), "x").tokens) == count


def test_other_settings_and_other_weights_have_features_of_their_own(directory, tmp_path):
    names = []
    changed = shutil.copytree(directory, tmp_path / "changed")
    settings = json.loads((changed / "preprocessor_config.json").read_text())
    (changed / "preprocessor_config.json").write_text(json.dumps(settings | {"do_convert_rgb": True}))
    for model_directory, factor in ((directory, 1), (directory, 1), (directory, 1.001), (changed, 1)):
        model, config = open_vision_model(str(model_directory))
        merger = model.vision_tower.merger.linear_fc2
        merger.weight = merger.weight * factor
        processor = open_processor(str(model_directory), config)
        encoder = ImageEncoder(model, processor, tmp_path / "run")
        encoder.attach(tokenized(processor, build_row(picture(16, 16))))
        names.append(set(files(tmp_path / "run")))
    assert names[0] == names[1]
    assert [len(found) for found in names] == [1, 1, 2, 3]


def beginning(example, length):
    """Return the beginning of an example, all of it supervised."""
    return replace(example, tokens=example.tokens[:length], loss_mask=np.ones(length, bool))


def test_the_beginning_of_a_chat_needs_its_own_images_only(opened, tmp_path):
    """A long chat is trained in sequences that lack the images of later turns."""
    model, processor = opened
    (example,) = tokenized(processor, build_row(picture(16, 16), picture(24, 16)))
    positions = np.flatnonzero(example.tokens == IMAGE)
    assert len(positions) == 4 + 6
    encoder = ImageEncoder(model, processor, tmp_path)
    given = [example, beginning(example, positions[4]), beginning(example, positions[0])]
    both, one, none = (row.media for row in encoder.attach(given))
    assert (len(both.features), len(one.features), none) == (2, 1, None)
    assert one.positions.tolist() == positions[:4].tolist()
    with pytest.raises(InputError, match="x:1: 7 tokens of images, and features of 10"):
        encoder.attach([beginning(example, positions[7])])


def test_first_row_of_a_batch(opened, tmp_path):
    """The first row by itself has the logits that it has in a batch."""
    model, processor = opened
    rows = [build_row(picture(24, 16), picture(16, 16)), build_row(picture(32, 32)), build_row()]
    for trained in (False, True):
        examples = ImageEncoder(model, processor, tmp_path, trained).attach(tokenized(processor, *rows))
        batch = collate(examples, [0, 1, 2]).with_media()
        whole = model(mx.array(batch.inputs), media=media_arrays(batch.media))
        one = model(mx.array(batch.inputs[:1]), media=media_arrays(first_row(batch.media)))
        np.testing.assert_allclose(np.array(one), np.array(whole[:1]), atol=1e-5)


def test_chats_that_the_processor_reads_otherwise_are_refused(directory):
    """If the processor numbers its images, say, they have other tokens together than one by one."""
    _, config = open_vision_model(str(directory))
    processor = open_processor(str(directory), config)
    original = type(processor.processor).__call__

    class Numbering(type(processor.processor)):
        def __call__(self, images=None, text=None, **settings):
            if images is not None and len(images) > 1:
                text = [f"{len(images)} images: {text[0]}"]
            return original(self, images=images, text=text, **settings)

    processor.processor.__class__ = Numbering
    encoder = ChatEncoder(processor.tokenizer, True, images=processor)
    split = tokenize_rows([build_row(picture(16, 16))], encoder, 1000)
    assert not split.errors
    split = tokenize_rows([build_row(picture(16, 16), picture(24, 24), source="x:7")], encoder, 1000)
    assert len(split.errors) == 1
    assert split.errors[0].startswith("x:7: the model's processor makes other tokens of this chat")


@pytest.mark.parametrize("kind", ["mllama", "florence2", "diffusion_gemma"])
def test_models_that_read_images_otherwise_are_refused_by_name(kind, directory, tmp_path):
    model = shutil.copytree(directory, tmp_path / kind)
    (model / "config.json").write_text(json.dumps({"model_type": kind, "vision_config": {"a": 1}}))
    for load in (open_vision_model, lambda name: open_processor(name, {"model_type": kind})):
        with pytest.raises(InputError, match=f"models of type {kind} do not pass their images") as error:
            load(str(model))
        assert "\n" not in str(error.value)


def test_unknown_ways_to_read_images_are_refused_by_name(opened):
    class Model(nn.Module):
        language_model = None

    with pytest.raises(InputError, match="do not pass their images to a language model"):
        as_vision_language_model(Model())
    model, _ = opened
    with pytest.raises(InputError, match="models of type qwen3_vl pass their images on as pos_hw"):
        check_embeddings(model, InputEmbeddingsFeatures(mx.zeros((1, 2, 4)), pos_hw=mx.zeros(3)))


def test_half_precision_survives_numpy():
    x = mx.random.normal((3, 5), key=mx.random.key(0))
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        given = x.astype(dtype)
        back = as_floats(mx.array(as_bits(given)))
        assert back.dtype == dtype
        assert mx.array_equal(back, given)


@pytest.mark.parametrize(
    "index",
    [(slice(None), [1, 3], slice(None)), (slice(None), [2]), (0, [1, 3]), slice(1, 3)],
    ids=str,
)
def test_assignments_are_differentiable(index):
    """The gradient of an assignment is that of the assigned values; what the index means does not change."""
    shape = np.zeros((1, 5, 4))[index].shape
    values = mx.random.normal(shape, key=mx.random.key(1))

    def assigned(values):
        array = mx.ones((1, 5, 4))
        array[index] = values
        return array

    expected = np.ones((1, 5, 4), np.float32)
    expected[index] = np.array(values)
    with differentiable_assignments():
        found = assigned(values)
        gradient = mx.grad(lambda values: mx.sum(mx.square(assigned(values))))(values)
    np.testing.assert_array_equal(np.array(found), expected)
    np.testing.assert_allclose(np.array(gradient), 2 * np.array(values), rtol=1e-6)
    array = mx.zeros(3)
    array[1] = 2
    assert array.tolist() == [0, 2, 0]
