"""What the unit tests share: one rounding tolerance, seeded draws, matrices with chosen singular values."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from modula_agd import AGD, Loss, Method, Module, State, agd
from modula_agd.averaging import averaged
from modula_agd.polar import working_dtype
from modula_agd.verify.tolerance import rounding

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def tolerance(dtype: torch.dtype, size: int = 1) -> float:
    """Relative slack for a result that ``size`` roundings entered; half precision is computed in float32, rounded once."""
    return torch.finfo(dtype).eps + rounding(working_dtype(dtype), size)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def batch(seed: int, samples: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs of four features and targets of three, [samples, 4] and [samples, 3]."""
    return gaussian(samples, 4, seed=seed), gaussian(samples, 3, seed=seed + 1000)


def gradients(method: Method, params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Of the mean loss of a batch, by name."""
    return torch.func.grad(method.objective)(params, inputs, targets)


def assert_steps_of_the_pure_form(
    optimizer: AGD, model: nn.Module, method: Method, grads: Callable[..., Any], steps: int
) -> State:
    """Let an optimizer and the pure form of its method step side by side, compare the weights, and return the pure form's state.

    Args:
        optimizer: of the model.
        model: with the method's parameters.
        method: what the optimizer should do.
        grads: gradients by name, of the weights by name and the number of the step.
        steps: number of steps.
    """
    params = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    state, average = method.init(params), None
    for step in range(steps):
        found = grads(params, step)
        for name, parameter in model.named_parameters():
            parameter.grad = found[name].clone()
        optimizer.step()
        updates, state = method.update(found, state, params, average=average)
        params = {name: weight + updates[name] for name, weight in params.items()}
        average = averaged(average, params, step + 1) if optimizer.averaging else None
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), params[name])
    return state


def with_singular_values(values: Tensor, rows: int, cols: int, seed: int = 0) -> Tensor:
    """U diag(values) Vᵀ of shape [rows, cols] with random orthogonal factors."""
    count = values.numel()
    u = torch.linalg.qr(gaussian(rows, count, seed=seed))[0]
    v = torch.linalg.qr(gaussian(cols, count, seed=seed + 1))[0]
    return (u * values.double()) @ v.mT


def trained(network: Module, loss: Loss, x: Any, y: Tensor, steps: int = 30, **options: Any) -> tuple[float, float]:
    """The loss of a batch before and after so many steps of ``agd`` on it, in float64."""
    method = agd(network, loss, **options)
    params = network.init(0, dtype=torch.float64)
    state = method.init(params)
    values = []
    for step in range(steps + 1):
        # one mask of dropout throughout, so that values compare
        grads, value = torch.func.grad_and_value(lambda p: method.objective(p, x, y, seeded()))(params)
        values.append(float(value))
        if step < steps:
            updates, state = method.update(grads, state, params)
            params = {name: weight + updates[name] for name, weight in params.items()}
    return values[0], values[-1]


def central(function: Callable[[Tensor], Tensor], x: Tensor, along: Tensor, step: float = 1e-6) -> float:
    """The derivative of a number at x along a direction, by a central difference."""
    return float((function(x + step * along) - function(x - step * along)) / (2 * step))


def same(x: Any, y: Any) -> bool:
    """Whether nested tensors and plain values are alike, bit for bit and dtype for dtype, whatever the order of keys."""
    first, second = (dict(tree_flatten_with_path(value)[0]) for value in (x, y))
    return first.keys() == second.keys() and all(
        torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in ((value, second[path]) for path, value in first.items())
    )
