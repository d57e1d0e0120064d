"""The notebooks run from top to bottom, in a kernel of the interpreter that runs the tests."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat, nbclient and ipykernel are in the extra 'test'")
nbclient = pytest.importorskip("nbclient", reason="nbformat, nbclient and ipykernel are in the extra 'test'")
pytest.importorskip("ipykernel", reason="nbformat, nbclient and ipykernel are in the extra 'test'")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "examples" / "notebooks"
KERNEL = "moe-route-tests"
pytestmark = pytest.mark.skipif(not NOTEBOOKS.is_dir(), reason="examples/ is not here (a source checkout has it)")


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of this interpreter, known to this test alone; Jupyter's own files stay in a temporary folder."""
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "language": "python"}
    folder = tmp_path / "jupyter" / "kernels" / KERNEL
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec | {"display_name": KERNEL}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    # the kernel runs elsewhere, and must import what this process imports
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))


def run(name: str, folder: Path) -> str:
    """Run a notebook; returns what its cells print and show, as text, pictures as "<picture>"."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    client = nbclient.NotebookClient(
        notebook, kernel_name=KERNEL, timeout=None, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    shown = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            shown.append("<picture>" if "image/png" in data else data.get("text/plain", output.get("text", "")))
    return "\n".join(shown)


@pytest.mark.parametrize("name", ["small_model.ipynb", "qwen3_30b_routing.ipynb"])
def test_notebooks_are_kept_without_outputs(name: str):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert notebook.cells[0].cell_type == "markdown"


@pytest.mark.exhaustive
@pytest.mark.usefixtures("kernels")
def test_the_notebook_of_the_small_model(tmp_path: Path):
    shown = run("small_model.ipynb", tmp_path)
    assert shown.count("<picture>") == 3
    assert "floor" in shown
    assert "ExpertSelection(" in shown
    assert "random experts off" in shown
    assert shown.rstrip().endswith("True")  # the answers are what they were


@pytest.mark.exhaustive
@pytest.mark.usefixtures("kernels")
def test_the_notebook_of_recorded_routing(tmp_path: Path):
    shown = run("qwen3_30b_routing.ipynb", tmp_path)
    assert shown.count("<picture>") == 3
    assert "Swahili" in shown
