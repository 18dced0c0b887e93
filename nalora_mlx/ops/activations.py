"""Activations of gated MLPs: phi, its derivative, selection weight, homogeneity, and partition.

A self-gated activation is phi(z) = z rho(z). Its local effective homogeneity is

    kappa(z) = z phi'(z) / phi(z) = 1 + z rho'(z) / rho(z)

(the local form of Euler's degree; kappa(0) = 1 by continuity). All functions here are elementwise. They take an array
of any shape and float dtype, compute in float32, and return float32. They are finite for |z| up to 1e4.

Source: NA-LoRA (arXiv 2606.31717), as described in the README; the closed forms are elementary calculus.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from nalora_mlx.ops.fast_math import sigmoid, tanh

Elementwise = Callable[[mx.array], mx.array]

_SQRT_2 = math.sqrt(2.0)
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_TANH_CUBIC = 0.044715  # the cubic coefficient of the tanh approximation of GELU

# Zeros of phi': below them, phi decreases; above them, it increases.
_SILU_ZERO = -1.2784645427610737
_GELU_ZERO = -0.7517915246935644
_GELU_TANH_ZERO = -0.7524614220710163

# Mills ratio R(x) = (1 - Phi(x)) / pdf(x) for x >= 0, as t P(t) with t = 4 / (4 + x). P is a weighted least-squares fit
# of degree 9 on Chebyshev nodes in float64. Its relative error is 4e-8, and 3.3e-7 if evaluated in float32.
_MILLS_SHIFT = 4.0
_MILLS = (
    0.2499999902247973,
    0.2500024305793807,
    0.23427646281879944,
    0.20465938601587808,
    0.14715704950253694,
    0.1619176653846931,
    -0.08385410415595711,
    0.24446858433423266,
    -0.2056031348148825,
    0.050289818273336714,
)


@dataclass(frozen=True)
class Activation:
    """One row of the activation table: an activation and everything that NA-LoRA needs to know about it.

    Attributes:
        name: name in configs and reports.
        phi: z -> phi(z).
        derivative: z -> phi'(z).
        selection: z -> rho(z) with phi(z) = z rho(z), or None if phi is not self-gated.
        homogeneity: z -> kappa(z), or None if it is not used.
        regions: names of the regions of the coarse partition, from low z to high z; empty without a partition.
        boundaries: the R - 1 increasing values of z that separate the regions.
        left_closed: whether a boundary belongs to the region above it (z >= b) or below it (z > b).
        up: u -> the factor that multiplies phi(z), or None if that is u itself.
        kernel: the struct of kernels/metal/common.metal that computes the same, or None if there is none.
        constants: at most four parameters that identify a member of a family; kernels get them too.
    """

    name: str
    phi: Elementwise = field(compare=False)
    derivative: Elementwise = field(compare=False)
    selection: Elementwise | None = field(compare=False)
    homogeneity: Elementwise | None = field(compare=False)
    regions: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()
    left_closed: bool = True
    up: Elementwise | None = field(default=None, compare=False)
    kernel: str | None = None
    constants: tuple[float, ...] = ()

    def native_phi(self, z: mx.array) -> mx.array:
        """Return phi(z) in the dtype of z, rounded after every operation."""
        return self.phi.native(z)  # type: ignore[attr-defined]

    def linear_branch(self, u: mx.array) -> mx.array:
        """Return the factor that multiplies phi(z): u in float32, clipped or shifted as the model does."""
        u = u.astype(mx.float32)
        return u if self.up is None else self.up(u)

    def above_boundary(self, z: mx.array, boundary: float) -> mx.array:
        """Return whether each z lies above a boundary of the partition (see `left_closed`); bool, shape of z."""
        return z >= boundary if self.left_closed else z > boundary


def in_float32(function: Elementwise) -> Elementwise:
    """Make a function convert its argument to float32, and keep the original as its attribute `native`."""

    def promoted(z: mx.array) -> mx.array:
        return function(z.astype(mx.float32))

    promoted.__doc__ = function.__doc__
    promoted.native = function  # type: ignore[attr-defined]
    return promoted


# --- SiLU: rho = sigmoid ------------------------------------------------------------------------------------


@in_float32
def _silu(z):
    return z * sigmoid(z)


@in_float32
def _silu_homogeneity(z):
    # sigmoid(-z), not 1 - sigmoid(z), which cancels for large z.
    return 1 + z * sigmoid(-z)


@in_float32
def _silu_derivative(z):
    # 1 - s shares its exponential with phi. It cancels for large z, but there the product is negligible next to 1.
    s = sigmoid(z)
    return s * (1 + z * (1 - s))


@in_float32
def _sigmoid(z):
    return sigmoid(z)


# --- GELU, exact: rho = Phi, the Gaussian distribution function --------------------------------------------


def _mills(x):
    """Return the Mills ratio (1 - Phi(x)) / pdf(x) for x >= 0."""
    t = _MILLS_SHIFT / (_MILLS_SHIFT + x)
    p = mx.full(t.shape, _MILLS[-1], dtype=mx.float32)
    for coefficient in reversed(_MILLS[:-1]):
        p = p * t + coefficient
    return t * p


def _gaussian_density(z):
    # The density underflows float32 for |z| > 15; the clip keeps the square finite.
    return mx.exp(-0.5 * mx.square(mx.clip(z, -15.0, 15.0))) * (1 / math.sqrt(2 * math.pi))


@in_float32
def _gaussian_cdf(z):
    # 1 + erf cancels completely below z = -5; the tail from the Mills ratio stays accurate.
    tail = _gaussian_density(z) * _mills(mx.abs(z))
    return mx.where(z < 0, tail, 1 - tail)


@in_float32
def _gelu(z):
    # The same expression as in models, so that an adapted model equals its base.
    return z * (1 + mx.erf(z / _SQRT_2)) / 2


@in_float32
def _gelu_derivative(z):
    # pdf(z) (R + z) for z < 0, where Phi + z pdf would cancel; Phi + z pdf otherwise.
    density = _gaussian_density(z)
    mills = _mills(mx.abs(z))
    return mx.where(z < 0, density * (mills + z), 1 - density * (mills - z))


@in_float32
def _gelu_homogeneity(z):
    density = _gaussian_density(z)
    mills = _mills(mx.abs(z))
    return 1 + z * mx.where(z < 0, 1 / mills, density / (1 - density * mills))


# --- GELU, tanh form: rho = sigmoid(2 w), w = sqrt(2/pi) (z + 0.044715 z^3) ---------------------------------


def _tanh_argument(z):
    return _SQRT_2_OVER_PI * (z + _TANH_CUBIC * z * z * z)


@in_float32
def _gelu_tanh(z):
    return 0.5 * z * (1 + tanh(_tanh_argument(z)))


@in_float32
def _gelu_tanh_selection(z):
    return sigmoid(2 * _tanh_argument(z))


@in_float32
def _gelu_tanh_homogeneity(z):
    slope = _SQRT_2_OVER_PI * (1 + 3 * _TANH_CUBIC * z * z)
    return 1 + 2 * z * slope * sigmoid(-2 * _tanh_argument(z))


@in_float32
def _gelu_tanh_derivative(z):
    return _gelu_tanh_selection(z) * _gelu_tanh_homogeneity(z)


# --- ReLU, ReLU^2, sigmoid ----------------------------------------------------------------------------------


@in_float32
def _relu(z):
    return mx.maximum(z, 0)


@in_float32
def _step(z):
    return (z > 0).astype(mx.float32)


@in_float32
def _relu_squared(z):
    return mx.square(mx.maximum(z, 0))


@in_float32
def _relu_squared_derivative(z):
    return 2 * mx.maximum(z, 0)


@in_float32
def _relu_squared_homogeneity(z):
    return 2 * (z > 0).astype(mx.float32)


@in_float32
def _sigmoid_derivative(z):
    return sigmoid(z) * sigmoid(-z)


@in_float32
def _sigmoid_homogeneity(z):
    return z * sigmoid(-z)


_THREE_REGIONS = ("suppressed", "transition", "homogeneous")
_TWO_REGIONS = ("dead", "homogeneous")

ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation(
            "silu",
            _silu,
            _silu_derivative,
            _sigmoid,
            _silu_homogeneity,
            _THREE_REGIONS,
            (_SILU_ZERO, -_SILU_ZERO),
            kernel="silu",
        ),
        Activation(
            "gelu",
            _gelu,
            _gelu_derivative,
            _gaussian_cdf,
            _gelu_homogeneity,
            _THREE_REGIONS,
            (_GELU_ZERO, -_GELU_ZERO),
            kernel="gelu",
        ),
        Activation(
            "gelu_tanh",
            _gelu_tanh,
            _gelu_tanh_derivative,
            _gelu_tanh_selection,
            _gelu_tanh_homogeneity,
            _THREE_REGIONS,
            (_GELU_TANH_ZERO, -_GELU_TANH_ZERO),
            kernel="gelu_tanh",
        ),
        Activation(
            "relu", _relu, _step, _step, _step, _TWO_REGIONS, (0.0,), left_closed=False, kernel="relu"
        ),
        Activation(
            "relu2",
            _relu_squared,
            _relu_squared_derivative,
            _relu,
            _relu_squared_homogeneity,
            _TWO_REGIONS,
            (0.0,),
            left_closed=False,
            kernel="relu2",
        ),
        # A plain sigmoid gate is not self-gated, so it has no partition, only the temporal-importance mask.
        Activation("sigmoid", _sigmoid, _sigmoid_derivative, None, _sigmoid_homogeneity, kernel="logistic"),
    )
}
