"""run.json: what a run was given (settings, data, machine), for those who look at it later."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nalora_mlx import checkpoint
from nalora_mlx.config import RunConfig
from nalora_mlx.data import Example, Split

RECORD_FILE = "run.json"
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
            content = checkpoint.json_writer(record(self.config, self.splits))
            checkpoint.write_file(self.path, content)
        except OSError as error:
            self.complain(f"note: {self.path} could not be written ({error.strerror}); the run goes on")


def record(config: RunConfig, splits: Mapping[str, Split]) -> dict[str, Any]:
    """The content of run.json; paths of the machine are cut to their last part."""
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name in ("adapter_path", "resume", "resume_adapter_file", "report_to", "project_name"):
        del settings[name]
    for name in ("model", "data"):
        if Path(settings[name]).expanduser().exists():
            settings[name] = Path(settings[name]).name
    return {
        "settings": settings,
        "data": {name: lengths(split.examples) for name, split in splits.items() if split.examples},
        "environment": environment(),
    }


def lengths(examples: Sequence[Example]) -> dict[str, Any]:
    """Rows, tokens, how many of them are supervised, and the rows' lengths in tokens."""
    found = np.array([len(example.tokens) for example in examples])
    low, middle, high, top = np.quantile(found, (0, 0.5, 0.95, 1)).astype(int).tolist()
    return {
        "rows": len(found),
        "tokens": int(found.sum()),
        "supervised": int(sum(example.supervised.sum() for example in examples)),
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
