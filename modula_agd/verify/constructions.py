"""The library's own modules, norms and losses as subjects of verification, each with draws that attain its bounds."""

import math
from dataclasses import replace

from modula_agd.atom import Bias, Embedding, Linear, Scale
from modula_agd.bond import (
    GELU,
    Abs,
    Flatten,
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
from modula_agd.compound import MLP, ResMLP
from modula_agd.convolution import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from modula_agd.kernel_norm import PerTap, Unfolded
from modula_agd.loss import BinaryCrossEntropy, CrossEntropy, Huber, SquareLoss
from modula_agd.module import Module
from modula_agd.norm import RMS, Frobenius, RowBlocks, RowNorm, Sign, Spectral
from modula_agd.pooling import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
)
from modula_agd.space import Features, Image, Logits, Sequence, Volume
from modula_agd.verify.construction import EXACT, MEAN, SMALL, SPIKES, STATIC, WITNESS, Construction
from modula_agd.verify.descent_laws import Objective
from modula_agd.verify.draw import LossDraw, ModuleDraw
from modula_agd.verify.norm_laws import Shaped
from modula_agd.verify.structured_constructions import STRUCTURED


def _smooth(module: Module, steepest: float, most_curved: ModuleDraw | None, **loose: str) -> Construction:
    """A smooth nonlinearity: steepest at one point, most curved at one."""
    witnesses = {"growth": replace(WITNESS, magnitude=max(abs(steepest), 1e-4), input_step=1e-3 if steepest else 0.2)}
    if most_curved is not None:
        witnesses["second order"] = most_curved
    return Construction(module, witnesses, {**STATIC, **loose})


def _maximum(module: Module, side: int) -> Construction:
    """Max pooling of one window, in which each position is nonzero in a channel of its own."""
    scattered = replace(WITNESS, inputs="scattered", side=side)
    return Construction(module, dict.fromkeys(("magnitude", "growth"), scattered), STATIC)


_SPIKE_AT_ZERO = replace(WITNESS, inputs="zero", input_steps="spike", magnitude=1e-3, input_step=1.0)

MODULES: dict[str, Construction] = {
    "Linear": Construction(Linear(4, 3)),
    "Linear into Logits": Construction(Linear(Logits(4), 3)),
    "Linear on Sequence": Construction(Linear(Sequence(2), Sequence(3))),
    "Conv2d 3×3": Construction(Conv2d(4, 3, 3, padding=1)),
    "Conv2d 1×1": Construction(Conv2d(3, 2, 1)),
    "Conv2d strided": Construction(Conv2d(2, 3, (1, 3), stride=2, padding=1)),
    "Conv2d grouped": Construction(Conv2d(4, 2, 3, padding=1, groups=2)),
    "Conv2d dilated": Construction(Conv2d(2, 2, 2, dilation=2, padding=1)),
    "Conv2d, patch": Construction(Conv2d(4, 3, 3, padding=1, geometry="patch")),
    "Conv2d grouped, patch": Construction(Conv2d(4, 2, (2, 3), stride=(1, 2), padding=1, groups=2, geometry="patch")),
    "Conv1d": Construction(Conv1d(3, 2, 3, stride=2, padding=1)),
    "Conv1d, patch": Construction(Conv1d(3, 2, 2, dilation=2, padding=1, geometry="patch")),
    "Conv3d": Construction(Conv3d(2, 3, 2)),
    "Conv3d depthwise, patch": Construction(Conv3d(4, 2, (1, 2, 3), padding=(0, 1, 1), groups=2, geometry="patch")),
    "ConvTranspose1d": Construction(ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1)),
    "ConvTranspose1d, patch": Construction(ConvTranspose1d(2, 3, 5, stride=2, geometry="patch")),
    "ConvTranspose2d": Construction(ConvTranspose2d(3, 2, (3, 2), stride=(2, 1), padding=1)),
    "ConvTranspose2d grouped, patch": Construction(ConvTranspose2d(2, 4, 3, stride=2, groups=2, geometry="patch")),
    "ConvTranspose2d dilated, patch": Construction(ConvTranspose2d(2, 2, 3, stride=2, dilation=2, geometry="patch")),
    "ConvTranspose2d without overlap": Construction(ConvTranspose2d(3, 2, 2, stride=2)),
    "ConvTranspose3d": Construction(ConvTranspose3d(3, 2, 3, stride=(1, 2, 2))),
    "Embedding": Construction(Embedding(3, 5), loose=EXACT),
    "Bias": Construction(Bias(3), loose=MEAN | EXACT),
    "Bias on Logits": Construction(Bias(Logits(3)), loose=MEAN | EXACT),
    "Bias on Image": Construction(Bias(Image(2)), loose=MEAN | EXACT),
    "Scale on Volume": Construction(Scale(Volume(2))),
    "Scale": Construction(Scale(3)),
    "ReLU": Construction(ReLU().bind(Features(3)), loose=STATIC),
    "LeakyReLU": Construction(LeakyReLU(0.1).bind(Sequence(3)), loose=STATIC),
    "Abs": Construction(Abs().bind(Logits(3)), loose=STATIC),
    "GELU": _smooth(GELU().bind(Features(3)), math.sqrt(2), _SPIKE_AT_ZERO, magnitude="|GELU(x)| < |x|"),
    "SiLU": _smooth(SiLU().bind(Features(3)), 2.39936, _SPIKE_AT_ZERO, magnitude="|SiLU(x)| < |x|"),
    "Tanh": _smooth(
        Tanh().bind(Logits(3)), 0.0, replace(WITNESS, magnitude=0.6585, input_step=1e-3), magnitude="|tanh(x)| < |x|"
    ),
    "Sigmoid": _smooth(
        Sigmoid().bind(Logits(3)),
        0.0,
        replace(WITNESS, magnitude=1.317, input_step=1e-3),
        magnitude="|sigmoid(x)| < 1/2 + |x|/4",
    ),
    "Identity": Construction(Identity().bind(Image(2)), loose=STATIC | EXACT),
    "Flatten": Construction(Flatten(4, 4).bind(Image(2)), loose=STATIC | EXACT, side=4),
    "Mean": Construction(Mean().bind(Sequence(3)), loose=STATIC | EXACT),
    "Mean of Volume": Construction(Mean().bind(Volume(3)), loose=STATIC | EXACT),
    "AvgPool1d": Construction(AvgPool1d(2).bind(Sequence(3)), loose=STATIC | EXACT),
    "AvgPool2d": Construction(AvgPool2d(2).bind(Image(3)), loose=STATIC | EXACT),
    "AvgPool3d": Construction(AvgPool3d((1, 2, 2), stride=1).bind(Volume(2)), loose=STATIC | EXACT),
    "AdaptiveAvgPool2d": Construction(AdaptiveAvgPool2d(2, 3).bind(Image(3)), loose=STATIC | EXACT),
    "MaxPool1d": _maximum(MaxPool1d(3, stride=1, padding=1).bind(Sequence(3)), side=3),
    "MaxPool2d": _maximum(MaxPool2d(2).bind(Image(4)), side=2),
    "MaxPool2d of a large window": _maximum(MaxPool2d((3, 2), stride=1, padding=1).bind(Image(2)), side=3),
    "MaxPool3d": _maximum(MaxPool3d(2).bind(Volume(5)), side=2),
    "AdaptiveMaxPool2d": _maximum(AdaptiveMaxPool2d(1, 1).bind(Image(4)), side=2),
    "UnitBall": Construction(UnitBall().bind(Features(4)), {"growth": replace(WITNESS, magnitude=0.5)}, STATIC),
    "Multiply": Construction(
        Multiply() @ (Linear(3, 3), Linear(3, 3)), dict.fromkeys(("magnitude", "growth", "second order"), SPIKES)
    ),
    "Multiply by Logits": Construction(Multiply() @ (Linear(Logits(3), 3), Linear(3, 3))),
    "Sum": Construction(Linear(3, 4) + 2 * Linear(3, 4)),
    "Scaled": Construction(-0.5 * Linear(3, 4)),
    "Power": Construction(Linear(3, 3) ** 3),
    "masses": Construction(Linear(3, 4).with_mass(0.5) @ Linear(4, 4, mass=3.0)),
    "MLP": Construction(MLP(3, 5, 4, depth=3)),
    "MLP with bias": Construction(MLP(Logits(3), 5, 4, depth=3, bias=True), loose=MEAN),
    "deep linear": Construction(Linear(2, 5) @ Linear(5, 4) @ Linear(4, 3)),
    "ResMLP": Construction(ResMLP(3, 5, 4, blocks=3), loose=MEAN),
    "convolutional": Construction(Linear(3, 4) @ Mean() @ ReLU() @ Conv2d(4, 4, 1) @ ReLU() @ Conv2d(4, 2, 1)),
    "tokens": Construction(
        Linear(Logits(3), 4) @ Mean() @ (0.5 * Identity() + 0.5 * Linear(Sequence(4), Sequence(4))) @ Embedding(4, 5),
        loose=MEAN,
    ),
    **STRUCTURED,
}

NORMS: dict[str, Construction] = {
    "Spectral": Construction(Shaped(Spectral(), (4, 3))),
    "Spectral 1×n": Construction(Shaped(Spectral(), (1, 5))),
    "Spectral n×1": Construction(Shaped(Spectral(), (5, 1))),
    "Spectral 1×1": Construction(Shaped(Spectral(), (1, 1))),
    "Frobenius": Construction(Shaped(Frobenius(), (3, 5))),
    "RowNorm into Logits": Construction(Shaped(RowNorm.into_logits(4), (3, 4))),
    "RowNorm of Embedding": Construction(Shaped(RowNorm.of_embedding(3), (5, 3))),
    "RowBlocks": Construction(Shaped(RowBlocks(Spectral(), 3), (6, 4))),
    "RowBlocks, Frobenius": Construction(Shaped(RowBlocks(Frobenius(), 2), (4, 3))),
    "RMS": Construction(Shaped(RMS(), (5,))),
    "Sign": Construction(Shaped(Sign(), (4,))),
    "PerTap Spectral": Construction(Shaped(PerTap(Spectral(), 3.0), (4, 3, 3, 3))),
    "PerTap Frobenius": Construction(Shaped(PerTap(Frobenius(), 2.0, groups=2), (4, 2, 2, 2))),
    "PerTap transposed": Construction(Shaped(PerTap(Spectral(), 1.5, groups=2, transposed=True), (4, 3, 3))),
    "Unfolded Spectral": Construction(Shaped(Unfolded(Spectral()), (4, 3, 3, 3))),
    "Unfolded grouped": Construction(Shaped(Unfolded(Spectral(), groups=2), (6, 2, 2))),
    "Unfolded Frobenius": Construction(Shaped(Unfolded(Frobenius(), groups=2), (4, 2, 2, 2, 1))),
    "Unfolded transposed": Construction(
        Shaped(Unfolded(Spectral(), transposed=True, patches=((0, 2), (1, 3))), (4, 3, 4))
    ),
    "Unfolded transposed, unlike patches": Construction(
        Shaped(Unfolded(Spectral(), transposed=True, patches=((0, 2), (1,))), (4, 3, 3)),
        loose={"Hölder": "ones are largest in one patch alone; the direction itself attains it, as dual pairing shows"},
    ),
}

_FAR = LossDraw(scale=1.0, delta=1e-3, change="gaussian", width=4, soft=True)
_ONE = LossDraw(scale=1.0, width=1, soft=True)
_STRICT = {"convex bound": "a parabola is strictly convex"}

LOSSES: dict[str, Construction] = {
    "SquareLoss": Construction(SquareLoss(), {"convex loss": _FAR, "residual": _ONE}, _STRICT),
    "CrossEntropy": Construction(CrossEntropy(), {"convex loss": _FAR}, _STRICT),
    "CrossEntropy, smoothed": Construction(CrossEntropy(label_smoothing=0.1), {"convex loss": _FAR}, _STRICT),
    "BinaryCrossEntropy": Construction(BinaryCrossEntropy(), {"convex loss": _FAR, "residual": _ONE}, _STRICT),
    "Huber": Construction(
        Huber(0.7), {"convex loss": _FAR, "residual": _ONE, "convex bound": replace(_ONE, delta=1e3)}
    ),
}

# targets of odd seeds are 0, so that the residual points along the outputs
_AIMED = replace(WITNESS, seed=1)
_LARGE = replace(WITNESS, magnitude=1e3)

OBJECTIVES: dict[str, Construction] = {
    "linear, square": Construction(Objective(Linear(2, 3), SquareLoss()), {"certified descent": _AIMED}),
    "deep linear, square": Construction(
        Objective(Linear(2, 5) @ Linear(5, 4) @ Linear(4, 3), SquareLoss()),
        {
            "majorisation, exact growth": WITNESS,
            "majorisation, closed form": SMALL,
            "majorisation, certified": _AIMED,
            "bounded gradient": _AIMED,
            "bounded objective": WITNESS,
        },
    ),
    "deep linear, cross-entropy": Construction(
        Objective(Linear(Logits(2), 4) @ Linear(4, 3), CrossEntropy()), {"exact growth beats closed form": _LARGE}
    ),
    "deep linear, binary": Construction(Objective(Linear(2, 4) @ Linear(4, 3), BinaryCrossEntropy())),
    "deep linear, Huber": Construction(Objective(Linear(2, 4) @ Linear(4, 3), Huber())),
    "ReLU MLP, square": Construction(
        Objective(MLP(3, 5, 4, depth=3), SquareLoss()),
        {"majorisation, exact growth": WITNESS, "bounded gradient": _AIMED},
    ),
    "GELU network, cross-entropy": Construction(
        Objective(Linear(Logits(3), 4) @ GELU() @ Linear(4, 3), CrossEntropy())
    ),
    "residual, square": Construction(
        Objective(ResMLP(3, 4, 3, blocks=3), SquareLoss()),
        {"majorisation, exact growth": WITNESS, "bounded gradient": _AIMED},
    ),
    "biases and products": Construction(
        Objective(Linear(2, 3) @ Multiply() @ (Bias(3) @ Linear(3, 3), Scale(3)), SquareLoss())
    ),
}
"""Networks with losses; witnesses only where a law is attained."""
