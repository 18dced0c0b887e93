// The subset of the Metal Shading Language that kernels may use, in C++14, without other headers.
//
// Two compilers read it:
// - g++ compiles kernels to run them. half is _Float16, bfloat and vectors are classes, and address spaces are ignored.
// - clang with MSL_SYNTAX only checks them. Address spaces are part of the types. Classes do not support that (no
//   member function takes a `device` object), so bfloat is an enumeration and vectors are native.
//
// Where it differs from Metal, it is stricter: bfloat has no mathematical functions and only explicit conversions, all
// arguments of a call have the same type, simd lanes that do not exist hold NaN, min and max drop NaN as fmin and fmax
// do, and what Metal lacks (double, erf, expm1, the C++ library) is missing here too.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __INT8_TYPE__ int8_t;
typedef __INT16_TYPE__ int16_t;
typedef __INT32_TYPE__ int32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __UINT64_TYPE__ uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef _Float16 half;
typedef half float16_t;

#define __METAL_VERSION__ 310  // the first version with bfloat
#define METAL_FUNC inline
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_PI_F 3.14159265358979323846f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_LOG2E_F 1.44269504088896340736f

#ifdef MSL_SYNTAX
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant
#define threadgroup
#endif
#define thread

// --- Functions of the runtime (launch.h) ---------------------------------------------------------------

extern "C" {
void msl_barrier(int line);
// Exchange a value within the simdgroup. Returns the values of all lanes, 16 bytes apart, their number, and this lane.
const char* msl_exchange(const void* value, size_t size, int line, uint* lanes, uint* lane);
char* msl_threadgroup(int key, const char* name, size_t size);
}

namespace metal {

template <bool condition, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool condition, class T = void> using enable_if_t = typename enable_if<condition, T>::type;
template <class T, class U> struct is_same { static constexpr bool value = false; };
template <class T> struct is_same<T, T> { static constexpr bool value = true; };
template <class T, class U> constexpr bool is_same_v = is_same<T, U>::value;

template <class T> constexpr bool is_real = is_same_v<T, float> || is_same_v<T, half>;
template <class T> constexpr bool is_whole = is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, short> ||
    is_same_v<T, ushort> || is_same_v<T, long> || is_same_v<T, ulong> || is_same_v<T, char> || is_same_v<T, uchar>;
template <class T> constexpr bool is_number = is_real<T> || is_whole<T>;

template <class U, class T> inline U as_type(T x) {
  static_assert(sizeof(U) == sizeof(T), "as_type keeps the size");
  U u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}

}  // namespace metal

// --- bfloat and vectors ----------------------------------------------------------------------------------------

#ifdef MSL_SYNTAX

enum bfloat : unsigned short {};
#define MSL_OPERATOR(op) \
  inline bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); }
MSL_OPERATOR(+) MSL_OPERATOR(-) MSL_OPERATOR(*) MSL_OPERATOR(/)
#undef MSL_OPERATOR

namespace metal {
// Only types matter here. All elements have 32 bits, so that vectors can be cast to one another.
template <class T> struct element { typedef int type; };
template <> struct element<uint> { typedef uint type; };
template <> struct element<float> { typedef float type; };
template <> struct element<half> { typedef float type; };
template <> struct element<bfloat> { typedef float type; };
template <class T, int N> using native = T __attribute__((ext_vector_type(N)));
template <class T, int N> using vec = native<typename element<T>::type, N>;
#define MSL_VECTOR(T, N) native<T, N>
}  // namespace metal

namespace msl {
// Replaces constructors such as float4(a, b, c, d) and vec<T, 4>(x), which native vectors do not have.
template <class T> inline T scalar(T x) { return x; }
inline float scalar(bfloat x) { return float(x); }
template <class V, class A> inline V make(A a) { return (V)scalar(a); }
template <class V, class A, class B, class... C> inline V make(A a, B b, C... c) {
  typedef decltype(V()[0] + 0) T;
  return V{T(scalar(a)), T(scalar(b)), T(scalar(c))...};
}
}  // namespace msl

#else

struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float x) {  // rounds to nearest, ties to even
    const uint32_t u = metal::as_type<uint32_t>(x);
    bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  operator float() const { return metal::as_type<float>(uint32_t(bits) << 16); }
};
#define MSL_OPERATOR(op)                                                                  \
  inline bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); } \
  inline bfloat& operator op##=(bfloat& a, bfloat b) { return a = a op b; }
MSL_OPERATOR(+) MSL_OPERATOR(-) MSL_OPERATOR(*) MSL_OPERATOR(/)
#undef MSL_OPERATOR

namespace metal {
template <class T, int N> struct elements;
template <class T> struct elements<T, 2> { union { T e[2]; struct { T x, y; }; }; };
template <class T> struct elements<T, 3> { union { T e[3]; struct { T x, y, z; }; }; };
template <class T> struct elements<T, 4> { union { T e[4]; struct { T x, y, z, w; }; }; };

template <class T, int N> struct alignas(sizeof(T) * (N == 2 ? 2 : 4)) vec : elements<T, N> {
  vec() = default;
  vec(T x) { for (int i = 0; i < N; ++i) this->e[i] = x; }
  template <class... X, class = enable_if_t<sizeof...(X) == N>> vec(X... x) {
    const T list[] = {T(x)...};
    for (int i = 0; i < N; ++i) this->e[i] = list[i];
  }
  template <class U> explicit vec(const vec<U, N>& v) { for (int i = 0; i < N; ++i) this->e[i] = T(v.e[i]); }
  T& operator[](uint i) { return this->e[i]; }
  const T& operator[](uint i) const { return this->e[i]; }
  vec operator-() const { return vec(T(0)) - *this; }
#define MSL_OPERATOR(op)                             \
  friend vec operator op(vec a, const vec& b) {      \
    for (int i = 0; i < N; ++i) a.e[i] = a.e[i] op b.e[i]; \
    return a;                                        \
  }                                                  \
  vec& operator op##=(const vec& b) { return *this = *this op b; }
  MSL_OPERATOR(+) MSL_OPERATOR(-) MSL_OPERATOR(*) MSL_OPERATOR(/)
#undef MSL_OPERATOR
#define MSL_OPERATOR(op)                                        \
  friend vec<bool, N> operator op(const vec& a, const vec& b) { \
    vec<bool, N> c;                                             \
    for (int i = 0; i < N; ++i) c.e[i] = a.e[i] op b.e[i];      \
    return c;                                                   \
  }
  MSL_OPERATOR(<) MSL_OPERATOR(<=) MSL_OPERATOR(>) MSL_OPERATOR(>=) MSL_OPERATOR(==) MSL_OPERATOR(!=)
#undef MSL_OPERATOR
};
#define MSL_VECTOR(T, N) vec<T, N>
}  // namespace metal

#endif

typedef bfloat bfloat16_t;

namespace metal {

#define MSL_VECTORS(T) \
  typedef vec<T, 2> T##2; \
  typedef vec<T, 3> T##3; \
  typedef vec<T, 4> T##4;
MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(bfloat) MSL_VECTORS(int) MSL_VECTORS(uint) MSL_VECTORS(bool)
#undef MSL_VECTORS

// --- Functions of one, two and three numbers, and of vectors of them --------------------------------------------

#define MSL_1(name, gate, expression)                                                         \
  template <class T, class = enable_if_t<gate<T>>> inline T name(T x) { return T(expression); } \
  template <class T, int N> inline MSL_VECTOR(T, N) name(MSL_VECTOR(T, N) x) {                \
    for (int i = 0; i < N; ++i) x[i] = name(T(x[i]));                                         \
    return x;                                                                                 \
  }
#define MSL_2(name, gate, expression)                                                              \
  template <class T, class = enable_if_t<gate<T>>> inline T name(T x, T y) { return T(expression); } \
  template <class T, int N> inline MSL_VECTOR(T, N) name(MSL_VECTOR(T, N) x, MSL_VECTOR(T, N) y) { \
    for (int i = 0; i < N; ++i) x[i] = name(T(x[i]), T(y[i]));                                     \
    return x;                                                                                      \
  }
#define MSL_3(name, gate, expression)                                                                   \
  template <class T, class = enable_if_t<gate<T>>> inline T name(T x, T y, T z) { return T(expression); } \
  template <class T, int N>                                                                             \
  inline MSL_VECTOR(T, N) name(MSL_VECTOR(T, N) x, MSL_VECTOR(T, N) y, MSL_VECTOR(T, N) z) {            \
    for (int i = 0; i < N; ++i) x[i] = name(T(x[i]), T(y[i]), T(z[i]));                                 \
    return x;                                                                                           \
  }

inline float fmin(float x, float y) { return __builtin_fminf(x, y); }
inline float fmax(float x, float y) { return __builtin_fmaxf(x, y); }
template <class T, class = enable_if_t<is_whole<T>>> inline T smaller(T x, T y) { return y < x ? y : x; }
template <class T, class = enable_if_t<is_whole<T>>> inline T larger(T x, T y) { return x < y ? y : x; }
template <class T, class = enable_if_t<is_real<T>>, class = void> inline T smaller(T x, T y) { return T(fmin(x, y)); }
template <class T, class = enable_if_t<is_real<T>>, class = void> inline T larger(T x, T y) { return T(fmax(x, y)); }

// With MSL_ROUGH, a result with an error of up to `ulps` ulp, as Metal allows. The error depends only on the bits of y.
inline float within(uint ulps, float y) {
#ifdef MSL_ROUGH
  const uint bits = as_type<uint>(y);
  if (y == 0.0f || !__builtin_isfinite(y)) return y;
  return as_type<float>(bits + (bits * 2654435761u >> 16) % (2 * ulps + 1) - ulps);
#else
  return y;
#endif
}

#define MSL_TRANSCENDENTAL                                               \
  MSL_1(exp, is_real, within(4, __builtin_expf(x)))                      \
  MSL_1(exp2, is_real, within(4, __builtin_exp2f(x)))                    \
  MSL_1(log, is_real, within(4, __builtin_logf(x)))                      \
  MSL_1(log2, is_real, within(4, __builtin_log2f(x)))                    \
  MSL_1(sqrt, is_real, __builtin_sqrtf(x))                               \
  MSL_1(rsqrt, is_real, within(2, 1.0f / __builtin_sqrtf(x)))            \
  MSL_1(tanh, is_real, within(5, __builtin_tanhf(x)))                    \
  MSL_1(sin, is_real, within(4, __builtin_sinf(x)))                      \
  MSL_1(cos, is_real, within(4, __builtin_cosf(x)))                      \
  MSL_2(powr, is_real, x < T(0) ? NAN : within(16, __builtin_powf(x, y)))
MSL_TRANSCENDENTAL
namespace precise { MSL_TRANSCENDENTAL }
namespace fast { MSL_TRANSCENDENTAL }
#undef MSL_TRANSCENDENTAL

MSL_1(fabs, is_real, __builtin_fabsf(x))
MSL_1(floor, is_real, __builtin_floorf(x))
MSL_1(ceil, is_real, __builtin_ceilf(x))
MSL_1(rint, is_real, __builtin_rintf(x))
MSL_1(trunc, is_real, __builtin_truncf(x))
MSL_1(abs, is_number, is_real<T> ? T(__builtin_fabsf(float(x))) : x < T(0) ? T(-x) : x)
MSL_1(sign, is_real, x > T(0) ? T(1) : x < T(0) ? T(-1) : x == T(0) ? x : T(0))
MSL_2(min, is_number, smaller(x, y))
MSL_2(max, is_number, larger(x, y))
MSL_2(step, is_real, y < x ? 0.0f : 1.0f)
MSL_2(copysign, is_real, __builtin_copysignf(x, y))
MSL_3(clamp, is_number, min(max(x, y), z))
MSL_3(mix, is_real, x + (y - x) * z)
MSL_3(fma, is_real, __builtin_fmaf(x, y, z))  // also for half, whose product is exact in float; rounds twice
#undef MSL_1
#undef MSL_2
#undef MSL_3

template <class T, class = enable_if_t<is_real<T>>> inline bool isnan(T x) { return x != x; }
template <class T, class = enable_if_t<is_real<T>>> inline bool isinf(T x) { return __builtin_isinf(float(x)); }
template <class T, class = enable_if_t<is_real<T>>> inline bool isfinite(T x) { return __builtin_isfinite(float(x)); }

template <class T> inline T select(T no, T yes, bool condition) { return condition ? yes : no; }
#ifndef MSL_SYNTAX
template <class T, int N> inline vec<T, N> select(vec<T, N> no, vec<T, N> yes, vec<bool, N> condition) {
  for (int i = 0; i < N; ++i) no[i] = condition[i] ? yes[i] : no[i];
  return no;
}
#else
template <class T, int N>
inline MSL_VECTOR(T, N) select(MSL_VECTOR(T, N) no, MSL_VECTOR(T, N) yes, MSL_VECTOR(int, N)) { return no + yes; }
#endif
template <class T, int N> inline T dot(MSL_VECTOR(T, N) a, MSL_VECTOR(T, N) b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; ++i) sum += a[i] * b[i];
  return sum;
}

template <class T> struct numeric_limits;
template <> struct numeric_limits<float> {
  static constexpr float max() { return __FLT_MAX__; }
  static constexpr float min() { return __FLT_MIN__; }
  static constexpr float lowest() { return -__FLT_MAX__; }
  static constexpr float epsilon() { return __FLT_EPSILON__; }
  static constexpr float infinity() { return INFINITY; }
  static constexpr float quiet_NaN() { return NAN; }
};
template <> struct numeric_limits<int> {
  static constexpr int max() { return __INT_MAX__; }
  static constexpr int min() { return -__INT_MAX__ - 1; }
};
template <> struct numeric_limits<uint> {
  static constexpr uint max() { return ~0u; }
  static constexpr uint min() { return 0u; }
};

// --- Synchronization and simd functions ------------------------------------------------------------------------

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline void threadgroup_barrier(mem_flags, int line = __builtin_LINE()) { msl_barrier(line); }

template <class T> struct Lanes {
  const char* values;
  uint count, own;
  T operator[](uint i) const {
    T x;
    if (i < count) __builtin_memcpy(&x, values + 16 * i, sizeof x);
    else __builtin_memset(&x, 0xff, sizeof x);  // NaN
    return x;
  }
};
template <class T> inline Lanes<T> exchange(T x, int line) {
  static_assert(sizeof(T) <= 16, "a lane gives at most four floats");
  Lanes<T> lanes;
  lanes.values = msl_exchange(&x, sizeof x, line, &lanes.count, &lanes.own);
  return lanes;
}
inline void simdgroup_barrier(mem_flags, int line = __builtin_LINE()) { exchange(0, line); }

template <class T> inline T simd_sum(T x, int line = __builtin_LINE()) {
  const Lanes<T> lanes = exchange(x, line);
  x = lanes[0];
  for (uint i = 1; i < lanes.count; ++i) x += lanes[i];
  return x;
}
template <class T> inline T simd_max(T x, int line = __builtin_LINE()) {
  const Lanes<T> lanes = exchange(x, line);
  for (uint i = 0; i < lanes.count; ++i) x = max(x, lanes[i]);
  return x;
}
template <class T> inline T simd_min(T x, int line = __builtin_LINE()) {
  const Lanes<T> lanes = exchange(x, line);
  for (uint i = 0; i < lanes.count; ++i) x = min(x, lanes[i]);
  return x;
}
template <class T> inline T simd_shuffle(T x, ushort lane, int line = __builtin_LINE()) {
  return exchange(x, line)[lane];
}
template <class T> inline T simd_broadcast(T x, ushort lane, int line = __builtin_LINE()) {
  return exchange(x, line)[lane];
}
template <class T> inline T simd_shuffle_xor(T x, ushort mask, int line = __builtin_LINE()) {
  const Lanes<T> lanes = exchange(x, line);
  return lanes[lanes.own ^ mask];
}
template <class T> inline T simd_shuffle_down(T x, ushort delta, int line = __builtin_LINE()) {
  const Lanes<T> lanes = exchange(x, line);
  return lanes[lanes.own + delta];
}

}  // namespace metal

namespace msl {
// Replaces `threadgroup T name[N];` in a kernel by a reference to memory shared by the threadgroup.
#ifdef MSL_SYNTAX
template <class Array> threadgroup Array& shared(int key, const char* name);
#else
template <class Array> inline Array& shared(int key, const char* name) {
  return *reinterpret_cast<Array*>(msl_threadgroup(key, name, sizeof(Array)));
}
#endif
}  // namespace msl

using namespace metal;
#define double metal_has_no_double
