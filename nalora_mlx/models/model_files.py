"""The files of a model that training does not change, and which of them a model made from it gets.

It gets all of them except those that hold or describe other weights, that training left there, or that are code to
which no config refers.
"""

import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nalora_mlx.core.storage import read_json
from nalora_mlx.models.loading import INDEX

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_DIRECTORY = "additional_chat_templates"  # of named templates
_TOKENIZER_CONFIG = "tokenizer_config.json"
# Configs that may refer to Python files.
_CONFIGS = ("config.json", _TOKENIZER_CONFIG, "processor_config.json", "preprocessor_config.json")
_OLD_TEMPLATE_FILE = "chat_template.json"  # of a processor
_REPLACED = (INDEX, "config.json", "README.md")  # the new model has its own
_LEFT_BEHIND: dict[str, tuple[str, ...]] = {  # patterns of names by reason
    "weights in other files or formats": (
        "*.safetensors",
        "*.safetensors.index.json",
        "*.bin",
        "*.bin.index.json",
        "*.ckpt",
        "*.gguf",
        "*Modelfile",
        "*.h5",
        "*.msgpack",
        "*.npz",
        "*.onnx",
        "*.onnx_data",
        "*.pt",
        "*.pth",
    ),
    "of the base's training": ("adapter_config.json", "events.out.*", "trainer_state.json"),
}
_QUANTIZATION = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_OF_QUANTIZATION = "of the base's quantization"
_DIRECTORIES = "directories"
_CODE = "code that no config refers to"
_TEMPLATES = "chat templates that the adapter's replaces"


@dataclass
class ModelFiles:
    """Files for a model that is made from another one.

    Attributes:
        directory: of the other model.
        copied: names of files to copy, relative to the directory.
        written: content of files that differ.
        left_behind: names of files and directories that are not copied, by reason.
    """

    directory: Path
    copied: list[str] = field(default_factory=list)
    written: dict[str, bytes] = field(default_factory=dict)
    left_behind: dict[str, list[str]] = field(default_factory=dict)

    def nbytes(self) -> int:
        """Return the size of all files in bytes."""
        sizes = [(self.directory / name).stat().st_size for name in self.copied]
        return sum(sizes) + sum(map(len, self.written.values()))

    def write(self, target: Path) -> None:
        """Copy and write the files into an existing directory. Links become files."""
        for name in self.copied:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.directory / name, target / name)
        for name, content in self.written.items():
            (target / name).write_bytes(content)

    def describe_left_behind(self) -> str:
        """Return what is left behind and why; an empty text if nothing is."""
        return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in self.left_behind.items())


def model_files(
    directory: Path,
    weight_files: Collection[str],
    template: str | None = None,
    keeps_quantization: bool = False,
) -> ModelFiles:
    """Return the files for a model that is made from the one in a directory, other than weights, config and card.

    Args:
        directory: of the model.
        weight_files: names of the files that hold its weights.
        template: chat template that replaces the model's own; None to keep it.
        keeps_quantization: whether the new model's weights are quantized exactly as these are.

    Raises:
        InputError: a config is not valid JSON.
    """
    files = ModelFiles(directory)
    patterns = dict(_LEFT_BEHIND)
    if not keeps_quantization:
        patterns[_OF_QUANTIZATION] = _QUANTIZATION
    if not any(_refers_to_code(directory / name) for name in _CONFIGS):
        patterns[_CODE] = ("*.py",)
    if template is not None:
        patterns[_TEMPLATES] = (TEMPLATE_DIRECTORY, _OLD_TEMPLATE_FILE)
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name in _REPLACED or path.name in weight_files:
            continue
        reason = next((reason for reason, names in patterns.items() if _matches(path, names)), None)
        if path.is_dir() and path.name != TEMPLATE_DIRECTORY:
            reason = _DIRECTORIES
        if reason:
            files.left_behind.setdefault(reason, []).append(path.name + "/" * path.is_dir())
        elif path.is_dir():
            files.copied += [f"{path.name}/{inner.name}" for inner in sorted(path.glob("*.jinja"))]
        elif path.is_file():
            files.copied.append(path.name)
    if template is not None:
        _replace_template(files, template)
    return files


def _matches(path: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _refers_to_code(path: Path) -> bool:
    """Return whether a config names Python files that come with the model."""
    return path.is_file() and any(key in ("auto_map", "model_file") for key in _keys(read_json(path)))


def _keys(content: Any) -> Iterator[str]:
    """Yield all keys of nested JSON."""
    if isinstance(content, dict):
        yield from content
        content = list(content.values())
    for value in content if isinstance(content, list) else ():
        yield from _keys(value)


# --- chat templates -----------------------------------------------------------------------------------------


def _replace_template(files: ModelFiles, template: str) -> None:
    """Replace a model's chat templates by one.

    Programs look for it in different places: transformers prefers a file of its own, older versions and llama.cpp's
    converter an entry of tokenizer_config.json. So the file is written, and the entry replaced if there is one.
    """
    files.written[TEMPLATE_FILE] = template.encode()
    path = files.directory / _TOKENIZER_CONFIG
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        changed = _with_template(text, template)
        if changed != text:
            files.written[_TOKENIZER_CONFIG] = changed.encode()
    files.copied = [name for name in files.copied if name not in files.written]


def _with_template(text: str, template: str) -> str:
    """Return the text of a tokenizer_config.json with another chat template in its entry, if it has one."""
    config = json.loads(text)
    if "chat_template" not in config and "chat_template_type" not in config:
        return text
    if isinstance(config.get("chat_template"), str) and "chat_template_type" not in config:
        for ascii_only in (True, False):  # the rest keeps its bytes, if the entry is written in a usual way
            old = json.dumps(config["chat_template"], ensure_ascii=ascii_only)
            if len(places := list(re.finditer(rf'"chat_template"\s*:\s*({re.escape(old)})', text))) == 1:
                begin, end = places[0].span(1)
                return text[:begin] + json.dumps(template, ensure_ascii=ascii_only) + text[end:]
    config.pop("chat_template_type", None)  # with it, mlx-lm renders chats in Python, without a template
    return json.dumps(config | {"chat_template": template}, indent=2, ensure_ascii=False) + "\n"
