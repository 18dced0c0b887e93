"""The model card (README.md) of a merged model: where it comes from, how it was trained, what was measured."""

import json
from pathlib import Path
from typing import Any

from nalora_mlx import __version__
from nalora_mlx.core.paths import is_hub_name
from nalora_mlx.models.hub import OUR_TAG
from nalora_mlx.runs.metrics import METRICS_FILE
from nalora_mlx.runs.record import RECORD_FILE

NAMES = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}
# Keys of an adapter_config.json that say how it was trained, in mlx-lm's words.
SETTINGS = (
    *(
        "data",
        "iters",
        "batch_size",
        "grad_accumulation_steps",
        "learning_rate",
        "optimizer",
        "max_seq_length",
    ),
    *("mask_prompt", "seed"),
)


def write_card(
    directory: Path,
    *,
    title: str,
    base: str | None,
    inherited: dict[str, Any],
    adapter: Path,
    description: dict[str, Any],
    kept: str | None,
) -> None:
    """Write README.md into a model's directory; it holds no path of this machine.

    Args:
        directory: of the model.
        title: name of the model.
        base: name on the Hub of the base model, None if it is not known.
        inherited: metadata of the base model's card, of which licence and languages stay true.
        adapter: directory of the adapter; its metrics.jsonl and run.json are read if they are there.
        description: content of its adapter_config.json.
        kept: what was measured of the merge.
    """
    from huggingface_hub import ModelCardData

    kind = NAMES.get(description.get("fine_tune_type", "lora"), "LoRA")
    method = f"NA-{kind}" if kind == "LoRA" and "na_lora" in description else kind
    tags = ["mlx", OUR_TAG, *(["lora"] if kind == "LoRA" else [])]
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        base_model=base,
        tags=tags,
        **{
            key: inherited[key]
            for key in ("license", "license_name", "license_link", "language")
            if key in inherited
        },
    )
    origin = f"[{base}](https://huggingface.co/{base})" if base else "its base model"
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {title}\n",
        f"{origin[0].upper()}{origin[1:]}, fine-tuned with {method} by nalora-mlx {__version__}"
        + ("." if kind == "full fine-tuning" else " and merged into one model.")
        + " It runs in mlx-lm as any model does.\n",
        f'```bash\nmlx_lm.generate --model {title} --prompt "Hello"\n```\n',
        "## Training\n",
        _table(_settings(description, _read_run(adapter / RECORD_FILE))),
    ]
    if results := _results(adapter / METRICS_FILE):
        parts += ["## Results\n", _table(results)]
    if kept:
        parts += ["## Merging\n", f"{kept[0].upper()}{kept[1:]}.\n"]
    (directory / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _read_run(path: Path) -> dict[str, Any]:
    """What a run was given, of its run.json; nothing where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _settings(description: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    lora = description.get("lora_parameters") or {}
    given = description | (run.get("settings") or {})
    train = (run.get("data") or {}).get("train") or {}
    rows: dict[str, Any] = {"layers": description.get("num_layers")}
    rows |= {key: lora.get(key) for key in ("rank", "scale", "dropout", "keys")}
    rows |= {key: given.get(key) for key in SETTINGS}
    rows |= {"training rows": train.get("rows"), "supervised tokens": train.get("supervised")}
    rows |= {f"NA-LoRA {key}": value for key, value in (description.get("na_lora") or {}).items()}
    return {
        key.replace("_", " "): public(value) for key, value in rows.items() if value not in (None, [], "")
    }


def public(value: Any) -> Any:
    """A setting as others may read it: of a path only its last part; OWNER/NAME of the Hub as it is."""
    if isinstance(value, list | tuple):
        return ", ".join(str(public(item)) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {public(item)}" for key, item in value.items())
    if not isinstance(value, str) or is_hub_name(value):
        return value
    return value.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _results(path: Path) -> dict[str, Any]:
    """Losses of a run's metrics.jsonl; a line that cannot be read is left out."""
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
    losses = {
        split: [(r.get("step"), r["loss"]) for r in records if isinstance(r, dict) and _is_loss(r, split)]
        for split in ("valid", "test")
    }
    rows: dict[str, Any] = {}
    if valid := losses["valid"]:
        rows["validation loss before"] = f"{valid[0][1]:.4f}"
        rows["validation loss after"] = f"{valid[-1][1]:.4f} (iteration {valid[-1][0]})"
    if losses["test"]:
        rows["test loss"] = f"{losses['test'][-1][1]:.4f}"
    return rows


def _is_loss(record: dict[str, Any], split: str) -> bool:
    return record.get("split") == split and isinstance(record.get("loss"), int | float)


def _table(rows: dict[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [f"| {key} | {str(value).replace('|', ' ')} |" for key, value in rows.items()]
    return "\n".join(lines) + "\n"
