"""Options and fixtures that several test folders share."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

# No test reaches for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where, in which dtype and how often the laws of verification are tried."""
    group = parser.getgroup("modula_agd")
    group.addoption("--device", default="cpu", help="where the laws are evaluated (default: cpu)")
    group.addoption("--dtype", default="float64", help="in which dtype (default: float64)")
    group.addoption("--cases", type=int, default=50, help="cases per law and construction (default: 50)")
    group.addoption("--first-seed", type=int, default=0, help="seed of the search for counterexamples (default: 0)")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small tensors gain nothing from threads, and several test processes would fight over the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def torchvision_models() -> None:
    """torchvision's models also beside a torch that its compiled operators were not built for."""
    sys.path.insert(0, str(_ROOT / "examples" / "bridge"))
    importlib.import_module("models").without_compiled_operators()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets that MODULA_AGD_DATA names, by default ../shared/data beside the repository."""
    named = os.environ.get("MODULA_AGD_DATA")
    folder = Path(named) if named else _ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder; name one with MODULA_AGD_DATA")
    return folder
