"""`nalora fuse`: merge an adapter into the weights of its base model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.arguments import Parser, add_chat_flags
from nalora_mlx.cli import configure_chats, require_model
from nalora_mlx.core.errors import InputError, RunError
from nalora_mlx.core.paths import check_paths
from nalora_mlx.export.upload import check_upload, upload_directory

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.adapters.merge_quality import MergeQuality
    from nalora_mlx.export.merged_model import MergedModel
    from nalora_mlx.export.results import Step

DEFAULT_MODEL = "mlx_model"  # as in mlx_lm.fuse


def build_parser(prog: str) -> Parser:
    """Build a parser with the flags of mlx_lm.fuse, our own, and those of the chat template."""
    parser = Parser(
        prog=prog,
        usage="--model MODEL --adapter-path DIR --save-path DIR [options]",
        description="Merge an adapter into the weights of its base model, and measure what the merge keeps.",
        examples="""
        write one model that needs no adapter
          nalora fuse --model Qwen/Qwen3-0.6B --adapter-path adapters --save-path tuned
        merge the adapter with the lowest validation loss
          nalora fuse --model Qwen/Qwen3-0.6B --adapter-path adapters/best --save-path tuned
        merge into a quantized base, and write full precision
          nalora fuse --model mlx-community/Qwen3-0.6B-4bit --adapter-path adapters --dequantize
        """,
        essentials=("model", "adapter_path", "save_path", "bits", "dequantize", "overwrite", "upload_repo"),
    )
    add = parser.add_argument
    add(
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help=f"base model: directory or Hugging Face repo (default: {DEFAULT_MODEL})",
    )
    add(
        "--adapter-path",
        default="adapters",
        metavar="DIR",
        help="directory of the adapter (default: adapters)",
    )
    add("--save-path", default="fused_model", metavar="DIR", help="directory to write (default: fused_model)")
    add(
        "--upload-repo",
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="Hugging Face repo to upload the merged model to",
    )
    add(
        "--bits",
        default="8",
        metavar="BITS",
        help="bits of the merged layers of a quantized base, or 'same' to keep the base's; 4 bits lose most of the "
        "update (default: 8)",
    )
    add("--dequantize", action="store_true", help="write a model without quantized layers")
    add(
        "--keep-all",
        action="store_true",
        help="keep the base's names of tensors and those that mlx-lm does not use, such as a vision tower",
    )
    add("--force", action="store_true", help="write the model even if it loses most of the adapter's effect")
    add("--export-gguf", action="store_true", help="also write the merged model as GGUF (f16)")
    add(
        "--gguf-path",
        default="ggml-model-f16.gguf",
        metavar="FILE",
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
    from nalora_mlx.adapters.files import load_any_adapter
    from nalora_mlx.adapters.merge import check_bits, check_finite_layers, dequantize_scaled_experts
    from nalora_mlx.adapters.merge_record import merge_record, reject_twice
    from nalora_mlx.adapters.vision import needs_vision
    from nalora_mlx.core.storage import read_json
    from nalora_mlx.export.kept_names import choose_names
    from nalora_mlx.export.merge_notes import lost_message, model_notes, next_steps, quality_notes
    from nalora_mlx.export.merged_model import MergedModel
    from nalora_mlx.export.results import print_notes, print_steps
    from nalora_mlx.models.chat_templates import OWN, own_templates
    from nalora_mlx.models.hub import fetch_small_files
    from nalora_mlx.models.loading import check_files
    from nalora_mlx.models.model_files import model_files
    from nalora_mlx.models.stored_tensors import find_stored_tensors, format_bytes
    from nalora_mlx.runs.checkpoints import final_adapters

    bits = None if args.bits == "same" else int(args.bits)
    adapter = Path(args.adapter_path).expanduser()
    source = check_files(args.model)
    reject_twice(args.model, source, args.adapter_path, ", or use this model as it is")
    images = needs_vision(read_json(source / "config.json"), adapter)
    model, tokenizer = _load(args, images)
    if not Path(args.model).expanduser().exists():
        fetch_small_files(args.model)
    if args.export_gguf:
        _check_gguf(target, args.gguf_path, source, adapter)
    check_finite_layers({"": model}, f"--model {args.model}: weights are NaN or infinite")
    stored = find_stored_tensors(model, source)
    quantized = [path for path, module in model.named_modules() if "scales" in module]
    if args.dequantize:
        dequantize_scaled_experts(model)
    load_any_adapter(model, adapter)
    own_template = own_templates(tokenizer).get(OWN)
    chat = configure_chats(tokenizer, args.chat_template, args.chat_template_args, args.adapter_path)
    if not args.dequantize:
        check_bits(model, bits)
    kept = choose_names(args, model, source, stored, quantized, images)
    template = None if chat.template == own_template else chat.template
    files = model_files(source, stored.file_names, template, keeps_quantization=kept is not None)
    model.eval()
    print(
        "merging, and comparing answers before and after; this may take a minute", file=sys.stderr, flush=True
    )
    model, merged, quality = _merge(model, tokenizer, bits, args.dequantize)
    if quality and quality.mostly_lost and not args.force:
        raise InputError(lost_message(args, quality, bool(quantized)))
    record = merge_record(source, adapter, final_adapters(adapter))
    whole = MergedModel(source, model, merged, files, kept, record)
    _write(args, target, whole, quality, images)
    print_notes(
        model_notes(source, stored, files, kept is not None, images, chat) + quality_notes(args, quality)
    )
    if quality:
        print(f"{quality.verdict}\n  ({quality.basis})")
    done = f"merged {len(merged)} layers into" if merged else "wrote the fully trained weights to"
    print(f"{done} {args.save_path} ({format_bytes(whole.nbytes())})")
    steps = next_steps(args, tokenizer, chat, images)
    if args.export_gguf:
        steps += _export_gguf(target, args.gguf_path, tokenizer)
    if args.upload_repo:
        upload_directory(target, args.upload_repo, f"the model is in {target}", "fuse")
    print_steps(steps)


def _load(args: argparse.Namespace, images: bool) -> "tuple[nn.Module, Any]":
    """Load the base model and its tokenizer, through mlx-vlm or mlx-lm.

    Raises:
        InputError: the model cannot be loaded.
        RunError: there is not enough memory.
    """
    if images:
        from nalora_mlx.models.vision.loading import open_processor, open_vision_model

        model, config = open_vision_model(args.model, args.trust_remote_code)
        return model, open_processor(args.model, config, args.trust_remote_code).tokenizer
    from nalora_mlx.models.loading import load_model

    model, tokenizer, _ = load_model(args.model, args.trust_remote_code)
    return model, tokenizer


def _merge(
    model: "nn.Module", tokenizer: Any, bits: int | None, dequantize: bool
) -> "tuple[nn.Module, dict[str, nn.Module], MergeQuality | None]":
    """Merge the adapters of a model in place.

    Returns:
        The model, the merged layers by path, and the merge's quality; None if the model has no adapters.

    Raises:
        InputError: weights are not finite after the merge.
    """
    from mlx_lm.utils import dequantize_model

    from nalora_mlx.adapters.merge import check_finite_layers, fuse_model
    from nalora_mlx.adapters.merge_quality import take_reference

    adapted = any("lora_a" in module for _, module in model.named_modules())
    reference = take_reference(model, tokenizer) if adapted else None
    merged = fuse_model(model, bits, dequantize)
    if dequantize:
        model = dequantize_model(model)
    check_finite_layers(
        merged or {"": model},
        "the merged weights are NaN or infinite, which happens if they exceed float16's 65504; use a bfloat16 or "
        "float32 base",
    )
    return model, merged, reference.compare(model) if reference else None


def _write(
    args: argparse.Namespace,
    target: Path,
    merged: "MergedModel",
    quality: "MergeQuality | None",
    images: bool,
) -> None:
    """Write the merged model's directory, which is complete or absent.

    Raises:
        RunError: the disk is full, or the directory is not writable.
    """
    from nalora_mlx.core.storage import free_space, new_directory
    from nalora_mlx.models.stored_tensors import format_bytes

    needed, free = merged.nbytes(), free_space(target)
    if free < needed:
        raise RunError(
            f"--save-path {args.save_path}: {format_bytes(free)} free, but the model takes {format_bytes(needed)}; "
            "free some disk space, or choose another directory"
        )
    try:
        with new_directory(target) as temporary:
            merged.write(temporary)
            _write_card(args, temporary, merged.base, quality.numbers if quality else None, images)
    except OSError as error:
        raise RunError(
            f"--save-path {args.save_path}: the model could not be written ({error.strerror or error}); choose "
            "another directory"
        ) from error


def _check(args: argparse.Namespace, target: Path) -> None:
    """Check the flags and the output directory, before anything slow."""
    if args.bits not in ("same", "2", "3", "4", "5", "6", "8"):
        raise InputError(f"--bits {args.bits}: choose 2, 3, 4, 5, 6, 8 or same")
    _check_target(target, args)
    if args.model == DEFAULT_MODEL and not Path(DEFAULT_MODEL).exists():
        require_model(None, args.adapter_path)
    check_paths(args.model, args.adapter_path)
    if target == Path(args.model).expanduser().resolve():
        raise InputError(f"--save-path {args.save_path} is the base model itself; give another directory")
    if args.upload_repo:
        check_upload(args.upload_repo, "--upload-repo")


def _check_target(target: Path, args: argparse.Namespace) -> None:
    """Raise InputError if the output directory exists, unless it is a model and --overwrite is given.

    Raises:
        InputError: also if the directory cannot be made or replaced.
    """
    from nalora_mlx.core.storage import check_writable

    try:
        check_writable(target.parent)
    except InputError as error:
        raise InputError(f"--save-path {args.save_path}: {error}") from None
    if not target.exists():
        return
    if not args.overwrite:
        raise InputError(f"--save-path {args.save_path}: exists; choose another, or give --overwrite")
    from nalora_mlx.models.model_files import TEMPLATE_DIRECTORY

    directories = {path.name for path in target.iterdir() if path.is_dir()}
    if not (target / "config.json").is_file() or directories - {TEMPLATE_DIRECTORY}:
        raise InputError(
            f"--save-path {args.save_path}: holds more than a model and is not overwritten; choose another"
        )


def _write_card(
    args: argparse.Namespace, directory: Path, source: Path, kept: str | None, images: bool
) -> None:
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
        images=images,
    )


def _check_gguf(target: Path, name: str, base: Path, adapter: Path) -> None:
    """Check the GGUF export before the merge: the merged model has the base's architecture and tokenizer."""
    from nalora_mlx.core.storage import read_json
    from nalora_mlx.export.gguf.model import check_output, plan_gguf
    from nalora_mlx.export.updates import reject_towers

    if not (target / name).is_relative_to(target):  # a file inside it is replaced with the directory
        check_output(target / name, overwrite=False)
    reject_towers(read_json(base / "config.json"), adapter, "--export-gguf")
    plan_gguf(base, "f16")


def _export_gguf(model: Path, name: str, tokenizer: Any) -> "list[Step]":
    """Write the merged model as GGUF; return how it is used."""
    from nalora_mlx.export.gguf.model import export_gguf
    from nalora_mlx.export.modelfile import write_modelfile
    from nalora_mlx.export.results import gguf_steps, print_notes, print_written
    from nalora_mlx.models.stored_tensors import format_bytes

    result = export_gguf(model, model / name, "f16")
    modelfile, notes = write_modelfile(result.path, tokenizer)
    print_notes(result.notes + notes)
    print_written(result.path, f"{result.type}, {format_bytes(result.bytes)}")
    print_written(modelfile, "for Ollama")
    return gguf_steps(result.path, modelfile)


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["fuse", *sys.argv[1:]]))
