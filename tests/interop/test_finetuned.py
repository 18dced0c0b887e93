"""A fine-tuned SmolLM2-135M in llama.cpp and transformers + PEFT.

Model and adapter come from scripts/demo.sh. Without a full run of the demo, a short run trains an adapter. In every
comparison the adapter's effect is at least 100 times the tolerance.
"""

import json
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import generate
from mlx_lm.utils import load

from nalora_mlx.__main__ import main
from nalora_mlx.adapters.files import load_adapter
from tests.interop import llama_cpp
from tests.logit_comparison import close

ROOT = Path(__file__).parents[2]
MODEL, DEMO = ROOT / "demo" / "model", ROOT / "demo" / "adapters"
EXAMPLE = ROOT / "examples" / "bakery"
LAYERS = 12  # in the example's config; the small demo trains fewer and changes too few answers
SHORT = ("--num-layers", "6", "--batch-size", "2", "--iters", "16", "--val-batches", "1")
QUESTIONS = 3
ANSWER = 48  # tokens
TOLERANCE = 5e-4  # of float64 logits in two libraries


@pytest.fixture(scope="module", autouse=True)
def _model():
    if not MODEL.exists():
        pytest.skip("no SmolLM2: scripts/test.sh and scripts/demo.sh download it")
    weights = mx.load(str(MODEL / "model.safetensors"))
    if next(iter(weights.values())).dtype != mx.float32:
        pytest.skip("the tolerances are for float32, the demo model's dtype on a CPU")


@pytest.fixture(scope="module")
def adapter(_model, tmp_path_factory):
    """Return the directory of a trained adapter."""
    config = DEMO / "adapter_config.json"
    if config.exists() and json.loads(config.read_text())["num_layers"] == LAYERS:
        return DEMO
    made = tmp_path_factory.mktemp("trained") / "adapters"
    where = ["--model", str(MODEL), "--data", str(EXAMPLE), "--adapter-path", str(made)]
    assert main(["lora", "--config", str(EXAMPLE / "config.yaml"), *where, *SHORT]) == 0
    return made


@pytest.fixture(scope="module")
def expected(adapter):
    """Return chats, their tokens with the answer of base + adapter, and logits and answers of both models in mlx."""
    rows = (EXAMPLE / "test.jsonl").read_text().splitlines()
    chats = [_messages(json.loads(row)) for row in rows[:QUESTIONS]]
    base, tokenizer = load(str(MODEL))
    tuned, _ = load(str(MODEL))
    load_adapter(tuned, adapter)
    tuned.eval()
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats
    ]
    answers = {
        name: [generate(model, tokenizer, prompt, max_tokens=ANSWER) for prompt in prompts]
        for name, model in (("base", base), ("tuned", tuned))
    }
    assert all(b != t for b, t in zip(answers["base"], answers["tuned"], strict=True))
    ids = [
        list(prompt) + tokenizer.encode(answer, add_special_tokens=False)
        for prompt, answer in zip(prompts, answers["tuned"], strict=True)
    ]
    logits = {
        name: [np.array(model(mx.array([tokens]))[0]) for tokens in ids]
        for name, model in (("base", base), ("tuned", tuned))
    }
    return {"chats": chats, "ids": ids, "logits": logits, "answers": answers, "tokenizer": tokenizer}


def _messages(row):
    """Return the conversation of a row without the answer."""
    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    return [message for message in messages if message["role"] != "assistant"]


@pytest.fixture(scope="module")
def exported(adapter, tmp_path_factory):
    """Return a function that exports a file once: a type of the tuned model, "base", or "lora"."""
    pytest.importorskip("gguf", reason="needs gguf: pip install 'nalora-mlx[export]'")
    directory = tmp_path_factory.mktemp("exports")

    @cache
    def export(file):
        path = directory / f"{file}.gguf"
        command = ["export", "gguf-lora" if file == "lora" else "gguf", "--model", str(MODEL)]
        if file != "base":
            command += ["--adapter-path", str(adapter)]
        if file != "lora":
            command += ["--type", "f32" if file == "base" else file]
        assert main([*command, "--output", str(path)]) == 0
        return path

    return export


@pytest.mark.parametrize(
    ("file", "lora", "tolerance"),
    [
        ("f32", None, 1e-5),
        pytest.param("f16", None, 2e-3, marks=pytest.mark.slow),
        ("base", "lora", 1e-5),
    ],
)
def test_llama_cpp_gives_the_same_logits(expected, exported, file, lora, tolerance):
    llama_cpp.require()
    with llama_cpp.Llama(exported(file), loras={exported(lora): 1.0} if lora else None, context=512) as llama:
        for ids, base, tuned in zip(expected["ids"], *expected["logits"].values(), strict=True):
            assert llama.tokenize(expected["tokenizer"].decode(ids)) == ids
            close(llama.logits(ids), tuned, base, tolerance)


def chat(path, lora, chats):
    """Return greedy answers of llama.cpp's server, which renders the file's chat template itself."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_gpu_layers, params.n_ctx, params.n_parallel, params.warmup = 0, 1024, 1, False
    # Several threads would wait for each other on a busy machine.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)
    answers = []
    for messages in chats:
        request = {"messages": messages, "max_tokens": ANSWER, "temperature": 0.0}
        reply = server.handle_chat_completions(request)
        answers.append(reply["choices"][0]["message"]["content"])
    return answers


@pytest.mark.parametrize(
    ("file", "lora"), [("f32", None), pytest.param("base", "lora", marks=pytest.mark.slow)]
)
def test_llama_cpp_gives_the_same_greedy_answers(expected, exported, file, lora):
    llama_cpp.require()
    assert (
        chat(exported(file), exported(lora) if lora else None, expected["chats"])
        == expected["answers"]["tuned"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("file", ["q8_0", "q4_k_m"])
def test_quantized_files_answer_like_the_tuned_model(expected, exported, file):
    """Rounding may change words, but the answers stay closer to the tuned model's than the base's are."""
    llama_cpp.require()
    answers = chat(exported(file), None, expected["chats"])
    shared = [_shared_words(a, t) for a, t in zip(answers, expected["answers"]["tuned"], strict=True)]
    before = [_shared_words(b, t) for b, t in zip(*expected["answers"].values(), strict=True)]
    assert np.mean(shared) > 0.5 > np.mean(before)


def _shared_words(a, b):
    return len(set(a.split()) & set(b.split())) / max(1, len(set(a.split()) | set(b.split())))


def test_peft_gives_the_same_logits(adapter, tmp_path, monkeypatch):
    """Compare in float64, because float32 logits, which reach 58, differ from it by up to 1.5e-4 in either library.

    mlx's exponential and both libraries' rotary angles stay float32, so their rounding remains. The texts are answers
    of the data: a model that repeats itself amplifies it to 6e-3.
    """
    torch = pytest.importorskip("torch", reason="needs PyTorch: see CONTRIBUTING.md")
    peft = pytest.importorskip("peft", reason="needs PEFT: see CONTRIBUTING.md")
    from transformers import AutoModelForCausalLM

    where = ["--model", str(MODEL), "--adapter-path", str(adapter), "--output", str(tmp_path / "peft")]
    assert main(["export", "peft", *where]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").to(torch.float64)
    ours, tokenizer = load(str(MODEL))
    base, _ = load(str(MODEL))
    load_adapter(ours, adapter)
    ours.eval()
    ours.set_dtype(mx.float64)
    base.set_dtype(mx.float64)
    monkeypatch.setattr(nn.RMSNorm, "__call__", _norm)
    for row in (EXAMPLE / "test.jsonl").read_text().splitlines()[:2]:
        content = json.loads(row)
        answer = {"role": "assistant", "content": content["completion"]}
        tokens = tokenizer.apply_chat_template([*_messages(content), answer], return_dict=False)
        with torch.no_grad():
            given = theirs(torch.tensor([tokens])).logits[0].numpy()
        wanted = np.array(ours(mx.array([tokens]))[0])
        assert given.dtype == wanted.dtype == np.float64
        assert np.abs(wanted - np.array(base(mx.array([tokens]))[0])).max() > 100 * TOLERANCE
        np.testing.assert_allclose(given, wanted, rtol=0, atol=TOLERANCE)


def _norm(self, x):
    """Compute RMSNorm in the dtype of x; mlx's own computes in float32."""
    return self.weight * x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + self.eps)
