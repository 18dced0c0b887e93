"""`nalora fuse`: merge adapters into the weights of a model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.cli import Parser
from nalora_mlx.errors import InputError
from nalora_mlx.models import check_paths

if TYPE_CHECKING:
    import mlx.nn as nn


def build_parser(prog: str) -> Parser:
    """Take the flags of mlx_lm.fuse, and ours."""
    parser = Parser(prog=prog, description="Merge fine-tuned adapters into the weights of their base model.")
    add = parser.add_argument
    add(
        "--model", default="mlx_model", help="base model: directory or Hugging Face repo (default: mlx_model)"
    )
    add("--save-path", default="fused_model", help="directory to write (default: fused_model)")
    add("--adapter-path", default="adapters", help="directory of the adapter (default: adapters)")
    add("--upload-repo", help="Hugging Face repo to upload the fused model to")
    add(
        "--bits",
        default="8",
        help="on a quantized base: bits of the adapted layers, or 'same' as before, which mostly loses the "
        "update at 4 bits (default: 8)",
    )
    add("--dequantize", action="store_true", help="write a model without quantized layers")
    add("--export-gguf", action="store_true", help="write the fused model as GGUF (f16) as well")
    add("--gguf-path", default="ggml-model-f16.gguf", help="its name (default: ggml-model-f16.gguf)")
    add("--overwrite", action="store_true", help="replace what is at --save-path")
    add("--trust-remote-code", action="store_true", help="run code that the model brings along")
    return parser


def run(args: argparse.Namespace) -> None:
    """Load, merge, write."""
    if args.bits not in ("same", "2", "3", "4", "5", "6", "8"):
        raise InputError(f"--bits {args.bits}: choose 2, 3, 4, 5, 6, 8 or same")
    target = Path(args.save_path).expanduser().resolve()
    _check_target(target, args)
    check_paths(args.model, args.adapter_path)
    from mlx_lm.utils import dequantize_model, save, upload_to_hub

    from nalora_mlx.adapters import fuse_model, load_any_adapter
    from nalora_mlx.checkpoint import new_directory
    from nalora_mlx.models import load_model

    model, tokenizer, config = load_model(args.model, args.trust_remote_code)
    load_any_adapter(model, Path(args.adapter_path).expanduser())
    model.eval()
    merged = fuse_model(model, None if args.bits == "same" else int(args.bits), args.dequantize)
    if args.dequantize:
        model = dequantize_model(model)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    else:
        _describe_bits(config, merged)
    with new_directory(target) as temporary:
        save(temporary, args.model, model, tokenizer, config, donate_model=False)
    what = f"merged {len(merged)} layers into" if merged else "wrote the fully trained weights to"
    print(f"{what} {args.save_path}")
    if args.export_gguf:
        from nalora_mlx.export.gguf_model import export_gguf

        report = export_gguf(target, target / args.gguf_path, "f16")
        for note in report.notes:
            print(f"note: {note}")
        print(f"wrote {report.path}")
    if args.upload_repo:
        upload_to_hub(str(target), args.upload_repo)


def _check_target(target: Path, args: argparse.Namespace) -> None:
    """Refuse to write over anything but a model, and over that unless asked."""
    if not target.exists():
        return
    if not args.overwrite:
        raise InputError(f"--save-path {args.save_path}: exists; choose another, or give --overwrite")
    if not (target / "config.json").is_file() or any(path.is_dir() for path in target.iterdir()):
        raise InputError(
            f"--save-path {args.save_path}: holds more than a model, and is not overwritten; choose another"
        )


def _describe_bits(config: dict[str, Any], merged: "dict[str, nn.Module]") -> None:
    """Tell the config about layers whose bits differ from the model's, so that mlx-lm loads them."""
    quantization = config.get("quantization")
    if not quantization:
        return
    for path, layer in merged.items():
        if "scales" in layer:
            quantization[path] = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["fuse", *sys.argv[1:]]))
