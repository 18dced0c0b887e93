"""Write docs/api.md: the Python interface, from its docstrings and settings.

Usage: python scripts/api_reference.py [--check]

--check only says whether the page is up to date.
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

PAGE = ROOT / "docs" / "api.md"
HEAD = """# Python interface

[examples/finetune.py](../examples/finetune.py) is a whole program: load, tokenize, adapt, train, fuse, answer. This
page is made by `scripts/api_reference.py` from the docstrings. Names under `nalora_mlx` are the interface; the other
ones are what a program needs beside them.

```python
from nalora_mlx import NALoRAConfig, adapt, fuse_model, load_adapter, train
```
"""
# Beside the public names, in the order in which a program meets them.
MORE = {
    "nalora_mlx.rows": ("load_local", "load_hub", "read_jsonl"),
    "nalora_mlx.data": ("Features", "tokenize_split", "Split", "Example"),
    "nalora_mlx.adapters": ("AdaptReport", "Gated", "Skipped", "adapt_dora", "report_of"),
    "nalora_mlx.optim": ("build_optimizer",),
    "nalora_mlx.progress": ("TrainResult",),
    "nalora_mlx.evaluation": ("evaluate",),
    "nalora_mlx.batches": ("evaluation_batches",),
    "nalora_mlx.planner": ("plan", "Plan", "heaviest", "default_budget"),
    "nalora_mlx.peak": ("Size", "Peak"),
    "nalora_mlx.activations": ("Activation",),
}
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")


def page() -> str:
    """The whole page."""
    parts = [HEAD, "\n## nalora_mlx\n"]
    parts += [entry(name, getattr(nalora_mlx, name)) for name in nalora_mlx.__all__]
    for module, names in MORE.items():
        home = importlib.import_module(module)
        parts.append(f"\n## {module}\n")
        parts += [entry(name, getattr(home, name)) for name in names]
    return "".join(parts)


def entry(name: str, thing: Any) -> str:
    """A heading, the signature, the docstring, and of settings a table."""
    text = [f"\n### {name}\n"]
    if inspect.isclass(thing) and issubclass(thing, Exception):
        text.append(f"\n`{name}({thing.__base__.__name__})`\n")
    elif not (inspect.isclass(thing) and settings(thing)):
        text.append(f"\n```py\n{signature(name, thing)}\n```\n")
    text.append("\n" + markdown(inspect.getdoc(thing) or "") + "\n")
    if inspect.isclass(thing):
        text += [table(thing)] if settings(thing) else []
        text += [member(key, value) for key, value in vars(thing).items() if not key.startswith("_")]
    return "".join(text)


def signature(name: str, thing: Any) -> str:
    """The signature, on several lines if it is long."""
    line = f"{name}{inspect.signature(thing)}"
    line = re.sub(r"\bnalora_mlx\.\w+\.|mlx\.\w+\.layers\.base\.|mlx\.core\.|collections\.abc\.", "", line)
    line = re.sub(r"mlx\.optimizers\.optimizers\.|pathlib\.(?:_local\.)?|typing\.|numpy\.", "", line)
    line = re.sub(r"(-> |: )'(\w+)'", r"\1\2", line).replace("<factory>", "...")
    if len(line) <= 100:
        return line
    inside, result = re.fullmatch(r"\w+\((.*)\)( -> .*)?", line).groups()  # type: ignore[union-attr]
    pieces = re.split(r", (?=\w+:)", inside)
    return f"{name}(\n" + "".join(f"    {piece},\n" for piece in pieces) + f"){result or ''}"


def settings(thing: Any) -> bool:
    """Whether it is a dataclass whose fields have help texts."""
    return dataclasses.is_dataclass(thing) and any(f.metadata.get("help") for f in dataclasses.fields(thing))


def table(thing: Any) -> str:
    """The fields of a dataclass of settings: name, default, meaning."""
    resumable = any(field.metadata.get("may_change") for field in dataclasses.fields(thing))
    heads = ["setting", "default", "meaning"] + ["may change on resume"] * resumable
    rows = [f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n"]
    for field in dataclasses.fields(thing):
        choices = field.metadata.get("choices")
        meaning = field.metadata["help"] + (f"; one of {', '.join(choices)}" if choices else "")
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        meaning = meaning.replace("|", "\\|")
        change = [" yes |" if field.metadata.get("may_change") else " |"] if resumable else []
        rows.append(f"| `{field.name}` | `{default}` | {meaning} |{''.join(change)}\n")
    return "".join(rows)


def member(key: str, value: Any) -> str:
    """A method or property that has a docstring."""
    if isinstance(value, property) and value.__doc__:
        return f"\n`.{key}`: {markdown(inspect.getdoc(value) or '')}\n"
    if inspect.isfunction(value) and value.__doc__:
        call = signature(key, value).replace("(self, ", "(").replace("(self)", "()")
        return f"\n`.{call}`: {markdown(inspect.getdoc(value) or '')}\n"
    return ""


def markdown(docstring: str) -> str:
    """A docstring whose sections become lists, and whose indented formulas stay as they are."""
    lines: list[str] = []
    section = False
    for line in docstring.splitlines():
        if found := SECTION.match(line):
            section = True
            lines += [f"**{found[1]}**", ""]
        elif section and (item := re.match(r"    (\w[\w, ]*): (.*)", line)):
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif section and re.match(r"    \S", line):
            lines.append(line.strip())
        elif section and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(
            0 if PAGE.exists() and PAGE.read_text() == text else f"{PAGE.relative_to(ROOT)} is out of date"
        )
    PAGE.write_text(text)
    print(f"wrote {PAGE.relative_to(ROOT)}")
