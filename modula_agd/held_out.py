"""The held-out rule: directions from past gradients, descent measured by the fresh one.

On a minibatch, ⟨g, u(g)⟩ counts noise as descent: a gradient always agrees with a direction made from itself. With
momentum β the direction is made of *past* gradients, and the *fresh* one, which it has not seen, measures the descent at
the same point:

    u_t = direction of m_{t−1}          s_t = Σ_k p_k·m_k·ω_k·⟨g_t, u_t⟩      Ŝ_t = mean of s_1 … s_t, with weights β_s^(t−i)
    m_t = β·m_{t−1} + (1 − β)·g_t       t = argmin of the majorant at max(Ŝ_t, 0)

The expectation of s_t over the fresh batch is the true descent along u_t. As signal drowns in noise Ŝ → 0, and the step with it.
One wild measurement must not set the steps of the next twenty: an s_t beyond ``OUTLIER`` root-mean-squares of those before it
counts as that many. Where weights had outgrown their declared sizes, loss and step drove each other up without; so the mean of
measurements rises by at most 6% a step at β_s = 0.95, and a tenfold rise takes forty.

Of the same measurements follows how far beyond the minimiser a step may go. By a quadratic, twice the minimiser is the longest step
that does not raise the loss; live weights are then no better for it, but their average is, about which they move. So a step goes
(2 − q) minimisers, with

    q = Ŝ²/mean of s²

which is 1 where descents are all alike, and the step the majorant's own; it tends to 0 where they come to nothing in the mean, by
the noise of batches or as weights go back and forth across a valley.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from modula_agd.polar import working_dtype
from modula_agd.state import Scalar, State

OUTLIER = 1.5
"""Root-mean-squares from which a measured descent is cut, chosen by training losses (docs/benchmarks.md). Above 1, or pure noise
would wear the mean down to 0."""


def measured(descent: Scalar, state: State, smoothing: float | None) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """The descent to reckon with, and the state's ``smoothed``, ``scale`` and ``weight`` with the fresh measurement counted in.

    Args:
        descent: s_t, finite; 0 where there is nothing to measure (a zero gradient, a skipped batch), which counts in no mean.
        state: before the update.
        smoothing: β_s; None takes the descent as it is.

    Returns:
        Ŝ_t (0 where s_t is 0: a zero gradient means a zero step, whatever the past says), smoothed, scale, weight.
    """
    smoothed, scale, weight = state.smoothed, state.scale, state.weight
    if smoothing is None:
        return descent, smoothed, scale, weight
    share = (1 - smoothing) * (descent != 0).to(descent.dtype)
    bound = torch.where(weight > 0, OUTLIER * (scale / weight.clamp(min=1e-12)).sqrt(), torch.inf)
    cut = torch.minimum(torch.maximum(descent, -bound), bound)
    smoothed, scale = smoothed.lerp(cut, share), scale.lerp(cut.square(), share)
    weight = weight.lerp(torch.ones_like(weight), share)
    return torch.where(descent == 0, 0.0, smoothed / weight.clamp(min=1e-12)), smoothed, scale, weight


def steadiness(smoothed: Scalar, scale: Scalar, weight: Scalar) -> Scalar:
    """q, the share of the descents' mean square that their mean has: 1 where they are all alike, 0 where they come to nothing.

    Args:
        smoothed: as ``measured`` returned it, as are the next two.
        scale: the mean square times ``weight``.
        weight: the sum of what has been measured.
    """
    known = scale > 0
    mean = smoothed.clamp(min=0.0).square()
    return torch.where(known, mean / torch.where(known, scale * weight, 1.0), 1.0).clamp(max=1.0)


def begun(past: Tensor, gradient: Tensor, started: Bool[Tensor, ""]) -> Tensor:
    """The momentum, or the gradient where every gradient before was left out, so that the momentum has not started."""
    return torch.where(started, past, gradient.to(past.dtype))


def renewed(
    past: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    share: float,
    finite: Bool[Tensor, ""] | None,
    *,
    in_place: bool = False,
    started: Mapping[str, Bool[Tensor, ""]] | None = None,
) -> dict[str, Tensor]:
    """m_t of each parameter; its first gradient is its momentum.

    Args:
        past: m_{t−1} by name.
        grads: the fresh gradients by name, detached.
        share: 1 − β, what the fresh gradient counts for.
        finite: where False, the past is kept; None where that has been looked at.
        in_place: write over ``past``, for an optimizer that owns it.
        started: where gradients may have been left out before, whether a momentum is other than 0: otherwise it has not begun.
    """
    fresh = {name: gradient.to(working_dtype(gradient.dtype)) for name, gradient in grads.items()}
    if finite is not None:
        still = {name: past[name] if name in past else torch.zeros_like(value) for name, value in fresh.items()}
        fresh = {name: torch.where(finite, value, still[name].to(value)) for name, value in fresh.items()}
    known = [name for name in fresh if name in past]
    # a copy: the caller may clear gradients in place
    moved = dict(past) | {name: value.clone() for name, value in fresh.items() if name not in past}
    if known:
        new = [fresh[name] for name in known]
        # parameters may have been moved to another dtype since
        old = [past[name].to(value.dtype) for name, value in zip(known, new, strict=True)]
        if started is not None:
            flags = [started[name] for name in known]
            ours = [begun(*three) for three in zip(old, new, flags, strict=True)]
            old = [before.copy_(x) for before, x in zip(old, ours, strict=True)] if in_place else ours
        # one kernel for all parameters, as in torch's own optimizers
        if in_place:
            torch._foreach_lerp_(old, new, share)  # pyright: ignore[reportPrivateImportUsage]
        else:
            old = torch._foreach_lerp(old, new, share)  # pyright: ignore[reportPrivateImportUsage]
        moved |= dict(zip(known, old, strict=True))
    return moved
