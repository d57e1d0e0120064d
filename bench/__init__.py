"""Benchmarks: `python -m bench` writes `bench/results/`; `pytest bench` runs the contenders under pytest-benchmark."""
