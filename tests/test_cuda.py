"""What an NVIDIA GPU computes: kernels, training steps, loss, attention, recurrences, memory and resume.

bash scripts/test.sh tests/test_cuda.py
"""

import mlx.core as mx
import pytest

if not mx.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU and mlx's CUDA build", allow_module_level=True)

pytest.register_assert_rewrite("tests.device_checks")
from tests.device_checks import DeviceChecks  # noqa: E402


class TestCuda(DeviceChecks):
    device = mx.Device(mx.gpu)
    backend = "cuda"
