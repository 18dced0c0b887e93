"""run.json: the settings, data statistics and environment of a run, for the report and the model card."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nalora_mlx.core import storage
from nalora_mlx.core.config import PreferenceConfig, RunConfig
from nalora_mlx.core.data_entries import data_entries
from nalora_mlx.core.settings_without_effect import has_effect
from nalora_mlx.core.versions import environment
from nalora_mlx.data.sources.loading import HUB_KEYS
from nalora_mlx.data.summary import length_statistics
from nalora_mlx.data.tokenization import Split
from nalora_mlx.runs.samples import saved_prompt

RECORD_FILE = "run.json"


class RecordFile:
    """A listener of `train` that writes run.json when a run starts. A full disk does not stop the run.

    Args:
        path: the file. An old one is replaced, because it belongs to the same run.
        config: the run's settings.
        splits: the tokenized rows by split.
        warn: called with a message if the file cannot be written.
        prompts: a few prompts of the data, see `runs.samples.choose_prompts`.
        model: the base model: "name", "type" and "parameters".
    """

    def __init__(
        self,
        path: Path,
        config: RunConfig,
        splits: Mapping[str, Split],
        warn: Callable[[str], None] = print,
        prompts: Sequence[Mapping[str, Any]] = (),
        model: Mapping[str, Any] = {},
    ):
        self.path, self.warn = path, warn
        self.content = record(config, splits) | {
            "samples": [*map(saved_prompt, prompts)],
            "model": dict(model),
        }

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Write the file at the start event. An earlier run has been archived by then."""
        if event["event"] != "start":
            return
        try:
            storage.write_file(self.path, storage.json_writer(self.content))
        except OSError as error:
            self.warn(f"note: {self.path} could not be written ({error.strerror}); the run goes on")


def record(config: RunConfig, splits: Mapping[str, Split]) -> dict[str, Any]:
    """Return the content of run.json. Local paths are shortened to their last part."""
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if config.fine_tune_type != "full":
        # With defaults, because adapter_config.json is written only at the end.
        adapter = config.lora_config()
        settings |= {"lora_parameters": adapter.lora_parameters, "na_parameters": adapter.na_parameters}
    settings["optimizer_config"] = config.optimizer_config.get(config.optimizer) or {}
    for name in ("adapter_path", "resume", "resume_adapter_file", "report_to", "project_name"):
        del settings[name]
    if config.prefers:
        settings["preference_beta"] = config.beta_of_loss
    for name in (f.name for f in dataclasses.fields(PreferenceConfig)):
        if not config.prefers or not has_effect(config, name):
            del settings[name]
    settings["hf_dataset"] = _public_keys(config.hf_dataset)
    settings["data"] = _public_data(config.data)
    for name in ("model", "chat_template"):
        if settings[name] is not None and os.path.exists(os.path.expanduser(settings[name])):
            settings[name] = Path(settings[name]).name
    return {
        "settings": settings,
        "data": {
            name: {"rows": split.rows, **length_statistics(split.sequences)}
            for name, split in splits.items()
            if split.sequences
        },
        "environment": environment(),
    }


def _public_path(name: str) -> str:
    return Path(name).name if Path(name).expanduser().exists() else name


def _public_data(data: Any) -> Any:
    """Return the sources of a run, with the last parts of their paths; only the name if there is one source."""
    entries = [entry | {"path": _public_path(entry["path"])} for entry in data_entries(data)]
    plain = len(entries) == 1 and entries[0].keys() == {"path", "ratio"} and entries[0]["ratio"] == 1
    return entries[0]["path"] if plain else entries


def _public_keys(datasets: Any) -> Any:
    """Return names, splits and features of Hub datasets. Arguments of load_dataset may hold tokens or paths."""
    if isinstance(datasets, list):
        return [_public_keys(entry) for entry in datasets]
    return (
        {key: datasets[key] for key in HUB_KEYS if key in datasets and key != "config"} if datasets else None
    )
