"""`nalora export`: write an adapter or a model in the format of another program."""

import argparse
import math
import sys
from pathlib import Path

from nalora_mlx.cli import require_model
from nalora_mlx.core.errors import InputError
from nalora_mlx.export.arguments import DEFAULT_TYPE, build_parser
from nalora_mlx.export.destinations import choose_destination
from nalora_mlx.export.upload import check_upload

__all__ = ["build_parser", "run"]

# Files that an output directory may hold and --overwrite may replace.
ADAPTER_FILES = {"adapter_config.json", "adapters.safetensors", "adapter_model.safetensors"}


def run(args: argparse.Namespace) -> None:
    """Check the flags, find the model, and write the export."""
    _check_flags(args)
    if args.format == "gguf":
        args.type = args.type or DEFAULT_TYPE
        args.destination = choose_destination(args, args.type)
        args.output = args.destination.output
    _check_output(args)
    if args.push_to_hub:
        check_upload(args.push_to_hub)
    from nalora_mlx.adapters.merge_record import reject_twice
    from nalora_mlx.export.formats import WRITERS, with_towers
    from nalora_mlx.models.loading import check_files, print_notice, translated

    directory = check_files(args.model)
    if not with_towers(args, directory):
        for notice in translated(directory, args.model).notices:
            print_notice(notice)
    for adapter in args.adapter_path:
        reject_twice(
            args.model, directory, adapter, ", or leave --adapter-path out" * (args.format == "gguf")
        )
    WRITERS[args.format](args, directory)


def _check_flags(args: argparse.Namespace) -> None:
    """Raise InputError if paths do not exist or flags contradict each other, before anything slow runs."""
    from nalora_mlx.core.paths import check_paths

    require_model(args.model, next(iter(args.adapter_path), None))
    check_paths(args.model)
    for adapter in args.adapter_path:
        check_paths(None, adapter)
    for name in ("type", "ollama", "lmstudio", "dry_run"):
        if (value := getattr(args, name)) and args.format != "gguf":
            flag = "--dry-run" if value is True else f"--{name} {value}"
            raise InputError(f"{flag}: only export gguf takes this flag; leave it out")
    if args.push_to_hub and args.format not in ("mlx", "peft"):
        raise InputError("--push-to-hub: only export mlx and peft take this flag; leave it out")
    if args.output is None and args.format != "gguf":
        raise InputError("--output is missing; say where to write")
    if args.from_peft and (args.format != "mlx" or args.adapter_path):
        raise InputError("--from-peft: only export mlx takes this flag, and without --adapter-path")
    if not args.from_peft and not args.adapter_path and args.format != "gguf":
        raise InputError(f"export {args.format}: nothing to export; give --adapter-path")
    if args.weight and len(args.weight) != len(args.adapter_path):
        raise InputError(
            f"--weight: given {len(args.weight)} times, --adapter-path {len(args.adapter_path)} times; "
            "give one --weight for each --adapter-path"
        )
    if not all(map(math.isfinite, (*args.weight, args.scale))):
        raise InputError("--weight and --scale must be finite numbers")


def _check_output(args: argparse.Namespace) -> None:
    """Expand --output; raise InputError if it must not or cannot be written."""
    from nalora_mlx.core.storage import check_writable

    output = args.output = args.output.expanduser()
    if args.format in ("mlx", "peft"):
        if output.exists() and not _holds_only_adapter(output):
            raise InputError(
                f"--output {output}: exists and is not just an adapter; choose another directory"
            )
    elif output.is_dir():
        raise InputError(f"--output {output}: is a directory; give the name of the file to write")
    if output.exists() and not args.overwrite:
        raise InputError(f"--output {output}: exists; choose another, or give --overwrite")
    check_writable(output.parent)


def _holds_only_adapter(path: Path) -> bool:
    return path.is_dir() and {file.name for file in path.iterdir()} <= ADAPTER_FILES


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["export", *sys.argv[1:]]))
