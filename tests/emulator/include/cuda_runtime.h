// Stands in for the CUDA toolkit's header of this name, so that a host compiler builds the kernels as they
// are and runs them on the CPU: see README.md. It offers what a kernel of this project may use and nothing
// else: approximate functions (__expf, rsqrtf, ...) are absent because their bits differ between devices.
#pragma once
#if defined(__CUDACC__)
#error \
    "the emulator's cuda_runtime.h is for host compilers: take tests/emulator/include off nvcc's include path"
#endif
#if __cplusplus < 202002L
#error "the emulator needs C++20"
#endif

#define MOE_ROUTE_EMULATOR 1

#include "emulator/arithmetic.h"
#include "emulator/atomics.h"
#include "emulator/barriers.h"
#include "emulator/host.h"
#include "emulator/language.h"
#include "emulator/launch.h"
#include "emulator/memory.h"
#include "emulator/vector_types.h"
#include "emulator/warp.h"
