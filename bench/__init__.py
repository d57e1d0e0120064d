"""What only the project measures: the CPU (`bench.cpu`), CUDA devices, machine code; and the committed results."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
