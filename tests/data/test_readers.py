"""Every form of data file gives the rows that the same content gives as .jsonl, and bad files give problems only."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.optional_dependencies import install_command
from nalora_mlx.data.sources import json_files
from nalora_mlx.data.sources.files import Remarks
from nalora_mlx.data.sources.readers import form_and_stem, read_file, read_texts

PAIRS = [
    {"prompt": "where, please?", "completion": 'say "left"'},
    {"prompt": "two\nlines", "completion": "é; ü\t🦊"},
    {"prompt": "  spaces ", "completion": "-"},
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"to": "Bern"}}}]},
        ],
        "tools": [{"function": {"name": "f", "parameters": {"to": {"type": "string"}}}}],
    },
    {
        "messages": [
            {"role": "user", "content": "b"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"count": 2}}}]},
        ],
        "tools": [{"function": {"name": "g", "parameters": {"count": {"type": "integer", "minimum": 1}}}}],
    },
    {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
]


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows, delimiter=",", **options):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


# Form -> how to write rows in it. Tables hold texts only, the others any row.
TABLES = {
    ".csv": table,
    ".tsv": lambda rows: table(rows, "\t"),
}
TREES = {
    ".jsonl": json_lines,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".parquet": parquet,
}


def zstandard(content):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    return pa.compress(content, codec="zstd", asbytes=True)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}


def read(path):
    """Return the contents of a file's rows; there must be no problem."""
    remarks = Remarks()
    rows = [content for _, content in read_file(path, remarks)]
    assert remarks.problems == []
    return rows


def problems(path):
    remarks = Remarks()
    list(read_file(path, remarks))
    return [problem.removeprefix(str(path)) for problem in remarks.problems]


def write(directory, name, content):
    path = directory / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("form", [*TABLES, *TREES])
def test_every_form_gives_the_same_rows(tmp_path, form):
    writer = (TABLES | TREES)[form]
    assert read(write(tmp_path, f"a{form}", writer(PAIRS))) == PAIRS
    assert read(write(tmp_path, f"b{form.upper()}", writer(PAIRS))) == PAIRS


@pytest.mark.parametrize("form", TREES)
def test_nested_rows_are_the_same_in_every_form(tmp_path, form):
    """Parquet gives the objects of a column the same keys; those that it adds are removed."""
    assert read(write(tmp_path, f"a{form}", TREES[form](CHATS))) == CHATS


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("form", [".jsonl", ".json", ".csv"])
def test_compressed_files(tmp_path, form, suffix):
    content = COMPRESS[suffix]((TABLES | TREES)[form](PAIRS))
    path = write(tmp_path, f"train{form}{suffix}", content)
    assert form_and_stem(path) == (form, "train")
    assert read(path) == PAIRS
    path.write_bytes(content[:-9])
    with pytest.raises(InputError, match=f"cannot read {path}: "):
        list(read_file(path, Remarks()))
    path.write_bytes(b"plain")
    with pytest.raises(InputError, match=f"cannot read {path}: "):
        list(read_file(path, Remarks()))


@pytest.mark.parametrize(("name", "module"), [("a.parquet", "pyarrow.parquet"), ("a.jsonl.zst", "pyarrow")])
def test_missing_pyarrow_is_named(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"{name}: .* {re.escape(install_command('data'))}"):
        list(read_file(write(tmp_path, name, b"x"), Remarks()))


def test_files_that_are_something_else(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"
    for name in ("a.parquet", "a.jsonl", "a.csv"):
        with pytest.raises(InputError, match=r"Git LFS pointer.*git lfs pull"):
            list(read_file(write(tmp_path, name, pointer), Remarks()))
    for name in ("a.csv", "a.jsonl"):
        assert problems(write(tmp_path, name, "prompt\na\n".encode("utf-16")))[0].startswith(
            ":1: UTF-16; save the"
        )
    with pytest.raises(InputError, match="not UTF-8 at byte 0"):
        list(read_file(write(tmp_path, "a.json", "[]".encode("utf-16")), Remarks()))
    (tmp_path / "directory.jsonl").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*Is a directory"):
        list(read_file(tmp_path / "directory.jsonl", Remarks()))


# --- JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(PAIRS),
        json.dumps({"version": 1, "description": "x", "data": PAIRS, "tags": ["a"], "empty": []}),
        "\n" + json.dumps(PAIRS) + "\n",
        "\ufeff" + json.dumps(PAIRS),
        "\n".join(json.dumps(row) for row in PAIRS),  # JSON Lines with the wrong name
        "\ufeff\n" + "\n\n".join(json.dumps(row) for row in PAIRS) + "\n",
    ],
)
def test_forms_of_json_files(tmp_path, content):
    assert read(write(tmp_path, "a.json", content)) == PAIRS


def test_a_json_file_that_is_one_row(tmp_path):
    for row in (*CHATS, PAIRS[0], {"conversations": [{"from": "human", "value": "a"}]}):
        assert read(write(tmp_path, "a.json", json.dumps(row))) == [row]
    assert read(write(tmp_path, "a.json", "\n")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"a": 1,}]', r"a.json: not valid JSON \(line 2, column 9"),
        ("3", "a.json: holds a int; give an array"),
        ('{"a": [{}], "b": [{}]}', "a.json: holds 2 lists of objects .'a', 'b'.; keep one"),
        ('{"train": [{}], "b": [{}]}', "a.json: holds lists besides those of the splits .'b'.; remove"),
        ("[" * 10**6 + "]" * 10**6, "a.json: not valid JSON .*nested too deeply"),
        (b'["\xff"]', "a.json: not UTF-8 at byte 2"),
    ],
)
def test_json_files_that_hold_no_rows(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        list(read_file(write(tmp_path, "a.json", content), Remarks()))


def test_json_items_that_are_no_rows_are_numbered(tmp_path):
    path = write(tmp_path, "a.json", '[{"a": 1}, 2, {"a": 1, "a": 2}, {"m": [{"b": 1, "b": 1}]}]')
    assert problems(path) == [
        ":2: holds a int; each item must be one JSON object",
        ":3: holds the key 'a' twice; keep one of the two",
        ":4: holds the key 'b' twice; keep one of the two",
    ]


def test_a_key_that_stands_twice_in_a_row_is_a_problem(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": 1, "a": 1}\n{"m": [{"role": "x", "role": "y"}]}\n')
    assert problems(path) == [
        ":2: holds the key 'a' twice; keep one of the two",
        ":3: holds the key 'role' twice; keep one of the two",
    ]


def test_a_json_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "LARGEST_JSON", 10)
    with pytest.raises(InputError, match="one JSON object per line"):
        list(read_file(write(tmp_path, "a.json", json.dumps(PAIRS)), Remarks()))


# --- CSV ----------------------------------------------------------------------------------------------------


def test_lines_of_a_csv_file(tmp_path):
    """A row is named by the line on which it starts; a blank row is skipped, an empty cell left out."""
    text = '\ufeffprompt,completion\r\n"a\nb",c\r\n\r\n , \r\nd,\r\ne,f,g\r\nh\r\n"i ""j""",k\r\n'
    path = write(tmp_path, "a.csv", text)
    remarks = Remarks()
    assert list(read_file(path, remarks)) == [
        (f"{path}:2", {"prompt": "a\nb", "completion": "c"}),
        (f"{path}:6", {"prompt": "d"}),
        (f"{path}:9", {"prompt": 'i "j"', "completion": "k"}),
    ]
    assert remarks.problems == [
        f"{path}:7: has 3 cells, the header has 2; quote cells that hold the separator",
        f"{path}:8: has 1 cells, the header has 2; quote cells that hold the separator",
    ]


def test_semicolons_and_tabs_in_csv_files(tmp_path):
    for delimiter in ";\t":
        remarks = Remarks()
        path = write(tmp_path, "a.csv", table(PAIRS, delimiter))
        assert [row for _, row in read_file(path, remarks)] == PAIRS
        assert remarks.notices == [f"{path}: its header has no comma, so {delimiter!r} separates the cells"]
    assert read(write(tmp_path, "a.csv", "text\na;b\n")) == [{"text": "a;b"}]


def test_the_index_of_pandas_is_left_out(tmp_path):
    assert read(write(tmp_path, "a.csv", ",text\n0,a\n1,b\n")) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('a,b\n1,2\n3,4\n5,"x"y\n', ":4: not valid CSV .* double the quotes"),
        ('a,b\n1,2\n3,"x\n', ":3: not valid CSV .* double the quotes"),
        ("a,b\r1,2\r", ":1: not valid CSV .* end lines with a line feed"),
        ("a,b,a\n1,2,3\n", ":1: names the column 'a' twice"),
        (b"a,b\n1,2\n3,\xff\n", ":3: not UTF-8 at byte 2"),
        (b"a\xff,b\n", ":1: not UTF-8 at byte 1"),
    ],
)
def test_broken_csv_files(tmp_path, content, message):
    (problem,) = problems(write(tmp_path, "a.csv", content))
    assert re.fullmatch(f"{message}.*", problem)


def test_empty_files_have_no_rows(tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv"):
        assert read(write(tmp_path, name, "")) == []
    assert read(write(tmp_path, "a.csv", "prompt,completion\n")) == []


def test_a_cell_of_a_megabyte(tmp_path):
    assert read(write(tmp_path, "a.csv", "text\n" + "x" * 10**6 + "\n")) == [{"text": "x" * 10**6}]


# --- Parquet, texts -----------------------------------------------------------------------------------------


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path):
    rows = [{"text": f"{i}" * 50} for i in range(20_000)]
    path = write(tmp_path, "a.parquet", parquet(rows))
    tracemalloc.start()
    try:
        assert sum(len(content["text"]) for _, content in read_file(path, Remarks())) == sum(
            len(row["text"]) for row in rows
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2**20  # all rows at once are 8 MB


def test_a_column_that_stands_twice_in_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), path)
    with pytest.raises(InputError, match=r"a.parquet: has the column 'text' twice"):
        list(read_file(path, Remarks()))


def test_rows_of_parquet_are_counted_from_one(tmp_path):
    path = write(tmp_path, "a.parquet", parquet([{"text": str(i)} for i in range(1000)]))
    assert list(read_file(path, Remarks()))[-1] == (f"{path}:1000", {"text": "999"})


def test_texts(tmp_path):
    good = write(tmp_path, "a.txt", "\ufeffone\r\ntwo\n")
    paths = [good, write(tmp_path, "b.md", " \n"), write(tmp_path, "c.txt", b"a\xff")]
    remarks = Remarks()
    assert list(read_texts(paths, remarks)) == [(str(good), {"text": "one\ntwo\n"})]
    assert remarks.problems == [f"{paths[2]}: not UTF-8 at byte 1; save the file as UTF-8"]
    assert remarks.notices == ["1 of 3 text files is empty and was left out"]


# --- malformed files ----------------------------------------------------------------------------------------

VALID = {form: writer(PAIRS) for form, writer in (TABLES | TREES).items() if form != ".parquet"}
VALID |= {".jsonl.gz": gzip.compress(VALID[".jsonl"]), ".csv.xz": lzma.compress(VALID[".csv"])}


@pytest.mark.parametrize("form", [*VALID, ".parquet"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(data=st.data())
def test_malformed_files_give_problems_only(tmp_path, form, data):
    """Cut, overwritten and random files raise InputError or give problems, and nothing else."""
    valid = VALID.get(form) or parquet(PAIRS)
    kind = data.draw(st.sampled_from(["cut", "overwritten", "random"]))
    if kind == "random":
        content = data.draw(st.binary(max_size=60))
    else:
        place = data.draw(st.integers(0, len(valid) - 1))
        inserted = b"" if kind == "cut" else data.draw(st.binary(min_size=1, max_size=6))
        content = valid[:place] + (inserted and inserted + valid[place + len(inserted) :])
    path = write(tmp_path, f"a{form}", content)
    remarks = Remarks()
    rows, error = [], f"{path}:"
    try:
        rows = list(read_file(path, remarks))
    except InputError as raised:
        error = str(raised)
    assert str(path) in error
    assert "\n" not in error
    assert all(isinstance(row, dict) and source.startswith(f"{path}:") for source, row in rows)
    assert all(problem.startswith(f"{path}:") for problem in remarks.problems)
