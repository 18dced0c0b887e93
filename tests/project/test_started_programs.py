"""Programs that tests start compute on the CPU, also where MLX has a GPU."""

import os
import subprocess
import sys

import pytest

from tests.conftest import STARTED_PROGRAMS

MLX_WITH_A_GPU = """
cpu, gpu = "cpu", "gpu"
device = gpu

def set_default_device(to):
    global device
    device = to
"""


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_device_of_programs(device, tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text(MLX_WITH_A_GPU)
    # The stand-in for MLX comes first on the path, as another program's directory would.
    path = os.pathsep.join((str(tmp_path), os.environ["PYTHONPATH"]))
    assert str(STARTED_PROGRAMS) in path
    code = "import sys; assert 'mlx' not in sys.modules; import mlx.core as mx; print(mx.device)"
    environment = {**os.environ, "PYTHONPATH": path, "NALORA_TEST_DEVICE": device}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{device}\n", done.stderr


def test_programs_import_mlx_as_usual():
    code = "import mlx.core as mx, mlx.nn; print(mx.default_device(), mx.array([1.0]).item())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "Device(cpu, 0) 1.0\n", done.stderr
