"""Checks of what a GPU computes, for test_metal.py and test_cuda.py; test_device_checks.py tries them on the CPU.

Tolerances are relative to the largest entry. A GPU adds in another order, and its exponentials differ by a few ulp:
float32 results agree to about 1e-5, not bit for bit. TF32, which rounds the inputs of float32 products to eleven bits,
is off.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.core.machine import rounds_float32_products
from nalora_mlx.ops.attention import attention
from nalora_mlx.ops.cross_entropy import tiled_cross_entropy_sum
from nalora_mlx.ops.device_sizes import SIZES, using_sizes
from nalora_mlx.ops.kernels import healthcheck, selfcheck
from nalora_mlx.ops.kernels.backend import backend
from nalora_mlx.ops.rope import rope_positions
from tests.adapters.test_miniatures import build as miniature
from tests.ops import test_attention
from tests.runs.test_resume import LATEST, assert_same_run, start_run

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import gpu_check_kernels  # noqa: E402
import gpu_check_recurrences  # noqa: E402
import gpu_check_sections  # noqa: E402
from training_runs import SETUPS, Setup, change_error, loss_error, training_run, using_device  # noqa: E402

TF32 = "MLX_ENABLE_TF32"
# Of losses and attention. Half precision: one rounding of the inputs of each product.
TOLERANCE = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}
# Of rotations; the angles of positions up to 500 are float32.
ROTATION = {mx.float32: 1e-4, mx.float16: 2e-3, mx.bfloat16: 1e-2}
# Of a whole step in half precision, as a multiple of the CPU's own error.
HALF_FACTOR = 2.0
NAMES = {str(dtype).removeprefix("mlx.core."): dtype for dtype in TOLERANCE}


class DeviceChecks:
    """Tests that run on `device`. A subclass sets the attributes.

    Attributes:
        device: where to compute.
        backend: the kernels that must run there.
        planner_runs: flags of scripts/check_planner.py.
    """

    device: mx.Device
    backend: str
    planner_runs = ("--count", "4", "--seed", "100")
    setups = tuple(SETUPS)
    tokens = 300  # of recurrences
    logits = (300, 64, 20011)  # rows, width, vocabulary: more than a tile, odd
    queries = 700

    @pytest.fixture(autouse=True, scope="class")
    def on_the_device(self, request):
        """Compute on the device. Must run before its first matrix product, because MLX reads TF32's variable once."""
        before = os.environ.get(TF32)
        os.environ[TF32] = "0"
        with using_device(request.cls.device):
            yield
        if before is None:
            del os.environ[TF32]
        else:
            os.environ[TF32] = before

    def test_the_kernels_of_this_backend_run(self):
        assert backend() == self.backend
        assert not rounds_float32_products()

    @pytest.mark.parametrize("part", range(8))
    def test_every_kind_of_kernel_agrees_with_the_reference(self, part):
        """Compare h, sums and gradients, on 20 and 7 channels, and on 3073 and 1537, in each dtype and at each rank."""
        checks = self.kernel_checks()[part::8]
        assert checks
        errors = {name: selfcheck.find_error(key, sizes) for name, key, sizes in checks}
        assert not {name: error for name, error in errors.items() if error}

    def kernel_checks(self):
        return gpu_check_kernels.all_checks(self.backend)

    @pytest.mark.parametrize("rank", healthcheck.RANKS)
    @pytest.mark.parametrize("name", NAMES)
    def test_the_gated_residual_of_a_large_odd_shape_is_accurate(self, name, rank):
        found = gpu_check_kernels.errors_against_float64(NAMES[name], rank, gpu_check_kernels.LARGE_SIZES[0])
        for errors in found.values():
            assert gpu_check_kernels.is_accurate(errors, NAMES[name]), found

    @pytest.mark.parametrize("name", SETUPS)
    def test_five_steps_agree_with_the_reference_and_the_cpu(self, name):
        """Compare losses, and what training changed, with kernels and without, in float32."""
        setup = SETUPS[name]
        want = self.on_the_cpu(setup)
        for kernels in (True, False):
            got = training_run(setup, self.device, kernels=kernels)
            assert len(got.losses) == 5
            assert loss_error(got, want) <= gpu_check_sections.LOSS_LIMIT, f"kernels: {kernels}"
            assert change_error(got, want) <= gpu_check_sections.CHANGE_LIMIT, f"kernels: {kernels}"

    def on_the_cpu(self, setup: Setup):
        return training_run(setup, mx.cpu)

    def test_five_steps_in_bfloat16_are_as_good_as_on_the_cpu(self):
        setup = SETUPS["rank 8"]
        want, on_cpu = training_run(setup, mx.cpu), training_run(setup, mx.cpu, mx.bfloat16)
        got = training_run(setup, self.device, mx.bfloat16)
        limit = HALF_FACTOR * change_error(on_cpu, want) + gpu_check_sections.HALF_CHANGE_LIMIT
        assert change_error(got, want) <= limit
        assert loss_error(got, want) <= 1e-2

    @pytest.mark.parametrize("kind", SIZES)
    @pytest.mark.parametrize("name", NAMES)
    def test_the_loss_agrees_with_float64(self, name, kind):
        """Compare the tiled cross-entropy and its gradient, with the tiles of each kind of device."""
        dtype, (rows, width, vocabulary) = NAMES[name], self.logits
        rng = np.random.default_rng(0)
        arrays = [mx.array(rng.normal(size=(n, width)).astype(np.float32)) for n in (rows, vocabulary)]
        hidden, head = (a.astype(dtype) for a in (arrays[0], arrays[1] * 0.3))
        targets, weights = rng.integers(0, vocabulary, rows), rng.random(rows) * (rng.random(rows) < 0.8)

        def loss(hidden):
            return tiled_cross_entropy_sum(
                lambda h, entries: h @ head[entries].T,
                vocabulary,
                hidden,
                mx.array(targets.astype(np.int32)),
                mx.array(weights.astype(np.float32)),
            )

        with using_sizes(kind):
            value, gradient = mx.value_and_grad(loss)(hidden)
            mx.eval(value, gradient)
        h, w = (np.array(a.astype(mx.float32)).astype(np.float64) for a in (hidden, head))
        logits = h @ w.T
        want = -(log_softmax(logits, axis=-1)[np.arange(rows), targets] * weights).sum()
        d = softmax(logits, axis=-1)
        d[np.arange(rows), targets] -= 1
        want_gradient = (d * weights[:, None]) @ w
        assert value.item() == pytest.approx(want, rel=TOLERANCE[dtype])
        assert relative(gradient, want_gradient) <= TOLERANCE[dtype]

    @pytest.mark.parametrize("traditional", [False, True])
    @pytest.mark.parametrize("name", NAMES)
    def test_rotary_positions_agree_with_float64(self, name, traditional):
        """Compare rotations and their gradient at positions that do not follow from the order of the tokens."""
        rng, dtype, (batch, heads, length, size) = np.random.default_rng(0), NAMES[name], (2, 3, 70, 64)
        x, d = (mx.array(rng.normal(size=(batch, heads, length, size))).astype(dtype) for _ in range(2))
        positions = rng.integers(0, 500, (batch, length))

        def rotate(x):
            with rope_positions(mx.array(positions.astype(np.int32))):
                return mx.fast.rope(x, size, traditional=traditional, base=1e4, scale=1.0, offset=0)

        output, gradient = mx.vjp(rotate, [x], [d])
        mx.eval(output, gradient)
        angles = positions[:, None, :, None] * 1e4 ** (-np.arange(size // 2) * 2 / size)
        pairs = (slice(0, None, 2), slice(1, None, 2)) if traditional else np.split(np.arange(size), 2)
        for got, given, sign in ((output[0], x, 1), (gradient[0], d, -1)):
            a, b = (np.array(given.astype(mx.float32)).astype(np.float64)[..., part] for part in pairs)
            want = np.empty(given.shape)
            want[..., pairs[0]] = a * np.cos(angles) - sign * b * np.sin(angles)
            want[..., pairs[1]] = b * np.cos(angles) + sign * a * np.sin(angles)
            assert relative(got, want) <= ROTATION[dtype]

    @pytest.mark.parametrize("kind", SIZES)
    @pytest.mark.parametrize("mask", [None, "causal"])
    @pytest.mark.parametrize("name", NAMES)
    def test_attention_agrees_with_float64(self, name, mask, kind):
        """Compare output and gradients, in the blocks of queries of each kind of device."""
        q, k, v, do = test_attention.draw((2, 4, 2, self.queries, self.queries + 13, 64, 64), NAMES[name])
        with using_sizes(kind):
            got = test_attention.run(attention, q, k, v, do, 0.125, mask)
            mx.eval(got)
        want = test_attention.truth(q, k, v, do, 0.125, mask)
        for a, b in zip(got, want, strict=True):
            assert relative(a, b) <= TOLERANCE[NAMES[name]]

    @pytest.mark.parametrize("name", gpu_check_recurrences.recurrence_cases(8))
    def test_recurrences_agree_with_the_cpu(self, name):
        """Compare outputs, the last state and all gradients, in float32."""
        function, arrays = gpu_check_recurrences.recurrence_cases(self.tokens)[name]
        want = gpu_check_recurrences.outputs_and_gradients(function, arrays, mx.cpu)
        got = gpu_check_recurrences.outputs_and_gradients(function, arrays, self.device)
        errors = [relative(a, b) for a, b in zip(got, want, strict=True)]
        assert max(errors) <= gpu_check_recurrences.LIMIT, errors

    def test_the_operations_of_recurrences_agree_with_float64(self):
        """Show which operation is wrong if a recurrence is."""
        found = {}
        gpu_check_recurrences.primitives(False, found.__setitem__)
        assert not {name: result for name, result in found.items() if not result.get("ok")}

    def test_the_planner_predicts_the_peak(self, tmp_path):
        """Train random configurations, and compare the measured peak with the prediction."""
        command = [
            sys.executable,
            SCRIPTS / "check_planner.py",
            *self.planner_runs,
            "--output",
            tmp_path / "o",
        ]
        device = "cpu" if self.device == mx.Device(mx.cpu) else "gpu"  # see started_programs/sitecustomize.py
        environment = {**os.environ, "NALORA_TEST_DEVICE": device}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        for record in map(json.loads, (tmp_path / "o").read_text().splitlines()):
            assert record["predicted"] == pytest.approx(record["measured"], rel=0.15)

    @pytest.mark.parametrize("settings", [{}, {"grad_checkpoint": True}, {"packing": True}], ids=str)
    def test_a_dense_model_resumes_bit_for_bit(self, settings, tmp_path):
        start_run(tmp_path / "whole", **settings)
        start_run(tmp_path / "parts", stop_at=5, **settings)
        start_run(tmp_path / "parts", resume=LATEST, **settings)
        assert_same_run(tmp_path / "whole", tmp_path / "parts")

    def test_experts_resume_up_to_rounding(self, tmp_path):
        """On a GPU, atomic operations add up gradients of experts, in an order that differs from run to run."""
        models = []
        for name, how in (("whole", {}), ("parts", {"stop_at": 5}), ("parts", {"resume": LATEST})):
            model, *_ = start_run(tmp_path / name, base=lambda: miniature("mixtral"), **how)
            models.append(adapter_weights(model))
        whole, _, resumed = models
        for name, b in whole.items():
            assert relative(resumed[name], np.array(b)) <= 1e-3, name


def relative(got, want) -> float:
    """Return the largest difference, relative to the largest entry."""
    got = np.array(got.astype(mx.float32) if isinstance(got, mx.array) else got, dtype=np.float64)
    error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
    return float(error) if np.isfinite(error) else np.inf
