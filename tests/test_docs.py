"""Every code block of every page runs, in order, in one namespace a page; excerpts are what they are said to be."""

import re
from pathlib import Path
from unittest.mock import patch

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from modula_agd.bridge.declare import DECLARED

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = {"README.md", "architectures.md", "distributed.md", "guide.md", "verification.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path) -> None:
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(page)
    examples = list(document.examples())
    assert bool(examples) == (page.name in WITH_CODE)
    # what a page declares is its own
    with patch.dict(DECLARED):
        for example in examples:
            example.evaluate()


def test_excerpts_of_the_guide_are_from_the_tests_of_frameworks() -> None:
    blocks = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs" / "guide.md").read_text(encoding="utf-8"), re.M | re.S)
    tested = {line.strip() for line in (ROOT / "tests" / "test_frameworks.py").read_text(encoding="utf-8").splitlines()}
    assert len(blocks) >= 5
    assert [line for block in blocks for line in map(str.strip, block.splitlines()) if line not in tested] == []


def test_every_link_to_a_file_leads_somewhere() -> None:
    broken = []
    for page in [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]:
        text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


def stops(heading: str) -> list[str]:
    """The files that a section of the page about the code names, in order, by their table."""
    page = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([a-z_]+(?:\.py|/))`", cell)]


def test_the_page_about_the_code_names_every_file_once() -> None:
    package = ROOT / "modula_agd"
    named = [*stops("In an hour"), *stops("What the default measures"), *stops("All else")]
    files = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    folders = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    assert sorted(named) == sorted(files | folders)


def test_what_is_read_in_an_hour_can_be_and_in_that_order() -> None:
    order = stops("In an hour")
    texts = [(ROOT / "modula_agd" / name).read_text(encoding="utf-8") for name in order]
    later = [
        (name, other)
        for place, (name, text) in enumerate(zip(order, texts, strict=True))
        for other in order[place + 1 :]
        if f"from modula_agd.{other.removesuffix('.py')} import" in text
    ]
    assert later == []
    # 75 lines a minute, a third of which are docstrings
    assert sum(len(text.splitlines()) for text in texts) <= 4600


def test_what_the_page_about_the_code_points_at_is_there() -> None:
    page = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    section = page.split("## Where the equations are\n")[1].split("\n## ")[0]
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "modula_agd").rglob("*.py"))
    names = {part for name in re.findall(r"`([A-Za-z_.]+)`", section) for part in name.split(".")}
    assert len(names) > 20
    assert [name for name in names if not re.search(rf"(class|def) {name}\b|\b{name}\.py", sources + page)] == []
