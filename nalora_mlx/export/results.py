"""What a command that writes models prints: results and next commands to standard output, notes to standard error."""

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from nalora_mlx.core.notices import Note
from nalora_mlx.core.paths import as_typed

# A step: a word that says what it is for, and commands that follow one another.
Step = tuple[str, Sequence[Sequence[str]]]


def print_written(path: Path, what: str) -> None:
    """Print the line of a file or directory that was written."""
    print(f"wrote {path}: {what}")


def print_notes(notes: Iterable[str]) -> None:
    """Print notes, but not those that ask for nothing."""
    for note in notes:
        if not isinstance(note, Note):
            print(f"note: {note}", file=sys.stderr)


def print_steps(steps: Sequence[Step]) -> None:
    """Print commands to copy, in the form of `Display.next_steps`."""
    if not steps:
        return
    width = max(len(name) for name, _ in steps)
    print("\nnext:")
    for name, commands in steps:
        print(f"  {name:<{width}}  {' && '.join(shlex.join(as_typed(words)) for words in commands)}")


def gguf_steps(model: Path, modelfile: Path | None, adapter: Path | None = None) -> list[Step]:
    """Return how a GGUF file is used.

    Args:
        model: file of the model.
        modelfile: its Modelfile, or that of the adapter; None without one.
        adapter: file of an adapter that is not merged.
    """
    file = adapter or model
    lora = [] if adapter is None else ["--lora", str(adapter)]
    steps: list[Step] = [("llama.cpp", [["llama-cli", "-m", str(model), *lora]])]
    if modelfile is not None:
        name = re.sub(r"[^a-z0-9._-]+", "-", file.stem.lower()).strip("-.") or "tuned"
        steps.append(("Ollama", [["ollama", "create", name, "-f", str(modelfile)], ["ollama", "run", name]]))
    if adapter is None:
        steps.append(("LM Studio", [["lms", "import", "--hard-link", str(model)]]))
    return steps
