"""What only an accelerator can show: no wait in a step, late but sure errors, the CPU's numbers. `pytest -m gpu`."""

import math

import pytest
import torch

from modula_agd import AGD, MLP, Attention, ClosedForm, CrossEntropy, ExactGrowth, Heads, NonFiniteGradient, agd
from modula_agd.space import Tuple

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


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
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


def test_weights_of_attention_that_a_fused_kernel_drops_are_right_in_the_mean(cuda) -> None:
    attention = Attention(causal=True, dropout=0.4).bind(Tuple((Heads(2, 16),) * 3))
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8, 16, generator=drawn).to(cuda) for _ in range(3))
    many, whole = tuple(part.repeat(4000, 1, 1, 1) for part in (q, k, v)), attention({}, (q, k, v))
    # five standard errors of the mean, of what each weight adds to the variance at most
    error = 5 * math.sqrt(0.4 / 0.6 / 4000) * float(v.abs().max())
    for generator in (torch.cuda.default_generators[torch.cuda.current_device()], torch.Generator(cuda)):
        out = attention.run({}, many, generator=generator.manual_seed(0))[0]
        assert not torch.equal(out[0], out[1])
        torch.testing.assert_close(out.mean(0, keepdim=True), whole, rtol=0, atol=error)


def test_a_captured_step_is_replayed_with_what_has_changed_since(cuda) -> None:
    network, inputs, labels = _problem(cuda)
    models = [network.to_torch(0, device=cuda) for _ in range(2)]
    captured, plain = AGD(models[0], CrossEntropy(), capturable=True), AGD(models[1], CrossEntropy())
    captured.param_groups[0]["lr"] = torch.ones((), device=cuda)

    def gradients() -> None:
        models[1].zero_grad()
        CrossEntropy()(models[1](inputs), labels).backward()
        for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            mine.grad = theirs.grad.clone() if mine.grad is None else mine.grad.copy_(theirs.grad)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients()
            captured.step()
            plain.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    gradients()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(4):
        if step:
            gradients()
        captured.param_groups[0]["lr"].fill_(0.5**step)
        plain.param_groups[0]["lr"] = 0.5**step
        graph.replay()
        plain.step()
    assert int(captured.state_dict()["param_groups"][0]["agd"]["clock"]) == 7
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_state_follows_the_model_to_the_device_and_a_checkpoint_to_the_cpu(cuda) -> None:
    network, inputs, labels = _problem(cuda)
    model = network.to_torch(0)
    optimizer = AGD(model, CrossEntropy())
    CrossEntropy()(model(inputs.cpu()), labels.cpu()).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.to(cuda)
    CrossEntropy()(model(inputs), labels).backward()
    optimizer.step()
    assert all(entry["momentum_buffer"].is_cuda for entry in optimizer.state.values())
    other = network.to_torch(1)
    resumed = AGD(other, CrossEntropy())
    resumed.load_state_dict(optimizer.state_dict())
    assert not any(entry["momentum_buffer"].is_cuda for entry in resumed.state.values())
    CrossEntropy()(other(inputs.cpu()), labels.cpu()).backward()
    resumed.step()
