"""Adding a GGUF file to Ollama: `ollama create NAME -f Modelfile`, which copies the weights into Ollama's own store."""

import re
import shutil
import subprocess
from pathlib import Path

from nalora_mlx.core.errors import InputError, RunError

# [host[:port]/][namespace/]model[:tag], as Ollama parses names.
_NAME = re.compile(r"([\w.-]+(:\d+)?/)?([\w-]+/)?[\w.-]+(:[\w.-]+)?", re.ASCII)
_MAX_NAME = 128  # characters


def create_command(name: str, modelfile: Path) -> list[str]:
    """Return the command that adds a model; it is meant to run in the Modelfile's directory."""
    return ["ollama", "create", name, "-f", modelfile.name]


def check_ollama(name: str, overwrite: bool, dry_run: bool = False) -> None:
    """Check, before an export, that Ollama can take a model of this name. A dry run does not need Ollama.

    Raises:
        InputError: the name is not valid, Ollama is not installed or does not answer, or it has such a model and
            `overwrite` is False.
    """
    if not _NAME.fullmatch(name) or len(name) > _MAX_NAME or ".." in name:
        raise InputError(
            f"--ollama {name}: not a name for a model of Ollama; give NAME or NAME:TAG, such as tuned:8b"
        )
    if shutil.which("ollama") is None:
        if dry_run:
            return
        raise InputError(
            f"--ollama {name}: there is no ollama on PATH; install it from https://ollama.com, or leave the flag out "
            "and run ollama create later, with the Modelfile that the export writes"
        )
    listing = subprocess.run(["ollama", "list"], capture_output=True, text=True)
    if listing.returncode:
        reason = (listing.stderr.strip().splitlines() or [f"status {listing.returncode}"])[-1]
        raise InputError(
            f"--ollama {name}: ollama list failed ({reason}); start Ollama, for example with ollama serve"
        )
    existing = {_full_name(line.split()[0]) for line in listing.stdout.splitlines()[1:] if line.strip()}
    if _full_name(name) in existing and not overwrite:
        raise InputError(
            f"--ollama {name}: Ollama has a model of this name; choose another, or give --overwrite"
        )


def _full_name(name: str) -> str:
    """Return a name with its tag and without Ollama's defaults, in lowercase: Ollama ignores case."""
    name = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def create_model(name: str, modelfile: Path) -> None:
    """Run `ollama create`, which prints its own progress.

    Raises:
        RunError: it failed. The files stay.
    """
    command = create_command(name, modelfile)
    result = subprocess.run(command, cwd=modelfile.parent)
    if result.returncode:
        raise RunError(
            f"{' '.join(command)} failed with status {result.returncode}, see above; the files are in "
            f"{modelfile.parent.resolve()}, where you can run it again"
        )
