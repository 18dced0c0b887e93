"""A whole model as one GGUF file: read tensor by tensor, dequantized, converted and written one at a time."""

import dataclasses
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nalora_mlx.errors import InputError
from nalora_mlx.export.gguf_architectures import (
    ARCHITECTURES,
    Architecture,
    notes,
    problems,
    rope_factors,
    tensor_rows,
    write_metadata,
)
from nalora_mlx.export.gguf_tokenizer import Vocabulary, read_vocabulary

try:
    import gguf
except ImportError as error:
    raise InputError("export gguf needs the package gguf: pip install 'nalora-mlx[export]'") from error

# Type of the weights -> what GGUF calls a file of it.
FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
    "q4_1": "MOSTLY_Q4_1",
    "q5_0": "MOSTLY_Q5_0",
    "q5_1": "MOSTLY_Q5_1",
}
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
class Source:
    """One weight as the model holds it: lazy arrays, read when `read` asks for them.

    `weight` [(experts,) rows, columns], packed where there are scales; `shape` is that of the plain weight.
    """

    weight: mx.array
    shape: tuple[int, ...]
    scales: mx.array | None = None
    biases: mx.array | None = None
    global_scale: mx.array | None = None
    packing: dict[str, Any] | None = None  # group_size, bits, mode

    def read(self, index: tuple[Any, ...]) -> np.ndarray:
        """Return the part of the plain weight at `index` (rows, or expert and rows), float32."""
        if self.scales is None or self.packing is None:
            return np.array(self.weight[index].astype(mx.float32))
        scales, biases, whole = self.scales[index], self.biases, self.global_scale
        if biases is not None:  # dequantize() rounds to the dtype of its scales
            scales, biases = scales.astype(mx.float32), biases[index].astype(mx.float32)
        if whole is not None and whole.ndim:  # one per expert
            whole = whole[index[0]]
        packed = self.weight[index]
        return np.array(
            mx.dequantize(packed, scales, biases, **self.packing, global_scale=whole, dtype=mx.float32)
        )


@dataclass(frozen=True)
class Planned:
    """One tensor to write: GGUF name, its weight's path, the rows to take of it and what to add to it."""

    name: str
    path: str
    shape: tuple[int, ...]
    type: Any  # gguf.GGMLQuantizationType
    rows: np.ndarray | None = None
    offset: float = 0.0

    def convert(self, source: Source) -> np.ndarray:
        """Return the tensor's data as it stands in the file: uint8 [bytes]."""
        data = np.empty(_size(self), np.uint8)
        done = 0
        for index in self._indices():
            values = source.read(index) + np.float32(self.offset)
            self._check(values)
            part = gguf.quants.quantize(values, self.type).view(np.uint8).reshape(-1)
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
    overwrite: bool = False,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GgufReport:
    """Write the mlx-lm model in `model_dir` (full precision or quantized) to one GGUF file at `output`.

    `type` is that of matrices whose rows fit it (a key of FILE_TYPES); vectors, so all norms, stay float32.
    `name` is what the file calls the model (default: the directory's name); `progress` gets (bytes done, all).
    The file appears at `output` complete or not at all. Format: https://github.com/ggml-org/ggml, docs/gguf.md.
    Raises InputError, before anything is written, for what llama.cpp could not run as mlx-lm does.
    """
    model_dir, output = Path(model_dir), Path(output)
    if type not in FILE_TYPES:
        raise InputError(f"type {type}: unknown; choose one of {', '.join(FILE_TYPES)}")
    if output.is_dir():
        raise InputError(f"{output}: is a directory; give the name of the file to write")
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists; choose another name or overwrite it explicitly")
    config = _read_config(model_dir)
    arch = _architecture(config)
    args, sources, found = _load(model_dir, config)
    found += problems(arch, args, config)
    plan, unmapped = _plan(arch, args, sources, type)
    if found or unmapped:
        raise InputError(f"{model_dir}: cannot become GGUF: {'; '.join(found + unmapped)}")
    vocabulary = read_vocabulary(model_dir, config, args.vocab_size)

    writer = gguf.GGUFWriter(None, arch.gguf)
    writer.add_type("model")
    writer.add_name(_model_name(name or model_dir.resolve().name, arch, vocabulary))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[type]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_metadata(writer, arch, args, config)
    vocabulary.write(writer)
    factors = rope_factors(arch, args)
    for factor_name, factor in factors.items():
        writer.add_tensor_info(factor_name, factor.shape, factor.dtype, factor.nbytes)
    for tensor in plan:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), _size(tensor), tensor.type)
    size = sum(map(_size, plan)) + sum(factor.nbytes for factor in factors.values())
    _write(writer, output, _data(factors, plan, sources), size, progress)
    said = notes(arch, args) + vocabulary.notes + _fallbacks(plan, type)
    return GgufReport(output, output.stat().st_size, len(plan) + len(factors), arch.gguf, type, said)


def _read_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; give the directory of an mlx-lm model") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{path}: has no model_type; give the directory of an mlx-lm model")
    return config


def _architecture(config: dict[str, Any]) -> Architecture:
    arch = ARCHITECTURES.get(config["model_type"])
    if arch is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(f"model_type {config['model_type']}: no GGUF export for it; there is for {known}")
    return arch


def _load(model_dir: Path, config: dict[str, Any]) -> tuple[Any, dict[str, Source], list[str]]:
    """Open the model as mlx-lm does, with lazy weights: (its ModelArgs, weight by path, what is wrong).

    mlx-lm's own classes say which tensors there must be, in which shapes, and how each is quantized.
    """
    from mlx.utils import tree_flatten
    from mlx_lm import utils

    base, args_class = utils._get_classes(config)
    needed = [
        f.name
        for f in dataclasses.fields(args_class)
        if f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing := [key for key in needed if key not in config]:
        raise InputError(f"{model_dir / 'config.json'}: has no {', '.join(missing)}")
    found: list[str] = []

    class Checked(base):  # type: ignore[misc, valid-type]
        def load_weights(self, weights: Any, strict: bool = True) -> Any:
            found.extend(_mismatches(dict(tree_flatten(self.parameters())), dict(weights)))
            return super().load_weights(weights, strict=False)

    try:
        model, _ = utils.load_model(
            model_dir, lazy=True, get_model_classes=lambda config: (Checked, args_class)
        )
    except (FileNotFoundError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"{model_dir}: mlx-lm cannot open this model: {error}") from error
    sources = {}
    for prefix, module in model.named_modules():
        plain = {
            leaf: value for leaf, value in module.items() if isinstance(value, mx.array) and leaf[0] != "_"
        }
        if "scales" in plain:
            weight, scales = plain.pop("weight"), plain.pop("scales")
            shape = (*weight.shape[:-1], weight.shape[-1] * 32 // module.bits)
            packing = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            biases, whole = plain.pop("biases", None), plain.pop("global_scale", None)
            sources[f"{prefix}.weight"] = Source(weight, shape, scales, biases, whole, packing)
        sources |= {
            f"{prefix}.{leaf}".lstrip("."): Source(value, value.shape) for leaf, value in plain.items()
        }
    return model.args, sources, found


def _mismatches(expected: dict[str, mx.array], given: dict[str, mx.array]) -> list[str]:
    found = []
    for path in sorted(expected.keys() | given.keys()):
        if path not in given:
            found.append(f"tensor {path} is missing")
        elif path not in expected:
            found.append(f"tensor {path} is not one of this model type's")
        elif expected[path].shape != given[path].shape:
            found.append(f"tensor {path} has shape {given[path].shape}, expected {expected[path].shape}")
    return found


def _plan(
    arch: Architecture, args: Any, sources: dict[str, Source], type: str
) -> tuple[list[Planned], list[str]]:
    """Name every tensor of the file and choose its type: (the plan, the paths that have no place in it)."""
    key = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch.gguf)
    names = gguf.get_tensor_name_map(key, args.num_hidden_layers)
    plan, unmapped = [], []
    tied = not any(path in sources for path in ("lm_head.weight", "output.weight"))
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
                is_head = target == "output.weight" or (target == "token_embd.weight" and tied)
                offset = arch.norm_offset if stem.endswith("_norm") else 0.0
                kind = _type(target, shape, type, is_head)
                plan.append(Planned(target, path, shape, kind, rows, offset))
    return plan, unmapped


def _type(name: str, shape: tuple[int, ...], type: str, is_head: bool) -> Any:
    """Choose one tensor's type: vectors and routers F32; rows that fill no block F16; a head at least Q8_0."""
    types = gguf.GGMLQuantizationType
    if len(shape) == 1 or ".ffn_gate_inp." in name:
        return types.F32
    wanted = types[type.upper()]
    if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        return types.F16
    # The head decides between tokens, and llama.cpp keeps it finer than the rest too.
    return types.Q8_0 if is_head and type[:2] in ("q4", "q5") else wanted


def _fallbacks(plan: list[Planned], type: str) -> list[str]:
    wanted = type.upper()
    others = Counter(t.type.name for t in plan if len(t.shape) > 1 and t.type.name not in (wanted, "F32"))
    return [
        f"{count} of {len(plan)} tensors are {other} instead of {wanted}" for other, count in others.items()
    ]


def _size(tensor: Planned) -> int:
    block, size = gguf.GGML_QUANT_SIZES[tensor.type]
    return int(np.prod(tensor.shape)) // block * size


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
    factors: dict[str, np.ndarray], plan: list[Planned], sources: dict[str, Source]
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


def _write(
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
        for file in writer.fout:
            os.fsync(file.fileno())
        writer.close()
        os.replace(temporary, output)
    except BaseException:
        writer.close()
        temporary.unlink(missing_ok=True)
        raise
