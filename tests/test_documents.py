"""The documents: links lead somewhere, excerpts are the sources', tables are what is generated."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "docs" / "tools"
FOLDERS = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."]
PAGES = [*ROOT.glob("*.md")] + [
    page
    for folder in FOLDERS
    if folder.name not in ("build", "dist")
    for page in folder.rglob("*.md")
]
PARSER = MarkdownIt("commonmark").enable("table")
EXCERPTS = ("how-it-works.md", "extending.md")


def tool(name: str) -> ModuleType:
    """Import a script of docs/tools by its path: `docs` is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_tools_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


messages = tool("messages")


# --- links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert [problem for link in links(page) if (problem := problem_of(page, link))] == []


def test_a_broken_link_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`\n[a](#one-two) [b](#three) [c](none.md) ![d](page.md#x) <http://e>"
    )
    problems = [problem_of(page, link) for link in links(page)]
    assert [bool(problem) for problem in problems] == [False, True, True, True, False]


def links(page: Path) -> list[str]:
    found = []
    for token in inline_tokens(page):
        for name in ("href", "src"):
            if token.attrGet(name):
                found.append(str(token.attrGet(name)))
    return found


def problem_of(page: Path, link: str) -> str | None:
    """Return what is wrong with a link; other sites are not asked."""
    if re.match(r"[a-z]+:", link):
        return None
    path, _, anchor = unquote(link).partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return f"{link}: there is no {path}"
    if anchor and anchor not in anchors(target):
        return f"{link}: {target.name} has no heading {anchor}"
    return None


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and the site give the headings of a page."""
    tokens = PARSER.parse(page.read_text())
    seen: Counter[str] = Counter()
    found = set()
    for heading, text in pairwise(tokens):
        if heading.type == "heading_open":
            plain = "".join(child.content for child in text.children or ())
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            found.add(slug if not seen[slug] else f"{slug}-{seen[slug]}")
            seen[slug] += 1
    return found


def inline_tokens(page: Path) -> Iterator[Token]:
    for token in PARSER.parse(page.read_text()):
        yield from token.children or ()


# --- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_site_works_without_a_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    # What a browser loads by itself; a link that a reader may follow is another thing.
    pattern = r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)"
    loaded = {url for page in pages for url in re.findall(pattern, page.read_text())}
    styles = {
        url
        for style in site.rglob("*.css")
        for url in re.findall(r"url\([\"']?(https?://[^)\"']+)", style.read_text())
    }
    assert loaded | styles == set()


def test_every_page_is_in_the_navigation(site: Path) -> None:
    front = (site / "index.html").read_text()
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.stem != "index"]
    assert [page.name for page in pages if f'href="{page.stem}.html"' not in front] == []


def test_linked_sources_are_in_the_site(site: Path) -> None:
    copied = (site / "source" / "sglang_tokenweave" / "plan.py.txt").read_text()
    assert copied == (ROOT / "sglang_tokenweave" / "plan.py").read_text()


# --- messages


def test_every_message_is_explained() -> None:
    missing, stale = messages.compare()
    rows = "\n".join(f"| {messages.cell(text)} | CAUSE | REMEDY |" for text in missing)
    assert not missing, f"add to docs/troubleshooting.md:\n{rows}"
    assert not stale, f"no source says this any more, remove it from the page: {stale}"


def test_every_row_has_a_cause_and_a_remedy() -> None:
    rows = messages.rows()
    assert len(rows) > 100
    assert [text for text, cells in rows.items() if not all(map(str.strip, cells))] == []
    assert "CAUSE" not in messages.PAGE.read_text()


def test_messages_of_all_kinds_are_found() -> None:
    source = '''
def f(name):
    """A docstring is no message of ours."""
    problem = f"{name} is " "wrong; choose another"
    if name:
        raise ValueError(problem)
    logger.warning("no %s in %s", name, 1)
    reasons.append("three words here" if name else "or these three")
    raise KeyError("short: " + name)
def reason(name):
    return f"{name} lacks it"
def other():
    return "value"
'''
    assert sorted(messages._of_python(source)) == [
        "no … in …",
        "or these three",
        "short: …",
        "three words here",
        "… is wrong; choose another",
        "… lacks it",
    ]
    assert list(messages._of_shell('fail "no $x:" \\\n    "see ${y[*]}"\n')) == ["no …: see …"]
    assert list(messages._of_device('printf("rank %u of "\n "%llu\\n", a, b);')) == ["rank … of …"]


# --- what is generated, and what is copied


def test_generated_tables_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, TOOLS / "generated.py", "--check"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}: run docs/tools/generated.py"


def test_compatibility_shows_failures() -> None:
    compatibility = tool("compatibility")
    outcomes = {
        "test_equality::test_equals_stock[llama-decode]": "failed",
        "test_equality::test_equals_stock[llama-chunked]": "passed",
        "test_versions::test_equals_stock[llama-0.5.17]": "passed",
    }
    models = compatibility._models(outcomes, "0.5.23")
    assert "| model | SGLang 0.5.17 | SGLang 0.5.23 |" in models
    assert "| Llama | yes | **1 of 2 failed** |" in models
    assert "| Qwen3 | not run | not run |" in models


def test_outcomes_are_recorded(tmp_path: Path) -> None:
    (tmp_path / "test_refusals.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_a(n): assert n == 1\n"
        "def test_b(): pytest.skip('no')\n"
    )
    report = tmp_path / "report.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "test_refusals.py"],
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
    )
    compatibility = tool("compatibility")
    recorded = compatibility.record([report])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", recorded["dates"][0])
    assert recorded["outcomes"] == {
        "test_refusals::test_a[1]": "passed",
        "test_refusals::test_a[2]": "failed",
        "test_refusals::test_b": "skipped",
    }
    before = {
        "dates": ["2000-01-01"] * 2,
        "outcomes": {"test_refusals::test_a[1]": "failed", "a": "passed", "b": "passed"},
    }
    updated = compatibility.update(before, recorded, {"test_refusals::test_a[1]", "b"})
    assert updated["outcomes"] == {"test_refusals::test_a[1]": "passed", "b": "passed"}
    assert updated["dates"] == ["2000-01-01", recorded["dates"][0]]


def test_recorded_outcomes_are_of_tests_that_exist() -> None:
    """Otherwise the page speaks of something that is no longer tested: record anew."""
    recorded = json.loads((ROOT / "docs" / "compatibility.json").read_text())
    exist = tool("compatibility").existing_tests()
    assert len(exist) > 100
    assert sorted(set(recorded["outcomes"]) - exist) == []


def test_recorded_faults_are_of_tests_that_exist() -> None:
    recorded = json.loads((ROOT / "docs" / "reliability.json").read_text())
    exist = tool("reliability").existing_tests()
    assert len(exist) > 30
    assert sorted(set(recorded["tests"]) - exist) == []


def test_faults_are_recorded_as_they_end(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def fault(request):\n"
        "    found = dict(name='a fault', where='here', injected=3, seconds=1.25, sees='a|b')\n"
        "    yield found\n"
        "    found['leaks'] = 0\n"
        "    request.node.user_properties.append(('fault', __import__('json').dumps(found)))\n"
    )
    (tmp_path / "test_faults_x.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_a(n, fault): assert n == 1\n"
    )
    report = tmp_path / "report.xml"
    run = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "test_faults_x.py"]
    subprocess.run(run, cwd=tmp_path, capture_output=True, timeout=60, check=False)
    reliability = tool("reliability")
    tests = reliability.record([report])["tests"]
    assert list(tests) == ["test_faults_x::test_a[1]", "test_faults_x::test_a[2]"]
    rows = reliability.faults(tests.values()).splitlines()[2:]
    assert rows == [
        "| a fault | here | 3 | 3 | 1.2 s | a\\|b | 0 |",
        "| a fault | here | 3 | **0 of 3** | 1.2 s | a\\|b | 0 |",
    ]


def test_figures_of_others_are_a_section_of_the_page() -> None:
    figures = {"title": "Soak", "date": "2000-01-01", "command": "c", "commit": "1", "machine": "m"}
    section = tool("reliability").section(
        {**figures, "columns": ["a", "b"], "rows": [[1, 2.5]], "notes": ["n"]}
    )
    assert section.startswith("## Soak\n\n2000-01-01, commit 1, m: `c`\n\n| a | b |")
    assert section.endswith("| 1 | 2.5 |\n\n- n")


@pytest.mark.parametrize("name", EXCERPTS)
def test_excerpts_are_the_sources(name: str) -> None:
    page = ROOT / "docs" / name
    named = {(page.parent / link).resolve() for link in links(page) if link.startswith("../")}
    sources = [path.read_text() for path in named]
    fences = [token for token in PARSER.parse(page.read_text()) if token.type == "fence"]
    excerpts = [token.content for token in fences if token.info in ("python", "cuda")]
    assert excerpts
    lost = [text for text in excerpts if not any(text in source for source in sources)]
    assert lost == [], "not in any file that the page links to"


def test_python_in_the_pages_compiles() -> None:
    pages = [page for page in PAGES if page.name not in EXCERPTS]
    fences = [
        (page.name, token.content)
        for page in pages
        for token in PARSER.parse(page.read_text())
        if token.type == "fence" and token.info == "python"
    ]
    assert fences
    for name, text in fences:
        compile(text, name, "exec")


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


# --- pictures


def test_pictures_can_be_drawn_again(tmp_path: Path) -> None:
    for arguments in (["timeline.py", "draw", "timeline.svg"], ["cut.py", "cut.svg"]):
        command = [TOOLS / arguments[0], *arguments[1:-1], tmp_path / arguments[-1]]
        subprocess.run([sys.executable, *command], check=True, timeout=120)
        drawn = ElementTree.parse(tmp_path / arguments[-1]).getroot()
        committed = ElementTree.parse(ROOT / "docs" / "images" / arguments[-1]).getroot()
        assert drawn.get("viewBox") == committed.get("viewBox")


def test_recorded_halves_overlap() -> None:
    """What the page says of the picture: woven communication runs beside the other half."""
    runs = json.loads((ROOT / "docs" / "images" / "timeline.json").read_text())["runs"]
    for plan, expected in (("fuse", 0), ("weave", 11)):
        events = runs[plan]["events"]
        sent = [event for event in events if event["what"] == "communicate"]
        computed = [event for event in events if event["what"] != "communicate"]
        assert len(sent) == len(computed) == (6 if plan == "fuse" else 12)
        beside = sum(any(_overlap(a, b) for b in computed) for a in sent)
        assert beside == expected


def _overlap(sent: dict[str, float], computed: dict[str, float]) -> bool:
    return sent["start"] < computed["end"] and computed["start"] < sent["end"]
