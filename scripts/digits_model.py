"""Make the base model of the digits example: a small vision-language model that mlx-vlm loads.

    python scripts/digits_model.py [--language-model demo/model] [--output demo/digits/model]

The model has the architecture of SmolVLM. Its language tower is SmolLM2-135M-Instruct, unchanged. The rest is made from
pictures that are not in the example's data (see scripts/digits_data.py):

1. The vision tower learns to classify digits. The classification head is thrown away.
2. For each digit, gradient descent finds the embeddings of an image for which the language tower names the digit.
3. Ridge regression fits the projector, a linear map from the vision tower's output to these embeddings.

The result names the digit on one picture in words. It has not seen two pictures, sums, or numerals.
"""

import argparse
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from digits_data import enlarge, load_pictures
from mlx.utils import tree_flatten
from mlx_vlm.models import smolvlm

SEED = 0
SPECIAL_TOKENS = ("<fake_token_around_image>", "<image>", "<global-img>")  # what SmolVLM's processor writes
QUESTIONS = ("Which digit is this?", "Read the digit.")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """The size of the vision tower, and how it and the projector are trained."""

    image_size: int = 32
    patch_size: int = 8
    merged: int = 2  # patches per image token in each direction
    hidden_size: int = 96
    heads: int = 3
    layers: int = 2
    tower_epochs: int = 50
    tower_rate: float = 1e-3
    embedding_iters: int = 36
    embedding_rate: float = 1e-2
    copies: int = 3  # shifted copies of each picture that the projector is fitted to
    ridge: float = 1e-2

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size // self.merged) ** 2


def answer(digit: int) -> str:
    return f"The digit is {WORDS[digit]}."


# --- the files ----------------------------------------------------------------------------------------------


def model_config(language: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return config.json for a language tower with the given config.json of a Llama model."""
    keys = (
        *(
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "num_hidden_layers",
        ),
        *("rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings"),
    )
    vocabulary = language["vocab_size"]
    return {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "image_token_id": vocabulary + SPECIAL_TOKENS.index("<image>"),
        "eos_token_id": [language["eos_token_id"]],
        "scale_factor": recipe.merged,
        "text_config": {
            "model_type": "llama",
            "vocab_size": vocabulary + len(SPECIAL_TOKENS),
            **{key: language[key] for key in keys},
        },
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_size": recipe.hidden_size,
            "intermediate_size": 2 * recipe.hidden_size,
            "num_attention_heads": recipe.heads,
            "num_hidden_layers": recipe.layers,
            "image_size": recipe.image_size,
            "patch_size": recipe.patch_size,
        },
    }


def write_files(language_model: Path, output: Path, recipe: Recipe) -> None:
    """Write everything but the weights: config, tokenizer, chat template and settings of the processor."""
    language = read_json(language_model / "config.json")
    write_json(output / "config.json", model_config(language, recipe))
    tokenizer = read_json(language_model / "tokenizer.json")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [
        {"id": language["vocab_size"] + i, "content": token, **flags}
        for i, token in enumerate(SPECIAL_TOKENS)
    ]
    write_json(output / "tokenizer.json", tokenizer)
    shutil.copy(language_model / "tokenizer_config.json", output)
    (output / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    side = {"longest_edge": recipe.image_size}
    images = {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": side,
        "max_image_size": side,
        "do_image_splitting": False,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    write_json(output / "preprocessor_config.json", images)
    processor = {"processor_class": "SmolVLMProcessor", "image_seq_len": recipe.image_tokens}
    write_json(output / "processor_config.json", processor)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


# --- the model ----------------------------------------------------------------------------------------------


def build_model(config: dict[str, Any], weights: dict[str, mx.array], newline: int) -> smolvlm.Model:
    """Return the model with an untrained vision tower and projector.

    The vocabulary grows by the special tokens. The tower reads them as newlines and does not write them: their rows of
    the output head are the mean of the others, so that some other token is always more probable.

    Args:
        config: of the model.
        weights: of the language model.
        newline: token id of a newline.
    """
    mx.random.seed(SEED)
    parsed = smolvlm.ModelConfig.from_dict(config)
    parsed.text_config = smolvlm.TextConfig.from_dict(config["text_config"])
    parsed.vision_config = smolvlm.VisionConfig.from_dict(config["vision_config"])
    model = smolvlm.Model(parsed)
    tower = {name.removeprefix("model."): array for name, array in weights.items()}
    embedding, count = tower["embed_tokens.weight"], len(SPECIAL_TOKENS)
    head = tower.get("lm_head.weight", embedding)  # mlx-vlm's tower does not share it with the embedding
    tower["embed_tokens.weight"] = mx.concatenate([embedding, *[embedding[newline][None]] * count])
    tower["lm_head.weight"] = mx.concatenate([head, *[mx.mean(head, axis=0, keepdims=True)] * count])
    model.language_model.load_weights(list(tower.items()))
    return model


def processed(pictures: np.ndarray, side: int) -> np.ndarray:
    """Return pictures [N, 8, 8] as the processor makes them, [N, side, side, 3] with values from -1 to 1."""
    enlarged = enlarge(pictures, side).astype(np.float32) / 127.5 - 1
    return np.repeat(enlarged[..., None], 3, axis=-1)


def shift(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move each image [N, side, side, C] by up to two pixels."""
    side = images.shape[1]
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1)
    corners = rng.integers(0, 5, (len(images), 2))
    return np.stack([p[y : y + side, x : x + side] for p, (y, x) in zip(padded, corners, strict=True)])


# --- step 1: the vision tower -------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A vision tower with a classification head: images [N, H, W, 3] -> logits [N, 10]."""

    def __init__(self, tower: nn.Module, hidden_size: int):
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(hidden_size, 10)

    def __call__(self, images: mx.array) -> mx.array:
        return self.head(mx.mean(self.tower(images)[0], axis=1))


def train_tower(classifier: Classifier, images: np.ndarray, digits: np.ndarray, recipe: Recipe) -> None:
    """Train on shifted copies of images [N, side, side, 3]."""
    batch = min(32, len(images))
    rng = np.random.default_rng(SEED)
    iters = recipe.tower_epochs * (len(images) // batch)
    warmup = max(1, iters // 20)
    rise = optim.linear_schedule(0, recipe.tower_rate, warmup)
    rate = optim.join_schedules([rise, optim.cosine_decay(recipe.tower_rate, iters - warmup)], [warmup])
    optimizer = optim.AdamW(rate, weight_decay=0.05)
    state = [classifier.state, optimizer.state]

    def loss(x: mx.array, y: mx.array) -> mx.array:
        return mx.mean(nn.losses.cross_entropy(classifier(x), y))

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array, y: mx.array) -> mx.array:
        value, gradient = nn.value_and_grad(classifier, loss)(x, y)
        optimizer.update(classifier, gradient)
        return value

    for _ in range(recipe.tower_epochs):
        order = rng.permutation(len(images))[: len(images) // batch * batch]
        for rows in order.reshape(-1, batch):
            step(mx.array(shift(images[rows], rng)), mx.array(digits[rows]))
            mx.eval(state)


# --- steps 2 and 3: the projector ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """A question about one picture, with the answer for each digit.

    Attributes:
        tokens: prompts and answers without the last token; [10, L].
        image: position of the first image token.
        start: position whose next token is the first one of the answer.
        answers: token ids of the answers, with the end of the message; [10, A].
    """

    tokens: mx.array
    image: int
    start: int
    answers: mx.array


def make_prompts(processor: Any, question: str, image_token: int) -> Prompts:
    from PIL import Image

    tokenizer = processor.tokenizer
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    prompt = processor(text=[text], images=[Image.new("RGB", (8, 8))])["input_ids"][0].tolist()
    answers = [tokenizer.encode(f"{answer(d)}<|im_end|>", add_special_tokens=False) for d in range(10)]
    rows = [prompt + a[:-1] for a in answers]
    return Prompts(mx.array(rows), prompt.index(image_token), len(prompt) - 1, mx.array(answers))


def answer_logits(model: smolvlm.Model, prompts: Prompts, digits: mx.array, images: mx.array) -> mx.array:
    """Return the logits of the answers' tokens, [N, A, V], for embeddings of images, [N, T, D]."""
    tower = model.language_model
    embeddings = tower.embed_tokens(prompts.tokens[digits])
    end = prompts.image + images.shape[1]
    hidden = mx.concatenate([embeddings[:, : prompts.image], images, embeddings[:, end:]], axis=1)
    for layer in tower.layers:
        hidden = layer(hidden, "causal")
    return tower.lm_head(tower.norm(hidden[:, prompts.start :]))


def find_embeddings(
    model: smolvlm.Model, prompts: list[Prompts], names: mx.array, recipe: Recipe
) -> mx.array:
    """Return the embeddings of an image [10, T, D] that make the language tower answer for each digit.

    Args:
        model: only its language tower is used.
        prompts: questions that take turns.
        names: token ids of the digits' names, whose embeddings are where the search starts; [10].
        recipe: the number of iterations and the learning rate.
    """
    digits = mx.arange(10)
    found = {
        "embeddings": mx.repeat(model.language_model.embed_tokens(names)[:, None], recipe.image_tokens, 1)
    }
    rate = optim.cosine_decay(recipe.embedding_rate, recipe.embedding_iters, recipe.embedding_rate / 10)
    optimizer = optim.Adam(rate, bias_correction=True)

    def loss(embeddings: mx.array, question: Prompts) -> mx.array:
        logits = answer_logits(model, question, digits, embeddings)
        return mx.mean(nn.losses.cross_entropy(logits.astype(mx.float32), question.answers))

    for question in itertools.islice(itertools.cycle(prompts), recipe.embedding_iters):
        _, gradient = mx.value_and_grad(loss)(found["embeddings"], question)
        found = optimizer.apply_gradients({"embeddings": gradient}, found)
        mx.eval(found, optimizer.state)
    return found["embeddings"]


def tower_output(model: smolvlm.Model, images: np.ndarray) -> mx.array:
    """Return what the projector gets for images [N, side, side, 3]: [N, T, hidden_size * merged^2]."""
    connector = model.connector
    return connector.pixel_shuffle(model.vision_model(mx.array(images))[0], connector.scale_factor)


def fit_projector(
    model: smolvlm.Model, images: np.ndarray, digits: np.ndarray, embeddings: mx.array, ridge: float
) -> None:
    """Set the projector to the ridge regression from the tower's output to the digit's embeddings [10, T, D]."""
    outputs = np.array(tower_output(model, images), np.float64)
    x = outputs.reshape(-1, outputs.shape[-1])
    y = np.array(embeddings.astype(mx.float32), np.float64)[digits].reshape(len(x), -1)
    solution = np.linalg.solve(x.T @ x + ridge * len(x) * np.eye(x.shape[1]), x.T @ y)
    model.connector.modality_projection.proj.weight = mx.array(solution.T.astype(np.float32))


def share_named(
    model: smolvlm.Model, prompts: Prompts, images: np.ndarray, digits: np.ndarray, batch: int = 25
) -> float:
    """Return the share of images whose greedy answer is exactly right."""
    right = 0
    for i in range(0, len(images), batch):
        rows = mx.array(digits[i : i + batch])
        embeddings = model.connector.modality_projection(tower_output(model, images[i : i + batch]))
        best = mx.argmax(answer_logits(model, prompts, rows, embeddings), axis=-1)
        right += int(mx.sum(mx.all(best == prompts.answers[rows], axis=-1)))
    return right / len(images)


# --- all of it ----------------------------------------------------------------------------------------------


def make_model(
    language_model: Path, output: Path, recipe: Recipe, report: Callable[[str], None] = print
) -> None:
    """Make the model and write it to a directory that does not exist yet."""
    from mlx_vlm.utils import load_processor

    partial_output = output.with_name(output.name + ".part")
    shutil.rmtree(partial_output, ignore_errors=True)
    partial_output.mkdir(parents=True)
    write_files(language_model, partial_output, recipe)
    config = read_json(partial_output / "config.json")
    processor = load_processor(partial_output)
    weights = {
        k: v for path in sorted(language_model.glob("*.safetensors")) for k, v in mx.load(str(path)).items()
    }
    model = build_model(config, weights, processor.tokenizer.convert_tokens_to_ids("Ċ"))
    parts = {name: (processed(p, recipe.image_size), digits) for name, (p, digits) in load_pictures().items()}
    images, digits = parts["base"]
    unseen, unseen_digits = parts["valid"]
    start = time.perf_counter()

    def note(text: str) -> None:
        report(f"[{time.perf_counter() - start:.0f} s] {text}")

    classifier = Classifier(model.vision_model, recipe.hidden_size)
    train_tower(classifier, images, digits, recipe)
    predicted = np.array(mx.argmax(classifier(mx.array(unseen)), axis=-1))
    accuracy = np.mean(predicted == unseen_digits)
    report(f"vision tower: {accuracy:.0%} of {len(unseen)} unseen pictures classified correctly")

    prompts = [make_prompts(processor, question, config["image_token_id"]) for question in QUESTIONS]
    names = [processor.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in WORDS]
    embeddings = find_embeddings(model, prompts, mx.array(names), recipe)
    note("embeddings of the ten digits found")

    rng = np.random.default_rng(SEED)
    copies = np.concatenate([shift(images, rng) for _ in range(recipe.copies)])
    fit_projector(model, copies, np.tile(digits, recipe.copies), embeddings, recipe.ridge)
    for question, prompt in zip(QUESTIONS, prompts, strict=True):
        share = share_named(model, prompt, unseen, unseen_digits)
        report(
            f'projector: "{question}" is answered correctly for {share:.0%} of {len(unseen)} unseen pictures'
        )

    dtype = weights["model.embed_tokens.weight"].dtype
    saved = {name: array.astype(dtype) for name, array in tree_flatten(model.parameters())}
    mx.save_safetensors(str(partial_output / "model.safetensors"), saved, {"format": "mlx"})
    partial_output.rename(output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", type=Path, default=Path("demo/model"))
    parser.add_argument("--output", type=Path, default=Path("demo/digits/model"))
    args = parser.parse_args()
    if not (args.language_model / "config.json").exists():
        parser.error(f"{args.language_model} has no config.json; run bash scripts/demo.sh --model-only")
    if args.output.exists():
        parser.error(f"{args.output} exists; remove it to make the model again")
    make_model(args.language_model, args.output, Recipe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
