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

template <typename T, int N>
struct alignas(sizeof(T) * N) vec {
  T values[N];
  FUNCTION T& operator[](int i) {
    return values[i];
  }
  FUNCTION const T& operator[](int i) const {
    return values[i];
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
