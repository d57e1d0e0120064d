"""A device without kernels: `plain_device_cases.py`, in a process of its own, since its device changes all of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("plain_device_cases.py")


def test_a_device_that_torch_alone_serves() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
