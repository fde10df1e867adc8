"""Many processes: each direction is made once, on one rank, and the ranks exchange what they lack.

A matrix's polar factor needs the whole matrix and is the dear part of a step, so for each step the matrices that are due are dealt
out among the ranks by cost. An owner receives the boxes of its matrices from the ranks that hold them (one all-to-all), takes the
polar factors, and gives every rank its box back (another). Matrices that every rank holds anyhow, as with plain data parallelism, need
no collecting, and their directions are broadcast. What can be told row by row or from sums of squares is not collected at all. The
descents are added up in one all-reduce, and so every rank derives the same η.

All ranks must do the same things in the same order: step, with gradients of the same parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modula_agd.device import precise
from modula_agd.directions import directions
from modula_agd.exchange import Exchange
from modula_agd.majorisation import Evidence
from modula_agd.norm import BlockNorm, Direction, Norm, Sign, wide
from modula_agd.polar import working_dtype
from modula_agd.rescale import divided, peaks
from modula_agd.shards import Box, Layout, cost, owners


class ManyRanks(Exchange):
    """The ranks of a process group.

    Args:
        group: the ranks.
        layouts: where each weight lies, by name; the ranks counted as in the group.
        share: whether one rank makes the direction of a matrix that all hold, or each for itself.
    """

    def __init__(self, group: dist.ProcessGroup, layouts: Mapping[str, Layout], *, share: bool = True) -> None:
        self.group, self.share = group, share
        self.layouts = dict(layouts)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._spread = not all(layout.replicated for layout in layouts.values())
        self._counts = [float(layout.first(self.rank)) for layout in layouts.values()]
        self._owners: dict[tuple[str, ...], dict[str, int]] = {}
        self._senders: dict[tuple[str, int], tuple[int, ...]] = {}

    def _box(self, name: str) -> Box:
        return self.layouts[name].boxes[self.rank]

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self._box(name).shape

    # -- what the engine asks --------------------------------------------------------------------------------------------

    def directions(
        self, norms: Mapping[str, Norm], sources: Mapping[str, Tensor], *, half: bool = False
    ) -> dict[str, Direction]:
        here, blockwise, owned = {}, {}, {}
        for name, source in sources.items():
            norm, layout = norms[name], self.layouts[name]
            if isinstance(norm, Sign) or (layout.replicated and not (self.share and norm.matrices(source))):
                here[name] = source
            elif isinstance(norm, BlockNorm):
                blockwise[name] = source
            else:
                owned[name] = source
        found = directions(norms, here, half=half) | self._blockwise(norms, blockwise) | self._owned(norms, owned, half)
        return {name: found[name] for name in sources}

    def seen(self, found: Mapping[str, Direction], gradients: Mapping[str, Tensor]) -> dict[str, Direction]:
        counts = {
            name: gradients[name].flatten(1).count_nonzero(1) for name, direction in found.items() if direction.by_rows
        }
        cut = [name for name in counts if not self.layouts[name].whole(range(1, len(self.layouts[name].shape)))]
        counts |= self._reduced({name: (counts[name], (0,)) for name in cut}, dist.ReduceOp.SUM)
        masked = dict(found)
        for name, count in counts.items():
            base, factor = found[name]
            factor = torch.as_tensor(factor)
            masked[name] = Direction(base, factor * (count.reshape(factor.shape) > 0))
        return masked

    def row_squares(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = super().row_squares(tensors)
        spread = {name: (x, (0,)) for name, x in found.items() if not self.layouts[name].replicated}
        return found | {name: whole for name, (whole, _) in self._summed(spread, dist.ReduceOp.SUM).items()}

    def held_rows(self, name: str, rows: Tensor) -> Tensor:
        return rows[self._box(name).slices[0]]

    def total(self, parts: Tensor) -> Tensor:
        if not self._spread:
            return parts
        parts = parts * parts.new_tensor(self._counts)
        dist.all_reduce(parts, group=self.group)
        return parts

    def numbers(
        self, ask: Callable[[Norm, Tensor], Tensor], norms: Mapping[str, Norm], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Each asked by its owner alone, where tensors are spread."""
        if not (self._spread and tensors):
            return super().numbers(ask, norms, tensors)
        whole = self._collected(
            {name: tensor.detach() for name, tensor in tensors.items()}, self._dealt(norms, tuple(tensors))
        )
        device = next(iter(tensors.values())).device
        zero = torch.zeros((), device=device, dtype=precise(device))
        found = torch.stack([wide(ask(norms[name], whole[name])) if name in whole else zero for name in tensors])
        dist.all_reduce(found, group=self.group)
        return dict(zip(tensors, found.unbind(), strict=True))

    def evidence(self, evidence: Evidence) -> Evidence:
        """The largest of each: a residual in the mean is no larger than the largest of those that it is the mean of."""
        residual, magnitude = evidence
        both = torch.stack([residual.detach(), magnitude.detach().to(residual)])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        return Evidence(*both.unbind())

    def nonzero(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = super().nonzero(tensors)
        if not (self._spread and tensors):
            return found
        flags = torch.stack(list(found.values())).to(torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return dict(zip(tensors, (flags > 0).unbind(), strict=True))

    def means(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for names in _by_dtype(tuple(tensors), tensors).values():
            total = torch.cat([tensors[name].detach().flatten() for name in names])
            dist.all_reduce(total, group=self.group)
            parts = (total / self.size).split([tensors[name].numel() for name in names])
            found |= {name: part.view(tensors[name].shape) for name, part in zip(names, parts, strict=True)}
        return {name: found[name] for name in tensors}

    # -- directions that take no matrix ----------------------------------------------------------------------------------

    def _blockwise(self, norms: Mapping[str, Norm], sources: Mapping[str, Tensor]) -> dict[str, Direction]:
        """Each block divided by its Euclidean norm; of a block that lies on several ranks, its peak and squares are reduced."""
        full = {name: source.to(working_dtype(source.dtype)) for name, source in sources.items()}
        dims = {name: _dims(norms[name], self.layouts[name].shape) for name in full}
        kept = {name: tuple(d for d in range(x.ndim) if d not in dims[name]) for name, x in full.items()}
        cut = [name for name in full if not self.layouts[name].whole(dims[name])]
        peak = {name: peaks(x, dims[name]) for name, x in full.items()}
        peak |= self._reduced({name: (peak[name], kept[name]) for name in cut}, dist.ReduceOp.MAX)
        scaled = {name: divided(x, peak[name]) for name, x in full.items()}
        squares = {name: x.square().sum(dims[name], keepdim=True) for name, x in scaled.items()}
        squares |= self._reduced({name: (squares[name], kept[name]) for name in cut}, dist.ReduceOp.SUM)
        found = {}
        for name, x in scaled.items():
            norm, shape = norms[name], self.layouts[name].shape
            length = squares[name].sqrt()
            factor = 1 / (length.masked_fill(length == 0, 1.0) * norm.factor(torch.Size(shape)))  # pyright: ignore
            # as the norm itself does: one number for all, one for each row, or multiplied out
            if not kept[name]:
                found[name] = Direction(x, factor.reshape(()))
            elif kept[name] == (0,):
                found[name] = Direction(x, factor)
            else:
                found[name] = Direction(x * factor)
        return found

    def _reduced(self, parts: Mapping[str, tuple[Tensor, tuple[int, ...]]], op: Any) -> dict[str, Tensor]:
        """Numbers of blocks, each block lying on several ranks, reduced over the ranks that hold a part of it.

        Args:
            parts: by name, what this rank found for its part of each block, and the dimensions that count blocks.
            op: SUM, or MAX of numbers ≥ 0.
        """
        return {
            name: whole[places].reshape(parts[name][0].shape)
            for name, (whole, places) in self._summed(parts, op).items()
        }

    def _summed(
        self, parts: Mapping[str, tuple[Tensor, tuple[int, ...]]], op: Any
    ) -> dict[str, tuple[Tensor, tuple[slice, ...]]]:
        """What ``_reduced`` finds of all blocks of each, and which of them this rank holds parts of."""
        if not parts:
            return {}
        flat, places = [], {}
        for name, (part, kept) in parts.items():
            layout, held = self.layouts[name], self._box(name)
            whole = part.new_zeros([layout.shape[dim] for dim in kept])
            places[name] = tuple(held.slices[dim] for dim in kept)
            if held.entries > 0 and (op != dist.ReduceOp.SUM or layout.first(self.rank)):
                whole[places[name]] = part.reshape(whole[places[name]].shape)
            flat.append(whole)
        dtype = torch.promote_types(flat[0].dtype, torch.float32)
        for whole in flat:
            dtype = torch.promote_types(dtype, whole.dtype)
        joined = torch.cat([whole.flatten().to(dtype) for whole in flat])
        dist.all_reduce(joined, op, group=self.group)
        split = joined.split([whole.numel() for whole in flat])
        return {
            name: (sums.view(whole.shape).to(whole.dtype), places[name])
            for name, sums, whole in zip(parts, split, flat, strict=True)
        }

    # -- directions that take whole matrices -----------------------------------------------------------------------------

    def _owned(self, norms: Mapping[str, Norm], sources: Mapping[str, Tensor], half: bool) -> dict[str, Direction]:
        """Each made by its owner alone."""
        owner = self._dealt(norms, tuple(sources))
        whole = self._collected(sources, owner)
        mine = {name: made.dense() for name, made in directions(norms, whole, half=half).items()}
        replicated = [name for name in sources if self.layouts[name].replicated]
        spread = [name for name in sources if not self.layouts[name].replicated]
        held = self._broadcast(replicated, sources, mine, owner) | self._handed_out(spread, sources, mine, owner)
        return {name: Direction(value) for name, value in held.items()}

    def _dealt(self, norms: Mapping[str, Norm], names: tuple[str, ...]) -> dict[str, int]:
        if names not in self._owners:
            costs = {name: cost(norms[name], self.layouts[name].shape) for name in names}
            self._owners[names] = owners(costs, self.size)
        return self._owners[names]

    def _sources(self, name: str, owner: int) -> tuple[int, ...]:
        if (name, owner) not in self._senders:
            self._senders[name, owner] = self.layouts[name].senders(owner)
        return self._senders[name, owner]

    def _collected(self, sources: Mapping[str, Tensor], owner: Mapping[str, int]) -> dict[str, Tensor]:
        """The whole of each tensor that this rank owns."""
        whole = {name: x for name, x in sources.items() if owner[name] == self.rank and self.layouts[name].replicated}
        spread = [name for name in sources if not self.layouts[name].replicated]
        for dtype, names in _by_dtype(spread, sources).items():
            outgoing: list[list[Tensor]] = [[] for _ in range(self.size)]
            incoming: list[list[str]] = [[] for _ in range(self.size)]
            for name in names:
                if self.rank in self._sources(name, owner[name]):
                    outgoing[owner[name]].append(sources[name].flatten())
                if owner[name] == self.rank:
                    whole[name] = sources[name].new_empty(self.layouts[name].shape)
                    for sender in self._sources(name, self.rank):
                        incoming[sender].append(name)
            lengths = [[self.layouts[name].boxes[r].entries for name in from_r] for r, from_r in enumerate(incoming)]
            for sender, pieces in enumerate(self._all_to_all(outgoing, lengths, dtype, sources[names[0]].device)):
                for name, piece in zip(incoming[sender], pieces, strict=True):
                    box = self.layouts[name].boxes[sender]
                    whole[name][box.slices] = piece.view(box.shape)
        # in the order in which all ranks name them
        return {name: whole[name] for name in sources if name in whole}

    def _handed_out(
        self, names: Sequence[str], like: Mapping[str, Tensor], mine: Mapping[str, Tensor], owner: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """This rank's box of each tensor, which its owner has whole."""
        found = {}
        for dtype, alike in _by_dtype(names, like).items():
            outgoing = [
                [mine[name][self.layouts[name].boxes[rank].slices].flatten() for name in alike if name in mine]
                for rank in range(self.size)
            ]
            incoming = [[name for name in alike if owner[name] == rank] for rank in range(self.size)]
            lengths = [[self._box(name).entries for name in from_rank] for from_rank in incoming]
            for sender, pieces in enumerate(self._all_to_all(outgoing, lengths, dtype, like[alike[0]].device)):
                for name, piece in zip(incoming[sender], pieces, strict=True):
                    found[name] = piece.view(self._box(name).shape)
        return found

    def _broadcast(
        self, names: Sequence[str], like: Mapping[str, Tensor], mine: Mapping[str, Tensor], owner: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Each tensor, which its owner has whole, on every rank."""
        found, waiting = {}, []
        for dtype, alike in _by_dtype(names, like).items():
            for rank in range(self.size):
                theirs = [name for name in alike if owner[name] == rank]
                if not theirs:
                    continue
                if rank == self.rank:
                    buffer = torch.cat([mine[name].flatten() for name in theirs])
                else:
                    buffer = torch.empty(
                        sum(like[n].numel() for n in theirs), dtype=dtype, device=like[theirs[0]].device
                    )
                waiting.append(self._send_to_all(buffer, rank))
                pieces = buffer.split([like[name].numel() for name in theirs])
                found |= {name: x.view(like[name].shape) for name, x in zip(theirs, pieces, strict=True)}
        for work in waiting:
            work.wait()
        return found

    # -- collectives -----------------------------------------------------------------------------------------------------

    def _send_to_all(self, buffer: Tensor, rank: int) -> Any:
        return dist.broadcast(buffer, dist.get_global_rank(self.group, rank), group=self.group, async_op=True)

    def _all_to_all(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        lengths: Sequence[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[list[Tensor]]:
        """What each rank sent here, cut into pieces.

        Args:
            outgoing: flat pieces for each rank.
            lengths: of the pieces that come from each rank.
            dtype: of all pieces.
            device: of all pieces.
        """
        pieces = [piece for to_rank in outgoing for piece in to_rank]
        sent = torch.cat(pieces) if pieces else torch.empty(0, dtype=dtype, device=device)
        sizes = [sum(from_rank) for from_rank in lengths]
        received = torch.empty(sum(sizes), dtype=dtype, device=device)
        counts = [sum(piece.numel() for piece in to_rank) for to_rank in outgoing]
        dist.all_to_all_single(received, sent, sizes, counts, group=self.group)
        return [list(part.split(cut)) for part, cut in zip(received.split(sizes), map(list, lengths), strict=True)]


def _dims(norm: Norm, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions within a block, counted from the front."""
    return tuple(sorted(dim % len(shape) for dim in norm.dims(torch.Size(shape))))  # pyright: ignore


def _by_dtype(names: Sequence[str], like: Mapping[str, Tensor]) -> dict[torch.dtype, list[str]]:
    alike: dict[torch.dtype, list[str]] = {}
    for name in names:
        alike.setdefault(like[name].dtype, []).append(name)
    return alike
