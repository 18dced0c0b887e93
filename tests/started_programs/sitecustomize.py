"""What programs that tests start do first, mlx-lm's included. conftest.py puts this directory on PYTHONPATH.

They compute on the CPU, as the tests do, unless NALORA_TEST_DEVICE is "gpu". MLX has no environment variable for its
default device, so it is set as soon as `mlx.core` is imported.
"""

import importlib.util
import os
import sys


class Pin:
    """Finds `mlx.core` as usual, and sets its default device after the import."""

    def find_spec(self, name, path=None, target=None):
        if name != "mlx.core":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.set_default_device(module.cpu)

        spec.loader.exec_module = exec_module
        return spec


def flush_quickly():
    """Let core/storage.py flush with fsync only. On macOS, each full flush waits 10 to 30 ms for the disk itself."""
    import fcntl

    vars(fcntl).pop("F_FULLFSYNC", None)


if os.environ.get("NALORA_TEST_DEVICE") == "cpu":
    sys.meta_path.insert(0, Pin())
if sys.platform == "darwin":
    flush_quickly()
