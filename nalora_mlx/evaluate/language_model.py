"""A model of mlx-lm as a language model of EleutherAI's lm_eval: it scores texts and generates answers for tasks.

Imports lm_eval, so `evaluate.tasks` imports this module only when tasks run. Texts become tokens as in mlx_lm.evaluate:
the prompt's tokens are those of the context, and scored are the tokens that the continuation adds. Scores differ from
mlx_lm.evaluate only where it goes wrong:

- An empty context gives -inf there unless the tokenizer adds BOS. Here the first token follows BOS, or EOS without it.
- Text without a context (`loglikelihood_rolling`) loses its first token there, again without BOS. Here each token is
  scored once, and a text that is longer than the model's context is scored in windows, as lm_eval documents it.
- Where the prompt's last token and the continuation merge into other tokens, they are scored from the first token that
  differs. There the continuation loses tokens, or an error ends the run.
- Answers of a model that reasons end at a stop word after the reasoning only, as in lm_eval's own models.
"""

import copy
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task as task_module
import mlx.nn as nn
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, NaiveStreamingDetokenizer

from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.data.tokenization import Example
from nalora_mlx.evaluate.generation import Batching, generate_answers
from nalora_mlx.evaluate.scoring import Scorer
from nalora_mlx.models.context_length import context_length

MAX_LENGTH = (
    8192  # tokens that a model reads, if it does not say for how many it was made; as in mlx_lm.evaluate
)
MAX_ANSWER = 256  # tokens of an answer for which the task gives no number; as in lm_eval's own models
LIMITS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # names that tasks use for it


class LanguageModel(LM):
    """A model and its tokenizer, as lm_eval calls them.

    Args:
        model: of mlx-lm, frozen and in evaluation mode.
        tokenizer: its tokenizer, in mlx-lm's wrapper; its chat template may be configured.
        batch_size: texts at a time; None for the default of the device.
        use_chat_template: whether contexts are rendered chats, which contain their special tokens.
        on_progress: called with the number of requests done, and of all requests of their kind.
        batching: how the model answers many prompts, if known; see `generate_answers`.

    Attributes:
        use_chat_template: whether contexts are rendered chats.
        computing: whether the model computes; still true after an error of it, as opposed to one of lm_eval or a task.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        batch_size: int | None = None,
        use_chat_template: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
        batching: Batching | None = None,
    ):
        super().__init__()
        self.tokenizer, self.computing = tokenizer, False
        self._model, self._batch_size, self._on_progress = model, batch_size, on_progress
        self.use_chat_template = use_chat_template
        self._batching = batching
        self._max_length = _stated_length(model) or MAX_LENGTH

    # --- text -----------------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name in file names."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as text. Without a generation prompt, its last message is continued.

        Raises:
            InputError: the chat template rejects the chat.
        """
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in chat_history)
            raise InputError(
                f"the model's chat template rejects a chat of a task ({first_line(error)}; roles: {roles}); "
                "run the task without chat template"
            ) from error

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=not self.use_chat_template))

    @property
    def _prefix(self) -> int:
        """The token that comes before a text without a context."""
        found = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, *self.tokenizer.eos_token_ids)
        return next(token for token in found if token is not None)

    # --- scores ---------------------------------------------------------------------------------------------

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._model, self._batch_size)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) the log-probability in nats, and whether it is the greedy answer.

        A continuation without a token has log-probability 0.
        """
        members: dict[str, list[int]] = {}  # requests by context
        for i, request in enumerate(requests):
            members.setdefault(request.args[0], []).append(i)
        groups = [
            self._continued(context, [requests[i].args[1] for i in indices])
            for context, indices in members.items()
        ]
        self.computing = True
        scores = self._scorer.score(groups, greedy=True, on_progress=self._on_progress)
        self.computing = False
        results = {
            i: (score.log_probability, bool(score.greedy))
            for indices, found in zip(members.values(), scores, strict=True)
            for i, score in zip(indices, found, strict=True)
        }
        return [results[i] for i in range(len(requests))]

    def _continued(self, context: str, continuations: Sequence[str]) -> list[Example]:
        """Return the texts of one context. If one is too long, all lose the same tokens on the left."""
        prompt, found = self._encode(context), []
        for continuation in continuations:
            tokens = self._encode(context + continuation)
            start = _common_length(prompt, tokens)
            if start == 0:  # nothing predicts the first token
                tokens, start = tokens if tokens[:1] == [self._prefix] else [self._prefix, *tokens], 1
            found.append((tokens, start))
        surplus = max(len(tokens) for tokens, _ in found) - 1 - self._max_length
        cut = max(0, min(surplus, min(start for _, start in found) - 1))
        return [_text(tokens[cut:], start - cut) for tokens, start in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-probability of each text in nats, after the prefix token, which is not scored."""
        windows: list[list[Example]] = []
        owners = []
        for i, request in enumerate(requests):
            tokens = list(self.tokenizer.encode(request.args[0], add_special_tokens=False))
            for inputs, targets in get_rolling_token_windows(tokens, self._prefix, self._max_length, 1):
                sequence = [*inputs, targets[-1]]
                windows.append([_text(sequence, len(sequence) - len(targets))])
                owners.append(i)
        sums = np.zeros(len(requests))
        self.computing = True
        scores = self._scorer.score(windows, on_progress=self._on_progress)
        self.computing = False
        for i, (score,) in zip(owners, scores, strict=True):
            sums[i] += score.log_probability
        return sums.tolist()

    # --- answers --------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the greedy answer to each context, up to the first stop word.

        Reasoning before it, up to the tokenizer's end of reasoning, is left out.

        Raises:
            InputError: a task wants sampled answers.
        """
        limits, stop_words = map(list, zip(*(generation_settings(r.args[1]) for r in requests), strict=True))
        prompts = [
            (self._encode(request.args[0]) or [self._prefix])[-max(1, self._max_length - limit) :]
            for request, limit in zip(requests, limits, strict=True)
        ]
        reasons = self.use_chat_template and self.tokenizer.has_thinking
        self.computing = True
        answers = generate_answers(
            self._model,
            _untrimmed(self.tokenizer),
            prompts,
            limits,
            self._batch_size,
            [[]] * len(prompts) if reasons else stop_words,
            lambda done: self._on_progress(done, len(requests)) if self._on_progress else None,
            self._batching,
        )
        self.computing = False
        return [self._final(answer.text, words) for answer, words in zip(answers, stop_words, strict=True)]

    def _final(self, text: str, stop_words: Sequence[str]) -> str:
        """Return an answer without its reasoning, up to the first stop word."""
        if self.tokenizer.has_thinking:
            _, end, answer = text.partition(self.tokenizer.think_end)
            text = answer if end else text
        return text[: min((at for word in stop_words if (at := text.find(word)) >= 0), default=None)]


def generation_settings(options: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Return (maximum number of tokens, stop words) of a task's `generation_kwargs`.

    Raises:
        InputError: the task wants sampled answers.
    """
    sample = options.get("do_sample")
    temperature = float(options.get("temperature", 1 if sample else 0))
    if sample is not False and temperature > 0:
        raise InputError(
            f"the task samples its answers (temperature {temperature:g}), but answers are generated greedily here; "
            "leave the task out, or set do_sample: false in a task file of your own"
        )
    limit = next((options[name] for name in LIMITS if options.get(name) is not None), MAX_ANSWER)
    words = options.get("until") or []
    return int(limit), [word for word in ([words] if isinstance(words, str) else words) if word]


def _untrimmed(tokenizer: Any) -> Any:
    """Return a tokenizer that streams the text of `decode`. For byte-level BPE, mlx-lm drops a space at the start."""
    if not isinstance(tokenizer.detokenizer, BPEStreamingDetokenizer):
        return tokenizer
    changed = copy.copy(tokenizer)
    changed._detokenizer = NaiveStreamingDetokenizer(tokenizer._tokenizer)
    return changed


def _stated_length(model: nn.Module) -> int | None:
    """Return the number of positions that a model was made for; None if it does not say."""
    text = getattr(model, "language_model", model)
    args = getattr(text, "args", None) or getattr(text, "config", None)
    return context_length(vars(args)) if hasattr(args, "__dict__") else None


def _text(tokens: Sequence[int], start: int) -> Example:
    """Return a text that is scored from a token on."""
    return Example(np.array(tokens, np.int32), np.arange(len(tokens)) >= start, "")


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def evaluate_tasks(
    model: LanguageModel, loaded: Mapping[str, Any], limit: int | None, seed: int
) -> dict[str, Any]:
    """Return lm_eval's results of a model, with the metrics of each document but without its texts.

    Args:
        model: the model.
        loaded: tasks and groups, as lm_eval's task manager loads them.
        limit: number of documents of each task; None for all.
        seed: of the choice of examples.

    Raises:
        InputError: a task file does not fit its data.
    """
    random.seed(seed)
    np.random.seed(seed)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed)
    try:
        results = lm_eval.evaluate(
            model,
            loaded,
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=model.use_chat_template,
            fewshot_as_multiturn=model.use_chat_template,
        )
    except Exception as error:
        if model.computing or isinstance(error, InputError):
            raise
        names, what = ", ".join(loaded["tasks"]), f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"task {names}: its task file does not fit its data ({what})") from error
    samples = {
        task: [{key: found[key] for key in ("doc_id", "filter", *found["metrics"])} for found in documents]
        for task, documents in results["samples"].items()
    }
    return results | {"samples": samples}


@contextmanager
def quiet(notify: Callable[[str], None]) -> Iterator[None]:
    """Pass on lm_eval's warnings, each once, and hide its other messages and progress bars.

    Neither the defaults of task files nor repeated downloads are worth a warning.
    """
    seen = set()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            if text not in seen and "using default" not in text:
                seen.add(text)
                notify(f"lm_eval: {text}")

    logger, hub = logging.getLogger("lm_eval"), logging.getLogger("huggingface_hub")
    before, hub_level = (logger.level, logger.handlers, logger.propagate), hub.level
    bar, had_bars = task_module.tqdm, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.WARNING)
    logger.handlers, logger.propagate = [Handler()], False
    hub.setLevel(logging.ERROR)
    task_module.tqdm = lambda items, **_: items
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.handlers, logger.propagate = before[1:]
        hub.setLevel(hub_level)
        task_module.tqdm = bar
        if had_bars:
            datasets.enable_progress_bars()
