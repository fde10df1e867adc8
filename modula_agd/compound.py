"""Compounds: fully-connected and residual networks, each an algebraic expression over atoms and bonds.

Convolutional networks are in ``convnet.py``, transformers in ``transformer.py``; the parts that all of them share are here.
"""

import math
from typing import Literal

from modula_agd.atom import Bias, Linear, Scale
from modula_agd.bond import Identity, Multiply, ReLU, SiLU
from modula_agd.error import InvalidArgument, SpaceMismatch
from modula_agd.module import Module
from modula_agd.space import Space, flag, positive

Form = Literal["convex", "sum"]


def rectifier() -> Module:
    """sqrt(2)·ReLU, which keeps the mean square of a symmetric input (He et al. 2015, arXiv:1502.01852)."""
    return math.sqrt(2) * ReLU()


def linear(fan_out: int | Space, fan_in: int | Space, bias: bool = False) -> Module:
    """A Linear, followed by a Bias if one is wanted."""
    flag("the choice of a bias", bias)
    layer = Linear(fan_out, fan_in)
    return Bias(layer.codomain) @ layer if bias else layer


def normalised(normalisation: Module, space: Space, affine: bool = False) -> Module:
    """A normalisation of a space, followed by a scale and a bias of each feature if they are wanted."""
    flag("the choice of affine parameters", affine)
    bound = normalisation.bind(space)
    return Bias(space) @ Scale(space) @ bound if affine else bound


def MLP(outputs: int | Space, width: int, inputs: int, depth: int, *, bias: bool = False) -> Module:
    """A fully-connected network: Linear @ rectifier @ ... @ Linear.

    Args:
        outputs: number of outputs, or a space such as ``Logits(10)``.
        width: features of each hidden layer.
        inputs: features of the input.
        depth: number of Linear layers, ≥ 1.
        bias: whether each Linear is followed by a Bias.

    Raises:
        InvalidArgument: a number is below 1.
    """
    positive("the depth of an MLP", depth)
    if depth == 1:
        return linear(outputs, inputs, bias)
    network = rectifier() @ linear(width, inputs, bias)
    for _ in range(depth - 2):
        network = rectifier() @ linear(width, width, bias) @ network
    return linear(outputs, width, bias) @ network


def mixed(shortcut: Module, branch: Module, branches: int, form: Form = "convex") -> Module:
    """One residual connection of a stack of ``branches``: (1 − 1/B)·shortcut + (1/B)·branch, or the plain sum.

    In the convex form magnitudes stay and the stack has the depth of one branch; the plain sum lets them grow.
    """
    for side in (shortcut, branch):
        if not isinstance(side, Module):
            raise SpaceMismatch(f"a residual connection was asked for with {side!r}, which is not a module")
    positive("the number of branches of a residual stack", branches)
    if form not in ("convex", "sum"):
        raise InvalidArgument(f"a residual connection was asked for in the form {form!r}; choose 'convex' or 'sum'")
    if form == "sum":
        return shortcut + branch
    return branch if branches == 1 else (1 - 1 / branches) * shortcut + (1 / branches) * branch


def residual(block: Module | tuple[Module, ...], blocks: int, *, form: Form = "convex") -> Module:
    """A residual stack ((1 − 1/B)·Identity + (1/B)·block)^B, whose depth is that of one block.

    Args:
        block: a module from a space to itself; or several, such as attention and feed-forward, that take turns, each with
            a residual connection of its own (B then counts them all).
        blocks: number of blocks ≥ 1, each with weights of its own.
        form: "convex", or "sum" for Identity + block.

    Raises:
        InvalidArgument: a block maps its space to another, their number is below 1, or the form is neither.
        SpaceMismatch: a block is no module, or there is none.
    """
    positive("the number of residual blocks", blocks)
    branches = block if isinstance(block, tuple) else (block,)
    if not branches or not all(isinstance(branch, Module) for branch in branches):
        raise SpaceMismatch(
            f"a residual stack was asked for of {block!r}; give a module, or a tuple of modules in turn"
        )
    for branch in branches:
        if branch.domain != branch.codomain:
            raise InvalidArgument(
                f"a residual block must map a space to itself, but {branch!r} maps {branch.domain} to {branch.codomain}"
            )
    count = blocks * len(branches)
    stage, *rest = (mixed(Identity(), branch, count, form) for branch in branches)
    for connection in rest:
        stage = connection @ stage
    return stage**blocks


def ResMLP(
    outputs: int | Space, width: int, inputs: int, blocks: int, *, block_depth: int = 2, bias: bool = False
) -> Module:
    """A residual MLP: Linear @ residual stack @ Linear, each block ``block_depth`` layers of rectifier and Linear.

    Args:
        outputs: number of outputs, or a space.
        width: features of the residual stream.
        inputs: features of the input.
        blocks: number of residual blocks.
        block_depth: Linear layers per block.
        bias: whether each Linear is followed by a Bias.

    Raises:
        InvalidArgument: a number is below 1.
    """
    positive("the depth of a block", block_depth)
    layer = linear(width, width, bias) @ rectifier()
    return linear(outputs, width, bias) @ residual(layer**block_depth, blocks) @ linear(width, inputs, bias)


def SwiGLU(space: int | Space, hidden: int, *, bias: bool = False) -> Module:
    """A gated feed-forward layer: Linear @ (SiLU(Linear x) ⊙ Linear x) (Shazeer 2020, arXiv:2002.05202).

    Of second degree in its input: in a stack, normalise what enters it, or outputs grow without limit as weights drift.

    Args:
        space: Features or a Sequence, which it maps to itself.
        hidden: features of the product.
        bias: whether each Linear is followed by a Bias.
    """
    inner = linear(hidden, space, bias)
    kind = inner.codomain
    return (
        linear(space, hidden if kind is None else kind, bias)
        @ Multiply()
        @ (SiLU() @ inner, linear(hidden, space, bias))
    )
