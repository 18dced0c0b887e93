"""Make the models of the study: two small pretrained ones, and the first layers of a larger one.

    python scripts/study_models.py small-swiglu study-runs/small-swiglu
    python scripts/study_models.py small-geglu study-runs/small-geglu
    python scripts/study_models.py cut study-runs/smollm2-8 --model demo/model --layers 8

The small models have 1.1 million parameters in 4 layers, with the architecture of Llama or Gemma. They are pretrained
on the source code and the language reference of the running Python, which takes minutes on one core. The packages in
HELD_OUT are excluded, because forgetting is measured on them.

"cut" keeps the first layers and the output head of a model. Its layers are trained briefly on the same text to make up
for the removed layers.
"""

import argparse
import ast
import json
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from nalora_mlx import TrainingConfig, train
from nalora_mlx.data.tokenization import Example

HELD_OUT = ("asyncio", "email", "json", "logging", "unittest", "xml")
EXCLUDED = ("encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo")
VOCABULARY = 2048
LENGTH = 128  # tokens per row
END = "<|end|>"

SMALL_CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
}
SMALL_MODELS = {"small-swiglu": "llama", "small-geglu": "gemma"}  # model types, with SiLU and GELU


# --- text ---------------------------------------------------------------------------------------------------


def python_sources(held_out: bool) -> Iterator[tuple[Path, str]]:
    """Yield the path and text of standard library modules: those in held-out packages, or all others."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not set(parts).intersection(EXCLUDED) and (parts[0] in HELD_OUT) == held_out:
            try:
                text = path.read_text(encoding="utf-8")
                ast.parse(text)
            except (UnicodeDecodeError, SyntaxError):
                continue
            yield path, text


def language_reference() -> list[str]:
    """Return the chapters of the language reference, in English, as `help()` shows them."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def split_into_rows(texts: list[str], tokenizer: Any, length: int) -> list[Example]:
    """Concatenate tokenized texts and cut them into rows of `length` predicted tokens."""
    tokens: list[int] = []
    for text in texts:
        tokens += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    count = (len(tokens) - 1) // length
    supervised = np.arange(length + 1) > 0
    return [
        Example(np.array(tokens[i * length : (i + 1) * length + 1], np.int32), supervised, f"row {i}")
        for i in range(count)
    ]


# --- models -------------------------------------------------------------------------------------------------


def make_tokenizer(texts: list[str], path: Path) -> Any:
    """Train a byte-level BPE tokenizer and save it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)
    tokenizer.save_pretrained(path)
    return tokenizer


def make_small_model(name: str, path: Path, iters: int, seed: int) -> None:
    """Pretrain a small model and save it in mlx-lm's format."""
    import importlib

    texts = [text for _, text in python_sources(held_out=False)] + language_reference()
    tokenizer = make_tokenizer(texts, path)
    config = {"model_type": SMALL_MODELS[name], **SMALL_CONFIG}
    module = importlib.import_module(f"mlx_lm.models.{SMALL_MODELS[name]}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    pretrain(model, texts, tokenizer, iters, 4e-3, seed)
    save(model, config, path)


def cut_model(source: Path, layers: int, path: Path, iters: int, seed: int) -> None:
    """Keep the first layers of a model, train them briefly, and save the result."""
    from mlx_lm import load

    model, tokenizer = load(str(source))  # type: ignore[misc]
    model.model.layers = model.model.layers[:layers]
    model.freeze()
    for layer in model.layers:
        layer.unfreeze()
    # Repeat the language reference, because the tasks are in English.
    texts = [text for _, text in python_sources(held_out=False)] + 8 * language_reference()
    pretrain(model, texts, tokenizer, iters, 3e-4, seed)
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = layers
    path.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*token*"):
        shutil.copy(file, path)
    for file in ("merges.txt", "vocab.json", "chat_template.jinja"):
        if (source / file).exists():
            shutil.copy(source / file, path)
    save(model, config, path)


def pretrain(model: nn.Module, texts: list[str], tokenizer: Any, iters: int, rate: float, seed: int) -> None:
    """Train the parameters that are not frozen on next-token prediction."""
    rows = split_into_rows(texts, tokenizer, LENGTH)
    print(f"{len(rows)} rows of {LENGTH} tokens", flush=True)
    warmup = iters // 20
    schedule = optim.join_schedules(
        [optim.linear_schedule(0, rate, warmup), optim.cosine_decay(rate, iters - warmup, rate / 20)],
        [warmup],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.05, bias_correction=True)

    def listen(event: dict[str, Any]) -> None:
        if event.get("split") == "train":
            print(f"step {event['step']}: loss {event['loss']:.3f}", flush=True)

    config = TrainingConfig(batch_size=16, iters=iters, steps_per_report=100, grad_clip=1.0, seed=seed)
    train(model, rows, config=config, optimizer=optimizer, listeners=[listen])


def save(model: nn.Module, config: dict[str, Any], path: Path) -> None:
    """Write the weights and config.json."""
    from mlx_lm.utils import save_config, save_model

    save_model(path, model)
    save_config(config, path / "config.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=(*SMALL_MODELS, "cut"))
    parser.add_argument("path", type=Path, help="directory to write the model to")
    parser.add_argument("--iters", type=int, help="batches of 16 rows (default: 800, or 150 for cut)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="directory of the model to cut")
    parser.add_argument("--layers", type=int, default=8, help="number of layers to keep for cut (default: 8)")
    args = parser.parse_args()
    if (args.path / "config.json").exists():
        parser.error(f"{args.path} already contains a model; remove it or choose another directory")
    if args.kind == "cut":
        if args.model is None:
            parser.error("cut needs --model")
        cut_model(args.model, args.layers, args.path, args.iters or 150, args.seed)
    else:
        make_small_model(args.kind, args.path, args.iters or 800, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
