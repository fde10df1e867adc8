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
