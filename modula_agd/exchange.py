"""What a step needs to know of other processes: here that there are none; ``distributed.py`` has the one for many.

The engine computes with the tensors of its own process. In five places a step needs more than these: to make a direction of a
matrix that is spread over processes, to tell which rows a gradient touches and how long they are, to add up descents, to measure
spread weights in their norms, and to agree on what each process knows of its own batch alone.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from modula_agd.directions import directions
from modula_agd.majorisation import Evidence
from modula_agd.norm import Direction, Norm
from modula_agd.row_signal import row_squares


class Exchange:
    """One process, which holds every weight whole: nothing is exchanged."""

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what this process holds of a weight of that shape."""
        return shape

    def directions(
        self, norms: Mapping[str, Norm], sources: Mapping[str, Tensor], *, half: bool = False
    ) -> dict[str, Direction]:
        """What this process holds of the unit dual direction of each source; arguments as for ``directions.directions``."""
        return directions(norms, sources, half=half)

    def seen(self, found: Mapping[str, Direction], gradients: Mapping[str, Tensor]) -> dict[str, Direction]:
        """The directions, but 0 in each row of which the gradient says nothing, where a direction is made row by row."""
        return {name: direction.where(gradients[name]) for name, direction in found.items()}

    def row_squares(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum of squares of each row of the whole of each tensor, [rows], in double precision."""
        return {name: row_squares(tensor) for name, tensor in tensors.items()}

    def held_rows(self, name: str, rows: Tensor) -> Tensor:
        """Of numbers of all rows of a weight those of the rows that this process holds of it."""
        return rows

    def total(self, parts: Tensor) -> Tensor:
        """Of numbers in the order of the parameters, each a sum over what this process holds of one: the sums over all of it."""
        return parts

    def numbers(
        self, ask: Callable[[Norm, Tensor], Tensor], norms: Mapping[str, Norm], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What a norm tells of the whole of each tensor, 0-d."""
        return {name: ask(norms[name], tensor.detach()) for name, tensor in tensors.items()}

    def evidence(self, evidence: Evidence) -> Evidence:
        """Evidence that holds for the batches of all processes together."""
        return evidence

    def nonzero(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whether any entry of the whole of each tensor is not 0."""
        return {name: tensor.any() for name, tensor in tensors.items()}

    def means(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over the processes of tensors that each knows of its own batch."""
        return dict(tensors)


ALONE = Exchange()
"""Of a run in one process."""
