"""Builds ``moe_route._C`` with CMake against the torch of the environment that is installed into.

Environment: ``MOE_ROUTE_NATIVE`` = AUTO (kernels where there are any: on Linux) | ON (or an error) | OFF (Python files
alone, made without a compiler and without torch), ``MOE_ROUTE_TORCH_DIR`` (the torch to build against, where the build
cannot see it), ``MOE_ROUTE_CUDA`` = AUTO (CUDA kernels where there is a GPU, or ``CUDAARCHS`` is set, and that torch is
a CUDA build and nvcc is found) | ON (or an error) | OFF, ``CUDACXX`` (nvcc), ``CUDAARCHS`` (default: of the GPU that is
here; with ON ``80-real;90``, from CUDA 12.8 on ``100-real;120-real`` too),
``MOE_ROUTE_BUILD_DIR`` (default ``build/cmake``; kept, so a rebuild compiles only what changed), ``MOE_ROUTE_SANITIZE``
(``address,undefined``: for ``make test-sanitized``, in a build folder of its own), ``MAX_JOBS``, ``CXX``.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036  (an isolated build asks this file before pip compares versions)
    sys.exit(f"moe-route needs Python 3.10 or newer: install with one, not with {sys.version.partition(' ')[0]}")

import glob
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info
from setuptools.command.editable_wheel import editable_wheel
from setuptools.config.pyprojecttoml import load_file

ROOT = Path(__file__).parent.resolve()
MINIMUM_TORCH = (2, 11)
PAGES = {"Source": "", "Changelog": "/blob/main/CHANGELOG.md", "Issues": "/issues"}  # at the public address
PURE = "install without kernels, with slower operators in plain torch: MOE_ROUTE_NATIVE=OFF pip install ."


def refuse(problem: str, mend: str) -> NoReturn:
    sys.exit(f"\nmoe-route cannot be built here: {problem}\n  What to do: {mend}\n")


def native() -> bool:
    """Whether the kernels are compiled. Asked once, since it tells where they are left out unasked."""
    wanted = os.environ.get("MOE_ROUTE_NATIVE", "AUTO").upper()
    if wanted not in ("AUTO", "ON", "1", "OFF", "0"):
        refuse(f"MOE_ROUTE_NATIVE is '{wanted}'.", "set it to AUTO, ON or OFF.")
    if wanted in ("OFF", "0") or sys.platform.startswith("linux"):
        return wanted not in ("OFF", "0")
    if wanted == "AUTO":
        print(f"moe-route: there are no kernels for {sys.platform}: operators run in plain torch", file=sys.stderr)
        return False
    refuse(f"MOE_ROUTE_NATIVE={wanted}, but there are no kernels for {sys.platform}.", PURE)


def torch_directory() -> Path:
    """The folder of the torch that this build is for: looked up, since importing may fail in an isolated build."""
    named = os.environ.get("MOE_ROUTE_TORCH_DIR")
    spec = None if named else importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    if named:
        candidates = [Path(named).absolute()]
    for folder in candidates:
        if (folder / "version.py").is_file():
            text = (folder / "version.py").read_text(encoding="utf-8")
            found = re.search(r"__version__\s*=\s*['\"](\d+)\.(\d+)([^'\"]*)", text)
            if found and (int(found[1]), int(found[2])) >= MINIMUM_TORCH:
                return folder
            version = f"{found[1]}.{found[2]}{found[3]}" if found else "of unknown version"
            refuse(
                f"torch {version} in {folder} is too old.",
                "install a newer one (pip install -U 'torch>=2.11').",
            )
    refuse(
        f"there is no torch in {named or sysconfig.get_path('purelib')}.",
        "install torch 2.11 or newer first (pip install 'torch>=2.11'), then repeat; where the build runs in an "
        "environment of its own, as python -m build does, name the folder of an installed torch in "
        f"MOE_ROUTE_TORCH_DIR, or add --no-build-isolation; or {PURE}",
    )


def compiler() -> str:
    """A C++20 compiler, or a clear refusal."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = [path for path in (shutil.which(name.split()[0]) for name in names) if path]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <bit>\n#include <concepts>\n#include <span>\nint main() {}\n", encoding="utf-8")
        for path in found:
            command = [path, "-std=c++20", "-fsyntax-only", str(source)]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return path
    refuse(
        f"no C++20 compiler ({', '.join(names)}: {'too old' if found else 'not found'}).",
        "install GCC 11 or Clang 14 or newer (Debian and Ubuntu: apt install g++), or name one in the variable CXX; "
        f"or {PURE}",
    )


def run(command: list[str]) -> None:
    if subprocess.run(command, check=False).returncode != 0:
        refuse(f"{' '.join(command[:2])} failed.", "see its message above.")


class EarlyCheck(dist_info):
    """pip asks for the metadata before it downloads dependencies, so what is missing is said at once."""

    def run(self) -> None:
        if NATIVE:
            torch_directory()
            compiler()
        super().run()


class EditableWheel(editable_wheel):
    """Without kernels, a library that an earlier build left in the tree would be imported still: it is removed."""

    def run(self) -> None:
        names = [] if NATIVE else [f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
        for library in [ROOT / "moe_route" / name for name in names]:
            if library.exists():
                library.unlink()
                print(f"moe-route: removed {library}, of an earlier build with kernels", file=sys.stderr)
        super().run()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(os.environ.get("MOE_ROUTE_BUILD_DIR", ROOT / "build" / "cmake")).resolve()
        build.mkdir(parents=True, exist_ok=True)
        defines = {
            "MOE_ROUTE_TORCH_DIR": torch_directory(),
            "MOE_ROUTE_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "MOE_ROUTE_PYBIND11_INCLUDE": pybind11.get_include(),
            "MOE_ROUTE_MODULE_NAME": target.name,
            "MOE_ROUTE_VERSION": self.distribution.get_version(),
            "MOE_ROUTE_CUDA": os.environ.get("MOE_ROUTE_CUDA", "AUTO"),
        }
        if sanitizers := os.environ.get("MOE_ROUTE_SANITIZE"):
            defines["MOE_ROUTE_SANITIZE"] = sanitizers
        if ninja := shutil.which("ninja"):  # an isolated build has its own, and the kept folder remembers the last one
            defines["CMAKE_MAKE_PROGRAM"] = ninja
        if not (build / "CMakeCache.txt").is_file():
            defines["CMAKE_CXX_COMPILER"] = compiler()
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        run([*configure, *(f"-D{name}={value}" for name, value in defines.items())])
        run(["cmake", "--build", str(build), "--target", "_C", "-j", jobs])
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that has the old module mapped keeps it.
        fresh = target.with_name(target.name + ".new")
        shutil.copy2(build / target.name, fresh)
        os.replace(fresh, target)


def address() -> str:
    """The public address of the repository, "" as long as there is none."""
    return str(load_file(ROOT / "pyproject.toml")["tool"]["moe-route"]["address"]).rstrip("/")


def description(readme: str, address: str) -> str:
    """The README as a package index shows it, where a link to a file of the repository leads nowhere.

    With an address such links become absolute. Without one, a link is its text and the file's path in the sources, and
    a picture is left out with its caption.
    """
    link = re.compile(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?![a-z]+:)(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")

    def shown(found: re.Match[str]) -> str:
        text, path = found["text"], found["path"]
        if address:
            kind = "raw" if found["mark"] else "blob"
            return f"{found['mark']}[{text}]({address}/{kind}/main/{path}{found['anchor'] or ''})"
        return text if text == path else f"{text}: {path}"

    if not address:
        readme = re.sub(r"^!\[.*\n\n(\*[^*]+\*\n\n)?", "", readme, flags=re.M)
    return link.sub(shown, readme)


def sources() -> list[str]:
    """What the sdist needs besides the Python files."""
    found = glob.glob("csrc/**/*", recursive=True, root_dir=ROOT)
    return ["CMakeLists.txt", *sorted(name for name in found if (ROOT / name).is_file())]


NATIVE = native()
setup(
    long_description=description((ROOT / "README.md").read_text(encoding="utf-8"), address()),
    long_description_content_type="text/markdown",
    project_urls={name: f"{address()}{page}" for name, page in PAGES.items()} if address() else {},
    ext_modules=[Extension("moe_route._C", sources=[], depends=sources())] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild, "dist_info": EarlyCheck, "editable_wheel": EditableWheel},
)
