"""Greedy answers to many prompts, generated in batches by mlx-lm.

Prompts of different lengths share a batch, and an answer that ends makes room for the next prompt. A batch costs little
more time than a single answer, since generation mostly reads weights. What all prompts begin with, such as a system
message, is read once.

mlx-lm pads the shorter prompts of a batch. Some of its models then answer differently: their states run through the
padding, or all rows get the position of one. `choose_batching` finds what a model does exactly, by a comparison.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import stream_generate
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache

from nalora_mlx.core.errors import first_line
from nalora_mlx.models.tolerances import PACKED_ROWS, relative_error
from nalora_mlx.ops.device_sizes import device_kind
from nalora_mlx.serve.stop_words import AnswerText

BATCH_SIZES = {"cpu": 16, "metal": 32, "cuda": 32}  # answers at a time, by kind of device
BATCH_TOKENS = 2**15  # of prompts and answers in a batch; 4 GB of keys and values for Llama 3.1 8B
PROMPTS_TOGETHER = 8  # prompts that are read at a time
PREFILL_TOKENS = 2048  # of a prompt that are read at a time, as in mlx-lm
PREFIX_TOKENS = 16  # from which on a common beginning of the prompts is read once
# A comparison has prompts with a common beginning, and answers of these lengths, three at a time. The last prompt joins
# when the first answer ends.
PROBE_PREFIX = 4
PROBE = ((24, 2), (2, 4), (5, 4), (12, 2))


class GeneratedAnswer(NamedTuple):
    """An answer to one prompt.

    Attributes:
        text: without the end token, and up to the first stop word.
        complete: whether it ended by itself, with an end token or a stop word; False if it was cut.
        tokens: number of tokens that were generated, without the end token.
    """

    text: str
    complete: bool
    tokens: int


class Batching(NamedTuple):
    """How a model answers many prompts.

    Attributes:
        answers: whether answers are generated in batches.
        prompts: whether prompts are read in batches, too.
        notice: what users should know about it; None if there is nothing.
    """

    answers: bool = True
    prompts: bool = True
    notice: str | None = None


def choose_batching(model: nn.Module) -> Batching:
    """Return how a model answers many prompts as it answers each of them alone, as fast as it can."""
    if batching_error(model) is None:
        return Batching()
    if (error := batching_error(model, prompts=False)) is None:
        return Batching(prompts=False)
    return Batching(False, False, f"answers are generated one at a time: {error}")


def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_tokens: int | Sequence[int],
    batch_size: int | None = None,
    stop_words: Sequence[Sequence[str]] | None = None,
    on_answer: Callable[[int], None] | None = None,
    batching: Batching | None = None,
) -> list[GeneratedAnswer]:
    """Generate greedy answers, in the order of the prompts.

    They are those of mlx-lm's `stream_generate`. Rounding depends on the size of a batch, so an answer may differ where
    two tokens are nearly as likely; in half precision, that is not rare.

    Args:
        model: in evaluation mode, unless its dropout should act.
        tokenizer: its tokenizer, in mlx-lm's wrapper.
        prompts: token ids; no prompt is empty.
        max_tokens: maximum length of the answers, of all or of each; at least 1.
        batch_size: answers at a time; None for the default of the device.
        stop_words: of each prompt; its answer ends before the first of them. Empty words do not count.
        on_answer: called after each answer, with the number of answers that are done.
        batching: how the model answers many prompts, if known; None to find out.

    Raises:
        ValueError: a prompt is empty, a number is less than 1, or numbers or stop words do not fit the prompts.
    """
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    words = [()] * len(prompts) if stop_words is None else list(stop_words)
    if not len(prompts) == len(limits) == len(words):
        raise ValueError(
            f"{len(prompts)} prompts have {len(limits)} values of max_tokens and {len(words)} lists of stop words"
        )
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty")
    if batch_size is None:
        batch_size = BATCH_SIZES[device_kind()]
    if min(batch_size, *limits, 1) < 1:
        raise ValueError("batch_size and max_tokens must be at least 1")
    if batch_size == 1 or len(prompts) <= 1:
        batching = Batching(False, False)
    elif batching is None:
        batching = choose_batching(model)

    answers = [_Answer(tokenizer, found) for found in words]
    done = 0
    lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    for indices, size in _batches(lengths, batch_size if batching.answers else 1):
        chosen = [(prompts[i], limits[i], answers[i]) for i in indices]
        if batching.answers:
            ends = _answer_together(model, chosen, size, PROMPTS_TOGETHER if batching.prompts else 1)
        else:
            ends = _answer_alone(model, tokenizer, chosen)
        with closing(ends):
            for _ in ends:
                done += 1
                if on_answer is not None:
                    on_answer(done)
    return [answer.finish() for answer in answers]


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Yield the indices of prompts that are answered in one go, and how many of them at a time.

    The longest come first, so that neighbours need little padding and short ones fill the last gaps. Prompts that are
    too long for a full batch are answered in smaller ones.

    Args:
        lengths: tokens of each prompt and of its longest answer.
        batch_size: answers at a time, at most.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, min(batch_size, BATCH_TOKENS // lengths[order[0]]))
        count = len(order) if size == batch_size else size
        yield order[:count], size
        order = order[count:]


class _Answer:
    """One answer while it is generated. It decides when it ends, as mlx-lm's `StopSequences` and their matchers do."""

    def __init__(self, tokenizer: Any, stop_words: Sequence[str]):
        self._tokenizer = tokenizer
        self._stop_words = [word for word in stop_words if word]
        self._text, self._tokens, self._complete = "", 0, False

    def matcher(self) -> "_Answer":
        """Start the answer. mlx-lm calls this when it has read the prompt."""
        self._detokenizer = self._tokenizer.detokenizer
        self._up_to_stop = AnswerText(self._detokenizer, self._stop_words) if self._stop_words else None
        return self

    def advance(self, token: int) -> bool:
        """Add a token; return whether the answer ends with it."""
        if token in self._tokenizer.eos_token_ids:
            self._complete = True
            return True
        self._tokens += 1
        if self._up_to_stop is not None:
            self._text += self._up_to_stop.add(token)
            self._complete = self._up_to_stop.ended
        else:
            self._detokenizer.add_token(token)
            self._text += self._detokenizer.last_segment
        return self._complete

    def finish(self) -> GeneratedAnswer:
        """Return the answer, after its last token."""
        if self._up_to_stop is None:
            self._detokenizer.finalize()
            self._text += self._detokenizer.last_segment
        elif not self._up_to_stop.ended:
            self._text += self._up_to_stop.finish()
            self._complete |= self._up_to_stop.ended
        return GeneratedAnswer(self._text, self._complete, self._tokens)


def _answer_together(
    model: nn.Module, chosen: list[tuple[list[int], int, _Answer]], size: int, prompts_together: int
) -> Generator[None, None, None]:
    """Generate answers in batches; yield after each."""
    prompts, limits, answers = map(list, zip(*chosen, strict=True))
    prefix = _common_prefix(prompts)
    if len(prefix) < PREFIX_TOKENS:
        prefix = []
    for response in _responses(model, prompts, prefix, limits, size, prompts_together, answers):
        if response.finish_reason is not None:
            yield


def _common_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """Return the tokens that all prompts begin with, without the last token of the shortest prompt."""
    first, last = min(prompts), max(prompts)  # they differ first
    longest = min(map(len, prompts)) - 1
    return first[: next((i for i in range(longest) if first[i] != last[i]), longest)]


def _responses(
    model: nn.Module,
    prompts: Sequence[list[int]],
    prefix: list[int],
    limits: list[int],
    size: int,
    prompts_together: int,
    answers: list[_Answer] | None = None,
) -> Generator[Any, None, None]:
    """Yield mlx-lm's responses, one for each token; the `uid` of a response is the index of its prompt.

    Args:
        model: the model.
        prompts: token ids.
        prefix: what all prompts begin with, to be read once.
        limits: the maximum length of each answer.
        size: answers at a time.
        prompts_together: prompts that are read at a time.
        answers: what decides when an answer ends; None for the limits alone.
    """
    caches = None
    if prefix:
        cache = make_prompt_cache(model)
        for start in range(0, len(prefix), PREFILL_TOKENS):
            model(mx.array([prefix[start : start + PREFILL_TOKENS]]), cache=cache)
            mx.eval([part.state for part in cache])
        caches = [cache] * len(prompts)  # each batch copies from it
    generator = BatchGenerator(
        model, completion_batch_size=size, prefill_batch_size=min(size, prompts_together)
    )
    with closing(generator):  # resets the limit of wired memory
        generator.insert(
            [prompt[len(prefix) :] for prompt in prompts], limits, caches, stop_sequences=answers
        )
        while responses := generator.next_generated():
            yield from responses


def _answer_alone(
    model: nn.Module, tokenizer: Any, chosen: list[tuple[list[int], int, _Answer]]
) -> Generator[None, None, None]:
    """Generate answers one at a time; yield after each."""
    for prompt, limit, answer in chosen:
        answer.matcher()
        with closing(stream_generate(model, tokenizer, prompt, max_tokens=limit)) as responses:
            for response in responses:
                if answer.advance(response.token):
                    break
        yield


# --- what a model can do ------------------------------------------------------------------------------------


def batching_error(model: nn.Module, prompts: bool = True) -> str | None:
    """Return why this model cannot answer prompts in batches; None if it can.

    Compares short answers to prompts of different lengths in a batch with the same answers alone. The result does not
    cover what only long prompts change.

    Args:
        model: any model of mlx-lm.
        prompts: whether prompts are read in batches, too.
    """
    if any(_chooses_keys(cache) for cache in make_prompt_cache(model)):
        # Such as MiniMax M3, whose blocks of keys would begin in the padding. A short comparison cannot show it.
        return "its layers choose the keys that they attend to"
    training = model.training
    model.eval()
    try:
        # Several draws, since rounding alone may send a token to other experts.
        agree = any(_answers_agree(model, prompts, seed) for seed in range(3))
    except Exception as error:
        return f"its forward does not take batches of different lengths ({first_line(error)})"
    finally:
        model.train(training)
    return None if agree else "an answer changes when another prompt is answered with it"


def _chooses_keys(cache: Any) -> bool:
    """Return whether a layer has more than one cache of keys. The others belong to an indexer."""
    return isinstance(cache, CacheList) and sum(not isinstance(one, ArraysCache) for one in cache.caches) > 1


def _answers_agree(model: nn.Module, prompts: bool, seed: int) -> bool:
    """Return whether the probabilities of random prompts' answers are the same in a batch and alone."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(1, 32, PROBE_PREFIX).tolist()
    texts = [prefix + rng.integers(1, 32, length).tolist() for length, _ in PROBE]
    limits = [limit for _, limit in PROBE]
    found: list[list[tuple[int, mx.array]]] = [[] for _ in PROBE]
    with closing(_responses(model, texts, prefix, limits, 3, 3 if prompts else 1)) as responses:
        for response in responses:
            found[response.uid].append((response.token, response.logprobs))
    together = mx.stack([logprobs for answer in found for _, logprobs in answer])
    alone = mx.concatenate(
        [
            _logprobs_alone(model, text, [token for token, _ in answer])
            for text, answer in zip(texts, found, strict=True)
        ]
    )
    return relative_error(together, alone) <= PACKED_ROWS.for_dtype(together.dtype)


def _logprobs_alone(model: nn.Module, prompt: list[int], answer: list[int]) -> mx.array:
    """Return the log probabilities [N, V] from which the tokens of an answer are chosen, computed one at a time."""
    cache = make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=cache)
    rows = []
    for token in (prompt[-1], *answer[:-1]):
        logits = model(mx.array([[token]]), cache=cache)[:, -1]
        rows.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(rows)
    return mx.concatenate(rows)
