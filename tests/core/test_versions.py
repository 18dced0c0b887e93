"""The versions that checkpoints and run.json record."""

import mlx.core as mx

from nalora_mlx.core.versions import environment, library_versions, numeric_versions


def test_missing_packages_are_left_out():
    assert library_versions("mlx", "no-such-package") == {"mlx": mx.__version__}


def test_keys_in_files():
    """nalora-mlx is missing if it runs from a source tree."""
    assert {*numeric_versions(), "nalora-mlx"} == {"nalora-mlx", "mlx", "mlx-lm", "numpy", "device"}
    assert numeric_versions()["device"] == "Device(cpu, 0)"
    keys = {*numeric_versions(), "nalora-mlx", "transformers", "python", "platform", "machine"}
    assert {*environment(), "nalora-mlx"} == keys
    assert environment()["device"] == "cpu"
