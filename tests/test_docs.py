"""Every example of the README and the documentation runs: Python blocks, and `moe-route` commands of console blocks.

The blocks of one page run in order, in one namespace and one empty folder, as a reader would try them. A block
after the comment `<!-- not run -->` is left out.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.exhaustive import exhaustive_but

from moe_route import _C
from moe_route.cli import main

ROOT = Path(__file__).parents[1]
BESIDE = ("bench/README.md", "csrc/cuda/README.md", "examples/README.md", "examples/study/README.md")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in BESIDE)]
BLOCK = re.compile(r"^(?P<skip><!-- not run -->\n)?```(?P<language>python|console)\n(?P<body>.*?)^```$", re.M | re.S)


def blocks(page: Path) -> Iterator[tuple[str, str, int]]:
    """(language, body, line of the body's start) of every block of the page that is to run."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if not match["skip"]:
            yield match["language"], match["body"], text.count("\n", 0, match.start("body"))


def commands(body: str) -> Iterator[list[str]]:
    """The moe-route commands of a console block; a backslash continues a line."""
    for line in body.replace("\\\n", " ").splitlines():
        if line.startswith("$ moe-route "):
            yield shlex.split(line)[2:]


FENCED = re.compile(r"^(?P<skip><!-- not run -->\n)?```(?P<language>\w+)\n(?P<body>.*?)^```$", re.M | re.S)
WITH_EXAMPLES = [page for page in PAGES if any(True for _ in blocks(page))]
FIRST = (ROOT / "README.md", ROOT / "docs" / "index.md")  # whose examples run in `make test`


@pytest.mark.parametrize("page", exhaustive_but(FIRST, WITH_EXAMPLES), ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for language, body, line in blocks(page):
        if language == "python":
            exec(compile("\n" * line + body, str(page), "exec"), namespace)  # a traceback names the line of the page
            continue
        for arguments in commands(body):
            code = main(arguments)
            assert code == 0, f"moe-route {' '.join(arguments)}: {capsys.readouterr().err}"


def support_table() -> str:
    """The router classes of docs/support.md, from the table that attaching goes by."""
    from moe_route.routers.catalog import FAMILIES, REFUSED

    rows: dict[str, list[str]] = {}
    for family in FAMILIES:
        routers = [name for name in family.routers if name not in ("TopKRouter", "AdapterRouter")]
        rows.setdefault(family.name, []).extend(f"`{name}`" for name in routers)
    lines = ["| routing | router classes of transformers |", "|---|---|"]
    lines += [f"| {name} | {', '.join(sorted(routers))} |" for name, routers in rows.items() if routers]
    lines += ["", "Refused by name:", "", "| class | because |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in REFUSED.items()]
    return "\n".join(lines)


def test_the_support_page_says_what_the_table_says():
    page = ROOT / "docs" / "support.md"
    head = page.read_text(encoding="utf-8").partition("<!-- table -->\n")[0]
    expected = f"{head}<!-- table -->\n{support_table()}\n"
    assert page.read_text(encoding="utf-8") == expected, "run `python tests/test_docs.py` to write the table anew"


FIGURES = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- end of figures -->)", re.S)


def figures(page: str) -> str:
    """The figures of a page, from the committed results."""
    from bench import summary

    makers = {"README.md": summary.headline, "bench/README.md": summary.committed, "docs/serving.md": summary.serving}
    return makers[page]()


@pytest.mark.parametrize("page", ["README.md", "bench/README.md", "docs/serving.md"])
def test_the_figures_are_those_of_the_committed_results(page: str):
    found = FIGURES.search((ROOT / page).read_text(encoding="utf-8"))
    assert found
    assert found[0] == figures(page), f"run `python tests/test_docs.py {page}` to write the figures anew"


def test_a_page_of_results_has_every_figure_of_its_file():
    from bench import pages
    from moe_route.base.table import duration

    for path in (path for path in pages.files() if path.name.startswith("cpu-")):
        content = json.loads(path.read_text(encoding="utf-8"))
        lines = [line.strip("| ").split(" | ") for line in pages.page(path).splitlines() if line.startswith("| ")]
        found = {(cells[0], cells[1].strip("*"), cells[2], cells[3]) for cells in lines if len(cells) > 3}
        for row in content["rows"]:
            quartiles = f"{duration(row['low'])} - {duration(row['high'])}"
            assert (row["case"], row["name"], duration(row["median"]), quartiles) in found
        assert {tuple(cells) for cells in lines} >= {tuple(item) for item in content["machine"].items()}
        assert f"[{path.stem}]({path.name})" in pages.index(pages.files())


def test_results_are_committed_once():
    """As JSON: what a reader sees is made from it."""
    assert {path.name for path in (ROOT / "bench" / "results").glob("*.md")} == {"PENDING.md"}


@pytest.mark.parametrize("name", ["describe.md", "kernels.md"])
def test_outputs_that_do_not_depend_on_the_machine_are_those_of_the_page(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    transformers = pytest.importorskip("transformers")
    named = re.search(r"transformers (\d+\.\d+)", page)
    assert named
    if not transformers.__version__.startswith(f"{named[1]}."):
        pytest.skip(f"the page is of transformers {named[1]}")
    if "processor with AVX-512" in page and not _C.instruction_set().startswith("avx512"):
        pytest.skip(f"the page is of a processor with AVX-512, this is one with {_C.instruction_set()}")
    assert FENCED.sub(Refresher().block, page) == page, f"run `python tests/test_docs.py docs/{name}` to write it anew"


def test_the_page_on_architecture_shows_the_floors():
    from test_floors import FLOORS

    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("<!-- floors -->")[2].partition("<!-- end of floors -->")[0]
    shown = [re.findall(r"(?<=[|;] )`(\w+)`", line) for line in table.splitlines() if line.startswith("| ")][1:]
    rooms = [[name for name in floor if name not in ("__main__", "_C")] for floor in FLOORS]
    assert shown == [floor for floor in rooms if floor]


def test_the_pages_have_examples():
    assert ROOT / "README.md" in WITH_EXAMPLES
    assert len(WITH_EXAMPLES) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path):
    for target in re.findall(r"\]\((?!https?://|#|api/)([^)#\s]+)", page.read_text(encoding="utf-8")):  # api/ is made
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation site, built as `make docs` does."""
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("docs")
    subprocess.run([sys.executable, ROOT / "docs" / "site.py", folder], check=True)
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", folder / "mkdocs.yml"]
    done = subprocess.run(
        build, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.mark.exhaustive
def test_the_site_has_every_page_and_every_public_name(site: Path):
    import moe_route

    for page in PAGES:
        name = page.relative_to(ROOT).with_suffix(".html").as_posix().removeprefix("docs/")
        name = {"README.html": "overview.html"}.get(name, re.sub(r"README.html$", "index.html", name))
        assert (site / name).is_file(), name
    for path in (ROOT / "bench" / "results").glob("*.json"):
        assert f"{path.stem}.html" in (site / "bench" / "results" / "index.html").read_text(encoding="utf-8")
        assert (site / "bench" / "results" / f"{path.stem}.html").is_file()
    assert "bench/results/cpu-avx512.html" in (site / "kernels.html").read_text(encoding="utf-8")
    reference = {path.stem: path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html")}
    for name in moe_route.__all__:
        member = getattr(moe_route, name)
        if isinstance(member, types.ModuleType):
            missing = [each for each in getattr(member, "__all__", ()) if f">{each}<" not in reference[name]]
            assert missing == [], f"moe_route.{name}"
        elif not name.startswith("_"):
            assert f'id="moe_route.{name}"' in reference["index"]


def test_the_site_loads_nothing_from_elsewhere(site: Path):
    loaded = re.compile(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*\shref=\"?(?:https?:)?//")
    pages = {path.relative_to(site): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert len(pages) > len(PAGES)
    assert [name for name, text in pages.items() if loaded.search(text)] == []
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert styles
    assert not any(re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", text) for text in styles)


class Refresher:
    """Writes anew what the pages print: the output of `moe-route` in console blocks, and a text block after a Python
    block that prints. `python tests/test_docs.py [PAGE...]`."""

    def __init__(self) -> None:
        self.namespace: dict[str, object] = {"__name__": "__main__"}
        self.printed = ""

    def page(self, page: Path) -> None:
        page.write_text(FENCED.sub(self.block, page.read_text(encoding="utf-8")), encoding="utf-8")

    def block(self, match: re.Match[str]) -> str:
        language, body = match["language"], match["body"]
        if match["skip"]:
            return match[0]
        if language == "python":
            self.printed = captured(lambda: exec(body, self.namespace))
        elif language == "text" and self.printed:
            body, self.printed = self.printed, ""
        elif language == "console":
            body = "\n".join(self.commands(body))
        return f"```{language}\n{body.rstrip()}\n```"

    def commands(self, body: str) -> Iterator[str]:
        lines = body.replace("\\\n", "\\\0").splitlines()
        for line in (line for line in lines if line.startswith("$ ")):
            yield line.replace("\0", "\n")
            for arguments in commands(line.replace("\\\0", " ")):
                yield captured(lambda arguments=arguments: main(arguments)).rstrip()


def captured(run: Callable[[], object]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run()
    return out.getvalue()


def refresh() -> None:
    target = ROOT / "docs" / "support.md"
    beginning = target.read_text(encoding="utf-8").partition("<!-- table -->\n")[0]
    target.write_text(f"{beginning}<!-- table -->\n{support_table()}\n", encoding="utf-8")
    for name in ("README.md", "bench/README.md", "docs/serving.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        (ROOT / name).write_text(FIGURES.sub(lambda _, name=name: figures(name), text), encoding="utf-8")
    wanted = [Path(name).resolve() for name in sys.argv[1:]] or WITH_EXAMPLES
    for page in wanted:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            Refresher().page(page)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    refresh()
