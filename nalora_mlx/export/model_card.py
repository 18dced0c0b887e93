"""Model cards (README.md) of merged models and of adapters: their base, their training, and what was measured."""

import json
import re
from pathlib import Path
from typing import Any

from nalora_mlx import __version__
from nalora_mlx.adapters.files import ADAPTER_CONFIG, IMAGES_KEY, NA_KEY
from nalora_mlx.core import storage
from nalora_mlx.core.config import METHOD_LABELS
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.paths import is_hub_name
from nalora_mlx.models.hub import OUR_TAG
from nalora_mlx.runs.evaluation_rows import by_part, measure_rows, part_title
from nalora_mlx.runs.evaluations import evaluations_of
from nalora_mlx.runs.metrics import METRICS_FILE
from nalora_mlx.runs.preferences import OBJECTIVES, describe_objective
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
    images: bool = False,
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
        images: whether the model is one of mlx-vlm.
    """
    kind, record = _fine_tune_type(adapter_config), _read_json(adapter / RECORD_FILE)
    metadata = _metadata("mlx", base, inherited, kind, images)
    origin = f"[{base}](https://huggingface.co/{base})" if base else "its base model"
    merged = "" if kind == "full" else " The adapter is merged into the weights."
    sections = [
        metadata,
        f"# {title}\n",
        f"This model was fine-tuned from {origin} with {_method(kind, record)}, by nalora-mlx {__version__}.{merged} "
        f"It runs in {'mlx-vlm' if images else 'mlx-lm'} like any other model.\n",
        f"```bash\n{_generate(title, images)}\n```\n",
        "## Training\n",
        _format_table(_training_settings(adapter_config, record)),
    ]
    if losses := _read_losses(adapter / METRICS_FILE):
        sections += ["## Results\n", _format_table(losses)]
    sections += _evaluations(adapter)
    if merge_quality:
        sections += ["## Merging\n", f"{merge_quality[0].upper()}{merge_quality[1:]}.\n"]
    (directory / "README.md").write_text("\n".join(sections), encoding="utf-8")


def adapter_card(
    repo: str,
    *,
    base: str | None,
    inherited: dict[str, Any],
    config: dict[str, Any],
    run: Path | None,
    losses: bool = True,
) -> str:
    """Return the card of an adapter. It contains no path of this machine.

    Args:
        repo: name of the adapter on the Hub.
        base: name of the base model on the Hub; None if unknown.
        inherited: metadata of the base model's card. The license and languages are copied.
        config: content of adapter_config.json, mlx-lm's or PEFT's.
        run: directory of the run that trained it, whose records are read if they exist; None if unknown.
        losses: whether the losses of the run are those of this adapter.
    """
    is_peft = "peft_type" in config
    settings = _settings_of_peft(config) if is_peft else config
    trained, record = (_read_json(run / name) if run else {} for name in (ADAPTER_CONFIG, RECORD_FILE))
    kind = _fine_tune_type(trained or settings)
    origin = f"[{base}](https://huggingface.co/{base})" if base else "its base model"
    what = "The trained weights of" if kind == "full" else "An adapter for"
    relation = None if kind == "full" else "adapter"
    images = bool((trained | config).get(IMAGES_KEY))
    usage = _peft_usage if is_peft else _mlx_usage
    sections = [
        _metadata("peft" if is_peft else "mlx", base, inherited, kind, images, base_model_relation=relation),
        f"# {repo}\n",
        f"{what} {origin}, trained with {_method(kind, record)}, by nalora-mlx {__version__}.\n",
        usage(repo, base or "BASE", images),
        "## Training\n",
        _format_table(_training_settings({**trained, **settings}, record)),
    ]
    if run and losses and (rows := _read_losses(run / METRICS_FILE)):
        sections += ["## Results\n", _format_table(rows)]
    if run and losses:
        sections += _evaluations(run)
    return "\n".join(sections)


def _fine_tune_type(adapter_config: dict[str, Any]) -> str:
    """Return a key of METHOD_LABELS for the content of adapter_config.json."""
    kind = adapter_config.get("fine_tune_type", "lora")
    if kind == "lora" and NA_KEY in adapter_config:  # for mlx-lm, an NA-LoRA adapter is a LoRA
        kind = "na-lora"
    return kind if kind in METHOD_LABELS else "lora"


def _method(kind: str, record: dict[str, Any]) -> str:
    """Return what a model was trained with: the method, and the objective of a preference run."""
    objective = OBJECTIVES.get(str((record.get("settings") or {}).get("train_mode")))
    return f"{METHOD_LABELS[kind]} on preferences ({objective})" if objective else METHOD_LABELS[kind]


def _metadata(
    library: str, base: str | None, inherited: dict[str, Any], kind: str, images: bool, **entries: Any
) -> str:
    """Return the YAML head of a card."""
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        library_name=library,
        pipeline_tag="image-text-to-text" if images else "text-generation",
        base_model=base,
        tags=[*(["mlx"] if library == "mlx" else []), OUR_TAG, *(["lora"] if "lora" in kind else [])],
        **{key: inherited[key] for key in INHERITED_METADATA if key in inherited},
        **(entries if base else {}),
    )
    return f"---\n{metadata.to_yaml()}\n---\n"


def _settings_of_peft(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a PEFT adapter under mlx-lm's names."""
    rank = config["r"]
    names = {
        "rank": rank,
        "scale": config["lora_alpha"] / rank,
        "dropout": 0.0,
        "keys": config["target_modules"],
    }
    return {"fine_tune_type": "dora" if config.get("use_dora") else "lora", "lora_parameters": names}


def _generate(model: str, images: bool) -> str:
    """Return a command that answers a prompt."""
    if images:
        return f'mlx_vlm.generate --model {model} --image picture.png --prompt "What is this?"'
    return f'mlx_lm.generate --model {model} --prompt "Hello"'


def _mlx_usage(repo: str, base: str, images: bool) -> str:
    name = repo.rpartition("/")[2]
    command = _generate(f"{base} --adapter-path {name}", images)
    return f"```bash\nhf download {repo} --local-dir {name}\n{command}\n```\n"


def _peft_usage(repo: str, base: str, images: bool) -> str:
    auto = transformers_class(images)
    return (
        f"```python\nfrom peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "{repo}")\n```\n'
    )


def transformers_class(images: bool) -> str:
    """Return the class of transformers that loads a model."""
    return "AutoModelForImageTextToText" if images else "AutoModelForCausalLM"


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; return nothing if the file is missing or damaged."""
    try:
        return storage.read_json(path)
    except InputError:
        return {}


def _training_settings(adapter_config: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    lora = adapter_config.get("lora_parameters") or {}
    settings = adapter_config | (record.get("settings") or {})
    train = (record.get("data") or {}).get("train") or {}
    rows: dict[str, Any] = {"objective": describe_objective(record.get("settings") or {})}
    rows |= {"layers": adapter_config.get("num_layers")}
    rows |= {key: lora.get(key) for key in ("rank", "scale", "dropout")}
    # The modules within a layer, each once: those of vision-language models are whole paths.
    rows["keys"] = list(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", key) for key in lora.get("keys") or []))
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
    """Return the losses in metrics.jsonl, and the accuracies of preference runs; unreadable lines are skipped."""
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
        [r for r in records if isinstance(r, dict) and _is_number(r, split, "loss")]
        for split in ("valid", "test")
    )
    rows: dict[str, Any] = {}
    if valid:
        at = f"(iteration {valid[-1].get('step')})"
        if all(_is_number(record, "valid", "accuracy") for record in (valid[0], valid[-1])):
            rows["validation accuracy before"] = f"{valid[0]['accuracy']:.2f}"
            rows["validation accuracy after"] = f"{valid[-1]['accuracy']:.2f} {at}"
        rows["validation loss before"] = f"{valid[0]['loss']:.4f}"
        rows["validation loss after"] = f"{valid[-1]['loss']:.4f} {at}"
    if test and _is_number(test[-1], "test", "accuracy"):
        rows["test accuracy"] = f"{test[-1]['accuracy']:.2f}"
    if test:
        rows["test loss"] = f"{test[-1]['loss']:.4f}"
    return rows


def _evaluations(adapter: Path) -> list[str]:
    """Return the section with the results of `nalora evaluate` about an adapter; nothing without any."""
    tables = []
    for content in evaluations_of(adapter):
        for part, entries in by_part(content["adapters"][0]["measures"]).items():
            lines = ["| | base | tuned | difference (95 % interval) | |", "|---|---|---|---|---|"]
            for row in measure_rows(entries):
                difference = f"{row.difference} ({row.interval})" if row.interval else row.difference
                cells = (row.title, row.base, row.tuned, difference, row.verdict)
                lines.append(
                    f"| {' | '.join(_one_line(cell).replace('|', chr(92) + '|') for cell in cells)} |"
                )
            tables.append("\n".join([f"{_one_line(part_title(content, part))}\n", *lines]) + "\n")
    if not tables:
        return []
    legend = (
        "`nalora evaluate` measured the base model, and the adapter on it, on the same rows. Differences of shares are "
        "in percentage points.\n"
    )
    return ["## Evaluation\n", legend, *dict.fromkeys(tables)]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _is_number(record: dict[str, Any], split: str, key: str) -> bool:
    return record.get("split") == split and isinstance(record.get(key), int | float)


def _format_table(rows: dict[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [f"| {key} | {str(value).replace('|', ' ')} |" for key, value in rows.items()]
    return "\n".join(lines) + "\n"
