"""Whether a merged model keeps the names of its base's tensors."""

import argparse
from pathlib import Path

import mlx.nn as nn

from nalora_mlx.adapters.files import ADAPTER_FILE
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.storage import array_shapes
from nalora_mlx.export.merged_model import KeptNames, keep_names
from nalora_mlx.models.stored_tensors import StoredTensors, reads_own_names


def choose_names(
    args: argparse.Namespace,
    model: nn.Module,
    source: Path,
    stored: StoredTensors,
    quantized: list[str],
    images: bool,
) -> KeptNames | None:
    """Return where the merged arrays belong in the base's files; None to write all arrays under the model's own names.

    A model that sees keeps the names of its base if it can, so that every program that loads the base loads it.

    Args:
        args: flags of `nalora fuse`.
        model: the base model with the adapter.
        source: directory of the base.
        stored: its tensors.
        quantized: paths of its quantized layers.
        images: whether the model is one of mlx-vlm.

    Raises:
        InputError: the arrays cannot be written back, although they must be.
    """
    if not (args.keep_all or images):
        return None
    try:
        return _keep_names(args, model, stored, quantized)
    except InputError:
        if args.keep_all or not reads_own_names(model, source):
            raise
        return None


def _keep_names(
    args: argparse.Namespace, model: nn.Module, stored: StoredTensors, quantized: list[str]
) -> KeptNames:
    """Return where the arrays that the merge will change belong in the base's files.

    Raises:
        InputError: some cannot be written back, or kept tensors are quantized in spite of --dequantize.
    """
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
