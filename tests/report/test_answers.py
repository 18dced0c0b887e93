"""Answers in a report: those of the base model and of each run's adapter."""

import json

import mlx.core as mx
import pytest
from mlx_lm import generate
from mlx_lm.utils import load

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.files import adapter_config, adapter_weights
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.report.answers import answers
from tests.conftest import random_adapters

QUESTION, TEXT, TOKENS = "what colour is the cat one ?", "the dog is", 6


@pytest.fixture
def adapters(model_directory, tmp_path):
    """The directories of two random adapters."""
    for seed in (1, 2):
        model, _ = load(str(model_directory))
        adapt(model, NALoRAConfig(rank=4, scale=4.0))
        random_adapters(model, seed, size=0.3)
        (tmp_path / str(seed)).mkdir()
        mx.save_safetensors(str(tmp_path / str(seed) / "adapters.safetensors"), adapter_weights(model))
        (tmp_path / str(seed) / "adapter_config.json").write_text(json.dumps(adapter_config(model)))
    return [tmp_path / "1", tmp_path / "2"]


def test_answers_are_those_of_separately_loaded_models(model_directory, adapters):
    want = []
    for adapter in (None, *map(str, adapters)):
        model, tokenizer = load(str(model_directory), adapter_path=adapter)
        message = {"role": "user", "content": QUESTION}
        chat = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
        want.append([generate(model, tokenizer, p, max_tokens=TOKENS).strip() for p in (chat, TEXT)])
    prompts = [{"messages": [{"role": "user", "content": QUESTION}]}, {"text": TEXT}]
    runs = list(zip(("one", "two"), adapters, strict=True))
    for found, texts in zip(
        answers(str(model_directory), runs, prompts, TOKENS), zip(*want, strict=True), strict=True
    ):
        assert found["texts"] == list(zip(("before", "one", "two"), texts, strict=True))
    assert len({tuple(texts) for texts in want}) > 1
    alone = answers(str(model_directory), runs[:1], prompts, TOKENS)
    assert [name for name, _ in alone[0]["texts"]] == ["before", "after"]
    assert [one["prompt"] for one in alone] == [QUESTION, TEXT]
