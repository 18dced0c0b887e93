"""The house: which way imports point, what importing may cost, and what is not allowed anywhere."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nalora_mlx
from nalora_mlx.__main__ import COMMANDS

PACKAGE = Path(nalora_mlx.__file__).parent

# Each room may import from the rooms of earlier lines, and from no other room of its own line.
FLOORS = [
    ["errors"],
    ["elementary", "strict"],
    [
        "attention",
        "activations",
        "config",
        "losses",
        "data",
        "importance",
        "optim",
        "checkpoint",
        "display",
        "distributed",
        "heads",
        "progress",
        "rows",
        "shapes",
        "signals",
    ],
    ["families", "packing"],
    [
        "batches",
        "cli",
        "fidelity",
        "forward",
        "kernels",
        "metrics",
        "models",
        "record",
        "saver",
        "validate",
    ],
    ["layouts", "memory_advice", "model_card", "reporters", "windows"],
    ["modules", "targets"],
    ["adapters"],
    ["step", "export", "identity"],
    ["evaluation", "peak", "resume"],
    ["run_directory"],
    ["run"],
    ["planner", "trainer"],
    ["generate"],
    ["lora", "fuse", "chat", "serve", "report", "doctor", "completion"],
    ["__main__"],
]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms that a file imports when it runs; imports for type checkers and of `python -m` do not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and ("TYPE_CHECKING" in ast.dump(node.test) or "__main__" in ast.dump(node.test))
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nalora_mlx"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("nalora_mlx.")}
    return found - {"__version__"}


FILES = sorted(PACKAGE.rglob("*.py"))


def test_imports_point_one_way():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    wrong = []
    for path in FILES:
        here = room(path)
        if here == "__init__":
            continue
        assert here in floor, f"{path.name} has no place in FLOORS"
        for target in imports(path) - {here}:
            if floor[target] >= floor[here]:
                wrong.append(f"{here} imports {target}")
    assert wrong == []


def test_no_utils_no_pickle_no_pytorch():
    assert not [p for p in FILES if p.stem in ("utils", "helpers", "common")]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"pickle", "torch", "dill", "joblib"}, path


def run(*argv, **environment):
    return subprocess.run(
        [sys.executable, "-m", *argv],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_imports_nothing_heavy_and_is_quick(command):
    code = (
        "import sys; from nalora_mlx.__main__ import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'mlx', 'mlx_lm', 'numpy', 'transformers', 'huggingface_hub'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--debug" in done.stdout
    tic = time.perf_counter()
    assert run("nalora_mlx", command, "--help").returncode == 0
    assert time.perf_counter() - tic < 5  # a second on a quiet machine


def test_the_front_door():
    assert "lora" in run("nalora_mlx", "--help").stdout
    assert run("nalora_mlx", "--version").stdout.startswith("nalora ")
    wrong = run("nalora_mlx", "lroa")
    assert wrong.returncode == 2
    assert wrong.stderr == "nalora: error: no command 'lroa'; did you mean 'lora'?\n"
    assert run("nalora_mlx").returncode == 2


def test_importing_opens_no_connection():
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('a connection')\n"
        "socket.socket.connect = refuse\n"
        "import nalora_mlx, nalora_mlx.trainer, nalora_mlx.adapters, nalora_mlx.models\n"
        "assert nalora_mlx.NALoRAConfig().rank == 8 and nalora_mlx.train and nalora_mlx.adapt"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_documented():
    for name in nalora_mlx.__all__:
        thing = getattr(nalora_mlx, name)
        assert (thing.__doc__ or "").strip(), name
    with pytest.raises(AttributeError):
        nalora_mlx.nothing  # noqa: B018
