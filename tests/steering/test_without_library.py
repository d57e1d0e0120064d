"""Plans are made, compiled, written and read where the compiled library is missing."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import sys

sys.modules["moe_route._C"] = None  # importing it now raises ImportError
import moe_route.steering as s

plan = s.Plan.activate({0: [1]}, strength=0.5) + s.Plan.force_on({1: [2]}).only(absent=True)
compiled = plan.compile([s.LayerShape(4, 2)] * 2)
assert s.Plan.from_dict(plan.to_dict()) == plan
print([type(table).__name__ for table in compiled.tables], [name for name in sys.modules if "moe_route.ops" in name])
"""


def test_steering_needs_no_compiled_library() -> None:
    ran = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    assert ran.stdout.strip() == "['SteeringTables', 'TokenTables'] []", ran.stderr
