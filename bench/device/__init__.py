"""Benchmarks and checks on a CUDA device: `bench/gpu.sh` runs all of it, `python -m bench.device` the benchmarks."""
