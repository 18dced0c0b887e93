"""The package's optional dependencies ("extras"): what each is for, which are installed, and how to install others."""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import sys
import sysconfig
import tomllib
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from nalora_mlx.core.versions import library_versions

# Only pyproject.toml lists the packages of an extra. It has two more names: `all` for most of these, and `kquants`, an
# older name of `export`.
EXTRAS = {
    "data": "Parquet files, and data sets on the Hugging Face Hub",
    "export": "GGUF files",
    "eval": "standard tasks and JSON schemas of nalora evaluate",
    "report": "nalora report",
    "tensorboard": "--report-to tensorboard",
    "vlm": "vision-language models",
    "notebook": "examples/finetune.ipynb",
}
DISTRIBUTION = "nalora-mlx"


def installed_extras() -> list[str]:
    """Return the extras whose packages are all installed."""
    return [extra for extra in EXTRAS if (names := packages(extra)) and all(map(is_installed, names))]


def packages(extra: str) -> list[str]:
    """Return the packages of an extra; none if the installed nalora-mlx lacks it or runs from source."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    pattern = re.compile(rf"([\w.-]+).*; *extra == ['\"]{extra}['\"]")
    return [match[1] for line in requirements if (match := pattern.match(line))]


def is_installed(package: str) -> bool:
    """Return whether a package is installed."""
    return package in library_versions(package)


# --- how to install -----------------------------------------------------------------------------------------


def install_command(*extras: str) -> str:
    """Return the command that adds extras to this installation, whichever way it was installed."""
    environment = Path(sys.prefix)
    if (environment / "pipx_metadata.json").is_file():
        return install_packages(*(name for extra in extras for name in packages(extra)))
    receipt = environment / "uv-receipt.toml"
    if not receipt.is_file():
        return f"{_installer()} {_requirement(extras)}"
    # `uv tool` replaces what it installed before, so earlier extras and packages are named again.
    installed, *others = tomllib.loads(receipt.read_text())["tool"]["requirements"]
    together = [*dict.fromkeys((*installed.get("extras", ()), *extras))]
    added = "".join(f" --with {other['name']}" for other in others)
    return f"uv tool install {_requirement(together)}{added}"


def install_packages(*names: str) -> str:
    """Return the command that adds packages to this installation."""
    environment = Path(sys.prefix)
    if (environment / "pipx_metadata.json").is_file():
        return f"pipx inject {environment.name} {' '.join(names)}"
    if (environment / "uv-receipt.toml").is_file():
        return install_command() + "".join(f" --with {name}" for name in names)
    return f"{_installer()} {' '.join(names)}"


def _installer() -> str:
    """Return the command that installs into this environment: pip, or uv in an environment without pip."""
    python = shlex.quote(_shown(Path(sys.executable)))
    if not is_installed("pip"):  # find_spec would switch off setuptools' distutils in this process
        active = os.environ.get("VIRTUAL_ENV") == sys.prefix
        return "uv pip install" + ("" if active else f" --python {python}")
    pip = shutil.which("pip")
    own = pip is not None and Path(pip).parent == Path(sysconfig.get_path("scripts"))
    return "pip install" if own else f"{python} -m pip install"


def _requirement(extras: tuple[str, ...] | list[str]) -> str:
    """Return this package with extras as pip and uv take it: the place that it came from, unless that is an index."""
    wanted = f"[{','.join(extras)}]" if extras else ""
    source = _source()
    url = source.get("url", "")
    if "dir_info" in source:
        place = _shown(Path(url2pathname(urlsplit(url).path)))
        editable = "-e " if source["dir_info"].get("editable") else ""
        return f"{editable}{shlex.quote(place + wanted)}"
    if "vcs_info" in source:
        revision = source["vcs_info"].get("requested_revision")
        folder = source.get("subdirectory")
        url = f"{source['vcs_info']['vcs']}+{url}" + (f"@{revision}" if revision else "")
        return shlex.quote(f"{DISTRIBUTION}{wanted} @ {url}" + (f"#subdirectory={folder}" if folder else ""))
    # pip and `uv pip` take an installed wheel for this, and only look for the packages of the extras.
    return shlex.quote(f"{DISTRIBUTION}{wanted}")


def _source() -> dict:
    """Return where this package was installed from, as direct_url.json has it; nothing for an index."""
    try:
        recorded = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:  # runs from a source tree
        return {"url": Path(__file__).parents[2].as_uri(), "dir_info": {"editable": True}}
    return json.loads(recorded) if recorded else {}


def _shown(path: Path) -> str:
    """Return a path as people write it: relative to the current directory if it is there or below."""
    try:
        below = path.relative_to(Path.cwd())
    except ValueError:
        return str(path)
    return "." if below == Path() else f"./{below}"
