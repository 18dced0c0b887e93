"""The models of the study: two small ones pretrained on text that comes with Python, and a cut of a large one.

    python scripts/study_models.py small-swiglu study-runs/small-swiglu
    python scripts/study_models.py small-geglu study-runs/small-geglu
    python scripts/study_models.py cut study-runs/smollm2-8 --model demo/model --layers 8

The small models (1.1 million parameters, 4 layers, of Llama's and of Gemma's form) learn the sources and the language
reference of the Python that runs this, minutes each on one core. The packages in HELD_OUT are left out: they are what
forgetting is measured on. A cut is the first layers of a model with its own head; its layers are trained on the same
text for a short time, so that they make sense without those that are gone.
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
LEFT_OUT = ("encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo")
VOCABULARY = 2048
LENGTH = 128  # tokens of a row
END = "<|end|>"

SIZE = {
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
SMALL = {"small-swiglu": "llama", "small-geglu": "gemma"}  # activations: SiLU, GELU


# --- text ---------------------------------------------------------------------------------------------------


def sources(held_out: bool) -> Iterator[tuple[Path, str]]:
    """Python's own modules, sorted by path: those of the held-out packages, or all others."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not set(parts).intersection(LEFT_OUT) and (parts[0] in HELD_OUT) == held_out:
            try:
                text = path.read_text(encoding="utf-8")
                ast.parse(text)
            except (UnicodeDecodeError, SyntaxError):
                continue
            yield path, text


def topics() -> list[str]:
    """The language reference as `help()` shows it, in English."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def rows_of(texts: list[str], tokenizer: Any, length: int) -> list[Example]:
    """Texts one after the other, cut into rows of `length` predicted tokens."""
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
    """A byte-level BPE tokenizer, trained and saved."""
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


def small(name: str, path: Path, iters: int, seed: int) -> None:
    """Pretrain a small model and save it as one of mlx-lm's."""
    import importlib

    texts = [text for _, text in sources(held_out=False)] + topics()
    tokenizer = make_tokenizer(texts, path)
    config = {"model_type": SMALL[name], **SIZE}
    module = importlib.import_module(f"mlx_lm.models.{SMALL[name]}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    pretrain(model, texts, tokenizer, iters, 4e-3, seed)
    save(model, config, path)


def cut(source: Path, layers: int, path: Path, iters: int, seed: int) -> None:
    """Keep a model's first layers, train them a little, and save the result."""
    from mlx_lm import load

    model, tokenizer = load(str(source))  # type: ignore[misc]
    model.model.layers = model.model.layers[:layers]
    model.freeze()
    for layer in model.layers:
        layer.unfreeze()
    texts = [text for _, text in sources(held_out=False)] + 8 * topics()  # English is what its tasks are in
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
    """Train what is not frozen on the next token, with the project's own trainer."""
    rows = rows_of(texts, tokenizer, LENGTH)
    print(f"{len(rows)} rows of {LENGTH} tokens", flush=True)
    warmup = iters // 20
    schedule = optim.join_schedules(
        [optim.linear_schedule(0, rate, warmup), optim.cosine_decay(rate, iters - warmup, rate / 20)],
        [warmup],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.05, bias_correction=True)

    def listen(event: dict[str, Any]) -> None:
        if event.get("split") == "train":
            print(f"{event['step']}: loss {event['loss']:.3f}", flush=True)

    config = TrainingConfig(batch_size=16, iters=iters, steps_per_report=100, grad_clip=1.0, seed=seed)
    train(model, rows, config=config, optimizer=optimizer, listeners=[listen])


def save(model: nn.Module, config: dict[str, Any], path: Path) -> None:
    """Write weights and config.json."""
    from mlx_lm.utils import save_config, save_model

    save_model(path, model)
    save_config(config, path / "config.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=(*SMALL, "cut"))
    parser.add_argument("path", type=Path, help="directory of the new model")
    parser.add_argument("--iters", type=int, help="batches of 16 rows (default: 800, 150 for a cut)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="what to cut")
    parser.add_argument("--layers", type=int, default=8, help="layers that a cut keeps (default: 8)")
    args = parser.parse_args()
    if (args.path / "config.json").exists():
        parser.error(f"{args.path} holds a model already; remove it or name another directory")
    if args.kind == "cut":
        if args.model is None:
            parser.error("cut needs --model")
        cut(args.model, args.layers, args.path, args.iters or 150, args.seed)
    else:
        small(args.kind, args.path, args.iters or 800, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
