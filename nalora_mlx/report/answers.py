"""Sample answers of the runs as cards: the question, the answers before and after, and what was expected."""

import re
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from nalora_mlx.report.run_data import RunData

# Words, single characters of scripts without spaces, and everything else.
_TOKEN = re.compile(r"\s+|[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")
SIMILAR = 0.4  # share of common words from which on differences are marked; else everything would be
LEGEND = "Underlined words differ from the expected answer."


class Piece(NamedTuple):
    """A part of a text, and whether it differs from the other text."""

    text: str
    differs: bool


class Answer(NamedTuple):
    """An answer on a card."""

    who: str
    role: str  # "before" or "after"
    run: int | None  # index of the run, for its color
    pieces: list[Piece]
    same: bool  # as expected
    cut: bool  # at the limit of tokens or time


class Card(NamedTuple):
    """A question with all answers."""

    prompt: str
    images: list[str]  # thumbnails, as data URIs
    source: str
    expected: list[Piece] | None
    answers: list[Answer]
    all_same: bool  # every answer after training is as expected, so that it need not be repeated


def cards(runs: list[RunData]) -> list[Card]:
    """Return a card for each question that a run answered, in the order of the first run that has it."""
    questions: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for i, run in enumerate(runs):
        for sample in run.samples:
            questions.setdefault((sample["prompt"], *sample.get("images", ())), {})[i] = sample
    # Questions that more runs answered come first.
    ordered = sorted(questions.values(), key=lambda found: -len(found))
    return [_card(runs, found) for found in ordered]


def _card(runs: list[RunData], found: dict[int, dict[str, Any]]) -> Card:
    first = next(iter(found.values()))
    expected = next((sample["expected"] for sample in found.values() if sample["expected"]), None)
    base = next((sample for sample in found.values() if sample["before"] is not None), None)
    answers = []
    if base is not None:
        cut = not base.get("before_complete", True)
        # Its differences are not marked: nobody expects it to be right.
        same = same_text(base["before"], expected)
        answers.append(Answer("Before training", "before", None, [Piece(base["before"], False)], same, cut))
    expected_pieces = [Piece(expected, False)] if expected else None
    for i, sample in found.items():
        pieces = [Piece(sample["after"], False)]
        if expected:
            marked, pieces = mark_differences(expected, sample["after"])
            if len(found) == 1:
                expected_pieces = marked
        who = runs[i].name if len(runs) > 1 else "After training"
        same = same_text(sample["after"], expected)
        answers.append(
            Answer(who, "after", i if len(runs) > 1 else None, pieces, same, not sample["complete"])
        )
    all_same = all(answer.same for answer in answers if answer.role == "after")
    return Card(first["prompt"], first.get("images", []), first["source"], expected_pieces, answers, all_same)


def same_text(answer: str, expected: str | None) -> bool:
    """Return whether two texts are the same except for white space."""
    return expected is not None and answer.split() == expected.split()


def mark_differences(expected: str, answer: str) -> tuple[list[Piece], list[Piece]]:
    """Split two texts into pieces that are the same and pieces that differ, if the texts have enough in common."""
    expected, answer = expected.strip(), answer.strip()
    one, other = _TOKEN.findall(expected), _TOKEN.findall(answer)
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    if matcher.ratio() < SIMILAR:
        return [Piece(expected, False)], [Piece(answer, False)]
    left: list[Piece] = []
    right: list[Piece] = []
    operations = matcher.get_opcodes()
    for n, (operation, i, j, k, m) in enumerate(operations):
        for pieces, text in ((left, "".join(one[i:j])), (right, "".join(other[k:m]))):
            # A space between two differences is part of them.
            joins = operation == "equal" and text == " " and 0 < n < len(operations) - 1
            _append(pieces, text, joins or (operation != "equal" and not text.isspace()))
    return left, right


def _append(pieces: list[Piece], text: str, differs: bool) -> None:
    """Append a piece, or lengthen the last one if it is of the same kind."""
    if pieces and pieces[-1].differs == differs:
        pieces[-1] = Piece(pieces[-1].text + text, differs)
    elif text:
        pieces.append(Piece(text, differs))


def similarity(answer: str, expected: str) -> float:
    """Return the share of words that two texts have in common, in order; from 0 to 1."""
    one, other = (
        [token for token in _TOKEN.findall(text) if not token.isspace()] for text in (answer, expected)
    )
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def summary(runs: list[RunData]) -> str:
    """Say how many of the answers are as expected, and how much of the others, before and after training."""
    if len(runs) > 1:
        counts = [(run.name, _score(run, "after")) for run in runs]
        known = [f"{name} {score.same} of {score.total}" for name, score in counts if score.total]
        return f"Answers that are word for word as expected: {', '.join(known)}." if known else ""
    before, after = _score(runs[0], "before"), _score(runs[0], "after")
    if not after.total:
        return "The same questions before and after training."
    text = f"{after.same} of {after.total} answers are word for word as expected"
    if after.same == after.total:
        return f"{text}; before training, {before.same}." if before.total else f"{text}."
    common = f"they have {after.common:.0%} of their words in common with them"
    return (
        f"{text}; on average {common} ({before.common:.0%} before)." if before.total else f"{text}; {common}."
    )


class _Score(NamedTuple):
    total: int  # answers for which an answer is expected
    same: int
    common: float  # mean similarity


def _score(run: RunData, when: str) -> _Score:
    pairs = [(sample[when], sample["expected"]) for sample in run.samples]
    known = [(answer, expected) for answer, expected in pairs if expected and answer is not None]
    common = sum(similarity(*pair) for pair in known) / max(1, len(known))
    return _Score(len(known), sum(same_text(*pair) for pair in known), common)


def has_marks(found: list[Card]) -> bool:
    """Return whether any answer has marked differences."""
    return any(piece.differs for card in found for answer in card.answers for piece in answer.pieces)
