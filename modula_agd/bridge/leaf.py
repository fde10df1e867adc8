"""Leaves: parameters of a captured model, and views of them, on their way to the operators that use them."""

import math
from dataclasses import dataclass, replace

from modula_agd.bridge.capture import Captured
from modula_agd.bridge.graph import Node
from modula_agd.bridge.operators import VIEWS


@dataclass(frozen=True)
class Leaf:
    """A parameter, or a view of it.

    Args:
        name: of the parameter.
        own: the parameter's shape.
        transposed: whether a matrix lies on its side; None where it was laid out otherwise.
    """

    name: str
    own: tuple[int, ...] = ()
    transposed: bool | None = False

    @property
    def single(self) -> bool:
        """Whether it is one vector, such as a bias, a token or a number; a column is a table of one feature."""
        return is_vector(self.own) and not (len(self.own) == 2 and self.own[1] == 1 < self.own[0])


def is_vector(shape: tuple[int, ...]) -> bool:
    """Whether no more than one side is above 1."""
    return math.prod(shape) == max((1, *shape))


TURNS = frozenset(("t", "mH", "mT", "matrix_H", "adjoint", "transpose", "swapaxes", "numpy_T", "permute"))


def leaves(captured: Captured) -> dict[str, Leaf]:
    """Every node that is a parameter or a view of one."""
    nodes = captured.nodes
    found = {node: Leaf(name, nodes[node].shape or ()) for node, name in captured.parameters.items()}
    for name, node in nodes.items():
        if node.operator not in VIEWS or node.writes or node.inputs != node.args[:1] or node.inputs[0] not in found:
            continue
        leaf, before, after = found[node.inputs[0]], nodes[node.inputs[0]].shape or (), node.shape or ()
        # rows and columns that stay the last two sides of as many numbers are the same ones: stacked, or repeated
        same = before == after or (len(before) > 1 and before[-2:] == after[-2:])
        if node.operator not in TURNS:
            found[name] = leaf if same and node.operator != "movedim" else replace(leaf, transposed=None)
        elif leaf.transposed is not None and _swaps_last(node, len(before)):
            found[name] = replace(leaf, transposed=not leaf.transposed)
        else:
            found[name] = replace(leaf, transposed=None)
    return found


def _swaps_last(node: Node, dims: int) -> bool:
    if node.operator in ("t", "numpy_T", "mH", "mT", "matrix_H", "adjoint"):
        return dims == 2 or node.operator not in ("t", "numpy_T")
    if node.operator == "permute":
        return [axis % dims for axis in node.args[1]] == [*range(dims - 2), dims - 1, dims - 2]
    return {axis % dims for axis in node.args[1:3]} == {dims - 2, dims - 1}
