"""Unusable rows are found before training and named as file:line, with a remedy."""

import json
import os
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from rich.console import Console

from nalora_mlx.__main__ import main
from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError, listed, places
from nalora_mlx.core.terminal import marked_text
from nalora_mlx.data.chats.chat_encoder import ChatEncoder
from nalora_mlx.data.checks import duplicate_notices, read_rows, tokenize
from nalora_mlx.data.rows.formats import Features, Row, parse_row, parse_rows
from nalora_mlx.data.sources import files
from nalora_mlx.data.sources.files import Remarks
from nalora_mlx.data.sources.loading import hub_entry_splits, load_hub, read_jsonl
from nalora_mlx.data.sources.readers import read_file
from nalora_mlx.data.summary import histogram, mask_pieces, summary
from nalora_mlx.data.tokenization import Example, Split, tokenize_rows, tokenize_split
from tests.conftest import CHAT_TEMPLATE
from tests.data.test_tokenization import CHAT, COMPLETION, with_template

GOOD = json.dumps(COMPLETION)
BAD_LINES = {
    b'{"prompt": ': "not valid JSON",
    b"[1]": "holds a list",
    b'"text"': "holds a str",
    b'{"text": "\xff"}': "not UTF-8 at byte 10",
    b'{"a": ' + b"9" * 5000 + b"}": "not valid JSON",
    b"{" * 50_000: "not valid JSON",
    b'{"question": "x"}': r"'answer' is missing or an empty cell, and 'question' needs it; .* \(found 'question'\)",
    b'{"prompt": "x"}': "'completion' is missing or an empty cell",
    b'{"prompt": 3, "completion": "x"}': "'prompt' must be a string, not int",
    b'{"prompt": "x", "completion": null}': "'completion' must be a string, not NoneType",
    b'{"prompt": "\\ud83d", "completion": "x"}': "'prompt' holds half of a surrogate pair",
    b'{"prompt": "x", "completion": "y", "tools": "z"}': "'tools' must be a list of objects",
    b'{"messages": []}': "must be a list of messages",
    b'{"messages": [{"role": 1}]}': "must be a list of messages",
    b'{"messages": [{"role": "user"}]}': "message 1 of 'messages' has no 'content'",
    b'{"messages": [{"role": "user", "content": 4}]}': "the 'content' of message 1 must be a string, not int",
    b'{"messages": [{"role": "user", "content": "\\udc00"}]}': "message 1 holds half of a surrogate pair",
}


def write(directory, name, lines):
    directory.mkdir(exist_ok=True)
    content = [line if isinstance(line, bytes) else line.encode() for line in lines]
    (directory / f"{name}.jsonl").write_bytes(b"\n".join(content) + b"\n")


def read(directory, names=("train", "valid"), **settings):
    return read_rows(RunConfig(data=str(directory), **settings), names)


def test_all_bad_rows_are_found_at_once(tmp_path):
    lines = [GOOD, *(line for bad in BAD_LINES for line in (bad, GOOD))]
    write(tmp_path, "train", lines)
    found = read(tmp_path).problems
    assert len(found) == len(BAD_LINES)
    by_line = {int(re.match(rf"{tmp_path}/train.jsonl:(\d+): ", text)[1]): text for text in found}
    for number, (line, what) in enumerate(BAD_LINES.items(), 1):
        assert re.search(what, by_line[2 * number]), (line[:50], by_line[2 * number])
        assert re.search(r"; (each|give|add|save|fix|fill)|must be", by_line[2 * number]), by_line[2 * number]


def test_parse_row():
    def parsed(content, **keys):
        return parse_row("x:1", content, Features(**keys))

    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    both = {"prompt": "a", "completion": "b", "text": "c", "messages": CHAT["messages"]}
    assert parsed(both) == Row("x:1", pair)
    del both["completion"]
    assert parsed(both) == Row("x:1", CHAT["messages"])
    del both["messages"]
    assert parsed(both) == Row("x:1", [], text="c")
    assert parsed(both, text="prompt") == Row("x:1", [], text="a")
    assert parsed({**CHAT, "tools": [{"name": "f"}]}) == Row("x:1", CHAT["messages"], [{"name": "f"}])
    with pytest.raises(InputError, match="x:1: --mask-prompt needs prompt/completion or chat rows"):
        parsed(both, mask_prompt=True)


def test_ten_problems_are_listed_and_the_rest_counted(tmp_path, model_directory, capsys):
    write(tmp_path, "train", [*["[1]"] * 14, GOOD])
    flags = ["lora", "--train", "--model", str(model_directory), "--data", str(tmp_path)]
    assert main([*flags, "--adapter-path", str(tmp_path / "a")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    listing = "train.jsonl:1, :2, :3, :4, :5, :6, :7, :8, :9, :10 and 4 more: holds a list; each line"
    assert listing in line
    assert line.count("holds a list") == 1
    assert not (tmp_path / "a").exists()
    assert listed(["a", "b"]) == "a; b"
    assert listed(["a:1: b", "a:2: c: d", "e", "a:3: b", "f:1: b"]) == "a:1, :3, f:1: b; a:2: c: d; e"
    assert listed([f"a:{i}: {i}" for i in range(12)]).endswith("; a:9: 9; and 2 more")
    assert places([f"a.jsonl:{i}" for i in range(1, 13)]).endswith(":9, :10 and 2 more")
    assert places(["a:1", "b:1", "b:2", "c"]) == "a:1, b:1, :2, c"


def test_long_lines_are_named_and_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 100)
    path = tmp_path / "train.jsonl"
    long = b'{"text": "' + b"x" * 1000 + b'"}'
    path.write_bytes(b"\n".join([b'{"text": "a"}', long, b'{"text": "b"}', long]))
    remarks = Remarks()
    rows, problems = list(read_file(path, remarks)), remarks.problems
    assert [source for source, _ in rows] == [f"{path}:1", f"{path}:3"]
    assert [re.sub(r".*:(\d+): .*", r"\1", p) for p in problems] == ["2", "4"]
    assert "split it" in problems[0]
    fits = b'{"text": "' + b"x" * 88 + b'"}'
    assert len(fits) == 100
    path.write_bytes(fits)
    assert len(read_jsonl(path)) == 1


def test_a_line_of_100_mb_is_not_held_in_memory(tmp_path):
    path = tmp_path / "train.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"text": "a"}\n')
    tracemalloc.start()
    try:
        remarks = Remarks()
        rows, problems = list(read_file(path, remarks)), remarks.problems
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [source for source, _ in rows] == [f"{path}:2"]
    assert "longer than 32 MB" in problems[0]
    assert peak < 90 * 2**20


def test_line_endings_and_blank_lines(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b"}\n\n{"text": "c"}')
    assert [source for source, _ in read_jsonl(path)] == [f"{path}:{n}" for n in (1, 4, 6)]


# --- notices ------------------------------------------------------------------------------------------------


def test_notices_of_empty_answers_unknown_roles_and_repeated_rows(tmp_path):
    empty = json.dumps({"prompt": "x", "completion": " "})
    strange = json.dumps(
        {"messages": [{"role": "asistant", "content": "a"}, {"role": "user", "content": "b"}]}
    )
    silent = json.dumps(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}
    )
    calls = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{}]}]
    write(tmp_path, "train", [GOOD, empty, strange, silent, json.dumps({"messages": calls})])
    other = json.dumps(dict(reversed(COMPLETION.items())))  # the same row with its keys in another order
    write(tmp_path, "valid", [strange, other, json.dumps(CHAT)])
    found = read(tmp_path)
    assert found.problems == []
    place = f"{tmp_path}/train.jsonl"
    valid = f"{tmp_path}/valid.jsonl"
    assert found.notices == [
        f"train: 2 of 5 rows have an empty answer ({place}:2, :4); the model learns to answer nothing; "
        "add the answers or remove the rows",
        f"train: 1 of 5 rows has roles like 'asistant' ({place}:3); did you mean 'assistant'?",
        f"valid: 1 of 3 rows has roles like 'asistant' ({valid}:1); did you mean 'assistant'?",
        f"valid: 2 rows are in train too ({valid}:1 is {place}:3, {valid}:2 is {place}:1); "
        "their loss says little; remove them from one of the two",
    ]
    one, other = (parse_row(source, row, Features()) for source, row in (("a:1", COMPLETION), ("b:1", CHAT)))
    assert duplicate_notices([{"train": [one], "test": [other]}]) == []


def test_notices_of_rows_without_an_end_token(tokenizer, tokenizer_directory):
    endless = with_template(tokenizer_directory, CHAT_TEMPLATE.replace("<|im_end|>", " "))
    masked = Features(mask_prompt=True)
    split = tokenize_split([("x:1", CHAT), ("x:2", CHAT)], endless, masked, 1000, "train")
    said = "2 of 2 rows do not end in a supervised end-of-sequence token (x:1, :2)"
    assert any(said in notice for notice in split.notices)
    split = tokenize_split([("x:1", CHAT)], tokenizer, masked, 1000)
    assert split.notices == []
    # A row that is cut has lost its end; the notice about cut rows covers it.
    split = tokenize_split([("x:1", COMPLETION)], tokenizer, Features(), 9)
    assert [n for n in split.notices if "do not end" in n] == []


def test_all_rows_that_the_template_refuses_are_named(tokenizer_directory):
    refuses = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('roles must alternate\nmore') }}{% endif %}"
    tokenizer = with_template(tokenizer_directory, refuses + CHAT_TEMPLATE)
    row = {"messages": [{"role": "user", "content": "no"}, {"role": "assistant", "content": "a"}]}
    rows, problems = parse_rows([("x:1", row), ("x:2", CHAT), ("x:3", row)], Features())
    assert problems == []
    split = tokenize_rows(rows, ChatEncoder(tokenizer, False), 1000)
    assert len(split.sequences) == 1
    assert [error[:4] for error in split.errors] == ["x:1:", "x:3:"]
    assert all("refuses this row (roles must alternate)" in error for error in split.errors)


def test_dataset_names_cannot_be_paths():
    for name in ("../../etc", "a/../b", "a/b/c", "/etc", "a b", "owner/..", "..", ["x"]):
        with pytest.raises(InputError, match="not the name of a Hugging Face dataset"):
            load_hub(name, ("train",))
        with pytest.raises(InputError, match="not the name of a Hugging Face dataset"):
            hub_entry_splits({"path": name}, ("train",))
    with pytest.raises(InputError, match="without trust_remote_code"):
        hub_entry_splits({"path": "a/b", "config": {"trust_remote_code": True}}, ("train",))


# --- display ------------------------------------------------------------------------------------------------


def of_lengths(*lengths):
    return [Example(np.arange(n), np.arange(n) > 2, f"x:{i}") for i, n in enumerate(lengths)]


def test_summary_of_a_split():
    examples = of_lengths(*[5] * 10, *[6] * 5, 1400)
    assert summary("train", Split(examples, rows=16)) == (
        "train: 16 rows, 1,480 tokens, 97% supervised; lengths 5 to 1,400, median 5"
    )
    assert summary("valid", Split(of_lengths(4), rows=1)) == (
        "valid: 1 row, 4 tokens, 25% supervised; lengths 4"
    )
    assert summary("test", Split(examples, rows=3)).startswith("test: 3 rows in 16 sequences, 1,480 tokens,")


@pytest.mark.parametrize(
    ("lengths", "ranges", "counts"),
    [
        # Round numbers, equally wide.
        ([71, 80, 81, 90, 91, 122], ["71 to 80", "81 to 90", "91 to 100", "121 to 130"], [2, 2, 1, 1]),
        ([10, 11, 900, 1000], ["1 to 200", "801 to 1,000"], [2, 2]),
        ([7, 8, 8], ["7", "8"], [1, 2]),
        # With a long tail, each as wide as all before.
        (
            [20] * 9 + [40, 64, 65, 2048],
            ["17 to 32", "33 to 64", "65 to 128", "1,025 to 2,048"],
            [9, 2, 1, 1],
        ),
        ([1, 2, 2, 2, 2, 100], ["1", "2", "65 to 128"], [1, 4, 1]),
        ([2] * 9 + [100_000], ["1 to 1,024", "65,537 to 131,072"], [9, 1]),
        # One bar says nothing.
        ([7], [], []),
        ([7] * 5, [], []),
        (
            [41, 42, 43, 44, 45, 46, 47, 48, 49, 50] * 9,
            ["41 to 42", "43 to 44", "45 to 46", "47 to 48", "49 to 50"],
            [18] * 5,
        ),
    ],
)
def test_a_histogram_has_round_ranges_and_no_empty_ones(lengths, ranges, counts):
    lines = histogram(of_lengths(*lengths), width=10)
    found = [re.fullmatch(r" +([\d,]+(?: to +[\d,]+)?) ([█▏]+) ([\d,]+)", line).groups() for line in lines]
    assert [re.sub(" +", " ", label) for label, _, _ in found] == ranges
    assert [int(number) for _, _, number in found] == counts
    assert [len(bar.replace("▏", "")) for _, bar, _ in found] == [
        round(10 * number / max(counts)) for number in counts
    ]
    assert len({line.index(bar) for line, (_, bar, _) in zip(lines, found, strict=True)}) <= 1  # aligned
    assert len(lines) <= 8


def test_masks_in_colours_or_brackets(tokenizer):
    split = tokenize_split([("x:1", CHAT)], tokenizer, Features(mask_prompt=True), 1000)
    pieces = mask_pieces(split.sequences[0], tokenizer)
    assert [text.strip() for text, supervised in pieces if supervised] == [
        "the bird is red <|im_end|>",
        "the dog <|im_end|>",
    ]
    plain = marked_text("x:1", pieces, colors=False).plain
    assert plain.startswith("x:1\n<|im_start|> system")
    assert plain.count("⟦") == plain.count("⟧") == 2
    text = marked_text("x:1", pieces, colors=True)
    assert "⟦" not in text.plain
    assert [text.plain[s.start : s.end].strip() for s in text.spans if "green" in str(s.style)] == [
        "the bird is red <|im_end|>",
        "the dog <|im_end|>",
    ]
    # Control characters in a row do not reach the terminal.
    console = Console(force_terminal=True, width=80)
    with console.capture() as capture:
        console.print(marked_text("x:1", [("a\x1b[2Jb\x07", True)], colors=True))
    assert "\x1b[2J" not in capture.get()
    assert "\\x1b[2Jb\\x07" in re.sub(r"\x1b\[[0-9;]*m", "", capture.get())


def test_lora_shows_masks(model_directory, data_directory, tmp_path, capsys):
    flags = ["--model", str(model_directory), "--data", str(data_directory), "--mask-prompt", "--iters", "1"]
    place = ["--adapter-path", str(tmp_path / "a")]
    assert main(["lora", "--train", *flags, *place, "--show-masks", "2", "--val-batches", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("⟦") == 2
    assert "⟦the cat is red <|im_end|>⟧" in " ".join(out.split())
    assert "rows are in train too" in out


@pytest.mark.parametrize(("encoding", "brackets", "bar"), [("latin-1", "[[]]", "#"), ("utf-8", "⟦⟧", "█")])
def test_terminals_that_lack_these_characters_get_others(
    encoding, brackets, bar, model_directory, data_directory, tmp_path
):
    flags = ["--model", model_directory, "--data", data_directory, "--mask-prompt", "--iters", "1"]
    place = ["--adapter-path", tmp_path / "a", "--val-batches", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "nalora_mlx", "lora", "--train", *flags, "--show-masks", "1", *place],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode(encoding)
    left, right = brackets[: len(brackets) // 2], brackets[len(brackets) // 2 :]
    assert f"{left}the cat is red <|im_end|>{right}" in " ".join(out.split())
    assert bar * 20 in out


def test_doctor_lists_all_problems(tmp_path, capsys):
    write(tmp_path, "train", [*["[1]"] * 70, *["3"] * 130, GOOD])
    assert main(["doctor", "--data", str(tmp_path)]) in (1, 2)
    out = capsys.readouterr().out
    lists, numbers = (
        line for line in out.splitlines() if "train.jsonl:1" in line or "train.jsonl:71" in line
    )
    assert all(f":{number}" in lists for number in range(1, 71))
    assert "and 30 more: holds a int" in numbers


def test_lora_compares_with_the_test_set_and_draws_a_histogram(
    model_directory, data_directory, tmp_path, capsys
):
    data = tmp_path / "data"
    write(data, "train", [GOOD, json.dumps(CHAT), GOOD])
    write(data, "test", [json.dumps(CHAT)])
    flags = ["--model", str(model_directory), "--data", str(data), "--iters", "1", "--batch-size", "2"]
    flags += ["--valid-fraction", "0", "--no-samples"]
    assert main(["lora", "--train", *flags, "--adapter-path", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert f"test: 1 row is in train too ({data}/test.jsonl:1 is {data}/train.jsonl:2)" in out
    (bar,) = [line for line in out.splitlines() if "█" in line and line.endswith(" 2")]
    assert re.match(r" +\d+( to \d+)? +█{40} 2$", bar)
    # Rows that this run does not use are no problem for it.
    write(data, "test", ["[1]", json.dumps(CHAT)])
    assert read(data, ("train",), train=True).problems == []
    assert read_rows(RunConfig(data=str(data)), ("train",), compare_with_test=True).problems == []


def test_doctor_lists_findings_of_every_kind(model_directory, tmp_path, capsys):
    data = tmp_path / "data"
    long = json.dumps({"prompt": "the cat " * 40, "completion": "red"})
    write(data, "train", [GOOD, "[1]", '{"x": 1}', long, json.dumps({"prompt": "a", "completion": ""})])
    write(data, "valid", [GOOD])
    model = ["--model", str(model_directory)]
    flags = ["--data", str(data), "--mask-prompt", "--max-seq-length", "30", "--show-masks", "1"]
    assert main(["doctor", *model, *flags]) == 2
    done = capsys.readouterr()
    assert "2 problems that keep a run from starting" in done.err
    for words in (
        "✗ .*train.jsonl:2: holds a list",
        "✗ .*train.jsonl:3: no known format",
        "! train: 1 of 3 rows is longer than 30 tokens",
        "! train: 1 of 3 rows has no supervised token",
        "! train: 1 of .* rows has an empty answer",
        "! valid: 1 row is in train too",
        r"✓ train +2 +\d+ +\d+%",
        "⟦the cat is green",
    ):
        assert re.search(words, done.out), words
    write(data, "train", [GOOD, json.dumps(CHAT)])
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {data}\nmask_prompt: true\n")
    assert main(["doctor", *model, "--config", str(config)]) == 0
    assert main(["doctor", "--data", str(tmp_path / "none")]) == 2


def test_the_example_data_has_no_problems(tokenizer):
    found = read("examples/bakery", ("train", "valid", "test"), mask_prompt=True)
    assert found.problems == []
    assert all("are in train too" not in notice for notice in found.notices)
    splits = tokenize(found, tokenizer, 2048)
    assert {name: bool(split.sequences) for name, split in splits.items()} == dict.fromkeys(splits, True)
