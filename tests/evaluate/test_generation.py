"""Batched greedy answers equal those that mlx-lm's `stream_generate` gives one at a time."""

import copy
import importlib
import math
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import stream_generate
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer, TokenizerWrapper

from nalora_mlx.adapters.attach import adapt, adapt_dora
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.evaluate import generation
from nalora_mlx.evaluate.generation import (
    Batching,
    GeneratedAnswer,
    batching_error,
    choose_batching,
    generate_answers,
)
from tests.conftest import build_model, llama_args, random_adapters
from tests.miniatures.klear_to_llama import MINIATURES as FIRST
from tests.miniatures.llama4_to_youtu import MINIATURES as SECOND

ZOO = FIRST | SECOND
VOCABULARY = 96  # of the miniatures
TOGETHER, PROMPTS_ALONE, ALONE = (True, True), (True, False), (False, False)
# How models answer many prompts. The first have windows of 4 tokens, experts, latent keys or states. In the second
# group states run through padding. In the third all rows get the position of one, masks do not fit, or caches do not
# merge.
EXPECTED = {
    **dict.fromkeys(
        ("llama", "qwen3", "gemma3_text", "gemma4_text", "gpt_oss", "qwen2_moe", "deepseek_v3", "gpt2"),
        TOGETHER,
    ),
    **dict.fromkeys(
        ("qwen3_5", "qwen3_next", "mamba2", "falcon_h1", "granitemoehybrid", "lfm2", "kimi_linear"), TOGETHER
    ),
    **dict.fromkeys(
        ("mamba", "jamba", "rwkv7", "recurrent_gemma", "nemotron_h", "olmo_hybrid"), PROMPTS_ALONE
    ),
    **dict.fromkeys(("afm7", "gemma2", "gpt_bigcode", "llama4", "minimax_m3_vl"), ALONE),
}
SLOW = {
    *("gemma4_text", "gpt_oss", "lfm2", "granitemoehybrid", "kimi_linear"),
    *("jamba", "nemotron_h", "olmo_hybrid", "gpt_bigcode", "minimax_m3_vl"),
}
CASES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in EXPECTED]


def build(name, seed=0):
    """Return a miniature without weights that are all zero, which could hide a difference."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    config = copy.deepcopy(ZOO[name].config)
    if "n_positions" in config:
        config["n_positions"] = 256  # the prompts are longer than those of other tests
    model = build_model(seed, module, config, gain=1.5)
    mx.random.seed(seed + 1)
    for path, array in tree_flatten(model.parameters()):
        if (
            array.size > 1
            and mx.issubdtype(array.dtype, mx.floating)
            and mx.all(array == array.reshape(-1)[0])
        ):
            model.load_weights([(path, array + 0.3 * mx.random.normal(array.shape))], strict=False)
    mx.eval(model.parameters())
    return model


class LateDetokenizer(NaiveStreamingDetokenizer):
    """Holds the last character back until the end, as if it were incomplete."""

    @property
    def text(self):
        return super().text[: -1 if self._current_tokens else None]


@pytest.fixture(scope="module")
def letters():
    """Return a function that makes a tokenizer of letters, pairs and triples of them, with chosen end tokens."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = list("abcdefghijklmnopqrstuvwxyz")
    words += [first + second for first in "abcde" for second in "vwxyz"]
    words += [first + second for first in "fghijk" for second in "mnopq"]
    words += [f"{first}at" for first in "abcdefghijklmno"]
    assert len(words) == VOCABULARY
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return lambda *end_tokens: TokenizerWrapper(fast, LateDetokenizer, end_tokens)


def random_prompts(lengths, seed=0, prefix=()):
    rng = np.random.default_rng(seed)
    return [[*prefix, *rng.integers(1, 30, length).tolist()] for length in lengths]


def answer_alone(model, tokenizer, prompt, max_tokens):
    """Return an answer of `stream_generate`, and its tokens."""
    responses = list(stream_generate(model, tokenizer, prompt, max_tokens=max_tokens))
    tokens = [response.token for response in responses]
    complete = responses[-1].finish_reason == "stop"
    text = "".join(response.text for response in responses)
    return GeneratedAnswer(text, complete, len(tokens) - complete), tokens


def check_answers(model, letters, prompts, limits, **settings):
    """Assert that answers are those of `stream_generate`, some of them with an end token."""
    _, tokens = answer_alone(model, letters(), prompts[1], limits[1])
    tokenizer = letters(tokens[5], tokens[-1])
    expected = [answer_alone(model, tokenizer, *one)[0] for one in zip(prompts, limits, strict=True)]
    assert any(answer.complete for answer in expected)
    assert generate_answers(model, tokenizer, prompts, limits, **settings) == expected


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_model_answers_as_alone(name, letters):
    model = build(name)
    batching = choose_batching(model)
    assert batching[:2] == EXPECTED[name]
    assert (batching.notice is None) == batching.answers
    # Some share a beginning that is longer than a window.
    lengths, limits = (1, 7, 40, 90, 23, 12), [9, 14, 6, 12, 14, 5]
    check_answers(model, letters, random_prompts(lengths), limits, batch_size=3, batching=batching)
    check_answers(
        model,
        letters,
        random_prompts((30, 1, 3, 17), seed=1, prefix=range(1, 19)),
        limits[:4],
        batch_size=3,
        batching=batching,
    )


def test_a_model_that_cannot_batch_has_a_notice():
    notice = choose_batching(build("llama4")).notice
    assert notice.startswith("answers are generated one at a time: ")
    assert "\n" not in notice
    assert batching_error(build("afm7")) == "an answer changes when another prompt is answered with it"
    assert batching_error(build("afm7"), prompts=False) is not None


def test_the_check_finds_a_leak_between_rows():
    """A layer that takes something from the first row of a batch is an error."""

    class Leaking(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __call__(self, x):
            return self.inner(x + 0.05 * x[:1])

    model = build_model()
    assert batching_error(model) is None
    model.layers[1].mlp = Leaking(model.layers[1].mlp)
    assert "changes" in batching_error(model)


def test_layers_that_choose_keys_are_not_trusted():
    """With blocks as in a large model, a short comparison finds nothing."""
    config = copy.deepcopy(ZOO["minimax_m3_vl"].config)
    config["text_config"]["sparse_attention_config"]["sparse_block_size"] = 64
    module = importlib.import_module("mlx_lm.models.minimax_m3_vl")
    model = build_model(0, module, config)
    assert "choose the keys" in batching_error(model)


def test_the_check_is_not_disturbed_by_dropout():
    model = build_model()
    adapt(model, NALoRAConfig(num_layers=-1, dropout=0.5))
    random_adapters(model, size=0.5)
    model.train()
    assert batching_error(model) is None


@pytest.mark.parametrize("kind", ["lora", "na-lora", "dora"])
def test_adapters(kind, letters):
    model = build_model(args=llama_args(vocab_size=VOCABULARY))
    prompts, limits = random_prompts((3, 20, 9, 31, 6)), [8, 12, 10, 9, 12]
    before, _ = answer_alone(model, letters(), prompts[3], 9)
    if kind == "dora":
        adapt_dora(model, NALoRAConfig(num_layers=-1))
    else:
        adapt(model, NALoRAConfig(num_layers=-1, mask="off" if kind == "lora" else "soft"))
    random_adapters(model, size=0.5)
    model.eval()
    assert answer_alone(model, letters(), prompts[3], 9)[0] != before
    check_answers(model, letters, prompts, limits, batch_size=2)


def test_stop_words_do_not_depend_on_the_cut_of_the_tokens(letters):
    model = build("llama")
    prompts = random_prompts((5, 12, 3, 8, 20))
    texts = [answer_alone(model, letters(), prompt, 20)[0].text for prompt in prompts]
    # Two characters from the middle of each text, which tokens may cut anywhere; one answer has none of its own.
    words = [
        [text[offset : offset + 2], "", "never"] for text, offset in zip(texts, (3, 4, 6, 9, 10), strict=True)
    ]
    words[2] = ["never"]
    answers = generate_answers(model, letters(), prompts, 20, batch_size=3, stop_words=words)
    for text, stop, answer in zip(texts, words, answers, strict=True):
        assert answer.complete == (stop[0] in text)
        assert answer.text == text.split(stop[0])[0]
        assert answer.tokens < 20 if answer.complete else answer.tokens == 20
    assert [answer.complete for answer in answers] == [True, True, False, True, True]
    one_by_one = generate_answers(model, letters(), prompts, 20, batch_size=1, stop_words=words)
    assert one_by_one == answers
    # The end of each text might begin a stop word.
    begun = [[f"{text[-1]}!"] for text in texts]
    answers = generate_answers(model, letters(), prompts, 20, batch_size=3, stop_words=begun)
    assert answers == [(text, False, 20) for text in texts]
    # The last character of each text appears only when the answer is cut.
    last = [[text[-2:]] for text in texts]
    answers = generate_answers(model, letters(), prompts, 20, batch_size=3, stop_words=last)
    expected = [(text.split(text[-2:])[0], True) for text in texts]
    assert [answer[:2] for answer in answers] == expected


def test_an_end_token_as_the_last_token_completes_an_answer(letters):
    model = build("llama")
    prompts = random_prompts((5, 12))
    _, tokens = answer_alone(model, letters(), prompts[0], 8)
    place = next(i for i in range(7, 0, -1) if tokens[i] not in tokens[:i])
    for batch_size in (1, 2):
        cut, ended = (
            generate_answers(model, letters(tokens[place]), prompts, limit, batch_size)[0]
            for limit in (place, place + 1)
        )
        assert cut == (ended.text, False, place)
        assert (ended.complete, ended.tokens) == (True, place)


def test_a_common_beginning_is_read_once(letters, monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 12)
    model = build("llama")
    prompts = random_prompts((2, 5, 9, 0), prefix=range(1, 41))
    expected = [answer_alone(model, letters(), prompt, 2)[0] for prompt in prompts]
    read = count_tokens(monkeypatch)
    assert generate_answers(model, letters(), prompts, 2, batch_size=4, batching=Batching()) == expected
    # The rest of the prompts is padded, and generation runs a step ahead.
    assert sum(rows * length for rows, length in read) <= 39 + 4 * 9 + 4 * 3


def count_tokens(monkeypatch):
    """Return a list to which llama adds the shape of the tokens at each call."""
    shapes, call = [], llama.Model.__call__

    def counting(self, inputs, *args, **kwargs):
        shapes.append(tuple(inputs.shape))
        return call(self, inputs, *args, **kwargs)

    monkeypatch.setattr(llama.Model, "__call__", counting)
    return shapes


def test_batches_are_full_and_bounded(letters, monkeypatch):
    """Prompts that are too long for a full batch share smaller ones, and padding is rare."""
    monkeypatch.setattr(generation, "BATCH_TOKENS", 120)
    model = build("llama")
    lengths = [5, 50, 6, 5, 50, 4, 6, 50, 4, 5, 6, 4]
    prompts = random_prompts(lengths)
    expected = [answer_alone(model, letters(), prompt, 10)[0] for prompt in prompts]
    shapes = count_tokens(monkeypatch)
    assert generate_answers(model, letters(), prompts, 10, batch_size=4, batching=Batching()) == expected
    assert max(rows for rows, _ in shapes) == 4
    assert max(rows for rows, length in shapes if length > 40) == 2  # 2 x 60 tokens
    assert sum(rows * length for rows, length in shapes if length > 1) <= 1.25 * sum(lengths)
    steps = sum(length == 1 for _, length in shapes)
    assert steps <= 11 * (math.ceil(3 / 2) + math.ceil(9 / 4))


def test_answers_are_counted_and_in_order(letters):
    model = build("llama")
    prompts = random_prompts((1, 9, 30, 4, 17))
    for batch_size in (1, 2, None):
        counts = []
        answers = generate_answers(model, letters(), prompts, 3, batch_size, on_answer=counts.append)
        assert counts == [1, 2, 3, 4, 5]
        assert answers == [answer_alone(model, letters(), prompt, 3)[0] for prompt in prompts]
    assert generate_answers(model, letters(), [], 3) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_resets_the_limit_of_wired_memory(error, letters, monkeypatch):
    limits = []
    monkeypatch.setattr(sys.modules["mlx_lm.generate"], "maybe_set_recommended_wired_limit", lambda: 123)
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    model = build("llama")

    def interrupt(done):
        if done == 2:
            raise error

    with pytest.raises(error) as caught:
        generate_answers(
            model, letters(), random_prompts((3, 4, 5, 6)), 4, 2, on_answer=interrupt, batching=Batching()
        )
    assert limits == [123]
    del caught  # it keeps what is not closed yet


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_stays(training, letters):
    model = build("llama")
    model.train(training)
    generate_answers(model, letters(), random_prompts((3, 4)), 2)
    assert {module.training for _, module in model.named_modules()} == {training}
    batching_error(build("gpt_bigcode"))  # raises inside


def test_a_single_prompt_is_not_checked(letters, monkeypatch):
    monkeypatch.setattr(generation, "choose_batching", None)
    model = build("llama")
    prompt = [4, 5, 6]
    assert generate_answers(model, letters(), [prompt], 5) == [answer_alone(model, letters(), prompt, 5)[0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": [[1, 2], []]}, "a prompt is empty"),
        ({"max_tokens": 0}, "must be at least 1"),
        ({"max_tokens": [3, 0]}, "must be at least 1"),
        ({"max_tokens": [3]}, "2 prompts have 1 values of max_tokens"),
        ({"stop_words": [["a"]]}, "1 lists of stop words"),
        ({"batch_size": 0}, "must be at least 1"),
    ],
)
def test_wrong_arguments(settings, message, letters):
    arguments = {"prompts": [[1, 2], [3]], "max_tokens": 2} | settings
    with pytest.raises(ValueError, match=message):
        generate_answers(build("llama"), letters(), **arguments)
