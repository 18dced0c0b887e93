"""Rows with images, whatever form they have: the same chat, and the same picture."""

import base64
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from nalora_mlx.__main__ import main
from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.notices import Note
from nalora_mlx.data.checks import images_refused, read_rows, read_run
from nalora_mlx.data.images import open_image
from nalora_mlx.data.rows.formats import Features, parse_row
from nalora_mlx.data.splits import digest
from nalora_mlx.finetuning import _rows_by_split

pytest.importorskip("PIL", reason="Pillow is not installed")
from PIL import Image

NOISE = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
OTHER = NOISE[::-1]
PART, TEXT = {"type": "image"}, {"type": "text", "text": "What is it?"}
ANSWER = {"role": "assistant", "content": "A bird."}
CHAT = [{"role": "user", "content": [PART, TEXT]}, ANSWER]
PAIR = {"prompt": "What is it?", "completion": "A bird."}


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def asked(*parts, **others):
    return {"messages": [{"role": "user", "content": list(parts), **others}, ANSWER]}


def write(directory, *rows, name="train"):
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(data, names=("train",), **settings):
    return read_rows(RunConfig(data=str(data), valid_fraction=0.0, **settings), names)


def rows_of(found):
    assert found.problems == []
    return [row for splits in found.sources for rows in splits.values() for row in rows]


def pictures(row):
    return [np.asarray(open_image(image, row.source)) for image in row.images]


def assert_shows(rows, *pixels, messages=CHAT):
    for row in rows:
        assert row.messages == messages
        found = pictures(row)
        assert len(found) == len(pixels)
        for one, truth in zip(found, pixels, strict=True):
            np.testing.assert_array_equal(one, truth)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(NOISE))
    (tmp_path / "b.png").write_bytes(png(OTHER))
    return tmp_path


# --- forms --------------------------------------------------------------------------------------------------

A, B = "pictures/a.png", "b.png"
BASE64 = base64.b64encode(png(NOISE)).decode()
URI = f"data:image/png;base64,{BASE64}"


def test_every_form_of_a_row_with_one_image(directory):
    sharegpt = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A bird."}]
    rows = [
        PAIR | {"image": A},
        PAIR | {"images": [A]},
        PAIR | {"images": A, "image": None},
        PAIR | {"images": json.dumps([A])},  # as in a cell of a .csv
        PAIR | {"image": {"bytes": None, "path": A}},
        PAIR | {"image": {"url": URI}},
        PAIR | {"prompt": "<image>What is it?", "image": A},
        {"instruction": "What is it?", "output": "A bird.", "image": A},
        {"instruction": "What is it?", "input": "", "output": "A bird.", "images": [A]},
        {"question": "What is it?", "answer": "A bird.", "image": A},
        {"conversations": sharegpt, "image": A},
        asked({"type": "image", "image": A}, TEXT),
        asked({"type": "image", "path": A}, TEXT),
        asked({"type": "image", "url": (directory / A).as_uri()}, TEXT),
        asked({"type": "image", "base64": BASE64}, TEXT),
        asked({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}}, TEXT),
        asked({"type": "image_url", "image_url": {"url": A, "detail": "low"}}, TEXT),
        asked({"type": "image_url", "image_url": URI}, TEXT),
        asked({"type": "image", "image": None, "text": None}, TEXT | {"image": None}) | {"image": A},
        asked({"image": A}, {"text": "What is it?"}),
        asked(PART, TEXT) | {"images": [A]},
        asked(PART, TEXT, images=[A]),
        asked({"type": "image", "image": A}, TEXT) | {"images": [A]},
        asked("What is it?", image=A),
        {"messages": [{"role": "user", "content": "<image>What is it?", "images": [A]}, ANSWER]},
        {"messages": [{"role": "user", "content": "What is it?"}, ANSWER], "image": A},
    ]  # fmt: skip
    write(directory, *rows)
    found = rows_of(read(directory))
    assert len(found) == len(rows)
    assert_shows(found, NOISE)


def test_images_stand_where_the_row_has_them(directory):
    told = {"type": "text", "text": "and"}
    rows = [
        asked({"type": "image", "image": A}, told, {"type": "image", "image": B}),
        asked(PART, told, PART) | {"images": [A, B]},
        asked({"type": "image", "image": A}, told, PART) | {"images": [B]},
        {"prompt": "<image>and<image>", "completion": "A bird.", "images": [A, B]},
        asked("<image>and<image>", images=[A, B]),
    ]
    write(directory, *rows)
    messages = [{"role": "user", "content": [PART, told, PART]}, ANSWER]
    assert_shows(rows_of(read(directory)), NOISE, OTHER, messages=messages)


def test_rows_without_images_beside_rows_with_images(directory):
    write(
        directory,
        PAIR | {"images": None},
        PAIR | {"image": "", "images": []},
        PAIR | {"image": A},
        {"text": "t"},
    )
    none, empty, one, text = rows_of(read(directory))
    plain = [{"role": "user", "content": "What is it?"}, ANSWER]
    assert none.messages == empty.messages == plain
    assert none.images == empty.images == text.images == ()
    assert_shows([one], NOISE)


def test_images_in_parquet(directory):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    from pyarrow import Table

    image = {"bytes": png(NOISE), "path": "gone.png"}
    part = {"type": "image", "image": image, "text": None}
    text = {"type": "text", "image": None, "text": "What is it?"}
    answer = {"role": "assistant", "content": [text | {"text": "A bird."}]}
    tables = {
        "train": [PAIR | {"image": image}, PAIR | {"image": {"bytes": None, "path": A}}],
        "valid": [PAIR | {"images": [png(NOISE)]}],
        "test": [{"messages": [{"role": "user", "content": [part, text]}, answer]}],
    }  # fmt: skip
    for name, rows in tables.items():
        parquet.write_table(Table.from_pylist(rows), directory / f"{name}.parquet")
    found = rows_of(read(directory, ("train", "valid", "test")))
    assert len(found) == 4
    assert_shows(found, NOISE)


def test_images_in_csv(directory):
    (directory / "train.csv").write_text(f"prompt,completion,image\nWhat is it?,A bird.,{A}\n")
    assert_shows(rows_of(read(directory)), NOISE)


@pytest.mark.parametrize("features", ["one", "list", "parts"])
def test_image_columns_of_hub_datasets_are_not_decoded(directory, monkeypatch, features):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    image, string = datasets.Image(), datasets.Value("string")
    data = {"bytes": png(NOISE), "path": None}
    part = {"type": "image", "text": None, "image": data}
    parts = [{"role": "user", "content": [part, {**TEXT, "image": None}]}]
    contents, columns = {
        "one": (PAIR | {"image": data}, {"prompt": string, "completion": string, "image": image}),
        "list": (
            PAIR | {"images": [data]},
            {"prompt": string, "completion": string, "images": datasets.List(image)},
        ),
        "parts": (
            {"prompt": parts, "completion": "A bird."},
            {
                "prompt": [{"role": string, "content": [{"type": string, "text": string, "image": image}]}],
                "completion": string,
            },
        ),
    }[features]
    dataset = datasets.Dataset.from_list([contents] * 3, features=datasets.Features(columns))

    def refuse(*_, **__):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(datasets.Image, "decode_example", refuse)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"train": dataset}))
    found = rows_of(read("owner/name"))
    assert [row.source for row in found] == [f"owner/name[train]:{n}" for n in (1, 2, 3)]
    assert all(row.images == (png(NOISE),) for row in found)
    assert_shows(found, NOISE)
    in_memory = read_rows(RunConfig(valid_fraction=0.0), ("train",), rows=_rows_by_split(dataset))
    assert_shows(rows_of(in_memory), NOISE)


def test_datasets_that_decode_by_themselves_are_left_alone(directory):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    dataset = datasets.Dataset.from_list(
        [PAIR | {"image": {"bytes": png(OTHER), "path": None}}],
        features=datasets.Features(
            {
                "prompt": datasets.Value("string"),
                "completion": datasets.Value("string"),
                "image": datasets.Image(),
            }
        ),
    ).with_transform(lambda rows: rows | {"image": [image.transpose(1) for image in rows["image"]]})
    assert Image.Transpose.FLIP_TOP_BOTTOM == 1
    found = read_rows(RunConfig(valid_fraction=0.0), ("train",), rows=_rows_by_split(dataset))
    assert_shows(rows_of(found), NOISE)


def test_rows_in_memory(directory, monkeypatch):
    monkeypatch.chdir(directory)
    gray = np.repeat(NOISE[..., :1], 3, 2)
    with_alpha = np.dstack([NOISE, np.full((7, 5), 255, np.uint8)])
    images = [Image.fromarray(NOISE), NOISE, NOISE[:, ::-1][:, ::-1], with_alpha, png(NOISE)]
    images += [bytearray(png(NOISE)), memoryview(png(NOISE)), A, Path(A), (directory / A), URI]
    rows = [PAIR | {"image": image} for image in images]
    rows += [asked({"type": "image", "image": images[0]}, TEXT) | {"images": images[:1]}]
    rows += [PAIR | {"images": (NOISE,)}, asked({"type": "image", "image": NOISE}, TEXT)]
    found = read_rows(RunConfig(valid_fraction=0.0), ("train",), rows={"train": rows})
    assert_shows(rows_of(found), NOISE)
    rows = [PAIR | {"image": array} for array in (NOISE[..., 0], NOISE[..., :1])]
    found = read_rows(RunConfig(valid_fraction=0.0), ("train",), rows={"train": rows})
    assert_shows(rows_of(found), gray)


def test_later_changes_of_an_array_do_not_count():
    arrays = [
        NOISE.copy(),
        np.dstack([NOISE, np.full((7, 5), 255, np.uint8)]),
    ]  # Pillow shares memory with the second
    rows = [parse_row("row 1", PAIR | {"image": array}, Features()) for array in arrays]
    for array in arrays:
        array[:] = 0
    assert_shows(rows, NOISE)


# --- paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.jsonl", ".", "train.json", "splits.json"])
def test_relative_paths_start_at_the_data_file(directory, monkeypatch, name):
    row = PAIR | {"image": A}
    write(directory, row)
    (directory / "train.json").write_text(json.dumps([row]))
    (directory / "splits.json").write_text(json.dumps({"train": [row]}))
    if name == ".":
        (directory / "train.json").unlink()
        (directory / "splits.json").unlink()
    elsewhere = directory / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for data in (directory / name, Path("..") / name):
        found = rows_of(read(data))
        assert_shows(found, NOISE)
        assert found[0].images == (
            os.path.join(Path(data).absolute() if name == "." else Path(data).absolute().parent, A),
        )
        assert os.path.isabs(found[0].images[0])


def test_relative_paths_of_hub_datasets_are_refused(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    dataset = datasets.Dataset.from_list([PAIR | {"image": A}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"train": dataset}))
    assert read("owner/name").problems == [
        f"owner/name[train]:1: image {A} is a relative path, and a data set of the Hub is no directory; "
        "download the data set, or use one with an Image column"
    ]


# --- bad rows -----------------------------------------------------------------------------------------------

NOT_AN_IMAGE = "an image must be a path, a data URI, bytes, an image of Pillow or an array, not"
AS_MANY = "give as many, or remove the image parts"
TWICE = [{"role": "user", "content": "<image><image>", "images": [A]}, ANSWER]
BAD_ROWS = [
    (PAIR | {"image": 3}, f"{NOT_AN_IMAGE} int"),
    (PAIR | {"images": [[A]]}, f"{NOT_AN_IMAGE} list"),
    (PAIR | {"images": [A, None]}, "one of the images is null or empty; give its path, or remove it"),
    (asked(PART, PART) | {"images": [A]}, f"the messages need 2 images, and 'images' holds 1; {AS_MANY}"),
    (
        PAIR | {"prompt": "<image>", "images": [A, B]},
        f"the messages need 1 image, and 'images' holds 2; {AS_MANY}",
    ),
    (asked(PART, TEXT), f"the messages need 1 image, and 'images' holds 0; {AS_MANY}"),
    ({"messages": TWICE}, f"the messages need 2 images, and 'images' holds 1; {AS_MANY}"),
    (
        asked({"type": "video", "video": "a.mp4"}),
        "the 'content' of message 1 has a part of type 'video'; parts must be of type 'text' or 'image'",
    ),
    (
        {"text": "A bird.", "image": A},
        "'image' is read beside a prompt and a completion or in a chat, not beside a text; write 'prompt' and "
        "'completion', or remove it",
    ),
    (
        PAIR | {"image": "\ud83d.png"},
        "the path of an image holds half of a surrogate pair, which is not a character; fix the escapes (\\ud83d ...)",
    ),
]


def test_each_bad_row_is_one_line_that_names_it(directory):
    write(directory, PAIR | {"image": A}, *(row for row, _ in BAD_ROWS))
    found = read(directory)
    lines = [f"{directory}/train.jsonl:{number}: {what}" for number, (_, what) in enumerate(BAD_ROWS, 2)]
    assert found.problems == lines
    assert len(found.sources[0]["train"]) == 1


def test_every_bad_image_of_a_row_is_named(directory):
    write(directory, PAIR | {"images": ["c.png", A, "d.png"]})
    assert [problem.split(" ")[2] for problem in read(directory).problems] == ["c.png", "d.png"]


@pytest.mark.parametrize(
    "array",
    [NOISE.astype(np.float32) / 255, NOISE[None], NOISE[0, 0], NOISE[..., :2], NOISE.astype(np.int64)],
)
def test_arrays_of_other_shapes_and_types_are_refused(array):
    rows = {"train": [PAIR | {"image": array}]}
    (problem,) = read_rows(RunConfig(valid_fraction=0.0), ("train",), rows=rows).problems
    assert problem.startswith(
        f"row 1: an image is an array {list(array.shape)} of {array.dtype}; give [height, width"
    )
    rows = {"train": [PAIR | {"image": NOISE[:0]}]}
    (problem,) = read_rows(RunConfig(valid_fraction=0.0), ("train",), rows=rows).problems
    assert problem == "row 1: an image is an array [0, 5, 3], without pixels; remove the row"


def test_markers_without_images_are_announced(directory):
    tag = PAIR | {"prompt": "What does <image> mean in HTML?"}
    write(directory, tag, PAIR)
    assert read(directory).notices == []  # text about markup
    write(directory, tag, PAIR | {"image": A})
    (notice,) = read(directory).notices
    assert notice == (
        f"train: 1 of 2 rows has the text '<image>', but no image ({directory}/train.jsonl:1); "
        "the model reads it as text; add the images, or remove it"
    )
    assert not isinstance(notice, Note)


# --- models that do not see ---------------------------------------------------------------------------------


def test_models_that_do_not_see_refuse_rows_with_images(directory, model_directory, capsys):
    write(directory, PAIR, PAIR | {"image": A})
    write(directory, PAIR | {"prompt": "And this?", "images": [B]}, name="valid")
    found = read_run(RunConfig(data=str(directory), train=True))
    assert found.has_images
    what = "holds images, which only vision-language models read; remove the images, or the row"
    assert images_refused(found) == [
        f"{directory}/train.jsonl:2: {what}",
        f"{directory}/valid.jsonl:1: {what}",
    ]
    flags = ["--train", "--model", str(model_directory), "--data", str(directory), "--adapter-path"]
    assert main(["lora", *flags, str(directory / "adapters")]) == 2
    assert f"error: {directory}/train.jsonl:2, {directory}/valid.jsonl:1: {what}\n" in capsys.readouterr().err
    assert not (directory / "adapters").exists()
    write(directory, PAIR)
    assert not read(directory).has_images
    assert images_refused(read(directory)) == []


def test_doctor_refuses_them_too(directory, model_directory, capsys):
    write(directory, PAIR, PAIR | {"image": A})
    assert main(["doctor", "--model", str(model_directory), "--data", str(directory)]) == 2
    assert "train.jsonl:2: holds images, which only vision-language models read" in capsys.readouterr().out


# --- digests ------------------------------------------------------------------------------------------------


def test_rows_differ_if_their_pictures_differ(directory):
    rows = [PAIR | {"image": A}, PAIR | {"image": B}, PAIR | {"images": [A, B]}, PAIR, PAIR | {"image": URI}]
    write(directory, *rows)
    first, second, both, none, same = map(digest, rows_of(read(directory)))
    assert len({first, second, both, none}) == 4
    assert first == same
    (directory / A).write_bytes(png(OTHER))
    again, *_ = map(digest, rows_of(read(directory)))
    assert again == second != first


def test_rows_in_several_splits_are_found_by_their_pictures(directory):
    write(directory, PAIR | {"image": A}, PAIR | {"image": URI})
    write(directory, PAIR | {"image": B}, name="valid")
    assert read(directory, ("train", "valid")).notices == []
    (directory / "copy.png").write_bytes(png(NOISE))
    write(directory, PAIR | {"image": "copy.png"}, name="test")
    found = read_rows(RunConfig(data=str(directory)), ("train", "valid"), compare_with_test=True)
    (notice,) = found.notices
    assert notice.startswith(
        f"test: 1 row is in train too ({directory}/test.jsonl:1 is {directory}/train.jsonl:1)"
    )


def test_pictures_that_vanish_are_named(directory):
    write(directory, PAIR | {"image": A})
    (row,) = rows_of(read(directory))
    (directory / A).unlink()
    with pytest.raises(InputError, match=r"image .*a.png cannot be read \(No such file"):
        digest(row)
