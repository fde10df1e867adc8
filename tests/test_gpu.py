"""What only an accelerator can show: no wait in a step, late but sure errors, the CPU's numbers. `pytest -m gpu`."""

import pytest
import torch

from modula_agd import AGD, MLP, ClosedForm, CrossEntropy, ExactGrowth, NonFiniteGradient, agd

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


def _problem(device: torch.device):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(64, 20, generator=generator), torch.randint(10, (64,), generator=generator)
    return MLP(10, 32, 20, depth=3, bias=True), inputs.to(device), labels.to(device)


@pytest.mark.parametrize("direction", ["spectral", "frobenius"])
@pytest.mark.parametrize("search", [ExactGrowth(), ClosedForm()], ids=repr)
@pytest.mark.parametrize("sizes", ["prescribed", "tracked"])
def test_a_step_never_waits_for_the_device(cuda, direction, search, sizes) -> None:
    network, inputs, labels = _problem(cuda)
    model = network.to_torch(0, device=cuda)
    optimizer = AGD(model, CrossEntropy(), direction=direction, search=search, sizes=sizes)
    for index in range(4):
        CrossEntropy()(model(inputs), labels).backward()
        torch.cuda.synchronize()
        # the first step fills caches
        torch.cuda.set_sync_debug_mode("error" if index else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_non_finite_gradient_touches_no_weight_and_raises_once_known(cuda) -> None:
    network, inputs, labels = _problem(cuda)
    model = network.to_torch(0, device=cuda)
    optimizer = AGD(model, CrossEntropy())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    CrossEntropy()(model(inputs), labels).backward()
    next(model.parameters()).grad[0, 0] = float("nan")
    optimizer.step()
    torch.cuda.synchronize()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(NonFiniteGradient, match=r"0\.weight"):
        optimizer.step()


def test_a_step_agrees_with_the_cpus(cuda) -> None:
    updates = {}
    for device in (torch.device("cpu"), cuda):
        network, inputs, labels = _problem(device)
        method = agd(network, CrossEntropy())
        params = {name: w.double() for name, w in network.init(0, device=device).items()}
        grads = torch.func.grad(method.objective)(params, inputs.double(), labels)
        step, _ = method.update(grads, method.init(params), params)
        updates[device.type] = {name: w.cpu() for name, w in step.items()}
    for name, update in updates["cpu"].items():
        torch.testing.assert_close(updates["cuda"][name], update, rtol=1e-9, atol=1e-12)
