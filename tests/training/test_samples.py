"""Answers at the end of training: the same as those of the models themselves, and never the end of a run."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama, mamba, qwen3_moe
from mlx_lm.tokenizer_utils import load as load_tokenizer

from nalora_mlx.adapters.attach import adapt, adapt_dora, unfreeze_layers
from nalora_mlx.core.config import PLAIN_LORA, NALoRAConfig
from nalora_mlx.runs.samples import SAMPLES_FILE, read_samples
from nalora_mlx.training import samples
from nalora_mlx.training.distributed import Workers
from nalora_mlx.training.samples import write_samples
from tests.conftest import VOCABULARY, build_model, llama_args, random_adapters

PROMPTS = [
    {
        "source": f"valid.jsonl:{number}",
        "split": "valid",
        "messages": [{"role": "user", "content": text}],
        "prompt": text,
        "expected": "the cat is red",
    }
    for number, text in enumerate(("what colour is the cat ?", "the bird is blue"), 1)
] + [{"source": "b.txt:1", "split": "valid", "text": "the dog", "prompt": "the dog", "expected": None}]
LIMIT = 12
MOE = llama_args(
    model_type="qwen3_moe",
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    norm_topk_prob=True,
    max_position_embeddings=64,
    rope_theta=10000.0,
)
MAMBA = {
    "model_type": "mamba",
    "hidden_size": 32,
    "intermediate_size": 64,
    "state_size": 16,
    "num_hidden_layers": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": VOCABULARY,
    "time_step_rank": 4,
    "tie_word_embeddings": True,
}
NA = NALoRAConfig(rank=4, scale=8.0, dropout=0.5)
LORA = NALoRAConfig(rank=4, scale=8.0, mask=PLAIN_LORA.mask, step_scaling=PLAIN_LORA.step_scaling)
MODELS = {
    "na-lora": ({}, lambda model: adapt(model, NA)),
    "lora": ({}, lambda model: adapt(model, LORA)),
    "dora": ({}, lambda model: adapt_dora(model, LORA)),
    "experts": ({"module": qwen3_moe, "args": MOE}, lambda model: adapt(model, NA)),
    "recurrent": ({"module": mamba, "args": MAMBA}, lambda model: adapt(model, NA)),
    "float16": ({"dtype": mx.float16}, lambda model: adapt(model, NA)),
}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(samples, "SHORTEST_LIMIT", LIMIT)
    monkeypatch.setattr(samples, "MARGIN", 0)


def tuned_model(settings=MODELS["na-lora"][0], attach=MODELS["na-lora"][1]):
    """Return a model in training mode with an adapter that changes its answers."""
    model = build_model(3, **{"module": llama, **settings})
    attach(model)
    random_adapters(model, size=0.3)
    model.train()
    return model


def greedy(model, tokenizer, prompt):
    """Return the answer to a prompt and whether it ended, from full forwards without a cache."""
    if "text" in prompt:
        tokens = tokenizer.encode(prompt["text"])
    else:
        tokens = tokenizer.apply_chat_template(
            prompt["messages"], add_generation_prompt=True, return_dict=False
        )
    answer = []
    for _ in range(LIMIT):
        token = int(model(mx.array([tokens + answer]))[0, -1].argmax())
        if token in tokenizer.eos_token_ids:
            return tokenizer.decode(answer), True
        answer.append(token)
    return tokenizer.decode(answer), False


def state(model):
    """Return everything that samples must not change."""
    parameters = {name: (array.dtype, np.array(array.astype(mx.float32))) for name, array in arrays(model)}
    modules = {name: (type(module), module.training) for name, module in model.named_modules()}
    trainable = sorted(name for name, _ in tree_flatten(model.trainable_parameters()))
    return parameters, modules, trainable, [np.array(key) for key in mx.random.state]


def arrays(model):
    return tree_flatten(model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_the_base_and_of_the_tuned_model(name, tokenizer, tmp_path):
    settings, attach = MODELS[name]
    model, base = tuned_model(settings, attach), build_model(3, **{"module": llama, **settings})
    before = state(model)
    notices = []
    written = write_samples(model, tokenizer, PROMPTS, tmp_path, notices.append)
    np.testing.assert_equal(state(model), before)
    assert notices == []
    assert read_samples(tmp_path) == written
    model.eval()
    for prompt, sample in zip(PROMPTS, written, strict=True):
        assert (sample["before"], sample["before_complete"]) == greedy(base, tokenizer, prompt)
        assert (sample["after"], sample["complete"]) == greedy(model, tokenizer, prompt)
        assert {key: sample[key] for key in prompt} == prompt
    assert any(sample["before"] != sample["after"] for sample in written)
    assert not all(sample["complete"] for sample in written)


def test_a_stop_token_of_the_chat_ends_an_answer(tokenizer_directory, tmp_path):
    """The tokenizer's end tokens count, of which a model may have several."""
    model = tuned_model()
    plain = load_tokenizer(tokenizer_directory)
    model.eval()
    token = plain.encode(greedy(model, plain, PROMPTS[0])[0])[3]
    tokenizer = load_tokenizer(tokenizer_directory, eos_token_ids=[2, token])
    text, complete = greedy(model, tokenizer, PROMPTS[0])
    assert complete
    (sample,) = write_samples(model, tokenizer, PROMPTS[:1], tmp_path, print)
    assert (sample["after"], sample["complete"]) == (text, True)


def test_after_full_fine_tuning_there_is_no_base_to_ask(tokenizer, tmp_path):
    model = build_model()
    unfreeze_layers(model, -1)
    (sample,) = write_samples(model, tokenizer, PROMPTS[:1], tmp_path, print)
    assert (sample["after"], sample["complete"]) == greedy(model, tokenizer, PROMPTS[0])
    assert (sample["before"], sample["before_complete"]) == (None, False)


@pytest.mark.parametrize(("expected", "limit"), [("one", 12), ("one " * 30, 30), ("one " * 500, 256)])
def test_answers_may_be_as_long_as_the_expected_ones(tokenizer, tmp_path, monkeypatch, expected, limit):
    lengths = []
    monkeypatch.setattr(samples, "_answer", lambda *args: lengths.append(args[2]))
    write_samples(tuned_model(), tokenizer, [PROMPTS[0] | {"expected": expected}], tmp_path, lambda _: None)
    assert set(lengths) == {limit}


class Clock:
    """Time that passes by a step whenever somebody looks at it, and never otherwise."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def monotonic(self):
        self.now += self.step
        return self.now


@pytest.fixture
def never_ends(tokenizer_directory):
    """Return a tokenizer without end tokens, so that only time or the limit ends an answer."""
    tokenizer = load_tokenizer(tokenizer_directory)
    tokenizer.eos_token_ids = set()
    return tokenizer


@pytest.mark.parametrize(("trained", "seconds"), [(0, 20), (800, 40), (5000, 60)])
def test_time_is_bounded_on_a_slow_machine(never_ends, tmp_path, monkeypatch, trained, seconds):
    """One prompt is answered, and each model gets about half of the time."""
    clock = Clock(0.25)
    monkeypatch.setattr(samples, "time", clock)
    monkeypatch.setattr(samples, "SHORTEST_LIMIT", 200)
    model = tuned_model()
    before = state(model)
    (sample,) = write_samples(model, never_ends, PROMPTS, tmp_path, print, trained)
    assert seconds - 2 <= clock.now <= seconds + 3
    assert not sample["complete"]
    assert not sample["before_complete"]
    after, base = (len(sample[key].split()) for key in ("after", "before"))
    assert after == pytest.approx(seconds / 2 / 0.25, abs=6)
    assert base == pytest.approx(seconds / 2 / 0.25, abs=6)
    np.testing.assert_equal(state(model), before)


@pytest.mark.parametrize(("step", "count", "cut"), [(0.1, 3, False), (0.25, 2, True), (0.38, 1, False)])
def test_a_slow_model_answers_fewer_prompts(never_ends, tmp_path, monkeypatch, step, count, cut):
    """The tuned model's answers of 20 tokens are whole, those of the base may be cut."""
    clock = Clock(step)
    monkeypatch.setattr(samples, "time", clock)
    monkeypatch.setattr(samples, "SHORTEST_LIMIT", 20)
    written = write_samples(tuned_model(), never_ends, PROMPTS, tmp_path, print)
    assert len(written) == count
    assert clock.now <= 22
    assert all(len(sample["after"].split()) == 20 for sample in written)
    base = [len(sample["before"].split()) for sample in written]
    assert (min(base) < 20) == cut
    assert max(base) - min(base) <= 2  # the same time for all of them


def test_a_model_that_is_too_slow_for_one_token_leaves_no_file(tokenizer, tmp_path, monkeypatch):
    """The clock is looked at during a long prompt, too."""
    monkeypatch.setattr(samples, "time", Clock(1.0))
    model, notices = tuned_model(), []
    calls = 0
    forward = type(model).__call__

    def counting(*args, **kwargs):
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(model), "__call__", counting)
    prompts = [
        prompt | {"messages": [{"role": "user", "content": "the cat " * 1000}]} for prompt in PROMPTS[:2]
    ]
    assert write_samples(model, tokenizer, prompts, tmp_path, notices.append) == []
    assert notices == ["no sample answers: the model is too slow to answer within 20 s"]
    assert list(tmp_path.iterdir()) == []
    assert calls < 30


def test_a_failure_is_a_notice(tokenizer, tmp_path, monkeypatch):
    model, notices = tuned_model(), []
    before = state(model)
    tokens = 0

    def fail(*_args, **_options):
        nonlocal tokens
        tokens += 1
        if tokens == 5:  # a base answer: the adapters are off
            raise RuntimeError("out of memory\nmore")
        yield from ()

    monkeypatch.setattr(samples, "stream_generate", fail)
    assert write_samples(model, tokenizer, PROMPTS, tmp_path, notices.append) == []
    assert notices == ["no sample answers were kept: out of memory"]
    np.testing.assert_equal(state(model), before)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.undo()
    notices.clear()
    assert write_samples(model, tokenizer, PROMPTS[:1], blocked, notices.append) == []
    assert len(notices) == 1
    assert notices[0].startswith("no sample answers were kept: ")


def test_a_stop_leaves_at_once_and_writes_nothing(tokenizer, tmp_path, monkeypatch):
    model, notices, asked = tuned_model(), [], 0

    def stop():
        nonlocal asked
        asked += 1
        return asked > 3

    assert write_samples(model, tokenizer, PROMPTS, tmp_path, notices.append, stop=stop) == []
    assert notices == []
    assert asked < 15
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_worker_answers(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "workers", lambda: Workers(rank=1, size=2))
    assert write_samples(tuned_model(), tokenizer, PROMPTS, tmp_path, print) == []
    assert list(tmp_path.iterdir()) == []


def test_the_file_names_no_directories(tokenizer, tmp_path):
    write_samples(tuned_model(), tokenizer, PROMPTS[:1], tmp_path, print)
    assert str(tmp_path) not in (tmp_path / SAMPLES_FILE).read_text()
    assert json.loads((tmp_path / SAMPLES_FILE).read_text())["format"] == 1
