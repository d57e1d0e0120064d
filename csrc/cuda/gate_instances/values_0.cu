// The gate's kernels for rows of any number of experts, kept in shared memory.
#include "../gate_kernels.cuh"

template void moe_route::cuda::launch_gate<0>(const GateLaunch&, Stream);
template void moe_route::cuda::load_gate<0>(Level);
