"""What a merged model keeps of its adapter: distributions of the next token, compared on a few prompts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

# Of several kinds, so that some are near whatever an adapter was trained for.
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in one sentence how a bicycle stays upright.",
    "Write a Python function that reverses a list.",
    "Translate into German: I would like two loaves of bread, please.",
    "List three things to pack for a rainy day.",
    "Hello! Can you help me with an order for Friday at nine?",
    "If a train covers 120 km in 90 minutes, how fast is it?",
)
ANSWER = 16  # tokens of the answer to each
MOST = 0.5  # a merge that loses more than this share of the effect is not worth writing


@dataclass(frozen=True)
class Text:
    """A prompt and the adapted model's answer: token ids, of which the first `prompt` are the prompt's."""

    tokens: list[int]
    prompt: int


@dataclass(frozen=True)
class MergeQuality:
    """How far models are from base + adapter (p): mean over positions of KL(p || q) in nats, and equal first choices.

    `loss` and `agreement` are those of the merged model, `effect` and `base_agreement` those of the base alone.
    """

    loss: float
    agreement: float
    effect: float
    base_agreement: float
    positions: int

    @property
    def mostly_lost(self) -> bool:
        """Whether the merge loses most of what the adapter does; never where that cannot be measured."""
        return self.effect > 1e-9 and self.loss > MOST * self.effect

    def __str__(self) -> str:
        if self.effect <= 1e-9:
            return (
                f"the adapter has no measurable effect on {self.positions} tokens of {len(PROMPTS)} prompts"
            )
        return (
            f"KL divergence from base with adapter: {self.loss:.2g} (the base alone: {self.effect:.2g}), same first "
            f"choice {self.agreement:.1%} (the base alone: {self.base_agreement:.1%}), over {self.positions} tokens"
        )


def answer(model: nn.Module, tokenizer: Any) -> list[Text]:
    """Answer each prompt greedily: text on which the effect of an adapter shows."""
    from mlx_lm.generate import generate_step

    texts = []
    for prompt in PROMPTS:
        tokens = _render(tokenizer, prompt)
        new: list[int] = []
        for token, _ in generate_step(mx.array(tokens), model, max_tokens=ANSWER):
            new.append(int(token))
            if new[-1] in tokenizer.eos_token_ids:
                break
        texts.append(Text(tokens + new, len(tokens)))
    return texts


def _render(tokenizer: Any, prompt: str) -> list[int]:
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        try:
            return list(
                tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            )
        except Exception:  # a template that wants more than a message: plain text shows the effect too
            pass
    return list(tokenizer.encode(prompt))


def log_probabilities(model: nn.Module, texts: list[Text]) -> list[mx.array]:
    """Log-probabilities of the next token where the answer is, float32 [answer, vocabulary] for each text."""
    found = []
    for text in texts:
        logits = model(mx.array([text.tokens]))[0, text.prompt - 1 : -1].astype(mx.float32)
        found.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(found[-1])
    return found


@dataclass(frozen=True)
class Reference:
    """Base + adapter and the base alone, on texts: what a merged model is held against."""

    texts: list[Text]
    tuned: list[mx.array]
    base: list[mx.array]

    def compare(self, fused: nn.Module) -> MergeQuality:
        """Measure what a merged model keeps."""
        loss, agreement = _distance(self.tuned, log_probabilities(fused, self.texts))
        effect, base_agreement = _distance(self.tuned, self.base)
        return MergeQuality(loss, agreement, effect, base_agreement, sum(len(p) for p in self.tuned))


def take_reference(model: nn.Module, tokenizer: Any) -> Reference:
    """Run an adapted model, with its adapters and without."""
    texts = answer(model, tokenizer)
    tuned = log_probabilities(model, texts)
    with without_adapters(model):
        return Reference(texts, tuned, log_probabilities(model, texts))


def _distance(tuned: list[mx.array], other: list[mx.array]) -> tuple[float, float]:
    pairs = list(zip(tuned, other, strict=True))
    divergence = mx.concatenate([(mx.exp(p) * (p - q)).sum(axis=-1) for p, q in pairs]).mean()
    same = mx.concatenate([p.argmax(axis=-1) == q.argmax(axis=-1) for p, q in pairs]).mean()
    return float(mx.maximum(divergence, 0)), float(same)  # rounding can make nothing a little less


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Make an adapted model the base alone for a while, in place."""
    adapted = [(path, module) for path, module in model.named_modules() if "lora_a" in module]
    bases = [(path, module.get("linear", module.get("embedding"))) for path, module in adapted]
    model.update_modules(tree_unflatten(bases))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(adapted))
