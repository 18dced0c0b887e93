"""Write docs/models.md, a table of the gated MLPs in every model of mlx-lm and whether NA-LoRA supports them.

Usage: python scripts/model_table.py [--check]

Builds the miniature of each model in tests/miniatures and adapts it. With --check, writes nothing and fails if the
page is out of date.
"""

import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nalora_mlx.adapters.attach import adapt  # noqa: E402
from nalora_mlx.core.config import NALoRAConfig  # noqa: E402
from nalora_mlx.core.errors import InputError  # noqa: E402
from tests.adapters.test_miniatures import ZOO, build  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
HEAD = """# Gated MLPs in mlx-lm {version}

The gated MLPs in every model of mlx-lm, and whether NA-LoRA supports them ("yes"). `scripts/model_table.py` generates
this page by adapting a miniature of each model. The tests compare each row with mlx-lm's own adapters.

| model | gated MLPs | layout | activation | experts | NA-LoRA |
|---|---|---|---|---|---|
"""


def rows(name: str) -> list[tuple[str, ...]]:
    """Return the table rows of a model: name, path, layout, activation, number of experts, NA-LoRA.

    Layers that differ only in their indices share a row, with * in the path.
    """
    kinds = ZOO[name].gated
    if not kinds:
        return [(name, "none", "", "", "", "plain LoRA: no gated MLPs")]
    broken = ZOO[name].no_forward or ZOO[name].no_freeze
    if broken:
        return [
            (name, kind.paths, kind.gate, kind.activation, str(kind.experts or ""), broken) for kind in kinds
        ]
    try:
        report = adapt(build(name), NALoRAConfig(num_layers=-1, rank=2))
    except InputError as error:
        return [(name, "", "", "", "", str(error))]
    cells = [
        (without_indices(g.path), g.layout, g.activation, str(g.experts or ""), "yes") for g in report.gated
    ]
    cells += [(without_indices(s.path), "", "", "", s.reason) for s in report.skipped]
    return [(name, *row) for row in dict.fromkeys(cells)]


def without_indices(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def page() -> str:
    table = [row for name in sorted(ZOO, key=str.lower) for row in rows(name)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    supported = {row[0] for row in table if row[5] == "yes"}
    gated = {name for name, row in ZOO.items() if row.gated}
    totals = f"\n{len(ZOO)} models, {len(gated)} with gated MLPs, {len(supported)} supported by NA-LoRA.\n"
    return HEAD.format(version=importlib.metadata.version("mlx-lm")) + "\n".join(lines) + "\n" + totals


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        up_to_date = PAGE.exists() and PAGE.read_text() == text
        sys.exit(
            0 if up_to_date else f"{PAGE.relative_to(ROOT)} is out of date; run python scripts/model_table.py"
        )
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    print(f"wrote {PAGE.relative_to(ROOT)}")
