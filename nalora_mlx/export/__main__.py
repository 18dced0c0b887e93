"""`nalora export`: write an adapter or a model in the format of another program."""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.cli import Parser, note_merged
from nalora_mlx.core.errors import InputError
from nalora_mlx.export.destinations import choose_destination
from nalora_mlx.export.upload import check_upload, upload_adapter

if TYPE_CHECKING:
    from nalora_mlx.export.lazy_model import LazyModel
    from nalora_mlx.export.updates import AdapterUpdates
    from nalora_mlx.models.chat_templates import ChatSettings

FORMATS = {
    "mlx": "an adapter for mlx-lm, from a checkpoint, a PEFT adapter, or several adapters",
    "peft": "an adapter for transformers + PEFT and vLLM",
    "gguf": "the model with the adapter merged, for llama.cpp, Ollama, LM Studio",
    "gguf-lora": "the adapter alone, for llama.cpp and Ollama",
}
DEFAULT_TYPE = "f16"
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_m", "q5_k_m", "q6_k")
# Files that an output directory may hold and --overwrite may replace.
ADAPTER_FILES = {"adapter_config.json", "adapters.safetensors", "adapter_model.safetensors"}


def build_parser(prog: str) -> Parser:
    """Build the parser: the format, the model, the adapters and the output."""
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser = Parser(prog=prog, description=f"Export an adapter or a model to other programs. {formats}.")
    add = parser.add_argument
    add("format", choices=tuple(FORMATS), help="what to write")
    add("--model", required=True, help="base model: directory or Hugging Face repo")
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
    add("--from-peft", metavar="DIR", help="for mlx: convert a PEFT adapter, instead of --adapter-path")
    add("--output", type=Path, help="file to write; for mlx and peft a directory; optional with --lmstudio")
    add("--type", choices=TYPES, help=f"for gguf: type of the weights (default: {DEFAULT_TYPE})")
    add("--ollama", metavar="NAME", help="for gguf: add the model to Ollama, with ollama create")
    add(
        "--lmstudio",
        metavar="PUBLISHER/NAME",
        help="for gguf: write the model into LM Studio's directory; with --output, make it appear there too",
    )
    add("--dry-run", action="store_true", help="for gguf: only say what would be written and run")
    add(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="for mlx and peft: upload the adapter to this Hugging Face repo",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace an existing --output, and a model of Ollama or LM Studio",
    )
    return parser


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
    from nalora_mlx.models.loading import check_files, print_notice, translated

    directory = check_files(args.model)
    for notice in translated(directory, args.model).notices:
        print_notice(notice)
    for adapter in args.adapter_path:
        note_merged(args.model, adapter)
    if args.format == "mlx":
        _export_mlx(args, directory)
    elif args.format == "peft":
        _export_peft(args, directory)
    elif args.format == "gguf":
        _export_gguf(args, directory)
    else:
        _export_gguf_lora(args, directory)


def _check_flags(args: argparse.Namespace) -> None:
    """Raise InputError if paths do not exist or flags contradict each other, before anything slow runs."""
    from nalora_mlx.core.paths import check_paths

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


def _export_mlx(args: argparse.Namespace, directory: Path) -> None:
    from nalora_mlx.export.lazy_model import open_model
    from nalora_mlx.export.mlx_adapter import export_mlx

    model = open_model(directory)
    count = export_mlx(model, _read_adapters(args, model), args.output, _read_chat_settings(args))
    print(f"wrote {args.output}: {count} adapted modules")
    _push(args)


def _export_peft(args: argparse.Namespace, directory: Path) -> None:
    from nalora_mlx.export.lazy_model import open_model
    from nalora_mlx.export.peft import export_peft
    from nalora_mlx.models.hub import original_name

    model = open_model(directory)
    base = original_name(args.model, directory, model.config)
    count = export_peft(model, _read_adapters(args, model), args.output, base)
    if base is None:
        print("note: the base model's name on the Hub is unknown, so PEFT's config does not name it")
    chat = _read_chat_settings(args)
    if chat.template is not None:
        print("note: a PEFT adapter holds no chat template, and this one was trained with its own")
    _print_template_args(chat)
    print(f"wrote {args.output}: {count} adapted modules")
    _push(args)


def _push(args: argparse.Namespace) -> None:
    """Upload the exported adapter, if --push-to-hub says so."""
    if args.push_to_hub:
        upload_adapter(
            args.output,
            args.push_to_hub,
            "export",
            model=args.model,
            trained=[Path(path).expanduser() for path in args.adapter_path],
            scaled=args.scale != 1 or any(weight != 1 for weight in args.weight),
        )


def _export_gguf(args: argparse.Namespace, directory: Path) -> None:
    from nalora_mlx.export.gguf.model import export_gguf
    from nalora_mlx.export.modelfile import write_modelfile

    destination = args.destination
    if args.dry_run:
        return _describe_gguf(args, directory)
    chat = _read_chat_settings(args)
    result = export_gguf(
        directory,
        args.output,
        args.type,
        updates=(lambda model: _read_adapters(args, model)) if args.adapter_path else None,
        chat_template=chat.template,
        overwrite=args.overwrite,
        name=_model_name(args),
    )
    modelfile, notes = None, list[str]()
    if destination.wants_modelfile:
        modelfile, notes = write_modelfile(result.path, _load_tokenizer(directory, chat))
    _print_template_args(chat)
    _print_gguf_result(result, modelfile, notes)
    destination.deliver(modelfile)


def _describe_gguf(args: argparse.Namespace, directory: Path) -> None:
    """Check all that an export checks before it writes, and print what it would write and run."""
    from nalora_mlx.export.gguf.model import plan_gguf
    from nalora_mlx.export.modelfile import modelfile_path

    plan = plan_gguf(directory, args.type)
    if args.adapter_path:
        _read_adapters(args, plan.model)
    size = f"{len(plan.tensors)} tensors, {sum(tensor.bytes for tensor in plan.tensors) / 1e6:.0f} MB"
    print(f"would write {args.output}: {plan.arch.name}, {args.type}, {size}")
    for line in args.destination.describe(modelfile_path(args.output)):
        print(line)


def _export_gguf_lora(args: argparse.Namespace, directory: Path) -> None:
    from nalora_mlx.export.gguf.adapter import export_gguf_lora
    from nalora_mlx.export.lazy_model import open_model
    from nalora_mlx.export.modelfile import write_modelfile

    model = open_model(directory)
    result = export_gguf_lora(model, _read_adapters(args, model), args.output, overwrite=args.overwrite)
    base = f"{_model_name(args)}.gguf"
    chat = _read_chat_settings(args)
    modelfile, notes = write_modelfile(result.path, _load_tokenizer(directory, chat), base)
    if chat.template is not None:
        print("note: a GGUF adapter holds no chat template, and this one was trained with its own")
    _print_template_args(chat)
    _print_gguf_result(result, modelfile, notes)


def _print_gguf_result(result: Any, modelfile: Path | None, notes: list[str]) -> None:
    for note in result.notes + notes:
        print(f"note: {note}")
    size = f"{result.tensors} tensors, {result.bytes / 1e6:.0f} MB"
    written = result.path if modelfile is None else f"{result.path} and {modelfile.name}"
    print(f"wrote {written}: {result.architecture}, {result.type}, {size}")


def _read_adapters(args: argparse.Namespace, model: "LazyModel") -> "AdapterUpdates":
    """Read the given adapters and return their weighted sum."""
    from nalora_mlx.export.peft_import import read_peft
    from nalora_mlx.export.updates import read_updates, weighted_sum

    if args.from_peft:
        adapters = [read_peft(Path(args.from_peft).expanduser(), model)]
        for note in adapters[0].notes:
            print(f"note: {note}")
    else:
        adapters = [read_updates(Path(path).expanduser(), model.weights) for path in args.adapter_path]
    factors = args.weight or [1.0] * len(adapters)
    return weighted_sum(adapters, [args.scale * factor for factor in factors])


def _read_chat_settings(args: argparse.Namespace) -> "ChatSettings":
    """Return how chats were rendered in the training of the given adapters; the model's own way if they differ."""
    from nalora_mlx.adapters.files import read_chat_settings
    from nalora_mlx.models.chat_templates import ChatSettings

    found = [read_chat_settings(Path(path).expanduser()) for path in args.adapter_path]
    undated = [ChatSettings(chat.template, chat.args) for chat in found]
    if any(chat != undated[0] for chat in undated):
        print("note: the adapters were trained with different chat templates; the export has the model's own")
        return ChatSettings()
    return undated[0] if undated else ChatSettings()


def _print_template_args(chat: "ChatSettings") -> None:
    """Say which arguments of the chat template the format cannot hold."""
    import json

    if chat.args:
        print(
            f"note: the adapter was trained with arguments of the chat template: {json.dumps(dict(chat.args))}; "
            "give them to the program that runs it (llama-server: --chat-template-kwargs)"
        )


def _model_name(args: argparse.Namespace) -> str:
    """Return the last part of the model's path; a link counts as the directory it points to."""
    return Path(args.model).expanduser().resolve().name


def _load_tokenizer(directory: Path, chat: "ChatSettings") -> Any:
    """Load the tokenizer for its template and ends; return None if transformers cannot, since GGUF does not need it."""
    from nalora_mlx.models.chat_templates import configure_chat_template
    from nalora_mlx.models.loading import load_tokenizer

    try:
        tokenizer = load_tokenizer(str(directory))
    except Exception:
        return None
    configure_chat_template(tokenizer, chat)
    return tokenizer


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["export", *sys.argv[1:]]))
