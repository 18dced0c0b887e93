"""A model as one GGUF file, written tensor by tensor: each is read, dequantized, merged, converted and written."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf.architecture import (
    Architecture,
    Placement,
    config_notes,
    config_problems,
    place,
    rope_factors,
    write_metadata,
)
from nalora_mlx.export.gguf.architectures import ARCHITECTURES
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
from nalora_mlx.export.gguf.tokenizer import Vocabulary, compare_with_mlx_lm, read_vocabulary
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
    """One tensor of the file and the weight it is made from."""

    name: str  # in GGUF
    path: str  # of the weight
    shape: tuple[int, ...]
    type: Any  # gguf.GGMLQuantizationType
    placement: Placement  # which rows and columns of the weight, and what becomes of them
    use_llama_cpp: bool = False  # quantize with llama.cpp instead of gguf-py

    @property
    def bytes(self) -> int:
        """Size of the tensor's data in the file."""
        return byte_size(self.shape, self.type)

    def convert(self, weight: LazyWeight) -> np.ndarray:
        """Return the tensor's data as written to the file: uint8 [bytes]."""
        data = np.empty(self.bytes, np.uint8)
        done = 0
        for values in self._read(weight):
            self._check(values)
            part = quantize(values, self.type, self.use_llama_cpp)
            data[done : done + part.size] = part
            done += part.size
        return data

    def _read(self, weight: LazyWeight) -> Iterator[np.ndarray]:
        """Yield the tensor's values in runs of rows with about CHUNK elements, expert by expert; float32."""
        place = self.placement
        if place.shape is not None:  # a small tensor
            values = weight.read((slice(None) if place.rows is None else mx.array(place.rows),))
            yield self._change(values).reshape(place.shape)
            return
        experts, columns = self.shape[:-2], self.shape[-1] if len(self.shape) > 1 else 1
        rows = self.shape[-2] if len(self.shape) > 1 else self.shape[0]
        step = max(1, CHUNK // columns)
        for expert in np.ndindex(*experts):
            for start in range(0, rows, step):
                run = slice(start, start + step)
                index = (*expert, run if place.rows is None else mx.array(place.rows[run]))
                yield self._change(weight.read(index))

    def _change(self, values: np.ndarray) -> np.ndarray:
        place = self.placement
        values = values if place.columns is None else values[..., place.columns]
        return values if place.values is None else place.values(values)

    def _check(self, values: np.ndarray) -> None:
        largest = np.abs(values).max(initial=0.0)
        if not np.isfinite(largest):
            raise InputError(f"{self.path}: has NaN or infinite values; the model is damaged")
        if self.type == gguf.GGMLQuantizationType.F16 and largest > np.finfo(np.float16).max:
            raise InputError(f"{self.path}: {largest:g} is too large for f16; choose --type bf16 or f32")


@dataclass(frozen=True)
class ExportPlan:
    """What to export of a model: its weights, the tensors made from them, and its vocabulary."""

    arch: Architecture
    model: LazyModel
    tensors: list[PlannedTensor]
    vocabulary: Vocabulary


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
    del plan  # it holds the weights too, which are freed one by one below

    writer = gguf.GGUFWriter(None, arch.name)
    writer.add_type("model")
    writer.add_name(_safe_name(name or model_dir.resolve().name, arch, vocabulary))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[type][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_metadata(writer, arch, args, config)
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
    tensors, unmapped = _plan_tensors(arch, model.args, model.weights, type)
    if problems := model.problems + config_problems(arch, model.args, model.config) + unmapped:
        raise InputError(f"{model_dir}: cannot be exported to GGUF: {'; '.join(problems)}")
    vocabulary = read_vocabulary(model_dir, model.config, model.args.vocab_size)
    vocabulary.notes += compare_with_mlx_lm(model_dir, vocabulary)
    return ExportPlan(arch, model, tensors, vocabulary)


def find_architecture(config: dict[str, Any]) -> Architecture:
    """Return the GGUF architecture of a model.

    Raises:
        InputError: the config's model_type cannot be exported; the message lists those that can.
    """
    arch = ARCHITECTURES.get(config["model_type"])
    if arch is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(
            f"model_type {config['model_type']}: cannot be exported to GGUF; supported are {known}"
        )
    return arch


def tensor_name_map(arch: Architecture, args: Any) -> Any:
    """Return gguf-py's map from Hugging Face's tensor names to those of GGUF; None if it lacks the architecture."""
    key = next((key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch.name), None)
    return None if key is None else gguf.get_tensor_name_map(key, args.num_hidden_layers)


def gguf_name(names: Any, name: str) -> str | None:
    """Return GGUF's name for a placement's; None if there is none."""
    if re.match(r"(blk\.\d+|token_embd|output|rope)[._]", name):
        return name
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias")) if names else None
    return found


def _shape(weight: LazyWeight, placement: Placement) -> tuple[int, ...]:
    if placement.shape is not None:
        return placement.shape
    *experts, rows, columns = (1, *weight.shape) if len(weight.shape) == 1 else weight.shape
    if len(weight.shape) == 1:
        return (columns if placement.rows is None else len(placement.rows),)
    rows = rows if placement.rows is None else len(placement.rows)
    return (*experts, rows, columns if placement.columns is None else len(placement.columns))


def is_tied(weights: Mapping[str, LazyWeight]) -> bool:
    """Return whether the embedding is also the output head."""
    return not any(path in weights for path in ("lm_head.weight", "output.weight"))


def _plan_tensors(
    arch: Architecture, args: Any, weights: Mapping[str, LazyWeight], type: str
) -> tuple[list[PlannedTensor], list[str]]:
    """Choose the name and type of every tensor in the file.

    Returns:
        The tensors, and problems with weights that have no place in the file.
    """
    names, tied = tensor_name_map(arch, args), is_tied(weights)
    layers, heads, kv_heads = args.num_hidden_layers, args.num_attention_heads, args.num_key_value_heads
    experts = getattr(args, "num_local_experts", None) or getattr(args, "num_experts", None) or 0
    # llama.cpp recognizes a 70B model by its number of layers.
    is_70b = layers == 80 and (arch.name == "qwen2" or (arch.name == "llama" and heads != kv_heads))
    tensors, problems = [], []
    for path, weight in weights.items():
        for placement in place(arch, args, path):
            name = gguf_name(names, placement.name)
            stem, _, leaf = (name or "").rpartition(".")
            if name is None or (leaf == "bias" and stem.rpartition(".")[2] not in arch.biases):
                problems.append(f"llama.cpp's {arch.name} has no place for tensor {path}")
                continue
            shape = _shape(weight, placement)
            targets = [name]
            if name == "token_embd.weight" and tied and arch.needs_output:
                targets.append("output.weight")
            for target in targets:
                tensor_type = gguf.GGMLQuantizationType.F32
                if not placement.full_precision:
                    tensor_type = choose_type(
                        target,
                        shape,
                        type,
                        tied=tied and not arch.needs_output,
                        layers=layers,
                        experts=experts,
                        is_70b=is_70b,
                    )
                tensors.append(PlannedTensor(target, path, shape, tensor_type, placement, is_k_quant(type)))
    return tensors, problems


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
            "mlx-lm strips the spaces after some special tokens of this model, llama.cpp does not"
        )
    return name


def _convert_tensors(
    factors: dict[str, np.ndarray], tensors: Sequence[PlannedTensor], weights: dict[str, LazyWeight]
) -> Iterator[np.ndarray]:
    """Yield each tensor's data in the order of the file, and free every weight after its last use."""
    yield from factors.values()
    uses = Counter(tensor.path for tensor in tensors)
    for tensor in tensors:
        yield tensor.convert(weights[tensor.path])
        uses[tensor.path] -= 1
        if not uses[tensor.path]:
            del weights[tensor.path]
            mx.clear_cache()
