"""An adapter as a GGUF file, for llama.cpp's --lora and Ollama's ADAPTER."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.export.gguf.architecture import Architecture, arguments, config_problems, place
from nalora_mlx.export.gguf.architectures import find_architecture, for_config
from nalora_mlx.export.gguf.model import (
    GgufResult,
    gguf_name,
    is_tied,
    tensor_name_map,
)
from nalora_mlx.export.gguf.tensor_types import gguf
from nalora_mlx.export.gguf.writing import check_output, write_gguf
from nalora_mlx.export.lazy_model import LazyModel, read_config
from nalora_mlx.export.updates import AdapterUpdates, LowRankUpdate, with_common_rank


def export_gguf_lora(
    model: LazyModel, updates: AdapterUpdates, output: Path, *, overwrite: bool = False, name: str = ""
) -> GgufResult:
    """Write a LoRA adapter for a GGUF of its base model; float32.

    The tensors are NAME.lora_a = right [(E,) r, D] and NAME.lora_b = left [(E,) F, r], with the rows of left in the
    order of the weight's rows, and alpha = scale * r. An embedding has lora_a [V, r] and lora_b [D, r].

    Args:
        model: the base model.
        updates: the adapter.
        output: file to write.
        overwrite: whether to replace an existing file.
        name: name of the adapter in the file; by default the file's.

    Raises:
        InputError: llama.cpp does not support the model or the adapter.
    """
    check_output(output, overwrite)
    arch = for_config(find_architecture(read_config(model.directory)), model.config)
    model = dataclasses.replace(model, args=arguments(arch, model.args))
    if problems := config_problems(arch, model.args, model.config):
        raise InputError(f"{model.directory}: cannot be exported to GGUF: {'; '.join(problems)}")
    if updates.kind != "lora":
        raise InputError(
            f"export gguf-lora: llama.cpp has no {updates.kind} adapters; merge it: nalora export gguf --adapter-path"
        )
    by_path, rank, scale = with_common_rank(updates.by_path)
    if unsupported := _layers_without_lora(arch, model, by_path):
        raise InputError(
            f"{listed(unsupported, ', ')}: llama.cpp's {arch.name} cannot have an adapter here; "
            "merge it: nalora export gguf --adapter-path"
        )
    tensors = list(_adapter_tensors(arch, model, by_path))
    writer = gguf.GGUFWriter(None, arch.name)
    writer.add_type("adapter")
    writer.add_name(name or output.stem)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", scale * rank)
    for tensor, data in tensors:
        writer.add_tensor_info(tensor, data.shape, data.dtype, data.nbytes)
    size = sum(data.nbytes for _, data in tensors)
    write_gguf(writer, output, (data for _, data in tensors), size, None)
    return GgufResult(output, output.stat().st_size, len(tensors), arch.name, "f32", [])


def _layers_without_lora(
    arch: Architecture, model: LazyModel, by_path: dict[str, LowRankUpdate]
) -> list[str]:
    """Return the adapted layers for which llama.cpp has no tensor, or to which it would not apply the adapter.

    * stands for the numbers in their paths.
    """
    names = tensor_name_map(arch, model.args)

    def takes_lora(path: str) -> bool:
        found = place(arch, model.args, f"{path}.weight")
        return all(p.takes_lora and gguf_name(names, p.name) is not None for p in found)

    return sorted({re.sub(r"\.\d+(?=\.)", ".*", path) for path in by_path if not takes_lora(path)})


def _adapter_tensors(
    arch: Architecture, model: LazyModel, by_path: dict[str, LowRankUpdate]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, data) of every tensor of the adapter."""
    names = tensor_name_map(arch, model.args)
    tied = is_tied(arch, model.args, model.weights, names)
    for path, update in by_path.items():
        left, right = np.array(update.left), np.array(update.right)
        is_embedding = model.weights[f"{path}.weight"].kind == "embedding"
        if is_embedding and tied and not arch.needs_output:
            raise InputError(
                f"{path}: is both embedding and output head, which llama.cpp's adapters cannot change; "
                "merge it: nalora export gguf --adapter-path"
            )
        for placement in place(arch, model.args, f"{path}.weight"):
            name = gguf_name(names, placement.name)
            assert name is not None
            rows = left if placement.rows is None else left[..., placement.rows, :]
            if placement.expert_scale is not None:
                scale_path = next(name for name in model.weights if name.endswith(placement.expert_scale))
                rows = rows * model.weights[scale_path].read((slice(None),))[:, None, None]
            columns = right if placement.columns is None else right[..., placement.columns]
            if is_embedding:
                yield f"{name}.lora_a", left
                yield f"{name}.lora_b", np.ascontiguousarray(right.T)
                if not tied:
                    continue
                name = "output.weight"
            yield f"{name}.lora_a", np.ascontiguousarray(columns)
            yield f"{name}.lora_b", np.ascontiguousarray(rows)
