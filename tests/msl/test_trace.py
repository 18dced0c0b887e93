"""Tracing of kernels, the cache of compiled kernels, and emulated kernels in MLX functions."""

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from tests.msl import build, lane
from tests.msl.lane import Kernel, Operand, build_all, emulated, require, trace
from tests.msl.planted import COLUMNS, DOUBLE, changed, columns, double, float64, kernel_call, random


def test_trace_finds_every_kernel_and_its_parameters():
    first = double(changed(DOUBLE, "return;", "return;\n  if (x_ndim > 2 || x_strides[0] > 9) return;"))

    def both(x, s):
        (y,) = first(x + 1)
        return kernel_call(
            "y[thread_position_in_grid.x] = x[thread_position_in_grid.x] * s;",
            inputs=("x", "s"),
            name="scaled",
            grid=(45, 1, 1),
            threadgroup=(45, 1, 1),
            output_shapes=[(45,)],
            output_dtypes=[mx.float32],
        )(y, s)

    one, two = trace(both, random(45), mx.array(3.0))
    assert ("planted" in one.name, "scaled" in two.name) == (True, True)
    assert (one.grid, one.threadgroup) == ((64, 1, 1), (24, 1, 1))
    assert one.inputs == (Operand("x", (45,), mx.float32, ("shape", "strides", "ndim")),)
    assert [operand.name for operand in (*two.inputs, *two.outputs)] == ["x", "s", "y"]
    require("guarded")
    x = random(45)
    np.testing.assert_allclose(
        two.run([mx.array(one.run([x])[0]), mx.array(3.0)])[0], 6 * float64(x), rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"x is mlx.core.float32 .45.., got mlx.core.float32 .44.."):
        one.run([random(44)])
    with pytest.raises(ValueError, match="takes 2 arrays, got 1"):
        two.run([x])


def test_a_source_is_compiled_once(monkeypatch, tmp_path):
    require("guarded")
    commands = []
    real = subprocess.run
    monkeypatch.setattr(build, "cache", lambda: tmp_path)
    monkeypatch.setattr(
        build.subprocess, "run", lambda command, **kw: commands.append(command) or real(command, **kw)
    )
    call = columns(COLUMNS + "// compiled nowhere else\n")
    kernels = [trace(call, random(n, f), random(f))[0] for n, f in ((5, 44), (3, 9), (7, 43))]
    kernels += [trace(call, random(5, 44, dtype=mx.float16), random(44))[0]]
    build_all(kernels)
    build_all(kernels)
    assert len(commands) == 2


def test_an_emulated_kernel_replaces_the_real_one():
    require("guarded")
    kernel = emulated(mx.fast.metal_kernel("double", ["x"], ["y"], DOUBLE))

    @mx.custom_function
    def doubled(x):
        launch = {"grid": (64, 1, 1), "threadgroup": (24, 1, 1), "template": [("T", x.dtype)]}
        return kernel(inputs=[x], output_shapes=[x.shape], output_dtypes=[x.dtype], **launch)[0]

    @doubled.vjp
    def doubled_vjp(x, cotangent, _):
        return doubled(cotangent)

    x = random(45, dtype=mx.bfloat16)
    value, gradient = mx.value_and_grad(lambda x: mx.sum(mx.square(doubled(x))).astype(mx.float32))(x)
    assert gradient.dtype == mx.bfloat16
    np.testing.assert_allclose(float64(gradient), 8 * float64(x), rtol=0.01)
    assert value.item() == pytest.approx(4 * (float64(x) ** 2).sum(), rel=0.02)


def test_tests_are_skipped_without_a_compiler(tmp_path):
    code = (
        "from tests.msl.lane import unavailable; print(unavailable('guarded')); print(unavailable('spaces'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path), "MSL_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    guarded, spaces = done.stdout.splitlines()
    assert "No such file or directory: 'g++'" in guarded or sys.platform != "linux"
    assert "no clang++ is installed" in spaces


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_compiler_is_a_failure_under_ci(monkeypatch, ci, outcome):
    monkeypatch.setattr(lane, "unavailable", lambda _: "no compiler")
    monkeypatch.setattr(lane.sys, "platform", "linux")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="no compiler"):
        require("guarded")


def test_kernels_are_compared_by_value():
    (kernel,) = trace(double(), random(45))
    assert isinstance(kernel, Kernel)
    assert kernel == trace(double(), random(45))[0]
