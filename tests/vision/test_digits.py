"""The digits example: its data, the model that it makes, how answers are scored, and its study."""

import itertools
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (pip install '.[digits]')")
pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install '.[digits]')")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import digits_data
import digits_model
import digits_score
import digits_study

from nalora_mlx.core.config import load_run_config
from nalora_mlx.data.batches import collate

RECIPE = digits_model.Recipe(
    hidden_size=32, heads=2, layers=1, tower_epochs=1, embedding_iters=4, embedding_rate=0.05, copies=1
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("digits") / "data"
    digits_data.write_data(directory)
    return directory


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """Return the directory of a tiny Llama with a tokenizer of bytes, digits' names and special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("language")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens, merges = special + sorted(pre_tokenizers.ByteLevel.alphabet()), []
    for word in digits_model.WORDS:  # each becomes one token, with the space before it
        for i in range(len(word)):
            merges.append((f"Ġ{word[:i]}", word[i]))
            tokens.append(f"Ġ{word[: i + 1]}")
    tokens = list(dict.fromkeys(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[2], pad_token=special[2]
    ).save_pretrained(directory)
    config = {
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    mx.random.seed(4)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = {name: 2 * array for name, array in tree_flatten(model.parameters())}
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def model_directory(language_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("digits-model") / "model"
    lines = []
    digits_model.make_model(language_model, output, RECIPE, lines.append)
    assert len(lines) == 4
    return output


@pytest.fixture(scope="module")
def loaded(model_directory):
    """Return what unmodified mlx-vlm loads."""
    from mlx_vlm import load

    return load(str(model_directory))


def rows(data, task, split):
    return [json.loads(line) for line in (data / task / f"{split}.jsonl").read_text().splitlines()]


def images(row):
    return [part["image"] for part in row["messages"][0]["content"] if part["type"] == "image"]


# --- data ---------------------------------------------------------------------------------------------------


def digit_of(path):
    """Return the digit on a picture, found by comparing it with all pictures of scikit-learn."""
    from PIL import Image
    from sklearn.datasets import load_digits

    small = np.asarray(Image.open(path).resize((8, 8), Image.Resampling.BOX), np.float64).ravel()
    originals = load_digits()
    distances = ((originals.data * 255 / 16 - small) ** 2).mean(axis=1)
    best = np.argsort(distances)[:2]
    assert distances[best[0]] < 0.8 * distances[best[1]]
    return int(originals.target[best[0]])


def test_answers_are_those_of_the_pictures(data):
    for row in rows(data, "read", "test")[:20]:
        (path,) = images(row)
        assert digits_score.expected(row) == str(digit_of(data / "read" / path))
    for row in rows(data, "sum", "train")[:20]:
        a, b = (digit_of(data / "sum" / path) for path in images(row))
        assert digits_score.expected(row) == f"{a} + {b} = {a + b}"


def test_parts_share_no_picture(data):
    parts = digits_data.load_pictures()
    assert sum(len(digits) for _, digits in parts.values()) == 1797
    seen = [picture.tobytes() for pictures, _ in parts.values() for picture in pictures]
    assert len(set(seen)) == 1797
    used = {
        split: {path for task in ("read", "sum") for row in rows(data, task, split) for path in images(row)}
        for split in ("train", "valid", "test")
    }
    files = {name: {(data / "read" / path).read_bytes() for path in paths} for name, paths in used.items()}
    for a, b in itertools.combinations(files.values(), 2):
        assert not a & b
    assert len(set.union(*used.values())) == len(list((data / "images").iterdir())) == 1000
    counts = Counter(path for row in rows(data, "sum", "train") for path in images(row))
    assert set(counts.values()) == {4}


def test_the_config_reads_the_data(data):
    from nalora_mlx.data.checks import read_rows

    config = load_run_config(
        Path(__file__).parents[2] / "examples" / "digits" / "sum.yaml", {"data": str(data / "sum")}
    )
    config.check()
    splits = read_rows(config, ["train", "valid"]).sources
    assert [len(source["train"]) for source in splits] == [1000]
    assert len(splits[0]["train"][0].images) == 2


# --- the model ----------------------------------------------------------------------------------------------


def test_mlx_vlm_loads_the_model_with_the_language_model_unchanged(loaded, language_model):
    model, processor = loaded
    original = mx.load(str(language_model / "model.safetensors"))
    found = dict(tree_flatten(model.language_model.parameters()))
    for name, array in original.items():
        mine = found[name.removeprefix("model.")]
        assert mx.array_equal(mine[: len(array)], array), name
    embedding = original["model.embed_tokens.weight"]
    vocabulary = len(embedding)
    newline = processor.tokenizer.encode("\n", add_special_tokens=False)
    assert len(newline) == 1
    assert mx.array_equal(
        found["embed_tokens.weight"][vocabulary:], mx.repeat(embedding[newline[0]][None], 3, 0)
    )
    hidden = mx.random.normal((200, 48), key=mx.random.key(0))
    assert mx.argmax(model.language_model.lm_head(hidden), axis=-1).max().item() < vocabulary


def test_the_processor_writes_the_tokens_that_the_model_was_made_for(loaded, data):
    from PIL import Image

    model, processor = loaded
    prompts = digits_model.make_prompts(processor, "Read it.", model.config.image_token_id)
    tokens = prompts.tokens.tolist()
    for digit, row in enumerate(tokens):
        assert [i for i, token in enumerate(row) if token == model.config.image_token_id] == [
            prompts.image + i for i in range(RECIPE.image_tokens)
        ]
        whole = processor.tokenizer.decode(row + prompts.answers[digit].tolist()[-1:])
        assert re.sub("(<image>)+", "*", whole) == (
            "<|im_start|>user\n<fake_token_around_image><global-img>*<fake_token_around_image>Read it.<|im_end|>\n"
            f"<|im_start|>assistant\nThe digit is {digits_model.WORDS[digit]}.<|im_end|>"
        )
    assert tokens[3][prompts.start + 1 :] == prompts.answers[3].tolist()[:-1]
    # The vision tower is trained on what the processor makes of the files.
    pictures, _ = digits_data.load_pictures()["test"]
    files = [Image.open(data / "images" / f"test-{i:03d}.png").convert("RGB") for i in range(10)]
    inputs = processor(text=["<image>" * 10], images=[files])["pixel_values"][0]
    expected = digits_model.processed(pictures[:10], RECIPE.image_size)
    assert np.abs(np.array(inputs).transpose(0, 2, 3, 1) - expected).mean() < 0.05


def test_embeddings_and_projector_are_fitted(model_directory):
    from mlx_vlm import load

    model, processor = load(str(model_directory))
    prompts = [digits_model.make_prompts(processor, "Read it.", model.config.image_token_id)]
    names = mx.arange(10) + 100

    def loss(embeddings):
        logits = digits_model.answer_logits(model, prompts[0], mx.arange(10), embeddings)
        return mx.mean(nn.losses.cross_entropy(logits, prompts[0].answers)).item()

    # The logits are those of mlx-vlm at the answers' positions.
    ids, images_ = prompts[0].tokens[:2], mx.random.normal((2, RECIPE.image_tokens, 48))
    embedded = model.language_model.embed_tokens(ids)
    embedded[:, prompts[0].image : prompts[0].image + RECIPE.image_tokens] = images_
    expected = model.language_model(ids, inputs_embeds=embedded).logits[:, prompts[0].start :]
    found = digits_model.answer_logits(model, prompts[0], mx.arange(2), images_)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-4)

    start = mx.repeat(model.language_model.embed_tokens(names)[:, None], RECIPE.image_tokens, 1)
    embeddings = digits_model.find_embeddings(model, prompts, names, replace(RECIPE, embedding_iters=10))
    assert loss(embeddings) < loss(start) - 0.1

    digits, ridge = np.arange(40) % 10, 0.01
    pictures = np.random.default_rng(0).uniform(-1, 1, (40, 32, 32, 3)).astype(np.float32)
    outputs = digits_model.tower_output(model, pictures)
    digits_model.fit_projector(model, pictures, digits, embeddings, ridge)
    x = np.array(outputs, np.float64).reshape(-1, 128)
    y = np.array(embeddings)[digits].reshape(-1, 48)
    # The minimum of |x w - y|^2 / n + ridge |w|^2, by another way: least squares with further rows.
    extended = np.vstack([x, np.sqrt(ridge * len(x)) * np.eye(x.shape[1])])
    expected, *_ = np.linalg.lstsq(extended, np.vstack([y, np.zeros((x.shape[1], 48))]), rcond=None)
    projected = np.array(model.connector.modality_projection(outputs)).reshape(-1, 48)
    np.testing.assert_allclose(projected, x @ expected, atol=1e-4)


# --- scores -------------------------------------------------------------------------------------------------


def valid(text):
    """Return a text without bytes that are not UTF-8, which mlx-vlm may leave out."""
    return text.replace("\N{REPLACEMENT CHARACTER}", "").strip()


@pytest.mark.parametrize("task", ["read", "sum"])
def test_batches_get_the_answers_of_mlx_vlm(loaded, data, task):
    from mlx_vlm import generate

    model, processor = loaded
    chosen = rows(data, task, "test")[:4]
    answers = digits_score.answer_batch(model, processor, chosen, data / task)
    for row, answer in zip(chosen, answers, strict=True):
        prompt = processor.tokenizer.apply_chat_template(
            row["messages"][:1], tokenize=False, add_generation_prompt=True
        )
        paths = [str(data / task / path) for path in images(row)]
        options = {"max_tokens": digits_score.MAX_TOKENS, "temperature": 0.0}
        text = generate(model, processor, prompt, image=paths, **options).text
        assert valid(answer) == valid(text)


def test_accuracies_are_printed_and_checked(data, tmp_path, capsys):
    right = [digits_score.expected(row) for row in rows(data, "sum", "test")[:10]]
    for name, answers in (("before", ["The sum is nine."] * 10), ("after", [*right[:8], "1 + 1 = 3", ""])):
        (tmp_path / name).write_text(json.dumps(answers))
    files = [tmp_path / "before", tmp_path / "after"]
    given = {"data": data / "sum", "answers": files, "show": 3}
    assert digits_score.compare(SimpleNamespace(**given, enough=0.8)) == 0
    assert "on 10 held-out rows: 0.0% before, 80.0% after" in capsys.readouterr().out
    assert digits_score.compare(SimpleNamespace(**given, enough=0.81)) == 1


# --- the study ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(model_directory, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_study, "LAYERS", 2)
        patch.setattr(digits_study, "ROWS", {"train": 16, "valid": 6, "test": 9})
        patch.setattr(digits_study, "ITERS", 10)
        yield digits_study.Study(str(model_directory), str(data / "sum"))


def test_the_upper_layers_give_the_logits_of_the_whole_model(study, loaded, data):
    from PIL import Image

    model, processor = loaded
    upper = study.upper_layers()
    assert len(upper.layers) == 2
    chosen = study.examples["test"][:3]
    batch = collate(chosen, range(3)).with_media()
    media = {name: mx.array(array) for name, array in batch.media.items()}
    found = np.array(upper(mx.array(batch.inputs), media=media))
    for i, row in enumerate(rows(data, "sum", "test")[:3]):
        text = processor.tokenizer.apply_chat_template(row["messages"], tokenize=False)
        pictures = [[Image.open(data / "sum" / path).convert("RGB") for path in images(row)]]
        inputs = processor(text=[text], images=pictures)
        logits = model(**inputs).logits[0]
        count = chosen[i].inputs
        np.testing.assert_allclose(found[i, :count], np.array(logits[:count]), rtol=1e-4, atol=1e-4)


def test_scores_are_loss_and_exact_answers(study):
    model, examples = study.upper_layers(), study.examples["test"]
    losses, right = [], []
    for row in examples:
        batch = collate([row], [0]).with_media()
        media = {name: mx.array(array) for name, array in batch.media.items()}
        logits = model(mx.array(batch.inputs), media=media)[0]
        wanted = row.tokens[1:][row.loss_mask[1:]]
        at = np.flatnonzero(row.loss_mask[1:])
        log_p = np.array(nn.log_softmax(logits, axis=-1))[at]
        losses += list(-log_p[np.arange(len(at)), wanted])
        right.append(bool((log_p.argmax(-1) == wanted).all()))
    found = digits_study.score(model, examples)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert found["exact"] == np.mean(right)
    # Rows whose targets are the greedy answers are right.
    greedy = []
    for i, row in enumerate(examples):
        batch = collate([row], [0]).with_media()
        media = {name: mx.array(array) for name, array in batch.media.items()}
        best = np.array(mx.argmax(model(mx.array(batch.inputs), media=media)[0], axis=-1))[: row.inputs]
        tokens = row.tokens.copy()
        if i % 3:  # inputs stay as they are, since they are hidden states
            tokens[1:][row.loss_mask[1:]] = best[row.loss_mask[1:]]
        greedy.append(replace(row, tokens=tokens))
    assert digits_study.score(model, greedy)["exact"] == pytest.approx(6 / 9)


def test_runs_are_reproducible_and_learn(study):
    setting = digits_study.Setting("na-lora", 2e-2, 3, True)
    before = digits_study.score(study.upper_layers(), study.examples["valid"])["loss"]
    first, again = (digits_study.run(study, setting) for _ in range(2))
    assert first["valid"]["loss"] < before - 0.5
    assert first["test"] == again["test"]
    assert first["test"] != digits_study.run(study, replace(setting, method="lora"))["test"]


def test_rates_are_tuned_and_results_continued(tmp_path, monkeypatch):
    runs = []

    def run(_, setting):
        runs.append(setting)
        loss = abs(np.log2(setting.rate / 16e-3)) + 0.1 * setting.seed + 1
        test = {"loss": loss, "exact": 0.5 if setting.method == "lora" else 0.25 + setting.seed / 1000}
        return vars(setting) | {"valid": {"loss": loss}, "test": test}

    monkeypatch.setattr(digits_study, "run", run)
    path = tmp_path / "results.jsonl"
    results = digits_study.Results(path)
    assert digits_study.best_rate(None, results, "lora") == pytest.approx(16e-3)
    assert sorted({setting.rate for setting in runs}) == pytest.approx([1e-3 * 2**i for i in range(6)])
    count = len(runs)
    results = digits_study.Results(path)  # read again
    assert digits_study.best_rate(None, results, "lora") == pytest.approx(16e-3)
    assert len(runs) == count
    rates = {"lora": 16e-3, "na-lora": 8e-3}
    settings = [
        digits_study.Setting(method, rate, seed, True)
        for method, rate in rates.items()
        for seed in digits_study.SEEDS
    ]
    digits_study.complete(None, results, settings)
    table = digits_study.table(digits_study.Results(path), rates)
    assert "| na-lora - lora | | +1.0000 [+1.0000, +1.0000] | -14.8 [-15.0, -14.6] points |" in table


def test_intervals_are_those_of_student():
    from scipy import stats

    differences = [0.3, -0.1, 0.25, 0.6, 0.05]
    low, high = stats.t.interval(0.95, 4, np.mean(differences), stats.sem(differences))
    expected = f"{np.mean(differences):+.4f} [{low:+.4f}, {high:+.4f}]"
    assert digits_study.interval(differences, 1.0) == expected
