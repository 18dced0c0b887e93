"""Answers about images, of generate, chat, samples and finetune: those of mlx-vlm's own generation."""

import base64
import io
import json
import re
import shutil

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_sampler
from rich.console import Console
from transformers import AutoTokenizer

import nalora_mlx
from nalora_mlx.__main__ import main
from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.comparison import load_tuned
from nalora_mlx.adapters.files import adapter_config, adapter_weights
from nalora_mlx.chat.loop import Chat
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.report.missing_answers import add_answers
from nalora_mlx.report.run_data import read_runs
from nalora_mlx.runs.samples import read_samples
from tests.conftest import random_adapters
from tests.report.report_runs import write_run

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (pip install '.[vlm]')")

import mlx_vlm
from PIL import Image

from nalora_mlx.models.vision.conversation import VisionConversation
from nalora_mlx.models.vision.generation import stream_answer
from nalora_mlx.models.vision.loading import open_processor, open_vision_model
from nalora_mlx.vision_models import load_vision_model
from tests.vision.tiny_models import picture, save_model

QUESTION, SECOND = "What is it?", "And now?"
PROMPT = "<|im_start|>user:{}What is it?<end_of_utterance>\nAssistant:"
TOKENS = 8


def with_readable_answers(directory):
    """Make single letters of ASCII far more likely than all other tokens."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    likely = mx.array([len(text) == 1 and text.isascii() and text.isalnum() for text in texts])
    weights = mx.load(str(directory / "model.safetensors"))
    for name in weights:
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weights[name] = weights[name] * mx.where(likely, 2.0, 0.02)[:, None]
    mx.eval(weights)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return with_readable_answers(save_model("smolvlm", tmp_path_factory.mktemp("models") / "smolvlm"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    paths = [tmp_path_factory.mktemp("images") / f"image {i}.png" for i in range(3)]
    for seed, path in enumerate(paths):
        picture(16, 16, seed).save(path)
    return list(map(str, paths))


@pytest.fixture(scope="module")
def adapter(directory, tmp_path_factory):
    """A random adapter, which changes every answer."""
    output = tmp_path_factory.mktemp("run") / "adapters"
    output.mkdir()
    model, _ = open_vision_model(str(directory))
    adapt(model, NALoRAConfig(rank=4, scale=4.0))
    random_adapters(model, size=0.3)
    mx.save_safetensors(str(output / "adapters.safetensors"), adapter_weights(model))
    (output / "adapter_config.json").write_text(json.dumps(adapter_config(model)))
    return output


@pytest.fixture(scope="module")
def base(directory):
    return mlx_vlm.load(str(directory))


@pytest.fixture(scope="module")
def tuned(directory, adapter):
    return mlx_vlm.load(str(directory), adapter_path=str(adapter))


def truth(loaded, text, images=(), tokens=TOKENS):
    """Return mlx-vlm's answer."""
    answer = mlx_vlm.generate(*loaded, text, image=list(images) or None, max_tokens=tokens, temperature=0.0)
    return answer.text


def generate(capsys, *flags):
    status = main(["generate", *map(str, flags)])
    return status, *capsys.readouterr()


# --- generate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_adapter", [False, True])
def test_generate_answers_as_mlx_vlm_does(directory, adapter, base, tuned, images, capsys, with_adapter):
    given = ["--adapter-path", adapter] if with_adapter else []
    answers = []
    for chosen in ([], images[:1], images[1:2], images[1:]):
        flags = ["--model", directory, *given, "--prompt", QUESTION, "--max-tokens", TOKENS, "--verbose", "F"]
        _, out, _ = generate(capsys, *flags, *(["--image", *chosen] if chosen else []))
        expected = truth(tuned if with_adapter else base, PROMPT.format("<image>" * len(chosen)), chosen)
        assert out == expected + "\n"
        answers.append(out)
    assert len(set(answers)) > 2
    assert truth(tuned, PROMPT.format("")) != truth(base, PROMPT.format(""))


def test_sampling_flags_carry_over(directory, images, capsys):
    flags = ["--model", directory, "--image", images[0], "--prompt", QUESTION, "--verbose", "F", "-m", 16]

    def answer(*more):
        return generate(capsys, *flags, *more)[1]

    greedy = answer()
    assert answer("--temp", 1, "--seed", 1, "--top-k", 1) == greedy
    warm = answer("--temp", 3, "--seed", 1)
    assert warm == answer("--temp", 3, "--seed", 1)
    assert warm != greedy
    assert answer("--ignore-chat-template") != greedy
    assert answer("--extra-eos-token", greedy[0]) == "\n"


def test_the_beginning_of_the_answer_may_be_given(directory, base, images, capsys):
    flags = ["--model", directory, "--image", images[0], "--prompt", QUESTION, "-m", TOKENS]
    _, out, _ = generate(capsys, *flags, "--prefill-response", "It is", "--system-prompt", "Be brief.")
    text = "<|im_start|>system:Be brief.<end_of_utterance>\n" + PROMPT.format("<image>").removeprefix(
        "<|im_start|>"
    )
    assert f"==========\n{truth(base, text + 'It is', images[:1])}\n==========\nPrompt: " in out


def test_what_cannot_be_answered_is_refused_in_one_line(directory, model_directory, images, tmp_path, capsys):
    text = tmp_path / "text.png"
    text.write_text("no image")
    cases = [
        ([model_directory, "--image", images[0]], "--image: .*does not see images; use a vision-language"),
        ([directory, "--image", text], "--image: image .*text.png is not an image"),
        ([directory, "--image", tmp_path / "none.png"], "--image: image .*none.png does not exist"),
        (
            [directory, "--image", images[0], "--prompt", "<image>?"],
            "'<image>' 2 times, and there is 1 image;",
        ),
        ([directory, "--image", images[0], "--draft-model", model_directory], "--draft-model: .*remove it"),
    ]
    for flags, message in cases:
        status, out, err = generate(capsys, "--model", *flags)
        assert (status, out, len(err.splitlines())) == (2, "", 1)
        assert re.search(message, err), err


def test_what_was_read_before_does_not_matter(tmp_path, images):
    """Language models of Qwen keep the positions of their last prompt."""
    directory = save_model("qwen2_5_vl", tmp_path)
    (model, config), text = open_vision_model(str(directory)), "<|im_start|>user\n{}What?<|im_end|>\n"
    processor = open_processor(str(directory), config)
    model.eval()
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    prompts = [(text.format(""), []), (text.format(mark * 2), images[:2]), (text.format(mark), images[2:])]
    for prompt, chosen in [*prompts, *prompts]:
        *_, last = stream_answer(model, processor, prompt, chosen, max_tokens=TOKENS, temperature=0.0)
        expected = mlx_vlm.generate(
            *mlx_vlm.load(str(directory)), prompt, image=chosen or None, max_tokens=TOKENS, temperature=0.0
        )
        assert last.token == expected.token
        assert mx.allclose(last.logprobs, expected.logprobs, atol=1e-5)


# --- chat ---------------------------------------------------------------------------------------------------


def talk(directory, adapter, capsys, monkeypatch, *lines):
    """Pass lines to a chat; return its answers and notes."""
    remaining = iter(lines)
    monkeypatch.setattr("builtins.input", lambda _: next(remaining, "/quit"))
    model, processor = load_vision_model(str(directory), adapter, None, None)
    tuned = load_tuned(model, str(directory), adapter)
    conversations = [VisionConversation(each, processor, None) for each in (tuned, model)]
    chat = Chat(
        Console(highlight=False), *conversations, {"max_tokens": TOKENS, "sampler": make_sampler(0.0)}
    )
    chat.interactive = False
    chat.loop()
    out, err = capsys.readouterr()
    return out.splitlines(), [line for line in err.splitlines() if not line.startswith("cut at")]


def transcript(loaded, *turns):
    """Return mlx-vlm's answers to turns of a question and its images, each with all earlier ones as its history."""
    text, seen, answers = "<|im_start|>", [], []
    for question, chosen in turns:
        seen += chosen
        text += f"user:{'<image>' * len(chosen)}{question}<end_of_utterance>\n"
        answers.append(truth(loaded, f"{text}Assistant:", seen))
        text += f"Assistant:{answers[-1]}<end_of_utterance>\n"
    return answers


def test_images_stay_in_the_history(directory, adapter, tuned, base, images, capsys, monkeypatch):
    """Of the base model as well, which first answers what it has missed."""
    one, two, three = images
    lines = [
        f"/image {one}",
        QUESTION,
        SECOND,
        f"/image '{two}'",
        "/image " + three.replace(" ", "\\ "),
        QUESTION,
        "/compare",
        SECOND,
    ]
    out, err = talk(directory, adapter, capsys, monkeypatch, *lines)
    turns = [(QUESTION, [one]), (SECOND, []), (QUESTION, [two, three]), (SECOND, [])]
    expected, of_base = transcript(tuned, *turns), transcript(base, *turns)
    assert out == [*expected[:3], "base:", of_base[3], "tuned:", expected[3]]
    assert len({*expected, *of_base}) > 4
    assert err[0] == "the base model first answers your 3 earlier messages, unseen"


def test_another_image_is_not_taken_for_the_one_before(
    directory, adapter, tuned, images, capsys, monkeypatch
):
    """Their tokens are the same."""
    lines = [f"/image {images[0]}", QUESTION, "/reset", f"/image {images[1]}", SECOND, "/reset", QUESTION]
    out, _ = talk(directory, adapter, capsys, monkeypatch, *lines)
    second = PROMPT.replace(QUESTION, SECOND).format("<image>")
    one, other = (truth(tuned, second, [image]) for image in images[:2])
    assert one != other
    first, last = truth(tuned, PROMPT.format("<image>"), images[:1]), truth(tuned, PROMPT.format(""))
    assert out == [first, other, last]


def test_images_that_wait_are_listed_and_bad_ones_refused(
    directory, adapter, images, tmp_path, capsys, monkeypatch
):
    lines = ["/images", "/image", f"/image {tmp_path / 'none.png'}", f"/image {images[0]}", "/images"]
    out, err = talk(directory, adapter, capsys, monkeypatch, *lines, "/reset", "/images")
    assert out == []
    nothing = "no images for the next message; /image PATH adds one"
    assert err == [
        nothing,
        "/image needs the path of an image: /image PATH",
        f"/image: image {tmp_path / 'none.png'} does not exist; correct the path",
        f"with the next message: {images[0]} (16 x 16)",
        nothing,
    ]


# --- training -----------------------------------------------------------------------------------------------


def test_samples_of_a_run_and_answers_from_python(directory, images, tmp_path):
    rows = [
        {"prompt": QUESTION, "completion": letter, "images": [image]}
        for letter, image in zip("aab", images, strict=True)
    ]
    data = {"train": rows, "valid": [*rows[1:], {"prompt": SECOND, "completion": "c"}]}
    result = nalora_mlx.finetune(
        str(directory),
        data,
        tmp_path / "run",
        iters=6,
        batch_size=1,
        learning_rate=3e-2,
        progress=False,
        mask_prompt=True,
    )
    text = (tmp_path / "run" / "samples.json").read_text() + (tmp_path / "run" / "run.json").read_text()
    assert str(tmp_path) not in text
    assert not any(image in text for image in images)
    samples = result.samples
    assert [len(sample.get("images", ())) for sample in samples] == [1, 1, 0]
    base = mlx_vlm.load(str(directory))
    tuned = mlx_vlm.load(str(directory), adapter_path=str(tmp_path / "run"))
    cases = [
        (PROMPT.format("<image>"), images[1:2]),
        (PROMPT.format("<image>"), images[2:]),
        (PROMPT.format("").replace(QUESTION, SECOND), []),
    ]
    for sample, (prompt, chosen) in zip(samples, cases, strict=True):
        assert sample["before"] == truth(base, prompt, chosen, 96)
        assert sample["after"] == truth(tuned, prompt, chosen, 96)
        question = SECOND if not chosen else QUESTION
        assert result.generate(question, max_tokens=TOKENS, images=chosen) == truth(tuned, prompt, chosen)
    assert samples[0]["before"] != samples[0]["after"]
    shown = Image.open(io.BytesIO(base64.b64decode(samples[0]["images"][0].partition(",")[2])))
    assert shown.convert("RGB").tobytes() == Image.open(images[1]).tobytes()
    chat = [{"role": "user", "content": [{"type": "text", "text": QUESTION}, {"type": "image"}]}]
    prompt = PROMPT.format("").replace(QUESTION, f"{QUESTION}<image>")
    assert result.generate(chat, TOKENS, images=[Image.open(images[0])]) == truth(tuned, prompt, images[:1])
    with pytest.raises(nalora_mlx.InputError, match="0 times, and there is 1 image"):
        result.generate([{"role": "user", "content": "?"}], images=images[:1])
    assert result.model.training


def test_answers_can_be_added_to_a_run_but_for_those_about_images(directory, adapter, tuned, base, tmp_path):
    prompts = [
        {
            "messages": [{"role": "user", "content": [{"type": "image"}]}],
            "prompt": "(image)",
            "images": ["x"],
        },
        {"messages": [{"role": "user", "content": QUESTION}]},
    ]
    run = write_run(tmp_path / "run")
    for path in adapter.iterdir():
        shutil.copy(path, run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"samples": prompts[:1]}))
    with pytest.raises(nalora_mlx.InputError, match="its prompts have images, which a run does not keep"):
        add_answers(str(directory), read_runs([run]))
    (run / "run.json").write_text(json.dumps(record | {"samples": prompts}))
    notices = []
    add_answers(str(directory), read_runs([run]), notices.append)
    assert "run: 1 prompt with images left out; a run does not keep images" in notices
    (sample,) = read_samples(run)
    expected = [truth(loaded, PROMPT.format(""), tokens=96) for loaded in (base, tuned)]
    assert [sample["before"], sample["after"]] == expected
