"""Benchmarks that users can rerun: `moe-route bench` races the operators against what one would write in torch."""
