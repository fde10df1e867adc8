"""Predicted against realised: whether the majorant is loose, or violated.

A step t is predicted to lower the loss by at least −M(t), which is below 0 where it is longer than about twice the majorant's
minimiser, as a mean of steps may be. What the loss then falls by, from one batch to the next, is seen one step later, with the noise of
both batches; means over many steps tell. The mean of differences is nearly free of that noise, as each value enters it twice, with
opposite signs.
"""

from typing import Any

import torch
from torch import Tensor

from modula_agd.many import is_finite
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
    known = is_finite(fallen) & is_finite(state.change)
    share = (1 - MEMORY) * known.to(now.dtype)
    fallen, change = torch.where(known, fallen, 0.0), torch.where(known, state.change, 0.0)
    return {
        "loss": now,
        "predicted": state.predicted.lerp(-change, share),
        "realised": state.realised.lerp(fallen, share),
        "wander": state.wander.lerp(fallen.square(), share),
        "told": state.told.lerp(torch.ones_like(state.told), share),
    }
