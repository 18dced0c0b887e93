"""The model card (README.md) of a merged model: its base, its training, and what was measured."""

import json
from pathlib import Path
from typing import Any

from nalora_mlx import __version__
from nalora_mlx.core import storage
from nalora_mlx.core.config import METHOD_LABELS
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.paths import is_hub_name
from nalora_mlx.models.hub import OUR_TAG
from nalora_mlx.runs.metrics import METRICS_FILE
from nalora_mlx.runs.record import RECORD_FILE

INHERITED_METADATA = ("license", "license_name", "license_link", "language")
# Training settings to list, under mlx-lm's names.
SETTINGS = (
    "data",
    "iters",
    "batch_size",
    "grad_accumulation_steps",
    "learning_rate",
    "optimizer",
    "max_seq_length",
    "mask_prompt",
    "chat_template_args",
    "seed",
)


def write_card(
    directory: Path,
    *,
    title: str,
    base: str | None,
    inherited: dict[str, Any],
    adapter: Path,
    adapter_config: dict[str, Any],
    merge_quality: str | None,
) -> None:
    """Write README.md into a model's directory. It contains no path of this machine.

    Args:
        directory: directory of the model.
        title: name of the model.
        base: name of the base model on the Hub; None if unknown.
        inherited: metadata of the base model's card. The license and languages are copied.
        adapter: directory of the adapter; its metrics.jsonl and run.json are read if they exist.
        adapter_config: content of its adapter_config.json.
        merge_quality: how close the merged model is to base + adapter, as a phrase.
    """
    from huggingface_hub import ModelCardData

    kind = adapter_config.get("fine_tune_type", "lora")
    if kind == "lora" and "na_lora" in adapter_config:  # for mlx-lm, an NA-LoRA adapter is a LoRA
        kind = "na-lora"
    method = METHOD_LABELS.get(kind, METHOD_LABELS["lora"])
    metadata = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        base_model=base,
        tags=["mlx", OUR_TAG, *(["lora"] if kind not in ("dora", "full") else [])],
        **{key: inherited[key] for key in INHERITED_METADATA if key in inherited},
    )
    origin = f"[{base}](https://huggingface.co/{base})" if base else "its base model"
    merged = "" if kind == "full" else " The adapter is merged into the weights."
    sections = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {title}\n",
        f"This model was fine-tuned from {origin} with {method}, by nalora-mlx {__version__}.{merged} "
        "It runs in mlx-lm like any other model.\n",
        f'```bash\nmlx_lm.generate --model {title} --prompt "Hello"\n```\n',
        "## Training\n",
        _format_table(_training_settings(adapter_config, _read_run_record(adapter / RECORD_FILE))),
    ]
    if losses := _read_losses(adapter / METRICS_FILE):
        sections += ["## Results\n", _format_table(losses)]
    if merge_quality:
        sections += ["## Merging\n", f"{merge_quality[0].upper()}{merge_quality[1:]}.\n"]
    (directory / "README.md").write_text("\n".join(sections), encoding="utf-8")


def _read_run_record(path: Path) -> dict[str, Any]:
    """Read run.json; return nothing if it is missing or damaged."""
    try:
        return storage.read_json(path)
    except InputError:
        return {}


def _training_settings(adapter_config: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    lora = adapter_config.get("lora_parameters") or {}
    settings = adapter_config | (record.get("settings") or {})
    train = (record.get("data") or {}).get("train") or {}
    rows: dict[str, Any] = {"layers": adapter_config.get("num_layers")}
    rows |= {key: lora.get(key) for key in ("rank", "scale", "dropout", "keys")}
    rows |= {key: settings.get(key) for key in SETTINGS}
    rows |= {"training rows": train.get("rows"), "supervised tokens": train.get("supervised")}
    rows |= {f"NA-LoRA {key}": value for key, value in (adapter_config.get("na_lora") or {}).items()}
    return {
        key.replace("_", " "): without_paths(value)
        for key, value in rows.items()
        if value not in (None, [], "")
    }


def without_paths(value: Any) -> Any:
    """Return a setting for publication: only the last part of local paths; names on the Hub unchanged."""
    if isinstance(value, list | tuple):
        return ", ".join(str(without_paths(item)) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {without_paths(item)}" for key, item in value.items())
    if not isinstance(value, str) or is_hub_name(value):
        return value
    return value.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _read_losses(path: Path) -> dict[str, Any]:
    """Return the losses in metrics.jsonl; unreadable lines are skipped."""
    records = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    valid, test = (
        [(r.get("step"), r["loss"]) for r in records if isinstance(r, dict) and _is_loss(r, split)]
        for split in ("valid", "test")
    )
    rows: dict[str, Any] = {}
    if valid:
        rows["validation loss before"] = f"{valid[0][1]:.4f}"
        rows["validation loss after"] = f"{valid[-1][1]:.4f} (iteration {valid[-1][0]})"
    if test:
        rows["test loss"] = f"{test[-1][1]:.4f}"
    return rows


def _is_loss(record: dict[str, Any], split: str) -> bool:
    return record.get("split") == split and isinstance(record.get("loss"), int | float)


def _format_table(rows: dict[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [f"| {key} | {str(value).replace('|', ' ')} |" for key, value in rows.items()]
    return "\n".join(lines) + "\n"
