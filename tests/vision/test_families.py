"""Each family of vision-language models against unmodified mlx-vlm: tokens, logits, gradients, adapters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (pip install '.[vlm]')")

from mlx_vlm.generate import stream_generate
from mlx_vlm.models.cache import make_prompt_cache
from mlx_vlm.trainer.peft.utils import apply_lora_layers
from mlx_vlm.utils import load_model, load_processor, prepare_inputs

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.files import adapter_config, adapter_files, adapter_weights
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.data.batches import collate
from nalora_mlx.data.chats.chat_encoder import ChatEncoder
from nalora_mlx.data.rows.formats import Row
from nalora_mlx.data.tokenization import tokenize_rows
from nalora_mlx.models.vision.features import ImageEncoder
from nalora_mlx.models.vision.generation import model_inputs, render_chat, stream_answer
from nalora_mlx.models.vision.loading import open_processor, open_vision_model
from nalora_mlx.models.vision.model import differentiable_assignments
from nalora_mlx.training.loss import batch_arrays, media_arrays
from nalora_mlx.training.step import TrainingStep
from tests.vision.tiny_models import FAMILIES, IMAGE, START, picture, save_model

TOLERANCE = 1e-5  # of the largest entry, in float32
OFF = {"mask": "off", "step_scaling": False, "selection_limit": 0.0}


@dataclass
class Case:
    """A family's tiny model: ours, unmodified mlx-vlm's, and rows of data."""

    name: str
    directory: Path
    model: Any
    processor: Any
    reference: Any
    reference_processor: Any
    rows: list[Row]
    examples: list[Any]

    @property
    def reads_prompts_at_once(self):
        return self.name.startswith("paligemma")

    def media_rows(self, directory, model=None, trained=False):
        return ImageEncoder(model or self.model, self.processor, directory, trained).attach(self.examples)

    def rendered(self, messages, **settings):
        """Return a chat as the tokenizer of transformers renders it, with a placeholder for each image."""
        if self.name == "llava":  # its template takes lists
            messages = in_lists(messages)
        return self.reference_processor.tokenizer.apply_chat_template(messages, tokenize=False, **settings)


def in_lists(messages):
    return [
        m
        | {
            "content": [{"type": "text", "text": m["content"]}]
            if isinstance(m["content"], str)
            else m["content"]
        }
        for m in messages
    ]


def ask(*images, text="What is here?"):
    return {"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": text}]}


def answer(text):
    return {"role": "assistant", "content": text}


def build_rows(family):
    """Return rows with images of different sizes, two if the family takes two, and a row of text alone."""
    wide, tall, large = picture(24, 16, 1), picture(16, 28, 2), picture(40, 40, 3)
    rows = [
        Row("x:1", [ask(wide), answer("A dog.")], images=(wide,)),
        Row("x:2", [{"role": "user", "content": "Say hello!"}, answer("Hello")]),
    ]
    if family.images == 1:
        return [*rows, Row("x:3", [ask(tall, text="Why?"), answer("It is tall")], images=(tall,))]
    chat = [ask(tall, large, text="Both?"), answer("Yes"), ask(wide, text="And now?"), answer("No, one more")]
    return [*rows, Row("x:3", chat, images=(tall, large, wide))]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return build_case(request.param, tmp_path_factory.mktemp(request.param))


def build_case(name, directory):
    save_model(name, directory)
    model, config = open_vision_model(str(directory))
    processor = open_processor(str(directory), config)
    reference, reference_processor = load_model(directory), load_processor(directory, eos_token_ids=1)
    reference_processor.tokenizer.chat_template = processor.tokenizer.chat_template
    if name == "llava":  # mlx-vlm passes `padding` to its image processor, which transformers refuses
        process = reference_processor.image_processor
        reference_processor.image_processor = lambda images, padding, **settings: process(images, **settings)
    rows = build_rows(FAMILIES[name])
    split = tokenize_rows(rows, ChatEncoder(processor.tokenizer, True, images=processor), 1000)
    assert not split.errors
    model.eval()
    reference.eval()
    return Case(name, directory, model, processor, reference, reference_processor, rows, split.sequences)


# --- what mlx-vlm does --------------------------------------------------------------------------------------


def processed(case, row):
    """Return what mlx-vlm's own processor makes of a whole chat: token ids, and all its outputs."""
    text, completion = case.rendered(row.messages), ""
    if not row.images:
        ids = case.reference_processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.array(ids), {}
    if case.reads_prompts_at_once:  # its processor takes a prompt, and adds what the template writes
        text, completion = text.replace(START, "").split("\n")
        completion = case.reference_processor.tokenizer(completion, add_special_tokens=False)["input_ids"]
    starts = text.startswith(START)
    given = prepare_inputs(case.reference_processor, images=list(row.images), prompts=[text])
    ids = np.array(given.pop("input_ids"))[0]
    if ids[0] == 2 and (not starts or ids[1] == 2):
        ids = ids[1:]  # it adds one even if the template has written it
    return np.array([*ids, *completion]), {name: value for name, value in given.items() if value is not None}


def embed(case, model, row, length):
    """Return mlx-vlm's embeddings of the first tokens of a row, and the other arguments of its language model."""
    ids, given = processed(case, row)
    ids = mx.array(ids[None, :length])
    pixels, mask = given.pop("pixel_values", None), mx.ones_like(ids)
    given.pop("attention_mask", None)
    if "mm_token_type_ids" in given:
        given["mm_token_type_ids"] = given["mm_token_type_ids"][:, -len(processed(case, row)[0]) :][
            :, :length
        ]
    for name in ("_position_ids", "_rope_deltas"):
        if hasattr(model.language_model, name):
            setattr(model.language_model, name, None)
    output = model.get_input_embeddings(ids, pixels, mask=mask, **given)
    others = {name: value for name, value in output.to_dict().items() if value is not None}
    return ids, others.pop("inputs_embeds"), given | others


def generation_logits(case, row, prompt, length):
    """Return mlx-vlm's logits as it generates: the prompt in one pass, then token by token; [L, V]."""
    ids, _ = processed(case, row)
    ids = ids[:length]
    language_model = case.reference.language_model
    cache = make_prompt_cache(language_model)
    inputs, embeddings, arguments = embed(case, case.reference, row, prompt)
    logits = [language_model(inputs, inputs_embeds=embeddings, cache=cache, **arguments).logits[0]]
    for token in ids[prompt:]:
        logits.append(language_model(mx.array([[int(token)]]), cache=cache).logits[0])
    return np.array(mx.concatenate(logits))


@differentiable_assignments()
def teacher_forced_loss(case, model):
    """Return the summed cross entropy of all answers, each row in one pass of mlx-vlm's own modules."""
    total = mx.array(0.0)
    for row, example in zip(case.rows, case.examples, strict=True):
        length = len(example.tokens) - 1
        inputs, embeddings, arguments = embed(case, model, row, length)
        if case.reads_prompts_at_once:
            order = np.arange(length)
            sees = (order[:, None] >= order) | (order < np.argmax(example.loss_mask))
            arguments["mask"] = mx.array(sees[None, None])
        logits = model.language_model(inputs, inputs_embeds=embeddings, **arguments).logits[0]
        losses = nn.losses.cross_entropy(logits, mx.array(example.tokens[1:]))
        total = total + mx.sum(losses * mx.array(example.loss_mask[1:]))
    return total


# --- tests --------------------------------------------------------------------------------------------------


def assert_close(found, expected, tolerance=TOLERANCE):
    found, expected = np.array(found, np.float64), np.array(expected, np.float64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_tokens_are_the_processors_own(case):
    for row, example in zip(case.rows, case.examples, strict=True):
        own = processed(case, row)[0].tolist()
        assert example.tokens.tolist() == own[: len(example.tokens)]
        assert not case.processor.tokenizer.decode(own[len(example.tokens) :]).strip()
        text = case.processor.tokenizer.decode(example.tokens[example.loss_mask].tolist())
        answers = [m["content"] for m in row.messages if m["role"] == "assistant"]
        parts = [text.index(answer) for answer in answers]
        assert parts == sorted(parts)
        assert not set(text.split()) & {"What", "Both?", "now?", "Say", "Why?"}
        assert not (example.tokens[example.loss_mask] == IMAGE).any()
        assert example.images == row.images
    pictures = [example for example in case.examples if example.images]
    assert len({int((example.tokens == IMAGE).sum()) for example in pictures}) == len(pictures) or (
        case.name in ("llava", "paligemma", "paligemma2")
    )


@pytest.mark.parametrize("trained", [False, True], ids=["features", "pixels"])
def test_logits_are_those_of_generation(case, trained, tmp_path):
    """A batch of right-padded rows gives what mlx-vlm computes for each row by itself, with its cache."""
    examples = case.media_rows(tmp_path, trained=trained)
    batch = collate(examples, range(len(examples))).with_media()
    assert ("inputs" in batch.media) is trained
    found = case.model(mx.array(batch.inputs), media=media_arrays(batch.media))
    blind = case.model(mx.array(batch.inputs))
    for i, (row, example) in enumerate(zip(case.rows, examples, strict=True)):
        answer_start = len(example.tokens) - int(np.argmin(example.loss_mask[::-1]))
        expected = generation_logits(case, row, answer_start, len(example.tokens))
        start = answer_start - 1 if case.reads_prompts_at_once else 0
        rows = slice(start, len(example.tokens) - 1)
        assert_close(found[i, rows], expected[rows])
        if row.images:
            assert np.abs(np.array(blind[i, rows]) - expected[rows]).max() > 0.01
    assert bool((tmp_path / "image_features").exists()) is not trained


def adapted(case, strength=0.02, **settings):
    """Return a copy of our model with adapters that matter."""
    model, _ = open_vision_model(str(case.directory))
    mx.random.seed(0)
    result = adapt(model, NALoRAConfig(num_layers=-1, rank=2, **settings))
    generator = np.random.default_rng(1)
    for path, array in adapter_weights(model).items():
        if path.endswith("lora_b"):
            module = model
            for name in path.split(".")[:-1]:
                module = module[int(name)] if isinstance(module, list) else module[name]
            module.lora_b = mx.array(generator.normal(0, strength, array.shape), array.dtype)
    return model, result


def saved(model, directory):
    """Save an adapter."""
    directory.mkdir()
    for name, write in adapter_files(model, adapter_config(model)).items():
        write(directory / name)
    return directory


@pytest.mark.parametrize("vision", [False, True], ids=["language", "towers"])
def test_gradients_are_those_of_mlx_vlm(case, vision, tmp_path):
    """Loss and gradients of a step, compiled if the towers are frozen, equal plain autodiff of unmodified mlx-vlm."""
    model, result = adapted(case, vision=vision, **OFF)
    reference = apply_lora_layers(load_model(case.directory), saved(model, tmp_path / "adapter"))
    expected_loss, expected = nn.value_and_grad(reference, lambda: teacher_forced_loss(case, reference))()
    expected = dict(tree_flatten(expected))
    before = {path: np.array(array) for path, array in adapter_weights(model).items()}
    examples = case.media_rows(tmp_path, model, trained=vision)
    batch = collate(examples, range(len(examples))).with_media()
    step = TrainingStep(model, optim.SGD(1.0), result.config)
    assert step.compiled is not vision
    loss, _ = step(batch, 1, None, True)
    mx.eval(loss, step.state)
    assert_close(loss, expected_loss)
    assert before.keys() == expected.keys()
    assert any(path.startswith("language_model.") for path in before)
    assert any(not path.startswith("language_model.") for path in before) is vision
    after = adapter_weights(model)
    norms = {path: np.linalg.norm(gradient) for path, gradient in expected.items()}
    errors = {
        path: np.linalg.norm(before[path] - np.array(after[path]) - np.array(gradient))
        for path, gradient in expected.items()
    }
    whole = np.linalg.norm(list(norms.values()))
    assert np.linalg.norm(list(errors.values())) <= TOLERANCE * whole
    assert not [path for path in norms if errors[path] > 5 * TOLERANCE * max(norms[path], 0.01 * whole)]
    assert_close(
        step.loss.evaluate(batch_arrays(batch))[0],
        teacher_forced_loss(case, updated(reference, after)),
        1e-4,
    )


def updated(model, weights):
    model.load_weights(list(weights.items()), strict=False)
    return model


def test_towers_add_to_the_adapters_of_the_language_model(case):
    """With the towers, the same modules of the language model are adapted, and NA-LoRA acts on the same MLPs."""
    alone, both = adapted(case)[1], adapted(case, vision=True)[1]
    for found in (lambda r: r.plain, lambda r: [gated.path for gated in r.gated]):
        assert set(found(alone)) == {path for path in found(both) if path.startswith("language_model.")}
    towers = [path for path in both.plain if not path.startswith("language_model.")]
    assert len(towers) >= 4
    if case.name in ("qwen2_5_vl", "pixtral", "mistral3"):
        assert len(both.gated) == len(alone.gated) + 2
        assert not both.notices
    else:
        assert "acts on the language model only" in both.notices[0]
    reasons = {skipped.reason for skipped in both.skipped}
    assert reasons == (
        {"stays plain LoRA: its projections are ClippableLinear layers"} if case.name == "gemma4" else set()
    )


def test_recurrences_have_training_forms(case, monkeypatch, tmp_path):
    """Qwen3.5 trains with the chunked form of its gated delta rule, not with mlx-vlm's own."""
    from mlx_vlm.models.qwen3_5 import gated_delta

    model, result = adapted(case)
    step = TrainingStep(model, optim.SGD(1.0), result.config)
    patches = [patch.name for patch in step.loss.training_forms.patches]
    expected = ["mlx_vlm.models.qwen3_5.language.gated_delta_update"] if case.name == "qwen3_5" else []
    assert patches == expected
    assert not step.loss.notices()
    monkeypatch.setattr(gated_delta, "_compute_g_beta", None)  # the original fails
    examples = case.media_rows(tmp_path, model)
    step(collate(examples, range(len(examples))).with_media(), 1, None, True)


def test_answers_start_from_the_tokens_of_training(case):
    """Our generation reads the beginning of a training row: one START, no other text around a prompt."""
    row, example = case.rows[0], case.examples[0]
    text = render_chat(case.processor, row.messages[:1], "a question")
    given = model_inputs(case.processor, text, row.images, "a question")
    ids = np.array(given["input_ids"])[0]
    assert ids.tolist() == example.tokens[: len(ids)].tolist()
    assert len(ids) == np.argmax(example.loss_mask)
    if "mm_token_type_ids" in given:
        assert np.array(given["mm_token_type_ids"])[0].tolist() == (ids == IMAGE).astype(int).tolist()
    tokens = [r.token for r in stream_answer(case.model, case.processor, text, row.images, max_tokens=4)]
    logits = generation_logits(case, row, len(ids), len(ids))
    assert tokens[0] == logits[-1].argmax()


def test_adapters_give_the_same_answers_in_mlx_vlm(case, tmp_path):
    """mlx-vlm loads our adapter, and generates what our adapted model generates."""
    model, _ = adapted(case, 0.5, vision=True)
    reference = apply_lora_layers(load_model(case.directory), saved(model, tmp_path / "adapter"))
    row = case.rows[0]
    prompt = case.rendered(row.messages[:1], add_generation_prompt=True)
    if case.reads_prompts_at_once:
        prompt = prompt.replace(START, "").removesuffix("\n")
    answers = []
    for one in (model, reference, case.reference):
        one.eval()
        given = prepare_inputs(case.reference_processor, images=list(row.images), prompts=[prompt])
        given["mask"] = given.pop("attention_mask")
        given["logit_bias"] = {1: -1000}  # no end
        responses = stream_generate(one, case.reference_processor, prompt, max_tokens=12, **given)
        answers.append([response.token for response in responses])
    assert answers[0] == answers[1] != answers[2]
