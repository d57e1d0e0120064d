// The gate's kernels for rows of up to 256 experts, kept in registers.
#include "../gate_kernels.cuh"

template void moe_route::cuda::launch_gate<8>(const GateLaunch&, Stream);
template void moe_route::cuda::load_gate<8>(Level);
