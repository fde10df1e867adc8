"""Scores: which activations of a captured model are scores of classes, from its output backwards to what makes them, its heads."""

from modula_agd.bridge.capture import Captured
from modula_agd.bridge.graph import Node
from modula_agd.bridge.operators import PARTS, QUOTIENTS, SELECTIONS, VIEWS

SCALED = QUOTIENTS | {"mul", "multiply"}
ONE = VIEWS | PARTS | SELECTIONS
"""Of their first argument some scores, all of them, means of them, or none beyond a cap."""
SEVERAL = frozenset(("add", "cat", "stack", "sub", "where"))
"""Of scores beside each other, or added up."""


def score_nodes(captured: Captured) -> frozenset[str]:
    """The output and what leads to it without another weight: there, activations are scores of classes."""
    found, front = set(), [captured.output]
    while front:
        name = front.pop()
        found.add(name)
        sources = _sources(captured, captured.nodes[name])
        front += [source for source in sources if source not in found and source not in captured.parameters]
    return frozenset(found)


def _sources(captured: Captured, node: Node) -> list[str]:
    """What a node's scores are made of, if that is scores."""
    given = [argument for argument in node.inputs if captured.nodes[argument].floating]
    if node.operator in SEVERAL:
        return list(given)
    if node.operator in SCALED:
        # a temperature may come first, and be no score; of two as large as the product either may be
        factors = given[:1] if node.operator in QUOTIENTS else given
        return [x for x in factors if captured.nodes[x].shape == node.shape] or list(factors)
    return list(given[:1]) if node.operator in ONE else []
