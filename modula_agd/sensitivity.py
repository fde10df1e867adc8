"""Sensitivity: what a network's bound owes to each of its weights.

As many networks are asked at once as there are weights, with batched numbers in the place of sizes or masses.
"""

import math
from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from modula_agd.bound import Number
from modula_agd.network import Network

SAME = 1.001
"""Magnitudes within this factor are the same, but for rounding."""


def depths(network: Network, masses: Mapping[str, float], **options: Any) -> dict[str, float]:
    """m_k·d_k of each weight: its part of the depth D = Σ_k m_k·d_k, which is linear in the masses.

    Args:
        network: of those weights.
        masses: m_k by name.
        options: of ``Network.bound``.
    """
    # each network has the mass of one weight alone
    rows = torch.diag(torch.tensor(list(masses.values()), dtype=torch.float64))
    found = _of_each(masses, rows, lambda alone: network.massed(alone).bound(0.0, **options).depth)
    return dict(zip(masses, found.tolist(), strict=True))


def compounding(
    network: Network, sizes: Mapping[str, float], vectors: Set[str] = frozenset(), **options: Any
) -> Bool[Tensor, " weights"]:
    """Whether outputs are declared to grow with each weight, and with others at once: twice all sizes are more than twice the outputs.

    Args:
        network: of those weights.
        sizes: ω_k by name; large, where outputs count for more than they come to at first.
        vectors: biases and gains, which are not counted among all.
        options: of ``Network.bound``.
    """

    def outputs(sizes: Mapping[str, Any]) -> Number:
        return network.bound(0.0, sizes=sizes, **options).magnitude

    declared = torch.tensor(list(sizes.values()), dtype=torch.float64)
    more = {name: size if name in vectors else 2 * size for name, size in sizes.items()}
    once, twice = float(outputs(sizes)), float(outputs(more))
    if math.isinf(twice):
        return torch.ones_like(declared, dtype=torch.bool)
    # each network has one weight of twice its size
    grow = _of_each(sizes, declared * (1 + torch.eye(len(declared), dtype=torch.float64)), outputs) > SAME * once
    return grow & (twice > 2 * SAME * once)


def _of_each(
    names: Mapping[str, Any], rows: Float[Tensor, "weights weights"], fact: Callable[[Mapping[str, Any]], Number]
) -> Float[Tensor, " weights"]:
    """A fact of each network, row k with the numbers of the k-th."""
    try:
        return torch.as_tensor(fact(dict(zip(names, rows.unbind(1), strict=True)))).expand(len(rows))
    except (RuntimeError, TypeError, ValueError):
        # a user's rule may want numbers, for max() or an if
        return torch.tensor([float(fact(dict(zip(names, row, strict=True)))) for row in rows.tolist()])
