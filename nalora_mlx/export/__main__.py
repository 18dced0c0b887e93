"""`nalora export`: write what other tools read."""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.cli import Parser
from nalora_mlx.core.errors import InputError

if TYPE_CHECKING:
    from nalora_mlx.export.lazy_model import LazyModel
    from nalora_mlx.export.updates import Updates

FORMATS = {
    "mlx": "the adapter for mlx-lm, from a checkpoint, a PEFT adapter, or several adapters",
    "peft": "the adapter for transformers + PEFT and vLLM",
    "gguf": "the model, adapter merged in, for llama.cpp, Ollama, LM Studio",
    "gguf-lora": "the adapter alone, for llama.cpp and Ollama",
}
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_m", "q5_k_m", "q6_k")
ADAPTER_FILES = {"adapter_config.json", "adapters.safetensors", "adapter_model.safetensors"}


def build_parser(prog: str) -> Parser:
    """Take the format, the model, the adapters and the target."""
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser = Parser(prog=prog, description=f"Write what other tools read. {formats}.")
    add = parser.add_argument
    add("format", choices=tuple(FORMATS), help="what to write")
    add("--model", required=True, help="base model: directory or Hugging Face repo")
    add(
        "--adapter-path",
        action="append",
        default=[],
        metavar="DIR",
        help="directory of an adapter, or of a checkpoint; several are added up",
    )
    add(
        "--weight",
        action="append",
        type=float,
        default=[],
        metavar="N",
        help="factor on an adapter: one for each --adapter-path, in their order (default: 1)",
    )
    add(
        "--scale",
        type=float,
        default=1.0,
        metavar="N",
        help="factor on all that the adapters do (default: 1)",
    )
    add("--from-peft", metavar="DIR", help="for mlx: a PEFT adapter in the place of --adapter-path")
    add("--output", required=True, type=Path, help="file to write; for mlx and peft a directory")
    add("--type", choices=TYPES, help="for gguf: type of the weights (default: f16)")
    add("--overwrite", action="store_true", help="replace what is at --output")
    return parser


def run(args: argparse.Namespace) -> None:
    """Check the flags, then write."""
    _check(args)
    from nalora_mlx.models.loading import check_files

    directory = check_files(args.model)
    if args.format in ("mlx", "peft"):
        _adapter_directory(args, directory)
    else:
        _gguf(args, directory)


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything slow."""
    from nalora_mlx.core.paths import check_paths

    args.output = args.output.expanduser()
    check_paths(args.model)
    for adapter in args.adapter_path:
        check_paths(None, adapter)
    if args.type and args.format != "gguf":
        raise InputError(f"--type {args.type}: is for export gguf alone; leave it out")
    if args.from_peft and (args.format != "mlx" or args.adapter_path):
        raise InputError("--from-peft: is for export mlx, in the place of --adapter-path")
    if not args.from_peft and not args.adapter_path and args.format != "gguf":
        raise InputError(f"export {args.format}: has nothing to write; give --adapter-path")
    if args.weight and len(args.weight) != len(args.adapter_path):
        raise InputError(
            f"--weight: {len(args.weight)} for {len(args.adapter_path)} --adapter-path; give one for each"
        )
    if not all(map(math.isfinite, (*args.weight, args.scale))):
        raise InputError("--weight and --scale must be finite numbers")
    output = args.output
    if args.format in ("mlx", "peft"):
        foreign = output.exists() and not (output.is_dir() and _names(output) <= ADAPTER_FILES)
        if foreign:
            raise InputError(f"--output {output}: is there and holds more than an adapter; choose another")
    elif output.is_dir():
        raise InputError(f"--output {output}: is a directory; give the name of the file to write")
    if output.exists() and not args.overwrite:
        raise InputError(f"--output {output}: exists; choose another, or give --overwrite")


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def _updates(args: argparse.Namespace, opened: "LazyModel") -> "Updates":
    """The sum of the adapters that were given."""
    from nalora_mlx.export.peft import read_peft
    from nalora_mlx.export.updates import combine, read_updates

    if args.from_peft:
        adapters = [read_peft(Path(args.from_peft).expanduser(), opened)]
    else:
        adapters = [read_updates(Path(path).expanduser(), opened.sources) for path in args.adapter_path]
    weights = args.weight or [1.0] * len(adapters)
    return combine(adapters, [args.scale * weight for weight in weights])


def _adapter_directory(args: argparse.Namespace, directory: Path) -> None:
    from nalora_mlx.export.lazy_model import open_model
    from nalora_mlx.export.mlx_adapter import export_mlx
    from nalora_mlx.export.peft import export_peft
    from nalora_mlx.models.hub import original_name

    opened = open_model(directory)
    updates = _updates(args, opened)
    if args.format == "mlx":
        count = export_mlx(opened, updates, args.output)
    else:
        base = original_name(args.model, directory, opened.config)
        count = export_peft(opened, updates, args.output, base)
        if base is None:
            print("note: the base model's name on the Hub is not known, so that PEFT's config names none")
    print(f"wrote {args.output}: {count} adapted modules")


def _gguf(args: argparse.Namespace, directory: Path) -> None:
    from nalora_mlx.export.modelfile import write_modelfile

    # By the name of the model, which may be a link or a snapshot's directory.
    name = Path(args.model).expanduser().resolve().name
    if args.format == "gguf":
        from nalora_mlx.export.gguf_model import export_gguf

        updates = (lambda opened: _updates(args, opened)) if args.adapter_path else None
        report = export_gguf(
            directory, args.output, args.type or "f16", updates=updates, overwrite=args.overwrite, name=name
        )
        base = None
    else:
        from nalora_mlx.export.gguf_adapter import export_gguf_lora
        from nalora_mlx.export.lazy_model import open_model

        opened = open_model(directory)
        report = export_gguf_lora(opened, _updates(args, opened), args.output, overwrite=args.overwrite)
        base = f"{name}.gguf"
    modelfile, notes = write_modelfile(report.path, _tokenizer(directory), base)
    for note in report.notes + notes:
        print(f"note: {note}")
    size = f"{report.tensors} tensors, {report.bytes / 1e6:.0f} MB"
    print(f"wrote {report.path} and {modelfile.name}: {report.architecture}, {report.type}, {size}")


def _tokenizer(directory: Path) -> Any:
    """The tokenizer, for its chat template; None where transformers cannot read it, which GGUF can do without."""
    from mlx_lm.tokenizer_utils import load

    try:
        return load(directory)
    except Exception:
        return None


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["export", *sys.argv[1:]]))
