"""Every activation against float64 NumPy and MLX's automatic differentiation."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalora_mlx.ops.activations import ACTIVATIONS
from tests.float64_reference import FAMILIES, TRUTH

ROWS = sorted(ACTIVATIONS)


def test_every_activation_has_a_float64_truth():
    assert set(TRUTH) == set(ACTIVATIONS)


def grid() -> np.ndarray:
    z = np.concatenate([np.linspace(-12, 12, 4001), np.logspace(-6, 4, 200), -np.logspace(-6, 4, 200), [0.0]])
    return z.astype(np.float32)


def functions(name):
    row = ACTIVATIONS[name]
    return (row.phi, row.derivative, row.selection, row.homogeneity)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("which", range(4), ids=["phi", "derivative", "selection", "homogeneity"])
def test_matches_float64(name, which):
    function, truth = functions(name)[which], TRUTH[name][which]
    if truth is None:
        assert function is None
        return
    z = grid()
    got = np.array(function(mx.array(z))).astype(np.float64)
    want = truth(z.astype(np.float64))
    assert np.isfinite(got).all()
    # Relative to max(1, |value|), because the rounding of z alone changes kappa by about |z kappa'| eps.
    error = np.abs(got - want) / np.maximum(1.0, np.abs(want))
    assert error.max() < 3e-6, (z[error.argmax()], got[error.argmax()], want[error.argmax()])


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_tails_are_accurate(name):
    """phi' and rho have a small relative error where they are tiny; 1 + erf would not."""
    z = np.linspace(-9, -2, 301).astype(np.float32)
    for which in (1, 2):
        got = np.array(functions(name)[which](mx.array(z))).astype(np.float64)
        want = TRUTH[name][which](z.astype(np.float64))
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_derivative_matches_the_gradient_of_phi(name):
    row = ACTIVATIONS[name]
    z = np.linspace(-6, 6, 997).astype(np.float32)
    z = z[np.abs(z) > 1e-3]  # ReLU has no derivative at 0
    gradient = np.array(mx.grad(lambda a: row.phi(a).sum())(mx.array(z)))
    np.testing.assert_allclose(np.array(row.derivative(mx.array(z))), gradient, atol=2e-6)


@pytest.mark.parametrize("name", [n for n in ROWS if ACTIVATIONS[n].selection])
def test_phi_is_z_times_selection(name):
    row, z = ACTIVATIONS[name], np.linspace(-4, 8, 997).astype(np.float32)
    a = mx.array(z)
    np.testing.assert_allclose(np.array(a * row.selection(a)), np.array(row.phi(a)), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=50, deadline=None)
@given(z=st.floats(-8, 8, width=32).filter(lambda z: abs(z) > 1e-2))
def test_homogeneity_satisfies_eulers_identity(name, z):
    """Check kappa phi = z phi' away from phi = 0."""
    row, a = ACTIVATIONS[name], mx.array([z])
    left = row.homogeneity(a) * row.phi(a)
    right = a * row.derivative(a)
    assert abs((left - right).item()) < 3e-6 * max(1.0, abs(right.item()))


def test_known_values_of_silu():
    row = ACTIVATIONS["silu"]
    z = mx.array([0.0, 1.27846, -1.27846])
    np.testing.assert_allclose(np.array(row.homogeneity(z)), [1.0, 1.2785, 0.0], atol=5e-5)


@pytest.mark.parametrize("name", [n for n in ROWS if len(ACTIVATIONS[n].regions) == 3])
def test_partition_boundary_is_the_zero_of_the_derivative(name):
    row = ACTIVATIONS[name]
    low, high = row.boundaries
    assert high == -low
    assert low < 0
    # phi' changes sign only there.
    z = np.linspace(-8, 8, 100001)
    sign = np.sign(TRUTH[name][1](z))
    changes = z[1:][sign[1:] != sign[:-1]]
    np.testing.assert_allclose(changes[np.abs(changes) < 7], [low], atol=2e-4)
    assert not row.above_boundary(mx.array(low - 1e-4), low).item()
    assert row.above_boundary(mx.array(low + 1e-4), low).item()


@pytest.mark.parametrize("name", ["relu", "relu2"])
def test_zero_is_in_the_dead_region(name):
    row = ACTIVATIONS[name]
    assert not row.above_boundary(mx.array(0.0), row.boundaries[0]).item()
    assert row.above_boundary(mx.array(1e-30), row.boundaries[0]).item()


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(name, dtype):
    z = mx.array([-3.0, -0.5, 0.25, 4.0]).astype(dtype)
    for function in functions(name):
        if function is not None:
            assert function(z).dtype == mx.float32
            assert mx.array_equal(function(z), function(z.astype(mx.float32)))


@pytest.mark.parametrize("name", ROWS)
def test_nan_propagates(name):
    row = ACTIVATIONS[name]
    assert mx.isnan(row.phi(mx.array([float("nan")]))).item()


# --- families -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_families_match_float64(name):
    row, phi, up = FAMILIES[name]
    z = grid()[np.abs(grid()) > 2e-6]
    np.testing.assert_allclose(
        np.array(row.phi(mx.array(z))), phi(z.astype(np.float64)), rtol=2e-5, atol=3e-6
    )
    np.testing.assert_allclose(
        np.array(row.linear_branch(mx.array(z))), up(z.astype(np.float64)), rtol=2e-6, atol=2e-6
    )
    assert np.isfinite(np.array(row.derivative(mx.array(z)))).all()
    assert row.boundaries == ()  # a partition is undefined: clipped, learned, or dependent on the whole row


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"gelu_topk"}))
def test_derivatives_of_families_match_float64_differences(name):
    row, phi, _ = FAMILIES[name]
    z = np.linspace(-6, 9, 601).astype(np.float32)
    h = 1e-6
    want = (phi(z + np.float64(h)) - phi(z - np.float64(h))) / (2 * h)
    kinks = np.abs(np.gradient(want)) > 0.3  # where a clip begins, and at the zero of xIELU
    got = np.array(row.derivative(mx.array(z)))
    smooth = ~(kinks | np.roll(kinks, 1) | np.roll(kinks, -1)) & (np.abs(z) > 1e-3)
    assert smooth.mean() > 0.95
    np.testing.assert_allclose(got[smooth], want[smooth], rtol=2e-5, atol=2e-5)


def test_derivative_of_sparse_gelu_treats_the_cutoff_as_constant():
    row = FAMILIES["gelu_topk"][0]
    z = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    cutoff = z.astype(np.float64).mean(-1, keepdims=True) + 0.5 * z.astype(np.float64).std(-1, keepdims=True)
    over = z - cutoff
    want = np.where(over > 0, TRUTH["gelu_tanh"][1](over), 0)
    np.testing.assert_allclose(np.array(row.derivative(mx.array(z))), want, rtol=1e-5, atol=2e-6)
    assert 0.1 < (want > 0).mean() < 0.5
