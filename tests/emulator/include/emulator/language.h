// CUDA's words that are no C++: qualifiers and the built-in variables.
#pragma once
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// A block runs on one OS thread from beginning to end, so what is local to that thread is shared by the
// block. Right for `extern __shared__` and, being implicitly static, inside a function.
#define __shared__ thread_local

// threadIdx is written at every switch between the threads of a block.
extern constinit thread_local uint3 threadIdx, blockIdx;
extern constinit thread_local dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;
