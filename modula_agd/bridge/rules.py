"""Rules: the bound of each operator's result, by name. What is not here is an error, and ``declare`` adds to it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from modula_agd import bound as algebra
from modula_agd.bound import Bound, source
from modula_agd.bridge.flow import MOST, TINY, Call, Rule, stretched
from modula_agd.bridge.graph import Ref
from modula_agd.bridge.operators import (
    DEGREES,
    GROUPED,
    HOMOGENEOUS,
    LIPSCHITZ,
    PARTS,
    PRODUCTS,
    QUOTIENTS,
    SUMS,
    VIEWS,
)
from modula_agd.bridge.weights import CELLS, CONVOLUTIONS, RECURRENT

RECALL = 0.5
"""Assumed share of a perturbed recurrent state that is left one step later: forget gates about a half."""
LOW = 1e-3
"""Least magnitude of a result that relative changes are reckoned by."""


def _passed(call: Call) -> Any:
    argument = call.argument(0)
    value = call.known.get(argument)
    if isinstance(value, tuple):
        return call.settled(value[call.argument(1)]) if call.name == "getitem" else value
    x = call.bound(argument)
    return (
        tuple(call.settled(x, index) for index in range(len(call.out)))
        if isinstance(call.out, tuple)
        else call.settled(x)
    )


def _parts(arguments: Any) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, list | tuple):
            yield from _parts(argument)
        elif isinstance(argument, Ref | int | float) and not isinstance(argument, bool):
            yield argument


def _tensors(call: Call) -> list[Ref]:
    return [x for x in _parts(call.node.args) if isinstance(x, Ref) and call.flow.is_number(x)]


def _summed(call: Call) -> Bound:
    numbers = [x for x in call.node.args[:2] if isinstance(x, int | float) and call.name in ("add", "sub", "rsub")]
    terms = [call.bound(argument) for argument in (*_tensors(call), *numbers)]
    total = algebra.total(terms)
    result = call.settled(total)
    if call.name not in ("add", "sub", "rsub"):
        return result
    # where terms cancel, the sum is small and its change is not
    excess = call.once("cancelled", lambda: _apart(terms) / max(float(result.magnitude), TINY))
    return stretched(result, min(excess, MOST)) if excess > 2 else result


def _apart(terms: list[Bound]) -> float:
    """How large a sum of these is where they are independent."""
    return math.sqrt(sum(float(term.magnitude) ** 2 for term in terms))


def _multiplied(call: Call) -> Bound:
    factors = _tensors(call)
    moving = [x for x in factors if call.moves(x)]
    if len(factors) == 2 == len(moving):
        for one, other in (factors, factors[::-1]):
            if normalises(call, other, one):
                # a map of degree 0: as large as on the example, whatever comes in
                return replace(call.bound(one), magnitude=max(call.out, TINY))
    weights = [x for x in factors if call.weight(x) is not None]
    others = [call.bound(x) for x in factors if x not in weights]
    number = [abs(x) for x in call.node.args if isinstance(x, int | float) and x]
    factor = number[0] if number else 1.0
    result = source(1 / factor if call.name in QUOTIENTS else factor)
    for other in others:
        result = algebra.product(result, other, 1.0)
    if not weights:
        return call.settled(result)
    for weight in weights[1:]:
        result = algebra.product(result, call.bound(weight), 1.0)
    return call.product(result, weights[0])


def _shifted(call: Call, x: Bound, bias: Any) -> Bound:
    """A bias beside what is as large as the result is."""
    return replace(algebra.total([x, call.bound(bias)]), magnitude=x.magnitude) if call.moves(bias) else x


def _linear(call: Call) -> Bound:
    return _shifted(call, call.product(call.bound(call.argument(0)), call.argument(1)), call.argument(2))


def _addmm(call: Call) -> Bound:
    return _shifted(call, _matrices(call, 1), call.argument(0))


def _matrices(call: Call, first: int = 0) -> Bound:
    """The product of two factors, either of which may be a weight."""
    one, other = call.argument(first), call.argument(first + 1)
    x, weight = (other, one) if call.weight(one) is not None and call.weight(other) is None else (one, other)
    return call.product(call.bound(x), weight)


def _embedding(call: Call) -> Bound:
    return call.product(source(1.0), call.argument(0))


def _normalised(scale: int, shift: int) -> Callable[[Call], Any]:
    def rule(call: Call) -> Any:
        weight, bias = call.argument(scale), call.argument(shift) if shift >= 0 else None
        index = 0 if isinstance(call.out, tuple) else None
        unit = replace(call.bound(call.argument(0)), magnitude=1.0)
        result = call.product(unit, weight, index) if call.moves(weight) else call.settled(unit, index)
        result = _shifted(call, result, bias)
        return result if index is None else (result, *(stretched(result, 0.0) for _ in call.out[1:]))

    return rule


def _attention(call: Call) -> Any:
    queries, keys, values = (call.bound(call.argument(place)) for place in range(3))
    width = (call.flow.captured.nodes[call.argument(0)].shape or (1,))[-1]
    scale = call.named("scale") or 1 / math.sqrt(width)
    # a product of independent features of mean square 1 has standard deviation sqrt(d)
    result = algebra.attention(queries, keys, values, float(scale) * math.sqrt(width))
    mask = call.named("attn_mask")
    if call.moves(mask):
        shift = call.bound(mask)
        result = replace(algebra.product(result, stretched(shift, shift.magnitude), 1.0), magnitude=result.magnitude)
    return call.settled(result)


def _lipschitz(slope: float, least: float = 0.0) -> Rule:
    """A relative change grows by slope·a_in/a_out, and at least by ``least``."""

    def rule(call: Call) -> Bound:
        x = call.bound(call.argument(0))
        # a softmax is relative to probabilities, whose sum is 1; others to what they give
        unit = 1.0 if "softmax" in call.name and "log" not in call.name else max(call.out, LOW)
        ratio = algebra.larger(least, slope * x.magnitude / unit)
        return replace(stretched(x, ratio), magnitude=max(call.out, TINY))

    return rule


def _powered(degree: float) -> Rule:
    def rule(call: Call) -> Bound:
        x = call.bound(call.argument(0))
        return call.settled(stretched(x, degree))

    return rule


def _pow(call: Call) -> Bound:
    base, exponent = call.argument(0), call.argument(1)
    if isinstance(base, int | float):
        return _exponential(abs(math.log(abs(base) or 1.0)), place=1)(call)
    return _powered(abs(exponent) if isinstance(exponent, int | float) else 1.0)(call)


def _exponential(rate: float = 1.0, least: float = 0.0, place: int = 0) -> Rule:
    """e^(rate·h): relative to it, a change of h counts in full, and the largest h count most."""

    def rule(call: Call) -> Bound:
        argument = call.argument(place)
        x = call.bound(argument)
        peak = call.flow.captured.peaks.get(argument, 0.0)
        ratio = rate * algebra.larger(x.magnitude, peak if isinstance(peak, float) else 0.0)
        return replace(stretched(x, algebra.larger(least, ratio)), magnitude=max(call.out, TINY))

    return rule


def _log(call: Call) -> Bound:
    x = call.bound(call.argument(0))
    return replace(stretched(x, 1 / max(call.out, LOW)), magnitude=max(call.out, TINY))


def _recurrent(call: Call) -> Any:
    """h_t = cell(W_x·x_t + W_h·h_{t−1} + b), weights tied over time.

    What moves the pre-activations by a share moves a state by that share, the next one by RECALL of it, and so on: 1/(1 − RECALL).
    """
    x = call.bound(call.argument(0))
    fused, biased, layers = call.argument(2), bool(call.argument(3)), int(call.argument(4))
    both = 2 if call.argument(7) else 1
    state = max(call.out[0], LOW)
    first = _state(call, call.argument(1), state)
    width = len(fused) // (layers * both)
    for layer in range(layers):
        start = layer * both * width
        cells = [fused[start + way * width : start + (way + 1) * width] for way in range(both)]
        x = algebra.total([_cell(call, x, first, own, state, biased) for own in cells])
        x = replace(x, magnitude=state)
    return tuple(replace(x, magnitude=max(part, TINY)) for part in call.out)


def _one_step(call: Call) -> Any:
    several = isinstance(call.out, tuple)
    state = max(call.out[0] if several else call.out, LOW)
    first = _state(call, call.argument(1), state)
    weights = [x for x in call.node.args[2:6] if isinstance(x, Ref)]
    x = _cell(call, call.bound(call.argument(0)), first, weights, state, len(weights) > 2)
    return tuple(replace(x, magnitude=max(part, TINY)) for part in call.out) if several else x


def _state(call: Call, given: Any, state: float) -> Bound:
    """The state that a sequence starts with."""
    moving = [call.bound(x) for x in _parts([given]) if call.moves(x)]
    return replace(algebra.total(moving), magnitude=state) if moving else source(state)


def _cell(call: Call, x: Bound, first: Bound, weights: Any, state: float, biased: bool) -> Bound:
    into, across, *others = (call.bound(weight) for weight in weights)
    pushed = algebra.product(x, into, 1.0)
    turned = algebra.product(first, across, 1.0)
    total = algebra.total([pushed, turned, *(others[:2] if biased else [])])
    # a projection of the state
    for projection in others[2 if biased else 0 :]:
        total = algebra.product(total, projection, 1.0)
    return replace(stretched(total, 1 / (1 - RECALL)), magnitude=state)


def _weight_norm(call: Call) -> Any:
    """g·v/‖v‖: of degree 0 in v, of degree 1 in g."""
    direction = replace(call.bound(call.argument(0)), magnitude=1.0)
    result = algebra.product(call.bound(call.argument(1)), direction, 1.0)
    if isinstance(call.out, float):
        return call.settled(result)
    result = call.settled(result, 0)
    return result, *(stretched(result, 0.0) for _ in call.out[1:])


def _plain(call: Call, name: Any) -> Any:
    """Before casts and copies."""
    nodes = call.flow.captured.nodes
    while name in nodes and nodes[name].operator in VIEWS and nodes[name].inputs:
        name = nodes[name].inputs[0]
    return name


SIZES = frozenset(("mean", "sum", "var", "std", "norm", "linalg_vector_norm", "amax", "max"))
MEASURES = (
    SIZES
    | VIEWS
    | {"rsqrt", "sqrt", "reciprocal", "add", "clamp", "clamp_min", "clamp_max", "maximum", "pow", "square", "abs"}
)
"""What may stand between an activation and a number that tells how large it is."""


INVERSIONS = frozenset(("rsqrt", "reciprocal"))


def normalises(call: Call, divisor: str, x: str) -> bool:
    """Whether a product with ``divisor``, or a quotient by it, divides ``x`` by its own size: RMS, deviation, norm, maximum."""
    nodes = call.flow.captured.nodes
    bases = {_plain(call, x)}
    for base in tuple(bases):
        if nodes[base].operator in ("sub", "add") and nodes[base].inputs:
            bases.add(_plain(call, nodes[base].inputs[0]))
    name, shrunk, inverted = _plain(call, divisor), False, call.name in QUOTIENTS
    while not (shrunk and name in bases):
        node = nodes[name]
        squares = node.operator == "mul" and len(set(node.inputs)) == 1
        if not node.inputs or not (squares or node.operator in MEASURES):
            return False
        power = node.args[1] if node.operator == "pow" and len(node.args) > 1 else 1
        if node.operator in INVERSIONS or (isinstance(power, int | float) and power < 0):
            inverted = not inverted
        shrunk = shrunk or node.operator in SIZES
        name = _plain(call, node.inputs[0])
    return inverted


RULES: dict[str, Rule] = {
    **dict.fromkeys(VIEWS | PARTS | HOMOGENEOUS, _passed),
    **dict.fromkeys(SUMS, _summed),
    **dict.fromkeys(PRODUCTS | QUOTIENTS | {"prelu", "_prelu_kernel"}, _multiplied),
    **dict.fromkeys((*CONVOLUTIONS, "linear"), _linear),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", *GROUPED), _matrices),
    **dict.fromkeys(("embedding", "embedding_bag"), _embedding),
    **{name: _lipschitz(slope) for name, slope in LIPSCHITZ.items()},
    # 0 at 0, where a result may be small by cancellation
    **dict.fromkeys(("log1p", "sin"), _lipschitz(1.0, least=1.0)),
    **dict.fromkeys(("exp", "expm1"), _exponential()),
    **dict.fromkeys(("sinh", "tan"), _exponential(least=1.0)),
    **{name: _powered(degree) for name, degree in DEGREES.items()},
    **dict.fromkeys(RECURRENT, _recurrent),
    **dict.fromkeys(CELLS, _one_step),
    **dict.fromkeys(("_weight_norm", "_weight_norm_interface"), _weight_norm),
    "scaled_dot_product_attention": _attention,
    "layer_norm": _normalised(2, 3),
    "native_layer_norm": _normalised(2, 3),
    "rms_norm": _normalised(2, -1),
    "_fused_rms_norm": _normalised(2, -1),
    "group_norm": _normalised(2, 3),
    "native_group_norm": _normalised(1, 2),
    "batch_norm": _normalised(1, 2),
    "instance_norm": _normalised(1, 2),
    "pow": _pow,
    "log": _log,
}
