"""Write docs/api.md, the Python API reference, from docstrings and dataclass fields.

Usage: python scripts/api_reference.py [--check]

With --check, writes nothing and fails if the page is out of date.
"""

import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nalora_mlx  # noqa: E402
from nalora_mlx.core.config import GROUPS, NALoRAConfig, RunConfig, TrainingConfig  # noqa: E402
from nalora_mlx.finetuning import SETTINGS  # noqa: E402

PAGE = ROOT / "docs" / "api.md"
HEAD = """# Python API

`finetune` does a whole job in one call. [examples/finetune.py](../examples/finetune.py) uses it, and
[examples/training_loop.py](../examples/training_loop.py) takes its steps one by one: load, tokenize, adapt, train and
fuse.

```python
import nalora_mlx

rows = [{"prompt": "Capital of France?", "completion": "Paris."}, ...]  # a few hundred
result = nalora_mlx.finetune(
    model="Qwen/Qwen3-0.6B", data=rows, output="adapters", mask_prompt=True, iters=200, preset="quick"
)
print(result.validation_losses)
print(result.generate("Capital of Norway?"))
result.fuse("fused_model")
```

`scripts/api_reference.py` generates this page from the docstrings. The names exported by `nalora_mlx` are the public
API. The packages listed after them provide what programs need in addition.
"""
SETTINGS_HEAD = """
### Settings of finetune

These are the settings of `nalora lora`, by their names in config files, and those of its groups `lora_parameters` and
`na_parameters` by their own. `TrainingConfig` and `NALoRAConfig` have the settings that are marked so, with the same
defaults. Settings marked last may change when a run is resumed.
"""
CALLBACKS_HEAD = """
### Events and callbacks

`on_report`, `on_validation` and `on_save` of `finetune` are called with a dict:

| callback | when | keys |
|---|---|---|
"""
# A callback or event, when it comes, and its keys.
CALLBACKS = (
    (
        "`on_report`",
        "every `steps_per_report` iterations",
        "iteration train_loss learning_rate iterations_per_second tokens_per_second trained_tokens peak_memory",
    ),
    (
        "`on_validation`",
        "before the first iteration, every `steps_per_eval` iterations, at the end",
        "iteration val_loss val_time",
    ),
    ("`on_save`", "after each checkpoint", "iteration path"),
)
EVENTS_HEAD = """
The first two get what `on_train_loss_report` and `on_val_loss_report` of mlx-lm's callbacks get, so such methods can
be given as they are. Memory is in GB, times are in seconds. A callback that raises an exception is dropped with a
note, and the run goes on. To end a run early, return True from `stop`.

The `listeners` of `train` get all events. Each is a dict with its kind under `event` and these keys:

| event | when | keys |
|---|---|---|
"""
EVENTS = (
    ("`start`", "before anything else; `done` counts the iterations before a resume", "iterations done"),
    ("`notice`", "skipped updates, jumps of the loss, a full disk and the like", "text"),
    ("`reference`", "in dpo and kto, while log-probabilities before training are computed", "batch batches"),
    ("`step`", "after each iteration", "step iterations"),
    (
        "`metrics`, of `split` train",
        "every `steps_per_report` iterations; `layers` says what NA-LoRA did in each gated MLP",
        "split step loss tokens tokens_per_second iterations_per_second learning_rate gradient_norm "
        "selection_change skipped "
        "peak_memory_gb layers",
    ),
    ("`validating`", "after each batch of a validation", "batch batches"),
    (
        "`metrics`, of `split` valid",
        "after a validation",
        "split step loss tokens seconds best_loss first_loss",
    ),
    ("`saving`", "before a checkpoint is written", ""),
    ("`saved`", "after it is written", "path step"),
    ("`end`", "after everything else; a `TrainResult`", "result"),
)
EVENTS_END = """
Losses are means over the tokens that are trained on, in preference training over rows. There, `metrics` events also
have its measures, and those of `split` valid `first_accuracy` and `best_accuracy`. `metrics.jsonl` in the run's
directory keeps the `metrics` events.
"""
# Public names that come first, in the order in which a reader needs them.
FIRST = ("finetune", "FinetuneResult")
# Settings classes -> the names of their settings.
HOMES = {item.__name__: {f.name for f in dataclasses.fields(item)} for item in (TrainingConfig, NALoRAConfig)}
# Names outside the top-level package that programs use, in the order of a typical program.
PACKAGES = {
    "nalora_mlx.data": "load_local load_hub read_jsonl Features tokenize_split Split Example evaluation_batches",
    "nalora_mlx.adapters": "AdaptResult Gated Skipped adapt_dora adapt_result",
    "nalora_mlx.runs": "TrainResult",
    "nalora_mlx.training": "build_optimizer evaluate plan Plan largest_batch default_budget BatchShape PeakMemory",
    "nalora_mlx.ops": "Activation",
}
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")


def page() -> str:
    parts = [HEAD, "\n## nalora_mlx\n"]
    parts += [entry(name, getattr(nalora_mlx, name)) for name in FIRST]
    parts += [SETTINGS_HEAD, finetune_settings(), CALLBACKS_HEAD, *map(keys_row, CALLBACKS)]
    parts += [EVENTS_HEAD, *map(keys_row, EVENTS), EVENTS_END]
    parts += [entry(name, getattr(nalora_mlx, name)) for name in nalora_mlx.__all__ if name not in FIRST]
    for package_name, names in PACKAGES.items():
        package = importlib.import_module(package_name)
        parts.append(f"\n## {package_name}\n")
        parts += [entry(name, getattr(package, name)) for name in names.split()]
    return "".join(parts)


def entry(name: str, item: Any) -> str:
    """Return the heading, signature and docstring of a name."""
    parts = [f"\n### {name}\n"]
    is_class = inspect.isclass(item)
    if is_class and issubclass(item, Exception):
        parts.append(f"\n`{name}({item.__base__.__name__})`\n")
    elif not (is_class and is_settings(item)):
        parts.append(f"\n```py\n{signature(name, item)}\n```\n")
    parts.append("\n" + markdown(inspect.getdoc(item) or "") + "\n")
    if is_class:
        if is_settings(item):
            parts.append(f"\nIts settings are those marked `{name}` in [the table](#settings-of-finetune).\n")
        parts += [member(key, value) for key, value in vars(item).items() if not key.startswith("_")]
    return "".join(parts)


def signature(name: str, item: Any) -> str:
    """Return the signature without module names, on several lines if it is long."""
    line = re.sub(r"<function (\w+) at \w+>", r"\1", f"{name}{inspect.signature(item)}")
    line = re.sub(
        r"\bnalora_mlx\.(?:[a-z_]+\.)+|mlx\.\w+\.layers\.base\.|mlx\.core\.|collections\.abc\.", "", line
    )
    line = re.sub(r"mlx\.optimizers\.optimizers\.|pathlib\.(?:_local\.)?|typing\.|numpy\.", "", line)
    line = re.sub(r"(-> |: )'(\w+)'", r"\1\2", line).replace("<factory>", "...")
    if len(line) <= 100:
        return line
    arguments, result = re.fullmatch(r"\w+\((.*)\)( -> .*)?", line).groups()  # type: ignore[union-attr]
    lines = [f"    {argument},\n" for argument in re.split(r", (?=\w+:|\*)", arguments)]
    return f"{name}(\n{''.join(lines)}){result or ''}"


def is_settings(item: Any) -> bool:
    """Return whether a class is a dataclass whose fields have help texts."""
    return dataclasses.is_dataclass(item) and any(f.metadata.get("help") for f in dataclasses.fields(item))


def finetune_settings() -> str:
    """Return a table of the settings of `finetune`: name, default, meaning, and whether a resumed run may change it."""
    adapter = {field.name: field for field in dataclasses.fields(NALoRAConfig)}
    run = {field.name: field for field in dataclasses.fields(RunConfig) if field.name not in GROUPS}
    lines = ["\n| setting | default | meaning | of | may change |\n|---|---|---|---|---|\n"]
    for name in SETTINGS:
        if name in GROUPS or name in inspect.signature(nalora_mlx.finetune).parameters:
            continue
        field = run.get(name) or adapter[name]
        homes = [f"`{home}`" for home, names in HOMES.items() if name in names]
        may_change = "yes" if field.metadata.get("may_change") else ""
        lines.append(
            f"| `{name}` | {shown_default(field)} | {meaning(field)} | {', '.join(homes)} | {may_change} |\n"
        )
    return "".join(lines)


def keys_row(row: tuple[str, str, str]) -> str:
    """Return a row of a table whose last column lists keys."""
    name, when, keys = row
    return f"| {name} | {when} | {', '.join(f'`{key}`' for key in keys.split())} |\n"


def shown_default(field: dataclasses.Field) -> str:
    """Return the default of a setting; nothing for None, whose effect the help text names."""
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return "" if default is None else f"`{default}`"


def meaning(field: dataclasses.Field) -> str:
    """Return the help text of a setting with its choices."""
    choices = field.metadata.get("choices")
    text = field.metadata["help"] + (f"; one of {', '.join(choices)}" if choices else "")
    return text.replace("|", "\\|")


def member(key: str, value: Any) -> str:
    """Return the entry of a method or property, or nothing if it has no docstring."""
    if isinstance(value, property) and value.__doc__:
        return f"\n`.{key}`: {markdown(inspect.getdoc(value) or '')}\n"
    if inspect.isfunction(value) and value.__doc__:
        call = " ".join(signature(key, value).split()).replace("( ", "(").replace(", )", ")")
        call = call.replace("(self, ", "(").replace("(self)", "()")
        return f"\n`.{call}`: {markdown(inspect.getdoc(value) or '')}\n"
    return ""


def markdown(docstring: str) -> str:
    """Convert a docstring to Markdown: sections become lists, and indented formulas stay as they are."""
    lines: list[str] = []
    in_section = False
    for line in docstring.splitlines():
        if heading := SECTION.match(line):
            in_section = True
            lines += [f"**{heading[1]}**", ""]
        elif in_section and (item := re.match(r"    (\w[\w, ]*): (.*)", line)):
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif in_section and re.match(r"    \S", line):
            lines.append(line.strip())
        elif in_section and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        up_to_date = PAGE.exists() and PAGE.read_text() == text
        sys.exit(
            0
            if up_to_date
            else f"{PAGE.relative_to(ROOT)} is out of date; run python scripts/api_reference.py"
        )
    PAGE.write_text(text)
    print(f"wrote {PAGE.relative_to(ROOT)}")
