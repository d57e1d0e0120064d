"""The CUDA kernels' machine code (SASS, sm_90), run and counted without a device: `python -m bench.sass`."""
