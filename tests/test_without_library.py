"""Without the compiled library torch computes the operators: modules import, and all tests but those of kernels run.

    python tests/test_without_library.py [OPTIONS OF PYTEST]

runs the tests of operators, steering, recording, patching and routers so, less those that are marked ``native``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness.hidden_library import VARIABLE

TESTS = Path(__file__).parent
ROOMS = ("ops", "steering", "recording", "patching", "routers")

_PROGRAM = """
import importlib, logging, pkgutil, sys
from harness.hidden_library import hide

hide()
import moe_route

optional = ("moe_route._C", "moe_route.integrations.vllm.", "moe_route.integrations.lm_eval.", "moe_route.__main__")
for module in pkgutil.walk_packages(moe_route.__path__, "moe_route."):
    if not module.name.startswith(optional):
        importlib.import_module(module.name)
"""
_README = """
import logging, sys
from harness.hidden_library import hide

hide()
from harness.tiny_models import tiny_model, tokens
import moe_route as mr

handler = logging.StreamHandler(sys.stdout)
logging.getLogger("moe_route").addHandler(handler)
for _ in range(2):
    model = tiny_model("qwen3_moe")
    with mr.attach(model) as routed:
        with routed.record() as recorder:
            for language in ("en", "de"):
                with recorder.labels(groups=language):
                    model(tokens())
        statistics = recorder.statistics()
        mr.analysis.divergence(statistics, reference="en", pairing="pooled")
        with routed.steer(mr.Plan.forbid({0: [1]})):
            model(tokens())
print(statistics.metadata["backends"], mr.ops.backend("cpu"))
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def test_every_module_imports_without_the_library() -> None:
    ran = run(_PROGRAM)
    assert not ran.returncode, ran.stderr


def test_the_readme_s_day_runs_without_the_library_and_says_once_that_torch_serves() -> None:
    ran = run(_README)
    assert not ran.returncode, ran.stderr
    said, last = ran.stdout.splitlines()
    assert said.startswith(
        "torch computes the routing operators on cpu, since this installation has no compiled library"
    )
    assert last == "['torch'] torch"


if __name__ == "__main__":
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "not native and not exhaustive",
        *(str(TESTS / room) for room in ROOMS),
    ]
    sys.exit(subprocess.run([*command, *sys.argv[1:]], env=os.environ | {VARIABLE: "1"}).returncode)
