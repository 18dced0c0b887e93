"""Standard tasks: scores are those of mlx_lm.evaluate, paired by document, and errors are one line."""

import json
import random
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import load as load_tokenizer

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.merge import fuse_model
from nalora_mlx.core.config_adapter import NALoRAConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.evaluate import tasks
from tests.conftest import CHAT_TEMPLATE, build_model, llama_args, random_adapters

pytest.importorskip("lm_eval")
TASKS = Path(__file__).parent / "tasks"
NAMES = ["endings", "science", "last_words", "pages", "sums"]


def run_tasks(models, tokenizer, names, task_path=None, num_fewshot=None, notify=print, **settings):
    """Load tasks and run them."""
    loaded = tasks.load_tasks(names, task_path, num_fewshot, notify)
    return tasks.run_tasks(models, tokenizer, loaded, notify=notify, **settings)


@pytest.fixture(autouse=True, scope="module")
def data_cache(tmp_path_factory):
    """Keep prepared data sets out of the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def task_texts():
    rows = [
        json.loads(line) for path in sorted(TASKS.glob("*.jsonl")) for line in path.read_text().splitlines()
    ]
    return [
        f"Question: {row['question']}\nAnswer: {row['answer']}\n\n"
        if "question" in row
        else " ".join(map(str, row.values()))
        for row in rows
    ]


def build_tokenizer(directory, adds_bos=True):
    """Write a byte-level tokenizer of the tasks' texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(task_texts(), trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if adds_bos else None,
        eos_token="</s>",
        additional_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE.replace(
            "assistant ", "assistant\n"
        ),  # where no token crosses the boundary
    )
    fast.save_pretrained(directory)
    return load_tokenizer(directory, eos_token_ids=[1])


def train(model, tokenizer, steps=60):
    """Train on the tasks' texts, so that answers have numbers and stop words."""
    import mlx.optimizers as optim

    rows = [tokenizer.encode(text) for text in task_texts()[12:24] + task_texts()[-20:]]
    length = max(map(len, rows))
    tokens = mx.array([row + [1] * (length - len(row)) for row in rows])
    mask = mx.array([[1] * len(row) + [0] * (length - len(row)) for row in rows])[:, 1:]

    def loss(model):
        losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        return (losses * mask).sum() / mask.sum()

    optimizer, step = optim.Adam(1e-2), nn.value_and_grad(model, loss)
    for _ in range(steps):
        _, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)


def save(model, directory, args):
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (directory / "config.json").write_text(json.dumps(args))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a directory with a small model that mlx_lm.evaluate can load, and the model and its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(directory)
    args = llama_args(vocab_size=512, eos_token_id=1, hidden_size=64, max_position_embeddings=512)
    model = build_model(args=args, gain=1.0)
    train(model, tokenizer)
    model.freeze()
    save(model, directory, args)
    return SimpleNamespace(directory=directory, model=model, tokenizer=tokenizer, args=args)


def evaluate_mlx_lm(directory, names, use_chat_template=False, **settings):
    import lm_eval
    from lm_eval.tasks import TaskManager
    from mlx_lm.evaluate import MLXLM

    return lm_eval.simple_evaluate(
        model=MLXLM(str(directory), use_chat_template=use_chat_template),
        tasks=names,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        apply_chat_template=use_chat_template,
        bootstrap_iters=0,
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
        fewshot_random_seed=0,
        **settings,
    )


def evaluate_here(saved, names, use_chat_template=False, **settings):
    """Return lm_eval's own results with our language model."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from nalora_mlx.evaluate.language_model import LanguageModel

    return lm_eval.simple_evaluate(
        model=LanguageModel(saved.model, saved.tokenizer, use_chat_template=use_chat_template),
        tasks=names,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        apply_chat_template=use_chat_template,
        bootstrap_iters=0,
        fewshot_random_seed=0,
        **settings,
    )


def language_model(saved, **settings):
    from nalora_mlx.evaluate.language_model import LanguageModel

    return LanguageModel(saved.model, saved.tokenizer, **settings)


def requests(*arguments):
    return [SimpleNamespace(args=found) for found in arguments]


def log_probabilities(model, tokens):
    """Return the log-probability of each token but the first, and whether it is the most likely one."""
    logits = model(mx.array([tokens[:-1]]))[0]
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, mx.array(tokens[1:])[:, None], axis=-1)[:, 0]
    return np.array(chosen), np.array(logits.argmax(axis=-1)) == np.array(tokens[1:])


# --- the same scores as mlx_lm.evaluate ---------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_those_of_mlx_lm(saved, monkeypatch, chat):
    monkeypatch.chdir(TASKS)  # where lm_eval looks for data files
    # As a chat, without BOS, mlx_lm.evaluate does not score the first token of a page.
    names = [name for name in NAMES if not (chat and name == "pages")]
    reference = evaluate_mlx_lm(saved.directory, names, use_chat_template=chat)
    here = evaluate_here(saved, names, use_chat_template=chat)
    monkeypatch.chdir("/")
    found = run_tasks([("base", saved.model)], saved.tokenizer, names, TASKS, apply_chat_template=chat)

    for metric in found:  # perplexities and correlations are no means
        assert (metric.documents is not None) == metric.metric.startswith(("acc", "exact_match"))
        name, _, answers = metric.metric.partition(",")
        samples = reference["samples"][metric.task]
        if metric.documents is not None:
            of_filter = [sample[name] for sample in samples if sample["filter"] == (answers or "none")]
            assert metric.documents[0].tolist() == of_filter
    values = {(metric.task, metric.metric): metric.values[0] for metric in found}
    expected = {
        (task, key.removesuffix(",none")): value
        for task, metrics in reference["results"].items()
        for key, value in metrics.items()
        if "," in key and "_stderr" not in key
    }
    assert values.keys() == expected.keys()
    assert len(values) == (9 if chat else 12)
    for (task, metric), value in values.items():
        rtol = 1e-4 if "perplexity" in metric or "bits" in metric else 0
        np.testing.assert_allclose(value, expected[task, metric], rtol=rtol, err_msg=f"{task} {metric}")
    for task, samples in reference["samples"].items():
        for sample, ours in zip(samples, here["samples"][task], strict=True):
            assert sample["arguments"] == ours["arguments"]
            if task == "sums":
                assert sample["resps"] == ours["resps"]
                continue
            for [response], [own] in zip(sample["resps"], ours["resps"], strict=True):
                if task == "pages":
                    response, own = (response, True), (own, True)
                np.testing.assert_allclose(response[0], own[0], rtol=1e-4)
                assert response[1] == own[1]
    if not chat:  # the model was trained on texts
        assert any(0 < value < 1 for (_, metric), value in values.items() if metric.startswith("exact_match"))
        assert 0 < values["last_words", "acc"] <= 1


def test_number_of_examples_and_documents_are_those_of_lm_eval(saved, monkeypatch):
    monkeypatch.chdir(TASKS)
    reference = evaluate_here(saved, ["sums", "science"], num_fewshot=3, limit=5)
    notes = []
    found = run_tasks(
        [("base", saved.model)],
        saved.tokenizer,
        ["sums", "science"],
        TASKS,
        limit=5,
        num_fewshot=3,
        notify=notes.append,
    )
    for metric in found:
        key = metric.metric if "," in metric.metric else f"{metric.metric},none"
        assert metric.values == [reference["results"][metric.task][key]]
        assert metric.documents.shape == (1, 5)
    prompt = reference["samples"]["sums"][0]["arguments"][0][0]
    assert prompt.count("Question:") == 4
    assert notes == ["task science: its prompts have no examples, whatever their number should be"]


# --- texts --------------------------------------------------------------------------------------------------


def test_score_is_the_log_probability_of_what_the_continuation_adds(saved):
    context, continuations = "Question: What do bees make?\nAnswer:", [" honey", " wool", " paper money", ""]
    prompt = saved.tokenizer.encode(context)
    assert prompt[0] == 0  # BOS
    lm = language_model(saved)
    found = lm.loglikelihood(requests(*((context, text) for text in continuations), ("Tea", ".")))
    for (score, greedy), text in zip(found, continuations, strict=False):
        values, best = log_probabilities(saved.model, saved.tokenizer.encode(context + text))
        assert score == pytest.approx(values[len(prompt) - 1 :].sum(), rel=1e-5)
        assert greedy == best[len(prompt) - 1 :].all()
    assert found[3] == (0, True)
    assert lm.loglikelihood(requests(("Tea", ""))) == [(0, True)]
    values, _ = log_probabilities(saved.model, saved.tokenizer.encode("Tea."))
    assert found[4][0] == pytest.approx(values[-1], rel=1e-5)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_without_a_context_texts_follow_bos_or_eos(saved, tmp_path, adds_bos):
    tokenizer = build_tokenizer(tmp_path, adds_bos)
    bare = tokenizer.encode("The baker sells bread.", add_special_tokens=False)
    values, best = log_probabilities(saved.model, [0 if adds_bos else 1, *bare])
    for chat in (False, True):
        lm = language_model(SimpleNamespace(model=saved.model, tokenizer=tokenizer), use_chat_template=chat)
        ((score, greedy),) = lm.loglikelihood(requests(("", "The baker sells bread.")))
        assert score == pytest.approx(values.sum(), rel=1e-5)
        assert greedy == best.all()
        assert lm.loglikelihood_rolling(requests(("The baker sells bread.",))) == [
            pytest.approx(values.sum(), rel=1e-5)
        ]
    assert lm.loglikelihood_rolling(requests(("",))) == [0]


def test_a_token_across_the_boundary_is_scored(saved):
    tokenizer = saved.tokenizer
    whole = tokenizer.encode("The oven")
    assert tokenizer.encode("The ") != whole[: len(tokenizer.encode("The "))]  # the space merges into " oven"
    values, _ = log_probabilities(saved.model, whole)
    start = len(tokenizer.encode("The"))
    ((score, _),) = language_model(saved).loglikelihood(requests(("The ", "oven")))
    assert score == pytest.approx(values[start - 1 :].sum(), rel=1e-5)


def test_long_prompts_lose_their_beginning(saved):
    lm = language_model(saved)
    lm._max_length = 20
    context, text = "The baker takes the bread out of the oven. " * 3 + "The kettle", " is on the stove"
    tokens, prompt = saved.tokenizer.encode(context + text), saved.tokenizer.encode(context)
    longer = saved.tokenizer.encode(context + text + " and waits")
    values, _ = log_probabilities(saved.model, tokens[len(longer) - 21 :])
    found = lm.loglikelihood(requests((context, text), (context, text + " and waits")))
    assert found[0][0] == pytest.approx(values[len(prompt) - len(tokens) :].sum(), rel=1e-5)

    lm._max_length = 2  # less than the continuation: one token of the prompt stays
    ((score, _),) = lm.loglikelihood(requests((context, text)))
    values, _ = log_probabilities(saved.model, tokens[len(prompt) - 1 :])
    assert score == pytest.approx(values.sum(), rel=1e-5)


def test_long_texts_are_scored_in_windows_each_token_once(saved):
    lm = language_model(saved)
    lm._max_length = 10
    text = task_texts()[30]
    bare = saved.tokenizer.encode(text, add_special_tokens=False)
    assert len(bare) % 10
    tokens, total = [0, *bare], 0.0
    for start in range(0, len(bare), 10):  # predicted: bare[start : start + 10]
        end = min(start + 10, len(bare))
        values, _ = log_probabilities(saved.model, tokens[end - 10 : end + 1])
        total += values[start - end :].sum()
    assert lm.loglikelihood_rolling(requests((text,))) == [pytest.approx(total, rel=1e-5)]


def test_length_is_the_one_that_the_model_was_made_for(saved):
    assert language_model(saved)._max_length == 512
    without = SimpleNamespace(model=build_model(), tokenizer=saved.tokenizer)
    assert language_model(without)._max_length == 8192


def test_chat_template_that_rejects_a_chat(saved, tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    lm = language_model(SimpleNamespace(model=saved.model, tokenizer=tokenizer), use_chat_template=True)
    with pytest.raises(InputError, match=r"rejects a chat of a task .*no system here.*roles: system, user"):
        lm.apply_chat_template([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])


# --- answers ------------------------------------------------------------------------------------------------


def test_settings_of_answers(saved, monkeypatch):
    from nalora_mlx.evaluate import language_model as module

    calls = []

    def generate(model, tokenizer, prompts, max_tokens, batch_size, stop_words, on_answer, batching):
        calls.append((prompts, max_tokens, stop_words))
        return [SimpleNamespace(text="a. Question: b") for _ in prompts]

    monkeypatch.setattr(module, "generate_answers", generate)
    lm = language_model(saved)
    lm._max_length = 300
    long = "The bread. " * 200
    found = lm.generate_until(
        requests(
            ("One", {"until": ["Question:", ""], "max_gen_toks": 7}),
            (long, {"until": "b", "do_sample": False, "temperature": 0.7}),
        )
    )
    assert found == ["a. ", "a. Question: "]
    (prompts, limits, words) = calls[0]
    assert prompts == [saved.tokenizer.encode("One"), saved.tokenizer.encode(long)[-44:]]
    assert limits == [7, 256]
    assert words == [["Question:"], ["b"]]
    for sampling in ({"do_sample": True, "temperature": 0.8}, {"temperature": 0.8}, {"do_sample": True}):
        with pytest.raises(InputError, match="samples its answers"):
            lm.generate_until(requests(("One", sampling)))


@pytest.mark.parametrize("chat", [False, True])
def test_stop_words_count_after_the_reasoning(saved, tmp_path, monkeypatch, chat):
    from nalora_mlx.evaluate import language_model as module

    passed = []

    def generate(model, tokenizer, prompts, max_tokens, batch_size, stop_words, on_answer, batching):
        passed.extend(stop_words)
        return [SimpleNamespace(text=text) for text in ("First.\n\nThen.</think>7\n\nDone", "7\n\nDone")]

    monkeypatch.setattr(module, "generate_answers", generate)
    tokenizer = SimpleNamespace(
        has_thinking=True, think_end="</think>", detokenizer=None, encode=lambda text, **_: [5]
    )
    lm = language_model(SimpleNamespace(model=saved.model, tokenizer=tokenizer), use_chat_template=chat)
    asked = requests(("One", {"until": ["\n\n"]}), ("Two", {"until": ["\n\n"]}))
    assert lm.generate_until(asked) == ["7", "7"]
    assert passed == ([[], []] if chat else [["\n\n"]] * 2)


def test_batching_is_chosen_once_for_all_models(saved, tmp_path, monkeypatch):
    from nalora_mlx.evaluate import generation
    from nalora_mlx.evaluate import language_model as module

    chosen, passed, notes = [], [], []

    def choose(model):
        chosen.append(model)
        return generation.Batching(False, False, "answers are generated one at a time")

    def generate(*arguments):
        passed.append(arguments[-1])
        return [SimpleNamespace(text="two")]

    monkeypatch.setattr(generation, "choose_batching", choose)
    monkeypatch.setattr(module, "generate_answers", generate)
    write_task(tmp_path, "mine")
    models = [("base", saved.model), ("tuned", saved.model)]
    (metric,) = run_tasks(models, saved.tokenizer, ["mine"], tmp_path, notify=notes.append)
    assert metric.values == [1, 1]
    assert chosen == [saved.model]
    assert passed == [generation.Batching(False, False, notes[0])] * 2
    assert len(notes) == 1
    run_tasks(models, saved.tokenizer, ["mine"], tmp_path, batch_size=1)
    assert len(chosen) == 1
    assert passed[2:] == [None, None]


# --- several models -----------------------------------------------------------------------------------------


def test_models_are_paired_by_document_and_released(saved, capfd):
    alive, progress = [], []

    def models():
        for seed in (1, 2):
            assert not [model for model in alive if model() is not None]
            model = build_model(seed, args=saved.args)
            model.freeze()
            alive.append(weakref.ref(model))
            yield f"model {seed}", model
            del model

    names = ["reading", "pages", "endings"]
    found = run_tasks(
        models(), saved.tokenizer, names, TASKS, seed=3, on_progress=lambda *counts: progress.append(counts)
    )
    assert [(metric.task, metric.metric) for metric in found] == [
        ("reading", "acc"),
        ("endings", "acc"),
        ("endings", "mcc"),
        ("endings", "acc_norm"),
        ("science", "acc"),
        ("science", "acc_norm"),
        ("pages", "word_perplexity"),
        ("pages", "byte_perplexity"),
        ("pages", "bits_per_byte"),
    ]
    by_name = {(metric.task, metric.metric): metric for metric in found}
    for metric in found:
        assert len(metric.values) == 2
        assert metric.higher_is_better is (metric.task != "pages")
        assert (metric.documents is not None) == metric.metric.startswith("acc")
        if metric.documents is not None:
            np.testing.assert_allclose(metric.documents.mean(axis=1), metric.values)
    group = by_name["reading", "acc"].documents
    assert group.shape == (2, 22)
    parts = [by_name[task, "acc"].documents for task in ("endings", "science")]
    np.testing.assert_array_equal(group, np.concatenate(parts, axis=1))
    assert (group[0] != group[1]).any()
    # Each alone is the same: nothing is left of the model before.
    alone = run_tasks([("b", build_model(2, args=saved.args))], saved.tokenizer, ["science"], TASKS, seed=3)
    np.testing.assert_array_equal(alone[0].documents[0], by_name["science", "acc"].documents[1])
    assert progress[-1] == ("model 2", 8, 8)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_merged_adapter_scores_the_same(saved, tmp_path):
    def adapted():
        model = build_model(args=saved.args)
        model.update(saved.model.parameters())
        adapt(model, NALoRAConfig(num_layers=-1, rank=4))
        random_adapters(model)
        model.eval()
        model.freeze()
        return model

    merged = adapted()
    fuse_model(merged)
    lms = [
        language_model(SimpleNamespace(model=model, tokenizer=saved.tokenizer))
        for model in (saved.model, adapted(), merged)
    ]
    asked = requests(*((f"A story: {text[:20]}", text[20:]) for text in task_texts()[:20]))
    base, unmerged, fused = (np.array([score for score, _ in lm.loglikelihood(asked)]) for lm in lms)
    assert abs(base - unmerged).max() > 1
    np.testing.assert_allclose(fused, unmerged, rtol=1e-5)
    models = [("unmerged", adapted()), ("merged", merged)]
    for metric in run_tasks(models, saved.tokenizer, NAMES, TASKS):
        assert metric.values[0] == pytest.approx(metric.values[1], rel=1e-3)
        if metric.documents is not None:
            np.testing.assert_array_equal(*metric.documents)


# --- errors -------------------------------------------------------------------------------------------------


def write_task(directory, name, rows=({"q": "one", "a": "two"},), **changes):
    (directory / "data").mkdir(exist_ok=True)
    (directory / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": [f"data/{name}.json*"]}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": [" "], "do_sample": False, "max_gen_toks": 2},
    }
    (directory / f"{name}.yaml").write_text(json.dumps(task | changes))
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unsafe_code": True}, "task mine: runs code that the model writes"),
        (
            {"generation_kwargs": {"do_sample": True, "temperature": 0.5}},
            "task mine: the task samples its answers",
        ),
        (
            {"dataset_kwargs": {"data_files": "other.jsonl"}},
            r"mine.yaml: task mine cannot be loaded: .*other.jsonl",
        ),
        ({"doc_to_text": "{{q"}, r"mine.yaml: task mine cannot be loaded: TemplateSyntaxError"),
        ({"output_type": "essay"}, r"mine.yaml: task mine cannot be loaded: .*essay"),
        ({"doc_to_image": "q"}, "task mine: has images"),
    ],
)
def test_tasks_that_cannot_run(saved, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir("/")
    write_task(tmp_path, "mine", **changes)
    with pytest.raises(InputError, match=message) as error:
        run_tasks([], saved.tokenizer, ["mine"], tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_to_text": "{{10 // (q|int)}}"}, "ZeroDivisionError"),
        ({"metric_list": [{"metric": "exact_match", "aggregation": "median_of_all"}]}, "TypeError"),
    ],
)
def test_task_file_that_does_not_fit_its_data(saved, tmp_path, changes, message):
    write_task(tmp_path, "mine", [{"q": "3", "a": "x"}, {"q": "none", "a": "x"}], **changes)
    with pytest.raises(
        InputError, match=rf"task mine: its task file does not fit its data \({message}"
    ) as error:
        run_tasks([("base", saved.model)], saved.tokenizer, ["mine"], tmp_path)
    assert "\n" not in str(error.value)


def test_errors_of_the_model_stay_what_they_are(saved, tmp_path, monkeypatch):
    from nalora_mlx.evaluate import language_model as module

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "generate_answers", fail)
    write_task(tmp_path, "mine")
    with pytest.raises(RuntimeError, match="out of memory"):
        run_tasks([("base", saved.model)], saved.tokenizer, ["mine"], tmp_path)


def test_task_files_with_errors(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lm_eval.tasks.manager.__file__", str(TASKS / "manager.py")
    )  # instead of lm_eval's tasks
    write_task(tmp_path, "mine")
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: [json\noutput_type: x: y\n")
    (tmp_path / "lost.yaml").write_text("include: nowhere.yaml\ntask: lost\n")
    for name, message in {
        "broken": r"broken.yaml: cannot be read as a task file: .* in line \d",
        "lost": r"lost.yaml: cannot be read as a task file: FileNotFoundError: .*nowhere.yaml",
        "mein": r"no task 'mein'; did you mean 'mine'\?",
        "xxxxxxx": "no task 'xxxxxxx'; `lm_eval ls tasks`",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            run_tasks([], saved.tokenizer, [name], tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="is not a directory with task files"):
        run_tasks([], saved.tokenizer, ["mine"], tmp_path / "mine.yaml")


def test_data_that_must_be_downloaded(saved, tmp_path, monkeypatch):
    import datasets

    def fail(**_):
        raise ConnectionError("Couldn't reach 'someone/data' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    write_task(tmp_path, "mine", dataset_path="someone/data")
    with pytest.raises(InputError, match=r"task mine: its data \(someone/data\) are not on this machine"):
        run_tasks([], saved.tokenizer, ["mine"], tmp_path)


def test_lm_eval_is_missing(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"need the package lm_eval: .*eval"):
        run_tasks([], saved.tokenizer, ["endings"], TASKS)


def test_model_without_chat_template(saved):
    with pytest.raises(InputError, match="has no chat template"):
        run_tasks([], SimpleNamespace(has_chat_template=False), ["endings"], TASKS, apply_chat_template=True)


def test_local_tasks_need_not_read_lm_evals_own(saved, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    opened = []
    start = TaskManager.__init__

    def record(self, **settings):
        opened.append(settings.get("include_defaults", True))
        start(self, **settings | {"include_defaults": False})

    monkeypatch.setattr(TaskManager, "__init__", record)
    run_tasks([], saved.tokenizer, ["choices", "reading"], TASKS)
    assert opened == [False]
    opened.clear()
    (tmp_path / "both.yaml").write_text("group: both\ntask:\n  - hellaswag\n")
    with pytest.raises(InputError):
        run_tasks([], saved.tokenizer, ["both"], tmp_path)
    assert opened == [False, True]


def test_examples_do_not_depend_on_earlier_random_numbers(saved):
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        (strict, _) = run_tasks([("base", saved.model)], saved.tokenizer, ["sums"], TASKS)
        found.append(strict.documents)
    np.testing.assert_array_equal(*found)
