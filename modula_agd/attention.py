"""Attention: projections into heads, scores, masks, and the mixing of values.

Scores are σ₀·q·k with σ₀ = 1/d by default, d the features of a head. With queries and keys of RMS 1 they are then at most 1,
and a small relative step of both moves them by as much: the sensitivity σ = σ₀·d·a_q·a_k is 1. The usual σ₀ = 1/sqrt(d) has
σ = sqrt(d), for which the bound charges.

=====================  ==========================================  ==================================================
module                 spaces                                      what it declares
=====================  ==========================================  ==================================================
``QKV(h, d, i)``       Sequence(i) → (Heads(h, d), …, …)           one weight [3·h·d, i], a norm per part or per head
``Attention()``        (q, k, v), or ((q, k, v), mask) → Heads     γ = γ_v + σ·(γ_q·γ_k − 1)
``SplitHeads(h)``      Sequence(h·d) → Heads(h, d)                 sqrt(h) in the worst case, typically 1
``MergeHeads()``       Heads(h, d) → Sequence(h·d)                 1
=====================  ==========================================  ==================================================

A projection straight into heads, ``Linear(Heads(h, d), Sequence(i))``, has the norm of the largest head and no such sqrt(h).
Source: theory of this library, section 3; the tests hold both the sharp form with tanh and this convex one against inputs that
attain them.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from modula_agd import bound as algebra
from modula_agd.bound import Bound, Gain, Number
from modula_agd.device import own_generator
from modula_agd.dropout import Dropout, dropped, probability, source
from modula_agd.error import InvalidArgument, SpaceMismatch
from modula_agd.layer import Atom, Bond, LinearBond, applied
from modula_agd.module import parts_of
from modula_agd.norm import Norm, RowBlocks, Spectral
from modula_agd.run import EVALUATION, Parameters, Run, Step
from modula_agd.space import Heads, Mask, Sequence, Space, Tuple, finite, flag, positive


def _empties_a_row(seen: Tensor) -> bool:
    """Whether a mask is known to leave a position nothing to attend to."""
    # asking an accelerator would be a wait, and torch.compile and torch.vmap have no value to ask for; what attends to nothing
    # then comes out as 0
    if seen.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    try:
        return not bool(seen.any(-1).all())
    except RuntimeError:
        return False


def _in_kernel(generator: torch.Generator, device: torch.device) -> bool:
    """Whether torch's function can draw masks itself and gains by it: it takes no generator, and is fused on CUDA alone."""
    return device.type == "cuda" and generator is own_generator(device)


def _earlier(q: Tensor, k: Tensor) -> Tensor:
    """Which positions come no later than each."""
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()


def _splitting(heads: int) -> Gain:
    if heads == 1:
        return Gain.exact(1.0, "one head: nothing is split", "any")
    return Gain.of(
        math.sqrt(heads),
        1.0,
        source="one head may hold all of the square: RMS over it is sqrt(heads) times the RMS over all",
        witness="features nonzero in one head alone",
        mean_field="heads of equal size",
    )


@dataclass(frozen=True)
class QKV(Atom):
    """x ↦ queries, keys and values by one fused weight [3·heads·width, fan_in], without a bias.

    Each of the three parts has a norm of its own, the operator norm sqrt(i/(h·d))·σ_max into all heads together, or, ``per_head``,
    sqrt(i/d)·σ_max into each head; the weight's norm is the largest. Add biases by ``each(Bias(Heads(h, d)), …)``.

    Args:
        heads: h.
        width: d, features of each head.
        fan_in: features of the Sequence that it takes.
        per_head: whether each head counts by itself; then splitting costs nothing in the worst case, but a typical input, of
            which each head sees a part of d directions among i, comes out as small as sqrt(d/i).

    Raises:
        InvalidArgument: a number is below 1, or ``per_head`` no flag.
    """

    heads: int
    width: int
    fan_in: int
    per_head: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for what in ("heads", "width", "fan_in"):
            positive(f"{what} of a QKV", getattr(self, what))
        flag("per_head of a QKV", self.per_head)

    @property
    def domain(self) -> Space:
        return Sequence(self.fan_in)

    @property
    def codomain(self) -> Space:
        return Tuple((Heads(self.heads, self.width),) * 3)

    @property
    def shape(self) -> tuple[int, ...]:
        return 3 * self.heads * self.width, self.fan_in

    @property
    def norm(self) -> Norm:
        return RowBlocks(Spectral(), 3 * self.heads if self.per_head else 3)

    @property
    def gain(self) -> Gain:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _splitting(1 if self.per_head else self.heads)

    def rule(self, x: Bound, size: Number, step: Number, gain: float) -> Any:
        return (algebra.atom(x, size, step, self.mass, gain),) * 3

    def forward(self, weight: Tensor, x: Tensor) -> Any:
        fused = functional.linear(x, weight)
        return tuple(rearrange(fused, "... t (part h d) -> part ... h t d", part=3, h=self.heads))

    def __repr__(self) -> str:
        own = ", per_head=True" if self.per_head else ""
        return f"QKV({self.heads}, {self.width}, {self.fan_in}{own})"


@dataclass(frozen=True)
class SplitHeads(LinearBond):
    """Sequence(h·d) → Heads(h, d).

    Args:
        heads: h, which divides the features.

    Raises:
        InvalidArgument: the number is below 1.
    """

    heads: int

    def __post_init__(self) -> None:
        positive("the number of heads of SplitHeads", self.heads)

    @property
    def gain(self) -> Gain:
        return _splitting(self.heads)

    def codomain_of(self, domain: Space) -> Space:
        if not isinstance(domain, Sequence) or domain.width % self.heads:
            raise SpaceMismatch(
                f"{self!r} splits the features of a Sequence into {self.heads} equal heads, but the module before it gives {domain}"
            )
        return Heads(self.heads, domain.width // self.heads)

    def domain_of(self, codomain: Space) -> Space | None:
        fits = isinstance(codomain, Heads) and codomain.heads == self.heads
        return Sequence(self.heads * codomain.width) if fits else None

    def forward(self, x: Any) -> Any:
        return rearrange(x, "... t (h d) -> ... h t d", h=self.heads)

    def __repr__(self) -> str:
        return f"SplitHeads({self.heads})"


@dataclass(frozen=True)
class MergeHeads(LinearBond):
    """Heads(h, d) → Sequence(h·d): the mean square over all is the mean over heads, at most the largest."""

    gain: ClassVar[Gain] = Gain.exact(1.0, "a mean over heads is at most the largest", "heads of equal size")

    def codomain_of(self, domain: Space) -> Space:
        if not isinstance(domain, Heads):
            raise SpaceMismatch(f"{self!r} merges Heads, but the module before it gives {domain}")
        return Sequence(domain.heads * domain.width)

    def domain_of(self, codomain: Space) -> Space | None:
        return None

    def forward(self, x: Any) -> Any:
        return rearrange(x, "... h t d -> ... t (h d)")

    def __repr__(self) -> str:
        return "MergeHeads()"


@dataclass(frozen=True)
class Attention(Bond):
    """softmax(σ₀·q·k)·v over the positions of each head, by torch's ``scaled_dot_product_attention``.

    Takes (q, k, v), or ((q, k, v), mask) where a ``Mask`` says which positions are no padding. Its bound is that of
    ``bound.attention``: neither causal nor padding masks change it.

    Dropout zeroes weights, in training alone, and divides the others by 1 − p. For one mask, weights that sum to 1 sum to at most
    1/(1 − p) then, so its bound is that of ``Dropout`` of the result. On CUDA masks of torch's own generator are drawn in the fused kernel,
    as no other generator draws them, whatever its state; others are drawn here, where weights take memory for all pairs of positions.

    Args:
        causal: whether a position sees itself and earlier ones alone.
        scale: σ₀ > 0; 1/d by default, which keeps scores of unit queries and keys within ±1.
        dropout: p, 0 ≤ p < 1, of each weight.

    Raises:
        InvalidArgument: a number is out of range, or ``causal`` no flag.
    """

    causal: bool = field(default=False, kw_only=True)
    scale: float | None = field(default=None, kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)
    at_zero: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        flag("causal of an Attention", self.causal)
        probability(self.dropout, "the dropout of an Attention")
        if self.scale is not None and not (finite(self.scale) and self.scale > 0):
            raise InvalidArgument(f"Attention was given scale={self.scale!r}; a score scale is a finite number > 0")

    @property
    def gain(self) -> Gain:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the scores' sensitivity σ is multiplied by; values pass by an average, whose constant is 1."""
        width = 1 if self.on is None else self._heads(self.on)[0].width
        return Gain.of(
            1.0,
            1 / math.sqrt(width),
            source="|q·k| ≤ d·‖q‖·‖k‖; scores move attention by softmax ‖Δp‖₁ ≤ 2·tanh(ε/2)",
            witness="two groups of opposite keys and values",
            mean_field="a product q·k of independent features of mean square 1 has standard deviation sqrt(d), not d",
        )

    def _heads(self, domain: Space) -> tuple[Heads, Heads, Heads]:
        parts = domain.parts if isinstance(domain, Tuple) else ()
        if len(parts) == 2 and isinstance(parts[0], Tuple) and isinstance(parts[1], Mask):
            parts = parts[0].parts
        heads = tuple(part for part in parts if isinstance(part, Heads))
        alike = len({part.heads for part in heads}) == 1 and len(parts) == len(heads) == 3
        if not alike or heads[0].width != heads[1].width:
            raise SpaceMismatch(
                f"{self!r} takes queries, keys and values in the same number of heads, queries and keys of one width, or those and "
                f"a Mask, but was given {domain}. Put a QKV, or three projections into Heads written as a tuple, before it; keys "
                "and values that groups of heads share must be repeated for each head."
            )
        return heads[0], heads[1], heads[2]

    def codomain_of(self, domain: Space) -> Space:
        return self._heads(domain)[2]

    def domain_of(self, codomain: Space) -> Space | None:
        return None

    def rule(self, x: Any, gain: float) -> Bound:
        (queries, keys, values), _ = self._parted(x)
        width = 1 if self.on is None else self._heads(self.on)[0].width
        return algebra.attention(queries, keys, values, gain * (1.0 if self.scale is None else self.scale * width))

    def _parted(self, x: Any) -> tuple[tuple[Any, ...], Any]:
        """Queries, keys and values, or their bounds; and what stands for the mask, if there is one."""
        if isinstance(x, tuple) and x and isinstance(x[0], tuple):
            projected, mask = parts_of(self, x, 2)
            return parts_of(self, projected, 3), mask
        return parts_of(self, x, 3), None

    def propagate(self, x: Any, step: Step, path: str = "") -> Any:
        bound = super().propagate(x, step, path)
        return Dropout(self.dropout).propagate(bound, step, path) if self.dropout else bound

    def apply(self, params: Parameters, x: Any, path: str = "", run: Run = EVALUATION) -> Any:
        if not (run.training and self.dropout):
            return super().apply(params, x, path, run)
        generator = source(self, run)
        return applied(self, lambda: self._attended(x, generator), x)

    def forward(self, x: Any) -> Any:
        return self._attended(x)

    def _attended(self, x: Any, generator: torch.Generator | None = None) -> Tensor:
        """What each position attends to, some of it dropped where there is a source of masks."""
        (q, k, v), mask = self._parted(x)
        scale = 1 / q.shape[-1] if self.scale is None else self.scale
        seen = None if mask is None else self._seen(mask, q, k)
        if generator is not None and not _in_kernel(generator, q.device):
            return self._weighed(q, k, scale, seen, generator) @ v
        share = 0.0 if generator is None else self.dropout
        causal = self.causal and seen is None
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=causal, scale=scale, dropout_p=share
        )

    def _seen(self, mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Which positions each may attend to, where some are padding."""
        if mask.dtype != torch.bool:
            # torch would add numbers to the scores, which hides nothing
            raise SpaceMismatch(
                f"{self!r} was given a mask of {mask.dtype}. Pass booleans, True where a position is no padding: mask.bool()."
            )
        seen = mask[..., None, None, :]
        if self.causal:
            seen = seen & _earlier(q, k)
        if _empties_a_row(seen):
            raise InvalidArgument(
                f"{self!r} was given a mask that leaves a position nothing to attend to. Let every sequence have a position "
                "that is no padding, and with causal masks pad at the end."
            )
        return seen

    def _weighed(
        self, q: Tensor, k: Tensor, scale: float, seen: Tensor | None, generator: torch.Generator
    ) -> Float[Tensor, "*batch heads queries keys"]:
        """The weights, some of them dropped."""
        scores = (q * scale) @ k.mT
        if seen is None and self.causal:
            seen = _earlier(q, k)
        if seen is None:
            return dropped(scores.softmax(-1), self.dropout, generator)
        # the second filling is for a position that sees nothing, to which the first has given equal weights
        hidden = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~seen, 0.0)
        return dropped(hidden, self.dropout, generator)

    def __repr__(self) -> str:
        given = [f"causal={self.causal}"] * self.causal + [f"scale={self.scale}"] * (self.scale is not None)
        given += [f"dropout={self.dropout}"] * bool(self.dropout)
        return f"Attention({', '.join(given)})"
