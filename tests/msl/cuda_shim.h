// The parts of CUDA that the kernels use, in C++17, so that a CPU can run them, one thread after another.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __forceinline__ inline
#define __global__

struct uint3 {
  unsigned int x, y, z;
};
static uint3 threadIdx, blockIdx, blockDim, gridDim;

typedef _Float16 __half;

struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) {  // rounds to nearest, ties to even
    unsigned int u;
    memcpy(&u, &x, sizeof u);
    bits = x != x ? 0x7fc0 : (unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  operator float() const {
    const unsigned int u = (unsigned int)bits << 16;
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
  }
};

// Call a kernel once per thread of a grid of `columns` by `rows` threads, in blocks of `width` by 1.
template <typename Kernel>
void for_each_thread(unsigned int columns, unsigned int rows, unsigned int width, Kernel kernel) {
  blockDim = {width, 1, 1};
  gridDim = {(columns + width - 1) / width, rows, 1};
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel();
}
