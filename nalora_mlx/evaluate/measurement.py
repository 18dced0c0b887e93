"""What is measured of one model: losses, answers, choices, and losses on general text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn
import numpy as np

from nalora_mlx.core.errors import RunError
from nalora_mlx.data.tokenization import Example
from nalora_mlx.evaluate.contestants import Contestants
from nalora_mlx.evaluate.generation import (
    Batching,
    GeneratedAnswer,
    choose_batching,
    generate_answers,
)
from nalora_mlx.evaluate.metrics import Metric, MetricError
from nalora_mlx.evaluate.questions import Question, known_choices
from nalora_mlx.evaluate.scoring import Scorer
from nalora_mlx.models.vision.generation import render_chat, stream_answer

OnProgress = Callable[[str, int, int], None]  # takes what is done, how many are done, and of how many


@dataclass(frozen=True)
class Sums:
    """Values of N rows, and the number of tokens that each is a sum over.

    Attributes:
        sources: of the rows, each once.
        values: [N] float64, sums over a row's tokens in nats.
        tokens: [N] int64.
    """

    sources: tuple[str, ...]
    values: np.ndarray
    tokens: np.ndarray

    @classmethod
    def by_source(cls, examples: Sequence[Example], values: Sequence[float], tokens: Sequence[int]) -> "Sums":
        """Add up the sequences of each row; a chat or a long text may have several."""
        numbers: dict[str, int] = {}
        places = [numbers.setdefault(example.source, len(numbers)) for example in examples]
        sums, counts = np.zeros(len(numbers)), np.zeros(len(numbers), np.int64)
        np.add.at(sums, places, np.asarray(values, np.float64))
        np.add.at(counts, places, np.asarray(tokens, np.int64))
        return cls(tuple(numbers), sums, counts)


@dataclass
class TestSet:
    """What models are measured on.

    Attributes:
        examples: tokenized test rows, whose supervised tokens are scored.
        questions: test rows that models answer.
        metrics: of the answers.
        general: tokenized general text; empty if it is not used.
        max_tokens: maximum length of an answer.
        batch_size: rows at a time; None decides by the device.
    """

    examples: list[Example] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    general: list[Example] = field(default_factory=list)
    max_tokens: int = 256
    batch_size: int | None = None


@dataclass
class Measured:
    """What was measured of one model.

    Attributes:
        losses: on the test rows; None without any.
        answers: to the questions; empty if there are no metrics.
        values: of each metric, [N]; see `TestSet.questions`.
        choices: for each question with choices, 1 if the expected one is the most likely, else 0; [M].
        chosen: for each of them, index of the most likely choice; [M].
        general: losses on general text; None without any.
        divergences: KL(base || model) on general text; None for the base.
    """

    losses: Sums | None = None
    answers: list[GeneratedAnswer] = field(default_factory=list)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    choices: np.ndarray | None = None
    chosen: np.ndarray | None = None
    general: Sums | None = None
    divergences: Sums | None = None


class Measurer:
    """Measures models on one test set, the base first.

    Args:
        contestants: the models.
        test_set: what they are measured on.
        notify: called with notices.
        on_progress: called from time to time.

    Attributes:
        dropped: metrics that failed on a row, with the reason. They are left out for all models.
    """

    def __init__(
        self,
        contestants: Contestants,
        test_set: TestSet,
        notify: Callable[[str], None],
        on_progress: OnProgress = lambda *_: None,
    ):
        self.contestants, self.test_set = contestants, test_set
        self.notify, self.on_progress = notify, on_progress
        self.dropped: dict[str, str] = {}
        self.base_scorer: Scorer | None = None
        self.batching: Batching | None = None

    def measure(self, model: nn.Module) -> Measured:
        """Return what is measured of a model. The first one must be the base."""
        test, found = self.test_set, Measured()
        scorer = Scorer(model, test.batch_size)
        if test.examples:
            found.losses = self._losses(scorer, model, test.examples, "loss on the test rows")
        if asked := known_choices(test.questions):
            found.chosen = self._choices(scorer, model, asked)
            found.choices = (found.chosen == [question.correct for question in asked]).astype(np.float64)
        if test.general:
            found.general = self._losses(scorer, model, test.general, "loss on general text")
            if self.base_scorer is not None:
                found.divergences = self._divergences(scorer)
        if self.base_scorer is None:
            self.base_scorer = scorer
        if test.metrics and test.questions:
            found.answers = self._answers(model)
            found.values = self._values(found.answers)
        return found

    def _losses(self, scorer: Scorer, model: nn.Module, examples: Sequence[Example], what: str) -> Sums:
        encoded = self.contestants.with_images(model, examples)
        scores = scorer.score([[example] for example in encoded], on_progress=self._progress(what))
        values = [-score.log_probability for (score,) in scores]
        if not np.isfinite(values).all():
            row = examples[int(np.argmin(np.isfinite(values)))].source
            raise RunError(
                f"{row}: the loss is NaN or infinite; use an earlier checkpoint, or a model in float32 or bfloat16"
            )
        return Sums.by_source(examples, values, [score.tokens for (score,) in scores])

    def _choices(self, scorer: Scorer, model: nn.Module, questions: Sequence[Question]) -> np.ndarray:
        flat = [choice for question in questions for choice in question.choices]
        encoded = iter(self.contestants.with_images(model, flat))
        groups = [[next(encoded) for _ in question.choices] for question in questions]
        scores = scorer.score(groups, on_progress=self._progress("choices"))
        return np.array([int(np.argmax([score.log_probability for score in of_one])) for of_one in scores])

    def _divergences(self, scorer: Scorer) -> Sums:
        assert self.base_scorer is not None
        texts = self.contestants.with_images(self.contestants.base, self.test_set.general)
        values = self.base_scorer.divergences(scorer, texts, self._progress("divergence on general text"))
        return Sums.by_source(texts, list(values), [text.supervised_tokens for text in texts])

    # --- answers ------------------------------------------------------------------------------------------------

    def _answers(self, model: nn.Module) -> list[GeneratedAnswer]:
        test, what = self.test_set, "answers"
        if self.contestants.processor is not None:
            return [
                self._answer_about_images(model, question, i) for i, question in enumerate(test.questions)
            ]
        if self.batching is None:
            self.batching = choose_batching(model)
            if self.batching.notice:
                self.notify(self.batching.notice)
        count = len(test.questions)
        answers = generate_answers(
            model,
            self.contestants.tokenizer,
            [question.prompt for question in test.questions],
            test.max_tokens,
            test.batch_size,
            on_answer=lambda done: self.on_progress(what, done, count),
            batching=self.batching,
        )
        return [without_reasoning(answer, self.contestants.tokenizer) for answer in answers]

    def _answer_about_images(self, model: nn.Module, question: Question, done: int) -> GeneratedAnswer:
        processor, row = self.contestants.processor, question.row
        assert processor is not None
        text = render_chat(processor, question.messages, row.source, row.tools, row.template_args)
        images = row.images[: text.count(processor.placeholder)]
        pieces, finish, tokens = [], None, 0
        for response in stream_answer(
            model, processor, text, images, row.source, max_tokens=self.test_set.max_tokens, temperature=0.0
        ):
            pieces.append(response.text)
            finish, tokens = response.finish_reason, tokens + 1
        self.on_progress("answers", done + 1, len(self.test_set.questions))
        answer = GeneratedAnswer("".join(pieces), finish == "stop", tokens - (finish == "stop"))
        return without_reasoning(answer, self.contestants.tokenizer)

    def _values(self, answers: Sequence[GeneratedAnswer]) -> dict[str, np.ndarray]:
        """Return the values of each metric. One that fails on a row is dropped, so that the others are not lost."""
        values = {}
        for metric in self.test_set.metrics:
            if metric.name in self.dropped:
                continue
            try:
                values[metric.name] = np.array(
                    [
                        metric.score(answer.text, question.expected or "", question.content())
                        for question, answer in zip(self.test_set.questions, answers, strict=True)
                    ],
                    np.float64,
                )
            except MetricError as error:
                self.dropped[metric.name] = str(error)
        return values

    def _progress(self, what: str) -> Callable[[int, int], None]:
        return lambda done, count: self.on_progress(what, done, count)


def without_reasoning(answer: GeneratedAnswer, tokenizer: Any) -> GeneratedAnswer:
    """Return an answer without the reasoning before it, if the model marks where that ends."""
    end = getattr(tokenizer, "think_end", None)
    if not end or end not in answer.text:
        return answer
    return answer._replace(text=answer.text.partition(end)[2].strip())
