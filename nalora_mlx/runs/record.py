"""run.json: what a run was given (settings, data, machine), for those who look at it later."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nalora_mlx.core import storage
from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.sources import HUB_KEYS, read_jsonl
from nalora_mlx.data.tokenization import Example, Split

RECORD_FILE = "run.json"
SAMPLES = 3  # prompts that are kept, so that a report can show answers to them
OPENING = 12  # words of a text that make a prompt
PACKAGES = ("nalora-mlx", "mlx", "mlx-lm", "numpy", "transformers")


class RecordFile:
    """Writes run.json when a run starts; usable as a listener of `train`. A full disk stops no run.

    Args:
        path: the file; one that is there is replaced, as it is of the same run.
        config: the run's settings.
        splits: the tokenized rows by name of their split.
        complain: told, in a sentence, when the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        config: RunConfig,
        splits: Mapping[str, Split],
        complain: Callable[[str], None] = print,
    ):
        self.path, self.config, self.splits, self.complain = path, config, splits, complain

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Write the file at the start: what an earlier run left has been moved away by then."""
        if event["event"] != "start":
            return
        try:
            content = storage.json_writer(record(self.config, self.splits))
            storage.write_file(self.path, content)
        except OSError as error:
            self.complain(f"note: {self.path} could not be written ({error.strerror}); the run goes on")


def record(config: RunConfig, splits: Mapping[str, Split]) -> dict[str, Any]:
    """The content of run.json; paths of the machine are cut to their last part."""
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if config.fine_tune_type != "full":  # with the defaults: the adapter's own file comes at the end only
        adapter = config.lora_config()
        settings |= {"lora_parameters": adapter.lora_parameters, "na_parameters": adapter.na_parameters}
    settings["optimizer_config"] = config.optimizer_config.get(config.optimizer) or {}
    for name in ("adapter_path", "resume", "resume_adapter_file", "report_to", "project_name"):
        del settings[name]
    settings["hf_dataset"] = _public(config.hf_dataset)
    for name in ("model", "data"):
        if Path(settings[name]).expanduser().exists():
            settings[name] = Path(settings[name]).name
    return {
        "settings": settings,
        "data": {name: lengths(split.examples) for name, split in splits.items() if split.examples},
        "samples": samples(splits, config),
        "environment": environment(),
    }


def _public(datasets: Any) -> Any:
    """Datasets of the Hub by names, splits and features; what load_dataset gets besides may be a token or a path."""
    if isinstance(datasets, list):
        return [_public(entry) for entry in datasets]
    return (
        {key: datasets[key] for key in HUB_KEYS if key in datasets and key != "config"} if datasets else None
    )


def samples(splits: Mapping[str, Split], config: RunConfig) -> list[dict[str, Any]]:
    """Prompts of the first validation rows (else training rows) that stand in files of this machine.

    Each has "messages" up to the last answer and "tools", or "text", the beginning of one.
    """
    found: list[dict[str, Any]] = []
    first = next(
        (splits[name].examples for name in ("valid", "train") if name in splits and len(splits[name])), []
    )
    read: dict[str, dict[str, Any]] = {}
    for example in first[: 10 * SAMPLES]:
        path = Path(example.source.rpartition(":")[0])
        if example.source not in read and path.is_file():
            try:
                read.update(read_jsonl(path))
            except InputError:  # it was changed since
                break
        sample = _sample(read.get(example.source, {}), config)
        if sample and sample not in found:
            found.append(sample)
    return found[:SAMPLES]


def _sample(row: dict[str, Any], config: RunConfig) -> dict[str, Any] | None:
    """What of a row a model is asked."""
    if config.prompt_feature in row and config.completion_feature in row:
        messages = [{"role": "user", "content": row[config.prompt_feature]}]
    elif config.chat_feature in row:
        turns = row[config.chat_feature]
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
        messages = turns[:last]
    elif config.text_feature in row:
        return {"text": " ".join(row[config.text_feature].split(" ")[:OPENING])}
    else:
        return None
    if not messages or not all(isinstance(turn.get("content"), str) for turn in messages):
        return None
    return {"messages": messages, **({"tools": row["tools"]} if row.get("tools") else {})}


def lengths(examples: Sequence[Example]) -> dict[str, Any]:
    """Rows, tokens, how many of them are supervised, and the rows' lengths in tokens."""
    found = np.array([len(example.tokens) for example in examples])
    low, middle, high, top = np.quantile(found, (0, 0.5, 0.95, 1)).astype(int).tolist()
    return {
        "rows": len(found),
        "tokens": int(found.sum()),
        "supervised": int(sum(example.loss_mask.sum() for example in examples)),
        "shortest": low,
        "median": middle,
        "p95": high,
        "longest": top,
    }


def environment() -> dict[str, str]:
    """Versions and the device."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from its source
            continue
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "device": str(mx.default_device().type).removeprefix("DeviceType."),
    }
