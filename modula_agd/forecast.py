"""Predicted against realised: whether the majorant is loose, or violated.

A step at which the majorant is minimal is predicted to lower the loss by at least −min M. What the loss then falls by, from one
batch to the next, is seen one step later, with the noise of both batches; means over many steps tell. The mean of differences is
nearly free of that noise, as each value enters it twice, with opposite signs. Where steps are relaxed or averaged, the step made is not
that minimiser: a longer one lowers the loss by less, and is called violated sooner.
"""

from typing import Any

import torch
from torch import Tensor

from modula_agd.norm import wide
from modula_agd.state import State

MEMORY = 0.99
"""Weight of the past in the means: about the last hundred steps."""


def forecast(state: State, value: Tensor | None) -> dict[str, Any]:
    """The new fields of the state.

    Args:
        state: before the update; its ``change`` is what the update before predicted.
        value: mean loss of this batch, at the weights to which that update led; None where it was not told.
    """
    if value is None:
        return {"loss": torch.full_like(state.loss, torch.inf)}
    now = wide(value.detach()).to(state.loss)
    fallen = state.loss - now
    share = (1 - MEMORY) * fallen.isfinite().to(now.dtype)
    fallen = torch.where(fallen.isfinite(), fallen, 0.0)
    return {
        "loss": now,
        "predicted": state.predicted.lerp(-state.change, share),
        "realised": state.realised.lerp(fallen, share),
        "wander": state.wander.lerp(fallen.square(), share),
        "told": state.told.lerp(torch.ones_like(state.told), share),
    }
