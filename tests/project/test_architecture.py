"""The order of imports, the cost of importing, and rules for the whole package."""

import ast
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nalora_mlx
from nalora_mlx.__main__ import COMMANDS

PACKAGE = Path(nalora_mlx.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 350  # of a module
MAX_MODULES = 12  # at the top level of the package

# A package may import packages of earlier lines, but no other package of its own line. All other modules are commands
# and what they share. These may import every package, and one another without a cycle.
PACKAGES = [
    ["core"],
    ["ops", "data"],
    ["models"],
    ["adapters"],
    ["runs"],
    ["training"],
]
LEVEL = {name: level for level, names in enumerate(PACKAGES) for name in names}
COMMANDS_LEVEL = len(PACKAGES)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def level(module: str) -> int:
    return LEVEL.get([*module.split("."), ""][1], COMMANDS_LEVEL)


def imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports when it runs, including imports in functions.

    Imports for type checkers and under `if __name__ == "__main__"` do not count.
    """
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
        assert not (isinstance(node, ast.ImportFrom) and node.level), (
            f"{path}: relative imports are not followed"
        )
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "nalora_mlx":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES.keys()
    return found


def test_imports_follow_the_order_of_packages():
    wrong = []
    for module, path in MODULES.items():
        package = module.split(".")[:2]
        for target in imports(path):
            inside = target.split(".")[:2] == package
            if target != "nalora_mlx" and not inside and level(target) >= level(module) < COMMANDS_LEVEL:
                wrong.append(f"{module} imports {target}")
    assert wrong == []


def test_there_are_no_import_cycles():
    graph = {module: imports(path) - {"nalora_mlx"} for module, path in MODULES.items()}
    del graph["nalora_mlx"]
    while leaves := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert graph == {}


def test_modules_and_the_top_level_are_small():
    too_long = {
        name: count
        for name, path in MODULES.items()
        if (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert too_long == {}
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_MODULES


def test_every_package_has_a_docstring_and_exports_its_names():
    for name in LEVEL:
        package = importlib.import_module(f"nalora_mlx.{name}")
        assert len((package.__doc__ or "").split()) > 15, name
        assert package.__all__, name


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
    assert "--help-all" in done.stdout
    start = time.perf_counter()
    assert run("nalora_mlx", command, "--help").returncode == 0
    assert time.perf_counter() - start < 5  # about one second on a quiet machine


def test_the_main_command():
    assert "lora" in run("nalora_mlx", "--help").stdout
    assert run("nalora_mlx", "--version").stdout.startswith("nalora ")
    wrong = run("nalora_mlx", "lroa")
    assert wrong.returncode == 2
    assert wrong.stderr == "nalora: error: no command 'lroa'; did you mean 'lora'?\n"
    assert run("nalora_mlx").returncode == 2


def test_importing_opens_no_connections():
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('connected')\n"
        "socket.socket.connect = refuse\n"
        "import nalora_mlx, nalora_mlx.training.trainer, nalora_mlx.adapters.attach, nalora_mlx.models.loading\n"
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
