"""Hypothesis strategies: draws, spaces, and whole module trees built from the algebra, of bounded size.

Everything drawn is plain data or a module, whose ``repr`` is code; Hypothesis shrinks towards small widths, few parts,
step sizes of 0 and seed 0.
"""

import math
from typing import Any

from hypothesis import strategies as st

from modula_agd.atom import Bias, Embedding, Linear, Scale
from modula_agd.attention import QKV, Attention, MergeHeads
from modula_agd.bond import (
    GELU,
    Abs,
    Identity,
    LeakyReLU,
    Mean,
    Multiply,
    ReLU,
    Sigmoid,
    SiLU,
    Tanh,
    UnitBall,
)
from modula_agd.convolution import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from modula_agd.loss import BinaryCrossEntropy, CrossEntropy, Huber, Loss, SquareLoss
from modula_agd.module import Module
from modula_agd.normalisation import LayerNorm, RMSNorm
from modula_agd.pooling import AvgPool1d, AvgPool2d, AvgPool3d, MaxPool1d, MaxPool2d, MaxPool3d
from modula_agd.position import Rotary
from modula_agd.space import Features, Image, Logits, Sequence, Space, Volume
from modula_agd.verify.descent_laws import Objective
from modula_agd.verify.draw import (
    INPUT_KINDS,
    INPUT_STEP_KINDS,
    MATRIX_KINDS,
    STEP_KINDS,
    LossDraw,
    ModuleDraw,
    NormDraw,
)
from modula_agd.wiring import each

SEEDS = st.integers(0, 2**31 - 1)


def log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers whose logarithm is spread evenly between those of low and high."""
    return st.floats(math.log(low), math.log(high), allow_nan=False).map(math.exp)


def relative_steps() -> st.SearchStrategy[float]:
    """Relative steps: none, and 1e-6 to 2."""
    return st.one_of(st.just(0.0), log_uniform(1e-6, 2.0))


def module_draws(side: int | None = None, least_batch: int = 1) -> st.SearchStrategy[ModuleDraw]:
    """Draws for the laws of a module, one in five with an attack.

    Args:
        side: positions of a sequence and pixels along each side of an image; 2 to 4 where not given.
        least_batch: samples that a batch has at least, 1 to 3.
    """
    return st.builds(
        ModuleDraw,
        seed=SEEDS,
        weights=st.sampled_from(MATRIX_KINDS),
        steps=st.sampled_from(STEP_KINDS),
        inputs=st.sampled_from(INPUT_KINDS),
        input_steps=st.sampled_from(INPUT_STEP_KINDS),
        magnitude=log_uniform(1e-3, 1e3),
        t=relative_steps(),
        input_step=relative_steps(),
        batch=st.integers(least_batch, 3),
        side=st.integers(2, 4) if side is None else st.just(side),
        attack=st.sampled_from([0, 0, 0, 0, 4]),
    )


def norm_draws(widest: int = 15) -> st.SearchStrategy[NormDraw]:
    """Draws for the laws of a norm; scales from 10^−widest to 10^widest."""
    kinds = st.sampled_from(MATRIX_KINDS)
    return st.builds(NormDraw, seed=SEEDS, kind=kinds, other=kinds, exponent=st.integers(-widest, widest))


def loss_draws() -> st.SearchStrategy[LossDraw]:
    """Draws for the laws of a loss."""
    return st.builds(
        LossDraw,
        seed=SEEDS,
        width=st.integers(1, 6),
        batch=st.integers(1, 3),
        scale=st.one_of(st.just(0.0), log_uniform(1e-2, 30.0)),
        delta=log_uniform(1e-3, 30.0),
        change=st.sampled_from(("gaussian", "sign", "spike", "residual")),
        soft=st.booleans(),
        attack=st.sampled_from([0, 0, 0, 0, 4]),
    )


WIDTHS = st.integers(1, 5)
FACTORS = st.sampled_from([-1.5, -1.0, 0.25, 0.5, 2.0])
KINKED = (ReLU, Abs, LeakyReLU, UnitBall)
SMOOTH = (GELU, SiLU, Tanh, Sigmoid, Identity, lambda: RMSNorm(eps=0.1), lambda: LayerNorm(eps=0.1))


def linears(fan_out: Any, fan_in: Space, smooth: bool) -> st.SearchStrategy[Module]:
    """A Linear, possibly with a Bias and a Scale, each of random mass."""

    def build(mass: float, bias: bool, scale: bool) -> Module:
        layer: Module = Linear(fan_out, fan_in, mass=mass)
        if scale:
            layer = Scale(layer.codomain) @ layer  # pyright: ignore[reportArgumentType]
        return Bias(layer.codomain) @ layer if bias else layer  # pyright: ignore[reportArgumentType]

    return st.builds(build, st.sampled_from([1.0, 0.5, 2.0]), st.booleans(), st.booleans())


CONVOLUTIONS: dict[type[Space], tuple[Any, Any]] = {
    Sequence: (Conv1d, ConvTranspose1d),
    Image: (Conv2d, ConvTranspose2d),
    Volume: (Conv3d, ConvTranspose3d),
}
POOLS: dict[type[Space], tuple[Any, Any]] = {
    Sequence: (AvgPool1d, MaxPool1d),
    Image: (AvgPool2d, MaxPool2d),
    Volume: (AvgPool3d, MaxPool3d),
}


@st.composite
def convolutions(draw: st.DrawFn, space: Space) -> Module:
    """A convolution from a space to itself that keeps every side: stride 1, an odd kernel padded by half of it."""
    kind = draw(st.sampled_from(CONVOLUTIONS[type(space)]))
    side, dilation = draw(st.sampled_from([(1, 1), (3, 1), (3, 2)]))
    return kind(
        space.width,
        space.width,
        side,
        padding=dilation * (side // 2),
        dilation=dilation,
        groups=draw(st.sampled_from([n for n in range(1, space.width + 1) if space.width % n == 0])),
        geometry=draw(st.sampled_from(["taps", "patch"])),
    )


@st.composite
def resampling(draw: st.DrawFn, space: Space, smooth: bool = False) -> Module:
    """Pooling, or a strided convolution, that takes positions of side 2 and more to side 1 and more."""
    convolution, transposed = CONVOLUTIONS[type(space)]
    average, maximum = POOLS[type(space)]
    what = draw(st.sampled_from(["average", "convolution", "transposed", *([] if smooth else ["maximum"])]))
    if what in ("average", "maximum"):
        return (average if what == "average" else maximum)(2).bind(space)
    side, padding = draw(st.sampled_from([(2, 0), (3, 1), (4, 2)]))
    kind = convolution if what == "convolution" else transposed
    geometry = draw(st.sampled_from(["taps", "patch"]))
    return kind(space.width, space.width, side, stride=2, padding=padding, geometry=geometry)


def _bonds(space: Space, smooth: bool) -> st.SearchStrategy[Module]:
    kinds = SMOOTH if smooth else SMOOTH + KINKED
    return st.sampled_from([kind for kind in kinds if not (kind is UnitBall and space.max_norm)]).map(
        lambda kind: kind().bind(space)
    )


@st.composite
def attentions(draw: st.DrawFn, space: Sequence) -> Module:
    """Multi-head self-attention on a Sequence, causal or not, with rotary positions where heads allow them."""
    heads = draw(st.sampled_from([h for h in (1, 2, 3) if space.width % h == 0]))
    width = space.width // heads
    projected: Module = QKV(heads, width, space.width, per_head=draw(st.booleans()))
    if width % 2 == 0 and draw(st.booleans()):
        projected = each(Rotary(), Rotary(), Identity()) @ projected
    scale = draw(st.sampled_from([None, 0.5]))
    mixed = MergeHeads() @ Attention(causal=draw(st.booleans()), scale=scale) @ projected
    return Linear(space, space) @ mixed if draw(st.booleans()) else mixed


@st.composite
def same_space_modules(draw: st.DrawFn, space: Space, size: int, smooth: bool = False) -> Module:
    """A module from a space (Features, Sequence, Image or Volume) to itself, of at most about ``size`` layers."""
    if size <= 1:
        kinds = ["bond"]
        kinds += ["linear"] if isinstance(space, Features | Sequence) else []
        kinds += ["convolution"] if type(space) in CONVOLUTIONS else []
        kinds += ["attention"] if isinstance(space, Sequence) else []
        what = draw(st.sampled_from(kinds))
        if what == "bond":
            return draw(_bonds(space, smooth))
        if what == "attention" and isinstance(space, Sequence):
            return draw(attentions(space))
        return draw(linears(space, space, smooth) if what == "linear" else convolutions(space))
    shape = draw(st.sampled_from(["compose", "sum", "scaled", "power", "product"]))
    part = same_space_modules(space, size // 2, smooth)
    if shape == "compose":
        return draw(part) @ draw(part)
    if shape == "sum":
        return draw(FACTORS) * draw(part) + draw(part)
    if shape == "scaled":
        return draw(FACTORS) * draw(part)
    if shape == "power":
        return draw(same_space_modules(space, size // 3, smooth)) ** draw(st.integers(1, 3))
    return Multiply() @ (draw(part), draw(part))


@st.composite
def networks(draw: st.DrawFn, size: int = 6, smooth: bool = False) -> Module:
    """A whole network, [batch, ...] to [batch, outputs]: a stem from features, positions or tokens; a trunk; a head.

    Args:
        size: about how many layers.
        smooth: whether only modules with a second-order bound are drawn.
    """
    width, outputs = draw(WIDTHS), draw(st.integers(1, 4))
    stem = draw(st.sampled_from(["features", "image", "volume", "sequence", "tokens"]))
    head: Space = draw(st.sampled_from([Features(outputs), Logits(outputs)]))
    if stem == "features":
        space: Space = Features(width)
        return draw(linears(head, space, smooth)) @ draw(same_space_modules(space, size, smooth))
    space = {"image": Image, "volume": Volume}.get(stem, Sequence)(width)
    trunk: Module = draw(same_space_modules(space, size, smooth))
    if draw(st.booleans()):
        trunk = draw(resampling(space, smooth)) @ trunk
    if stem == "tokens":
        trunk = trunk @ Embedding(width, draw(st.integers(1, 4)))
    return draw(linears(head, Features(width), smooth)) @ Mean() @ trunk


def losses() -> st.SearchStrategy[Loss]:
    """Every loss with a proved bound."""
    return st.sampled_from(
        [SquareLoss(), CrossEntropy(), CrossEntropy(label_smoothing=0.1), BinaryCrossEntropy(), Huber(0.7)]
    )


def objectives(size: int = 4, smooth: bool = False) -> st.SearchStrategy[Objective]:
    """A network with a loss."""
    return st.builds(Objective, networks(size, smooth), losses())
