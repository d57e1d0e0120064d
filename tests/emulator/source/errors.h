// CUDA's error of the calling OS thread.
#pragma once
#include "emulator/host.h"

namespace emulator {

cudaError_t remember(cudaError_t error);  // for cudaGetLastError; returns it

}  // namespace emulator
