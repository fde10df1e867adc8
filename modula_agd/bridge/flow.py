"""Flow: how a bound passes through the calls of a captured graph.

Activations have the magnitudes a that were measured on the example, and **a perturbation passes as its activation does** (mean
field): through a map of degree 1 the relative change γ − 1 stays what it was. The rest is the algebra of ``bound.py``: a weight is an
input that moves by r, so that a linear map is a product, γ = γ_x·(1 + κ·r). There κ = ω·a_in/a_out tells how much larger the output's
change can be than the output is, for a weight that moves by r·ω; in a product of activations γ = γ₁·γ₂; in a sum the mean with
weights a_i; behind a softmax, whose scores have the magnitude a, 1 + a·(γ − 1).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from modula_agd import bound as algebra
from modula_agd.bound import Bound, Grade, Number, larger, source
from modula_agd.bridge.capture import Captured
from modula_agd.bridge.graph import Node, Ref, roots
from modula_agd.bridge.leaf import Leaf
from modula_agd.bridge.weights import Weight
from modula_agd.curvature import OUTPUTS
from modula_agd.error import UnknownBound
from modula_agd.run import Step

ASSUMPTION = "activations as large as on the example; a perturbation passes as its activation does (mean field)"
MOST = 16.0
"""Largest κ: an activation counts for at least 1/16 of what its weight could make of the input, even where it starts at 0."""
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Flow:
    """A captured model and a step of its weights: what stays the same from call to call.

    Args:
        captured: the model.
        weights: each parameter's declaration.
        ratios: what a weight's size is multiplied with in each use.
        leaves: nodes that are parameters, or views of them.
        scores: nodes whose activations are scores of classes, measured by their maximum.
        step: the relative step.
        corrections: by call and result, what a magnitude by the algebra is multiplied with; filled at the capture.
    """

    captured: Captured
    weights: Mapping[str, Weight]
    ratios: Mapping[tuple[str, str], float]
    leaves: Mapping[str, Leaf]
    scores: frozenset[str]
    step: Step
    corrections: dict[tuple[str, Any], float]

    def measured(self, node: str) -> Any:
        """What the example showed."""
        kind = self.captured.peaks if node in self.scores else self.captured.magnitudes
        return kind.get(node, 0.0)

    def is_number(self, node: str) -> bool:
        """Whether it stands for activations or weights, rather than ids, masks or shapes."""
        return self.captured.nodes[node].floating

    def size(self, name: str) -> Number:
        """ω of a parameter."""
        return self.step.sizes.get(name, self.weights[name].size)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operator, with the bounds of what it is given: what a rule sees.

    Args:
        node: the call.
        flow: the model around it.
        known: bound of every node that moves, or leaf of a parameter; what stays as it is, is absent.
    """

    node: Node
    flow: Flow
    known: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The operator."""
        return self.node.operator

    @property
    def out(self) -> Any:
        """The result's magnitude on the example; a tuple of several."""
        return self.flow.measured(self.node.name)

    def argument(self, place: int, default: Any = None) -> Any:
        """An argument by position, as the operator's schema has it; defaults are filled in."""
        return self.node.args[place] if place < len(self.node.args) else default

    def named(self, name: str, default: Any = None) -> Any:
        """An argument by name."""
        return self.node.named(name, default)

    def moves(self, argument: Any) -> bool:
        """Whether a step changes it."""
        if isinstance(argument, list | tuple):
            return any(map(self.moves, argument))
        value = self.known.get(argument) if isinstance(argument, Ref) else None
        if isinstance(value, Leaf):
            # masses may be those of several questions at once
            return bool(torch.as_tensor(self.flow.weights[value.name].mass > 0).any())
        return value is not None

    def bound(self, argument: Any) -> Bound:
        """The bound of an activation; of what stays, its magnitude alone."""
        value = self.known.get(argument) if isinstance(argument, Ref) else None
        if isinstance(value, Leaf):
            return self._weight(argument, value)
        if isinstance(value, Bound):
            return value
        size = self.flow.measured(argument) if isinstance(argument, Ref) else _number(argument)
        return source(max(size if isinstance(size, float) else 0.0, TINY))

    def _weight(self, argument: Ref, leaf: Leaf) -> Bound:
        """A parameter as an activation: of size ω, moved by r."""
        weight = self.flow.weights[leaf.name]
        size = self.flow.size(leaf.name) * self.flow.ratios.get((self.node.name, str(argument)), 1.0)
        return Bound(size, 1 + weight.mass * self.flow.step.t, None, weight.mass, weight.mass)

    def weight(self, argument: Any) -> Bound | None:
        """A parameter's own bound, of magnitude ω; None of what is no parameter."""
        value = self.known.get(argument) if isinstance(argument, Ref) else None
        return self._weight(argument, value) if isinstance(value, Leaf) else None

    def settled(self, x: Bound, index: int | None = None) -> Bound:
        """x, its magnitude as the algebra has it corrected by what was measured.

        Args:
            x: the bound of the result, by the rules of the algebra.
            index: which result, of several.
        """
        return replace(x, magnitude=x.magnitude * self.correction(x.magnitude, index))

    def correction(self, magnitude: Number, index: int | None = None, least: float = 0.0) -> float:
        """How much smaller the result was on the example than the algebra has it: settled at the capture, and kept."""
        place = (self.node.name, index)
        if place not in self.flow.corrections:
            out = self.out if index is None else self.out[index]
            out = out[0] if isinstance(out, tuple) else out
            usable = out > 0 and magnitude > 0
            self.flow.corrections[place] = max(out / float(magnitude) if usable else 1.0, least)
        return self.flow.corrections[place]

    def once(self, what: str, compute: Callable[[], float]) -> float:
        """A number that is settled at the capture, and kept."""
        place = (self.node.name, what)
        if place not in self.flow.corrections:
            self.flow.corrections[place] = compute()
        return self.flow.corrections[place]

    def product(self, x: Bound, factor: Any, index: int | None = None) -> Bound:
        """x times a weight, or another activation: γ = γ_x·(1 + κ·r), or γ_x·γ_y."""
        weight = self.weight(factor)
        if weight is None:
            return self.settled(algebra.product(x, self.bound(factor), 1.0), index)
        could = x.magnitude * weight.magnitude
        correction = self.correction(could, index, least=1 / MOST)
        # a result that is larger than the weight's norm allows tells that the norm does not bound this map
        result = algebra.product(x, stretched(weight, max(1.0, 1 / correction)), 1.0)
        return replace(result, magnitude=could * correction)


def _number(value: Any) -> float:
    return abs(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def stretched(x: Bound, ratio: Number) -> Bound:
    """γ = 1 + ratio·(γ − 1), and the depth likewise."""
    return replace(
        x, growth=1 + ratio * (x.growth - 1), depth=ratio * x.depth, ceiling=larger(1.0, ratio) * x.ceiling, error=None
    )


Rule = Callable[[Call], Any]
"""From a call to the bound of its result; to a tuple of bounds where it gives several."""


def propagate(flow: Flow, rule_of: Callable[[Node], Rule], unmoved: frozenset[str]) -> Bound:
    """The bound of the model's output.

    Args:
        flow: the model and the step.
        rule_of: the rule of a call that a step changes; raises ``UnknownBound`` where there is none.
        unmoved: operators whose results do not move, whatever they are given.

    Raises:
        UnknownBound: nothing that moves reaches the output, or a rule gives no bound.
    """
    known: dict[str, Any] = dict(flow.leaves)
    nodes = flow.captured.nodes
    memory = roots(nodes)
    for name, node in nodes.items():
        if not node.operator or name in known:
            continue
        call = Call(node, flow, known)
        # ids, places in an order, masks: a small step leaves them as they are
        if not node.floating or node.operator in unmoved or not any(map(call.moves, node.inputs)):
            continue
        result = rule_of(node)(call)
        if not all(isinstance(part, Bound) for part in (result if isinstance(result, tuple) else (result,))):
            raise UnknownBound(
                f"the rule of {node.operator} gave {result!r}, where a Bound belongs, or a tuple of them"
            )
        known[name] = result
        if node.writes and isinstance(result, Bound):
            _written(known, node, result, memory, flow)
    end = known.get(flow.captured.output)
    if isinstance(end, tuple):
        end = end[0]
    if not isinstance(end, Bound):
        raise UnknownBound("no parameter that requires a gradient reaches the output; there is nothing to train")
    return replace(end, magnitude=larger(end.magnitude, OUTPUTS)).assuming(ASSUMPTION, Grade.ASSUMED)


def _written(known: dict[str, Any], node: Node, result: Bound, memory: Mapping[str, str], flow: Flow) -> None:
    """What was written over moves, too: the argument itself, and beside what they held, all that may share its memory."""
    target = node.inputs[0] if node.inputs else None
    for name, root in memory.items():
        if name == node.name or root != memory[node.name] or name in flow.captured.parameters:
            continue
        before = known.get(name)
        if name == target or before is None:
            known[name] = result
        elif isinstance(before, Bound):
            known[name] = replace(algebra.total([before, result]), magnitude=larger(before.magnitude, result.magnitude))
