"""Code that C++ accepts and Metal rejects."""

import pytest

from nalora_mlx.ops.kernels import fused
from tests.msl import translate
from tests.msl.lane import check_address_spaces, require, trace
from tests.msl.planted import caught, double, random

REJECTED = [  # header, statement of a kernel, expected message
    ("", "y[i] = T(2.0 * x[i]);", "implicit conversion from .float. to .double."),
    ("", "double a = x[i]; y[i] = T(a);", "kernel.metal:8: Metal has no `double`"),
    ("", "y[i] = T(std::exp(x[i]));", "Metal has no `std::`"),
    ("", "y[i] = T(metal::expm1(x[i]));", ".expm1. is not a member of .metal."),
    ("", "y[i] = T(metal::erf(x[i]));", ".erf. is not a member of .metal."),
    ("", "auto twice = [&](float a) { return 2.0f * a; }; y[i] = T(twice(x[i]));", "no lambda expressions"),
    ("", "const device float* p = (const device float*)y; y[i] = p[i];", "cast `.*` as a reinterpret_cast"),
    ("", "float* p = &scratch; y[i] = *p;", "a pointer or reference needs an address space: `float[*]`"),
    (
        "inline void set(float& a) { a = 1.0f; }\n",
        "set(scratch); y[i] = T(scratch);",
        "1: a pointer or reference needs",
    ),
    (
        "template <typename U>\ninline void set(U& a) { a = 1; }\n",
        "y[i] = x[i];",
        "2: a pointer or reference needs",
    ),
    (
        "constexpr float TWO = 2.0f;\n",
        "y[i] = T(TWO * x[i]);",
        "outside of functions must be `constant`: `constexpr",
    ),
    (
        "namespace n {\nfloat two = 2.0f;\n}\n",
        "y[i] = x[i];",
        "2: a variable outside of functions must be `constant`",
    ),
    ("", "threadgroup float a[4], b[4]; y[i] = x[i];", "declare one threadgroup variable per statement"),
    (
        "inline float f() { threadgroup float a[4]; return a[0]; }\n",
        "y[i] = x[i];",
        "must be declared in the kernel itself",
    ),
    (
        "struct Box {\n  float a;\n  float twice() const { return 2.0f * a; }\n};\n",
        "y[i] = x[i];",
        "kernel.metal:3: a member function needs an address space after its parameters: `float twice",
    ),
    (
        "struct Box {\n  float a;\n  Box(float x) : a(x) {}\n};\n",
        "y[i] = x[i];",
        "3: a member function needs an address space",
    ),
    ("", "y[i] = metal::exp(bfloat(x[i]));", "no matching function"),
    ("", "y[i] = metal::min(i, 3);", "no matching function"),
    ("", "float a; y[i] = T(a);", "uninitialized"),
]


@pytest.mark.parametrize(("header", "statement", "message"), REJECTED, ids=[row[1] for row in REJECTED])
def test_rejected(header, statement, message):
    require("guarded")
    body = f"  const uint i = thread_position_in_grid.x;\n  float scratch = 0.0f;\n  {statement}\n"
    caught(message, double(body, header=header, grid=(45, 1, 1)), random(45))


ACCEPTED = """
// double trouble: (device float*) std:: float& goto
#define TWICE(x) (2.0f * (x))
constant float TABLE[3] = {1.0f, 2.0f, 3.0f};
static constexpr constant float HALF = 0.5f;
using Four = vec<float, 4>;
namespace inner {
struct Pair {
  float a = 1.0f, b = 2.0f;
  float sum() const thread { return a * b + a; }
  Pair(float x, float y = float(1)) thread : a(x), b(y) {}
  thread float& operator[](int i) thread { return i == 0 ? a : b; }
  static float zero() { return 0.0f; }
  friend bool same(Pair a, Pair b) { return a.a == b.a; }
  float last = metal::max(1.0f, 2.0f);
  alignas(16) float aligned;
  float list[2 > 1 ? 2 : 1];
};
inline bool operator==(Pair a, Pair b) { return a.a == b.a; }
template <typename T, int N = 2>
inline float total(thread const T* list, float start = 0.0f) {
  float sum = start;
  for (int i = 0; i < N && sum >= start; ++i) sum += float(list[i]);
  return sum;
}
inline void set(device Pair& to, thread float4& four) {
  to.a = four.x * HALF;
}
}  // namespace inner
"""


def test_accepted():
    assert translate.violations(ACCEPTED) == []
    (found,) = translate.violations(ACCEPTED + "float after = 1.0f;\n")
    assert found.startswith(f"kernel.metal:{ACCEPTED.count(chr(10)) + 1}: a variable outside")


WRONG_SPACES = [  # statement, shape of x; g++ accepts them
    ("y[i] = load(x);", [4]),  # with fewer than 8 elements, MLX makes the input constant
    ("y[i] = load(reinterpret_cast<const device float*>(x_shape));", [45]),
    ("threadgroup float t[64]; t[i] = x[i]; y[i] = load(t);", [45]),
    ("threadgroup float t[64]; t[i] = x[i]; y[i] = load_own(t);", [45]),
    ("const device float* p = &TABLE[0]; y[i] = p[i % 3];", [45]),
]
LOAD = """
constant float TABLE[3] = {1.0f, 2.0f, 3.0f};
inline float load(const device float* p) { return p[0]; }
inline float load_own(thread const float* p) { return p[0]; }
"""


@pytest.mark.parametrize(("statement", "shape"), WRONG_SPACES, ids=[row[0] for row in WRONG_SPACES])
def test_wrong_address_spaces(statement, shape):
    require("spaces")
    body = f"  const uint i = thread_position_in_grid.x;\n  {statement}\n"
    (kernel,) = trace(double(body, header=LOAD, grid=(4, 1, 1)), random(*shape))
    assert "kernel.metal:" in check_address_spaces(kernel.source)
    require("guarded")
    kernel.run([random(*shape)])


ALL_SPACES = """
  const uint i = thread_position_in_grid.x;
  threadgroup float t[64];
  t[i] = x[i];
  threadgroup float* p = t;
  const float4 v = float4(x[0], x[1], x[2], x[3]) * vec<float, 4>(2.0f);
  vec<half, 4> h;
  h[0] = half(v.x);
  y[i] = T(float(h[0]) + p[i] + TABLE[i % 3] + load(x) + v.x + metal::select(v, -v, v < float4(0.0f)).y);
"""


def test_correct_use_of_every_address_space():
    require("spaces")
    (kernel,) = trace(double(ALL_SPACES, header=LOAD, grid=(4, 1, 1)), random(45))
    assert check_address_spaces(kernel.source) == ""


BARE_MEMBERS = [
    "float twice(float x) { return 2.0f * x; }",
    "template <typename U> FUNCTION U twice(U x = U(1)) const { return 2 * x; }",
    "Box() = default;",
    "float nested(float x = metal::max(1.0f, float(2)), float y = 0.0f) const { return x; }",
    "Box(thread const Box& other) : a(other.a) {}",
    "float operator()(float x) const { return x; }",
    "bool operator==(Box other) const { return a == other.a; }",
    "PLAIN_UP\n  CLAMPED(1, 2.0f)\n  float twice() { return 2.0f * a; }",
    "float declared(float x) const;",
    "struct Inner { float b; float get() const { return b; } };",
]


@pytest.mark.parametrize("member", BARE_MEMBERS)
def test_members_without_an_address_space(member):
    text = f"template <typename T>\nstruct Box {{\n  float a;\n  {member}\n}};\n"
    (found,) = translate.violations(text)
    assert "a member function needs an address space after its parameters" in found


def test_members_of_the_kernels_have_an_address_space():
    """Without the qualifiers, the rule finds the constructors and the member function of the kernels' header."""
    header = fused.source("metal/common.metal")
    assert translate.violations(header) == []
    assert len(translate.violations(header.replace(") thread {", ") {"))) == 2
    assert len(translate.violations(header.replace(") const thread {", ") const {"))) == 1
