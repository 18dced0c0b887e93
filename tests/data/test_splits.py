"""Hold-out, ratios and weights: exact counts, no row on both sides, the same draw each time."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalora_mlx.__main__ import main
from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.data_entries import data_entries
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.checks import read_rows, tokenize
from nalora_mlx.data.rows.formats import Row
from nalora_mlx.data.splits import copies_per_row, digest, held_out

WORDS = ("the cat", "the bird", "the dog", "red", "green", "blue", "one", "two", "three")


def row(number, **extra):
    """Return one of many different rows whose tokens tell them apart."""
    prompt = " ".join(WORDS[int(digit)] for digit in f"{number:o}")
    return {"prompt": prompt, "completion": "red", **extra}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(content) + "\n" for content in rows))
    return path


def read(data, names=("train", "valid"), **settings):
    data = [str(item) for item in data] if isinstance(data, list) else data
    data = data if isinstance(data, list | dict) else str(data)
    found = read_rows(RunConfig(data=data, **settings), names)
    assert found.problems == []
    return found


def prompts(found, name):
    return [
        content.messages[0]["content"]
        for splits in found.sources
        for content in splits[name]
        for _ in range(content.weight if name == "train" else 1)
    ]


# --- validation split ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "fraction", "count"), [(240, 0.05, 12), (100, 0.1, 10), (2, 0.05, 1), (3, 0.5, 1), (9, 0.5, 4)]
)
def test_a_fraction_of_the_rows_is_held_out(tmp_path, rows, fraction, count):
    path = write(tmp_path / "a.jsonl", [row(i) for i in range(rows)])
    found = read(path, valid_fraction=fraction)
    train, valid = prompts(found, "train"), prompts(found, "valid")
    assert len(valid) == count
    assert sorted(train + valid) == sorted(row(i)["prompt"] for i in range(rows))
    assert found.notices == [
        f"no validation set: {count} of {rows} rows held out by seed (--valid-fraction {fraction})"
    ]
    again = read(path, valid_fraction=fraction)
    assert (prompts(again, "train"), prompts(again, "valid")) == (train, valid)
    if rows > 10:
        assert prompts(read(path, valid_fraction=fraction, seed=1), "valid") != valid


def test_no_row_is_held_out_if_there_is_a_validation_set_or_none_is_wanted(tmp_path):
    rows = [row(i) for i in range(20)]
    write(tmp_path / "train.jsonl", rows)
    assert prompts(read(tmp_path, valid_fraction=0.0), "valid") == []
    assert len(prompts(read(tmp_path, names=("train",)), "train")) == 20
    write(tmp_path / "valid.jsonl", [row(100)])
    assert prompts(read(tmp_path), "valid") == [row(100)["prompt"]]
    assert len(prompts(read(tmp_path), "train")) == 20
    write(tmp_path / "valid.jsonl", [])
    assert len(prompts(read(tmp_path), "valid")) == 1


@pytest.mark.parametrize("rows", [[row(1)], [row(1)] * 5, [row(1)] * 9 + [row(2), row(2)]])
def test_equal_rows_stay_together(tmp_path, rows):
    found = read(write(tmp_path / "a.jsonl", rows), valid_fraction=0.1)
    train, valid = prompts(found, "train"), prompts(found, "valid")
    assert not set(train) & set(valid)
    assert len(valid) == (2 if len(rows) == 11 else 0)
    if not valid:
        assert found.notices == [
            f"no validation set, and too few different rows to hold some out (rows: {len(rows)})"
        ]


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.integers(0, 12), max_size=40), st.floats(0.001, 0.5), st.integers(0, 5))
def test_held_out_rows(numbers, fraction, seed):
    digests = [bytes([number]) for number in numbers]
    chosen = held_out(digests, fraction, seed)
    count = sum(item in chosen for item in digests)
    assert count <= len(digests) // 2
    assert chosen == held_out(digests[::-1], fraction, seed)
    if len(set(numbers)) == len(numbers) > 1:
        assert count == min(max(round(fraction * len(digests)), 1), len(digests) // 2)


def test_other_forms_of_the_same_row_are_held_out_with_it(tmp_path):
    """Whether rows are equal depends on what they train, not on how they are written."""
    pairs = [row(i) for i in range(20)]
    chats = [
        {
            "id": i,
            "messages": [
                {"role": "user", "content": pair["prompt"]},
                {"role": "assistant", "content": pair["completion"]},
            ],
        }
        for i, pair in enumerate(pairs)
    ]
    found = read(write(tmp_path / "a.jsonl", pairs + chats), valid_fraction=0.3)
    valid = Counter(prompts(found, "valid"))
    assert set(valid.values()) == {2}
    assert not set(valid) & set(prompts(found, "train"))


# --- ratios -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "counts"),
    [(1, {1: 20}), (2, {2: 20}), (0.25, {1: 5}), (2.5, {2: 10, 3: 10}), (0.001, {1: 1})],
)
def test_ratios_hold_exactly(tmp_path, ratio, counts):
    write(tmp_path / "a" / "train.jsonl", [row(i) for i in range(20)])
    write(tmp_path / "a" / "valid.jsonl", [row(200)])
    other = write(tmp_path / "b.jsonl", [row(i) for i in range(100, 107)])
    found = read([f"{tmp_path / 'a'}={ratio}", other])
    epoch = Counter(prompts(found, "train"))
    assert Counter(epoch[row(i)["prompt"]] for i in range(20) if epoch[row(i)["prompt"]]) == counts
    assert [epoch[row(i)["prompt"]] for i in range(100, 107)] == [1] * 7
    total = sum(number * rows for number, rows in counts.items())
    rows = "1 row" if total == 1 else f"{total} rows"
    assert found.notices == [f"an epoch holds {rows} of {tmp_path / 'a'}, 7 rows of {other}"]
    assert prompts(read([f"{tmp_path / 'a'}={ratio}", other]), "train") == prompts(found, "train")


def test_ratios_come_after_the_hold_out(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(i) for i in range(20)])
    found = read([f"{path}=3"], valid_fraction=0.1)
    assert len(prompts(found, "valid")) == 2
    assert set(Counter(prompts(found, "train")).values()) == {3}
    assert len(prompts(found, "train")) == 54
    assert not set(prompts(found, "valid")) & set(prompts(found, "train"))


def test_a_part_of_a_source_depends_on_the_seed():
    digests = [bytes([i]) for i in range(50)]
    draws = [copies_per_row(digests, 0.5, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert [sum(draw) for draw in draws] == [25, 25, 25]


def test_sources_with_keys_of_their_own(tmp_path):
    first = write(tmp_path / "a.jsonl", [{"ask": "the cat", "say": "red"}])
    second = write(tmp_path / "b.jsonl", [row(9)])
    entry = {"path": str(first), "ratio": 2, "prompt_feature": "ask", "completion_feature": "say"}
    found = read_rows(RunConfig(data=[entry, str(second)]), ("train",))
    assert found.problems == []
    assert prompts(found, "train") == ["the cat", "the cat", row(9)["prompt"]]


def test_forms_of_the_data_setting(tmp_path):
    odd = tmp_path / "year=2024"
    assert data_entries("a") == [{"path": "a", "ratio": 1.0}]
    assert data_entries(["a", "b/c=0.5"]) == [{"path": "a", "ratio": 1.0}, {"path": "b/c", "ratio": 0.5}]
    odd.mkdir()
    assert data_entries(str(odd)) == [{"path": str(odd), "ratio": 1.0}]
    assert data_entries(f"{odd}=2") == [{"path": str(odd), "ratio": 2.0}]
    assert data_entries({"path": "a", "text_feature": "t"}) == [
        {"path": "a", "ratio": 1.0, "text_feature": "t"}
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a=b", "'b' is not a ratio"),
        ("a=0", "must be above 0"),
        ("a=nan", "must be above 0"),
        ("a=1e9", "at most 1000"),
        ("=2", "has no path"),
        ([], "names no source"),
        ([3], "neither a path nor a mapping"),
        ([{"ratio": 2}], "has no path"),
        ([{"path": "a", "ratio": "2"}], "takes a number"),
        ([{"path": "a", "text_feature": 3}], "text_feature is 3"),
        ([{"pth": "a"}], "did you mean 'path'"),
    ],
)
def test_wrong_forms_of_the_data_setting(data, message):
    with pytest.raises(InputError, match=message):
        data_entries(data)
    assert any(message in problem for problem in RunConfig(data=data).data_problems())


def test_ratios_multiply_weights(tmp_path):
    write(tmp_path / "train.jsonl", [row(1, weight=3), row(2)])
    found = read([f"{tmp_path}=2"], names=("train",))
    assert Counter(prompts(found, "train")) == {row(1)["prompt"]: 6, row(2)["prompt"]: 2}


# --- weights ------------------------------------------------------------------------------------------------


def tokens(data, tokenizer, **settings):
    split = tokenize(read(data, **settings), tokenizer, 1000)["train"]
    assert split.errors == []
    return [sequence.tokens.tolist() for sequence in split.sequences]


def test_a_row_of_weight_two_is_the_row_twice(tmp_path, tokenizer):
    twice = write(tmp_path / "a.jsonl", [row(1), row(2), row(2), row(3)])
    weighted = write(tmp_path / "b.jsonl", [row(1), row(2, weight=2), row(3)])
    settings = {"valid_fraction": 0.0}
    assert tokens(twice, tokenizer, **settings) == tokens(weighted, tokenizer, **settings)
    assert len(tokens(weighted, tokenizer, **settings)) == 4


def test_a_row_of_weight_zero_is_left_out(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [row(1), row(2, weight=0), row(3), row(4, weight=0)])
    without = write(tmp_path / "b.jsonl", [row(1), row(3)])
    assert tokens(path, tokenizer) == tokens(without, tokenizer)
    assert read(path).notices[0] == "train: 2 of 4 rows have weight 0 and are left out"


def test_weights_count_for_training_only(tmp_path, tokenizer):
    rows = [row(i, weight=3) for i in range(10)]
    found = read(write(tmp_path / "a.jsonl", rows))
    splits = tokenize(found, tokenizer, 1000)
    assert len(splits["train"].sequences) == splits["train"].rows == 27
    assert len(splits["valid"].sequences) == 1


# --- the command --------------------------------------------------------------------------------------------


def test_several_sources_from_the_command_line_and_a_file(model_directory, tmp_path, capsys):
    """The run is recorded without paths, and resumes on the same rows."""
    first = write(tmp_path / "a" / "train.jsonl", [row(i) for i in range(20)]).parent
    second = write(tmp_path / "b.jsonl", [row(i) for i in range(100, 108)])
    adapter = tmp_path / "adapter"
    flags = ["--model", str(model_directory), "--adapter-path", str(adapter), "--batch-size", "2"]
    run = ["lora", "--train", *flags, "--save-every", "1", "--data", str(first), f"{second}=0.5"]
    assert main([*run, "--iters", "1"]) == 0
    out = capsys.readouterr().out
    assert "no validation set: 1 of 28 rows held out by seed (--valid-fraction 0.05)" in " ".join(out.split())
    record = json.loads((adapter / "run.json").read_text())
    assert record["settings"]["data"] == [{"path": "a", "ratio": 1.0}, {"path": "b.jsonl", "ratio": 0.5}]
    assert record["data"]["valid"]["rows"] == 1
    assert len(record["samples"]) == 1
    config = tmp_path / "c.yaml"
    sources = [{"path": str(first)}, {"path": str(second), "ratio": 0.5}]
    config.write_text(json.dumps({"data": sources, "iters": 2}))
    same = ["lora", "--train", *flags, "--save-every", "1", "--config", str(config), "--resume"]
    assert main(same) == 0, capsys.readouterr().err
    assert main([*run, "--iters", "2", "--resume", "--seed", "1"]) == 2


def test_rows_that_differ_in_what_nothing_reads_are_equal():
    """They must not be on both sides of a hold-out."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    marked = [message | {"turn_identifier": 7} for message in messages]
    assert digest(Row("x:1", messages)) == digest(Row("x:2", marked, weight=2, untrained=frozenset({1})))
    other = [messages[0], messages[1] | {"reasoning_content": "r"}]
    assert digest(Row("x:1", messages)) != digest(Row("x:2", other))


def test_rows_that_all_have_weight_0_are_refused(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "cat", "weight": 0}\n' * 2)
    with pytest.raises(InputError, match="all 2 training rows have weight 0"):
        read_rows(RunConfig(data=str(path), train=True), ("train", "valid"))
