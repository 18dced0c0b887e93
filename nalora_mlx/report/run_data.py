"""Runs as read from their directories: losses, statistics of layers, settings and environment."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from nalora_mlx.adapters.files import ADAPTER_CONFIG, CHAT_KEY
from nalora_mlx.core import storage
from nalora_mlx.core.config import METHOD_LABELS, PreferenceConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.paths import distinct_names
from nalora_mlx.report.downsampling import MAX_COLUMNS, average_columns
from nalora_mlx.runs import checkpoints
from nalora_mlx.runs.checkpoints import CHECKPOINTS
from nalora_mlx.runs.evaluations import read_evaluations
from nalora_mlx.runs.metrics import METRICS_FILE
from nalora_mlx.runs.preferences import OBJECTIVES, TRL_NAMES, measures, preference_config
from nalora_mlx.runs.samples import read_samples

SCALARS = (
    "loss",
    "learning_rate",
    "tokens_per_second",
    "peak_memory_gb",
    "gradient_norm",
    "selection_change",
)
MEASURES = (*TRL_NAMES, "accuracy_longer", "accuracy_shorter")  # of preference runs
MAX_LAYER_REPORTS = (
    5 * MAX_COLUMNS
)  # reports whose layer statistics are read: a heat map averages five to a column
SETTING_GROUPS = ("lora_parameters", "na_parameters", "na_lora")  # nested in run.json and adapter_config.json
_LAYER_PATH = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.*)")


class NoReportYet(InputError):
    """A run that may have started but has not reported anything."""


@dataclass
class Grid:
    """Values over rows and steps."""

    steps: np.ndarray  # [T]
    values: np.ndarray  # [L, T]; NaN where nothing was measured


@dataclass
class RunData:
    """One run, as read from its files."""

    name: str
    path: Path
    train: dict[str, np.ndarray]  # "step" and SCALARS of each report, and MEASURES in preference runs; [N]
    valid: dict[str, np.ndarray]  # "step" and "loss" of each validation, and MEASURES
    test_loss: float | None = None
    tokens: int = 0
    skipped: int = 0
    seconds: float = 0.0  # of training and validation
    layers: list[str] = field(default_factory=list)
    grids: dict[str, Grid] = field(default_factory=dict)  # by statistic, one row per layer
    channels: dict[str, Grid] = field(
        default_factory=dict
    )  # importance by layer, one row per recorded channel
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(
        default_factory=dict
    )  # name, type and number of parameters of the base model
    samples: list[dict[str, Any]] = field(default_factory=list)  # prompts with answers, see `read_samples`
    prompts: list[dict[str, Any]] = field(default_factory=list)  # saved at the start, also without answers
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # see `read_evaluations`

    @property
    def method(self) -> str | None:
        """Label of the fine-tuning method; None if no file names it."""
        return METHOD_LABELS.get(str(self.settings.get("fine_tune_type")))

    @property
    def prefers(self) -> bool:
        """Whether this is a preference run."""
        return "accuracy" in self.train

    @property
    def objective(self) -> str | None:
        """Label of the objective of a preference run; None for supervised training."""
        return OBJECTIVES.get(self.preferences.train_mode)

    @property
    def preferences(self) -> PreferenceConfig:
        """Settings of preference training."""
        return preference_config(self.settings)

    @property
    def best_index(self) -> int | None:
        """Index of the validation with the highest accuracy, if there is one, and the lowest loss; None without any."""
        losses = self.valid["loss"]
        known = np.flatnonzero(~np.isnan(losses))
        accuracies = np.nan_to_num(self.valid.get("accuracy", np.zeros(len(losses))))
        return min(map(int, known), key=lambda i: (-accuracies[i], losses[i]), default=None)

    @property
    def best_validation(self) -> tuple[int, float] | None:
        """Step and loss of the best validation; None without a validation."""
        best = self.best_index
        return None if best is None else (int(self.valid["step"][best]), float(self.valid["loss"][best]))

    @property
    def best_accuracy(self) -> float | None:
        """Accuracy of the best validation; None without one, and in supervised training."""
        best = self.best_index
        return None if best is None or "accuracy" not in self.valid else float(self.valid["accuracy"][best])

    @property
    def last_step(self) -> int:
        """Last step with a report or a validation."""
        return int(
            max((steps[-1] for steps in (self.train["step"], self.valid["step"]) if len(steps)), default=0)
        )


def read_runs(paths: list[Path]) -> list[RunData]:
    """Read runs. Their names are the shortest ends of their paths that distinguish them.

    Raises:
        NoReportYet: a path is not a run's directory, or its run has not reported yet.
        InputError: a file of a run cannot be read, or a run is given twice.
    """
    for path in paths:
        if not (path / METRICS_FILE).is_file():
            problem = f"contains no {METRICS_FILE}" if path.is_dir() else "is not a directory"
            error = NoReportYet if path.is_dir() or not path.exists() else InputError
            raise error(f"{path} {problem}; give the --adapter-path of nalora lora")
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("the same run is given twice; give each run once")
    return [read_run(path, name) for path, name in zip(paths, distinct_names(paths), strict=True)]


def read_run(path: Path, name: str) -> RunData:
    """Read a run's directory. Missing files leave their part of the data empty.

    Raises:
        NoReportYet: the run has not reported yet.
        InputError: a file cannot be read.
    """
    records = read_metrics(path / METRICS_FILE)
    train, valid = ([record for record in records if record["split"] == s] for s in ("train", "valid"))
    if not train and not valid:
        raise NoReportYet(f"{path / METRICS_FILE} has no reports yet; train for a while first")
    with_layers = [record for record in train if record.get("layers")]
    layers, grids = _layer_grids(with_layers)
    train, valid = ([record | measures(record) for record in split] for split in (train, valid))
    measured = [key for key in MEASURES if any(key in record for record in (*train, *valid))]
    run = RunData(
        name,
        path,
        {key: _column(train, key) for key in ("step", *SCALARS, *measured)},
        {key: _column(valid, key) for key in ("step", "loss", *measured)},
        test_loss=next((record["loss"] for record in reversed(records) if record["split"] == "test"), None),
        tokens=max((record.get("tokens") or 0 for record in train), default=0),
        skipped=max((record.get("skipped") or 0 for record in train), default=0),
        layers=layers,
        grids=grids,
        seconds=_duration(train, valid),
        channels=_channel_grids(with_layers),
        samples=read_samples(path),
        evaluations=read_evaluations(path),
    )
    _read_description(run)
    return run


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of metrics.jsonl, ordered by step; a later record replaces one of the same split and step.

    For a long run, only some records keep their layer statistics, which are most of the file.

    Raises:
        InputError: a complete line is not a record. An incomplete last line is still being written.
    """
    records: dict[tuple[str, int], dict[str, Any]] = {}
    with path.open("rb") as file:
        layer_reports = sum(b'"layers"' in line for line in file)
    keep_every, count = max(1, layer_reports // MAX_LAYER_REPORTS), 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                split, step = record["split"], int(record.get("step") or 0)
            except (ValueError, TypeError, KeyError):
                if not line.endswith("\n"):
                    break
                raise InputError(
                    f"{path}:{number} is not a record of a run; remove the line, or give another run"
                ) from None
            if "layers" in record:
                count += 1
                if count % keep_every and count < layer_reports:
                    del record["layers"]
            records[split, step] = record
    return sorted(records.values(), key=lambda record: record.get("step") or 0)


def short_layers(paths: list[str]) -> list[str]:
    """Shorten the paths of layers to their numbers, followed by the rest of the path if numbers repeat."""
    matches = [_LAYER_PATH.fullmatch(path) for path in paths]
    if not all(matches):
        return paths
    parts = [(match[1], match[2]) for match in matches if match]
    if len({number for number, _ in parts}) == len(parts):
        return [number for number, _ in parts]
    return [f"{number} {rest}" for number, rest in parts]


def _duration(train: list[dict[str, Any]], valid: list[dict[str, Any]]) -> float:
    """Return the seconds that training and validation took, from the speed of each report; 0 if it is not known."""
    seconds, last = 0.0, 0
    for record in train:
        seconds += (record["step"] - last) / (record.get("iterations_per_second") or math.inf)
        last = record["step"]
    return seconds + sum(record.get("seconds") or 0 for record in valid) if seconds else 0.0


def _column(records: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if record.get(key) is None else record[key] for record in records], dtype=float)


def _layer_grids(records: list[dict[str, Any]]) -> tuple[list[str], dict[str, Grid]]:
    """Return the layers, and each statistic over layers and reports, averaged to the width of a heat map."""
    paths = list(dict.fromkeys(path for record in records for path in record["layers"]))
    if not records:
        return [], {}
    rows = {path: i for i, path in enumerate(paths)}
    values: dict[str, np.ndarray] = {}
    for t, record in enumerate(records):
        for path, layer in record["layers"].items():
            for name, value in _statistics(layer):
                if name not in values:
                    values[name] = np.full((len(paths), len(records)), np.nan)
                if value is not None:
                    values[name][rows[path], t] = value
    steps = np.array([record["step"] for record in records], dtype=float)
    return paths, {name: Grid(*average_columns(steps, grid)) for name, grid in values.items()}


def _statistics(layer: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Yield a layer's statistics by name: {"mask": {"mean": 1}} gives ("mask.mean", 1)."""
    for name, value in layer.items():
        nested = value if isinstance(value, dict) else {"": value}
        for part, number in nested.items():
            if number is None or isinstance(number, int | float):
                yield f"{name}.{part}" if part else name, number


def _channel_grids(records: list[dict[str, Any]]) -> dict[str, Grid]:
    """Return the importance of each layer's recorded channels, sorted by their final importance, highest first."""
    reports: dict[str, list[tuple[float, list[float | None]]]] = {}
    for record in records:
        for path, layer in record["layers"].items():
            if "channels" in layer:
                reports.setdefault(path, []).append((record["step"], layer["channels"]))
    grids = {}
    for path, channels in reports.items():
        values = np.array([importance for _, importance in channels], dtype=float).T  # [C, T]
        order = np.argsort(-values[:, -1], kind="stable")
        steps = np.array([step for step, _ in channels], dtype=float)
        grids[path] = Grid(*average_columns(steps, values[order]))
    return grids


def _read_description(run: RunData) -> None:
    """Set settings, data, prompts and environment from run.json, or else from the adapter and the last checkpoint."""
    from nalora_mlx.runs.record import RECORD_FILE
    from nalora_mlx.runs.resume import STATE_FILE

    saved = list(checkpoints.steps(run.path / CHECKPOINTS).values())
    adapter = _read_optional_json(run.path / ADAPTER_CONFIG)
    adapter.pop(CHAT_KEY, None)  # run.json has the settings as given
    state = _read_optional_json(saved[-1] / STATE_FILE) if saved else {}
    record = _read_optional_json(run.path / RECORD_FILE)
    for settings in (adapter, state.get("config") or {}, record.get("settings") or {}):
        run.settings |= _flatten_settings(settings)
    known = record.get("settings") or {}  # those of preference training that have an effect
    for name in (each.name for each in fields(PreferenceConfig)):
        if name not in known and (known or not run.prefers):
            run.settings.pop(name, None)
    if "na_lora" in adapter and "settings" not in record:  # for mlx-lm, the adapter's type is lora
        run.settings["fine_tune_type"] = "na-lora"
    keys = {"train": "training_data", "valid": "validation_data"}
    identity = state.get("identity") or {}
    run.data = record.get("data") or {
        split: {"rows": identity[key]["rows"]}
        for split, key in keys.items()
        if "rows" in (identity.get(key) or {})
    }
    run.environment = record.get("environment") or state.get("versions") or {}
    run.model = record.get("model") or {}
    run.prompts = record.get("samples") or []


def _flatten_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that have a value, with those of nested groups on the top level."""
    flat = {name: value for name, value in settings.items() if name not in SETTING_GROUPS}
    for name in SETTING_GROUPS:
        flat |= settings.get(name) or {}
    return {name: value for name, value in flat.items() if value is not None and value != {}}


def _read_optional_json(path: Path) -> dict[str, Any]:
    return storage.read_json(path) if path.exists() else {}
