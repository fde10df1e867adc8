"""Compounds: whole architectures, each an algebraic expression over atoms and bonds."""

import math

from modula_agd.atom import Bias, Linear
from modula_agd.bond import Identity, ReLU
from modula_agd.error import InvalidArgument
from modula_agd.module import Module
from modula_agd.space import Space, positive


def rectifier() -> Module:
    """sqrt(2)·ReLU, which keeps the mean square of a symmetric input (He et al. 2015, arXiv:1502.01852)."""
    return math.sqrt(2) * ReLU()


def _linear(fan_out: int | Space, fan_in: int | Space, bias: bool) -> Module:
    linear = Linear(fan_out, fan_in)
    return Bias(linear.codomain) @ linear if bias else linear


def MLP(outputs: int | Space, width: int, inputs: int, depth: int, *, bias: bool = False) -> Module:
    """A fully-connected network: Linear @ rectifier @ ... @ Linear.

    Args:
        outputs: number of outputs, or a space such as ``Logits(10)``.
        width: features of each hidden layer.
        inputs: features of the input.
        depth: number of Linear layers, ≥ 1.
        bias: whether each Linear is followed by a Bias.
    """
    positive("the depth of an MLP", depth)
    if depth == 1:
        return _linear(outputs, inputs, bias)
    network = rectifier() @ _linear(width, inputs, bias)
    for _ in range(depth - 2):
        network = rectifier() @ _linear(width, width, bias) @ network
    return _linear(outputs, width, bias) @ network


def residual(block: Module, blocks: int) -> Module:
    """A convex residual stack ((1 − 1/B)·Identity + (1/B)·block)^B, whose depth is that of one block.

    Args:
        block: a module from a space to itself.
        blocks: B ≥ 1, each with weights of its own.
    """
    positive("the number of residual blocks", blocks)
    if block.domain != block.codomain:
        raise InvalidArgument(
            f"a residual block must map a space to itself, but {block!r} maps {block.domain} to {block.codomain}"
        )
    if blocks == 1:
        return block
    return ((1 - 1 / blocks) * Identity() + (1 / blocks) * block) ** blocks


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
    """
    positive("the depth of a block", block_depth)
    layer = _linear(width, width, bias) @ rectifier()
    return _linear(outputs, width, bias) @ residual(layer**block_depth, blocks) @ _linear(width, inputs, bias)
