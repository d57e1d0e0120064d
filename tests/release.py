"""Check what `make release-check` built, less the upload: `python tests/release.py [--tag vVERSION] FOLDER`.

Without a tag, what is only due on the day of a release (its date in CHANGELOG.md, the public address, the wheels of the
other Pythons and processors) is told and not refused.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPILED = (".so", ".pyd", ".dylib", ".o", ".dll")
LARGEST = 15_000_000  # bytes of a wheel, with the demonstration model
GLIBC = (2, 28)
KERNELS = frozenset(
    (f"cp3{minor}", f"manylinux_2_28_{processor}") for minor in range(10, 15) for processor in ("x86_64", "aarch64")
)
"""Python and platform of the wheels with kernels that a release has."""


def version() -> str:
    [found] = re.findall(r'^__version__ = "(.+)"$', (ROOT / "moe_route" / "__init__.py").read_text("utf-8"), re.M)
    return str(found)


def wrong(wheel: Path) -> Iterator[str]:
    """What is wrong with a wheel, as sentences."""
    *_, python, _, platform = wheel.stem.split("-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        texts = {
            name: archive.read(name).decode() for name in names if name.endswith((".dist-info/METADATA", "/WHEEL"))
        }
    about = next(text for name, text in texts.items() if name.endswith("/METADATA"))
    compiled = [name for name in names if name.endswith(COMPILED)]
    if platform == "any":
        if compiled or python != "py3":
            yield f"is for Python {python} of any platform and holds {compiled}"
    elif len(compiled) != 1 or not compiled[0].startswith("moe_route/_C."):
        yield f"holds {compiled} in place of one library"
    if wheel.stat().st_size > LARGEST:
        yield f"has {wheel.stat().st_size / 1e6:.1f} MB, at most {LARGEST / 1e6:.0f}"
    if f"\nVersion: {version()}\n" not in about:
        yield f"is not of version {version()}"
    yield from (
        f"links to {link}, which no package index shows" for link in re.findall(r"\]\((?!https://)(.*?)\)", about)
    )
    if tops := {name.split("/")[0] for name in names} - {"moe_route", f"moe_route-{version()}.dist-info"}:
        yield f"installs {sorted(tops)}"
    for needed in ("moe_route/py.typed", "moe_route/data/model/model.safetensors"):
        if needed not in names:
            yield f"lacks {needed}"


def left(folder: Path, tag: str | None) -> Iterator[str]:
    """What a release of these files needs besides, as sentences."""
    first = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)[0]
    if not re.fullmatch(rf"{re.escape(version())} \(\d{{4}}-\d\d-\d\d\)", first):
        yield f"CHANGELOG.md begins with {first!r}: write the day of the release"
    if not re.search(r'^address = "https://.+"', (ROOT / "pyproject.toml").read_text("utf-8"), re.M):
        yield "pyproject.toml: tool.moe-route.address is empty: name the public repository"
    built = {(parts[-3], platform) for parts in _wheels(folder) for platform in parts[-1].split(".")}
    if missing := sorted(KERNELS - built):
        yield "no wheel of " + ", ".join(" ".join(pair) for pair in missing)
    if tag is not None and tag != f"v{version()}":
        yield f"the tag is {tag}, the version {version()}"


def _wheels(folder: Path) -> list[list[str]]:
    return [path.stem.split("-") for path in folder.glob("*.whl")]


def problems(folder: Path) -> Iterator[str]:
    """What is wrong with the files of a folder and with the sources, as sentences."""
    if [path.name for path in folder.glob("*.tar.gz")] != [f"moe_route-{version()}.tar.gz"]:
        yield f"{folder} does not hold moe_route-{version()}.tar.gz alone"
    if len([parts for parts in _wheels(folder) if parts[-1] == "any"]) != 1:
        yield f"{folder} does not hold one wheel for any platform"
    for wheel in sorted(folder.glob("*.whl")):
        yield from (f"{wheel.name} {problem}" for problem in wrong(wheel))
    for name, line in {"CITATION.cff": f"version: {version()}\n", "CHANGELOG.md": f"## {version()} ("}.items():
        if f"\n{line}" not in (ROOT / name).read_text("utf-8"):
            yield f"{name} lacks {line.strip()!r}"


def main(words: list[str] | None = None) -> int:
    """Print what is wrong, and what is left to do. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tag", help="of the release: what is left to do is refused")
    options = parser.parse_args(words)
    refused, waiting = list(problems(options.folder)), list(left(options.folder, options.tag))
    for line in refused:
        print(f"wrong: {line}")
    for line in waiting:
        print(f"before the upload: {line}")
    for path in sorted(options.folder.iterdir()):
        print(f"{path.stat().st_size / 1e6:6.1f} MB  {path.name}")
    return int(bool(refused or (options.tag is not None and waiting)))


if __name__ == "__main__":
    sys.exit(main())
