"""What an optimisation method remembers between two updates: tensors only."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Scalar = Float[Tensor, ""]
Each = Float[Tensor, " parameters"]


class State(NamedTuple):
    """What the last update did; tensors only. Numbers are in double precision on the parameters' device, counts of steps integers.

    Args:
        eta: η, relative step of the whole network, dimensionless.
        t: relative step of an atom of mass 1 and portion 1, dimensionless.
        descent: S, first-order decrease of the loss per unit t.
        change: what the majorant predicted the loss to change by at most, stretches and the optimizer's multiplier not counted in. At its
            own minimiser ≤ 0; above where relaxed or averaged steps go too far for it.
        magnitude: a, bound of the output.
        depth: D.
        descents: ⟨g_k, u_k⟩ of each parameter, in the network's order; 0 without a gradient.
        sizes: ω_k of each parameter.
        steps: number of updates.
        skipped: number of them left out because of a non-finite gradient.
        smoothed: Ŝ times ``weight``; 0 without momentum, as are the next two.
        scale: the mean of s² times ``weight``.
        weight: 1 − β^n after n measurements, the sum of what they weigh.
        clock: number of updates, on the CPU: which directions are due is known without asking the device.
        loss: value of the loss at the last update that was told it; infinite before, and after one that was not.
        predicted: mean of what the majorant predicted the loss to fall by, times ``told``; 0 where no loss was told.
        realised: mean of what the loss then fell by, from one batch to the next, times ``told``.
        wander: mean square of that, times ``told``.
        told: the sum of what these three weigh.
        due: slope that the declared curvature at t = 0 expects the last step to use up; 0 where it was left out. Stretches and the
            optimizer's multiplier are counted in.
        fallen: mean of the slope that steps did use up; 0 where curvature is not measured, as is the next.
        expected: mean of ``due``.
        asked: mean of the steps that majorants asked for; 0 where steps are not averaged, as are the next two.
        recent: mean of the last fifty or so, in a long run of the last fifth of it.
        majorants: number of steps that these two hold.
        portions: p_k of each parameter: its step relative to one of equal steps.
        stretches: x_k of each parameter: how many times as far it went as its portion of the step (``stretch.py``).
        foreseen: slope that steps before the last foresaw along each parameter's way from its average; 0 where there is none.
        slopes: what the last step foresaw of it, the optimizer's multiplier not counted in; 0 where it was left out.
        rates: what the optimizer multiplied the last step of each parameter with, ≥ 0; 1 in the pure form.
        gained: mean of m_k·ω_k·⟨g_k, u_k⟩ of each parameter, times ``counted``; 0 where the balance is not measured, as are the next two.
        used: mean of what a step then used up of it, times ``counted``.
        counted: the sum of what these two weigh.
        powers: mean of ‖g_r‖² of each row, times ``power_weights``; of the weights whose rows go by their signal, one after the other,
            as are the next two.
        power_weights: the sum of what these weigh.
        mean_weights: the sum of what the momentum's gradients weigh that said something of the row.
        momentum: m of each parameter that has had a gradient; empty without momentum.
        lead: l of the same, which the next direction is made of; bfloat16 but for double precision, or where full was asked for.
        directions: u of each parameter at the last step, kept where it serves further steps, or (as short as the lead) where
            curvature or balance is measured along it; else empty.
    """

    eta: Scalar
    t: Scalar
    descent: Scalar
    change: Scalar
    magnitude: Scalar
    depth: Scalar
    descents: Float[Tensor, " parameters"]
    sizes: Float[Tensor, " parameters"]
    steps: Int[Tensor, ""]
    skipped: Int[Tensor, ""]
    smoothed: Scalar
    scale: Scalar
    weight: Scalar
    clock: Int[Tensor, ""]
    loss: Scalar
    predicted: Scalar
    realised: Scalar
    wander: Scalar
    told: Scalar
    due: Scalar
    fallen: Scalar
    expected: Scalar
    asked: Scalar
    recent: Scalar
    majorants: Scalar
    portions: Float[Tensor, " parameters"]
    stretches: Float[Tensor, " parameters"]
    foreseen: Float[Tensor, " parameters"]
    slopes: Float[Tensor, " parameters"]
    rates: Float[Tensor, " parameters"]
    gained: Float[Tensor, " parameters"]
    used: Float[Tensor, " parameters"]
    counted: Float[Tensor, " parameters"]
    powers: Float[Tensor, " rows"]
    power_weights: Float[Tensor, " rows"]
    mean_weights: Float[Tensor, " rows"]
    momentum: dict[str, Tensor]
    lead: dict[str, Tensor]
    directions: dict[str, Tensor]


WEIGHT_SIZED = ("momentum", "lead", "directions")
"""The fields that hold a tensor for each of some parameters."""
WAYS = ("foreseen", "slopes")
"""The fields that tell of each parameter's way from its average; 0 where none is behind it."""


_NEVER_NEGATIVE = (
    "steps",
    "skipped",
    "scale",
    "weight",
    "clock",
    "wander",
    "told",
    "due",
    "expected",
    "asked",
    "recent",
    "majorants",
    "portions",
    "stretches",
    "rates",
    "counted",
    "powers",
    "power_weights",
    "mean_weights",
)
_FINITE = (*_NEVER_NEGATIVE, "smoothed", "predicted", "realised", "fallen", "gained", "used", *WAYS)


def complaint(found: Mapping[str, object], like: State) -> str | None:
    """Why saved fields are no state such as ``like``, as a clause; None where they are. Waits for the device.

    Args:
        found: what was saved, by name of the field; what is weight-sized is not looked at.
        like: a state of the method that shall go on.
    """
    for name, here in like._asdict().items():
        value = found.get(name)
        if name in WEIGHT_SIZED:
            continue
        if not isinstance(value, Tensor) or value.shape != here.shape:
            what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            return f"its {name} is {what}, where a tensor of shape {tuple(here.shape)} belongs"
        if value.is_floating_point() != here.is_floating_point() or value.is_complex():
            return f"its {name} is of {value.dtype}, where {here.dtype} belongs"
        # of the others, a skipped step may rightly have left NaN
        if name in _FINITE and not bool(value.isfinite().all()):
            return f"its {name} is {_told(value)}"
        if name in _NEVER_NEGATIVE and bool((value < 0).any()):
            return f"its {name} is {_told(value)}, which is never negative"
    steps, skipped = found["steps"], found["skipped"]
    if isinstance(steps, Tensor) and isinstance(skipped, Tensor) and bool(skipped > steps):
        return f"of its {_told(steps)} steps {_told(skipped)} were left out"
    return None


def _told(value: Tensor) -> str:
    """The numbers, or the first of many."""
    numbers = value.flatten().tolist()
    return str(value.tolist()) if len(numbers) <= 32 else f"{numbers[:8]} and {len(numbers) - 8} more"


def odd_tensors(what: str, tensors: object, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why something does not hold tensors of these shapes, as a clause; None where it does. Waits for nothing.

    Args:
        what: "momentum", for the clause.
        tensors: what should hold a tensor for some of the parameters, by name.
        shapes: of the parameters by name.
    """
    if not isinstance(tensors, Mapping):
        return f"its {what} is {type(tensors).__name__}, where a dictionary of tensors belongs"
    for name, value in tensors.items():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != shapes.get(name):
            return f"its {what} of {name!r} is {shape}, where the parameter has {shapes.get(name, 'no such name')}"
        if value.layout != torch.strided or not value.is_floating_point() or value.is_meta:
            kind = "without values" if value.is_meta else f"{value.layout} of {value.dtype}"
            return f"its {what} of {name!r} is {kind}, where a dense floating-point tensor belongs"
    return None


def not_finite(what: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Which of these tensors hold NaN or infinity, as a clause; None where none does. Waits for the device."""
    bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    return f"its {what} of {', '.join(map(repr, bad))} holds NaN or infinity" if bad else None
