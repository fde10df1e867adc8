"""The certified method on deep linear networks: never a rise, never a bound violated."""

import math

import pytest
import torch

from modula_agd import Bias, Certified, CrossEntropy, Linear, Logits, Multiply, Scale, SquareLoss, agd
from modula_agd.verify import rounding

STEPS_PER_RUN = 20


def _random_problem(seed: int):
    """A deep linear network of random shape, a third with biases, a fifth with a product, and a full batch."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    depth, widths = integer(1, 6), [integer(1, 9) for _ in range(7)]
    cross_entropy = seed % 2 == 0
    network = None
    for layer in range(depth):
        last = layer == depth - 1
        out = Logits(widths[layer + 1]) if cross_entropy and last else widths[layer + 1]
        part = Linear(out, widths[layer])
        if integer(1, 3) == 1:
            part = Bias(part.codomain) @ part
        if not last and integer(1, 5) == 1:
            part = Multiply() @ (part, Scale(part.codomain) @ part)
        network = part if network is None else part @ network
    assert network is not None
    scale = 10 ** float(torch.rand((), generator=generator) * 2 - 1)
    inputs = torch.randn(8, widths[0], generator=generator, dtype=torch.float64) * scale
    if cross_entropy:
        return network, CrossEntropy(), inputs, torch.randint(widths[depth], (8,), generator=generator)
    return network, SquareLoss(), inputs, torch.randn(8, widths[depth], generator=generator, dtype=torch.float64)


def _steps(seed: int) -> tuple[int, int, int]:
    """Number of steps, of rises, and of violations of the predicted decrease."""
    network, loss, inputs, targets = _random_problem(seed)
    method = agd(network, loss, search=Certified(), direction="spectral" if seed % 3 else "frobenius")
    params = network.init(seed, dtype=torch.float64)
    state = method.init(params)
    rises = violations = 0
    before = method.objective(params, inputs, targets)
    slack = rounding(torch.float64, 100)
    for _ in range(STEPS_PER_RUN):
        gradients = torch.func.grad(method.objective)(params, inputs, targets)
        updates, state = method.update(gradients, state, params, method.evidence(params, inputs, targets))
        params = {name: w + updates[name] for name, w in params.items()}
        after = method.objective(params, inputs, targets)
        assert math.isfinite(after)
        rises += bool(after > before * (1 + slack))
        violations += bool(after > before + state.change + before.abs() * slack)
        before = after
    return STEPS_PER_RUN, rises, violations


@pytest.mark.parametrize("quarter", range(4))
def test_ten_thousand_certified_steps_on_deep_linear_networks_never_raise_the_loss(quarter):
    results = [_steps(seed) for seed in range(125 * quarter, 125 * (quarter + 1))]
    assert tuple(map(sum, zip(*results, strict=True))) == (2_500, 0, 0)


def test_without_the_residual_term_and_tracking_some_of_these_steps_do_rise():
    """The control: the same problems under the closed form with prescribed sizes."""
    rises = 0
    for seed in range(40):
        network, loss, inputs, targets = _random_problem(seed)
        method = agd(network, loss)
        params = network.init(seed, dtype=torch.float64)
        state = method.init(params)
        before = method.objective(params, inputs, targets)
        for _ in range(STEPS_PER_RUN):
            gradients = torch.func.grad(method.objective)(params, inputs, targets)
            updates, state = method.update(gradients, state, params)
            params = {name: w + updates[name] for name, w in params.items()}
            after = method.objective(params, inputs, targets)
            rises += bool(after > before * (1 + 1e-12))
            before = after
    assert rises > 0
