"""`nalora fuse`: merge an adapter into the weights of its base model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.cli import Parser, add_chat_flags, configure_chats
from nalora_mlx.core.errors import InputError, RunError, first_line
from nalora_mlx.core.paths import check_paths

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.adapters.merge_quality import MergeQuality


def build_parser(prog: str) -> Parser:
    """Build a parser with the flags of mlx_lm.fuse, our own, and those of the chat template."""
    parser = Parser(prog=prog, description="Merge an adapter into the weights of its base model.")
    add = parser.add_argument
    add(
        "--model", default="mlx_model", help="base model: directory or Hugging Face repo (default: mlx_model)"
    )
    add("--save-path", default="fused_model", help="directory to write (default: fused_model)")
    add("--adapter-path", default="adapters", help="directory of the adapter (default: adapters)")
    add("--upload-repo", help="Hugging Face repo to upload the merged model to")
    add(
        "--bits",
        default="8",
        help="bits of the merged layers of a quantized base, or 'same' to keep the base's; 4 bits lose most of the "
        "update (default: 8)",
    )
    add("--dequantize", action="store_true", help="write a model without quantized layers")
    add("--force", action="store_true", help="write the model even if it loses most of the adapter's effect")
    add("--export-gguf", action="store_true", help="also write the merged model as GGUF (f16)")
    add(
        "--gguf-path",
        default="ggml-model-f16.gguf",
        help="name of the GGUF file (default: ggml-model-f16.gguf)",
    )
    add("--overwrite", action="store_true", help="replace the model at --save-path")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add_chat_flags(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Load the model and its adapter, merge them, measure what the merge keeps, and write the result."""
    target = Path(args.save_path).expanduser().resolve()
    _check(args, target)
    from mlx_lm.utils import save

    from nalora_mlx.adapters.files import load_any_adapter
    from nalora_mlx.adapters.merge import check_bits, dequantize_scaled_experts
    from nalora_mlx.core.storage import new_directory
    from nalora_mlx.models.chat_templates import format_args
    from nalora_mlx.models.loading import load_model, local_directory

    bits = None if args.bits == "same" else int(args.bits)
    model, tokenizer, config = load_model(args.model, args.trust_remote_code)
    source = local_directory(args.model)
    if args.export_gguf:
        _check_gguf(target, args.gguf_path, source)
    if args.dequantize:
        dequantize_scaled_experts(model)
    load_any_adapter(model, Path(args.adapter_path).expanduser())
    chat = configure_chats(tokenizer, args.chat_template, args.chat_template_args, args.adapter_path)
    if not args.dequantize:
        check_bits(model, bits)
    model.eval()
    print("merging, and comparing answers before and after; this may take a minute", flush=True)
    model, merged, quality = _merge(model, tokenizer, config, bits, args.dequantize)
    if quality:
        print(f"kept: {quality}")
        if quality.mostly_lost and not args.force:
            raise InputError(_lost_message(args, quality, "quantization" in config))
    with new_directory(target) as temporary:
        save(temporary, source, model, tokenizer, config, donate_model=False)
        _write_card(args, temporary, source, str(quality) if quality else None)
    done = f"merged {len(merged)} layers into" if merged else "wrote the fully trained weights to"
    print(f"{done} {args.save_path}")
    if chat.args:
        print(
            f"note: a model cannot hold arguments of its chat template; use it with {format_args(chat.args)}"
        )
    if args.export_gguf:
        _export_gguf(target, args.gguf_path, tokenizer)
    if args.upload_repo:
        _upload(target, args.upload_repo)


def _merge(
    model: "nn.Module", tokenizer: Any, config: dict[str, Any], bits: int | None, dequantize: bool
) -> "tuple[nn.Module, dict[str, nn.Module], MergeQuality | None]":
    """Merge the adapters of a model and describe the result in its config, both in place.

    Returns:
        The model, the merged layers by path, and the merge's quality; None if the model has no adapters.
    """
    from mlx_lm.utils import dequantize_model

    from nalora_mlx.adapters.merge import fuse_model, record_bits
    from nalora_mlx.adapters.merge_quality import take_reference

    adapted = any("lora_a" in module for _, module in model.named_modules())
    reference = take_reference(model, tokenizer) if adapted else None
    merged = fuse_model(model, bits, dequantize)
    if dequantize:
        model = dequantize_model(model)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    else:
        record_bits(config, merged)
    return model, merged, reference.compare(model) if reference else None


def _check(args: argparse.Namespace, target: Path) -> None:
    """Check the flags and the output directory, before anything slow."""
    if args.bits not in ("same", "2", "3", "4", "5", "6", "8"):
        raise InputError(f"--bits {args.bits}: choose 2, 3, 4, 5, 6, 8 or same")
    _check_target(target, args)
    check_paths(args.model, args.adapter_path)
    if args.upload_repo:
        from huggingface_hub import get_token
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(args.upload_repo)
        except HFValidationError as error:
            raise InputError(f"--upload-repo {args.upload_repo}: {error}") from None
        if get_token() is None:
            raise InputError("--upload-repo: you are not logged in to Hugging Face; run hf auth login first")


def _check_target(target: Path, args: argparse.Namespace) -> None:
    """Raise InputError if the output directory exists, unless it is a model and --overwrite is given."""
    if not target.exists():
        return
    if not args.overwrite:
        raise InputError(f"--save-path {args.save_path}: exists; choose another, or give --overwrite")
    if not (target / "config.json").is_file() or any(path.is_dir() for path in target.iterdir()):
        raise InputError(
            f"--save-path {args.save_path}: holds more than a model and is not overwritten; choose another"
        )


def _lost_message(args: argparse.Namespace, quality: "MergeQuality", quantized: bool) -> str:
    """Say that a merge loses most of the adapter's effect, and what to do."""
    lost = f"the merged model loses most of the adapter's effect ({quality})"
    if quantized:
        better = "--dequantize" if args.bits == "8" else "--bits 8 or --dequantize"
        return f"--bits {args.bits}: {lost}; give {better}, or --force to write it anyway"
    flag = "--dequantize" if args.dequantize else f"--model {args.model}"
    return (
        f"{flag}: {lost}, because the update is smaller than 16-bit weights can represent; use the adapter unmerged, "
        "or give --force to write it anyway"
    )


def _write_card(args: argparse.Namespace, directory: Path, source: Path, kept: str | None) -> None:
    """Replace mlx-lm's model card with our own."""
    from nalora_mlx.adapters.files import read_adapter_config
    from nalora_mlx.core.paths import is_hub_name
    from nalora_mlx.core.storage import read_json
    from nalora_mlx.export.model_card import write_card
    from nalora_mlx.models.hub import card_metadata, original_name

    adapter = Path(args.adapter_path).expanduser()
    config = read_json(source / "config.json")
    name = args.model if is_hub_name(args.model) else original_name(args.model, source, config)
    write_card(
        directory,
        title=args.upload_repo or Path(args.save_path).expanduser().resolve().name,
        base=name,
        inherited=card_metadata(source),
        adapter=adapter,
        adapter_config=read_adapter_config(adapter),
        merge_quality=kept,
    )


def _check_gguf(target: Path, name: str, base: Path) -> None:
    """Check the GGUF export before the merge: the merged model has the base's architecture and tokenizer."""
    from nalora_mlx.export.gguf.model import check_output, plan_gguf

    if not (target / name).is_relative_to(target):  # a file inside it is replaced with the directory
        check_output(target / name, overwrite=False)
    plan_gguf(base, "f16")


def _export_gguf(model: Path, name: str, tokenizer: Any) -> None:
    from nalora_mlx.export.gguf.model import export_gguf
    from nalora_mlx.export.modelfile import write_modelfile

    report = export_gguf(model, model / name, "f16")
    modelfile, notes = write_modelfile(report.path, tokenizer)
    for note in report.notes + notes:
        print(f"note: {note}")
    print(f"wrote {report.path} and {modelfile.name}")


def _upload(directory: Path, repo: str) -> None:
    """Upload a model to the Hub; the local copy stays even if the upload fails."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id=repo, exist_ok=True)
        api.upload_folder(folder_path=directory, repo_id=repo, commit_message="Upload with nalora fuse")
    except Exception as error:
        raise RunError(
            f"uploading to {repo} failed ({first_line(error)}); the model is in {directory}"
        ) from error
    print(f"uploaded to https://huggingface.co/{repo}")


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["fuse", *sys.argv[1:]]))
