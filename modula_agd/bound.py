"""The bound algebra: how large activations are, and how far one step of all weights can move them.

A network step moves every atom by the relative amount r_k = m_k·t: ‖W_k‖ ≤ ω_k and ‖ΔW_k‖ ≤ m_k·t·ω_k. The record
``Bound`` then holds what is known of one activation h at one t (or at many: every rule also works on a tensor of t):

=============  =======================================================================  ==============================
``magnitude``  a with ‖h‖ ≤ a, before the step                                          input: a₀
``growth``     γ(t) ≥ 1 with ‖Δh‖ ≤ a·(γ − 1)                                           input: 1
``error``      κ(t) with ‖Δh − ∂h·Δw‖ ≤ a·κ, None where a kink forbids it               input: 0
``depth``      D = γ′(0), what one small step costs                                     input: 0
``ceiling``    D̄ with γ(t) ≤ exp(D̄·t): the depth rule with max in place of the mean     input: 0
=============  =======================================================================  ==============================

Each construction of the module algebra is one function below. All are convex and increasing in t, which makes the
majorant convex. For a chain of L atoms γ = Π(1 + r_k): deep relative trust (Bernstein et al. 2023, arXiv:2304.05187,
Lemma 2). Plain arithmetic only: no tensor library is imported, so that the algebra can be tested exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from modula_agd.error import InvalidArgument

Number = Any
"""A float, or any array that supports + - * /, >, ~ and abs: a 0-d tensor for a tracked size, a vector of t."""


class Grade(IntEnum):
    """How well a statement is founded; a composition's grade is the worst (lowest) of its parts."""

    ASSUMED = 0
    TYPICAL = 1
    PROVED = 2

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Constant:
    """A number that a bound rests on.

    Args:
        value: dimensionless, > 0.
        grade: whether it is a theorem, a mean-field value or an assumption.
        source: where it is proved or read, or how it was computed.
        witness: where the constant is attained, for a proved one: an input, or a pair of inputs, in words or numbers.

    Raises:
        InvalidArgument: the value is not a finite number above 0.
    """

    value: float
    grade: Grade
    source: str
    witness: object = None

    def __post_init__(self) -> None:
        good = isinstance(self.value, int | float) and 0 < self.value < float("inf")
        if not good:
            raise InvalidArgument(
                f"a constant was declared as {self.value!r} ({self.source}), but must be a finite number above 0. "
                "Any valid upper bound will do where the least one is 0."
            )


@dataclass(frozen=True)
class Gain:
    """A Lipschitz constant twice, dimensionless.

    Args:
        proved: the worst case.
        typical: the mean-field value that typical inputs show.
    """

    proved: Constant
    typical: Constant

    @classmethod
    def exact(cls, value: float, source: str, witness: object = None) -> "Gain":
        """One proved constant that is also the typical one."""
        constant = Constant(value, Grade.PROVED, source, witness)
        return cls(constant, constant)

    @classmethod
    def of(cls, proved: float, typical: float, source: str, witness: object, mean_field: str) -> "Gain":
        """A proved constant with its source and witness, and a typical one with how it comes about."""
        return cls(Constant(proved, Grade.PROVED, source, witness), Constant(typical, Grade.TYPICAL, mean_field))


@dataclass(frozen=True)
class Bound:
    """What is known of one activation; see the module's table.

    Args:
        magnitude: a, in the space's norm.
        growth: γ(t) ≥ 1, dimensionless.
        error: κ(t) ≥ 0, dimensionless; None where a kink forbids it.
        depth: D, which does not depend on t.
        ceiling: D̄, nor does it.
        grade: the weakest of the constants that it rests on.
        assumptions: all that is not proved, named.
    """

    magnitude: Number
    growth: Number
    error: Number | None
    depth: Number
    ceiling: Number
    grade: Grade = Grade.PROVED
    assumptions: tuple[str, ...] = field(default=())

    def graded(self, constant: Constant, what: str) -> "Bound":
        """The same bound, resting on one more constant; names it where it is not proved."""
        named = f"{what}: {constant.value:.6g}, {constant.grade} ({constant.source})"
        new = () if constant.grade == Grade.PROVED or named in self.assumptions else (named,)
        return replace(self, grade=min(self.grade, constant.grade), assumptions=self.assumptions + new)

    def assuming(self, assumption: str, grade: Grade = Grade.ASSUMED) -> "Bound":
        """The same bound with one more named assumption."""
        new = () if assumption in self.assumptions else (assumption,)
        return replace(self, grade=min(self.grade, grade), assumptions=self.assumptions + new)

    def facts(self) -> list[tuple[str, str]]:
        """What does not depend on t, each with its name: for people."""
        return [
            ("depth D", f"{float(self.depth):.6g}"),
            ("ceiling depth D̄", f"{float(self.ceiling):.6g}"),
            ("output magnitude a", f"{float(self.magnitude):.6g}"),
            ("grade", str(self.grade)),
            *(("rests on", assumption) for assumption in self.assumptions),
        ]

    def __str__(self) -> str:
        return aligned(self.facts())


def aligned(facts: Sequence[tuple[str, str]]) -> str:
    """One line per fact, values below each other."""
    return "\n".join(f"{name:<20}{value}" for name, value in facts)


def larger(x: Number, y: Number) -> Number:
    """max(x, y) for floats and for arrays of finite numbers, exactly, without asking an array for its value (no wait for a device)."""
    if isinstance(x, int | float) and isinstance(y, int | float):
        return max(x, y)
    above = x > y
    return above * x + ~above * y


def smaller(x: Number, y: Number) -> Number:
    """min(x, y), likewise."""
    return -larger(-x, -y)


def _merged(parts: Sequence[Bound]) -> dict[str, Any]:
    """Grade and assumptions of a composition of several branches."""
    named = dict.fromkeys(assumption for part in parts for assumption in part.assumptions)
    return {"grade": min([part.grade for part in parts]), "assumptions": tuple(named)}


def source(magnitude: Number = 1.0) -> Bound:
    """The network's input, of norm at most ``magnitude``, which no step moves."""
    return Bound(magnitude, growth=1.0, error=0.0, depth=0.0, ceiling=0.0)


def atom(x: Bound, size: Number, step: Number, mass: float, gain: float = 1.0) -> Bound:
    """A linear map in its weight and in its input: a′ = gain·ω·a, γ′ = γ·(1 + r), D′ = D + m.

    Args:
        x: the bound of the input.
        size: ω, an upper bound of the weight's norm.
        step: r = m·t, the relative step.
        mass: m.
        gain: what the operator norm may exceed the weight's norm by (a convolution's taps).
    """
    return replace(
        x,
        magnitude=gain * size * x.magnitude,
        growth=x.growth * (1 + step),
        error=None if x.error is None else x.error + step * (x.growth - 1),
        depth=x.depth + mass,
        ceiling=x.ceiling + mass,
    )


def bias(x: Bound, size: Number, step: Number, mass: float) -> Bound:
    """h + b with ‖b‖ ≤ β: a′ = a + β, γ′ = (aγ + β(1 + r))/a′; the same as a sum with a one-atom branch."""
    return total([x, Bound(size, 1 + step, 0.0, mass, mass)])


def bond(x: Bound, gain: float, limit: Number, curvature: float | None = None) -> Bound:
    """A map without weights: Lipschitz constant c, outputs of norm at most m.

    γ′ = 1 + (c·a/m)(γ − 1), which is γ itself where φ(0) = 0 and m = c·a.

    Args:
        x: the bound of the input.
        gain: c.
        limit: m, at least ‖φ(h)‖ for every ‖h‖ ≤ a.
        curvature: C with ‖φ(h + Δ) − φ(h) − φ′(h)Δ‖ ≤ C·‖Δ‖²; 0 for a linear map, None where φ has a kink.
    """
    ratio = gain * x.magnitude / limit
    moved = x.magnitude * (x.growth - 1)
    known = x.error is not None and curvature is not None
    return replace(
        x,
        magnitude=limit,
        growth=1 + ratio * (x.growth - 1),
        error=(ratio * x.error + curvature * moved * moved / limit) if known else None,
        depth=ratio * x.depth,
        ceiling=larger(1.0, ratio) * x.ceiling,
    )


def scaled(x: Bound, factor: float) -> Bound:
    """c·h: the magnitude times \\|c\\|; relative quantities stay."""
    return replace(x, magnitude=abs(factor) * x.magnitude)


def total(parts: Sequence[Bound]) -> Bound:
    """Σ h_i: a = Σ a_i, relative quantities averaged with weights a_i; the ceiling takes the largest."""
    magnitude = sum(part.magnitude for part in parts)
    errors = [part.magnitude * part.error for part in parts if part.error is not None]
    ceiling = parts[0].ceiling
    for part in parts[1:]:
        ceiling = larger(ceiling, part.ceiling)
    return Bound(
        magnitude=magnitude,
        growth=sum(part.magnitude * part.growth for part in parts) / magnitude,
        error=sum(errors) / magnitude if len(errors) == len(parts) else None,
        depth=sum(part.magnitude * part.depth for part in parts) / magnitude,
        ceiling=ceiling,
        **_merged(parts),
    )


def product(x: Bound, y: Bound, gain: float) -> Bound:
    """Elementwise h₁·h₂: a = gain·a₁·a₂ and γ = γ₁·γ₂; the gain is sqrt(d) in RMS, 1 if one factor is max-normed."""
    error = None
    if x.error is not None and y.error is not None:
        error = x.error + y.error + (x.growth - 1) * (y.growth - 1)
    return Bound(
        magnitude=gain * x.magnitude * y.magnitude,
        growth=x.growth * y.growth,
        error=error,
        depth=x.depth + y.depth,
        ceiling=x.ceiling + y.ceiling,
        **_merged([x, y]),
    )


def attention(queries: Bound, keys: Bound, values: Bound, scale: float) -> Bound:
    """softmax(σ₀·q·k)·v, with σ = σ₀·d·a_q·a_k: γ = γ_v + ε and D = D_v + σ·(D_q + D_k), where ε = σ·(γ_q·γ_k − 1).

    A softmax moves by at most 2·tanh(ε/2) ≤ ε in l1 when its logits move by ε in the maximum norm, and
    p′v′ − pv = p′(v′ − v) + (p′ − p)v. Its second-order remainder in l1 is at most (2/(3·sqrt 3))·ε².

    Args:
        queries: the bound of q, by its supremum over heads and positions of the RMS over a head's features.
        keys: the bound of k.
        values: the bound of v, whose magnitude an average over positions cannot exceed.
        scale: σ₀·d, the score scale times the number of features of a head.
    """
    sigma = scale * queries.magnitude * keys.magnitude
    score = sigma * (queries.growth * keys.growth - 1)
    error = None
    if queries.error is not None and keys.error is not None and values.error is not None:
        crossed = queries.error + keys.error + (queries.growth - 1) * (keys.growth - 1)
        curved = 2 / (3 * 3**0.5) * score * score
        error = values.error + score * (values.growth - 1) + curved + sigma * crossed
    return Bound(
        magnitude=values.magnitude,
        growth=values.growth + score,
        error=error,
        depth=values.depth + sigma * (queries.depth + keys.depth),
        ceiling=values.ceiling + larger(1.0, sigma) * (queries.ceiling + keys.ceiling),
        **_merged([queries, keys, values]),
    )
