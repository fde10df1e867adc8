"""Every code block of every page runs, in order, in one namespace a page; excerpts are what they are said to be."""

import re
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from unittest.mock import patch

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import modula_agd
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
    named = [*stops("In an hour"), *stops("What else decides a step"), *stops("All else")]
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
    rows = page.split("## Where the equations are\n")[1].split("\n## ")[0].split("| --- | --- | --- |\n")[1]
    names = re.findall(r"`([A-Za-z_.]+)`", rows)
    modules = [import_module(info.name) for info in walk_packages(modula_agd.__path__, "modula_agd.")]
    places = {module.__name__.rpartition(".")[2]: module for module in modules if module.__name__.count(".") == 1}
    places |= {name: kind for module in modules for name, kind in vars(module).items() if isinstance(kind, type)}
    assert len(names) > 20
    for name in names:
        place, _, inside = name.partition(".")
        assert place in places, name
        # of a class its own definition, not what it inherits
        assert not inside or inside in vars(places[place]), name
