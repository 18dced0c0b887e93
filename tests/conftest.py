"""Tiny random models, a tiny tokenizer and rows of data for all tests."""

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.core.config_presets import PRESETS
from nalora_mlx.data.tokenization import Example
from nalora_mlx.ops.device_sizes import SIZES

# Tolerances are for float32 on a CPU, also on a Mac. Programs that tests start are set up alike, by sitecustomize.py.
mx.set_default_device(mx.cpu)
STARTED_PROGRAMS = Path(__file__).parent / "started_programs"
os.environ.setdefault("NALORA_TEST_DEVICE", "cpu")
os.environ.pop("NALORA_COMMAND", None)  # set by scripts/environment.sh
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(STARTED_PROGRAMS), os.environ.get("PYTHONPATH")))
)
vars(fcntl).pop("F_FULLFSYNC", None)  # on macOS, thousands of full flushes take minutes

# With nohup or in the background, these signals are ignored, and so they would be in programs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="also run the tests that are slow and seldom tell anything new"
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    slow = [item for item in items if "slow" in item.keywords]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if "slow" not in item.keywords]


VOCABULARY = 64
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def llama_args(**changes):
    settings = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    return settings | changes


def build_model(seed=0, module=llama, args=None, dtype=mx.float32, gain=3.0):
    """Return a random model with gate inputs large enough to be nonlinear."""
    mx.random.seed(seed)
    args = args or llama_args()
    model = module.Model(module.ModelArgs.from_dict(args))
    for name, array in tree_flatten(model.parameters()):
        if array.ndim == 2 and mx.issubdtype(array.dtype, mx.floating):
            model.load_weights([(name, array * gain)], strict=False)
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def masked_config(**settings):
    """Return settings with the mask and the step scales, which are off by default, and without a limit."""
    return NALoRAConfig(**(PRESETS["paper"]["na_parameters"] | settings))


def random_adapters(model, seed=7, size=0.05):
    """Give every lora_b random values, so that adapters have an effect."""
    key = mx.random.key(seed)
    for name, array in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):
            key, used = mx.random.split(key)
            model.load_weights([(name, size * mx.random.normal(array.shape, key=used))], strict=False)
    mx.eval(model.parameters())


def build_examples(count=12, seed=0, low=5, high=20, prompt=2):
    """Return random rows of different lengths, whose first tokens are an unsupervised prompt."""
    rng = np.random.default_rng(seed)
    examples = []
    for row in range(count):
        length = int(rng.integers(low, high))
        supervised = np.arange(length) >= prompt
        examples.append(
            Example(rng.integers(1, VOCABULARY, length, dtype=np.int32), supervised, f"row:{row + 1}")
        )
    return examples


@pytest.fixture
def model() -> nn.Module:
    return build_model()


@pytest.fixture
def examples():
    return build_examples()


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    """Return the directory of a word-level tokenizer with a chat template, as transformers saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<|im_start|>", "<|im_end|>", "<pad>", "system", "user", "assistant"]
    words += [
        "red",
        "blue",
        "green",
        "one",
        "two",
        "three",
        "cat",
        "dog",
        "bird",
        "is",
        "the",
        "what",
        "colour",
        "?",
    ]
    vocabulary = {word: i for i, word in enumerate(words)}
    vocabulary |= {f"w{i}": i for i in range(len(words), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory):
    from mlx_lm.tokenizer_utils import load

    return load(tokenizer_directory)


@pytest.fixture(scope="session")
def model_directory(tokenizer_directory, tmp_path_factory):
    """Return the directory of a tiny llama with the tokenizer, as mlx-lm saves it."""
    directory = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tokenizer_directory, directory)
    model = build_model()
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (directory / "config.json").write_text(json.dumps(llama_args(eos_token_id=2)))
    return directory


def set_sizes(monkeypatch, **sizes):
    """Change sizes of the pieces in which a CPU computes."""
    monkeypatch.setitem(SIZES, "cpu", SIZES["cpu"]._replace(**sizes))


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory):
    """Return a directory with prompt/completion rows of the tokenizer's words."""
    directory = tmp_path_factory.mktemp("data")
    animals, colours, numbers = ("cat", "dog", "bird"), ("red", "blue", "green"), ("one", "two", "three")
    rows = [
        {
            "prompt": f"what colour is the {animal} {number} ?",
            "completion": f"the {animal} is {colour}" + " is" * i,
        }
        for i, number in enumerate(numbers)
        for animal, colour in zip(animals, colours, strict=True)
    ]
    for name, part in (("train", rows), ("valid", rows[:4]), ("test", rows[4:7])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return directory
