"""Draws: plain, printable descriptions of a test case, and the tensors that they stand for.

A draw holds names, numbers and a seed, no tensors. Its ``repr`` is code, so a failing case is reproduced by pasting it;
and Hypothesis can shrink it. The kinds cover what random tensors miss: rank one, repeated and spread singular values,
vectors aligned with top singular vectors, single spikes, zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from modula_agd.space import Heads, Image, Mask, Sequence, Space, Tokens, Volume

MATRIX_KINDS = ("orthogonal", "gaussian", "ones", "identity", "rank one", "spread", "zero")
"""Shapes of a weight or of its change, up to scale."""

STEP_KINDS = ("along", "against", *MATRIX_KINDS)
"""A change may also be a multiple of the weight itself."""

INPUT_KINDS = ("gaussian", "constant", "spike", "scattered", "lone", "corner", "zero")
"""Shapes of an input: "scattered" has one channel per position, another at each; "lone" is 1 at the first position and −1
elsewhere; "corner" is ±1 over the features of the first position of the first sample, and 0 elsewhere."""

INPUT_STEP_KINDS = ("along", "against", "gaussian", "constant", "spike")


@dataclass(frozen=True)
class ModuleDraw:
    """One way to fill a module with weights, an input and a change of both.

    Args:
        seed: of everything random.
        weights: a kind for every weight.
        steps: a kind for every weight's change.
        inputs: a kind for the input; of a tuple, possibly one for each part, with bars between: "constant|lone|lone".
        input_steps: a kind for the input's change, likewise.
        magnitude: norm of the input, > 0.
        t: relative step of an atom of mass 1, ≥ 0.
        input_step: relative change of the input, ≥ 0.
        batch: number of samples.
        side: positions along a sequence, or pixels along each side of an image.
        attack: steps of gradient ascent on lhs/rhs, from there.
    """

    seed: int = 0
    weights: str = "orthogonal"
    steps: str = "along"
    inputs: str = "gaussian"
    input_steps: str = "along"
    magnitude: float = 1.0
    t: float = 0.1
    input_step: float = 0.0
    batch: int = 2
    side: int = 4
    attack: int = 0


@dataclass(frozen=True)
class NormDraw:
    """One gradient (and one weight) of a given shape.

    Args:
        seed: of everything random.
        kind: of the gradient.
        other: kind of a second tensor of the shape.
        exponent: the gradient is multiplied by 10 to this power.
    """

    seed: int = 0
    kind: str = "gaussian"
    other: str = "gaussian"
    exponent: int = 0


@dataclass(frozen=True)
class LossDraw:
    """Outputs, targets and a change of the outputs.

    Args:
        seed: of everything random.
        width: number of outputs.
        batch: number of samples.
        scale: standard deviation of the outputs.
        delta: norm of the change, in the loss's own norm.
        change: "gaussian", "sign", "spike" or "residual" (towards the targets).
        soft: whether targets are probabilities rather than class indices, where the loss takes both.
        attack: steps of gradient ascent on lhs/rhs, from there.
    """

    seed: int = 0
    width: int = 2
    batch: int = 1
    scale: float = 0.0
    delta: float = 0.01
    change: str = "sign"
    soft: bool = False
    attack: int = 0


def generators(seed: int) -> Iterator[torch.Generator]:
    """Independent generators, one for each thing to draw."""
    base = torch.Generator().manual_seed(seed)
    while True:
        yield torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=base)))


def matrix(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A float64 tensor of the given kind; weights of more than two dimensions are stacks of matrices over the last ones."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "zero":
        return torch.zeros_like(noise)
    if kind == "ones":
        return torch.ones_like(noise)
    if noise.ndim < 2:
        spike = torch.zeros_like(noise)
        spike[:1] = 1.0
        return {"identity": spike, "rank one": spike, "orthogonal": noise.sign()}.get(kind, noise)
    stack = noise.flatten(2).movedim(-1, 0) if noise.ndim > 2 else noise[None]
    if kind == "identity":
        stack = torch.eye(*stack.shape[-2:], dtype=torch.float64).expand_as(stack).clone()
    elif kind != "gaussian":
        u, s, vh = torch.linalg.svd(stack, full_matrices=False)
        rank = torch.arange(s.shape[-1], dtype=torch.float64)
        values = {
            "orthogonal": torch.ones_like(s),
            "rank one": (rank == 0).to(s).expand_as(s),
            "spread": s * 0.03**rank,
        }
        stack = (u * values[kind][..., None, :]) @ vh
    return (stack.movedim(0, -1) if noise.ndim > 2 else stack[0]).reshape(shape)


def activation(kind: str, space: Space, draw: ModuleDraw, generator: torch.Generator) -> Tensor:
    """A float64 batch in ``space`` (int64 ids in Tokens, booleans in Mask), unnormalised; no tuple."""
    if isinstance(space, Tokens):
        return torch.randint(space.width, (draw.batch, draw.side), generator=generator)
    if isinstance(space, Mask):
        mask = torch.rand((draw.batch, draw.side), generator=generator) > 0.3
        # a fully masked row is an error, and the first position is seen by every causal row
        return mask.index_fill(1, torch.tensor([0]), True)
    positions = _positions(space, draw.side)
    shape = (draw.batch, space.width, *positions)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "constant":
        x = torch.ones_like(x)
    elif kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "corner":
        x = torch.zeros_like(x)
        x[(0, slice(None), *[0] * len(positions))] = (-1.0) ** torch.arange(space.width, dtype=x.dtype)
    elif kind == "lone":
        x = -torch.ones_like(x)
        x[..., 0] = 1.0
    elif kind in ("spike", "scattered"):
        flat = torch.zeros_like(x).flatten(2) if positions else torch.zeros_like(x)[..., None]
        index = torch.arange(flat.shape[-1]) % space.width if kind == "scattered" else torch.zeros(flat.shape[-1])
        flat.scatter_(1, index.long().expand(draw.batch, 1, -1), 1.0)
        x = flat.reshape(shape)
    return x.movedim(1, -1) if space.axis == -1 else x


def _positions(space: Space, side: int) -> tuple[int, ...]:
    """How many positions a batch has in each dimension besides features."""
    if isinstance(space, Heads):
        return space.heads, side
    return {Sequence: (side,), Image: (side,) * 2, Volume: (side,) * 3}.get(type(space), ())
