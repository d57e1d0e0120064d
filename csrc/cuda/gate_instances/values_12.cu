// The gate's kernels for rows of up to 384 experts, kept in registers.
#include "../gate_kernels.cuh"

template void moe_route::cuda::launch_gate<12>(const GateLaunch&, Stream);
template void moe_route::cuda::load_gate<12>(Level);
