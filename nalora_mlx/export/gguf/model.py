"""A model as one GGUF file, written tensor by tensor: each is read, dequantized, merged, converted and written."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.notices import Note
from nalora_mlx.export.gguf.architecture import (
    Architecture,
    arguments,
    config_notes,
    config_problems,
    place,
    rope_factors,
    write_metadata,
)
from nalora_mlx.export.gguf.architectures import find_architecture, for_config
from nalora_mlx.export.gguf.mxfp4 import copy_blocks, keeps_blocks
from nalora_mlx.export.gguf.placement import Placement, layer_and_rest
from nalora_mlx.export.gguf.tensor_types import (
    FILE_TYPES,
    byte_size,
    check_type,
    choose_type,
    fallback_notes,
    gguf,
    is_k_quant,
    quantize,
)
from nalora_mlx.export.gguf.vocabulary.tokenizer import Vocabulary, read_vocabulary
from nalora_mlx.export.gguf.vocabulary.tokenizer_check import compare_with_mlx_lm
from nalora_mlx.export.gguf.writing import check_output, write_gguf
from nalora_mlx.export.lazy_model import LazyModel, LazyWeight, open_model, read_config
from nalora_mlx.export.updates import AdapterUpdates, merge_updates

CHUNK = 1 << 24  # elements to convert at once, which keeps NumPy's float32 copies small


@dataclass(frozen=True)
class GgufResult:
    """An exported file, and notes for the user about it."""

    path: Path
    bytes: int
    tensors: int
    architecture: str
    type: str
    notes: list[str]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file and the weights it is made from."""

    name: str  # in GGUF
    shape: tuple[int, ...]
    type: Any  # gguf.GGMLQuantizationType
    # By path, which rows and columns of the weight, and what becomes of them. Several weights are stacked.
    parts: dict[str, Placement]
    use_llama_cpp: bool = False  # quantize with llama.cpp instead of gguf-py

    @property
    def bytes(self) -> int:
        """Size of the tensor's data in the file."""
        return byte_size(self.shape, self.type)

    def convert(self, weights: Mapping[str, LazyWeight]) -> np.ndarray:
        """Return the tensor's data as written to the file: uint8 [bytes]."""
        if self.type == gguf.GGMLQuantizationType.MXFP4:
            return copy_blocks(weights[path := next(iter(self.parts))], path)
        data = np.empty(self.bytes, np.uint8)
        done = 0
        for path, placement in self.parts.items():
            for values in self._read(weights[path], placement):
                self._check(values, path)
                part = quantize(values, self.type, self.use_llama_cpp)
                data[done : done + part.size] = part
                done += part.size
        return data

    def _read(self, weight: LazyWeight, placement: Placement) -> Iterator[np.ndarray]:
        """Yield a part's values in runs of rows with about CHUNK elements, expert by expert; float32."""
        if placement.shape is not None:  # a small tensor
            values = weight.read((slice(None) if placement.rows is None else mx.array(placement.rows),))
            yield _change(values, placement).reshape(placement.shape)
            return
        shape = _shape(weight, placement)
        *experts, rows, columns = (*shape, 1) if len(shape) == 1 else shape
        step = max(1, CHUNK // columns)
        for expert in np.ndindex(*experts):
            for start in range(0, rows, step):
                run = slice(start, start + step)
                index = (*expert, run if placement.rows is None else mx.array(placement.rows[run]))
                yield _change(weight.read(index), placement)

    def _check(self, values: np.ndarray, path: str) -> None:
        largest = np.abs(values).max(initial=0.0)
        if not np.isfinite(largest):
            raise InputError(f"{path}: has NaN or infinite values; the model is damaged")
        if self.type == gguf.GGMLQuantizationType.F16 and largest > np.finfo(np.float16).max:
            raise InputError(f"{path}: {largest:g} is too large for f16; choose --type bf16 or f32")


def _change(values: np.ndarray, placement: Placement) -> np.ndarray:
    values = values if placement.columns is None else np.take(values, placement.columns, axis=-1)
    return values if placement.values is None else placement.values(values)


@dataclass(frozen=True)
class ExportPlan:
    """What to export of a model: its weights, the tensors made from them, and its vocabulary."""

    arch: Architecture
    model: LazyModel
    tensors: list[PlannedTensor]
    vocabulary: Vocabulary

    @property
    def notes(self) -> list[str]:
        """Notes for the user about the model and its vocabulary."""
        return config_notes(self.arch, self.model.args) + self.vocabulary.notes


def export_gguf(
    model_dir: Path | str,
    output: Path | str,
    type: str = "f16",
    *,
    updates: Callable[[LazyModel], AdapterUpdates] | None = None,
    chat_template: str | None = None,
    overwrite: bool = False,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GgufResult:
    """Write an mlx-lm model, in full precision or quantized, to one GGUF file.

    The file appears when it is complete. Format: https://github.com/ggml-org/ggml, docs/gguf.md.

    Args:
        model_dir: directory of the model.
        output: file to write.
        type: type of the matrices, a key of FILE_TYPES. Vectors, including norms, stay float32.
        updates: reads the adapter to merge. The merge is computed in float32 as each weight is written.
        chat_template: text of a chat template to write instead of the model's.
        overwrite: whether to replace an existing file.
        name: name of the model in the file; by default the directory's.
        progress: called with (bytes written, total bytes) after each tensor.

    Raises:
        InputError: llama.cpp cannot run the model as mlx-lm does. Nothing was written.
    """
    model_dir, output = Path(model_dir), Path(output)
    check_output(output, overwrite)
    plan = plan_gguf(model_dir, type)
    arch, args, config = plan.arch, plan.model.args, plan.model.config
    tensors, vocabulary, weights = plan.tensors, plan.vocabulary, plan.model.weights
    if chat_template is not None:
        vocabulary.replace_chat_template(chat_template)
    if updates is not None:
        weights = merge_updates(weights, updates(plan.model))
        tensors, _ = _plan_tensors(arch, args, weights, type)  # merging changes which blocks are kept
    del plan  # it holds the weights too, which are freed one by one below

    writer = gguf.GGUFWriter(None, arch.name)
    writer.add_type("model")
    writer.add_name(_safe_name(name or model_dir.resolve().name, arch, vocabulary))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[type][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_metadata(writer, arch, args, config)
    _write_scalars(writer, arch, weights)
    vocabulary.write(writer)
    factors = rope_factors(arch, args) | arch.extra_tensors(args)
    for factor_name, factor in factors.items():
        writer.add_tensor_info(factor_name, factor.shape, factor.dtype, factor.nbytes)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, tensor.type)
    size = sum(tensor.bytes for tensor in tensors) + sum(factor.nbytes for factor in factors.values())
    write_gguf(writer, output, _convert_tensors(factors, tensors, weights), size, progress)
    types = [(tensor.shape, tensor.type) for tensor in tensors]
    notes = config_notes(arch, args) + vocabulary.notes + fallback_notes(types, type)
    return GgufResult(output, output.stat().st_size, len(tensors) + len(factors), arch.name, type, notes)


def plan_gguf(model_dir: Path, type: str) -> ExportPlan:
    """Read what an export needs and check it, without writing anything.

    Raises:
        InputError: llama.cpp cannot run the model as mlx-lm does; the message lists all problems.
    """
    check_type(type)
    arch = find_architecture(read_config(model_dir))
    model = open_model(model_dir)
    arch = for_config(arch, model.config)
    model = dataclasses.replace(model, args=arguments(arch, model.args))
    tensors, unmapped = _plan_tensors(arch, model.args, model.weights, type)
    if problems := model.problems + config_problems(arch, model.args, model.config) + unmapped:
        raise InputError(f"{model_dir}: cannot be exported to GGUF: {'; '.join(problems)}")
    vocabulary = read_vocabulary(model_dir, model.config, model.args.vocab_size)
    vocabulary.notes += compare_with_mlx_lm(model_dir, vocabulary)
    return ExportPlan(arch, model, tensors, vocabulary)


def _write_scalars(writer: Any, arch: Architecture, weights: Mapping[str, LazyWeight]) -> None:
    for name, method in arch.scalars.items():
        layers = {layer: path for path in weights for layer, rest in [layer_and_rest(path)] if rest == name}
        getattr(writer, method)([float(weights[path].read(()).item()) for _, path in sorted(layers.items())])


def tensor_name_map(arch: Architecture, args: Any) -> Any:
    """Return gguf-py's map from Hugging Face's tensor names to GGUF's, that of Llama if it lacks the architecture."""
    keys = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(keys.get(arch.name, gguf.MODEL_ARCH.LLAMA), args.num_hidden_layers)


def gguf_name(names: Any, name: str) -> str | None:
    """Return GGUF's name for a placement's; None if there is none."""
    if re.match(r"(blk\.\d+|token_embd|output|rope)[._]", name):
        return name
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    return found


def _shape(weight: LazyWeight, placement: Placement) -> tuple[int, ...]:
    if placement.shape is not None:
        return placement.shape
    *experts, rows, columns = (1, *weight.shape) if len(weight.shape) == 1 else weight.shape
    if len(weight.shape) == 1:
        return (columns if placement.rows is None else len(placement.rows),)
    rows = rows if placement.rows is None else len(placement.rows)
    return (*experts, rows, columns if placement.columns is None else len(placement.columns))


def is_tied(arch: Architecture, args: Any, weights: Iterable[str], names: Any) -> bool:
    """Return whether the embedding is also the output head: no weight has its place there."""
    places = (placement.name for path in weights for placement in place(arch, args, path))
    return all(gguf_name(names, name) != "output.weight" for name in places)


def _plan_tensors(
    arch: Architecture, args: Any, weights: Mapping[str, LazyWeight], type: str
) -> tuple[list[PlannedTensor], list[str]]:
    """Choose the name and type of every tensor in the file.

    Returns:
        The tensors, and problems with weights that have no place in the file.
    """
    names = tensor_name_map(arch, args)
    tied = is_tied(arch, args, weights, names)
    layers = args.num_hidden_layers
    experts = getattr(args, "num_local_experts", None) or getattr(args, "num_experts", None) or 0
    # llama.cpp recognizes a 70B model by its number of layers.
    is_70b = layers == 80 and (
        arch.name == "qwen2"
        or (arch.name == "llama" and args.num_attention_heads != args.num_key_value_heads)
    )
    tensors: dict[str, PlannedTensor] = {}
    problems = []
    for path, weight in weights.items():
        for placement in place(arch, args, path):
            name = gguf_name(names, placement.name)
            stem, _, leaf = (name or "").rpartition(".")
            if name is None or (leaf == "bias" and stem.rpartition(".")[2] not in arch.biases):
                problems.append(f"llama.cpp's {arch.name} has no place for tensor {path}")
                continue
            if placement.part is not None and name in tensors:
                tensors[name] = _with_part(tensors[name], path, placement)
                continue
            shape = _shape(weight, placement)
            targets = [name]
            if name == "token_embd.weight" and tied and arch.needs_output:
                targets.append("output.weight")
            for target in targets:
                tensor_type = gguf.GGMLQuantizationType.F32
                if type != "f32" and keeps_blocks(weight, placement):
                    tensor_type = gguf.GGMLQuantizationType.MXFP4
                elif not placement.full_precision:
                    tensor_type = choose_type(
                        target,
                        shape,
                        type,
                        tied=tied and not arch.needs_output,
                        layers=layers,
                        experts=experts,
                        is_70b=is_70b,
                    )
                if placement.part is not None:
                    shape = (1, *shape)
                tensors[target] = PlannedTensor(
                    target, shape, tensor_type, {path: placement}, is_k_quant(type)
                )
    return list(tensors.values()), problems


def _with_part(tensor: PlannedTensor, path: str, placement: Placement) -> PlannedTensor:
    """Return a stacked tensor with one more part."""
    parts = sorted((tensor.parts | {path: placement}).items(), key=lambda part: part[1].part or 0)
    return dataclasses.replace(tensor, shape=(len(parts), *tensor.shape[1:]), parts=dict(parts))


def _safe_name(name: str, arch: Architecture, vocabulary: Vocabulary) -> str:
    """Adjust a model's name to its tokens, because llama.cpp treats models named phi-3 specially.

    It strips the spaces after their special tokens, and does not load them without these tokens.
    """
    phi3_tokens = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
    is_phi3 = vocabulary.strips_right and phi3_tokens <= set(vocabulary.tokens)
    named_phi3 = re.search("phi-?3", name, re.IGNORECASE)
    if named_phi3 and not is_phi3:
        name = re.sub("(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)
    elif not named_phi3 and is_phi3 and arch.name == "phi3":
        name = f"phi-3 {name}"
    if vocabulary.strips_right and not re.search("phi-?3", name, re.IGNORECASE):
        vocabulary.notes.append(
            Note("mlx-lm strips the spaces after some special tokens of this model, llama.cpp does not")
        )
    return name


def _convert_tensors(
    factors: dict[str, np.ndarray], tensors: Sequence[PlannedTensor], weights: dict[str, LazyWeight]
) -> Iterator[np.ndarray]:
    """Yield each tensor's data in the order of the file, and free every weight after its last use."""
    yield from factors.values()
    uses = Counter(path for tensor in tensors for path in tensor.parts)
    for tensor in tensors:
        yield tensor.convert(weights)
        for path in tensor.parts:
            uses[path] -= 1
            if not uses[path]:
                del weights[path]
                mx.clear_cache()
