"""`nalora evaluate` end to end on a tiny model."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import stream_generate
from mlx_lm.tuner.datasets import CacheDataset, CompletionsDataset
from mlx_lm.tuner.trainer import evaluate as mlx_lm_evaluate
from mlx_lm.utils import load

from nalora_mlx.__main__ import main
from nalora_mlx.core.config import RunConfig
from nalora_mlx.data.checks import RunData
from nalora_mlx.evaluate.contestants import load_contestants
from nalora_mlx.evaluate.evaluation import adapter_names
from nalora_mlx.evaluate.general_text import read_general_text
from nalora_mlx.evaluate.generation import GeneratedAnswer
from nalora_mlx.evaluate.measurement import without_reasoning
from nalora_mlx.models.conversation import render_prompt
from tests.conftest import build_model, llama_args

FAST = ["--batch-size", "3", "--iters", "60", "--steps-per-eval", "20", "--save-every", "20", "--seed", "0"]
GENERAL = "the cat is one . the bird is two . what colour is the dog three ?"


@pytest.fixture(scope="module")
def rows():
    """Return more rows than the other tests have, so that differences can be told."""
    numbers, animals = ("one", "two", "three"), ("cat", "dog", "bird")
    colours = dict(zip(animals, ("red", "blue", "green"), strict=True))
    return [
        {
            "prompt": f"what colour is the {animal} {number} {other} ?",
            "completion": f"the {animal} is {colours[animal]}",
        }
        for animal in animals
        for number in numbers
        for other in numbers
    ]


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    for name, part in (("train", rows), ("valid", rows[::5]), ("test", rows[::2])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (directory / "general.txt").write_text(GENERAL)
    return directory


@pytest.fixture(scope="module")
def run(model_directory, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "tuned"
    where = ["--model", model_directory, "--data", data, "--adapter-path", output, "--mask-prompt"]
    flags = ["--learning-rate", "4e-3", "--scale", "4", "--no-samples", *FAST]
    assert main(["lora", "--train", *map(str, where), *flags]) == 0
    return output


def evaluate(model_directory, *flags):
    return main(["evaluate", "--model", str(model_directory), *map(str, flags)])


@pytest.fixture(scope="module")
def result(model_directory, run, data, tmp_path_factory):
    """Return the result of the run on its test set, and its general text."""
    path = tmp_path_factory.mktemp("result") / "result.json"
    flags = ["--adapter-path", run, "--general", data / "general.txt", "--output", path, "--metric"]
    assert evaluate(model_directory, *flags, "exact", "f1", "rouge-l", "contains", "json") == 0
    return json.loads(path.read_text())


def entry(content, name, adapter=0):
    measures = content["base"] if adapter is None else content["adapters"][adapter]["measures"]
    return next(found for found in measures if found["name"] == name)


def copied(run, path, change=lambda arrays: arrays):
    """Copy an adapter, with other arrays."""
    path.mkdir()
    shutil.copy(run / "adapter_config.json", path)
    mx.save_safetensors(
        str(path / "adapters.safetensors"), change(dict(mx.load(str(run / "adapters.safetensors"))))
    )
    return path


def loss_in_float64(model, tokenizer, rows):
    """Return the mean loss of the answers, and the sum and number of tokens of each row."""
    found = []
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt = render_prompt(tokenizer, messages)
        answer = tokenizer.encode(f"{row['completion']}<|im_end|>", add_special_tokens=False)
        logits = np.array(model(mx.array([prompt + answer]))[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        start = len(prompt) - 1
        found.append((-sum(log_p[start + i, token] for i, token in enumerate(answer)), len(answer)))
    sums, counts = np.array(found).T
    return sums.sum() / counts.sum()


# --- measures -----------------------------------------------------------------------------------------------


def test_losses_equal_float64_and_mlx_lm(result, model_directory, run, rows):
    test = rows[::2]
    base, tokenizer = load(str(model_directory))
    tuned, _ = load(str(model_directory), adapter_path=str(run))
    measured = entry(result, "loss")
    assert measured["base"][0] == pytest.approx(loss_in_float64(base, tokenizer, test), rel=1e-6)
    assert measured["tuned"][0] == pytest.approx(loss_in_float64(tuned, tokenizer, test), rel=1e-5)
    assert measured["difference"][0] == pytest.approx(measured["tuned"][0] - measured["base"][0])
    assert measured["told"] == "better"
    # mlx-lm also counts one token of padding after each row, except where there is no padding: all rows are equally
    # long here, and it does not pad beyond the maximum length.
    dataset = CacheDataset(CompletionsDataset(test, tokenizer, "prompt", "completion", mask_prompt=True))
    (length,) = {len(dataset[i][0]) for i in range(len(dataset))}
    theirs = mlx_lm_evaluate(tuned, dataset, batch_size=1, num_batches=-1, max_seq_length=length)
    assert measured["tuned"][0] == pytest.approx(float(theirs), rel=1e-5)


def test_answers_are_those_of_the_models(result, model_directory, run, rows):
    for name, adapter in (("base", None), ("tuned", str(run))):
        model, tokenizer = load(str(model_directory), adapter_path=adapter)
        for record, row in zip(result["adapters"][0]["answers"], rows[::2], strict=True):
            prompt = render_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])
            pieces = list(stream_generate(model, tokenizer, prompt, max_tokens=result["max_tokens"]))
            text = "".join(piece.text for piece in pieces)
            assert record[name]["text"] == text
            assert record[name]["values"]["exact"] == float(text.strip() == row["completion"])
            assert record[name]["complete"] == (pieces[-1].finish_reason == "stop")
            assert record["expected"] == row["completion"]


def test_differences_are_paired_by_row(result):
    adapter = result["adapters"][0]
    for name in ("exact", "f1", "rouge-l", "contains"):
        measured = entry(result, name)
        base, tuned = (
            np.array([row[who]["values"][name] for row in adapter["answers"]]) for who in ("base", "tuned")
        )
        assert measured["base"][0] == pytest.approx(base.mean())
        assert measured["difference"][0] == pytest.approx((tuned - base).mean())
        assert (measured["better"], measured["worse"]) == ((tuned > base).sum(), (tuned < base).sum())
        assert measured["difference"][1] <= measured["difference"][0] <= measured["difference"][2]
    exact = entry(result, "exact")
    assert exact["unit"] == "share"
    assert exact["p"] is not None
    assert entry(result, "f1")["p"] is None
    assert adapter["changed"]["better"]
    assert all(
        adapter["answers"][i]["tuned"]["values"]["exact"] > adapter["answers"][i]["base"]["values"]["exact"]
        for i in adapter["changed"]["better"]
    )


def test_general_text_shows_what_was_forgotten(result, model_directory, run):
    base, tokenizer = load(str(model_directory))
    tuned, _ = load(str(model_directory), adapter_path=str(run))
    tokens = [*tokenizer.encode(GENERAL), tokenizer.eos_token_id]
    logits = [np.array(model(mx.array([tokens]))[0, :-1], np.float64) for model in (base, tuned)]
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    targets = np.array(tokens[1:])
    measured = entry(result, "general_loss")
    for found, log_p in zip((measured["base"], measured["tuned"]), (p, q), strict=True):
        assert found[0] == pytest.approx(-log_p[np.arange(len(targets)), targets].mean(), rel=1e-5)
    assert entry(result, "kl")["tuned"][0] == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    rise = measured["tuned"][0] - measured["base"][0]
    assert (result["adapters"][0]["warning"] is not None) == (rise > 0.1)


def test_the_general_text_of_the_package(tokenizer):
    from nalora_mlx.core.config import RunConfig

    examples = read_general_text(None, tokenizer, RunConfig(), pytest.fail)
    assert len(examples) > 30
    assert all(example.loss_mask[1:].all() for example in examples)


def test_an_adapter_without_effect_equals_the_base_bit_for_bit(model_directory, run, data, tmp_path):
    zeros = copied(
        run,
        tmp_path / "zeros",
        lambda arrays: {
            name: array if name.endswith("lora_a") else mx.zeros_like(array) for name, array in arrays.items()
        },
    )
    path = tmp_path / "result.json"
    flags = ["--adapter-path", zeros, "--data", data, "--mask-prompt", "--choices", "--output", path]
    assert evaluate(model_directory, *flags) == 0
    content = json.loads(path.read_text())
    for measured in content["adapters"][0]["measures"]:
        if measured["name"] == "kl":
            assert measured["tuned"][0] == 0
            continue
        assert measured["base"] == measured["tuned"], measured["name"]
        assert measured["difference"][0] == 0
        assert measured["told"] == ""
    for record in content["adapters"][0]["answers"]:
        assert record["base"] == record["tuned"]


def test_a_scale_of_zero_gives_the_bits_of_the_base(model_directory, run, data):
    """The file refuses a scale of 0, so the modules get it."""
    from nalora_mlx.adapters.comparison import load_tuned
    from nalora_mlx.evaluate.scoring import Scorer
    from nalora_mlx.models.loading import load_module
    from tests.evaluate.test_scoring import build_groups, frozen

    base, _ = load_module(str(model_directory))
    tuned = load_tuned(base, str(model_directory), run)
    for module in tuned.modules():
        if "lora_a" in module:
            module.scale = 0.0
    groups = build_groups()
    assert Scorer(frozen(base)).score(groups) == Scorer(frozen(tuned)).score(groups)


def test_choices_by_likelihood(model_directory, run, data, rows, tmp_path):
    path = tmp_path / "result.json"
    texts = ["the cat is red", "the dog is blue", "the bird is green"]
    flags = [
        "--adapter-path",
        run,
        "--metric",
        "none",
        "--general",
        "none",
        "--output",
        path,
        "--choices",
        *texts,
    ]
    assert evaluate(model_directory, *flags) == 0
    content = json.loads(path.read_text())
    measured = entry(content, "choice")
    for found, adapter in ((measured["base"], None), (measured["tuned"], str(run))):
        model, tokenizer = load(str(model_directory), adapter_path=adapter)
        right = 0
        for row in rows[::2]:
            totals = []
            for text in texts:
                prompt = render_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])
                answer = tokenizer.encode(f"{text}<|im_end|>", add_special_tokens=False)
                logits = np.array(model(mx.array([prompt + answer]))[0], np.float64)
                log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                totals.append(sum(log_p[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))
            right += texts[int(np.argmax(totals))] == row["completion"]
        assert found[0] == pytest.approx(right / len(rows[::2]))
    records = content["adapters"][0]["choices"]
    assert len(records) == len(rows[::2])
    assert sum(record["tuned"] == record["correct"] for record in records) == round(len(records) * found[0])
    assert all(record["choices"][record["correct"]] == record["expected"] for record in records)
    assert content["adapters"][0]["answers"] == []
    assert {measure["name"] for measure in content["base"]} == {"loss", "choice"}


def test_quantized_base(tokenizer_directory, data, tmp_path):
    """Groups of 64 need wider layers."""
    output, path, model_directory = tmp_path / "run", tmp_path / "result.json", tmp_path / "wide"
    shutil.copytree(tokenizer_directory, model_directory)
    args = llama_args(hidden_size=64, intermediate_size=128)
    arrays = dict(tree_flatten(build_model(args=args).parameters()))
    mx.save_safetensors(str(model_directory / "model.safetensors"), arrays)
    (model_directory / "config.json").write_text(json.dumps(args | {"eos_token_id": 2}))
    where = ["--model", model_directory, "--data", data, "--adapter-path", output, "--quantize", "4"]
    assert main(["lora", "--train", *map(str, where), "--no-samples", *FAST]) == 0
    where = [*where[:-2], "--test"]
    assert main(["lora", *map(str, where), "--quantize", "4", "--test-batches", "-1"]) == 0
    assert evaluate(model_directory, "--adapter-path", output, "--general", "none", "--output", path) == 0
    content = json.loads(path.read_text())
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["split"] == "test"
    assert entry(content, "loss")["tuned"][0] == pytest.approx(records[-1]["loss"], rel=1e-4)
    assert entry(content, "loss")["base"][0] > 1.2 * records[-1]["loss"]


# --- output -------------------------------------------------------------------------------------------------


def test_settings_come_from_the_run_and_the_result_goes_there(model_directory, run, capsys):
    assert evaluate(model_directory, "--adapter-path", run, "--general", "none", "--show", "1") == 0
    printed = capsys.readouterr().out
    (path,) = (run / "evaluations").iterdir()
    content = json.loads(path.read_text())
    assert content["split"] == "test"
    assert content["rows"] == 14
    assert content["adapters"][0]["name"] == "tuned"
    assert re.search(r"14 rows\s+base\s+tuned\s+difference\s+95 % interval", printed)
    assert "exact match" in printed
    assert "perplexity" in printed
    assert re.search(r"\d+ answers? better by exact match", printed)
    assert f"written: {path}" in printed
    assert str(Path.home()) not in path.read_text()


def test_several_adapters_from_one_load(model_directory, run, data, tmp_path, monkeypatch):
    from nalora_mlx.models import loading

    other = copied(
        run,
        tmp_path / "other",
        lambda arrays: {
            name: array if name.endswith("lora_a") else 0.1 * array for name, array in arrays.items()
        },
    )
    path, opened = tmp_path / "result.json", []
    original = loading.open_module
    monkeypatch.setattr(
        loading, "open_module", lambda *args, **kw: opened.append(kw.get("lazy")) or original(*args, **kw)
    )
    flags = [
        "--adapter-path",
        run,
        "--adapter-path",
        other,
        "--data",
        data,
        "--general",
        "none",
        "--output",
        path,
    ]
    assert evaluate(model_directory, *flags, "--metric", "exact") == 0
    content = json.loads(path.read_text())
    assert [adapter["name"] for adapter in content["adapters"]] == ["tuned", "other"]
    first, second = (entry(content, "loss", i) for i in range(2))
    assert first["base"] == second["base"]
    assert first["tuned"][0] < second["tuned"][0] < second["base"][0]
    assert opened.count(False) <= 1  # the others never read the base's weights
    (between,) = content["between"]
    assert (between["base"], between["tuned"]) == ("tuned", "other")
    loss, exact = between["measures"]
    assert loss["difference"][0] == pytest.approx(second["tuned"][0] - first["tuned"][0])
    assert loss["told"] == "worse"
    assert exact["difference"][0] == pytest.approx(exact["tuned"][0] - exact["base"][0])


def test_adapters_are_loaded_frozen_beside_the_base(model_directory, run):
    """A frozen output head runs in tiles."""
    config = RunConfig(model=str(model_directory), adapter_path=str(run), test=True)
    contestants = load_contestants(config, [run], RunData(False), pytest.fail)
    tuned = contestants.tuned(run)
    assert not tree_flatten(tuned.trainable_parameters())
    assert not tree_flatten(contestants.base.trainable_parameters())
    assert tuned.model.embed_tokens.weight is contestants.base.model.embed_tokens.weight


def test_long_texts_are_one_row(model_directory, run, tmp_path):
    (tmp_path / "long.txt").write_text(" ".join([GENERAL] * 6))
    flags = [
        "--adapter-path",
        run,
        "--data",
        tmp_path / "long.txt",
        "--metric",
        "none",
        "--general",
        tmp_path / "long.txt",
    ]
    path = tmp_path / "result.json"
    assert (
        evaluate(model_directory, *flags, "--no-mask-prompt", "--max-seq-length", "20", "--output", path) == 0
    )
    content = json.loads(path.read_text())
    assert (
        content["passages"] == entry(content, "general_loss")["rows"] == entry(content, "loss")["rows"] == 1
    )
    model, tokenizer = load(str(model_directory))
    tokens = [*tokenizer.encode(" ".join([GENERAL] * 6)), tokenizer.eos_token_id]
    total = 0.0
    for start in range(0, len(tokens) - 1, 19):  # windows overlap by one token
        window = tokens[start : start + 20]
        logits = np.array(model(mx.array([window]))[0, :-1], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= log_p[np.arange(len(window) - 1), window[1:]].sum()
    assert entry(content, "general_loss", None)["base"][0] == pytest.approx(
        total / (len(tokens) - 1), rel=1e-5
    )


def test_reasoning_is_left_out_of_answers():
    class Thinker:
        think_end = "</think>"

    answer = GeneratedAnswer("<think>one?</think>\n\ntwo", True, 7)
    assert without_reasoning(answer, Thinker()).text == "two"
    assert without_reasoning(answer._replace(text="two"), Thinker()).text == "two"
    assert without_reasoning(answer, object()) == answer


def test_without_adapter(model_directory, data, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert (
        evaluate(model_directory, "--data", data / "test.jsonl", "--general", "none", "--output", path) == 0
    )
    content = json.loads(path.read_text())
    assert content["adapters"] == []
    assert entry(content, "exact", None)["tuned"] is None
    assert "difference" not in capsys.readouterr().out


def test_samples_and_split(model_directory, data, tmp_path, capsys):
    path = tmp_path / "result.json"
    flags = ["--data", data, "--split", "train", "--samples", "5", "--general", "none", "--metric", "none"]
    assert evaluate(model_directory, *flags, "--output", path) == 0
    content = json.loads(path.read_text())
    assert (content["rows"], content["of"], content["split"]) == (5, 27, "train")
    assert "train: 5 of 27 rows" in capsys.readouterr().out


def test_standard_tasks_are_compared_by_document(model_directory, run, data, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install '.[eval]')")
    path = tmp_path / "result.json"
    tasks = Path(__file__).parent / "tasks"
    name = "science"
    flags = [
        "--adapter-path",
        run,
        "--tasks",
        name,
        "--task-path",
        tasks,
        "--general",
        "none",
        "--output",
        path,
    ]
    assert evaluate(model_directory, *flags, "--limit", "5") == 0
    content = json.loads(path.read_text())
    (measured, *_) = [found for found in content["adapters"][0]["measures"] if found["part"] == "tasks"]
    assert measured["rows"] == 5
    assert measured["difference"][0] == pytest.approx(measured["tuned"][0] - measured["base"][0])
    assert content["data"] is None  # with tasks, only --data gives a test set
    assert name in capsys.readouterr().out


def test_watch_finds_the_best_checkpoint(model_directory, run, data, capsys):
    flags = ["--adapter-path", run, "--watch-checkpoints", "--metric", "none", "--general", "none"]
    assert evaluate(model_directory, *flags) == 0
    printed = capsys.readouterr().out
    content = json.loads(next((run / "evaluations").glob("*-checkpoints.json")).read_text())
    assert [found["step"] for found in content["checkpoints"]] == [20, 40, 60]
    losses = [found["measures"][0]["tuned"][0] for found in content["checkpoints"]]
    assert content["best"] == 20 * (int(np.argmin(losses)) + 1)
    assert f"step {content['best']} has the best loss" in printed
    tuned, tokenizer = load(str(model_directory), adapter_path=str(run / "checkpoints" / "step-0000020"))
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(loss_in_float64(tuned, tokenizer, rows), rel=1e-5)


def test_watch_waits_for_checkpoints_of_a_run_in_progress(model_directory, run, data, tmp_path, monkeypatch):
    from nalora_mlx.evaluate import job

    growing = tmp_path / "growing"
    shutil.copytree(run, growing, ignore=shutil.ignore_patterns("step-*", "evaluations"))
    waits, states = [], iter([True, True, True, False])
    shutil.copytree(run / "checkpoints/step-0000020", growing / "checkpoints/step-0000020")

    def sleep(seconds):
        waits.append(seconds)
        shutil.copytree(
            run / "checkpoints/step-0000040", growing / "checkpoints/step-0000040", dirs_exist_ok=True
        )

    monkeypatch.setattr(job, "is_locked", lambda path: next(states, False))
    monkeypatch.setattr(job.time, "sleep", sleep)
    flags = ["--adapter-path", growing, "--data", data, "--watch-checkpoints", "--metric", "none"]
    assert evaluate(model_directory, *flags, "--general", "none") == 0
    content = json.loads(next((growing / "evaluations").glob("*-checkpoints.json")).read_text())
    assert [found["step"] for found in content["checkpoints"]] == [20, 40]
    assert waits


# --- bad input ----------------------------------------------------------------------------------------------


def refused(capsys, model_directory, flags, *expected, status=2):
    """Expect an exit status, and one line on stderr with the given words."""
    capsys.readouterr()
    assert evaluate(model_directory, *flags) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    for words in expected:
        assert re.search(words, lines[0]), lines[0]


def test_bad_input_is_one_line(model_directory, run, data, tmp_path, capsys):
    empty, score = tmp_path / "no test set", tmp_path / "score.py"
    empty.mkdir()
    shutil.copy(data / "train.jsonl", empty)
    unanswered = tmp_path / "open.jsonl"
    unanswered.write_text('{"messages": [{"role": "user", "content": "what is one ?"}]}\n')
    score.write_text("def score(answer, expected):\n    return 1 / 0\n")
    with_data = ["--data", data]
    refused(capsys, model_directory, [], "--data is missing; give a test set")
    refused(capsys, model_directory, ["--data", empty], "no rows for test; add rows to test.jsonl.*--split")
    refused(capsys, model_directory, ["--data", "./nowhere"], "--data ./nowhere: no such file or directory")
    refused(capsys, model_directory, [*with_data, "--metric", "rouge"], "'rouge' is no metric.*rouge-l")
    refused(
        capsys,
        model_directory,
        [*with_data, "--metric", f"{score}:score"],
        r"score.py:score on .*test.jsonl:1: raises",
    )
    refused(capsys, model_directory, [*with_data, "--regex", "("], "regular expression")
    texts = ["--data", data / "general.txt", "--adapter-path", run]
    refused(
        capsys,
        model_directory,
        texts,
        "this row is a text .the adapter's run has --mask-prompt; give --no-mask",
    )
    refused(
        capsys,
        model_directory,
        ["--data", unanswered, "--metric", "exact"],
        "open.jsonl:1: has no answer to compare with",
    )
    refused(capsys, model_directory, [*with_data, "--choices", "a", "b"], "its answer is none of the choices")
    refused(capsys, model_directory, [*with_data, "--adapter-path", data], "has no adapter_config.json")
    refused(
        capsys, model_directory, [*with_data, "--adapter-path", run, "--adapter-path", run], "given twice"
    )
    refused(
        capsys, model_directory, ["--adapter-path", run / "best", "--watch-checkpoints"], "has no checkpoints"
    )
    refused(
        capsys,
        model_directory,
        [*with_data, "--samples", "0"],
        "samples is 0; it must be at least 1, or -1 for all",
    )
    refused(capsys, model_directory, [*with_data, "--limit", "3"], "limit is given without tasks")
    refused(
        capsys, model_directory, [*with_data, "--general", "./nowhere"], "--general ./nowhere: no such file"
    )


def test_a_run_without_test_set_is_evaluated_on_what_it_held_out(model_directory, rows, tmp_path, capsys):
    csv, output, path = tmp_path / "rows.csv", tmp_path / "run", tmp_path / "result.json"
    csv.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    where = ["--model", model_directory, "--data", csv, "--adapter-path", output, "--valid-fraction", "0.3"]
    flags = ["--no-samples", *FAST, "--iters", "3", "--seed", "5"]
    assert main(["lora", "--train", *map(str, where), *flags]) == 0
    for split in ([], ["--split", "valid"]):
        flags = ["--adapter-path", output, "--general", "none", "--output", path, *split]
        assert evaluate(model_directory, *flags) == 0
        assert ("the run has no test set" in capsys.readouterr().out) == (not split)
    content = json.loads(path.read_text())
    assert (content["split"], content["rows"]) == ("valid", 8)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["split"] == "valid"]
    assert entry(content, "loss")["base"][0] == pytest.approx(losses[0], rel=1e-5)
    refused(capsys, model_directory, ["--adapter-path", output, "--split", "test"], "no rows for test")
    assert (
        evaluate(model_directory, "--data", csv, "--general", "none", "--metric", "none", "--output", path)
        == 0
    )
    assert json.loads(path.read_text())["rows"] == 27  # a file that is named is the test set


def test_data_of_the_run_that_is_gone(model_directory, run, data, tmp_path, capsys):
    moved = tmp_path / "rows"
    shutil.copytree(data, moved)
    output = tmp_path / "run"
    where = ["--model", model_directory, "--data", moved, "--adapter-path", output]
    assert main(["lora", "--train", *map(str, where), "--no-samples", *FAST, "--iters", "3"]) == 0
    shutil.rmtree(moved)
    refused(
        capsys,
        model_directory,
        ["--adapter-path", output],
        f"the run's data, {moved}, is not there any more; give a test",
    )


def test_a_metric_cannot_change_the_rows(model_directory, run, data, tmp_path):
    score, path = tmp_path / "score.py", tmp_path / "result.json"
    score.write_text(
        "def score(answer, expected, row):\n    row['messages'][0]['content'] = 'cat'\n    return 1\n"
    )
    flags = ["--adapter-path", run, "--general", "none", "--output", path, "--metric"]
    assert evaluate(model_directory, *flags, "exact", f"{score}:score") == 0
    changed = json.loads(path.read_text())
    assert evaluate(model_directory, *flags, "exact") == 0
    assert entry(changed, "loss") == entry(json.loads(path.read_text()), "loss")
    assert "what colour" in changed["adapters"][0]["answers"][0]["prompt"]


def test_other_settings_keep_the_first_result(model_directory, run, data):
    def files():
        return {path.name: path.read_bytes() for path in (run / "evaluations").glob("*.json")}

    flags = ["--adapter-path", run, "--general", "none", "--metric"]
    assert evaluate(model_directory, *flags, "exact") == 0
    first = files()
    assert evaluate(model_directory, *flags, "f1") == 0
    assert files().items() > first.items()
    count = len(files())
    assert evaluate(model_directory, *flags, "f1") == 0  # the same again
    assert len(files()) == count


def test_a_watched_run_loses_and_damages_checkpoints(
    model_directory, run, data, tmp_path, monkeypatch, capsys
):
    broken = tmp_path / "broken"
    shutil.copytree(run, broken, ignore=shutil.ignore_patterns("evaluations"))
    (broken / "checkpoints/step-0000040/adapters.safetensors").write_bytes(b"no")
    flags = ["--adapter-path", broken, "--data", data, "--watch-checkpoints", "--metric", "none"]
    refused(
        capsys, model_directory, [*flags, "--general", "none"], "adapters.safetensors", "complete", status=1
    )
    content = json.loads(next((broken / "evaluations").glob("*-checkpoints.json")).read_text())
    assert [found["step"] for found in content["checkpoints"]] == [20, 60]
    from nalora_mlx.evaluate.evaluation import Evaluation

    measure = Evaluation.measure

    def pruned(self, adapter):
        shutil.rmtree(broken / "checkpoints/step-0000040", ignore_errors=True)
        return measure(self, adapter)

    monkeypatch.setattr(Evaluation, "measure", pruned)
    assert evaluate(model_directory, *flags, "--general", "none") == 0


def test_a_partly_right_metric_decides_among_checkpoints(model_directory, run, data, tmp_path, capsys):
    score = tmp_path / "score.py"
    score.write_text("def part(answer, expected):\n    return 0.5 * (answer == expected)\n")
    flags = ["--adapter-path", run, "--watch-checkpoints", "--general", "none", "--metric", f"{score}:part"]
    assert evaluate(model_directory, *flags) == 0
    assert re.search(r"step \d+ has the best part|no checkpoint has a better part", capsys.readouterr().out)


def test_data_of_a_moved_run_is_no_name_on_the_hub(model_directory, data, tmp_path, monkeypatch, capsys):
    """Relative to the moved run, its data may look like OWNER/NAME."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, tmp_path / "rows")
    where = ["--model", model_directory, "--data", "rows", "--adapter-path", "run"]
    assert main(["lora", "--train", *map(str, where), "--no-samples", *FAST, "--iters", "3"]) == 0
    shutil.copytree("run", "owner/run")
    refused(
        capsys, model_directory, ["--adapter-path", "owner/run"], "data, owner/rows, is not there any more"
    )


def test_an_adapter_of_mlx_lm_brings_its_data_and_mask(model_directory, run, data, tmp_path, capsys):
    """mlx_lm.lora writes all of its settings into adapter_config.json, and no run.json."""
    other, path = copied(run, tmp_path / "other"), tmp_path / "result.json"
    config = json.loads((other / "adapter_config.json").read_text())

    def saved(**settings):
        (other / "adapter_config.json").write_text(json.dumps(config | {"max_seq_length": 2048} | settings))

    flags = ["--adapter-path", other, "--metric", "none", "--general", "none", "--output", path]
    losses = {}
    for masked in (True, False):
        saved(data=str(data), mask_prompt=masked)
        assert evaluate(model_directory, *flags) == 0
        losses[masked] = entry(json.loads(path.read_text()), "loss")["tuned"][0]
    assert losses[True] < losses[False]
    saved(data=str(data), mask_prompt="yes")
    refused(
        capsys, model_directory, flags, "adapter_config.json: mask_prompt is 'yes'; it takes true or false"
    )


def test_names_of_adapters(tmp_path):
    run = tmp_path / "a" / "run"
    for directory in (run, run / "best", run / "checkpoints" / "step-0000020", tmp_path / "b" / "run"):
        directory.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    assert adapter_names([run]) == ["run"]
    assert adapter_names([run, run / "best", run / "checkpoints" / "step-0000020"]) == [
        "run",
        "run/best",
        "run/step-0000020",
    ]
    assert adapter_names([run / "best", tmp_path / "b" / "run"]) == ["a/run/best", "b/run"]


def test_no_other_file_is_overwritten(model_directory, data, tmp_path, capsys):
    mine = tmp_path / "mine.json"
    mine.write_text('{"a": 1}')
    flags = ["--data", data, "--metric", "none", "--general", "none", "--output"]
    refused(
        capsys, model_directory, [*flags, mine], "mine.json: exists and was not written by nalora evaluate"
    )
    refused(capsys, model_directory, [*flags, tmp_path], "is a directory; give a file")
    assert mine.read_text() == '{"a": 1}'
    for _ in range(2):  # a result may be replaced
        assert evaluate(model_directory, *flags, tmp_path / "result.json") == 0


@pytest.mark.parametrize("kind", ["full", "dora"])
def test_other_kinds_of_tuned_models(kind, model_directory, data, tmp_path):
    output, path = tmp_path / "run", tmp_path / "result.json"
    where = ["--model", model_directory, "--data", data, "--adapter-path", output, "--mask-prompt"]
    flags = ["--fine-tune-type", kind, "--learning-rate", "1e-3", "--no-samples", *FAST, "--iters", "20"]
    assert main(["lora", "--train", *map(str, where), *flags]) == 0
    flags = ["--adapter-path", output, "--general", data / "general.txt", "--output", path]
    assert evaluate(model_directory, *flags) == 0
    content = json.loads(path.read_text())
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    tuned, tokenizer = load(str(model_directory), adapter_path=str(output))
    assert entry(content, "loss")["tuned"][0] == pytest.approx(
        loss_in_float64(tuned, tokenizer, rows), rel=1e-5
    )
    assert entry(content, "kl")["tuned"][0] > 1e-3


def test_adapters_of_other_models_are_refused(run, data, tokenizer_directory, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tokenizer_directory, other)
    args = llama_args(hidden_size=48, intermediate_size=64)
    arrays = dict(tree_flatten(build_model(args=args).parameters()))
    mx.save_safetensors(str(other / "model.safetensors"), arrays)
    (other / "config.json").write_text(json.dumps(args | {"eos_token_id": 2}))
    assert evaluate(other, "--adapter-path", run, "--data", data) == 2
    printed = capsys.readouterr()
    assert "does not fit the model" in printed.err
    assert "was trained on" in printed.out


def test_a_metric_that_fails_on_an_answer_costs_no_other_result(model_directory, run, data, tmp_path, capsys):
    score, path = tmp_path / "score.py", tmp_path / "result.json"
    score.write_text(
        "def score(answer, expected):\n    if answer != expected:\n        raise KeyError('oh')\n    return True\n"
    )
    flags = [
        "--adapter-path",
        run,
        "--general",
        "none",
        "--metric",
        "exact",
        f"{score}:score",
        "--output",
        path,
    ]
    refused(
        capsys,
        model_directory,
        flags,
        r"score.py:score on .*test.jsonl:\d+: raises KeyError",
        "complete",
        status=1,
    )
    names = {measure["name"] for measure in json.loads(path.read_text())["adapters"][0]["measures"]}
    assert names == {"loss", "exact"}


def test_a_metric_of_the_users_own(model_directory, run, data, tmp_path):
    score, path = tmp_path / "score.py", tmp_path / "result.json"
    score.write_text(
        "def length(answer, expected, row):\n    assert row['messages'][0]['role'] == 'user'\n    return len(answer)\n"
    )
    flags = ["--adapter-path", run, "--general", "none", "--metric", f"{score}:length", "--output", path]
    assert evaluate(model_directory, *flags) == 0
    content = json.loads(path.read_text())
    lengths = [len(record["tuned"]["text"]) for record in content["adapters"][0]["answers"]]
    measured = entry(content, "score.py:length")
    assert measured["tuned"][0] == pytest.approx(np.mean(lengths))
    assert measured["unit"] == "score"
