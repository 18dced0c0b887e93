// The parts of the Metal Shading Language that the kernels in ../metal use, in CUDA C++.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FUNCTION __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define thread
#define thread_position_in_grid \
  (uint3{blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, 0})
#define threads_per_grid (uint3{blockDim.x * gridDim.x, blockDim.y * gridDim.y, 1})

typedef unsigned int uint;

// N neighbouring elements, N a multiple of four. They stay packed in words until one is used, so that the compiler does
// not wait for a load in order to unpack it.
template <typename T, int N>
struct alignas(sizeof(T) * N) vec {
  uint words[sizeof(T) * N / 4];
  vec() = default;
  FUNCTION vec(T a, T b, T c, T d) {
    alignas(4 * sizeof(T)) const T elements[4] = {a, b, c, d};
    UNROLL for (int i = 0; i < int(sizeof(T)); ++i) words[i] = reinterpret_cast<const uint*>(elements)[i];
  }
  FUNCTION T operator[](int i) const {
    const uint bits = sizeof(T) == 4 ? words[i] : words[i / 2] >> 16 * (i % 2);
    return reinterpret_cast<const T&>(bits);
  }
};

namespace metal {
FUNCTION uint min(uint a, uint b) {
  return a < b ? a : b;
}
FUNCTION float abs(float x) {
  return fabsf(x);
}
FUNCTION float fma(float a, float b, float c) {
  return fmaf(a, b, c);
}
namespace precise {
FUNCTION float exp(float x) {
  return expf(x);
}
FUNCTION float tanh(float x) {
  return tanhf(x);
}
}  // namespace precise
}  // namespace metal
