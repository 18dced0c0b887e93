"""What a Mac's GPU computes: kernels, training steps, loss, attention, recurrences, memory and resume.

bash scripts/test.sh tests/test_metal.py
"""

import mlx.core as mx
import pytest

if not mx.metal.is_available():
    pytest.skip("needs a Mac with Apple silicon", allow_module_level=True)

pytest.register_assert_rewrite("tests.device_checks")
from tests.device_checks import DeviceChecks  # noqa: E402


class TestMetal(DeviceChecks):
    device = mx.Device(mx.gpu)
    backend = "metal"
