"""Transformers: residual stacks of attention and feed-forward blocks, on text (GPT) and on images (ViT).

Residual connections are convex, (1 − 1/2B)·Identity + (1/2B)·block with 2B blocks of either kind, or ``form="sum"``, the usual
pre-norm transformer. Both normalise what enters a block.

The depth D of the convex form tends to a limit as blocks are added. The ceiling D̄ triples with each of them, as queries, keys and
values all have the depth of what went before: a closed-form step is then next to nothing, and exact growth is the search to use.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from modula_agd.atom import Bias, Embedding, Unembedding
from modula_agd.attention import QKV, Attention, MergeHeads
from modula_agd.bond import GELU, Identity, Mean, ToSequence
from modula_agd.bound import Gain
from modula_agd.compound import Form, SwiGLU, linear, normalised, residual
from modula_agd.convolution import Conv2d
from modula_agd.dropout import Dropout, WithDropout
from modula_agd.error import InvalidArgument, SpaceMismatch
from modula_agd.layer import LinearBond
from modula_agd.module import Module
from modula_agd.normalisation import LayerNorm
from modula_agd.position import Positions, Rotary
from modula_agd.space import Heads, Image, Logits, Sequence, Space, flag, positive
from modula_agd.wiring import Shared, each

MIXING = 1 / 3
"""What the output of attention is multiplied by: queries, keys and values each pass a change on (Large et al. 2024)."""


def self_attention(
    width: int, heads: int, *, causal: bool = False, rotary: bool = False, bias: bool = False, dropout: float = 0.0
) -> Module:
    """Multi-head self-attention on a Sequence: Linear @ Attention @ QKV, its output times 1/3.

    Args:
        width: features of the sequence.
        heads: number of heads, which divides the width.
        causal: whether a position sees itself and earlier ones alone.
        rotary: whether queries and keys are turned by their positions.
        bias: whether each projection is followed by a Bias.
        dropout: probability, of attention's weights.
    """
    positive("the width of a transformer", width)
    positive("the number of heads", heads)
    flag("the choice of rotary positions", rotary)
    if width % heads:
        raise InvalidArgument(f"{heads} heads were asked for, which must divide the width {width}")
    space = Heads(heads, width // heads)
    projected: Module = QKV(heads, width // heads, width)
    if bias:
        projected = each(Bias(space), Bias(space), Bias(space)) @ projected
    if rotary:
        projected = each(Rotary(), Rotary(), Identity()) @ projected
    attended = MergeHeads() @ Attention(causal=causal, dropout=dropout) @ projected
    return (MIXING * linear(Sequence(width), Sequence(width), bias)) @ attended


def Transformer(
    width: int,
    heads: int,
    blocks: int,
    *,
    causal: bool = False,
    expansion: int = 4,
    feed_forward: Literal["gelu", "swiglu"] = "gelu",
    rotary: bool = False,
    form: Form = "convex",
    bias: bool = False,
    affine: bool = False,
    dropout: float = 0.0,
) -> Module:
    """``blocks`` pairs of self-attention and feed-forward blocks on a Sequence, and a last normalisation.

    Args:
        width: features of the sequence.
        heads: number of heads, which divides the width.
        blocks: number of pairs ≥ 1.
        causal: whether a position sees itself and earlier ones alone.
        expansion: hidden features of the feed-forward blocks, in widths.
        feed_forward: "gelu", sqrt(2)·GELU between two Linear; "swiglu", a gated layer.
        rotary: whether queries and keys are turned by their positions.
        form: "convex" residual connections, or "sum".
        bias: whether each Linear is followed by a Bias.
        affine: whether each normalisation is followed by a scale and a bias.
        dropout: probability, of attention's weights and of the output of each block.

    Raises:
        InvalidArgument: a number is out of range, the heads do not divide the width, or a choice is none of those named.
        SpaceMismatch: rotary positions are left an odd number of features.
    """
    space = Sequence(width)
    if feed_forward not in ("gelu", "swiglu"):
        raise InvalidArgument(f"a transformer was asked for with feed_forward={feed_forward!r}; 'gelu' or 'swiglu'")
    positive("the expansion of a transformer", expansion)
    hidden = Sequence(expansion * width)
    if feed_forward == "gelu":
        mlp = linear(space, hidden, bias) @ (math.sqrt(2) * GELU()) @ linear(hidden, space, bias)
    else:
        mlp = SwiGLU(space, hidden.width, bias=bias)
    attention = self_attention(width, heads, causal=causal, rotary=rotary, bias=bias, dropout=dropout)
    norm = normalised(LayerNorm(), space, affine)
    branches = [branch @ norm for branch in (attention, mlp)]
    if dropout:
        branches = [Dropout(dropout) @ branch for branch in branches]
    return norm @ residual(tuple(branches), blocks, form=form)


def _dropping(share: float, module: Module) -> Module:
    """A module, and dropout of what it gives, if any; weights fit one with and without."""
    return WithDropout(share, module) if share else module


def GPT(
    tokens: int,
    width: int,
    heads: int,
    blocks: int,
    context: int,
    *,
    tied: bool = False,
    rotary: bool = False,
    bias: bool = False,
    dropout: float = 0.0,
    **options: object,
) -> Module:
    """A causal transformer over tokens, with scores of the next one in ``Logits(tokens)`` at each position.

    Args:
        tokens: size of the vocabulary.
        width: features of the residual stream.
        heads: number of heads, which divides the width.
        blocks: number of pairs of blocks.
        context: longest sequence; of no importance with rotary positions.
        tied: whether the head has the embedding's weight.
        rotary: rotary positions instead of learned ones, which are averaged with the embedding.
        bias: whether each Linear is followed by a Bias; a tied head has none.
        dropout: probability, as for ``Transformer`` and of what the first block is given, as in GPT-2 (Radford et al. 2019).
        options: as for ``Transformer``.

    Raises:
        InvalidArgument: a number is below 1, or as for ``Transformer``.
        SpaceMismatch: as for ``Transformer``.
    """
    positive("the context of a GPT", context)
    flag("the choice of a tied head", tied)
    flag("the choice of rotary positions", rotary)
    embedding: Module = Embedding(width, tokens)
    head: Module = linear(Logits(tokens), Sequence(width), bias)
    if tied:
        embedding, head = Shared("embedding", embedding), Shared("embedding", Unembedding(tokens, width))
    if not rotary:
        embedding = 0.5 * embedding + 0.5 * Positions(width, context)
    body = Transformer(width, heads, blocks, causal=True, rotary=rotary, bias=bias, dropout=dropout, **options)  # pyright: ignore
    return head @ body @ _dropping(dropout, embedding)


@dataclass(frozen=True)
class _Sized(LinearBond):
    """The image itself, which must have one size: a convolution would leave out what fills no patch.

    Args:
        side: pixels of its height and of its width.
    """

    side: int
    gain: ClassVar[Gain] = Gain.exact(1.0, "nothing happens to the image", "any")

    def forward(self, x: Any) -> Any:
        if x.shape[-2:] != (self.side, self.side):
            raise SpaceMismatch(
                f"a ViT for images of {self.side}×{self.side} pixels was given {x.shape[-2]}×{x.shape[-1]}. Resize the images, or "
                "build it with side=..., a multiple of the patch."
            )
        return x


def ViT(
    outputs: int | Space,
    width: int,
    heads: int,
    blocks: int,
    channels: int = 3,
    patch: int = 4,
    side: int = 32,
    *,
    bias: bool = False,
    dropout: float = 0.0,
    **options: object,
) -> Module:
    """A vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929): patches, learned positions, mean over positions.

    Args:
        outputs: number of outputs, or a space.
        width: features of the residual stream.
        heads: number of heads, which divides the width.
        blocks: number of pairs of blocks.
        channels: of the images.
        patch: side of a patch in pixels, which divides the side of the image.
        side: of the images in pixels.
        bias: whether each Linear and the patch embedding are followed by a Bias.
        dropout: probability, as for ``Transformer`` and of what the first block is given.
        options: as for ``Transformer``.

    Raises:
        InvalidArgument: a number is below 1, the patch does not divide the image, or as for ``Transformer``.
        SpaceMismatch: as for ``Transformer``, or outputs that are no scores of one image.
    """
    positive("the side of a patch", patch)
    positive("the side of an image", side)
    if side % patch:
        raise InvalidArgument(f"patches of {patch}×{patch} were asked for, whose side must divide the image's {side}")
    patches: Module = Conv2d(width, channels, patch, stride=patch, geometry="patch")
    if bias:
        patches = Bias(Image(width)) @ patches
    positioned = _dropping(dropout, 0.5 * Identity() + 0.5 * Positions(width, (side // patch) ** 2))
    body = Transformer(width, heads, blocks, bias=bias, dropout=dropout, **options)  # pyright: ignore[reportArgumentType]
    return linear(outputs, width, bias) @ Mean() @ body @ positioned @ ToSequence() @ patches @ _Sized(side)
