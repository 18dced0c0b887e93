"""`nalora COMMAND` and `python -m nalora_mlx COMMAND`."""

import os
import sys
from contextlib import suppress

from nalora_mlx import __version__
from nalora_mlx.arguments import EXIT_USAGE
from nalora_mlx.cli import COMMAND_GROUPS, COMMANDS, command, execute
from nalora_mlx.core.parsing import meant_name
from nalora_mlx.core.synonyms import COMMANDS as COMMAND_SYNONYMS

# Environment variables that the commands set, unless the user did: those that GPU drivers and MLX read once, early on.
# See docs/troubleshooting.md.
ENVIRONMENT = {
    # macOS ends less work on the GPU because it blocks the screen (mlx #3267, llama.cpp #20141).
    "darwin": {"AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "1"},
    # MLX ends a process after 800 CUDA graphs, although one step may have hundreds (mlx/backend/cuda/lru_cache.h).
    "linux": {"MLX_CUDA_GRAPH_CACHE_SIZE": "2048", "MLX_ENABLE_CACHE_THRASHING_CHECK": "0"},
}


EXAMPLES = (
    "nalora doctor --model Qwen/Qwen3-0.6B --data tickets.csv",
    "nalora lora --train --model Qwen/Qwen3-0.6B --data tickets.csv --mask-prompt",
    "nalora chat --model Qwen/Qwen3-0.6B --adapter-path adapters --compare",
)


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    for name, value in ENVIRONMENT.get(sys.platform, {}).items():
        os.environ.setdefault(name, value)  # before any command imports mlx
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        with suppress(BrokenPipeError):
            print(overview(), flush=True)
        return 0 if argv else EXIT_USAGE
    if argv[0] == "--version":
        print(f"nalora {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        meant = meant_name(name, COMMANDS, synonyms=COMMAND_SYNONYMS)
        remedy = meant or f"; choose from {', '.join(COMMANDS)}"
        print(f"nalora: error: no command {name!r}{remedy}", file=sys.stderr)
        return EXIT_USAGE
    module = command(name)
    return execute(f"nalora {name}", module.build_parser, module.run, argv[1:])


def overview() -> str:
    """Return the help page of `nalora` itself."""
    width = max(map(len, COMMANDS))
    lines = ["usage: nalora COMMAND [options]", "", "Fine-tune language models with MLX and NA-LoRA."]
    for title, commands in COMMAND_GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<{width}}  {text}" for name, text in commands.items())]
    lines += ["", "examples:", *(f"  {line}" for line in EXAMPLES), ""]
    return "\n".join([*lines, "nalora COMMAND --help shows a command's flags and examples."])


if __name__ == "__main__":
    sys.exit(main())
