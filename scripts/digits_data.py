"""Write the pictures and rows of the digits example.

python scripts/digits_data.py [DIRECTORY]

The pictures are the 1,797 handwritten digits of scikit-learn, 8 x 8 with 17 shades of gray, enlarged to 64 x 64. They
are shuffled and divided into four parts. scripts/digits_model.py trains the base model on one of them; the others are
for training, validation and test.

Writes to DIRECTORY, by default demo/digits/data, with image paths relative to each file:

- images/*.png
- read/{train,valid,test}.jsonl: one picture and the question which digit it shows
- sum/{train,valid,test}.jsonl: two pictures and the question what the sum of the digits is

The output is always the same.
"""

import json
import sys
from pathlib import Path

import numpy as np

DEFAULT = Path("demo/digits/data")
SEED = 20261101
PICTURES = {"base": 797, "train": 500, "valid": 100, "test": 400}
SUMS = {"train": 1000, "valid": 100, "test": 400}  # rows; readings have a row for each picture
SIDE = 64
READ_QUESTION = "Write the digit as a number."
SUM_QUESTION = "Add the two digits."


def load_pictures() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the parts: name -> pictures [N, 8, 8] with values from 0 to 16, and their digits [N]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(SEED).permutation(len(data.target))
    parts, start = {}, 0
    for name, count in PICTURES.items():
        chosen = order[start : start + count]
        parts[name] = (data.images[chosen], data.target[chosen])
        start += count
    return parts


def enlarge(pictures: np.ndarray, side: int) -> np.ndarray:
    """Enlarge pictures [N, 8, 8] with bicubic interpolation to [N, side, side], with values from 0 to 255."""
    from PIL import Image

    return np.stack(
        [
            Image.fromarray((p * (255 / 16)).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
            for p in pictures
        ]
    )


def reading(path: str, digit: int) -> dict:
    return chat([path], READ_QUESTION, str(digit))


def adding(paths: list[str], digits: list[int]) -> dict:
    return chat(paths, SUM_QUESTION, f"{' + '.join(map(str, digits))} = {sum(digits)}")


def chat(paths: list[str], question: str, answer: str) -> dict:
    """Return a row with images: a question about pictures and its answer."""
    pictures = [{"type": "image", "image": path} for path in paths]
    return {
        "messages": [
            {"role": "user", "content": [*pictures, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
    }


def pair_up(count: int, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Draw pairs of indices below `count`, [rows, 2], so that all indices occur about equally often."""
    rounds = -(-2 * rows // count)
    order = np.concatenate([rng.permutation(count) for _ in range(rounds)])
    return order[: 2 * rows].reshape(rows, 2)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(directory: Path) -> None:
    from PIL import Image

    (directory / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    for name, (pictures, digits) in load_pictures().items():
        if name == "base":
            continue
        paths = []
        for i, picture in enumerate(enlarge(pictures, SIDE)):
            file = f"{name}-{i:03d}.png"
            Image.fromarray(picture).save(directory / "images" / file)
            paths.append(f"../images/{file}")
        numbers = [int(digit) for digit in digits]
        write_rows(
            directory / "read" / f"{name}.jsonl",
            [reading(path, digit) for path, digit in zip(paths, numbers, strict=True)],
        )
        pairs = pair_up(len(paths), SUMS[name], rng)
        write_rows(
            directory / "sum" / f"{name}.jsonl",
            [adding([paths[i] for i in pair], [numbers[i] for i in pair]) for pair in pairs],
        )


if __name__ == "__main__":
    write_data(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT)
