"""What a run left in its directory, read and put in order; nothing is drawn here."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nalora_mlx.adapters import files
from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError
from nalora_mlx.report.series import MOST_COLUMNS, binned
from nalora_mlx.runs import checkpoints
from nalora_mlx.runs.checkpoints import CHECKPOINTS
from nalora_mlx.runs.metrics import METRICS_FILE

SCALARS = ("loss", "learning_rate", "tokens_per_second", "peak_memory_gb", "gradient_norm")
MOST_READ = 5 * MOST_COLUMNS  # reports of the layers, of which a heat map averages five to a column
KINDS = {"na-lora": "NA-LoRA", "lora": "LoRA", "dora": "DoRA", "full": "all weights trained"}
GROUPS = ("lora_parameters", "na_parameters", "na_lora")  # of settings
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.*)")


class NoReportYet(InputError):
    """A run that may have started, but has not told anything."""


@dataclass
class Table:
    """Steps [T] and one value per row and step [L, T]; NaN where nothing was measured."""

    steps: np.ndarray
    values: np.ndarray


@dataclass
class RunData:
    """One run, as its files tell it.

    `train` holds "step" and the scalars of the reports, each [N]; `valid` holds "step" and "loss". `grids` holds a
    `Table` per statistic over `layers`, `channels` one per layer over some of its channels. `samples` are prompts of
    its data.
    """

    name: str
    path: Path
    train: dict[str, np.ndarray]
    valid: dict[str, np.ndarray]
    test_loss: float | None = None
    tokens: int = 0
    skipped: int = 0
    layers: list[str] = field(default_factory=list)
    grids: dict[str, Table] = field(default_factory=dict)
    channels: dict[str, Table] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def kind(self) -> str | None:
        """How the model was fine-tuned, in words; None if no file says so."""
        return KINDS.get(str(self.settings.get("fine_tune_type")))

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest validation; None without one."""
        losses = self.valid["loss"]
        if not len(losses) or np.isnan(losses).all():
            return None
        lowest = int(np.nanargmin(losses))
        return int(self.valid["step"][lowest]), float(losses[lowest])

    @property
    def last_step(self) -> int:
        """The last step that was reported or validated."""
        return int(
            max((steps[-1] for steps in (self.train["step"], self.valid["step"]) if len(steps)), default=0)
        )


def read_runs(paths: list[Path]) -> list[RunData]:
    """Read runs; their names are as short as tells them apart.

    Raises:
        NoReportYet: one of them is no run's directory, or one of a run that has only begun.
        InputError: a file of a run cannot be read.
    """
    for path in paths:
        if not (path / METRICS_FILE).is_file():
            what = f"holds no {METRICS_FILE}" if path.is_dir() else "is no directory"
            kind = NoReportYet if path.is_dir() or not path.exists() else InputError
            raise kind(f"{path} {what}; give what --adapter-path of nalora lora was")
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("the same run is given twice; give each once")
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def read_run(path: Path, name: str) -> RunData:
    """Read one run's directory; a file that it lacks leaves its part empty."""
    rows = read_metrics(path / METRICS_FILE)
    train, valid = ([row for row in rows if row["split"] == split] for split in ("train", "valid"))
    if not train and not valid:
        raise NoReportYet(f"{path / METRICS_FILE} holds no report yet; train for a while first")
    run = RunData(
        name,
        path,
        {key: _column(train, key) for key in ("step", *SCALARS)},
        {key: _column(valid, key) for key in ("step", "loss")},
        test_loss=next((row["loss"] for row in reversed(rows) if row["split"] == "test"), None),
        tokens=max((row.get("tokens") or 0 for row in train), default=0),
        skipped=max((row.get("skipped") or 0 for row in train), default=0),
    )
    layered = [row for row in train if row.get("layers")]
    run.layers, run.grids = _grids(layered)
    run.channels = _channels(layered)
    _describe(run)
    return run


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; of two of the same step and split the later one counts.

    Of a long run some records only keep what they say of the layers, which is most of the file.

    Raises:
        InputError: a line that is whole holds something else. Half a line at the end is still being written.
    """
    records: dict[tuple[str, int], dict[str, Any]] = {}
    with path.open("rb") as file:
        reports = sum(b'"layers"' in line for line in file)
    every, report = max(1, reports // MOST_READ), 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                split, step = record["split"], int(record.get("step") or 0)
            except (ValueError, TypeError, KeyError):
                if not line.endswith("\n"):
                    break
                raise InputError(
                    f"{path}:{number} is no record of a run; remove the line, or give another run"
                ) from None
            if "layers" in record:
                report += 1
                if report % every and report < reports:
                    del record["layers"]
            records[split, step] = record
    return sorted(records.values(), key=lambda record: record.get("step") or 0)


def short_layers(paths: list[str]) -> list[str]:
    """Names of layers as short as tells them apart: their numbers, where no layer is there twice."""
    found = [_LAYER.fullmatch(path) for path in paths]
    if not all(found):
        return paths
    parts = [(match[1], match[2]) for match in found if match]
    if len({number for number, _ in parts}) == len(parts):
        return [number for number, _ in parts]
    return [f"{number} {rest}" for number, rest in parts]


def _names(paths: list[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    resolved = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, resolved)) + 1):
        names = ["/".join(parts[-count:]) for parts in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _column(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=float)


def _flat(layer: dict[str, Any]) -> dict[str, float | None]:
    """A layer's statistics by name: {"mask": {"mean": 1}} is {"mask.mean": 1}."""
    flat: dict[str, float | None] = {}
    for name, value in layer.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{part}": number for part, number in value.items()})
        else:
            flat[name] = value
    return {name: value for name, value in flat.items() if value is None or isinstance(value, int | float)}


def _grids(rows: list[dict[str, Any]]) -> tuple[list[str], dict[str, Table]]:
    """All statistics of all layers over the reports, binned to what a heat map can show."""
    paths = list(dict.fromkeys(path for row in rows for path in row["layers"]))
    if not rows:
        return [], {}
    place = {path: i for i, path in enumerate(paths)}
    values: dict[str, np.ndarray] = {}
    for t, row in enumerate(rows):
        for path, layer in row["layers"].items():
            for name, value in _flat(layer).items():
                if name not in values:
                    values[name] = np.full((len(paths), len(rows)), np.nan)
                if value is not None:
                    values[name][place[path], t] = value
    steps = np.array([row["step"] for row in rows], dtype=float)
    return paths, {name: Table(*binned(steps, grid)) for name, grid in values.items()}


def _channels(rows: list[dict[str, Any]]) -> dict[str, Table]:
    """Per layer: importance of its channels that were told, the most important at the end first."""
    found: dict[str, list[tuple[float, list[float | None]]]] = {}
    for row in rows:
        for path, layer in row["layers"].items():
            if "channels" in layer:
                found.setdefault(path, []).append((row["step"], layer["channels"]))
    tables = {}
    for path, told in found.items():
        values = np.array([channels for _, channels in told], dtype=float).T  # [C, T]
        order = np.argsort(-values[:, -1], kind="stable")
        tables[path] = Table(*binned(np.array([step for step, _ in told], dtype=float), values[order]))
    return tables


def _describe(run: RunData) -> None:
    """Settings, data, samples and environment: of run.json, and what it lacks of the adapter and a checkpoint."""
    from nalora_mlx.runs.record import RECORD_FILE
    from nalora_mlx.runs.resume import STATE_FILE

    saved = list(checkpoints.steps(run.path / CHECKPOINTS).values())
    adapter = _object(run.path / files.ADAPTER_CONFIG)
    state = _object(saved[-1] / STATE_FILE) if saved else {}
    record = _object(run.path / RECORD_FILE)
    for part in (adapter, state.get("config") or {}, record.get("settings") or {}):
        run.settings |= _known(part)
    if "na_lora" in adapter and "settings" not in record:  # the adapter says what it is for mlx-lm: a LoRA
        run.settings["fine_tune_type"] = "na-lora"
    rows = {"train": "training_data", "valid": "validation_data"}
    known = state.get("identity") or {}
    run.data = record.get("data") or {
        split: {"rows": known[key]["rows"]} for split, key in rows.items() if "rows" in (known.get(key) or {})
    }
    run.environment = record.get("environment") or state.get("versions") or {}
    run.samples = record.get("samples") or []


def _known(part: dict[str, Any]) -> dict[str, Any]:
    """Settings that say something; those of the adapter, which are a level deeper, beside the others."""
    flat = {name: value for name, value in part.items() if name not in GROUPS}
    for name in GROUPS:
        flat |= part.get(name) or {}
    return {name: value for name, value in flat.items() if value is not None and value != {}}


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file.

    Raises:
        InputError: there is one, and it cannot be read.
    """
    return storage.read_json(path) if path.exists() else {}
