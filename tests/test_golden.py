"""AGD as published: trajectories of the authors' own optimizer, step by step, to 1e-10."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from modula_agd import AGD, Conv2d, CrossEntropy, Flatten, Linear, Loss, Module, ReLU, UnhalvedSquareLoss, published

CASES: dict[str, tuple[Module, Loss]] = {
    "fcn_mse": (Linear(4, 5) @ ReLU() @ Linear(5, 6), UnhalvedSquareLoss()),
    "fcn_deep_xent": (
        Linear(3, 6) @ ReLU() @ Linear(6, 6) @ ReLU() @ Linear(6, 6) @ ReLU() @ Linear(6, 5),
        CrossEntropy(),
    ),
    "conv_mse": (
        Linear(3, 27) @ Flatten(3, 3) @ ReLU() @ Conv2d(3, 4, stride=2, padding=1) @ ReLU() @ Conv2d(4, 2, padding=1),
        UnhalvedSquareLoss(),
    ),
}
PRECISION = 1e-10


@pytest.fixture(scope="module")
def trajectories(data_dir: Path) -> dict[str, Any]:
    path = data_dir.parent / "golden" / "agd_trajectories.json"
    if not path.is_file():
        pytest.skip(f"no golden trajectories: {path} is not a file")
    return json.loads(path.read_text(encoding="utf-8"))


def tensors(case: dict[str, Any], network: Module, which: str) -> dict[str, Tensor]:
    values = [torch.tensor(weight, dtype=torch.float64) for weight in case[which]]
    return dict(zip([name for name, _ in network.atoms()], values, strict=True))


def batch(case: dict[str, Any], outputs: int) -> tuple[Tensor, Tensor]:
    inputs, labels = torch.tensor(case["inputs"], dtype=torch.float64), torch.tensor(case["labels"])
    if case["loss"] == "xent":
        return inputs, labels
    return inputs, functional.one_hot(labels, outputs).double() * math.sqrt(outputs)


@pytest.mark.parametrize("name", CASES)
def test_the_published_method_reproduces_objective_eta_and_final_weights(
    name: str, trajectories: dict[str, Any]
) -> None:
    network, loss = CASES[name]
    case = trajectories[name]
    assert network.codomain is not None
    inputs, targets = batch(case, network.codomain.width)
    method = published(network, loss)
    params = tensors(case, network, "initial")
    state = method.init(params)
    objectives, etas = [], []
    for _ in case["eta"]:
        grads, value = torch.func.grad_and_value(method.objective)(params, inputs, targets)
        updates, state = method.update(grads, state, params)
        params = {key: weight + updates[key] for key, weight in params.items()}
        objectives.append(value.item())
        etas.append(state.eta.item())
    assert objectives == pytest.approx(case["objective"], rel=PRECISION)
    assert etas == pytest.approx(case["eta"], rel=PRECISION)
    for key, weight in tensors(case, network, "final").items():
        assert torch.allclose(params[key], weight, rtol=0, atol=PRECISION), key


@pytest.mark.parametrize("name", CASES)
def test_the_optimizer_reproduces_the_final_weights(name: str, trajectories: dict[str, Any]) -> None:
    network, loss = CASES[name]
    case = trajectories[name]
    assert network.codomain is not None
    inputs, targets = batch(case, network.codomain.width)
    model = network.to_torch(dtype=torch.float64)
    model.load_state_dict(tensors(case, network, "initial"))
    optimizer = AGD(model, published(network, loss))
    for _ in case["eta"]:
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
    for key, weight in tensors(case, network, "final").items():
        assert torch.allclose(model.state_dict()[key], weight, rtol=0, atol=PRECISION), key


def test_the_goldens_are_sensitive_to_the_depth_that_is_counted(trajectories: dict[str, Any]) -> None:
    # a negative control: with one layer more the first η is already elsewhere
    network, loss = CASES["fcn_mse"]
    case = trajectories["fcn_mse"]
    inputs, targets = batch(case, 4)
    method = published(Linear(4, 4) @ network, loss)
    params = {**tensors(case, network, "initial"), "3.weight": torch.eye(4, dtype=torch.float64)}
    grads = torch.func.grad(method.objective)(params, inputs, targets)
    _, state = method.update(grads, method.init(params), params)
    assert abs(state.eta.item() - case["eta"][0]) > 1e-3
