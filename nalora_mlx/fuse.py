"""`nalora fuse`: merge adapters into the weights of a model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.cli import Parser
from nalora_mlx.core.errors import InputError, RunError, first_line
from nalora_mlx.core.paths import check_paths

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
    add("--force", action="store_true", help="write a model that loses most of what the adapter does")
    add("--export-gguf", action="store_true", help="write the fused model as GGUF (f16) as well")
    add("--gguf-path", default="ggml-model-f16.gguf", help="its name (default: ggml-model-f16.gguf)")
    add("--overwrite", action="store_true", help="replace what is at --save-path")
    add("--trust-remote-code", action="store_true", help="run code that the model brings along")
    return parser


def run(args: argparse.Namespace) -> None:
    """Load, merge, measure, write."""
    target = Path(args.save_path).expanduser().resolve()
    _check(args, target)
    from mlx_lm.utils import dequantize_model, save

    from nalora_mlx.adapters.files import load_any_adapter
    from nalora_mlx.adapters.merge import fuse_model
    from nalora_mlx.adapters.merge_quality import take_reference
    from nalora_mlx.core.storage import new_directory
    from nalora_mlx.models.loading import load_model, local_directory

    model, tokenizer, config = load_model(args.model, args.trust_remote_code)
    source = local_directory(args.model)
    if args.export_gguf:
        _check_gguf(target, args.gguf_path, source)
    if args.dequantize:
        _dequantize_scaled_experts(model)
    load_any_adapter(model, Path(args.adapter_path).expanduser())
    if not args.dequantize:
        _check_layers(model, args.bits)
    model.eval()
    print("merging, and comparing answers before and after, which may take a minute", flush=True)
    adapted = any("lora_a" in module for _, module in model.named_modules())
    reference = take_reference(model, tokenizer) if adapted else None
    merged = fuse_model(model, None if args.bits == "same" else int(args.bits), args.dequantize)
    if args.dequantize:
        model = dequantize_model(model)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    else:
        _describe_bits(config, merged)
    kept = reference.compare(model) if reference else None
    if kept:
        print(f"kept: {kept}")
        if kept.mostly_lost and not args.force:
            raise InputError(_refusal(args, str(kept), "quantization" in config))
    with new_directory(target) as temporary:
        save(temporary, source, model, tokenizer, config, donate_model=False)
        _write_card(args, temporary, source, str(kept) if kept else None)
    what = f"merged {len(merged)} layers into" if merged else "wrote the fully trained weights to"
    print(f"{what} {args.save_path}")
    if args.export_gguf:
        _export_gguf(target, args.gguf_path, tokenizer)
    if args.upload_repo:
        _upload(target, args.upload_repo)


def _check(args: argparse.Namespace, target: Path) -> None:
    """Refuse what can be refused before anything slow."""
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
    """Refuse to write over anything but a model, and over that unless asked."""
    if not target.exists():
        return
    if not args.overwrite:
        raise InputError(f"--save-path {args.save_path}: exists; choose another, or give --overwrite")
    if not (target / "config.json").is_file() or any(path.is_dir() for path in target.iterdir()):
        raise InputError(
            f"--save-path {args.save_path}: holds more than a model, and is not overwritten; choose another"
        )


def _dequantize_scaled_experts(model: "nn.Module") -> None:
    """Make experts dense that have a scale for each expert, which mlx-lm's dequantize_model leaves out."""
    from mlx.utils import tree_unflatten
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    from nalora_mlx.adapters.layers import dequantized

    made = []
    for path, old in model.named_modules():
        if isinstance(old, QuantizedSwitchLinear) and old.global_scale is not None:
            new = SwitchLinear(1, 1, 1, bias=False)
            new.weight = dequantized(old)
            if "bias" in old:
                new.bias = old.bias
            made.append((path, new))
    model.update_modules(tree_unflatten(made))


def _check_layers(model: "nn.Module", bits: str) -> None:
    """Refuse to merge into a quantized layer that has no such bits."""
    for path, module in model.named_modules():
        base = module.get("linear", module.get("embedding")) if "lora_a" in module else None
        if base is None or "scales" not in base:
            continue
        columns = base.scales.shape[-1] * base.group_size
        if base.get("global_scale") is not None:
            raise InputError(f"--bits {bits}: {path} has a scale for each expert; give --dequantize")
        if bits != "same" and base.mode != "affine" and columns % 32:
            raise InputError(
                f"--bits {bits}: {path} has rows of {columns}, no multiple of the 32 that share a scale at these "
                "bits; give --bits same or --dequantize"
            )


def _refusal(args: argparse.Namespace, kept: str, quantized: bool) -> str:
    """Why a merge that loses the effect is not written, and what could help."""
    lost = f"the merged model loses most of what the adapter does ({kept})"
    if quantized:
        better = "--dequantize" if args.bits == "8" else "--bits 8 or --dequantize"
        return f"--bits {args.bits}: {lost}; give {better}, or --force to write it all the same"
    flag = "--dequantize" if args.dequantize else f"--model {args.model}"
    return (
        f"{flag}: {lost}, for the update is finer than weights of 16 bits; use the adapter unmerged, or give "
        "--force to write it all the same"
    )


def _describe_bits(config: dict[str, Any], merged: "dict[str, nn.Module]") -> None:
    """Tell the config about layers whose bits differ from the model's, so that mlx-lm loads them."""
    quantization = config.get("quantization")
    if not quantization:
        return
    for path, layer in merged.items():
        if "scales" in layer:
            quantization[path] = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}


def _write_card(args: argparse.Namespace, directory: Path, source: Path, kept: str | None) -> None:
    """Put our model card in the place of mlx-lm's."""
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
        description=read_adapter_config(adapter),
        kept=kept,
    )


def _check_gguf(target: Path, name: str, base: Path) -> None:
    """Refuse here, not after the model is written: the merged model will have the base's form and tokens."""
    from nalora_mlx.export.gguf_model import check_output, plan_gguf

    if not (target / name).is_relative_to(target):  # what is in the directory goes with it
        check_output(target / name, overwrite=False)
    plan_gguf(base, "f16")


def _export_gguf(model: Path, name: str, tokenizer: Any) -> None:
    from nalora_mlx.export.gguf_model import export_gguf
    from nalora_mlx.export.modelfile import write_modelfile

    report = export_gguf(model, model / name, "f16")
    modelfile, notes = write_modelfile(report.path, tokenizer)
    for note in report.notes + notes:
        print(f"note: {note}")
    print(f"wrote {report.path} and {modelfile.name}")


def _upload(directory: Path, repo: str) -> None:
    """Put a directory on the Hub; what is written here stays, whatever becomes of it."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id=repo, exist_ok=True)
        api.upload_folder(folder_path=directory, repo_id=repo, commit_message="Upload with nalora fuse")
    except Exception as error:
        raise RunError(
            f"uploading to {repo} failed, the model is in {directory}: {first_line(error)}"
        ) from error
    print(f"uploaded to https://huggingface.co/{repo}")


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["fuse", *sys.argv[1:]]))
