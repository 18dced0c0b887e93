"""What `nalora export` does for each format, after its flags have been checked."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nalora_mlx.adapters.files import read_chat_settings
from nalora_mlx.adapters.vision import needs_vision
from nalora_mlx.core.storage import read_json
from nalora_mlx.export.lazy_model import LazyModel, open_model, open_vision
from nalora_mlx.export.peft_config import adapts_towers
from nalora_mlx.export.results import Step, gguf_steps, print_notes, print_steps, print_written
from nalora_mlx.export.updates import AdapterUpdates, read_updates, reject_towers, weighted_sum
from nalora_mlx.export.upload import upload_adapter
from nalora_mlx.models.chat_templates import ChatSettings, configure_chat_template
from nalora_mlx.models.stored_tensors import format_bytes
from nalora_mlx.models.vision.loading import sees_images

OWN_TEMPLATE = "a {} holds no chat template, and this adapter was trained with its own"


def export_mlx(args: argparse.Namespace, directory: Path) -> None:
    """Write an adapter for mlx-lm."""
    from nalora_mlx.export.mlx_adapter import export_mlx

    model = _open(args, directory)
    count = export_mlx(model, _read_adapters(args, model), args.output, _read_chat_settings(args))
    if model.images and len(args.adapter_path) == 1 and args.weight in ([], [1]) and args.scale == 1:
        print_notes(["mlx-vlm reads the adapter as it is, so this is a copy of it"])
    print_written(args.output, f"adapter of {count} modules")
    print_steps([("chat", [["nalora", "chat", "--model", args.model, "--adapter-path", str(args.output)]])])
    _push(args)


def export_peft(args: argparse.Namespace, directory: Path) -> None:
    """Write an adapter for transformers and PEFT."""
    from nalora_mlx.export.model_card import transformers_class
    from nalora_mlx.export.peft import export_peft
    from nalora_mlx.models.hub import original_name

    model = _open(args, directory)
    base = original_name(args.model, directory, model.config)
    count = export_peft(model, _read_adapters(args, model), args.output, base)
    chat = _read_chat_settings(args)
    notes = [] if chat.template is None else [OWN_TEMPLATE.format("PEFT adapter")]
    print_notes(notes + _template_args_notes(chat))
    print_written(args.output, f"adapter of {count} modules")
    known, auto = repr(base) if base else "BASE", transformers_class(model.images)
    print("\nin Python, with transformers and peft:")
    print(f"  PeftModel.from_pretrained({auto}.from_pretrained({known}), {str(args.output)!r})")
    if base is None:
        print("  BASE is the model in full precision; its name on the Hub is unknown")
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


def export_gguf(args: argparse.Namespace, directory: Path) -> None:
    """Write a model, with the adapter merged, for llama.cpp, and hand it on to Ollama and LM Studio."""
    from nalora_mlx.export.gguf.model import export_gguf
    from nalora_mlx.export.modelfile import write_modelfile

    destination = args.destination
    _reject_towers(args, directory)
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
    print_notes(result.notes + notes + _tower_notes(args, directory) + _template_args_notes(chat))
    print_written(result.path, f"{result.type}, {format_bytes(result.bytes)}")
    if modelfile is not None:
        print_written(modelfile, "for Ollama")
    destination.deliver(modelfile)
    print_steps(destination.steps() or gguf_steps(result.path, modelfile))


def _describe_gguf(args: argparse.Namespace, directory: Path) -> None:
    """Check all that an export checks before it writes, and print what it would write and run."""
    from nalora_mlx.export.gguf.model import plan_gguf
    from nalora_mlx.export.modelfile import modelfile_path

    plan = plan_gguf(directory, args.type)
    if args.adapter_path:
        _read_adapters(args, plan.model)
    print_notes(plan.notes)
    size = format_bytes(sum(tensor.bytes for tensor in plan.tensors))
    print(f"would write {args.output}: {args.type}, {size}")
    for line in args.destination.describe(modelfile_path(args.output)):
        print(line)


def export_gguf_lora(args: argparse.Namespace, directory: Path) -> None:
    """Write an adapter for llama.cpp and Ollama."""
    from nalora_mlx.export.gguf.adapter import export_gguf_lora
    from nalora_mlx.export.modelfile import write_modelfile

    _reject_towers(args, directory)
    model = open_model(directory)
    result = export_gguf_lora(model, _read_adapters(args, model), args.output, overwrite=args.overwrite)
    base = args.output.with_name(f"{_model_name(args)}.gguf")
    chat = _read_chat_settings(args)
    modelfile, notes = write_modelfile(result.path, _load_tokenizer(directory, chat), base.name)
    notes += [] if chat.template is None else [OWN_TEMPLATE.format("GGUF adapter")]
    print_notes(result.notes + notes + _tower_notes(args, directory) + _template_args_notes(chat))
    print_written(result.path, f"{result.type}, {format_bytes(result.bytes)}")
    print_written(modelfile, "for Ollama")
    steps: list[Step] = []
    if not base.exists():
        command = ["nalora", "export", "gguf", "--model", args.model, "--output", str(base)]
        steps.append(("base model", [command]))
    print_steps(steps + gguf_steps(base, modelfile, result.path))


# Format -> the function that writes it.
WRITERS: dict[str, Callable[[argparse.Namespace, Path], None]] = {
    "mlx": export_mlx,
    "peft": export_peft,
    "gguf": export_gguf,
    "gguf-lora": export_gguf_lora,
}


def with_towers(args: argparse.Namespace, directory: Path) -> bool:
    """Return whether the model is opened with its towers, through mlx-vlm, because an adapter was trained there."""
    if args.format.startswith("gguf"):  # holds the language model only
        return False
    config = read_json(directory / "config.json")
    if args.from_peft and sees_images(config) and adapts_towers(Path(args.from_peft).expanduser()):
        return True
    adapters = [Path(path).expanduser() for path in args.adapter_path]
    return needs_vision(config, None) or any(needs_vision(config, adapter) for adapter in adapters)


def _open(args: argparse.Namespace, directory: Path) -> LazyModel:
    return open_vision(directory) if with_towers(args, directory) else open_model(directory)


def _reject_towers(args: argparse.Namespace, directory: Path) -> None:
    config = read_json(directory / "config.json")
    for path in args.adapter_path:
        reject_towers(config, Path(path).expanduser(), f"export {args.format}")


def _read_adapters(args: argparse.Namespace, model: LazyModel) -> AdapterUpdates:
    """Read the given adapters and return their weighted sum."""
    from nalora_mlx.export.peft_import import read_peft

    if args.from_peft:
        adapters = [read_peft(Path(args.from_peft).expanduser(), model)]
        print_notes(adapters[0].notes)
    else:
        adapters = [read_updates(Path(path).expanduser(), model.weights) for path in args.adapter_path]
    factors = args.weight or [1.0] * len(adapters)
    return weighted_sum(adapters, [args.scale * factor for factor in factors])


def _read_chat_settings(args: argparse.Namespace) -> ChatSettings:
    """Return how chats were rendered in the training of the given adapters; the model's own way if they differ."""
    found = [read_chat_settings(Path(path).expanduser()) for path in args.adapter_path]
    undated = [ChatSettings(chat.template, chat.args) for chat in found]
    if any(chat != undated[0] for chat in undated):
        print_notes(
            ["the adapters were trained with different chat templates; the export has the model's own"]
        )
        return ChatSettings()
    return undated[0] if undated else ChatSettings()


def _tower_notes(args: argparse.Namespace, directory: Path) -> list[str]:
    """Say where the vision tower is, if an adapter was trained on images."""
    config = read_json(directory / "config.json")
    if not any(needs_vision(config, Path(path).expanduser()) for path in args.adapter_path):
        return []
    return [
        "this is for the language model; for images, give llama.cpp the base's mmproj file too (--mmproj)"
    ]


def _template_args_notes(chat: ChatSettings) -> list[str]:
    """Say which arguments of the chat template the format cannot hold."""
    if not chat.args:
        return []
    return [
        f"the adapter was trained with arguments of the chat template: {json.dumps(dict(chat.args))}; give them to the "
        "program that runs it (llama-server: --chat-template-kwargs)"
    ]


def _model_name(args: argparse.Namespace) -> str:
    """Return the last part of the model's path; a link counts as the directory it points to."""
    return Path(args.model).expanduser().resolve().name


def _load_tokenizer(directory: Path, chat: ChatSettings) -> Any:
    """Load the tokenizer for its template and ends; return None if transformers cannot, since GGUF does not need it."""
    from nalora_mlx.models.loading import load_tokenizer

    try:
        tokenizer = load_tokenizer(str(directory))
    except Exception:
        return None
    configure_chat_template(tokenizer, chat)
    return tokenizer
