"""What `nalora fuse` says about a merged model: what it lacks, what the merge keeps, and what to do with it."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from nalora_mlx.adapters.merge_quality import MergeQuality
from nalora_mlx.core.storage import read_json
from nalora_mlx.export.results import Step
from nalora_mlx.models.chat_templates import ChatSettings, format_args
from nalora_mlx.models.config_translation import mlx_lm_ignores_rope
from nalora_mlx.models.model_files import ModelFiles
from nalora_mlx.models.stored_tensors import StoredTensors


def model_notes(
    source: Path, stored: StoredTensors, files: ModelFiles, kept: bool, images: bool, chat: ChatSettings
) -> list[str]:
    """Say what the merged model lacks of its base or of the adapter's training, and what differs.

    Args:
        source: directory of the base.
        stored: tensors of the base.
        files: other files of the merged model.
        kept: whether the merged model has the names and forms of the base's tensors, and all of them.
        images: whether the model is one of mlx-vlm, not of mlx-lm.
        chat: how chats were rendered in the adapter's training.
    """
    notes = []
    library = "mlx-vlm" if images else "mlx-lm"
    if not kept and (unused := stored.describe_unused()):
        keeps = "" if images else "; --keep-all keeps it"
        notes.append(f"not copied, because {library} does not use it: {unused}{keeps}")
    if not kept and stored.has_own_layout:
        own = "" if images else "; --keep-all writes those of the base"
        notes.append(
            f"tensors have the names and forms of {library}, which differ from the base's, so that only programs based "
            f"on {library} load the model{own}"
        )
    if left := files.describe_left_behind():
        notes.append(f"not copied: {left}")
    if files.written:
        names = " and ".join(sorted(files.written))
        notes.append(f"the chat template is the one that the adapter was trained with, in {names}")
    if chat.args:
        notes.append(
            f"a model cannot hold arguments of its chat template; use it with {format_args(chat.args)}"
        )
    if not images and mlx_lm_ignores_rope(read_json(source / "config.json")):
        notes.append(
            "as with the base, mlx-lm's own commands ignore rope_parameters in config.json; use nalora's"
        )
    return notes


def quality_notes(args: argparse.Namespace, quality: MergeQuality | None) -> list[str]:
    """Say so if the comparison shows little, and how to see more."""
    if quality is None or not quality.small_effect:
        return []
    command = ["nalora", "chat", "--model", args.model, "--adapter-path", args.adapter_path, "--compare"]
    return [
        f"the adapter hardly changes the answers to these questions; ask it your own: {shlex.join(command)}"
    ]


def next_steps(args: argparse.Namespace, tokenizer: Any, chat: ChatSettings, images: bool) -> list[Step]:
    """Return what to do with the merged model; `images` says whether it is one of mlx-vlm."""
    model = ["--model", args.save_path, *["--trust-remote-code"] * args.trust_remote_code]
    if not tokenizer.has_chat_template:
        steps: list[Step] = [("generate", [["nalora", "generate", *model, "--prompt", "Once upon a time"]])]
    else:
        template_args = shlex.split(format_args(chat.args)) if chat.args else []
        steps = [("chat", [["nalora", "chat", *model, *template_args]])]
    if not (args.export_gguf or images):  # a GGUF file would hold the language model only
        output = f"{Path(args.save_path).expanduser().resolve().name}.gguf"
        command = ["nalora", "export", "gguf", *model[:2], "--type", "q4_k_m", "--output", output]
        steps.append(("export", [command]))
    return steps


def lost_message(args: argparse.Namespace, quality: MergeQuality, quantized: bool) -> str:
    """Say that a merge loses most of the adapter's effect, and what to do."""
    found = f"{quality.verdict} ({quality.basis})"
    if quantized and not args.dequantize:
        better = "--dequantize" if args.bits == "8" else "--bits 8 or --dequantize"
        return f"--bits {args.bits}: {found}; give {better}, or --force to write it anyway"
    flag = "--dequantize" if args.dequantize else f"--model {args.model}"
    return (
        f"{flag}: {found}, because the update is smaller than 16-bit weights can represent; use the adapter unmerged, "
        "or give --force to write it anyway"
    )
