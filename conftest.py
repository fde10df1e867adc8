"""Run the code blocks of the documentation, each page in a namespace of its own."""

from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md"]).pytest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the blocks of a page in one process, since each goes on where the last ended."""
    for item in items:
        if Path(item.path).suffix == ".md":
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
