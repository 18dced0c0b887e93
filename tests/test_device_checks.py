"""The checks of test_metal.py and test_cuda.py, run on the CPU, and shown to fail where something is wrong."""

import mlx.core as mx
import pytest

from nalora_mlx.ops.kernels import reference, selfcheck
from nalora_mlx.ops.kernels.backend import REFERENCE
from nalora_mlx.ops.kernels.gated_residual import run_reference

pytest.register_assert_rewrite("tests.device_checks")
from tests.device_checks import SETUPS, DeviceChecks  # noqa: E402


class TestCpu(DeviceChecks):
    device = mx.Device(mx.cpu)
    backend = REFERENCE
    planner_runs = ("--count", "1", "--seed", "3", "--tokens", "64")
    tokens = 70
    logits = (33, 16, 3001)
    queries = 140

    @pytest.fixture(autouse=True)
    def no_kernel(self, monkeypatch):
        """Let the reference take the place of a kernel."""
        monkeypatch.setattr(selfcheck, "run_kernel", lambda _, *arguments: run_reference(*arguments))

    def kernel_checks(self):
        # MLX has no matrix products of experts in half precision on a CPU.
        checks = super().kernel_checks()
        return [c for c in checks if c[1].dtype == mx.float32 or not c[1].variant.experts]

    @pytest.mark.slow  # tests/training/test_memory_plan.py checks the planner on the CPU
    def test_the_planner_predicts_the_peak(self, tmp_path):
        super().test_the_planner_predicts_the_peak(tmp_path)


class TestFaults:
    """A device that computes something wrong does not pass."""

    def test_a_kernel_with_a_wrong_result(self, monkeypatch):
        def wrong(_, *arguments):
            h, sums = run_reference(*arguments)
            return h, [s * (1 + 1e-4) for s in sums]

        monkeypatch.setattr(selfcheck, "run_kernel", wrong)
        with pytest.raises(AssertionError, match=r"off by 1\.0e-04"):
            TestCpu().test_every_kind_of_kernel_agrees_with_the_reference(0)

    def test_a_backward_with_an_error_of_one_percent(self, monkeypatch):
        clean, gradients = TestCpu().on_the_cpu(SETUPS["rank 8"]), reference.gradients
        monkeypatch.setattr(TestCpu, "on_the_cpu", lambda *_: clean)
        TestCpu().test_five_steps_agree_with_the_reference_and_the_cpu("rank 8")
        monkeypatch.setattr(reference, "gradients", lambda *a: tuple(1.01 * d for d in gradients(*a)))
        with pytest.raises(AssertionError):
            TestCpu().test_five_steps_agree_with_the_reference_and_the_cpu("rank 8")

    def test_a_forward_that_rounds_to_eleven_bits(self, monkeypatch):
        """TF32 would, if it were on."""
        product = reference.gated_product
        monkeypatch.setattr(
            reference, "gated_product", lambda *a: product(*a).astype(mx.float16).astype(mx.float32)
        )
        with pytest.raises(AssertionError):
            TestCpu().test_the_gated_residual_of_a_large_odd_shape_is_accurate("float32", 8)
