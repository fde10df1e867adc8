"""Where the parts of a weight lie, and which rank makes which direction.

Every rank holds one box of a weight: all of it where the weight is replicated, some rows where it is sharded on dimension 0, a
block where two dimensions are sharded. Several ranks may hold the same box.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from modula_agd.norm import Norm


class Box(NamedTuple):
    """A box of a tensor.

    Args:
        offset: its first index in each dimension.
        shape: its extent in each.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """What indexes the whole tensor."""
        return tuple(slice(start, start + extent) for start, extent in zip(self.offset, self.shape, strict=True))

    @property
    def entries(self) -> int:
        """How many entries it has; of no dimension, one."""
        return math.prod(self.shape)


class Split(NamedTuple):
    """One way in which a tensor is split: along a dimension, into parts that are as long as the first, but for the last ones.

    Args:
        dim: which dimension; None where every rank has all of it.
        parts: how many ranks share it.
        part: which of them.
    """

    dim: int | None
    parts: int
    part: int


def box(shape: tuple[int, ...], splits: Sequence[Split]) -> Box:
    """What is left of a tensor of this shape after each of the splits, in order."""
    offset, extent = [0] * len(shape), list(shape)
    for dim, parts, part in splits:
        if dim is None:
            continue
        length = -(-extent[dim] // parts)
        start = min(part * length, extent[dim])
        offset[dim] += start
        extent[dim] = min(length, extent[dim] - start)
    return Box(tuple(offset), tuple(extent))


@dataclass(frozen=True)
class Layout:
    """Where a weight lies.

    Args:
        shape: of the whole weight.
        boxes: what each rank holds.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @property
    def replicated(self) -> bool:
        """Whether every rank holds all of it."""
        return all(held.shape == self.shape for held in self.boxes)

    def first(self, rank: int) -> bool:
        """Whether no rank before this one holds the same box, so that sums over ranks count it once."""
        return self.boxes.index(self.boxes[rank]) == rank

    def senders(self, owner: int) -> tuple[int, ...]:
        """Ranks whose boxes together are the weight, each part once; the owner's own box comes from itself."""
        holder: dict[Box, int] = {self.boxes[owner]: owner}
        for rank, held in enumerate(self.boxes):
            holder.setdefault(held, rank)
        return tuple(sorted(rank for held, rank in holder.items() if held.entries > 0))

    def whole(self, dims: Sequence[int]) -> bool:
        """Whether every rank's box extends over the whole of these dimensions; boxes without entries do."""
        return all(held.entries == 0 or all(held.shape[dim] == self.shape[dim] for dim in dims) for held in self.boxes)


def cost(norm: Norm, shape: tuple[int, ...]) -> float:
    """Multiplications that a direction takes: about 18·min(o, i) for each entry of a matrix [o, i], and one for each entry."""
    matrices = norm.matrices(torch.empty(shape, device="meta"))
    return float(math.prod(shape) + sum(18 * matrix.numel() * min(matrix.shape[-2:]) for matrix in matrices))


def owners(costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """Who makes what: the dearest first, each to the rank that has least to do.

    Args:
        costs: by name.
        ranks: how many there are.
    """
    loads = [(0.0, rank) for rank in range(ranks)]
    found: dict[str, int] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        load, rank = heapq.heappop(loads)
        found[name] = rank
        heapq.heappush(loads, (load + costs[name], rank))
    return {name: found[name] for name in costs}
