"""Where rows come from: directories, files, folders of texts, and Hugging Face datasets."""

import json

import pytest

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.checks import read_rows, tokenize
from nalora_mlx.data.sources.loading import hub_entry_splits, load_hub, load_local, read_jsonl
from tests.data.test_tokenization import COMPLETION

ROW = json.dumps(COMPLETION) + "\n"
TABLE = "prompt,completion\nwhat is the bird ?,red\n"


def write(directory, **files):
    """Write files; a double underscore in a name is a slash, a single one a dot."""
    for name, content in files.items():
        path = directory / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return directory


def read(path, names=("train", "valid"), **settings):
    return read_rows(RunConfig(data=str(path), valid_fraction=0.0, **settings), names)


def sources(found, directory, name="train"):
    return [row.source.removeprefix(f"{directory}/") for splits in found.sources for row in splits[name]]


def test_byte_order_mark_carriage_returns_and_blank_lines(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "\xc3\xa9"}\r\n')
    assert read_jsonl(path) == [(f"{path}:1", {"text": "a"}), (f"{path}:3", {"text": "é"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', ":2: not valid JSON"),
        (b'{"text": "a"}\n[1]\n', ":2: holds a list"),
        (b'{"text": "\xff"}\n', ":1: not UTF-8"),
        (b"[" * 100000, ":1: not valid JSON"),
    ],
)
def test_broken_lines_are_named(tmp_path, content, message):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_jsonl(path)


def test_missing_splits_are_empty(tmp_path):
    write(tmp_path, train_jsonl=ROW)
    rows = load_local(tmp_path, ("train", "valid"))
    assert len(rows["train"]) == 1
    assert rows["valid"] == []


# --- files and directories ----------------------------------------------------------------------------------


def test_splits_of_different_forms(tmp_path):
    write(
        tmp_path, train_jsonl=ROW, valid_csv=TABLE, test_json=f"[{ROW}]", README_md="# read me", other_csv="x"
    )
    found = read(tmp_path, ("train", "valid", "test"))
    assert sources(found, tmp_path) == ["train.jsonl:1"]
    assert sources(found, tmp_path, "valid") == ["valid.csv:2"]
    assert sources(found, tmp_path, "test") == ["test.json:1"]
    assert (found.problems, len(found.notices)) == ([], 1)  # the row in train and test


@pytest.mark.parametrize("name", ["validation", "val", "dev"])
def test_other_names_of_the_validation_set(tmp_path, name):
    write(tmp_path, train_jsonl=ROW, **{f"{name}_csv": TABLE})
    found = read(tmp_path)
    assert sources(found, tmp_path, "valid") == [f"{name}.csv:2"]
    assert found.notices == [f"{tmp_path}: {name!r} is read as the valid split"]
    write(tmp_path, valid_csv=TABLE)
    assert sources(read(tmp_path), tmp_path, "valid") == ["valid.csv:2"]
    assert read(tmp_path).notices == []


def test_two_files_of_a_split_are_an_error(tmp_path):
    write(tmp_path, train_jsonl=ROW, train_csv=TABLE)
    with pytest.raises(InputError, match=r"files train.csv, train.jsonl; keep one"):
        read(tmp_path)


def test_shards_of_a_split(tmp_path):
    """The Hub divides large splits into numbered files."""
    write(tmp_path, **{"train-00001-of-00002_jsonl": ROW})
    with pytest.raises(InputError, match=r"files train-00001-of-00002.jsonl; keep all of its parts"):
        read(tmp_path)
    write(tmp_path, **{"train-00000-of-00002_jsonl": ROW})
    assert sources(read(tmp_path), tmp_path) == [
        "train-00000-of-00002.jsonl:1",
        "train-00001-of-00002.jsonl:1",
    ]
    write(tmp_path, train_jsonl=ROW)
    with pytest.raises(InputError, match="one split has the files"):
        read(tmp_path)


def test_a_file_is_the_training_set(tmp_path):
    write(tmp_path, rows_csv=TABLE)
    found = read(tmp_path / "rows.csv")
    assert sources(found, tmp_path) == ["rows.csv:2"]
    assert sources(found, tmp_path, "valid") == []
    with pytest.raises(InputError, match="no rows for test"):
        read(tmp_path / "rows.csv", ("train", "test"))


def test_a_json_file_with_splits(tmp_path):
    content = {"name": "x", "train": [COMPLETION] * 2, "validation": [COMPLETION], "test": []}
    write(tmp_path, rows_json=json.dumps(content))
    found = read(tmp_path / "rows.json")
    assert sources(found, tmp_path) == ["rows.json[train]:1", "rows.json[train]:2"]
    assert sources(found, tmp_path, "valid") == ["rows.json[validation]:1"]
    write(tmp_path, train_json=json.dumps(content))
    with pytest.raises(InputError, match=r"holds several splits; give the file itself: --data .*train.json"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("files", "data", "message"),
    [
        ({}, ".", "has no train.jsonl, nor a file of .jsonl, "),
        ({"rows_jsonl": ROW, "README_md": "x"}, ".", r"none of its files is named train \(rows.jsonl\)"),
        (
            {"data__train_jsonl": ROW, "README_md": "x"},
            ".",
            r"subdirectory holds train.jsonl; give it: --data .*data",
        ),
        ({"a_xlsx": "PK"}, "a.xlsx", "not a form that can be read; give .jsonl, "),
        ({}, "none.csv", "no such file or directory"),
        ({}, "x" * 5000, "no such file or directory"),
        ({"train_jsonl": ""}, ".", "no rows for train"),
        ({"a_txt": " "}, ".", "no rows for train"),
    ],
)
def test_nothing_to_train_on(tmp_path, files, data, message):
    write(tmp_path, **files)
    with pytest.raises(InputError, match=message):
        read(tmp_path / data)


def test_names_that_mislead(tmp_path):
    """A directory may be named like a file, and a split may be a link, a broken link or a directory."""
    write(tmp_path, **{"a_jsonl__Train_CSV": TABLE})
    assert sources(read(tmp_path / "a.jsonl"), tmp_path) == ["a.jsonl/Train.CSV:2"]
    for name in ("link", "broken", "directory"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / "train.csv").symlink_to(tmp_path / "a.jsonl" / "Train.CSV")
    assert sources(read(tmp_path / "link"), tmp_path) == ["link/train.csv:2"]
    (tmp_path / "broken" / "train.csv").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"cannot read .*broken/train.csv: No such file"):
        read(tmp_path / "broken")
    (tmp_path / "directory" / "train.csv").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*train.csv: Is a directory"):
        read(tmp_path / "directory")


def test_problems_of_all_files_are_collected(tmp_path):
    write(tmp_path, train_jsonl=ROW + "[1]\n", valid_csv=TABLE + "x\n", test_json="[3]")
    found = read(tmp_path, ("train", "valid", "test"))
    places = [problem.removeprefix(f"{tmp_path}/").partition(": ")[0] for problem in found.problems]
    assert places == ["train.jsonl:2", "valid.csv:3", "test.json:1"]


def test_problems_in_data_that_is_only_compared(tmp_path):
    write(tmp_path, train_jsonl=ROW, test_csv=TABLE + "x\n", test_jsonl="[")
    found = read_rows(RunConfig(data=str(tmp_path)), ("train",), compare_with_test=True)
    assert found.problems == found.notices == []


# --- texts --------------------------------------------------------------------------------------------------


def test_a_folder_of_texts(tmp_path):
    write(
        tmp_path,
        b_txt="the cat",
        a__c_md="the bird",
        _hidden_txt="x",
        _git__x_md="x",
        photo_png=b"\x89",
    )
    found = read(tmp_path, text_feature="body", chat_feature="text")
    assert sources(found, tmp_path) == ["a/c.md", "b.txt"]
    assert [(row.text, row.chunk) for row in found.sources[0]["train"]] == [
        ("the bird", True),
        ("the cat", True),
    ]
    assert sources(read(tmp_path / "b.txt"), tmp_path) == ["b.txt"]
    masked = read(tmp_path, mask_prompt=True).problems
    assert masked[0].startswith(f"{tmp_path}/a/c.md: --mask-prompt needs")
    assert len(masked) == 2


def test_splits_of_texts(tmp_path):
    write(tmp_path, train__b_txt="b", train__a_txt="a", val__v_md="v", other__x_md="x", y_md="y")
    found = read(tmp_path)
    assert sources(found, tmp_path) == ["train/a.txt", "train/b.txt"]
    assert sources(found, tmp_path, "valid") == ["val/v.md"]
    assert "2 text files belong to no split" in found.notices[0]
    (tmp_path / "train").rename(tmp_path / "texts")
    assert len(sources(read(tmp_path), tmp_path)) == 5  # without train/ all of them are training data


def test_long_texts_are_cut_into_chunks_on_request(tmp_path, tokenizer):
    text = "the cat is red . " * 20
    write(tmp_path, train_jsonl=json.dumps({"text": text}) + "\n" + ROW)
    whole = tokenize(read(tmp_path, chunk=True), tokenizer, 16)["train"]
    cut = tokenize(read(tmp_path), tokenizer, 16)["train"]
    assert len(cut.sequences) == 2
    assert len(whole.sequences) > 5
    write(tmp_path, a__a_txt=text)
    texts = tokenize(read(tmp_path / "a"), tokenizer, 16)["train"]
    assert [s.tokens.tolist() for s in texts.sequences] == [s.tokens.tolist() for s in whole.sequences[:-1]]


# --- Hugging Face -------------------------------------------------------------------------------------------


def test_hub_datasets_through_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.disable_progress_bars()
    path = tmp_path / "rows.jsonl"
    path.write_text(ROW * 10)
    entry = {
        "path": "json",
        "config": {"data_files": str(path), "cache_dir": str(tmp_path / "cache")},
        "train_split": "train[:80%]",
        "valid_split": "train[-20%:]",
    }
    rows = hub_entry_splits(entry, ("train", "valid"))
    assert len(list(rows["train"])) == 8
    assert next(iter(rows["valid"])) == ("json[train[-20%:]]:1", COMPLETION)
    with pytest.raises(InputError, match="give test_split"):
        hub_entry_splits(entry, ("test",))
    with pytest.raises(InputError, match="needs a 'path'"):
        hub_entry_splits({}, ("train",))
    with pytest.raises(InputError, match="must be a mapping"):
        hub_entry_splits(["json"], ("train",))
    with pytest.raises(InputError, match=r"unknown key 'tst_split'; did you mean 'test_split'"):
        hub_entry_splits(entry | {"tst_split": "train"}, ("train",))
    with pytest.raises(InputError, match="ratio is -1"):
        hub_entry_splits(entry | {"ratio": -1}, ("train",))
    found = read_rows(RunConfig(hf_dataset=[entry | {"ratio": 2}, entry]), ("train", "valid"))
    assert [sum(row.weight for row in splits["train"]) for splits in found.sources] == [16, 8]


def test_nulls_of_hub_datasets_are_removed(monkeypatch):
    """Arrow gives each tool the parameters of all others, as nulls."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f", "parameters": {"to": "x"}}]},
        {"messages": [{"role": "user", "content": "b"}], "tools": [{"name": "g", "parameters": {"n": 1}}]},
    ]
    split = datasets.Dataset.from_list(rows)
    loaded = datasets.DatasetDict({"train": split, "validation": split})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    found = load_hub("owner/name", ("train", "valid"))
    assert [content for _, content in found["train"]] == rows
    assert found["valid"][1] == ("owner/name[validation]:2", rows[1])
