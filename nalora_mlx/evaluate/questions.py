"""The test rows as questions: what a model is asked, what it should answer, and the choices that it has."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError, counted, listed, places
from nalora_mlx.data.chats.chat_encoder import ChatEncoder
from nalora_mlx.data.checks import RunData
from nalora_mlx.data.rows.formats import Row
from nalora_mlx.data.splits import digest
from nalora_mlx.data.tokenization import Example
from nalora_mlx.runs.samples import readable

PLACEHOLDER = "x"  # stands for an answer where a row has none
MOST_CHOICES = 50  # distinct answers of a split that can be choices
ANSWER_MARGIN = 16  # tokens beyond one and a half times the longest expected answer
LONGEST_ANSWER = 1024  # tokens, by default


@dataclass
class Question:
    """One test row.

    Attributes:
        row: the row; its source names it.
        messages: the chat before the answer.
        expected: the row's answer as text; None if it has none.
        prompt: token ids that generation starts from.
        answer_tokens: number of tokens of the expected answer.
        choices: the prompt with each choice, whose tokens are scored; empty without choices.
        texts: of the choices.
        correct: index of the expected choice; None without choices.
    """

    row: Row
    messages: list[dict[str, Any]]
    expected: str | None
    prompt: list[int] = field(default_factory=list)
    answer_tokens: int = 0
    choices: list[Example] = field(default_factory=list)
    texts: tuple[str, ...] = ()
    correct: int | None = None

    @property
    def source(self) -> str:
        """File and line of the row."""
        return self.row.source

    @property
    def text(self) -> str:
        """The question as a person reads it."""
        return readable(self.messages)

    def content(self) -> dict[str, Any]:
        """Return a copy of what a metric of the user's own may read besides the answer."""
        return {
            "source": self.source,
            "messages": copy.deepcopy(self.messages),
            "expected": self.expected,
            "tools": copy.deepcopy(self.row.tools),
        }


def draw_rows(data: RunData, split: str, samples: int, seed: int) -> int:
    """Reduce the rows of a split to some that are drawn by seed, in place; return how many there were.

    The draw depends on the contents of the rows, not on their order.

    Args:
        data: changed in place.
        split: name.
        samples: number of rows to keep; -1 for all.
        seed: of the draw.
    """
    total = sum(len(splits[split]) for splits in data.sources)
    if not 0 <= samples < total:
        return total
    keyed = []
    for number, splits in enumerate(data.sources):
        for i, row in enumerate(splits[split]):
            draw = np.random.default_rng([seed, *digest(row)]).random()
            keyed.append((draw, number, i))
    chosen = {(number, i) for _, number, i in sorted(keyed)[:samples]}
    for number, splits in enumerate(data.sources):
        splits[split] = [row for i, row in enumerate(splits[split]) if (number, i) in chosen]
    return total


def read_questions(
    data: RunData,
    split: str,
    encoder: ChatEncoder,
    config: RunConfig,
    notify: Callable[[str], None],
    choices: Sequence[str] | None = None,
) -> list[Question]:
    """Return the rows of a split as questions: each chat before its last answer. Texts ask nothing.

    Preference rows ask for the chosen answer, and both answers are their choices. Rows with a bad answer for KTO ask
    nothing.

    Args:
        data: the rows.
        split: name.
        encoder: renders chats as in training, with `mask_prompt` and `last_turn_only`.
        config: of the test set.
        notify: called with notices of rows that are left out.
        choices: answers to choose from; empty for the distinct answers of the split, None for no choice.

    Raises:
        InputError: rows cannot be used; the message names them.
    """
    questions: list[Question] = []
    problems: list[str] = []
    too_long: list[str] = []
    unwritten: list[str] = []
    for row in (row for splits in data.sources for row in splits[split]):
        if not row.messages or row.label is False:
            continue
        question = _question(row)
        try:
            answer = encode_answer(question, question.expected, encoder, config.max_seq_length)
        except InputError as error:
            problems.append(str(error))
            continue
        if answer is None:
            (unwritten if _fits(question, encoder, config.max_seq_length) else too_long).append(row.source)
            continue
        start = int(answer.loss_mask.argmax())
        question.prompt = answer.tokens[:start].tolist()
        if question.expected is not None:
            question.answer_tokens = len(answer.tokens) - start
            if row.messages[-1].get("tool_calls"):
                question.expected = _without_end(answer.tokens[start:], encoder)
        questions.append(question)
    if problems:
        raise InputError(listed(problems))
    if too_long:
        notify(
            f"{split}: {counted(len(too_long), 'row')} left out of the answers ({places(too_long, 3)}), with prompts "
            f"of {config.max_seq_length} tokens or more; raise --max-seq-length"
        )
    if unwritten:
        notify(
            f"{split}: {counted(len(unwritten), 'row')} left out of the answers ({places(unwritten, 3)}), because the "
            "chat template does not write what they expect, such as tool calls"
        )
    _add_choices(questions, choices, encoder, config.max_seq_length)
    return questions


def _question(row: Row) -> Question:
    """Return a row without its last answer as a question."""
    if row.rejected is not None:
        end, expected = row.answer_start, row.messages[row.answer_start]
    elif row.messages[-1]["role"] == "assistant":
        end, expected = len(row.messages) - 1, row.messages[-1]
    else:
        return Question(row, row.messages, None)
    content = expected.get("content")
    return Question(row, row.messages[:end], content if isinstance(content, str) else "")


def encode_answer(
    question: Question, answer: str | None, encoder: ChatEncoder, max_seq_length: int
) -> Example | None:
    """Return a question's prompt with an answer, whose tokens are scored, exactly as training encodes them.

    Args:
        question: the question.
        answer: text; the row's own message if it is the expected one.
        encoder: see `read_questions`.
        max_seq_length: maximum number of tokens.

    Returns:
        None if the prompt leaves no room for an answer.

    Raises:
        InputError: the chat template refuses the chat.
    """
    row, end = question.row, len(question.messages)
    message: dict[str, Any] = {"role": "assistant", "content": PLACEHOLDER if answer is None else answer}
    if answer is not None and answer == question.expected and len(row.messages) > end:
        message = row.messages[end]
    chat = replace(row, messages=[*question.messages, message], rejected=None, untrained=frozenset())
    encoding = encoder(chat, max_seq_length)
    if not encoding.sequences:
        return None
    tokens, loss_mask = encoding.sequences[-1]
    mask = np.array(loss_mask[:max_seq_length], bool)
    mask[:1] = False  # nothing predicts the first token
    if not mask.any():
        return None
    return Example(np.array(tokens[:max_seq_length], np.int32), mask, row.source, row.images)


def _fits(question: Question, encoder: ChatEncoder, max_seq_length: int) -> bool:
    """Return whether a question leaves room for an answer."""
    asked = replace(question, expected=None)
    return encode_answer(asked, None, encoder, max_seq_length) is not None


def _without_end(tokens: np.ndarray, encoder: ChatEncoder) -> str:
    """Return an answer as the text that a model writes, without the token that ends it."""
    ends, kept = encoder.text_encoder.end_tokens, tokens.tolist()
    stop = next((i for i, token in enumerate(kept) if token in ends), len(kept))
    return str(encoder.text_encoder.tokenizer.decode(kept[:stop])).strip()


def _add_choices(
    questions: Sequence[Question],
    choices: Sequence[str] | None,
    encoder: ChatEncoder,
    max_seq_length: int,
) -> None:
    """Give questions the choices that a model's answer is taken from by likelihood.

    Raises:
        InputError: an expected answer is none of the choices, or there are too many.
    """
    if choices is not None and not choices:
        choices = list(dict.fromkeys(q.expected.strip() for q in questions if q.expected is not None))
        if len(choices) > MOST_CHOICES:
            raise InputError(
                f"--choices: the rows have {len(choices)} different answers, more than {MOST_CHOICES}; name the "
                "choices, or leave the flag out"
            )
    wrong = []
    for question in questions:
        rejected = question.row.rejected
        if choices is not None:
            question.texts = tuple(choices)
            if question.expected is None:
                wrong.append(f"{question.source}: has no answer")
                continue
            expected = question.expected.strip()
            found = [i for i, choice in enumerate(choices) if choice.strip() == expected]
            if not found:
                wrong.append(f"{question.source}: its answer is none of the choices")
                continue
            question.correct = found[0]
        elif rejected is not None and question.expected is not None:
            worse = rejected[0].get("content")
            question.texts = (question.expected, worse if isinstance(worse, str) else "")
            question.correct = 0
        encoded = [encode_answer(question, text, encoder, max_seq_length) for text in question.texts]
        question.choices = [example for example in encoded if example is not None]
        if len(question.choices) < len(question.texts):
            question.choices, question.correct = [], None
    if wrong:
        raise InputError(f"{listed(wrong)}; name all answers with --choices, or correct the rows")


def require_expected(questions: Sequence[Question], metrics: Sequence[str]) -> None:
    """Raise InputError if rows have no answer that metrics compare with.

    Args:
        questions: the test rows.
        metrics: names of metrics that need an expected answer.
    """
    missing = [f"{question.source}: has no answer" for question in questions if question.expected is None]
    if missing and metrics:
        raise InputError(
            f"{listed(missing)} to compare with ({', '.join(metrics)}); add an assistant message, or give only "
            "metrics that need none (--metric json, --regex)"
        )


def default_max_tokens(questions: Sequence[Question]) -> int:
    """Return how long an answer may be: half as long again as the longest expected one, and a margin."""
    longest = max((question.answer_tokens for question in questions), default=0)
    return min(longest + longest // 2 + ANSWER_MARGIN, LONGEST_ANSWER) if longest else LONGEST_ANSWER // 4


def known_choices(questions: Sequence[Question]) -> list[Question]:
    """Return the questions with choices and a correct one among them."""
    return [question for question in questions if question.choices and question.correct is not None]


def expected_answers(data: RunData, split: str) -> list[dict[str, Any]]:
    """Return what metrics read of each question, before anything is tokenized; see `Question.content`."""
    rows = (row for splits in data.sources for row in splits[split])
    return [_question(row).content() for row in rows if row.messages and row.label is not False]
