"""The settings of a run as its checkpoints keep them, so that `--resume` needs no other flag.

Paths are kept relative to the run's directory. They hold wherever the run is resumed, and name nothing above the
directories that both share.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nalora_mlx.core.config import RunConfig, TrainingConfig, load_run_config
from nalora_mlx.core.config_adapter import LORA_NAMES, NA_NAMES
from nalora_mlx.core.config_data import DataConfig
from nalora_mlx.core.data_entries import ROWS_IN_MEMORY, data_entries

# How a run is started, not what it computes. Code of a model repository runs only if this start allows it.
NOT_SAVED = (
    "train",
    "plan",
    "resume",
    "resume_anyway",
    "resume_adapter_file",
    "adapter_path",
    "trust_remote_code",
)
ADAPTER = ("fine_tune_type", "num_layers", *LORA_NAMES, *NA_NAMES)
DATA = (*(f.name for f in fields(DataConfig)), "max_seq_length", "seed", "model")
# Parts of a run's identity, see `runs.fingerprint` -> the settings that can have changed them.
EXPLAINED_BY = {
    "base_model": ("model", "quantize", *ADAPTER),
    "training_data": DATA,
    "validation_data": DATA,
    "adapter": (*ADAPTER, "chat_template", "chat_template_args"),
    "optimizer": ("optimizer", "optimizer_config", "learning_rate", "lr_schedule"),
    **{f"training.{f.name}": (f.name,) for f in fields(TrainingConfig)},
}


def settings_to_save(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings of a run as JSON."""
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NOT_SAVED}
    if not isinstance(config, RunConfig):
        return settings
    directory = Path(config.adapter_path or ".").expanduser()
    for name in ("model", "chat_template"):
        settings[name] = _relative(settings[name], directory)
    if settings["hf_dataset"]:
        settings["hf_dataset"] = _without_tokens(settings["hf_dataset"])
        del settings["data"]
    else:
        entries = data_entries(settings["data"])
        settings["data"] = [entry | {"path": _relative(entry["path"], directory)} for entry in entries]
    return settings


def _relative(name: str | None, directory: Path) -> str | None:
    """Return a path relative to a directory, starting with a dot; other names as they are."""
    if name is None or name == ROWS_IN_MEMORY or not os.path.exists(os.path.expanduser(name)):
        return name
    path = os.path.relpath(os.path.realpath(os.path.expanduser(name)), os.path.realpath(directory))
    return path if path.startswith("..") else os.path.join(".", path)


def _absolute(name: str | None, directory: Path) -> str | None:
    """Return a path that `_relative` gave, relative to the current directory if it is below that."""
    if name is None or not name.startswith("."):
        return name
    path = os.path.normpath(os.path.realpath(directory) + os.sep + name)
    near = os.path.relpath(path)
    return path if near.startswith("..") else near


def _without_tokens(datasets: Any) -> Any:
    """Return entries of hf_dataset without access tokens among the arguments of load_dataset."""
    if isinstance(datasets, list):
        return [_without_tokens(entry) for entry in datasets]
    config = {key: value for key, value in (datasets.get("config") or {}).items() if "token" not in key}
    return {**datasets, "config": config} if config else {k: v for k, v in datasets.items() if k != "config"}


def resumed_settings(saved: Mapping[str, Any], directory: Path) -> dict[str, Any] | None:
    """Return the settings of a run as `load_run_config` takes them.

    Args:
        saved: the settings that its checkpoint holds.
        directory: of the run.

    Returns:
        None if the checkpoint was not written by `nalora lora` or `finetune`, or by a version that kept fewer settings.
    """
    known = {f.name for f in fields(RunConfig)} - set(NOT_SAVED)
    settings = {name: value for name, value in saved.items() if name in known and value is not None}
    if "model" not in settings:
        return None
    for name in ("model", "chat_template"):
        if name in settings:
            settings[name] = _absolute(settings[name], directory)
    if "data" in settings:
        entries = data_entries(settings["data"])
        settings["data"] = [entry | {"path": _absolute(entry["path"], directory)} for entry in entries]
        if len(entries) == 1 and entries[0].keys() == {"path", "ratio"} and entries[0]["ratio"] == 1:
            settings["data"] = settings["data"][0]["path"]
    return settings


def missing_paths(saved: Mapping[str, Any], directory: Path, given: Collection[str]) -> list[str]:
    """Return phrases about paths of a run's settings that do not exist any more, without settings that are given."""
    settings = resumed_settings(saved, directory) or {}
    found: list[tuple[str, str]] = []
    for name in ("model", "chat_template"):
        if name in settings and str(saved[name]).startswith("."):
            found.append((name, settings[name]))
    if "data" in settings:
        before = data_entries(saved["data"])
        found += [
            ("data", now["path"])
            for old, now in zip(before, data_entries(settings["data"]), strict=True)
            if old["path"].startswith(".")
        ]
    return [
        f"its {_flag(name)} was {path}, which does not exist; give {_flag(name)}"
        for name, path in found
        if name not in given and not os.path.exists(path)
    ]


def changed_settings(saved: Mapping[str, Any], config: TrainingConfig, directory: Path) -> dict[str, str]:
    """Return the settings of a run that differ from those it is resumed with -> a phrase with flag and values.

    Args:
        saved: the settings that its checkpoint holds.
        config: the settings now.
        directory: of the run.
    """
    settings = resumed_settings(saved, directory)
    if settings is None or not isinstance(config, RunConfig):
        before = {name: saved[name] for name in saved if name in TrainingConfig.__dataclass_fields__}
        now = {name: getattr(config, name) for name in before}
    else:
        before, now = _values(load_run_config(None, {}, settings)), _values(config)
    return {
        name: f"{_flag(name)} was {_shown(before[name])}, is {_shown(now[name])}"
        for name in before
        if name in now and before[name] != now[name]
    }


def _values(config: RunConfig) -> dict[str, Any]:
    """Return the settings of a run by name, with those of its adapter."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NOT_SAVED}
    for group in ("lora_parameters", "na_parameters"):
        del values[group]
    if config.fine_tune_type != "full":
        adapter = config.lora_config()
        values |= adapter.lora_parameters | (
            adapter.na_parameters if config.fine_tune_type == "na-lora" else {}
        )
    values["model"] = os.path.realpath(config.model) if os.path.exists(config.model) else config.model
    values["data"] = [
        entry | {"path": os.path.realpath(entry["path"]) if os.path.exists(entry["path"]) else entry["path"]}
        for entry in data_entries(config.data)
    ]
    return values


def _flag(name: str) -> str:
    """Return the flag of a setting; the name of one that only config files have."""
    for settings in (RunConfig, TrainingConfig):
        field = settings.__dataclass_fields__.get(name)
        if field is not None and field.metadata.get("yaml_only"):
            return name
        if field is not None:
            return "--" + field.metadata.get("flag_name", name.replace("_", "-"))
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    if isinstance(value, list) and all(isinstance(item, dict) and "path" in item for item in value):
        return " ".join(
            item["path"] if item.get("ratio", 1) == 1 else f"{item['path']}={item['ratio']:g}"
            for item in value
        )
    return str(value)
