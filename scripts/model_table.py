"""Write docs/models.md: every model module of mlx-lm, its gated MLPs, and what NA-LoRA does with them.

Usage: python scripts/model_table.py [--check]

Builds the miniature of each model (tests/zoo) and adapts it; --check only says whether the page is up to date.
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
from tests.adapters.test_zoo import ZOO, build  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
HEAD = """# Gated MLPs in mlx-lm {version}

The gated MLPs of every model module of mlx-lm, in miniature, and what `adapt` does with them. "yes" means that NA-LoRA
acts on them; the tests compare each of these rows with mlx-lm's own adapters. `scripts/model_table.py` makes this page.

| model | gated MLPs | layout | activation | experts | NA-LoRA |
|---|---|---|---|---|---|
"""


def rows(name: str) -> list[tuple[str, ...]]:
    """Table rows of one model: paths with * for the layer, layout, activation, experts, verdict."""
    kinds = ZOO[name].gated
    if not kinds:
        return [(name, "none", "", "", "", "plain LoRA: nothing to act on")]
    broken = ZOO[name].no_forward or ZOO[name].no_freeze
    if broken:
        return [
            (name, kind.paths, kind.gate, kind.activation, str(kind.experts or ""), broken) for kind in kinds
        ]
    try:
        report = adapt(build(name), NALoRAConfig(num_layers=-1, rank=2))
    except InputError as error:
        return [(name, "", "", "", "", str(error))]
    found = [(_star(g.path), g.layout, g.activation, str(g.experts or ""), "yes") for g in report.gated]
    found += [(_star(s.path), "", "", "", s.reason) for s in report.skipped]
    return [(name, *row) for row in dict.fromkeys(found)]


def _star(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def page() -> str:
    """The whole page."""
    table = [row for name in sorted(ZOO, key=str.lower) for row in rows(name)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    acted = {row[0] for row in table if row[5] == "yes"}
    gated = {name for name, row in ZOO.items() if row.gated}
    totals = (
        f"\n{len(ZOO)} models, {len(gated)} of them with gated MLPs; NA-LoRA acts on those of {len(acted)}.\n"
    )
    return HEAD.format(version=importlib.metadata.version("mlx-lm")) + "\n".join(lines) + "\n" + totals


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(
            0 if PAGE.exists() and PAGE.read_text() == text else f"{PAGE.relative_to(ROOT)} is out of date"
        )
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    print(f"wrote {PAGE.relative_to(ROOT)}")
