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
from typing import Any

import pytest
import torch
from harness.exhaustive import exhaustive_but
from harness.tiny_models import inputs, tiny_model

import moe_route as mr
from moe_route import _C
from moe_route.cli import main
from moe_route.data import demo_model_folder
from moe_route.routers import find_routers

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


def runnable(body: str) -> str:
    """A Python block with the demo model in place of one that would have to be downloaded."""
    return body.replace('"Qwen/Qwen3-30B-A3B"', repr(str(demo_model_folder())))


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
            exec(
                compile("\n" * line + runnable(body), str(page), "exec"), namespace
            )  # a traceback names the line of the page
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


# ---- the README, and the first page of the documentation ---------------------------------------------------------

SHARED = re.compile(r"(?<=<!-- from README\.md -->\n)(?P<body>.*?)(?=<!-- end of README\.md -->)", re.S)
DEMO = re.compile(r"(?<=<!-- demo -->\n).*?(?=<!-- end of demo -->)", re.S)


def sections(text: str) -> dict[str, str]:
    """Heading -> section of a Markdown page, with its heading; what stands before the first one is under ""."""
    parts = re.split(r"^(?=## )", text, flags=re.M)
    return {part.partition("\n")[0].removeprefix("## ") if number else "": part for number, part in enumerate(parts)}


def told_alike(page: str) -> str:
    """A page whose shared blocks are the README's sections of the same headings, with links from docs/."""
    readme = sections((ROOT / "README.md").read_text(encoding="utf-8"))

    def linked(match: re.Match[str]) -> str:
        target = os.path.relpath(ROOT / match["target"], ROOT / "docs")
        return f"]({target}{match['anchor'] or ''})"

    def shared(match: re.Match[str]) -> str:
        chosen = "".join(readme[name] for name in sections(match["body"]) if name or match["body"].startswith("# "))
        return re.sub(r"\]\((?!https?:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)", linked, chosen)

    return SHARED.sub(shared, page)


def excerpt(screen: str) -> str:
    """Ten lines of the demo's screen, whose parts are parted by empty lines: the U of the first, what the second begins
    and ends with, and what the third begins with."""
    first, second, third, *_ = [part.splitlines() for part in screen.strip("\n").split("\n\n")]
    return "\n".join([*first[:7], second[0], second[-1], third[0]])


def show_the_demo() -> None:
    """Run the demo, and write what it prints into the README, in ten lines, and into the first page, whole."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        screen = captured(lambda: main(["demo"]))
    for name, shown in (("README.md", excerpt(screen)), ("docs/index.md", screen.strip("\n"))):
        page = (ROOT / name).read_text(encoding="utf-8")
        block = f"<!-- not run -->\n```console\n$ moe-route demo\n{shown}\n```\n"
        (ROOT / name).write_text(DEMO.sub(lambda _, block=block: block, page), encoding="utf-8")


@pytest.mark.exhaustive
def test_the_demo_prints_what_the_pages_show():
    """But for numbers and the bars that show them: they differ in the last digit from machine to machine."""
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    shown = DEMO.search(page)
    assert shown
    screen = shown[0].partition("$ moe-route demo\n")[2].partition("```")[0]
    readme = DEMO.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert readme
    assert excerpt(screen) in readme[0]
    printed = captured(lambda: main(["demo"]))
    assert words(printed) == words(screen), "run `python tests/test_docs.py demo` to write the pages anew"


def words(text: str) -> list[str]:
    return re.findall("[A-Za-z]{3,}", text)


def test_the_readme_and_the_first_page_tell_the_same_story():
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert len(SHARED.findall(page)) >= 2
    assert told_alike(page) == page, "run `python tests/test_docs.py docs/index.md` to write the page anew"
    readme = [name for name in sections((ROOT / "README.md").read_text(encoding="utf-8")) if name]
    assert [name for name in sections(page) if name in readme] == readme


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    first = re.search(r"```python\n(.*?)```", text, re.S)
    assert first
    assert first[1].count("\n") <= 20
    assert not re.search(r"`moe-route |\bmake ", text[: first.start()])  # their own model comes before our commands
    tables = re.findall(r"^\|[- |]+\|\n((?:\|.*\n)+)", text[text.index("<!-- figures -->") :], re.M)
    assert tables[0].count("\n") <= 6
    limits = sections(text)["Limits"]
    assert sum(line.startswith("- ") for line in limits.splitlines()) <= 8
    demo = DEMO.search(text)
    assert demo
    shown = [line for line in demo[0].splitlines() if not line.startswith(("```", "<!--"))]
    assert len(shown) <= 11  # the command, and ten lines


def test_the_readme_counts_the_architectures_that_were_tested():
    rows = (line.split(",") for line in (ROOT / "docs" / "versions.csv").read_text(encoding="utf-8").splitlines())
    head, *tested = rows
    names = {row[0].partition("_with")[0] for row in tested if row[-1] != "-"}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{len(names)} architectures of transformers {head[-1].rpartition('.')[0]}" in text


SIX_FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "gpt_oss", "deepseek_v3", "granitemoe")


@pytest.mark.parametrize("name", SIX_FAMILIES)
def test_transformers_alone_ignores_edited_logits_and_counts_padding(name: str):
    """What the README says that one does not get without moe-route."""
    model = tiny_model(name, head=True)
    call = inputs(name, model, batch=2, length=6)
    call["attention_mask"] = torch.ones_like(call["input_ids"])
    call["attention_mask"][0, :4] = 0  # four tokens of padding, eight of text
    routers = find_routers(model)
    with torch.no_grad():
        natural = model(**call, output_router_logits=True)
        hooks = [router.module.register_forward_hook(other_logits) for router in routers]
        hooked = model(**call)
        for hook in hooks:
            hook.remove()
        with mr.attach(model) as routed:
            with routed.record() as recorder:
                model(**call)
            with routed.steer(mr.Plan.bias({routers[0].layer: {0: 50.0}})):
                steered = model(**call)
    assert torch.equal(natural.logits, hooked.logits)
    assert not torch.equal(natural.logits, steered.logits)
    assert [logits.numel() // logits.shape[-1] for logits in natural.router_logits] == [12] * len(routers)
    assert (recorder.statistics().tokens() == 8).all()


def other_logits(module: torch.nn.Module, arguments: object, output: tuple[torch.Tensor, ...]) -> object:
    return (torch.randn_like(output[0]) * 10, *output[1:])


# ---- pages that are made from results ----------------------------------------------------------------------------


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
        assert f"[{path.stem}](#{path.stem})" in pages.index(pages.files())


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
    for page in PAGES:
        name = page.relative_to(ROOT).with_suffix(".html").as_posix().removeprefix("docs/")
        name = {"README.html": "index.html"}.get(name, re.sub(r"README.html$", "index.html", name))
        assert (site / name).is_file(), name
    benchmarks = (site / "bench" / "index.html").read_text(encoding="utf-8")
    for path in (ROOT / "bench" / "results").glob("*.json"):
        assert f'id="{path.stem}"' in benchmarks
        assert f'href="#{path.stem}"' in benchmarks
    assert "bench/index.html#cpu-avx512-experts" in (site / "kernels.html").read_text(encoding="utf-8")
    reference = {path.stem: path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html")}
    for name in mr.__all__:
        member = getattr(mr, name)
        if isinstance(member, types.ModuleType):
            missing = [each for each in getattr(member, "__all__", ()) if f">{each}<" not in reference[name]]
            assert missing == [], f"moe_route.{name}"
        elif not name.startswith("_"):
            assert f'id="moe_route.{name}"' in reference["index"]


def test_the_menu_is_short_and_in_words():
    yaml = pytest.importorskip("yaml", reason="needs the extra docs")
    menu = yaml.safe_load((ROOT / "docs" / "site.yml").read_text(encoding="utf-8"))["nav"]
    below = [entry for head in menu for entries in head.values() if isinstance(entries, list) for entry in entries]
    names = [name for entry in (*menu, *below) for name in entry]
    assert len(names) <= 20
    assert [name for name in names if not re.fullmatch("[A-Z][A-Za-z ]+", name)] == []


@pytest.mark.exhaustive
def test_code_fits_its_column(site: Path, browser: Any):
    """At 1400 pixels, light and dark, no block of code scrolls, and only the lines of very long messages are broken."""
    broken, colors = [], set()
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme=scheme)
        for path in sorted(site.rglob("*.html")):
            page.goto(path.as_uri())
            broken += [(path.name, scheme, text) for text in page.evaluate(CODE_THAT_DOES_NOT_FIT)]
        colors.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert broken == []
    assert len(colors) == 2


CODE_THAT_DOES_NOT_FIT = """[...document.querySelectorAll(".md-content pre > code")].filter(code => {
  const style = getComputedStyle(code), lines = code.textContent.replace(/\\n$/, "").split("\\n")
  const height = code.getBoundingClientRect().height - parseFloat(style.paddingTop) - parseFloat(style.paddingBottom)
  const folded = height === 0 || code.closest("details:not([open])")
  const whole = lines.every(line => line.length <= (code.closest(".wide, .wider") ? 178 : 130))
  return code.scrollWidth > code.clientWidth
      || whole && !folded && Math.round(height / parseFloat(style.lineHeight)) > lines.length
}).map(code => code.textContent.slice(0, 80))"""


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
            self.printed = captured(lambda: exec(runnable(body), self.namespace))
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
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)  # bars are drawn where it can hold them
    with contextlib.redirect_stdout(out):
        run()
    return out.buffer.getvalue().decode()  # type: ignore[attr-defined]


def refresh() -> None:
    target = ROOT / "docs" / "support.md"
    beginning = target.read_text(encoding="utf-8").partition("<!-- table -->\n")[0]
    target.write_text(f"{beginning}<!-- table -->\n{support_table()}\n", encoding="utf-8")
    for name in ("README.md", "bench/README.md", "docs/serving.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        (ROOT / name).write_text(FIGURES.sub(lambda _, name=name: figures(name), text), encoding="utf-8")
    first = ROOT / "docs" / "index.md"
    first.write_text(told_alike(first.read_text(encoding="utf-8")), encoding="utf-8")
    names = sys.argv[1:]
    if "demo" in names:
        names.remove("demo")
        show_the_demo()
        if not names:
            return
    wanted = [Path(name).resolve() for name in names] or WITH_EXAMPLES
    for page in wanted:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            Refresher().page(page)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    refresh()
