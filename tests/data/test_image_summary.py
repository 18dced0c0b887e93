"""What is shown of rows with images: how many there are, and their tokens as a count."""

import numpy as np

from nalora_mlx.data.summary import mask_pieces, summary
from nalora_mlx.data.tokenization import Example, Split


class Letters:
    """Decodes token n as the n-th letter."""

    def decode(self, tokens):
        return "".join(chr(97 + token) for token in tokens)


def example(tokens, supervised, images=()):
    mask = np.zeros(len(tokens), bool)
    mask[-supervised:] = True
    return Example(np.array(tokens, np.int32), mask, "a.jsonl:1", images)


def test_tokens_of_images_are_counted():
    tokens = [0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 4, 4, 4, 4, 5]
    shown = mask_pieces(example(tokens, 2, ("a.png",)), Letters())
    assert shown == [("abbbc (5 times)deee", False), ("ef", True)]


def test_texts_are_shown_whole():
    assert mask_pieces(example([1] * 9, 1), Letters()) == [("b" * 8, False), ("b", True)]


def test_images_of_a_split_are_counted():
    rows = [example([1, 2, 3], 1, ("a.png", "b.png")), example([1, 2, 3], 1)]
    assert summary("train", Split(rows, rows=2)).startswith("train: 2 rows with 2 images, 6 tokens")
