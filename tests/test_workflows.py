"""The workflows of the repository name commands that exist, pin what others wrote, and ask for no right they lack."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
NAMES = sorted(path.name for path in FOLDER.glob("*.yml"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the repository")

# Rights beyond reading, and the jobs that have them.
RIGHTS = {
    ("docs.yml", "deploy"): {"pages": "write", "id-token": "write"},
    ("nightly.yml", "tell"): {"issues": "write"},
    ("release.yml", "index"): {"id-token": "write"},
    ("release.yml", "notes"): {"contents": "write"},
    ("release.yml", "test-index"): {"id-token": "write"},
}
INSTALLED = {"build", "cibuildwheel", "pip", "twine", "venv"}  # Python has them, or a workflow installs them
PROGRAMS = {"moe-route", "python", "torch-abi-audit"}  # of an environment that a workflow makes


def workflow(name: str) -> dict[str, Any]:
    content = yaml.safe_load((FOLDER / name).read_text("utf-8"))
    assert isinstance(content, dict)
    return content


def steps(name: str) -> Iterator[dict[str, Any]]:
    for job in workflow(name)["jobs"].values():
        yield from job.get("steps", ())


def targets() -> set[str]:
    """The targets of the Makefile, and those of its patterns that an extra makes."""
    text = (ROOT / "Makefile").read_text("utf-8").replace("\\\n", " ")
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    phony = re.findall(r"^\.PHONY: (.*)$", text, re.M)
    return {*" ".join(phony).split(), *(f".venv/.with-{extra}" for extra in extras)}


@pytest.mark.parametrize("name", NAMES)
def test_every_command_exists(name: str) -> None:
    for script in (step["run"] for step in steps(name) if "run" in step):
        for target in re.findall(r"\bmake ([\w./-]+)", script):
            assert target in targets(), script
        for path in re.findall(r"(?<![\w/.-])((?:tests|docs|bench|\.ci)/[\w/.-]+)", script):
            assert (ROOT / path).exists(), script
        for program in re.findall(r"(?:\.venv|build/env|env)/bin/([\w-]+)", script):
            assert program in PROGRAMS, script
        for module in re.findall(r"python3? -m ([\w.]+)", script):
            assert module in INSTALLED or importlib.util.find_spec(module), script


@pytest.mark.parametrize("name", NAMES)
def test_what_others_wrote_is_pinned(name: str) -> None:
    lines = re.findall(r"uses: (.*)$", (FOLDER / name).read_text("utf-8"), re.M)
    for line in lines:
        if not line.startswith("./"):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)
        else:
            assert (ROOT / line).is_file()
    assert len(lines) == sum("uses" in part for part in [*steps(name), *workflow(name)["jobs"].values()])


@pytest.mark.parametrize("name", NAMES)
def test_rights_are_those_of_the_table(name: str) -> None:
    content = workflow(name)
    assert content["permissions"] == {"contents": "read"}
    asked = {
        (name, job): rights
        for job, about in content["jobs"].items()
        if (rights := {right: kind for right, kind in about.get("permissions", {}).items() if kind != "read"})
    }
    assert asked == {key: rights for key, rights in RIGHTS.items() if key[0] == name}
    assert "pull_request_target" not in content[True]  # YAML reads the key `on` as true
    assert not re.search(r"run:.*\$\{\{", (FOLDER / name).read_text("utf-8"))  # a value in a script could be a command
    for step in steps(name):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"] == {"persist-credentials": False}


def test_all_green_waits_for_every_job() -> None:
    jobs = workflow("ci.yml")["jobs"]
    assert set(jobs["all-green"]["needs"]) == set(jobs) - {"all-green"}
    assert jobs["all-green"]["steps"][0]["run"].count("success") == len(jobs) - 1


def test_a_release_takes_the_wheels_of_every_python() -> None:
    from release import KERNELS

    text = (ROOT / "pyproject.toml").read_text("utf-8")
    [pattern] = re.findall(r'^build = "(cp31\{.*\})-manylinux_\*"$', text, re.M)
    minors = pattern.removeprefix("cp31{").removesuffix("}").split(",")
    assert {f"cp31{minor}" for minor in minors} == {python for python, _ in KERNELS}
    classifiers = set(re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text))
    assert classifiers == {f"1{minor}" for minor in minors}
