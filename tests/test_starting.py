"""Heavy modules that each step of a start imports, beyond those of the steps before it. Nothing is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from harness.kept_sequences import statistics_of

from moe_route import Plan
from moe_route.data import demo_model_folder

HEAVY = {
    *("numpy", "torch", "torch._dynamo", "torch._inductor", "transformers", "transformers.modeling_utils", "torchao"),
    *("accelerate", "datasets", "matplotlib", "networkx", "pandas", "peft", "pyarrow", "scipy"),
    *("sklearn", "sympy", "tqdm", "triton"),
}
# One process takes the steps in this order, since each start of torch costs seconds: what is run -> what it may import.
STEPS = {
    "import moe_route as mr": set(),
    "help": set(),
    "completion bash": set(),
    "record --data none.tsv --out s.npz": set(),
    "describe --modle demo": set(),
    "plan show plan.json": {"numpy", "torch", "tqdm"},
    "analyze divergence statistics.npz --reference deu_Latn --kind count": set(),
    "plot load-balance statistics.npz --out lines.svg": {"matplotlib"},
    "mr.data": set(),
    "import transformers": {"transformers"},
    "mr.attach": set(),
    "transformers builds the model on meta": HEAVY,
    "describe": set(),
}
PROGRAM = """
import contextlib, io, json, sys

def command(line):
    from moe_route.cli import main
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return main(line.split())
        except SystemExit as end:
            return end.code

def meta():
    from moe_route.cli.inputs import quiet_libraries
    quiet_libraries()
    config = transformers.AutoConfig.from_pretrained(sys.argv[1])
    with torch.device("meta"):
        transformers.AutoModelForCausalLM.from_config(config)

heavy, before, steps = set(json.loads(sys.argv[2])), set(), {}
for step in json.loads(sys.argv[3]):
    code = 0
    if step.startswith(("import ", "mr.")):
        exec(step)
    elif step.startswith("transformers "):
        import torch
        meta()
    else:
        code = command("--help" if step == "help" else step)
    now = heavy & set(sys.modules)
    steps[step] = (code, sorted(now - before))
    before = now
print(json.dumps(steps))
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Exit code of each step, and the heavy modules that it imported; lines on standard error."""
    folder = tmp_path_factory.mktemp("starting")
    counts = {(item, group): np.full((2, 4), 2) for item in "ab" for group in ("deu_Latn", "eng_Latn")}
    statistics_of(counts, 2, (4, 4)).save(folder / "statistics.npz")
    Plan.activate({0: [1]}).save(folder / "plan.json")
    arguments = [str(demo_model_folder()), json.dumps(sorted(HEAVY)), json.dumps(list(STEPS))]
    ran = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout) | {"said": ran.stderr.splitlines()}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_imports_no_heavy_module_but_its_own(step: str, steps: dict[str, Any]) -> None:
    code, imported = steps[step]
    assert set(imported) <= STEPS[step]
    assert code == (2 if "none" in step or "modle" in step else 0)


def test_other_libraries_print_nothing_while_a_model_is_built(steps: dict[str, Any]) -> None:
    """torchao, which transformers imports where it is installed, tells of its extensions for other machines."""
    assert [line for line in steps["said"] if not line.startswith("moe-route: ")] == []
