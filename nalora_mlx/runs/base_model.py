"""The model and the data that a run was trained on, for commands that do not get them as flags."""

from pathlib import Path
from typing import Any

from nalora_mlx.core.data_entries import data_entries
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.paths import is_hub_name
from nalora_mlx.core.storage import read_json
from nalora_mlx.runs.checkpoints import CHECKPOINTS, steps
from nalora_mlx.runs.record import RECORD_FILE
from nalora_mlx.runs.resume import STATE_FILE
from nalora_mlx.runs.saved_settings import resumed_settings


def trained_settings(adapter: Path) -> dict[str, Any]:
    """Return the settings of the run that wrote an adapter, by name; empty if its run does not say.

    The run's latest checkpoint has the paths of model and data. run.json is made to be shared, and has only names.

    Args:
        adapter: directory of a run, of its best adapter, or of one of its checkpoints.
    """
    for run in (adapter, adapter.parent, adapter.parent.parent):
        for checkpoint in reversed(steps(run / CHECKPOINTS).values()):
            settings = resumed_settings(_content(checkpoint / STATE_FILE).get("config") or {}, run)
            if settings is not None:
                return settings
        if (settings := _content(run / RECORD_FILE).get("settings") or {}).get("model"):
            return settings
    return {}


def trained_model(adapter: Path) -> str | None:
    """Return the base model of an adapter: a path, or a name on the Hub; None if its run does not say.

    Args:
        adapter: see `trained_settings`.
    """
    return trained_settings(adapter).get("model")


def missing_data(adapter: Path, data: Any) -> list[str]:
    """Return the paths of a run's data that do not exist; a name on the Hub is not a path.

    Args:
        adapter: see `trained_settings`.
        data: of its settings.
    """
    run = next(
        (run for run in (adapter, adapter.parent, adapter.parent.parent) if steps(run / CHECKPOINTS)), None
    )
    stored: list[Any] = []
    if run is not None:
        latest = list(steps(run / CHECKPOINTS).values())[-1]
        if kept := (_content(latest / STATE_FILE).get("config") or {}).get("data"):
            stored = data_entries(kept)
    paths = [entry["path"] for entry in data_entries(data)]
    # In a checkpoint, a path begins with a dot.
    is_path = [entry["path"].startswith(".") for entry in stored] or [not is_hub_name(path) for path in paths]
    return [
        path
        for path, local in zip(paths, is_path, strict=True)
        if local and not Path(path).expanduser().exists()
    ]


def _content(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; nothing if it is missing or damaged."""
    try:
        return read_json(path)
    except InputError:
        return {}
