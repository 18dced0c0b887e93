"""The text of the kernels by compilers that know what a plain C++ build lets through, and where it is installed."""

import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from nalora_mlx.activations import ACTIVATIONS
from nalora_mlx.kernels import fused

from . import lane
from .test_gated_residual import EXACT, full, operands

ROOT = Path(__file__).parents[2]


def traced(variant, o, dh):
    """Both kernels of an operation as MLX would hand them to Metal, and their inputs."""
    found = []
    build = fused._kernel

    def kernel(*of):
        made = build(*of)

        def call(*, inputs, **launch):
            (one,) = lane.trace(lambda *arrays: made(inputs=list(arrays), **launch), *inputs)
            found.append((one, inputs))
            return [mx.zeros(spec.shape, spec.dtype) for spec in one.outputs]

        return call

    fused._kernel = kernel
    try:
        fused.forward("metal", variant, o)
        fused.backward("metal", variant, o, dh)
    finally:
        fused._kernel = build
    return found


def samples():
    """(activation, dtype, rank, halves, experts), each a text of its own."""
    for name in sorted(EXACT):
        yield name, mx.float16, 4, "separate", 0
    for dtype in (mx.float32, mx.bfloat16):
        for side in fused.HALVES:
            yield "silu", dtype, 4, side, 3
        yield "silu", dtype, 0, "separate", 0


def build(name, dtype, rank, side, experts):
    variant = full(EXACT[name].row, halves=side, experts=experts)
    chosen = np.sort(np.arange(20) % experts) if experts else None
    return traced(variant, *operands(variant, 20, 12, rank, dtype, experts=chosen))


@pytest.mark.parametrize("sample", samples(), ids=str)
def test_address_spaces(sample):
    lane.require("spaces")
    for kernel, _ in build(*sample):
        assert lane.check_address_spaces(kernel.source) == ""


def test_small_arrays_come_in_another_address_space():
    """Weights of fewer than eight rows are `constant`: no pointer to them may be cast to `device`."""
    lane.require("spaces")
    variant = full(ACTIVATIONS["silu"])
    o, dh = operands(variant, 2, 12, 4)
    sources = [kernel.source for kernel, _ in traced(variant, o, dh)]
    assert "constant float* w" in sources[0]
    assert [lane.check_address_spaces(source) for source in sources] == ["", ""]


@pytest.mark.parametrize("shape", [(70, 11), (70, 12)])
def test_under_the_address_sanitizer(shape):
    lane.require("address")
    variant = full(ACTIVATIONS["silu"])
    for kernel, inputs in traced(variant, *operands(variant, *shape, 4, mx.bfloat16)):
        guarded, watched = kernel.run(inputs), kernel.run(inputs, lane="address")
        for got, want in zip(watched, guarded, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_scalar_functions_over_all_magnitudes(name):
    """phi and phi' over a million floats: a few ulp of the scale that the functions lose digits at."""
    lane.require("guarded")
    rng = np.random.default_rng(0)
    size = np.exp(rng.uniform(np.log(1e-30), np.log(1e4), 500_000))
    z = np.concatenate([size, -size, rng.uniform(-12, 12, 200_000)]).astype(np.float32)
    call = (
        "inline float {0}(float z) {{ const float c[4] = {{0, 0, 0, 0}}; float slope; "
        "const float phi = GATE::phi(z, c, slope); return {1}; }}\n"
    )
    header = fused.source("metal/common.metal") + f"\ntypedef {name} GATE;\n"
    header += call.format("phi_of", "phi") + call.format("slope_of", "slope")
    exact = EXACT[name]
    with np.errstate(over="ignore"):
        for function, truth in (("phi_of", exact.phi), ("slope_of", exact.slope)):
            got, want = lane.elementwise(header, f"{function}(x)", z), truth(z.astype(np.float64))
            # Relative to the value, and for phi' beside what it is made of, as it has a zero. GELU's tanh has an
            # argument of z cubed, whose last digit an exponential makes many.
            scale = np.abs(want) + (
                np.minimum(1, np.exp(np.minimum(z, 0) / 2)) if function == "slope_of" else 0
            )
            assert (np.abs(got - want) <= (2e-5 if name == "gelu_tanh" else 4e-6) * scale + 1e-37).all()


def test_the_wheel_has_the_kernels(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", tmp_path, ROOT],
        check=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("metal/common.metal", "metal/forward.metal", "metal/backward.metal", "cuda/prelude.cuh"):
        assert f"nalora_mlx/kernels/{name}" in names
