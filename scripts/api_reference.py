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

PAGE = ROOT / "docs" / "api.md"
HEAD = """# Python API

[examples/finetune.py](../examples/finetune.py) is a complete program that loads, tokenizes, adapts, trains, fuses and
generates. `scripts/api_reference.py` generates this page from the docstrings. The names exported by `nalora_mlx` are
the public API. The packages listed after them provide what programs need in addition.

```python
from nalora_mlx import NALoRAConfig, adapt, fuse_model, load_adapter, train
```
"""
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
    parts += [entry(name, getattr(nalora_mlx, name)) for name in nalora_mlx.__all__]
    for package_name, names in PACKAGES.items():
        package = importlib.import_module(package_name)
        parts.append(f"\n## {package_name}\n")
        parts += [entry(name, getattr(package, name)) for name in names.split()]
    return "".join(parts)


def entry(name: str, item: Any) -> str:
    """Return the heading, signature and docstring of a name, with a table if it is a settings class."""
    parts = [f"\n### {name}\n"]
    is_class = inspect.isclass(item)
    if is_class and issubclass(item, Exception):
        parts.append(f"\n`{name}({item.__base__.__name__})`\n")
    elif not (is_class and is_settings(item)):
        parts.append(f"\n```py\n{signature(name, item)}\n```\n")
    parts.append("\n" + markdown(inspect.getdoc(item) or "") + "\n")
    if is_class:
        if is_settings(item):
            parts.append(settings_table(item))
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
    lines = [f"    {argument},\n" for argument in re.split(r", (?=\w+:)", arguments)]
    return f"{name}(\n{''.join(lines)}){result or ''}"


def is_settings(item: Any) -> bool:
    """Return whether a class is a dataclass whose fields have help texts."""
    return dataclasses.is_dataclass(item) and any(f.metadata.get("help") for f in dataclasses.fields(item))


def settings_table(item: Any) -> str:
    """Return a table of a dataclass's fields: name, default, meaning, and whether a resumed run may change it."""
    fields = dataclasses.fields(item)
    any_may_change = any(field.metadata.get("may_change") for field in fields)
    columns = ["setting", "default", "meaning"]
    if any_may_change:
        columns.append("may change on resume")
    rows = [f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"]
    for field in fields:
        choices = field.metadata.get("choices")
        meaning = field.metadata["help"] + (f"; one of {', '.join(choices)}" if choices else "")
        meaning = meaning.replace("|", "\\|")
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        row = f"| `{field.name}` | `{default}` | {meaning} |"
        if any_may_change:
            row += " yes |" if field.metadata.get("may_change") else " |"
        rows.append(row + "\n")
    return "".join(rows)


def member(key: str, value: Any) -> str:
    """Return the entry of a method or property, or nothing if it has no docstring."""
    if isinstance(value, property) and value.__doc__:
        return f"\n`.{key}`: {markdown(inspect.getdoc(value) or '')}\n"
    if inspect.isfunction(value) and value.__doc__:
        call = signature(key, value).replace("(self, ", "(").replace("(self)", "()")
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
