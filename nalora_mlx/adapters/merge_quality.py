"""How much of an adapter's effect a merged model keeps, measured on next-token distributions.

1. Base + adapter answers a few prompts greedily.
2. At each position of the answers, the next-token distributions of base + adapter (p) are compared with those of the
   merged model and of the base alone (q): KL(p || q), and whether both rank the same token first.
"""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nalora_mlx.adapters.comparison import without_adapters
from nalora_mlx.core.errors import RunError
from nalora_mlx.models.conversation import greedy_answer, render_prompt
from nalora_mlx.models.vision.model import is_vision_language_model

# Of several kinds, so that some are close to what an adapter was trained for.
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
ANSWER_TOKENS = 16  # per prompt
MAX_LOST = 0.5  # share of the adapter's effect; a merge that loses more is rejected
# Nats. A smaller divergence is rounding that no answer shows. In SmolLM2-135M, merged weights in bfloat16 cause 3e-5,
# in 8 bits 1e-3 at most, and in 4 bits 1.5e-2 at least, for effects of an adapter from 5e-6 to 4.
NEGLIGIBLE = 2e-3
LIKE = 0.95  # share of equal first choices from which answers are called alike


@dataclass(frozen=True)
class Sample:
    """A prompt and the adapted model's answer, as token ids; the first `prompt_length` are the prompt."""

    tokens: list[int]
    prompt_length: int


@dataclass(frozen=True)
class MergeQuality:
    """How far models are from base + adapter.

    Attributes:
        loss: mean KL(base + adapter || merged model) over positions, in nats.
        agreement: share of positions where the merged model ranks the same token first.
        effect: as `loss`, for the base alone.
        base_agreement: as `agreement`, for the base alone.
        positions: number of positions compared.
    """

    loss: float
    agreement: float
    effect: float
    base_agreement: float
    positions: int

    @property
    def mostly_lost(self) -> bool:
        """Whether the merge noticeably loses most of the adapter's effect. NaN counts as lost."""
        return not (math.isfinite(self.loss) and self.loss <= max(NEGLIGIBLE, MAX_LOST * self.effect))

    @property
    def small_effect(self) -> bool:
        """Whether the adapter hardly changes these answers, so that they say little about the merge."""
        return self.effect <= NEGLIGIBLE

    @property
    def verdict(self) -> str:
        """What the merged model is like, in a sentence."""
        same = f"{_percent(self.agreement)} same first choice"
        if self.mostly_lost:
            return f"the merged model loses most of the adapter's effect: {same}"
        return f"the merged model answers {'' if self.agreement >= LIKE else 'mostly '}like base + adapter: {same}"

    @property
    def basis(self) -> str:
        """What the verdict is based on."""
        return (
            f"over {self.positions} tokens in answers to {len(PROMPTS)} general questions; the base alone: "
            f"{_percent(self.base_agreement)}"
        )

    @property
    def numbers(self) -> str:
        """The divergences, for the model card."""
        return (
            f"KL divergence from base + adapter {self.loss:.2g} nats (base alone: {self.effect:.2g}), "
            f"{_percent(self.agreement)} same first choice ({self.basis})"
        )


def _percent(share: float) -> str:
    """Return a share in percent, rounded down, so that only all are 100%."""
    return f"{math.floor(1000 * share) / 10:g}%"


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of base + adapter and of the base alone, to compare a merged model with."""

    samples: list[Sample]
    tuned: list[mx.array]
    base: list[mx.array]

    def compare(self, merged: nn.Module) -> MergeQuality:
        """Measure how much of the adapter's effect a merged model keeps."""
        loss, agreement = _distance(self.tuned, log_probabilities(merged, self.samples))
        effect, base_agreement = _distance(self.tuned, self.base)
        return MergeQuality(loss, agreement, effect, base_agreement, sum(len(p) for p in self.tuned))


def take_reference(model: nn.Module, tokenizer: Any) -> Reference:
    """Run an adapted model on the prompts, with its adapters and without."""
    samples = []
    for text in PROMPTS:
        prompt = _encode(tokenizer, text)
        if is_vision_language_model(model):
            answer = _continue_without_cache(model, tokenizer, prompt)
        else:
            answer = greedy_answer(model, tokenizer, prompt, ANSWER_TOKENS).tokens
        samples.append(Sample(prompt + answer, len(prompt)))
    tuned = log_probabilities(model, samples)
    with without_adapters(model):
        return Reference(samples, tuned, log_probabilities(model, samples))


def _continue_without_cache(model: nn.Module, tokenizer: Any, prompt: list[int]) -> list[int]:
    """Return a greedy answer of a model of mlx-vlm, whose caches mlx-lm's generation does not know."""
    answer: list[int] = []
    while len(answer) < ANSWER_TOKENS and not set(answer) & set(tokenizer.eos_token_ids):
        answer.append(int(model(mx.array([prompt + answer]))[0, -1].argmax().item()))
    return answer


def _encode(tokenizer: Any, text: str) -> list[int]:
    if tokenizer.has_chat_template:
        try:
            return render_prompt(tokenizer, [{"role": "user", "content": text}])
        except Exception:  # the template needs more than one message; plain text shows the effect too
            pass
    return list(tokenizer.encode(text))


def log_probabilities(model: nn.Module, samples: list[Sample]) -> list[mx.array]:
    """Return next-token log-probabilities over each answer: float32 [answer tokens, vocabulary] per sample.

    Raises:
        RunError: a logit is NaN, or all logits of a position are infinite.
    """
    found = []
    for sample in samples:
        logits = model(mx.array([sample.tokens]))[0, sample.prompt_length - 1 : -1].astype(mx.float32)
        found.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        if mx.isnan(found[-1]).any().item():
            raise RunError(
                "the model computes NaN for a prompt, so that its answers before and after the merge cannot be "
                "compared; activations may overflow in float16: use a bfloat16 or float32 base"
            )
    return found


def _distance(tuned: list[mx.array], other: list[mx.array]) -> tuple[float, float]:
    """Return the mean KL divergence and the share of equal top tokens, over all positions."""
    pairs = list(zip(tuned, other, strict=True))
    # Some models give logits of -inf to unused tokens. A token of probability 0 adds nothing.
    terms = [mx.where(mx.isneginf(p), 0, mx.exp(p) * (p - q)) for p, q in pairs]
    divergence = mx.concatenate([term.sum(axis=-1) for term in terms]).mean()
    same = mx.concatenate([p.argmax(axis=-1) == q.argmax(axis=-1) for p, q in pairs]).mean()
    return float(mx.maximum(divergence, 0)), float(same)  # rounding can make zero slightly negative
