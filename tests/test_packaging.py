"""What is shipped, what an import loads, and how a build refuses where it cannot work."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import release
import torch

import moe_route
from moe_route import _C

ROOT = Path(__file__).parent.parent
in_tree = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


def python(*arguments: str, cwd: Path | None = None, **environment: str) -> str:
    command = [sys.executable, *arguments]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the installed package --------------------------------------------------------------------------------------


def test_metadata() -> None:
    found = metadata.metadata("moe-route")
    assert found["Version"] == moe_route.__version__ == _C.__version__ == _C.build_info()["version"]
    assert found["Requires-Python"] == ">=3.10"
    needs = [line for line in metadata.requires("moe-route") or [] if "extra ==" not in line]
    required = {re.split(r"[<>=;]", need)[0] for need in needs}
    assert required == {"torch", "numpy", "safetensors", "scipy", "tqdm", "tomli"}
    extras = {"hf", "analysis", "plot", "eval", "vllm", "all", "train", "test", "docs", "dev", "release"}
    assert set(found.get_all("Provides-Extra") or []) == extras
    scripts = {point.name: point.value for point in metadata.entry_points(group="console_scripts")}
    assert scripts["moe-route"] == "moe_route.cli:main"
    plugins = {point.name: point.value for point in metadata.entry_points(group="vllm.general_plugins")}
    assert plugins["moe_route"] == "moe_route.integrations.vllm:register"
    (sglang,) = metadata.entry_points(group="sglang.srt.plugins")
    assert (sglang.name, sglang.value) == ("moe_route", "moe_route.integrations.sglang:register")


def test_doctor_knows_every_extra_that_brings_a_module() -> None:
    from moe_route.description import EXTRAS

    needs = metadata.requires("moe-route") or []
    for extra, modules in EXTRAS.items():
        brought = {re.split(r"[<>=; ]", need)[0] for need in needs if need.endswith(f'extra == "{extra}"')}
        assert set(modules.values()) == brought


def test_an_import_loads_the_standard_library_alone_and_the_library_finds_torch() -> None:
    program = """
import sys
before = set(sys.modules)
import moe_route as mr
print(mr.__version__, *{name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
from moe_route import _C
import torch
torch.ops.moe_route.route
"""
    assert python("-c", program).split() == [moe_route.__version__, "moe_route"]


@in_tree
def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.M) == [moe_route.__version__]
    assert f"## {moe_route.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_rooms_load_when_they_are_asked_for() -> None:
    program = "import sys, moe_route as mr; assert 'moe_route.nn' not in sys.modules; print(mr.nn.TopKRouter.__name__)"
    assert python("-c", program).strip() == "TopKRouter"
    assert set(moe_route.__all__) <= set(dir(moe_route))
    with pytest.raises(AttributeError, match=r"moe_route.*no attribute 'nothing'"):
        moe_route.nothing  # noqa: B018


def test_every_public_name_exists() -> None:
    missing = [name for name in moe_route.__all__ if not hasattr(moe_route, name)]
    assert missing == []


def test_types_are_shipped() -> None:
    folder = Path(moe_route.__file__).parent
    assert (folder / "py.typed").is_file()
    stub = (folder / "_C.pyi").read_text(encoding="utf-8")
    public = [name for name in dir(_C) if not name.startswith("_")]
    assert [name for name in public if not re.search(rf"^((def|class) {name}\b|{name}: )", stub, re.MULTILINE)] == []


@pytest.fixture(scope="module")
def symbols() -> list[str]:
    """What the library takes from others, with the version of it."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    command = [nm, "-D", "--undefined-only", str(_C.__file__)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in table.splitlines()]


def test_the_module_uses_the_stable_abi_alone(symbols: list[str]) -> None:
    """No C++ symbol of torch: one binary loads on torch 2.11 and everything later."""
    assert [symbol for symbol in symbols if re.match(r"_Z.*(2at|3c10|5torch|9moe_route)", symbol)] == []
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)


def test_the_library_finds_torch_wherever_it_is_installed() -> None:
    """No folder of the machine that built it is searched: torch is loaded first, and named without a path."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    command = [readelf, "--dynamic", str(_C.__file__)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "[libtorch_cpu.so]" in listed
    assert not re.search(r"\((RPATH|RUNPATH)\)", listed)


def test_the_library_needs_nothing_that_glibc_2_28_lacks(symbols: list[str]) -> None:
    """Built on a newer system, symbols have its versions; in the image of the wheels, these have older ones or none."""
    there = {"exp", "exp2", "log", "log2", "pow"}  # a wrapper less since 2.29
    there |= {"__libc_single_threaded"}  # libstdc++ asks it where the headers of glibc have it
    there |= {
        "dlsym",
        "dlopen",
        "pthread_once",
        "pthread_create",
        "pthread_join",
        "pthread_key_create",
    }  # moved in 2.34
    versions = [re.fullmatch(r"(\w+)@GLIBC_(\d+)\.(\d+)(?:\.\d+)?", symbol) for symbol in symbols]
    newer = {found[1] for found in versions if found and (int(found[2]), int(found[3])) > release.GLIBC}
    assert newer <= there, f"not in glibc 2.28: {sorted(newer - there)}"
    assert any(versions)


# ---- the steps of make ------------------------------------------------------------------------------------------


def steps(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "steps.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


@in_tree
def test_each_step_has_a_line_with_its_seconds_and_what_is_ours(tmp_path: Path) -> None:
    chatter = "echo chatter; echo '  -- moe-route: no kernels'; echo for moe-route: other; echo noise >&2"
    done = steps(tmp_path, "one: the first", chatter, "two: beside it", "test -e one || touch one")
    lines = re.sub(r" +", " ", re.sub(r"\d+ s$", "N s", done.stdout, flags=re.M)).splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(lines) == [" no kernels", "one the first N s", "two beside it N s"]
    assert "noise" in (tmp_path / "build" / "steps" / "one.log").read_text("utf-8")


@in_tree
def test_a_step_that_fails_shows_its_output_and_ends_the_others(tmp_path: Path) -> None:
    done = steps(tmp_path, "one: it fails", "echo the reason >&2; exit 3", "two: beside it", "sleep 600 & wait")
    assert (done.returncode, done.stdout) == (3, "")
    assert "the reason" in done.stderr
    assert "'one' failed" in done.stderr


@in_tree
def test_a_shown_step_writes_itself(tmp_path: Path) -> None:
    done = steps(tmp_path, "--shown", "demo: figures", "echo figure; echo trouble >&2; exit 4")
    assert (done.returncode, done.stdout, done.stderr) == (4, "figure\n", "trouble\n")
    said = steps(tmp_path, "--shown", "demo: figures", "echo 1").stdout.split()
    assert [*said[:3], said[-1]] == ["1", "demo", "figures", "s"]


@in_tree
@pytest.mark.parametrize("words", [(), ("--shown",), ("one: without a command",)])
def test_steps_without_commands_are_told_how_to_be_written(words: tuple[str, ...], tmp_path: Path) -> None:
    done = steps(tmp_path, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "STEP COMMAND" in done.stderr
    assert "Traceback" not in done.stderr


@in_tree
def test_make_installs_what_the_build_requires() -> None:
    requires = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    tools = re.search(r"^TOOLS := (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert requires
    assert tools
    assert sorted(tools[1].replace("'", "").split()) == sorted(requires[1].replace('"', "").split(", "))


# ---- what the demo needs ----------------------------------------------------------------------------------------


def installed_by(extra: str) -> set[str]:
    """The distributions that ``pip install moe-route[extra]`` brings here, with all that they need."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: set[str] = set()
    waiting = [Requirement(f"moe-route[{extra}]")]
    seen: set[str] = set()
    while waiting:
        wanted = waiting.pop()
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        found.add(canonicalize_name(wanted.name))
        for line in metadata.requires(wanted.name) or []:
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": each}) for each in ("", *wanted.extras)):
                waiting.append(need)
    return found


@pytest.mark.exhaustive
def test_the_demo_prints_nothing_else(tmp_path: Path) -> None:
    """Where only what the extras `hf` and `plot` bring is installed, nothing goes to standard error."""
    site = tmp_path / "site"
    site.mkdir()
    for name in installed_by("hf,plot") - {"moe-route"}:
        distribution = metadata.distribution(name)
        for top in {Path(str(file)).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    (site / "moe_route").symlink_to(Path(moe_route.__file__).parent)
    small = ["--limit", "4", "--draws", "3", "--languages", "eng_Latn,deu_Latn"]
    command = [sys.executable, "-S", "-m", "moe_route", "demo", *small]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(site)},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines() if line.startswith("Model demo (8 layers")]


# ---- the sdist --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("sdist")
    python("-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(ROOT))
    return next(folder.glob("*.tar.gz"))


@in_tree
def test_sdist_is_complete(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
        described = archive.extractfile(f"{archive.getnames()[0].partition('/')[0]}/PKG-INFO")
        assert described is not None
        licences = re.findall(r"^License-File: (.*)$", described.read().decode("utf-8"), re.M)
    assert licences == ["LICENSE", "moe_route/data/routing/LICENSE.txt"]
    sources = [
        path for folder in ("csrc", "moe_route", "tests") for path in (ROOT / folder).rglob("*") if path.is_file()
    ]
    wanted = {path.relative_to(ROOT).as_posix() for path in sources if "__pycache__" not in path.parts}
    wanted |= {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert {name for name in wanted if not name.endswith((".so", ".new", ".pyc"))} - files == set()
    assert [name for name in files if name.endswith((".so", ".pyc", ".o")) or name.startswith("build/")] == []


@pytest.fixture
def unpacked(sdist: Path, tmp_path: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    return next(tmp_path.glob("moe_route-*"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in an environment of its own, which has no torch; every path has a space in it."""
    folder = tmp_path_factory.mktemp("a path with spaces")
    (folder / "the torch").symlink_to(Path(torch.__file__).parent)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    sources = next(folder.glob("moe_route-*"))
    places = {"MOE_ROUTE_TORCH_DIR": str(folder / "the torch"), "MOE_ROUTE_BUILD_DIR": str(folder / "c make")}
    python("-m", "build", "--wheel", "--outdir", str(folder / "out"), str(sources), **places, MAX_JOBS="2")
    return next((folder / "out").glob("*.whl"))


@in_tree
@pytest.mark.exhaustive
def test_the_wheel_is_complete(wheel: Path) -> None:
    assert list(release.wrong(wheel)) == []
    names = zipfile.ZipFile(wheel).namelist()
    data = [path.relative_to(ROOT).as_posix() for path in (ROOT / "moe_route" / "data").rglob("*") if path.is_file()]
    assert {"moe_route/_C.pyi", *(name for name in data if "__pycache__" not in name)} - set(names) == set()
    assert any(name.endswith(".dist-info/licenses/moe_route/data/routing/LICENSE.txt") for name in names)


def installed(wheel: Path, folder: Path, kind: str) -> str:
    """What tests/installation.py says of a wheel in an environment that reads the rest from this one, without PATH."""
    python("-m", "venv", "--without-pip", str(folder / "env"))
    (packages,) = folder.glob("env/lib/python*/site-packages")
    python("-m", "pip", "install", "--no-deps", "--target", str(packages), str(wheel), PATH=str(folder))
    rest = Path(torch.__file__).parents[1]
    (packages / "rest.pth").write_text(f"{rest}\n", encoding="utf-8")  # behind what is installed here
    command = [str(folder / "env" / "bin" / "python"), str(ROOT / "tests" / "installation.py"), kind]
    environment = {"PATH": str(folder), "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@in_tree
@pytest.mark.exhaustive
def test_the_wheel_works_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    """`make test-wheel` does the same beside other versions of torch."""
    assert installed(wheel, tmp_path, "kernels").startswith(str(tmp_path))


@in_tree
def test_a_wheel_without_kernels_needs_neither_compiler_nor_torch(unpacked: Path, tmp_path: Path) -> None:
    """And its editable installation removes the library that this Python would import still."""
    program = "import sys, setuptools.build_meta as backend; print(backend.{}(sys.argv[1]))"
    pure = {"MOE_ROUTE_NATIVE": "OFF", "MOE_ROUTE_TORCH_DIR": str(tmp_path / "none"), "PATH": str(tmp_path)}
    name = python("-c", program.format("build_wheel"), str(tmp_path), cwd=unpacked, **pure).splitlines()[-1]
    assert name == f"moe_route-{moe_route.__version__}-py3-none-any.whl"
    assert list(release.wrong(tmp_path / name)) == []
    suffix = ".cpython-" + Path(_C.__file__).name.partition(".cpython-")[2]
    mine, other = unpacked / "moe_route" / f"_C{suffix}", unpacked / "moe_route" / "_C.cpython-39-other.so"
    for library in (mine, other):
        library.write_bytes(b"of an earlier build")
    python("-c", program.format("build_editable"), str(tmp_path), cwd=unpacked, **pure)
    assert not mine.exists()
    assert other.exists()


@in_tree
def test_what_is_wrong_with_a_wheel_is_told(tmp_path: Path) -> None:
    path = tmp_path / f"moe_route-{moe_route.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("moe_route/_C.abi3.so", b"")
        archive.writestr("tests/x.py", b"")
        archive.writestr("moe_route-0.0.9.dist-info/METADATA", "Name: x\nVersion: 0.0.9\n\n[a](docs/a.md)")
    (tmp_path / "moe_route-9-cp39-cp39-linux_x86_64.whl").write_bytes(path.read_bytes())
    said = " ".join(release.problems(tmp_path))
    for part in ("_C.abi3.so", "not of version", "links to docs/a.md", "'tests'", "lacks moe_route/py.typed", "tar.gz"):
        assert part in said
    assert "one library" not in said  # a wheel of a platform holds one
    left = " ".join(release.left(tmp_path, "v9"))
    assert "the tag is v9" in left
    assert "no wheel of cp310 manylinux_2_28_aarch64" in left


# ---- builds that cannot work ------------------------------------------------------------------------------------


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """setup.py as a module, without running it."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    module = types.ModuleType("recipe")
    module.__file__ = str(ROOT / "setup.py")
    exec(compile((ROOT / "setup.py").read_text(encoding="utf-8"), "setup.py", "exec"), module.__dict__)
    return module


@in_tree
@pytest.mark.parametrize("address", ["", "https://example.org/owner/name"])
def test_a_package_index_shows_no_broken_link(recipe: types.ModuleType, address: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = recipe.description(readme, address)
    assert "](#" not in readme  # a package index gives headings no anchors
    targets = re.findall(r"\]\(([^)]*)\)", shown)
    assert [target for target in targets if not target.startswith("https://")] == []
    ours = [target.removeprefix(address).partition("#")[0] for target in targets if address and address in target]
    assert len(ours) == (len(re.findall(r"\]\((?!https:)", readme)) if address else 0)
    assert all((ROOT / re.sub("^/(blob|raw)/main/", "", path)).exists() for path in ours)
    assert ("![" in shown) == bool(address)
    assert ("\n*" in shown) == bool(address)  # without an address, a picture is left out with its caption
    assert [line for line in shown.splitlines() if line.startswith("## ")] == re.findall("^## .*$", readme, re.M)


@in_tree
def test_the_address_is_told_once(recipe: types.ModuleType, tmp_path: Path) -> None:
    """Metadata name the address of pyproject.toml and no other; as long as there is none, they name none."""
    python("setup.py", "--quiet", "dist_info", "--output-dir", str(tmp_path), cwd=ROOT)
    (folder,) = tmp_path.glob("*.dist-info")
    found = metadata.PathDistribution(folder).metadata
    assert found["Description-Content-Type"] == "text/markdown"
    pages = [f"{name}, {recipe.address()}{page}" for name, page in recipe.PAGES.items()]
    assert found.get_all("Project-URL") == (pages if recipe.address() else None)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"authors:\n  - name: {found['Author']}\n" in citation
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert str(found.get_payload()).strip() == recipe.description(readme, recipe.address()).strip()


@in_tree
def test_the_torch_of_this_environment_is_found(recipe: types.ModuleType) -> None:
    assert recipe.torch_directory() == Path(torch.__file__).parent


@in_tree
@pytest.mark.parametrize(
    ("version", "problem"), [(None, "there is no torch in"), ("2.10.1", "torch 2.10.1 .*too old"), ("1.13", "too old")]
)
def test_a_build_without_a_usable_torch_says_so(
    version: str | None, problem: str, recipe: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if version is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n", encoding="utf-8")
    monkeypatch.setattr(recipe.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(recipe.sysconfig, "get_path", lambda kind: str(tmp_path))
    with pytest.raises(SystemExit, match=f"(?s){problem}.*pip install"):
        recipe.torch_directory()
    if version is None:
        with pytest.raises(SystemExit, match=r"(?s)python -m build.*MOE_ROUTE_TORCH_DIR.*MOE_ROUTE_NATIVE=OFF"):
            recipe.torch_directory()
    monkeypatch.setenv("MOE_ROUTE_TORCH_DIR", str(Path(torch.__file__).parent))
    assert recipe.torch_directory() == Path(torch.__file__).parent


@in_tree
def test_a_build_without_a_compiler_says_so(
    recipe: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    with pytest.raises(SystemExit, match=r"(?s)no C\+\+20 compiler.*not found.*GCC 11.*MOE_ROUTE_NATIVE=OFF"):
        recipe.compiler()
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(SystemExit, match="too old"):
        recipe.compiler()


@in_tree
def test_an_install_refuses_before_anything_is_built(tmp_path: Path) -> None:
    """pip asks for metadata first."""
    command = [sys.executable, "setup.py", "--quiet", "dist_info", "--output-dir", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 1
    assert "no C++20 compiler" in done.stderr
    assert list(tmp_path.iterdir()) == []


@in_tree
def test_where_there_are_no_kernels_a_line_says_so(
    recipe: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert recipe.native()
    monkeypatch.setattr(recipe.sys, "platform", "darwin")
    assert not recipe.native()
    assert capfd.readouterr().err == "moe-route: there are no kernels for darwin: operators run in plain torch\n"
    monkeypatch.setenv("MOE_ROUTE_NATIVE", "on")
    with pytest.raises(SystemExit, match="no kernels for darwin"):
        recipe.native()
    monkeypatch.setenv("MOE_ROUTE_NATIVE", "perhaps")
    with pytest.raises(SystemExit, match="AUTO, ON or OFF"):
        recipe.native()


@in_tree
def test_an_older_python_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 9))
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match=r"^moe-route needs Python 3\.10 or newer.*$"):
        exec(compile(text, "setup.py", "exec"), {})


# ---- CUDA: which build is chosen --------------------------------------------------------------------------------

NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
NO_NVCC = {"CUDACXX": str(ROOT / "no" / "nvcc")}
without_gpu = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="needs a machine without a GPU")


def configured(
    folder: Path, value: str, torch_cuda: str | None = None, *, gpu: bool = False, **environment: str
) -> tuple[int, str]:
    """What CMake says to MOE_ROUTE_CUDA=value beside a torch for that CUDA (None: a CPU build).

    ``gpu``: with an nvidia-smi that lists one.
    """
    if gpu:
        smi = folder / "bin" / "nvidia-smi"
        smi.parent.mkdir()
        smi.write_text("#!/bin/sh\necho 'GPU 0: made up (UUID: GPU-0)'\n", encoding="utf-8")
        smi.chmod(0o755)
        environment["PATH"] = os.pathsep.join([str(smi.parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if cmake is None:
        pytest.skip("needs cmake")
    torch_folder = folder / "torch"
    torch_folder.mkdir(exist_ok=True)
    version = f"__version__ = '2.13.0'\ncuda: Optional[str] = {torch_cuda!r}\n"
    (torch_folder / "version.py").write_text(version, encoding="utf-8")
    defines = [f"-DMOE_ROUTE_CUDA={value}", f"-DMOE_ROUTE_TORCH_DIR={torch_folder}"]
    command = [cmake, "-S", str(ROOT), "-B", str(folder / "build"), *defines]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@in_tree
@pytest.mark.parametrize(("value", "message"), [("ON", "no nvcc that works"), ("MAYBE", "takes AUTO, ON or OFF")])
def test_cuda_that_cannot_be_built_says_so(value: str, message: str, tmp_path: Path) -> None:
    code, said = configured(tmp_path, value, **NO_NVCC)
    assert code != 0
    assert message in said


@in_tree
@pytest.mark.parametrize(
    ("torch_cuda", "gpu", "why"),
    [
        pytest.param("13.0", False, "no GPU is seen here", marks=without_gpu),
        (None, True, "torch is a build for the CPU"),
        ("13.0", True, "no nvcc that works was found"),
    ],
)
def test_auto_builds_no_kernels_that_this_machine_cannot_run(
    torch_cuda: str | None, gpu: bool, why: str, tmp_path: Path
) -> None:
    """`make` shows the line that begins with moe-route."""
    code, said = configured(tmp_path, "AUTO", torch_cuda, gpu=gpu, **NO_NVCC)
    assert code == 0
    assert f"moe-route: no CUDA kernels: {why}" in said
    assert "MOE_ROUTE_CUDA=ON builds them" in said


@in_tree
@pytest.mark.exhaustive
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_kernels_are_built_on_demand_anywhere(tmp_path: Path) -> None:
    code, said = configured(tmp_path, "ON", **NO_NVCC)
    assert code != 0
    code, said = configured(tmp_path, "ON")  # in the same folder: nvcc was installed since
    assert code == 0
    found = re.search(r"CUDA kernels by nvcc (\d+)\.(\d+)\.\d+ for (\S+)", said)
    assert found is not None
    blackwell = ",100-real,120-real" if (int(found[1]), int(found[2])) >= (12, 8) else ""
    assert found[3] == f"80-real,90{blackwell}"
    assert "need a driver of CUDA" not in said


@in_tree
@without_gpu
@pytest.mark.exhaustive
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_auto_builds_for_the_device_that_cuda_finds(tmp_path: Path) -> None:
    """Here it finds none, whatever nvidia-smi says."""
    code, said = configured(tmp_path, "AUTO", "13.0", gpu=True)
    assert code == 0
    assert "moe-route: no CUDA kernels: CUDA finds no device of compute capability 8.0 or higher" in said


@in_tree
@pytest.mark.exhaustive
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_an_nvcc_that_is_newer_than_the_cuda_of_torch_is_warned_of(tmp_path: Path) -> None:
    """Its kernels need a newer driver than torch does. Architectures that are asked for stay."""
    code, said = configured(tmp_path, "AUTO", "11.8", CUDAARCHS="90")
    assert code == 0
    assert re.search(r"nvcc is of CUDA \d+, torch of CUDA 11: the kernels need a driver of CUDA \d+ or newer", said)
    assert re.search(r"CUDA kernels by nvcc \S+ for 90 ", said)


@in_tree
@pytest.mark.xdist_group("nvcc")
@pytest.mark.exhaustive
@pytest.mark.timeout(9000)
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_a_module_with_cuda_kernels_beside_this_torch(tmp_path: Path) -> None:
    """The build that a CUDA user gets loads beside a CPU torch too, works there, and says why there is no device."""
    folder = os.environ.get("MOE_ROUTE_CUDA_BUILD_DIR", str(tmp_path / "cmake"))
    # two architectures of four: each takes ptxas minutes, and the others compile the same source
    build = {"MOE_ROUTE_CUDA": "ON", "MOE_ROUTE_BUILD_DIR": folder, "MAX_JOBS": "2", "CUDAARCHS": "80-real;90"}
    site, program = tmp_path / "site", tmp_path / "check.py"
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(tmp_path), "--build-lib", str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **build},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    program.write_text(
        "import json\nimport moe_route as mr\nprint(json.dumps(mr.doctor().to_dict()))\n", encoding="utf-8"
    )
    report = json.loads(python(str(program), PYTHONPATH=str(site)))
    assert report["build"]["cuda"]
    assert report["build"]["cuda_architectures"] == ["80-real", "90"]
    assert all(check["ok"] for check in report["checks"])
    cuda = report["cuda"]
    assert cuda["runtime"] is not None
    if cuda["torch_cuda"] is None:
        assert not cuda["usable"]
        assert "torch is a CPU build: install a CUDA build of torch" in cuda["why"]
        program.write_text("from moe_route import ops\nprint(ops.library.why_torch('cuda'))\n", encoding="utf-8")
        assert python(str(program), PYTHONPATH=str(site)).strip() == "this torch is not built for CUDA"
