"""A real fine-tuned model, SmolLM2-135M by scripts/demo.sh, in the programs that its user goes to.

In every comparison the adapter's own effect is at least 100 times the tolerance.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import generate
from mlx_lm.utils import load

from nalora_mlx.__main__ import main
from nalora_mlx.adapters import load_adapter
from tests.interop import llama_cpp

DEMO = Path(__file__).parents[2] / "demo"
MODEL, ADAPTER = DEMO / "model", DEMO / "adapters"
QUESTIONS = 5
ANSWER = 48  # tokens


@pytest.fixture(scope="module", autouse=True)
def _demo():
    if not all(
        (path / name).exists() for path, name in ((MODEL, "config.json"), (ADAPTER, "adapters.safetensors"))
    ):
        pytest.skip("needs the demo's model and adapter: bash scripts/demo.sh")
    weights = mx.load(str(MODEL / "model.safetensors"))
    if next(iter(weights.values())).dtype != mx.float32:
        pytest.skip("the tolerances are for float32, which the demo's model is on a CPU")


@pytest.fixture(scope="module")
def expected(_demo):
    """What mlx says: chats, tokens of each with the answer of base + adapter, both models' logits and answers."""
    rows = (Path(__file__).parents[2] / "examples" / "bakery" / "test.jsonl").read_text().splitlines()
    chats = [_messages(json.loads(row)) for row in rows[:QUESTIONS]]
    base, tokenizer = load(str(MODEL))
    tuned, _ = load(str(MODEL))
    load_adapter(tuned, ADAPTER)
    tuned.eval()
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats
    ]
    answers = {
        name: [generate(model, tokenizer, prompt, max_tokens=ANSWER) for prompt in prompts]
        for name, model in (("base", base), ("tuned", tuned))
    }
    ids = [
        list(prompt) + tokenizer.encode(answer, add_special_tokens=False)
        for prompt, answer in zip(prompts, answers["tuned"], strict=True)
    ]
    logits = {
        name: [np.array(model(mx.array([tokens]))[0]) for tokens in ids]
        for name, model in (("base", base), ("tuned", tuned))
    }
    assert all(b != t for b, t in zip(answers["base"], answers["tuned"], strict=True))
    return {"chats": chats, "ids": ids, "logits": logits, "answers": answers, "tokenizer": tokenizer}


def _messages(row):
    """The conversation of a row up to the answer."""
    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    return [message for message in messages if message["role"] != "assistant"]


@pytest.fixture(scope="module")
def files(_demo, tmp_path_factory):
    """Every export of the demo: name -> path."""
    pytest.importorskip("gguf", reason="needs gguf: pip install 'nalora-mlx[export]'")
    place = tmp_path_factory.mktemp("exports")

    def export(format, name, *flags, adapter=True):
        which = ["--adapter-path", str(ADAPTER)] if adapter else []
        where = ["--model", str(MODEL), "--output", str(place / name)]
        assert main(["export", format, *where, *which, *flags]) == 0
        return place / name

    found = {
        type: export("gguf", f"{type}.gguf", "--type", type) for type in ("f32", "f16", "q8_0", "q4_k_m")
    }
    found["base"] = export("gguf", "model.gguf", "--type", "f32", adapter=False)
    found["lora"] = export("gguf-lora", "lora.gguf")
    return found


@pytest.mark.parametrize(
    ("file", "lora", "tolerance"), [("f32", None, 1e-5), ("f16", None, 2e-3), ("base", "lora", 1e-5)]
)
def test_logits_of_llama_cpp(expected, files, file, lora, tolerance):
    llama_cpp.require()
    with llama_cpp.Llama(files[file], lora=files[lora] if lora else None, context=512) as llama:
        for ids, base, tuned in zip(expected["ids"], *expected["logits"].values(), strict=True):
            assert llama.tokenize(expected["tokenizer"].decode(ids)) == ids
            assert llama_cpp.relative_error(base, tuned) > 100 * tolerance
            assert llama_cpp.relative_error(llama.logits(ids), tuned) < tolerance


def chat(path, lora, chats):
    """Greedy answers of llama.cpp's server, which renders the chat template of the file itself."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_gpu_layers, params.n_ctx, params.n_parallel, params.warmup = 0, 1024, 1, False
    # One thread: more would wait for one another on a busy machine.
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


@pytest.mark.parametrize(("file", "lora"), [("f32", None), ("base", "lora")])
def test_greedy_chat_answers_are_the_same(expected, files, file, lora):
    llama_cpp.require()
    assert chat(files[file], files[lora] if lora else None, expected["chats"]) == expected["answers"]["tuned"]


@pytest.mark.parametrize("file", ["q8_0", "q4_k_m"])
def test_quantized_files_load_and_answer(expected, files, file):
    """Rounded weights may change a word; they are still the tuned model."""
    llama_cpp.require()
    answers = chat(files[file], None, expected["chats"])
    shared = [_shared_words(a, t) for a, t in zip(answers, expected["answers"]["tuned"], strict=True)]
    before = [_shared_words(b, t) for b, t in zip(*expected["answers"].values(), strict=True)]
    assert np.mean(shared) > 0.5 > np.mean(before)


def _shared_words(a, b):
    return len(set(a.split()) & set(b.split())) / max(1, len(set(a.split()) | set(b.split())))


def test_logits_of_transformers_and_peft(expected, tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch: see CONTRIBUTING.md")
    peft = pytest.importorskip("peft", reason="needs PEFT: see CONTRIBUTING.md")
    from transformers import AutoModelForCausalLM

    where = ["--model", str(MODEL), "--adapter-path", str(ADAPTER), "--output", str(tmp_path / "peft")]
    assert main(["export", "peft", *where]) == 0
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
    for ids, base, tuned in zip(expected["ids"], *expected["logits"].values(), strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0].numpy()
        assert np.abs(base - tuned).max() > 100 * 2e-4
        error = np.abs(theirs - tuned)
        # On the base alone the two libraries are up to 1.01e-4 apart: the last bits of float32 logits up to 58.
        assert np.quantile(error, 0.9999) < 1e-4
        assert error.max() < 2e-4
