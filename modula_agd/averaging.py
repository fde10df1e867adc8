"""Averaged weights to evaluate: an average whose window grows with the run, so that there is no window to tune.

A step whose size the noise of minibatches sets leaves the weights moving about; their average lies nearer to what they move
about. With weights that rise like the power ρ of the step's number (Shamir & Zhang 2013, arXiv:1212.1824),

    w̄_n = w̄_{n−1} + c_n·(w_n − w̄_{n−1}),        c_n = (ρ + 1)/(n + ρ),

about the last 1/(ρ + 1) of the steps counts, however many there have been.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from modula_agd.error import InvalidArgument
from modula_agd.polar import working_dtype
from modula_agd.space import brief, positive

POWER = 4.0
"""ρ: about the last fifth of a run counts. Chosen by losses in training and on a tenth of the training data that was held out of it
(docs/trials.md); Ivgi et al. 2023 (arXiv:2302.12022) have 8, the last ninth."""


Count = TypeVar("Count", float, Tensor)


def newest(count: Count, power: float = POWER) -> Count:
    """c_n of a polynomial average, of weights or of steps (``step_average.py``). Of a count on a device nothing is asked.

    Args:
        count: n ≥ 1.
        power: ρ ≥ 0.
    """
    return (power + 1) / (count + power)


def share(count: int) -> float:
    """c_n, what the newest weights count for; 1 for the first.

    Args:
        count: n ≥ 1, steps made so far.

    Raises:
        InvalidArgument: there have been no steps.
    """
    positive("the number of steps of an average", count)
    return newest(float(count))


def averaged(average: Mapping[str, Tensor] | None, params: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """w̄_n. Pure.

    Args:
        average: w̄_{n−1} by name; None before the first.
        params: w_n by name; running statistics may be among them.
        count: n ≥ 1.

    Returns:
        Tensors of each parameter's shape, half precision in float32; what is no floating-point number is taken as it is.

    Raises:
        InvalidArgument: the average is of other parameters.
    """
    if average is not None:
        shapes = [{name: tuple(x.shape) for name, x in tensors.items()} for tensors in (average, params)]
        if shapes[0] != shapes[1]:
            raise InvalidArgument(
                f"an average of {brief(shapes[0])} was to go on with {brief(shapes[1])}. Start a new one: averaged(None, ...)."
            )
    names = [name for name, value in params.items() if value.is_floating_point()]
    fresh = [params[name].detach().to(working_dtype(params[name].dtype)) for name in names]
    if average is None:
        means = [value.clone() for value in fresh]
    else:
        means = torch._foreach_lerp([average[name] for name in names], fresh, share(count))  # pyright: ignore
    return {**{name: value.detach().clone() for name, value in params.items()}, **dict(zip(names, means, strict=True))}


def average_(average: Mapping[str, Tensor], params: Mapping[str, Tensor], count: int | Tensor) -> None:
    """The same, written over ``average``: for an optimizer, which owns it. Of a count on the device nothing is asked."""
    names = [name for name, value in params.items() if value.is_floating_point()]
    fresh = [params[name].detach().to(average[name].dtype) for name in names]
    means = [average[name] for name in names]
    if names and isinstance(count, Tensor):
        steps = torch._foreach_sub(fresh, means)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(steps, newest(count.double()))  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(means, steps)  # pyright: ignore[reportPrivateImportUsage]
    elif names:
        torch._foreach_lerp_(means, fresh, share(int(count)))  # pyright: ignore
    for name in params.keys() - set(names):
        average[name].copy_(params[name])
