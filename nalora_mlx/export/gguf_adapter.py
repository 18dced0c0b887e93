"""An adapter alone as a GGUF file, for llama.cpp's --lora and for Ollama's ADAPTER."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf_architectures import Architecture, problems, tensor_rows
from nalora_mlx.export.gguf_model import (
    GgufReport,
    architecture_of,
    check_output,
    is_tied,
    name_map,
    write_file,
)
from nalora_mlx.export.gguf_types import gguf
from nalora_mlx.export.lazy_model import LazyModel
from nalora_mlx.export.updates import Updates, uniform

Tensor = tuple[str, np.ndarray]


def export_gguf_lora(
    opened: LazyModel, updates: Updates, output: Path, *, overwrite: bool = False, name: str = ""
) -> GgufReport:
    """Write a LoRA adapter for a GGUF of its base model; float32.

    Tensors are NAME.lora_a = right [(E,) r, D] and NAME.lora_b = left [(E,) F, r], the rows of left moved as the
    weight's rows are; alpha = scale r. An embedding has lora_a [V, r] and lora_b [D, r].

    Raises:
        InputError: llama.cpp does not know the model, or has no form for the adapter.
    """
    check_output(output, overwrite)
    arch = architecture_of(opened.config)
    if found := problems(arch, opened.args, opened.config):
        raise InputError(f"{opened.directory}: cannot become GGUF: {'; '.join(found)}")
    if updates.kind != "lora":
        raise InputError(
            f"export gguf-lora: llama.cpp has no {updates.kind} adapters; merge it: nalora export gguf --adapter-path"
        )
    by_path, rank, scale = uniform(updates.by_path)
    tensors = list(_tensors(arch, opened, Updates(updates.kind, by_path, {})))
    writer = gguf.GGUFWriter(None, arch.gguf)
    writer.add_type("adapter")
    writer.add_name(name or output.stem)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", scale * rank)
    for tensor, data in tensors:
        writer.add_tensor_info(tensor, data.shape, data.dtype, data.nbytes)
    size = sum(data.nbytes for _, data in tensors)
    write_file(writer, output, (data for _, data in tensors), size, None)
    return GgufReport(output, output.stat().st_size, len(tensors), arch.gguf, "f32", [])


def _tensors(arch: Architecture, opened: LazyModel, updates: Updates) -> Iterator[Tensor]:
    names = name_map(arch, opened.args)
    for path, update in updates.by_path.items():
        left, right = np.array(update.left), np.array(update.right)
        is_embedding = opened.sources[f"{path}.weight"].kind == "embedding"
        if is_embedding and is_tied(opened.sources) and not arch.needs_output:
            raise InputError(
                f"{path}: is embedding and head in one, which llama.cpp's adapters cannot change; "
                "merge it: nalora export gguf --adapter-path"
            )
        for looked_up, rows in tensor_rows(arch, opened.args, f"{path}.weight"):
            name = names.get_name(looked_up, try_suffixes=(".weight",))
            if name is None:
                raise InputError(f"llama.cpp's {arch.gguf} has no place for an adapter on {path}")
            moved = left if rows is None else left[..., rows, :]
            if is_embedding:
                yield f"{name}.lora_a", left
                yield f"{name}.lora_b", np.ascontiguousarray(right.T)
                if not is_tied(opened.sources):
                    continue
                name = "output.weight"
            yield f"{name}.lora_a", right
            yield f"{name}.lora_b", np.ascontiguousarray(moved)
