"""A step that is decided on and not yet made: for whoever multiplies it out, in the pure form or over an optimizer's own weights."""

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from modula_agd.directions import times
from modula_agd.many import cast
from modula_agd.norm import Direction
from modula_agd.state import Each, Scalar, State


class Move(NamedTuple):
    """A step before it is made.

    Args:
        directions: u_k of each parameter that moves.
        gradients: its gradient.
        names: of all parameters, in the network's order.
        amounts: −t·x_k·p_k·m_k·ω_k of each parameter, times the stride of rows into logits.
        shares: s_k of each parameter, the part of it that decays (``decay.py``), above 1 all of it; None without decay.
        finite: False where nothing may move; None where that has been looked at.
        unsure: the names of directions that may be NaN where ``finite`` is False: of the others the past is finite, and the norm's
            direction with it.
        state: the new state, but for momentum and lead, and with the new directions even where ``finite`` is False.
    """

    directions: dict[str, Direction]
    gradients: dict[str, Tensor]
    names: tuple[str, ...]
    amounts: Each
    shares: Each | None
    finite: Bool[Tensor, ""] | None
    unsure: frozenset[str]
    state: State

    def factors(
        self, multipliers: Each | None = None, allowed: Bool[Tensor, ""] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Scalar]]:
        """What the base of each direction is multiplied with, in its dtype, and the part of each weight that decays, 1 at most.

        Args:
            multipliers: of each parameter's step; 1 without.
            allowed: where False, all is 0.
        """
        amounts, shares = self.amounts, self.shares
        if multipliers is not None:
            amounts, shares = amounts * multipliers, None if shares is None else shares * multipliers
        # no weight passes through 0
        shares = None if shares is None else shares.clamp(max=1.0)
        if allowed is not None:
            amounts = torch.where(allowed, amounts, 0.0)
            shares = None if shares is None else torch.where(allowed, shares, 0.0)
        factors = times(self.directions, dict(zip(self.names, amounts.unbind(), strict=True)))
        decays = {} if shares is None else dict(zip(self.names, shares.unbind(), strict=True))
        return cast(factors, {name: direction.base.dtype for name, direction in self.directions.items()}), decays
