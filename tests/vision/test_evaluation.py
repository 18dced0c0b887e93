"""`nalora evaluate` on rows with images: losses, answers, choices, and adapters of the vision tower."""

import gc
import json
import shutil
import tempfile
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nalora_mlx
from nalora_mlx.__main__ import main
from nalora_mlx.adapters.comparison import load_tuned
from nalora_mlx.adapters.files import adapter_config, adapter_weights
from nalora_mlx.evaluate import contestants
from nalora_mlx.evaluate.scoring import Scorer
from nalora_mlx.models.vision.generation import model_inputs, render_chat, stream_answer
from nalora_mlx.models.vision.loading import open_processor, open_vision_model
from nalora_mlx.models.vision.model import VisionLanguageModel

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (pip install '.[vlm]')")

from tests.conftest import random_adapters
from tests.vision.tiny_models import picture, save_model

SETTINGS = {
    "iters": 12,
    "batch_size": 2,
    "rank": 2,
    "learning_rate": 2e-2,
    "mask_prompt": True,
    "steps_per_eval": 12,
    "samples": False,
    "mask_warmup": 1,
    "progress": False,
}
ANSWERS = ("It is red.", "It is sky.", "It is tan.")  # equally long, so that none is always the most likely
TOKENS = 6
END = "<|im_end|>"


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    """Return a model whose answers depend on the images."""
    directory = save_model("qwen3_vl", tmp_path_factory.mktemp("models") / "qwen3_vl")
    arrays = load_file(directory / "model.safetensors")
    for name in arrays:
        if "patch_embed" in name or "merger" in name:
            arrays[name] = 4 * arrays[name]
        elif name.startswith("language_model.") and "embed" not in name and arrays[name].ndim == 2:
            arrays[name] = 3 * arrays[name]
    save_file(arrays, directory / "model.safetensors", {"format": "mlx"})
    return directory


@pytest.fixture(scope="module")
def rows():
    """Return rows with one, two or no images, of which some are in several rows."""
    found = []
    for number in range(9):
        images = [[number % 4], [number % 4, (number + 1) % 4], []][number % 3]
        parts = [{"type": "image", "image": f"{i}.png"} for i in images]
        content = [*parts, {"type": "text", "text": f"What is it? {'x' * number}"}]
        answer = {"role": "assistant", "content": ANSWERS[number % 3]}
        found.append({"messages": [{"role": "user", "content": content}, answer]})
    return found


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    for number, size in enumerate([(32, 32), (48, 32), (32, 64), (64, 32)]):
        picture(*size, seed=number).save(directory / f"{number}.png")
    for name in ("train", "valid", "test"):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def run(vision_model, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "language"
    nalora_mlx.finetune(vision_model, data, output, **SETTINGS)
    return output


@pytest.fixture(scope="module")
def tower_run(vision_model, data, tmp_path_factory):
    """Return a run that adapts the vision tower and the projector, and nothing else in effect."""
    output = tmp_path_factory.mktemp("run") / "towers"
    nalora_mlx.finetune(vision_model, data, output, vision=True, projector=True, **SETTINGS)
    arrays = load_file(output / "adapters.safetensors")
    for name in arrays:
        if name.startswith("language_model.") and name.endswith("lora_b"):
            arrays[name] = 0 * arrays[name]  # so that nothing but the tower makes a difference
    save_file(arrays, output / "adapters.safetensors", {"format": "mlx"})
    return output


@pytest.fixture(scope="module")
def measured(vision_model, run, tower_run, tmp_path_factory):
    """Return the result of both runs on the test set of the first, and the log-probabilities of the choices."""
    path, scores = tmp_path_factory.mktemp("result") / "result.json", []
    original = Scorer.score

    def score(self, groups, *args, **kwargs):
        found = original(self, groups, *args, **kwargs)
        if len(groups[0]) > 1:
            scores.append([[each.log_probability for each in group] for group in found])
        return found

    adapters = ["--adapter-path", run, "--adapter-path", tower_run]
    flags = ["--general", "none", "--metric", "f1", "--max-tokens", TOKENS, "--choices", *ANSWERS]
    with patch.object(Scorer, "score", score):
        result = evaluated(vision_model, path, *adapters, *flags)
    return result, scores


@pytest.fixture
def result(measured):
    return measured[0]


def evaluated(model, path, *flags):
    """Evaluate, and return the result."""
    argv = ["evaluate", "--model", model, "--output", path, *flags]
    assert main([*map(str, argv)]) == 0
    return json.loads(path.read_text())


def asked(processor, row, data):
    """Return the prompt of a row and its images."""
    parts = row["messages"][0]["content"]
    images = [str(data / part["image"]) for part in parts if part["type"] == "image"]
    shown = [part if part["type"] == "text" else {"type": "image"} for part in parts]
    text = render_chat(processor, [{"role": "user", "content": shown}], "a row")
    assert text.count("<|image_pad|>") == len(images)
    return text, images


def measures(content, adapter):
    return {measure["name"]: measure for measure in content["adapters"][adapter]["measures"]}


def test_losses_are_those_of_a_test(result, vision_model, data, run, tower_run, capsys):
    for number, adapter in enumerate((run, tower_run)):
        argv = ["lora", "--test", "--model", vision_model, "--data", data, "--adapter-path", adapter]
        argv += ["--mask-prompt", "--batch-size", "3", "--test-batches", "-1"]
        assert main([*map(str, argv)]) == 0
        capsys.readouterr()
        record = json.loads((adapter / "metrics.jsonl").read_text().splitlines()[-1])
        assert record["split"] == "test"
        assert measures(result, number)["loss"]["tuned"][0] == pytest.approx(record["loss"], rel=1e-5)
    (base, tuned), (same, other) = (
        [measures(result, number)["loss"][name][0] for name in ("base", "tuned")] for number in (0, 1)
    )
    assert base == same
    assert min(abs(base - tuned), abs(base - other), abs(tuned - other)) > 0.01


def test_answers_are_greedy(result, vision_model, data, rows, run, tower_run):
    base, config = open_vision_model(str(vision_model))
    processor = open_processor(str(vision_model), config)
    for number, adapter in enumerate((run, tower_run)):
        models = {"base": base, "tuned": load_tuned(base, str(vision_model), adapter)}
        records = result["adapters"][number]["answers"]
        assert [record["expected"] for record in records] == [row["messages"][1]["content"] for row in rows]
        for row, record in zip(rows, records, strict=True):
            text, images = asked(processor, row, data)
            for name, model in models.items():
                model.eval()
                pieces = list(
                    stream_answer(model, processor, text, images, max_tokens=TOKENS, temperature=0.0)
                )
                assert record[name]["text"] == "".join(piece.text for piece in pieces)
                assert record[name]["complete"] == (pieces[-1].finish_reason == "stop")
    texts = [{record[name]["text"] for record in records} for name in ("base", "tuned")]
    assert texts[0] != texts[1]


def test_no_path_is_written(result, data):
    assert str(data) not in json.dumps(result)


def log_probability(model, processor, text, answer, images):
    """Return the log-probability of an answer and of its end, computed from pixels by mlx-vlm's own forward pass."""
    prompt, whole = (model_inputs(processor, each, images, "a row") for each in (text, text + answer))
    start, tokens = prompt["input_ids"].shape[1], np.array(whole["input_ids"])[0]
    ids, pixels, mask = (whole.pop(name, None) for name in ("input_ids", "pixel_values", "mask"))
    output = super(VisionLanguageModel, model).__call__(ids, pixels, mask, **whole)
    logits = np.array(output.logits[0], np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(logits[i - 1, tokens[i]] for i in range(start, len(tokens)))


def test_choices_are_by_likelihood(measured, vision_model, data, rows, run, tower_run):
    """Of each row, the choice with the highest log-probability of its tokens and of the end."""
    result, scores = measured
    base, config = open_vision_model(str(vision_model))
    processor = open_processor(str(vision_model), config)
    right = np.zeros((3, len(rows)))
    for i, adapter in enumerate((None, run, tower_run)):
        model = load_tuned(base, str(vision_model), adapter) if adapter else base
        model.eval()
        for j, row in enumerate(rows):
            text, images = asked(processor, row, data)
            totals = [log_probability(model, processor, text, answer + END, images) for answer in ANSWERS]
            np.testing.assert_allclose(scores[i][j], totals, atol=1e-3)
            right[i, j] = ANSWERS[int(np.argmax(totals))] == row["messages"][1]["content"]
    for i in (0, 1):
        found = measures(result, i)["choice"]
        assert found["base"][0] == pytest.approx(right[0].mean())
        assert found["tuned"][0] == pytest.approx(right[i + 1].mean())
        changed = result["adapters"][i]["changed_choices"]
        for kind, rows_of in (("better", right[i + 1] > right[0]), ("worse", right[i + 1] < right[0])):
            sources = [entry["source"] for entry in changed[kind]]
            assert sources == [f"test.jsonl:{j + 1}" for j in np.flatnonzero(rows_of)]
    assert (right[0] != right[1]).any()


def test_answers_depend_on_the_images(measured):
    """Else the other tests would tell nothing: rows 1, 4 and 7 have one image each, and nearly the same text."""
    result, scores = measured
    assert np.abs(np.array(scores[0])[0] - np.array(scores[0])[3]).max() > 0.3
    assert len({result["adapters"][0]["answers"][i]["base"]["text"] for i in (0, 3, 6)}) > 1


def test_an_adapter_without_effect_equals_the_base_bit_for_bit(vision_model, tower_run, data, tmp_path):
    adapter, path = tmp_path / "zeros", tmp_path / "result.json"
    adapter.mkdir()
    shutil.copy(tower_run / "adapter_config.json", adapter)
    arrays = load_file(tower_run / "adapters.safetensors")
    assert any(name.startswith("vision_tower.") for name in arrays)
    zeros = {name: array if name.endswith("lora_a") else 0 * array for name, array in arrays.items()}
    save_file(zeros, adapter / "adapters.safetensors", {"format": "mlx"})
    (tmp_path / "general.txt").write_text("A text about nothing in particular.\n\nAnd another one.")
    flags = ["--adapter-path", adapter, "--data", data, "--mask-prompt", "--max-tokens", TOKENS]
    flags += ["--general", tmp_path / "general.txt", "--choices", *ANSWERS]
    content = evaluated(vision_model, path, *flags)
    found = measures(content, 0)
    assert {"loss", "choice", "exact", "general_loss"} <= found.keys()
    assert found.pop("kl")["tuned"][0] == 0
    for name, measure in found.items():
        assert measure["base"] == measure["tuned"], name
        assert measure["difference"][0] == 0, name
    for record in content["adapters"][0]["answers"]:
        assert record["base"] == record["tuned"]


def test_features_do_not_outlive_the_evaluation(vision_model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = []
    monkeypatch.setattr(contestants, "mkdtemp", lambda **kw: made.append(tempfile.mkdtemp(**kw)) or made[-1])
    flags = ["--data", data, "--metric", "none", "--general", "none", "--choices", *ANSWERS]
    evaluated(vision_model, tmp_path / "result.json", *flags)
    gc.collect()
    assert len(made) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_text_is_not_read_as_a_prompt(tmp_path):
    """PaliGemma attends both ways in a prompt. In a text that is scored, no token sees its successors."""
    model = save_model("paligemma", tmp_path / "model")
    picture(16, 16).save(tmp_path / "0.png")
    parts = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": "red"}
    row = {"messages": [{"role": "user", "content": parts}, answer]}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    text = "A text about nothing in particular."
    (tmp_path / "general.txt").write_text(text)
    base, config = open_vision_model(str(model))
    base.eval()
    tokenizer = open_processor(str(model), config).tokenizer
    adapter = write_random_adapter(str(model), tmp_path / "adapter")
    flags = ["--adapter-path", adapter, "--data", tmp_path / "test.jsonl", "--metric", "none"]
    content = evaluated(model, tmp_path / "result.json", *flags, "--general", tmp_path / "general.txt")
    tokens = [*tokenizer.encode(text), tokenizer.eos_token_id]
    p, q = (
        # Each token after those before it alone.
        np.array([next_log_probabilities(each, tokens[:i]) for i in range(1, len(tokens))])
        for each in (base, load_tuned(base, str(model), adapter))
    )
    found = measures(content, 0)
    for log_probabilities, value in ((p, "base"), (q, "tuned")):
        expected = -log_probabilities[np.arange(len(tokens) - 1), tokens[1:]].mean()
        assert found["general_loss"][value][0] == pytest.approx(expected, rel=1e-4)
    assert found["kl"]["tuned"][0] == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-3)


def write_random_adapter(model, directory):
    directory.mkdir()
    tuned, _ = open_vision_model(model)
    nalora_mlx.adapt(tuned, nalora_mlx.NALoRAConfig(rank=4, scale=4.0))
    random_adapters(tuned, size=0.3)
    mx.save_safetensors(str(directory / "adapters.safetensors"), adapter_weights(tuned))
    (directory / "adapter_config.json").write_text(json.dumps(adapter_config(tuned)))
    return directory


def next_log_probabilities(model, tokens):
    media = {"prompt": (mx.arange(len(tokens)) < 1).astype(mx.int32)[None]}
    logits = np.array(model(mx.array([tokens]), media=media)[0, -1], np.float64)
    return logits - np.log(np.exp(logits).sum())
