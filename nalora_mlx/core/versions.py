"""Versions of libraries and the device, as checkpoints, run.json and `nalora doctor` record them."""

import importlib.metadata
import platform

# Libraries whose version can change the bits that a run computes.
NUMERIC_LIBRARIES = ("nalora-mlx", "mlx", "mlx-lm", "numpy")


def library_versions(*names: str) -> dict[str, str]:
    """Return the versions of installed packages by name; packages that are not installed are left out.

    This package itself is not installed when it runs from a source tree.
    """
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def numeric_versions() -> dict[str, str]:
    """Return the library versions and the device that determine the last bits of results; for checkpoints."""
    import mlx.core as mx

    return {**library_versions(*NUMERIC_LIBRARIES), "device": str(mx.default_device())}


def environment() -> dict[str, str]:
    """Return library versions, Python, the platform and the kind of device; for run.json."""
    import mlx.core as mx

    return {
        **library_versions(*NUMERIC_LIBRARIES, "transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "device": str(mx.default_device().type).removeprefix("DeviceType."),
    }
