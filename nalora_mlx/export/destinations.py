"""Where a GGUF file goes: to --output, into LM Studio's directory, and into Ollama."""

import argparse
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from nalora_mlx.core.errors import InputError
from nalora_mlx.export import lmstudio, ollama
from nalora_mlx.export.results import Step, print_notes


@dataclass(frozen=True)
class Destination:
    """Where a GGUF file goes.

    Attributes:
        output: file to write.
        in_lmstudio: path in LM Studio's directory, which may be the output itself; None for none.
        has_lmstudio: whether LM Studio's home exists.
        lmstudio: PUBLISHER/NAME, its name in LM Studio.
        ollama: its name in Ollama; None for none.
    """

    output: Path
    in_lmstudio: Path | None
    has_lmstudio: bool
    lmstudio: str | None
    ollama: str | None

    @property
    def wants_modelfile(self) -> bool:
        """Whether a Modelfile is written. LM Studio needs none in its directory."""
        return self.ollama is not None or self.output != self.in_lmstudio

    def describe(self, modelfile: Path) -> list[str]:
        """Return what an export would do after it has written the output."""
        lines = []
        if self.wants_modelfile:
            lines.append(f"would {'keep' if modelfile.exists() else 'write'} {modelfile}")
        if self.in_lmstudio not in (None, self.output):
            lines.append(f"would make {self.output} appear as {self.in_lmstudio}, for LM Studio")
        if self.ollama is not None:
            missing = "" if shutil.which("ollama") else " (there is no ollama on PATH; install it first)"
            command = shlex.join(ollama.create_command(self.ollama, modelfile))
            lines.append(f"would run, in {modelfile.parent.resolve()}: {command}{missing}")
        return lines

    def deliver(self, modelfile: Path | None) -> None:
        """Hand a written file on to LM Studio and Ollama.

        Raises:
            RunError: Ollama failed. The files stay.
        """
        if self.in_lmstudio is not None:
            if self.in_lmstudio != self.output:
                lmstudio.place(self.output, self.in_lmstudio)
            print(f"LM Studio has it as {self.lmstudio} ({self.in_lmstudio})")
            if not self.has_lmstudio:
                print_notes(["LM Studio was not found, and will read the file once it is installed"])
        if self.ollama is not None and modelfile is not None:
            ollama.create_model(self.ollama, modelfile)
            print(f"Ollama has it as {self.ollama}")

    def steps(self) -> list[Step]:
        """Return how a delivered model is used; nothing if it was only written to a file."""
        return [] if self.ollama is None else [("Ollama", [["ollama", "run", self.ollama]])]


def choose_destination(args: argparse.Namespace, type: str) -> Destination:
    """Check --output, --lmstudio and --ollama before the export; without --output, LM Studio's path takes its place.

    Raises:
        InputError: a name is not valid or taken, a directory cannot be written, or Ollama does not answer.
    """
    from nalora_mlx.core.storage import check_writable

    in_lmstudio = None
    if args.lmstudio is not None:
        in_lmstudio = lmstudio.model_path(args.lmstudio, type)
        if in_lmstudio.exists() and not args.overwrite:
            raise InputError(
                f"--lmstudio {args.lmstudio}: {in_lmstudio} exists; choose another NAME, or give --overwrite"
            )
        check_writable(in_lmstudio.parent)
    if args.ollama is not None:
        ollama.check_ollama(args.ollama, args.overwrite, args.dry_run)
    output = args.output or in_lmstudio
    if output is None:
        raise InputError("--output is missing; say where to write")
    output = output.expanduser()
    return Destination(output, in_lmstudio, lmstudio.home().exists(), args.lmstudio, args.ollama)
