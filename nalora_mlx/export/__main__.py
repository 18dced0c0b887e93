"""`nalora export`: write what other tools read."""

import argparse
import sys
import tempfile
from pathlib import Path

from nalora_mlx.cli import Parser
from nalora_mlx.errors import InputError

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")


def build_parser(prog: str) -> Parser:
    """Take the format, the model, the adapter and the target."""
    parser = Parser(prog=prog, description="Write a model in a form that other tools read.")
    parser.add_argument("format", choices=("gguf",), help="gguf: llama.cpp, Ollama, LM Studio")
    parser.add_argument("--model", required=True, help="local model directory or Hugging Face repo")
    parser.add_argument("--adapter-path", help="directory of an adapter to merge in first")
    parser.add_argument("--output", required=True, type=Path, help="file to write")
    parser.add_argument("--type", default="f16", choices=TYPES, help="type of the weights (default: f16)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --output")
    return parser


def run(args: argparse.Namespace) -> None:
    """Merge if asked, then write."""
    if args.output.exists() and not args.overwrite:
        raise InputError(f"--output {args.output}: exists; choose another, or give --overwrite")
    from nalora_mlx.export.gguf_model import export_gguf
    from nalora_mlx.models import check_paths

    check_paths(args.model, args.adapter_path)
    with tempfile.TemporaryDirectory(prefix="nalora-export-") as temporary:
        source = _merged(args, Path(temporary)) if args.adapter_path else _local(args.model)
        # By the name of the model, not of the directory in which it was merged.
        name = Path(args.model).resolve().name
        report = export_gguf(source, args.output, args.type, overwrite=args.overwrite, name=name)
    for note in report.notes:
        print(f"note: {note}")
    size = f"{report.tensors} tensors, {report.bytes / 1e6:.0f} MB"
    print(f"wrote {report.path}: {report.architecture}, {report.type}, {size}")


def _local(model: str) -> Path:
    """The directory of a model, downloaded if it is a Hugging Face repo."""
    if (path := Path(model).expanduser()).exists():
        return path
    from mlx_lm.utils import hf_repo_to_path

    from nalora_mlx.models import load_model

    load_model(model)  # downloads it, with errors that a person can act on
    return hf_repo_to_path(model)


def _merged(args: argparse.Namespace, directory: Path) -> Path:
    """Merge the adapter into a dense copy of the model."""
    from mlx_lm.utils import dequantize_model, save

    from nalora_mlx.adapters import fuse_model, load_any_adapter
    from nalora_mlx.models import load_model

    model, tokenizer, config = load_model(args.model)
    load_any_adapter(model, Path(args.adapter_path).expanduser())
    fuse_model(model, dequantize=True)
    model = dequantize_model(model)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    save(directory, args.model, model, tokenizer, config, donate_model=False)
    return directory


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["export", *sys.argv[1:]]))
