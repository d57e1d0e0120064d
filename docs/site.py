"""Gather the pages of the documentation site: `python docs/site.py FOLDER` writes FOLDER/pages and FOLDER/mkdocs.yml.

The pages are docs/, the other Markdown files of the repository (README.md and docs/index.md tell the same story, so the
second stands for both), and the API reference. That is made from the public names as the source has them:
``moe_route.__all__`` on one page, and a page for each public module with the names of its ``__all__``. The page on
benchmarks ends with every committed results file (bench/pages.py). Links between files become links between pages.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
from pathlib import Path

import griffe
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, it has its own folder there

from bench import pages as results  # noqa: E402

BENCHMARKS = ROOT / "bench" / "README.md"
OTHERS = ("*.md", "bench/**/*.md", "csrc/**/*.md", "examples/**/*.md", "moe_route/data/**/*.md", "tests/*.md")
BESIDE = ("recording",)  # rooms whose names pages and signatures use, beside those of `moe_route.__all__`
COPIED = (*sorted((ROOT / "docs").glob("*.csv")), ROOT / "docs" / "site.css")
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<body>.*?)^```$", re.M | re.S)
# A block whose longest line is longer than this gets the class, which makes its letters smaller (docs/site.css).
WIDE = {130: "wide", 148: "wider"}


def gather(folder: Path) -> None:
    pages = folder / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(ROOT / "docs" / "images", pages / "images")
    for path in COPIED:
        shutil.copy(path, pages)
    texts = {place(path): linked(path.read_text(encoding="utf-8"), path) for path in sources()}
    files = results.files()
    texts[place(BENCHMARKS)] += "".join([linked(results.index(files), files[0]), *map(result, files)])
    for name, text in {**texts, **api_pages()}.items():
        target = pages / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(BLOCK.sub(fitted, text), encoding="utf-8")
    config = yaml.safe_load((ROOT / "docs" / "site.yml").read_text(encoding="utf-8"))
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def sources() -> list[Path]:
    """The files of the repository that are pages."""
    others = {path for pattern in OTHERS for path in ROOT.glob(pattern)}
    return sorted({*(ROOT / "docs").glob("*.md"), *others} - {ROOT / "README.md"})


def place(path: Path) -> str:
    """Where a file of the repository stands among the pages. A README is the page of its folder, docs/ is the root."""
    name = path.relative_to(ROOT).as_posix()
    return "index.md" if name == "README.md" else name.removeprefix("docs/")


def result(path: Path) -> str:
    """A results file as a section of the page on benchmarks, folded."""
    text = linked(results.page(path), path).partition("\n")[2]
    text = re.sub(r"^#+ (.*)$", r"**\1**", text, flags=re.M)
    return (
        f"\n### {path.stem}\n\n<details markdown><summary>every figure of {path.name}</summary>\n{text}\n</details>\n"
    )


def linked(text: str, path: Path) -> str:
    """The text of a file, its links leading to pages; of a link to a file that is no page the text stays."""
    known = {place(source) for source in sources()}
    here = posixpath.dirname(place(BENCHMARKS if path in results.files() else path))

    def link(match: re.Match[str]) -> str:
        target, anchor = (path.parent / match["target"]).resolve(), match["anchor"] or ""
        if not target.is_file():
            return match[0]
        if target in results.files():
            target, anchor = BENCHMARKS, f"#{target.stem}"
        name = place(target)
        if name not in known and target not in COPIED and not name.startswith("images/"):
            return match["text"]
        return f"[{match['text']}]({posixpath.relpath(name, here or '.')}{anchor})"

    return LINK.sub(link, text)


def fitted(match: re.Match[str]) -> str:
    """A block of code, marked if its lines are too long for letters of the usual size."""
    longest = max(map(len, match["body"].splitlines()), default=0)
    size = [name for limit, name in WIDE.items() if longest > limit]
    return f"``` {{.{match['language']} .{size[-1]}}}\n{match['body']}```" if size else match[0]


def api_pages() -> dict[str, str]:
    """File name -> Markdown: the first page has what `moe_route` exports itself, each of the others a public module."""
    package = griffe.load("moe_route", search_paths=[ROOT], allow_inspection=False)
    exports = [str(name) for name in package.exports or ()]
    modules = [name for name in exports if name in package.members and package[name].is_module] + [*BESIDE]
    listed = "\n".join(f"- [`moe_route.{name}`]({name}.md): {summary(package[name])}" for name in modules)
    own = [name for name in exports if name not in modules and not name.startswith("_")]
    pages = {"api/index.md": "\n\n".join(["# moe_route", listed, *(directive(package, name) for name in own)])}
    for name in modules:
        module = package[name]
        text = f"::: moe_route.{name}\n    options: {{members: false, show_root_heading: false}}"
        members = [directive(module, str(member)) for member in module.exports or ()]
        pages[f"api/{name}.md"] = "\n\n".join([f"# moe_route.{name}", text, *members])
    return pages


def directive(module: griffe.Object | griffe.Alias, name: str) -> str:
    """What mkdocstrings replaces by the documentation of a name of a module.

    A function may have the name of the file that it is imported from (`analysis.divergence`); it is what is meant.
    """
    found = module.members.get(name)
    path = module.imports[name] if found is None or found.is_module else f"{module.path}.{name}"
    return f"::: {path}"


def summary(member: griffe.Object | griffe.Alias) -> str:
    """The first sentence of a docstring."""
    text = " ".join(member.docstring.value.split("\n\n")[0].split()) if member.docstring else ""
    return re.split(r"(?<=[.])\s", text, maxsplit=1)[0].removesuffix(":")


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
