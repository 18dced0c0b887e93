"""The kernel sources: address spaces, sanitizers, inexact functions, CUDA, and their place in an installed wheel."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from nalora_mlx.ops.activations import ACTIVATIONS
from nalora_mlx.ops.kernels import fused

from . import lane, translate
from .build import compiled
from .kernel import widened
from .test_gated_residual import EXACT, full, operands

ROOT = Path(__file__).parents[2]


def traced(variant, o, dh):
    """Return both kernels of an operation as MLX would pass them to Metal, with their inputs."""
    found = []
    build = fused._kernel

    def kernel(*args):
        made = build(*args)

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
    """Yield (activation, dtype, rank, layout, experts), each with another kernel source."""
    for name in sorted(EXACT):
        yield name, mx.float16, 4, "separate", 0
    for dtype in (mx.float32, mx.bfloat16):
        for name in ("silu", "gelu", "situ", "swiglu_oai", "xielu"):
            yield name, dtype, 16, "separate", 0
        for layout in fused.GATE_UP_LAYOUTS:
            yield "silu", dtype, 4, layout, 3
        yield "silu", dtype, 0, "separate", 0


def build(name, dtype, rank, layout, experts):
    variant = full(EXACT[name].row, gate_up_layout=layout, experts=experts)
    chosen = np.sort(np.arange(20) % experts) if experts else None
    return traced(variant, *operands(variant, 20, 12, rank, dtype, experts=chosen))


@pytest.mark.parametrize("sample", samples(), ids=str)
def test_address_spaces(sample):
    lane.require("spaces")
    for kernel, _ in build(*sample):
        assert lane.check_address_spaces(kernel.source) == ""


def test_small_arrays_are_in_the_constant_address_space():
    """Weights of fewer than eight rows are `constant`, and no pointer to them may be cast to `device`."""
    lane.require("spaces")
    variant = full(ACTIVATIONS["silu"])
    o, dh = operands(variant, 2, 12, 4)
    sources = [kernel.source for kernel, _ in traced(variant, o, dh)]
    assert "constant float* w" in sources[0]
    assert [lane.check_address_spaces(source) for source in sources] == ["", ""]


@pytest.mark.parametrize(
    ("features", "layout", "experts"),
    lane.slow_except(
        [
            (11, "separate", 0),
            (12, "separate", 0),
            (11, "gate first", 0),
            (12, "up first", 3),
            (11, "separate", 3),
        ],
        lambda case: case in ((11, "separate", 0), (12, "up first", 3)),
    ),
)
def test_under_the_address_sanitizer(features, layout, experts):
    lane.require("address")
    variant = full(ACTIVATIONS["silu"], gate_up_layout=layout, experts=experts)
    chosen = np.sort(np.arange(70) % experts) if experts else None
    o, dh = operands(variant, 70, features, 4, mx.bfloat16, experts=chosen)
    for kernel, inputs in traced(variant, o, dh):
        guarded, watched = kernel.run(inputs), kernel.run(inputs, lane="address")
        for got, want in zip(watched, guarded, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["silu", "gelu", "situ"])
def test_errors_of_exp_and_tanh_are_not_amplified(name):
    """Metal allows errors of four ulp and more in exp and tanh. The kernels' results change only by a few ulp."""
    lane.require("guarded")
    variant = full(EXACT[name].row)
    for kernel, inputs in traced(variant, *operands(variant, 70, 20, 4)):
        exact, rough = kernel.run(inputs), kernel.run(inputs, rough=True)
        for got, want in zip(rough, exact, strict=True):
            size = np.abs(want).max(axis=tuple(range(want.ndim - 1)), keepdims=True)  # per channel
            assert (np.abs(got - want) <= 2e-6 * size + 1e-30).all()
        assert any((a != b).any() for a, b in zip(rough, exact, strict=True))


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_phi_and_its_derivative_over_all_magnitudes(name):
    """Compare with float64 at a million floats."""
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
            # Relative to the value, and for phi', which has a zero, to its terms. The tanh form of GELU has an
            # argument of order z^3, whose rounding error the exponential amplifies.
            scale = np.abs(want) + (
                np.minimum(1, np.exp(np.minimum(z, 0) / 2)) if function == "slope_of" else 0
            )
            assert (np.abs(got - want) <= (2e-5 if name == "gelu_tanh" else 4e-6) * scale + 1e-37).all()


def test_wheel_contains_the_kernels(tmp_path):
    """Build a wheel, install it, and read the sources from another directory."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, timeout=300)
    code = (
        "import nalora_mlx; from nalora_mlx.ops.kernels import fused; print(nalora_mlx.__file__)\n"
        "for name in ('metal/common.metal', 'metal/forward.metal', 'metal/backward.metal', 'cuda/prelude.cuh'):\n"
        "    print(len(fused.source(name)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    where, *sizes = done.stdout.split()
    assert Path(where).is_relative_to(site)
    assert min(map(int, sizes)) > 500


# --- CUDA -----------------------------------------------------------------------------------------------------

SIGNATURE = """
template <typename T, typename L, int RANK, int TILE, int AHEAD, int HALVES, bool EXPERTS, int STATISTIC,
          int BOUNDARIES, bool CLOSED, bool DIAGNOSE>
__global__ void {name}(const T* g0, const T* u0, const T* z0, const L* ag, const L* au, const L* bg, const L* bu,
                       const float* w, const float* p, const int* tiles, const T* dh, const int* g0_shape, T* h,
                       float* sums, T* d) {{
{body}
}}
template __global__ void {name}<{types}>(const {t}*, const {t}*, const {t}*, const {l}*, const {l}*, const {l}*,
    const {l}*, const float*, const float*, const int*, const {t}*, const int*, {t}*, float*, {t}*);
"""


def cuda_text(directions, activation, t, low, rank, layout, experts):
    """Return the kernels in CUDA C++, with a signature as MLX writes it."""
    common, *bodies = (
        fused.source(f"metal/{name}.metal").replace("device ", "") for name in ("common", *directions)
    )
    text = fused.source("cuda/prelude.cuh") + common + f"\ntypedef {activation} GATE;\n"
    types = f"{t}, {low}, {rank}, {fused.TILE}, {fused.AHEAD}, {layout}, {experts}, 2, 2, true, true"
    for name, body in zip(directions, bodies, strict=True):
        text += SIGNATURE.format(name=name, body=body, types=types, t=t, l=low)
    return text


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc is installed, which compiles CUDA")
@pytest.mark.parametrize(
    "sample",
    [
        ("silu", "float", "float", 16, 0, "false"),
        ("gelu", "__half", "float", 8, 1, "false"),
        ("situ", "__nv_bfloat16", "__nv_bfloat16", 0, 2, "true"),
    ],
    ids=lambda sample: sample[0],
)
def test_cuda_compiles(tmp_path, sample):
    text = cuda_text(("forward", "backward"), *sample)
    (tmp_path / "kernels.cu").write_text(text)
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-ptx", "-o", "kernels.ptx", "kernels.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kernels.ptx").read_text().count(".entry") == 2


def cuda_program(kernel):
    """Return C++ text that runs the CUDA form of a kernel that was traced for Metal, over its whole grid."""
    source = kernel.source.replace("device ", "").replace("constant ", "")
    text, _, instance = source.rpartition("template [[host_name")
    text = re.sub(r",\n  uint3 \w+ \[\[\w+\]\]", "", text)  # in CUDA, positions of threads are no parameters
    text = re.sub(r" ?\[\[.*?\]\] ?", "", text)
    _, parameters = translate.signature(source)
    buffers = [parameter for parameter in parameters if parameter.attribute.startswith("buffer")]
    arguments = [f"static_cast<{buffer.type}>(buffers[{i}])" for i, buffer in enumerate(buffers)]
    (x, y, _), (width, _, _) = kernel.grid, kernel.threadgroup
    call = f"{re.search(r'decltype[(](.*)[)] ', instance)[1]}({', '.join(arguments)})"
    prelude = re.sub(r"#include <.*>", "", fused.source("cuda/prelude.cuh"))
    return "\n".join(
        [
            '#include "cuda_shim.h"',
            prelude,
            "typedef __half float16_t;\ntypedef __nv_bfloat16 bfloat16_t;",
            text,
            f'extern "C" void run(void** buffers) {{\n  for_each_thread({x}, {y}, {width}, [&] {{ {call}; }});\n}}\n',
        ]
    )


@pytest.mark.parametrize(
    ("dtype", "rank", "layout", "experts"),
    [
        (mx.float32, 16, "separate", 0),
        (mx.float16, 6, "gate first", 0),
        (mx.bfloat16, 8, "up first", 3),
        (mx.bfloat16, 0, "separate", 0),
    ],
    ids=str,
)
def test_cuda_kernels_compute_the_same(dtype, rank, layout, experts):
    """The CUDA form of each kernel, compiled as C++ with its prelude, writes the same bits as the Metal form."""
    lane.require("guarded")
    variant = full(ACTIVATIONS["silu"], gate_up_layout=layout, experts=experts)
    chosen = np.sort(np.arange(70) % experts) if experts else None
    for features in (12, 11):
        for kernel, inputs in traced(variant, *operands(variant, 70, features, rank, dtype, experts=chosen)):
            flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing"]
            program = ctypes.CDLL(str(compiled(cuda_program(kernel), flags, ".so")))
            buffers = kernel.buffers(inputs)
            program.run((ctypes.c_void_p * len(buffers))(*(buffer.array.ctypes.data for buffer in buffers)))
            outputs = [buffer.array for buffer in buffers if buffer.is_output]
            for got, spec, want in zip(outputs, kernel.outputs, kernel.run(inputs), strict=True):
                np.testing.assert_array_equal(widened(got, spec.dtype), want)
