"""What only the project measures: committed results, machine code, CUDA devices. Users run `moe-route bench`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
