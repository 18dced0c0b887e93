"""Sample answers at the end of training: the same few prompts, answered by the base and by the tuned model."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx_lm import stream_generate

from nalora_mlx.adapters.comparison import without_adapters
from nalora_mlx.core.errors import first_line
from nalora_mlx.models.conversation import render_prompt
from nalora_mlx.models.vision.generation import plain_text, render_chat, stream_answer
from nalora_mlx.models.vision.processor import VisionProcessor
from nalora_mlx.runs.samples import REFERENCES, saved_prompt, write_samples_file
from nalora_mlx.training.distributed import workers

SHARE = 0.05  # of the time of training, for all answers together,
LEAST_SECONDS, MOST_SECONDS = 20.0, 60.0  # within these bounds
FIRST_SHARE = 0.5  # of that time, for the first answer
TUNED_SHARE = 2.0  # time for an answer of the tuned model, compared with one of the base model
SHORTEST_LIMIT, LONGEST_LIMIT = 96, 256  # tokens of an answer
MARGIN = 32  # tokens beyond the longest expected answer
PREFILL = 32  # tokens of a prompt between two looks at the clock


class _Answer(NamedTuple):
    text: str
    complete: bool


class _CutError(Exception):
    """The time for an answer is over, or a stop was requested."""


def write_samples(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Mapping[str, Any]],
    output: Path,
    notify: Callable[[str], None],
    trained: float = 0.0,
    stop: Callable[[], bool] = lambda: False,
    processor: VisionProcessor | None = None,
) -> list[dict[str, Any]]:
    """Answer prompts with the tuned model and without its adapters, and write samples.json. Never fails a run.

    Decoding is greedy. The model stays as it was. After full fine-tuning there is no base model to ask. Only the
    first of several workers answers.

    Args:
        model: the tuned model.
        tokenizer: its tokenizer, which renders chats as in training.
        prompts: see `runs.samples.choose_prompts`.
        output: the run's directory.
        notify: called with a notice if there are no answers.
        trained: seconds that training took. The answers take at most a twentieth of them, or 20 s if that is more,
            and never more than 60 s.
        stop: returns whether to leave without writing anything.
        processor: of a vision-language model; None for a model of mlx-lm, which is not asked about images.

    Returns:
        The samples, as `runs.samples.read_samples` returns them; none if something went wrong.
    """
    if processor is None:
        prompts = [prompt for prompt in prompts if REFERENCES not in prompt]
    if workers().rank or not prompts:
        return []
    training, seconds = model.training, min(max(SHARE * trained, LEAST_SECONDS), MOST_SECONDS)
    try:
        model.eval()
        generator = _Generator(model, tokenizer, processor)
        samples, limit = _answer_all(generator, prompts, seconds, stop)
        if stop():
            return []
        if not samples:
            notify(f"no sample answers: the model is too slow to answer within {seconds:.0f} s")
            return []
        write_samples_file(output, samples, limit)
    except Exception as error:
        notify(f"no sample answers were kept: {first_line(error)}")
        return []
    finally:
        model.train(training)
    return samples


class _Generator(NamedTuple):
    """A model, its tokenizer, and its processor if it sees images."""

    model: nn.Module
    tokenizer: Any
    processor: VisionProcessor | None

    def __call__(
        self, prompt: Mapping[str, Any], limit: int, check: Callable[..., None]
    ) -> Generator[Any, None, None]:
        """Yield the responses to a prompt, of up to `limit` tokens; `check` raises if there is no more time."""
        tokenizer, processor = self.tokenizer, self.processor
        messages, arguments = prompt.get("messages"), prompt.get("chat_template_kwargs", {})
        tools, source = prompt.get("tools"), prompt["source"]
        if processor is not None:
            text = (
                plain_text(tokenizer, prompt["text"])
                if messages is None
                else render_chat(processor, messages, source, tools, arguments)
            )
            images = prompt.get(REFERENCES, ())
            return stream_answer(
                self.model, processor, text, images, source, max_tokens=limit, temperature=0.0
            )
        return stream_generate(
            self.model,
            tokenizer,
            prompt["text"] if messages is None else render_prompt(tokenizer, messages, tools, arguments),
            max_tokens=limit,
            prefill_step_size=PREFILL,
            prompt_progress_callback=check,
        )


def _answer_all(
    generator: _Generator,
    prompts: Sequence[Mapping[str, Any]],
    seconds: float,
    stop: Callable[[], bool],
) -> tuple[list[dict[str, Any]], int]:
    """Return the samples and the limit of an answer in tokens.

    1. Answer the first prompt with the tuned model, in at most half of the time. If that is too short for one token,
       there are no samples.
    2. Keep as many prompts as there will be time for at this speed.
    3. Divide the remaining time among the other answers. What one does not need is for those after it.
    """
    model, tokenizer, _ = generator
    expected = [len(tokenizer.encode(prompt["expected"] or "")) for prompt in prompts]
    limit = min(max(max(expected) + MARGIN, SHORTEST_LIMIT), LONGEST_LIMIT)
    has_base = any("lora_a" in module for _, module in model.named_modules())
    began = time.monotonic()

    def ask(prompt: Mapping[str, Any], share: float) -> _Answer | None:
        now = time.monotonic()
        deadline = now + (began + seconds - now) * share
        return _answer(generator, prompt, limit, lambda: stop() or time.monotonic() > deadline)

    after = [ask(prompts[0], FIRST_SHARE)]
    if after[0] is None:
        return [], limit
    for_one = (1 + has_base / TUNED_SHARE) * (time.monotonic() - began)
    prompts = prompts[: max(int(seconds / for_one), 1)]
    for done in range(1, len(prompts)):
        left = (len(prompts) - done) * TUNED_SHARE + len(prompts) * has_base
        after.append(ask(prompts[done], TUNED_SHARE / left))
    before: list[_Answer | None] = [None] * len(prompts)
    if has_base:
        with without_adapters(model):
            before = [ask(prompt, 1 / (len(prompts) - done)) for done, prompt in enumerate(prompts)]
    return [
        {
            **saved_prompt(prompt),
            "before": None if base is None else base.text,
            "before_complete": base is not None and base.complete,
            "after": tuned.text,
            "complete": tuned.complete,
        }
        for prompt, base, tuned in zip(prompts, before, after, strict=True)
        if tuned is not None
    ], limit


def _answer(
    generator: _Generator, prompt: Mapping[str, Any], limit: int, is_over: Callable[[], bool]
) -> _Answer | None:
    """Return the greedy answer to a prompt as far as there is time for it; None if there is not even for a token."""
    text, complete = "", False

    def check(*_: int) -> None:
        if is_over():
            raise _CutError

    responses = generator(prompt, limit, check)
    try:
        with closing(responses):  # it sets MLX's stream and wired limit as long as it is open
            for response in responses:
                text += response.text
                complete = response.finish_reason == "stop"
                if response.finish_reason is None:
                    check()
    except _CutError:
        return _Answer(text.strip(), False) if text else None
    return _Answer(text.strip(), complete)
