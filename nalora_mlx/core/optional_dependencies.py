"""The package's optional dependencies ("extras"): what each is for, and which are installed."""

import importlib.metadata
import re

from nalora_mlx.core.versions import library_versions

# Only pyproject.toml lists the packages of an extra.
EXTRAS = {
    "data": "Parquet files, and data sets on the Hugging Face Hub",
    "export": "GGUF files",
    "kquants": "K-quants in GGUF files",
    "report": "nalora report",
    "tensorboard": "--report-to tensorboard",
    "vlm": "vision-language models",
    "notebook": "examples/finetune.ipynb",
}


def installed_extras() -> list[str]:
    """Return the extras whose packages are all installed."""
    return [extra for extra in EXTRAS if (names := packages(extra)) and all(map(is_installed, names))]


def packages(extra: str) -> list[str]:
    """Return the packages of an extra; none if the installed nalora-mlx lacks it or runs from source."""
    try:
        requirements = importlib.metadata.requires("nalora-mlx") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    pattern = re.compile(rf"([\w.-]+).*; *extra == ['\"]{extra}['\"]")
    return [match[1] for line in requirements if (match := pattern.match(line))]


def is_installed(package: str) -> bool:
    """Return whether a package is installed."""
    return package in library_versions(package)
