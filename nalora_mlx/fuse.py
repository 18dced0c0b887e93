"""`nalora fuse`: merge an adapter into the weights of its base model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.cli import Parser, add_chat_flags, configure_chats, note_merged
from nalora_mlx.core.errors import InputError, RunError
from nalora_mlx.core.paths import check_paths
from nalora_mlx.export.upload import check_upload, upload_directory

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.adapters.merge_quality import MergeQuality
    from nalora_mlx.export.merged_model import KeptNames, MergedModel
    from nalora_mlx.models.model_files import ModelFiles
    from nalora_mlx.models.stored_tensors import StoredTensors


def build_parser(prog: str) -> Parser:
    """Build a parser with the flags of mlx_lm.fuse, our own, and those of the chat template."""
    parser = Parser(prog=prog, description="Merge an adapter into the weights of its base model.")
    add = parser.add_argument
    add(
        "--model", default="mlx_model", help="base model: directory or Hugging Face repo (default: mlx_model)"
    )
    add("--save-path", default="fused_model", help="directory to write (default: fused_model)")
    add("--adapter-path", default="adapters", help="directory of the adapter (default: adapters)")
    add(
        "--upload-repo",
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="Hugging Face repo to upload the merged model to",
    )
    add(
        "--bits",
        default="8",
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
    from nalora_mlx.export.merged_model import MergedModel
    from nalora_mlx.models.chat_templates import OWN, format_args, own_templates
    from nalora_mlx.models.hub import fetch_small_files
    from nalora_mlx.models.loading import load_model, local_directory
    from nalora_mlx.models.model_files import model_files
    from nalora_mlx.models.stored_tensors import find_stored_tensors

    bits = None if args.bits == "same" else int(args.bits)
    adapter = Path(args.adapter_path).expanduser()
    model, tokenizer, _ = load_model(args.model, args.trust_remote_code)
    source = local_directory(args.model)
    if not Path(args.model).expanduser().exists():
        fetch_small_files(args.model)
    if args.export_gguf:
        _check_gguf(target, args.gguf_path, source)
    check_finite_layers({"": model}, f"--model {args.model}: weights are NaN or infinite")
    stored = find_stored_tensors(model, source)
    quantized = [path for path, module in model.named_modules() if "scales" in module]
    if args.dequantize:
        dequantize_scaled_experts(model)
    load_any_adapter(model, adapter)
    note_merged(args.model, args.adapter_path)
    own_template = own_templates(tokenizer).get(OWN)
    chat = configure_chats(tokenizer, args.chat_template, args.chat_template_args, args.adapter_path)
    if not args.dequantize:
        check_bits(model, bits)
    kept = _keep_names(args, model, stored, quantized) if args.keep_all else None
    template = None if chat.template == own_template else chat.template
    files = model_files(source, stored.file_names, template, keeps_quantization=args.keep_all)
    model.eval()
    print("merging, and comparing answers before and after; this may take a minute", flush=True)
    model, merged, quality = _merge(model, tokenizer, bits, args.dequantize)
    if quality:
        print(f"kept: {quality}")
        if quality.mostly_lost and not args.force:
            raise InputError(_lost_message(args, quality, bool(quantized)))
    _write(args, target, MergedModel(source, model, merged, files, kept), quality)
    done = f"merged {len(merged)} layers into" if merged else "wrote the fully trained weights to"
    print(f"{done} {args.save_path}")
    for note in _notes(source, stored, files, args.keep_all):
        print(f"note: {note}")
    if chat.args:
        print(
            f"note: a model cannot hold arguments of its chat template; use it with {format_args(chat.args)}"
        )
    if args.export_gguf:
        _export_gguf(target, args.gguf_path, tokenizer)
    if args.upload_repo:
        upload_directory(target, args.upload_repo, f"the model is in {target}", "fuse")


def _keep_names(
    args: argparse.Namespace, model: "nn.Module", stored: "StoredTensors", quantized: list[str]
) -> "KeptNames":
    """Return where the arrays that the merge will change belong in the base's files.

    Raises:
        InputError: some cannot be written back, or kept tensors are quantized in spite of --dequantize.
    """
    from nalora_mlx.adapters.files import ADAPTER_FILE
    from nalora_mlx.core.storage import array_shapes
    from nalora_mlx.export.merged_model import keep_names

    layers = {path for path, module in model.named_modules() if "lora_a" in module}
    arrays = [] if layers else list(array_shapes(Path(args.adapter_path).expanduser() / ADAPTER_FILE))
    if args.dequantize:
        if still := [name for name in stored.unused if name.endswith(".scales")]:
            raise InputError(
                f"--keep-all: {still[0].removesuffix('.scales')} is quantized and kept, so that --dequantize would "
                "make only a part of the model dense; leave one of the two out"
            )
        layers |= set(quantized)
    return keep_names(stored, sorted(layers), arrays)


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
    args: argparse.Namespace, target: Path, merged: "MergedModel", quality: "MergeQuality | None"
) -> None:
    """Write the merged model's directory, which is complete or absent.

    Raises:
        RunError: the disk is full, or the directory is not writable.
    """
    from nalora_mlx.adapters.merge_record import RECORD_FILE, merge_record
    from nalora_mlx.core.storage import free_space, json_writer, new_directory
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
            record = merge_record(merged.base, Path(args.adapter_path).expanduser())
            json_writer(record)(temporary / RECORD_FILE)
            _write_card(args, temporary, merged.base, str(quality) if quality else None)
    except OSError as error:
        raise RunError(
            f"--save-path {args.save_path}: the model could not be written ({error.strerror or error}); choose "
            "another directory"
        ) from error


def _notes(source: Path, stored: "StoredTensors", files: "ModelFiles", keep_all: bool) -> list[str]:
    """Say what the merged model lacks of its base, and what differs."""
    from nalora_mlx.core.storage import read_json
    from nalora_mlx.models.config_translation import mlx_lm_ignores_rope

    notes = []
    if not keep_all and (unused := stored.describe_unused()):
        notes.append(f"not copied, because mlx-lm does not use it: {unused}; --keep-all keeps it")
    if not keep_all and stored.has_own_layout:
        notes.append(
            "tensors have the names and forms of mlx-lm, which differ from the base's, so that only programs based on "
            "mlx-lm load the model; --keep-all writes those of the base"
        )
    if left := files.describe_left_behind():
        notes.append(f"not copied: {left}")
    if files.written:
        names = " and ".join(sorted(files.written))
        notes.append(f"the chat template is the one that the adapter was trained with, in {names}")
    if mlx_lm_ignores_rope(read_json(source / "config.json")):
        notes.append(
            "as with the base, mlx-lm's own commands ignore rope_parameters in config.json; use nalora's"
        )
    return notes


def _check(args: argparse.Namespace, target: Path) -> None:
    """Check the flags and the output directory, before anything slow."""
    if args.bits not in ("same", "2", "3", "4", "5", "6", "8"):
        raise InputError(f"--bits {args.bits}: choose 2, 3, 4, 5, 6, 8 or same")
    _check_target(target, args)
    check_paths(args.model, args.adapter_path)
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


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["fuse", *sys.argv[1:]]))
