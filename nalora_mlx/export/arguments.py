"""The flags of `nalora export`. Each format has a help page of its own."""

from pathlib import Path
from typing import Any

from nalora_mlx.arguments import Parser, add_model

FORMATS = {
    "gguf": "the model with the adapter merged, for llama.cpp, Ollama and LM Studio",
    "gguf-lora": "the adapter alone, for llama.cpp and Ollama",
    "peft": "an adapter for transformers + PEFT and vLLM",
    "mlx": "an adapter for mlx-lm, from a checkpoint, a PEFT adapter, or several adapters",
}
DIRECTORIES = ("peft", "mlx")  # formats that are a directory; the others are a file
DEFAULT_TYPE = "f16"
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_m", "q5_k_m", "q6_k")
EXAMPLES = """
gguf: one file for llama.cpp, Ollama and LM Studio
  nalora export gguf --model Qwen/Qwen3-0.6B --adapter-path adapters --type q4_k_m --output tuned.gguf
gguf-lora: the adapter alone, for llama.cpp and Ollama
  nalora export gguf-lora --model Qwen/Qwen3-0.6B --adapter-path adapters --output lora.gguf
peft: an adapter for transformers + PEFT and vLLM
  nalora export peft --model Qwen/Qwen3-0.6B --adapter-path adapters --output peft
mlx: an adapter for mlx-lm, from a checkpoint, a PEFT adapter, or several adapters
  nalora export mlx --model Qwen/Qwen3-0.6B --from-peft peft --output adapters
"""
EXAMPLES_OF = {
    "gguf": """
    write one file for llama.cpp, in about 4 bits
      nalora export gguf --model Qwen/Qwen3-0.6B --adapter-path adapters --type q4_k_m --output tuned.gguf
    add the model to Ollama
      nalora export gguf --model Qwen/Qwen3-0.6B --adapter-path adapters --ollama tuned --output tuned.gguf
    write it into LM Studio's directory
      nalora export gguf --model Qwen/Qwen3-0.6B --adapter-path adapters --lmstudio me/tuned
    """,
    "gguf-lora": """
    write an adapter for llama-cli -m base.gguf --lora lora.gguf
      nalora export gguf-lora --model Qwen/Qwen3-0.6B --adapter-path adapters --output lora.gguf
    """,
    "peft": """
    write an adapter for transformers and vLLM
      nalora export peft --model Qwen/Qwen3-0.6B --adapter-path adapters --output peft
    also upload it
      nalora export peft --model Qwen/Qwen3-0.6B --adapter-path adapters --output peft --push-to-hub me/a
    """,
    "mlx": """
    convert a PEFT adapter
      nalora export mlx --model Qwen/Qwen3-0.6B --from-peft peft --output adapters
    take an adapter out of a checkpoint
      nalora export mlx --model Qwen/Qwen3-0.6B --adapter-path a/checkpoints/step-0000200 --output b
    average two adapters
      nalora export mlx --model Qwen/Qwen3-0.6B --adapter-path a --adapter-path b --scale 0.5 --output mean
    """,
}


def build_parser(prog: str) -> Parser:
    """Build the parser: the format, the model, the adapters and the output."""
    parser = Parser(
        prog=prog,
        usage="FORMAT --model MODEL --adapter-path DIR --output PATH [options]",
        description="Export an adapter or a model to other programs. Each format has its own help page: nalora export "
        "gguf --help.",
        examples=EXAMPLES,
        essentials=("model", "adapter_path", "output", "overwrite"),
    )
    formats = f"what to write: {', '.join(FORMATS)}"
    parser.add_argument("format", metavar="FORMAT", choices=tuple(FORMATS), help=formats)
    _add_flags(parser, *FORMATS)
    for name, text in FORMATS.items():
        kind = "DIR" if name in DIRECTORIES else "FILE"
        page = parser.pages[name] = Parser(
            prog=f"{prog} {name}",
            usage=f"--model MODEL --adapter-path DIR --output {kind} [options]",
            description=f"Write {text}.",
            examples=EXAMPLES_OF[name],
        )
        _add_flags(page, name)
    return parser


def _add_flags(parser: Parser, *formats: str) -> None:
    """Add the flags that at least one of the formats takes."""

    def add(flag: str, *takers: str, **settings: Any) -> None:
        if not takers or set(takers) & set(formats):
            parser.add_argument(flag, **settings)

    add_model(parser, "base model")
    add(
        "--adapter-path",
        action="append",
        default=[],
        metavar="DIR",
        help="directory of an adapter or a checkpoint; repeat it to sum several",
    )
    add(
        "--weight",
        action="append",
        type=float,
        default=[],
        metavar="N",
        help="factor of an adapter; give one per --adapter-path, in the same order (default: 1)",
    )
    add("--scale", type=float, default=1.0, metavar="N", help="factor of all adapters (default: 1)")
    add("--from-peft", "mlx", metavar="DIR", help="convert a PEFT adapter, instead of --adapter-path")
    kinds = {"directory" if name in DIRECTORIES else "file" for name in formats}
    add(
        "--output",
        type=Path,
        metavar="PATH",
        help=f"{' or '.join(sorted(kinds))} to write"
        + ("; optional with --lmstudio" if "gguf" in formats else ""),
    )
    types = f"type of the weights: {', '.join(TYPES)} (default: {DEFAULT_TYPE})"
    add("--type", "gguf", choices=TYPES, metavar="TYPE", help=types)
    add("--ollama", "gguf", metavar="NAME", help="add the model to Ollama, with ollama create")
    add(
        "--lmstudio",
        "gguf",
        metavar="PUBLISHER/NAME",
        help="write the model into LM Studio's directory; with --output, make it appear there too",
    )
    add("--dry-run", "gguf", action="store_true", help="only say what would be written and run")
    add(
        "--push-to-hub",
        *DIRECTORIES,
        metavar="OWNER/NAME",
        help="upload the adapter to this Hugging Face repo",
    )
    replaced = ", and a model of Ollama or LM Studio" if "gguf" in formats else ""
    add("--overwrite", action="store_true", help=f"replace an existing --output{replaced}")
