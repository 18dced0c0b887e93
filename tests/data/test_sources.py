"""Rows from files and from Hugging Face datasets."""

import json

import pytest

from nalora_mlx.core.errors import InputError
from nalora_mlx.data.sources import load_hub_entry, load_local, read_jsonl
from tests.data.test_tokenization import COMPLETION


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
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    rows = load_local(tmp_path, ("train", "valid"))
    assert len(rows["train"]) == 1
    assert rows["valid"] == []


def test_hub_datasets_through_the_datasets_library(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.disable_progress_bars()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(COMPLETION) + "\n" for _ in range(10)))
    entry = {
        "path": "json",
        "config": {"data_files": str(path), "cache_dir": str(tmp_path / "cache")},
        "train_split": "train[:80%]",
        "valid_split": "train[-20%:]",
    }
    rows = load_hub_entry(entry, ("train", "valid"))
    assert len(rows["train"]) == 8
    assert rows["valid"][0] == ("json[train[-20%:]]:1", COMPLETION)
    with pytest.raises(InputError, match="give test_split"):
        load_hub_entry(entry, ("test",))
    with pytest.raises(InputError, match="needs a 'path'"):
        load_hub_entry({}, ("train",))
    with pytest.raises(InputError, match="must be a mapping"):
        load_hub_entry(["json"], ("train",))
    with pytest.raises(InputError, match=r"unknown key 'tst_split'; did you mean 'test_split'"):
        load_hub_entry(entry | {"tst_split": "train"}, ("train",))
