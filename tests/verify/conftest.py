import pytest
import torch

from modula_agd.verify import Device


@pytest.fixture(scope="session")
def where(request) -> Device:
    return Device(
        torch.device(request.config.getoption("--device")), getattr(torch, request.config.getoption("--dtype"))
    )


@pytest.fixture(scope="session")
def cases(request) -> int:
    return request.config.getoption("--cases")


@pytest.fixture(scope="session")
def first_seed(request) -> int:
    return request.config.getoption("--first-seed")
