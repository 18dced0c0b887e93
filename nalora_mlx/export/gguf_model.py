"""A whole model as one GGUF file: read tensor by tensor, dequantized, merged, converted and written one at a time."""

import glob
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.storage import flush
from nalora_mlx.export.gguf_architectures import (
    ARCHITECTURES,
    Architecture,
    notes,
    problems,
    rope_factors,
    tensor_rows,
    write_metadata,
)
from nalora_mlx.export.gguf_tokenizer import Vocabulary, compare_with_mlx_lm, read_vocabulary
from nalora_mlx.export.gguf_types import (
    FILE_TYPES,
    byte_size,
    check_type,
    fallback_notes,
    gguf,
    is_k_quant,
    quantize,
    type_of,
)
from nalora_mlx.export.lazy_model import LazyModel, Source, open_model, read_config
from nalora_mlx.export.updates import Updates, merged

CHUNK = 1 << 24  # elements converted at once, so that NumPy's float32 copies stay small beside a tensor


@dataclass(frozen=True)
class GgufReport:
    """What was written: where, how large, and what the user should know of it (`notes`)."""

    path: Path
    bytes: int
    tensors: int
    architecture: str
    type: str
    notes: list[str]


@dataclass(frozen=True)
class Planned:
    """One tensor to write: GGUF name, its weight's path, the rows to take of it and what to add to it.

    `by_llama_cpp` says who quantizes, llama.cpp or gguf-py.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    type: Any  # gguf.GGMLQuantizationType
    rows: np.ndarray | None = None
    offset: float = 0.0
    by_llama_cpp: bool = False

    @property
    def bytes(self) -> int:
        """Size of its data in the file."""
        return byte_size(self.shape, self.type)

    def convert(self, source: Source) -> np.ndarray:
        """Return the tensor's data as it stands in the file: uint8 [bytes]."""
        data = np.empty(self.bytes, np.uint8)
        done = 0
        for index in self._indices():
            values = source.read(index) + np.float32(self.offset)
            self._check(values)
            part = quantize(values, self.type, self.by_llama_cpp)
            data[done : done + part.size] = part
            done += part.size
        return data

    def _indices(self) -> Iterator[tuple[Any, ...]]:
        """Cut the tensor into runs of rows of about CHUNK elements, expert by expert."""
        experts, columns = self.shape[:-2], self.shape[-1] if len(self.shape) > 1 else 1
        rows = self.shape[-2] if len(self.shape) > 1 else self.shape[0]
        step = max(1, CHUNK // columns)
        for lead in np.ndindex(*experts):
            for start in range(0, rows, step):
                run = slice(start, start + step)
                yield (*lead, run if self.rows is None else mx.array(self.rows[run]))

    def _check(self, values: np.ndarray) -> None:
        largest = np.abs(values).max(initial=0.0)
        if not np.isfinite(largest):
            raise InputError(f"{self.path}: has values that are not finite; the model is damaged")
        if self.type == gguf.GGMLQuantizationType.F16 and largest > np.finfo(np.float16).max:
            raise InputError(f"{self.path}: {largest:g} is too large for f16; choose --type bf16 or f32")


def export_gguf(
    model_dir: Path | str,
    output: Path | str,
    type: str = "f16",
    *,
    updates: Callable[[LazyModel], Updates] | None = None,
    overwrite: bool = False,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GgufReport:
    """Write the mlx-lm model in `model_dir` (full precision or quantized) to one GGUF file at `output`.

    `type` is that of matrices whose rows fit it (a key of FILE_TYPES); vectors, so all norms, stay float32.
    `updates` gives the adapter to merge in; that is done in float32, weight by weight, as it is written.
    `name` is what the file calls the model (default: the directory's name); `progress` gets (bytes done, all).
    The file appears at `output` complete or not at all. Format: https://github.com/ggml-org/ggml, docs/gguf.md.
    Raises InputError, before anything is written, for what llama.cpp could not run as mlx-lm does.
    """
    model_dir, output = Path(model_dir), Path(output)
    check_output(output, overwrite)
    plan = plan_gguf(model_dir, type)
    arch, args, vocabulary, sources = plan.arch, plan.opened.args, plan.vocabulary, plan.opened.sources
    config, tensors = plan.opened.config, plan.tensors
    if updates is not None:
        sources = merged(sources, updates(plan.opened))
    del plan  # which holds the weights too

    writer = gguf.GGUFWriter(None, arch.gguf)
    writer.add_type("model")
    writer.add_name(_model_name(name or model_dir.resolve().name, arch, vocabulary))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[type][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_metadata(writer, arch, args, config)
    vocabulary.write(writer)
    factors = rope_factors(arch, args)
    for factor_name, factor in factors.items():
        writer.add_tensor_info(factor_name, factor.shape, factor.dtype, factor.nbytes)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, tensor.type)
    size = sum(tensor.bytes for tensor in tensors) + sum(factor.nbytes for factor in factors.values())
    write_file(writer, output, _data(factors, tensors, sources), size, progress)
    chosen = [(tensor.shape, tensor.type) for tensor in tensors]
    said = notes(arch, args) + vocabulary.notes + fallback_notes(chosen, type)
    return GgufReport(output, output.stat().st_size, len(tensors) + len(factors), arch.gguf, type, said)


@dataclass(frozen=True)
class Plan:
    """What an export would write of a model: its weights, the tensors they become, and its tokens."""

    arch: Architecture
    opened: LazyModel
    tensors: list[Planned]
    vocabulary: Vocabulary


def plan_gguf(model_dir: Path, type: str) -> Plan:
    """Look at all that an export needs, and write nothing.

    Raises:
        InputError: what llama.cpp could not run as mlx-lm does, or has no place for.
    """
    check_type(type)
    arch = architecture_of(read_config(model_dir))
    opened = open_model(model_dir)
    tensors, unmapped = _plan_tensors(arch, opened.args, opened.sources, type)
    if found := opened.problems + problems(arch, opened.args, opened.config) + unmapped:
        raise InputError(f"{model_dir}: cannot become GGUF: {'; '.join(found)}")
    vocabulary = read_vocabulary(model_dir, opened.config, opened.args.vocab_size)
    vocabulary.notes += compare_with_mlx_lm(model_dir, vocabulary)
    return Plan(arch, opened, tensors, vocabulary)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a directory, and a file that is there unless it may be overwritten."""
    if output.is_dir():
        raise InputError(f"{output}: is a directory; give the name of the file to write")
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists; choose another name or overwrite it explicitly")


def architecture_of(config: dict[str, Any]) -> Architecture:
    """Find how a model becomes GGUF, by its config.

    Raises:
        InputError: its model_type is in no row of the table; the message lists those that are.
    """
    arch = ARCHITECTURES.get(config["model_type"])
    if arch is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(f"model_type {config['model_type']}: no GGUF export for it; there is for {known}")
    return arch


def name_map(arch: Architecture, args: Any) -> Any:
    """gguf-py's map from names of tensors in Hugging Face's models to names in GGUF."""
    key = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch.gguf)
    return gguf.get_tensor_name_map(key, args.num_hidden_layers)


def is_tied(sources: Mapping[str, Source]) -> bool:
    """Whether the embedding is the head too."""
    return not any(path in sources for path in ("lm_head.weight", "output.weight"))


def _plan_tensors(
    arch: Architecture, args: Any, sources: Mapping[str, Source], type: str
) -> tuple[list[Planned], list[str]]:
    """Name every tensor of the file and choose its type: (the plan, the paths that have no place in it)."""
    names, tied = name_map(arch, args), is_tied(sources)
    layers, heads = args.num_hidden_layers, (args.num_attention_heads, args.num_key_value_heads)
    experts = getattr(args, "num_local_experts", None) or getattr(args, "num_experts", None) or 0
    # What llama.cpp calls a model by its number of layers.
    is_70b = layers == 80 and (arch.gguf == "qwen2" or (arch.gguf == "llama" and heads[0] != heads[1]))
    plan, unmapped = [], []
    for path, source in sources.items():
        for looked_up, rows in tensor_rows(arch, args, path):
            name = names.get_name(looked_up, try_suffixes=(".weight", ".bias"))
            stem, _, leaf = (name or "").rpartition(".")
            if name is None or (leaf == "bias" and stem.rpartition(".")[2] not in arch.biases):
                unmapped.append(f"llama.cpp's {arch.gguf} has no place for tensor {path}")
                continue
            shape = source.shape if rows is None else (len(rows), *source.shape[1:])
            targets = [name]
            if name == "token_embd.weight" and tied and arch.needs_output:
                targets.append("output.weight")
            for target in targets:
                offset = arch.norm_offset if stem.endswith("_norm") else 0.0
                kind = type_of(
                    target,
                    shape,
                    type,
                    tied=tied and not arch.needs_output,
                    layers=layers,
                    experts=experts,
                    is_70b=is_70b,
                )
                plan.append(Planned(target, path, shape, kind, rows, offset, is_k_quant(type)))
    return plan, unmapped


def _model_name(name: str, arch: Architecture, vocabulary: Vocabulary) -> str:
    """Make the name agree with the tokens: a model named phi-3 loses the spaces after its special tokens."""
    phi3 = vocabulary.strips_right and {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= set(vocabulary.tokens)
    named = re.search("phi-?3", name, re.IGNORECASE)
    if named and not phi3:  # llama.cpp would look for tokens that are not there, and not load
        name = re.sub("(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)
    elif not named and phi3 and arch.gguf == "phi3":
        name = f"phi-3 {name}"
    if vocabulary.strips_right and not re.search("phi-?3", name, re.IGNORECASE):
        vocabulary.notes.append(
            "some special tokens take the spaces after them in mlx-lm, none do in llama.cpp"
        )
    return name


def _data(
    factors: dict[str, np.ndarray], plan: Sequence[Planned], sources: dict[str, Source]
) -> Iterator[np.ndarray]:
    """Yield each tensor's data in the order of the file, letting go of every weight after its last use."""
    yield from factors.values()
    uses = Counter(tensor.path for tensor in plan)
    for tensor in plan:
        yield tensor.convert(sources[tensor.path])
        uses[tensor.path] -= 1
        if not uses[tensor.path]:
            del sources[tensor.path]
            mx.clear_cache()


def write_file(
    writer: Any,
    output: Path,
    data: Iterator[np.ndarray],
    size: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write beside `output`, reach the disk, then take its name; on any failure nothing stays."""
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < size:
        raise InputError(f"{output}: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there")
    _remove_left(output)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for array in data:
            writer.write_tensor_data(np.ascontiguousarray(array))
            done += array.nbytes
            del array  # before the next one is made
            if progress:
                progress(done, size)
        writer.flush()
        writer.close()
        flush(temporary)
        os.replace(temporary, output)
        flush(output.parent)
    except BaseException:
        writer.close()
        temporary.unlink(missing_ok=True)
        raise


def _remove_left(output: Path) -> None:
    """Remove what a killed export to the same name left; that of a process which still runs stays."""
    for left in output.parent.glob(f".{glob.escape(output.name)}.*.part"):
        number = left.name.split(".")[-2]
        if number.isdigit() and not _runs(int(number)):
            left.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
