"""The library's own modules, norms and losses as subjects of verification, each with draws that attain its bounds.

``WITNESS`` attains almost every rule at once: constant inputs, weights of rank one aligned with them, every change along
what it changes. Where a rule is attained elsewhere, the construction says where; where it is not tight, it says why.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from modula_agd.atom import Bias, Conv2d, Embedding, Linear, Scale
from modula_agd.bond import (
    GELU,
    Abs,
    AvgPool2d,
    Flatten,
    Identity,
    LeakyReLU,
    MaxPool2d,
    Mean,
    Multiply,
    ReLU,
    Sigmoid,
    SiLU,
    Tanh,
    UnitBall,
)
from modula_agd.compound import MLP, ResMLP
from modula_agd.loss import BinaryCrossEntropy, CrossEntropy, Huber, Loss, SquareLoss
from modula_agd.module import Module
from modula_agd.norm import RMS, Frobenius, PerTap, RowNorm, Sign, Spectral
from modula_agd.space import Features, Image, Logits, Sequence
from modula_agd.verify.descent_laws import Objective
from modula_agd.verify.draw import LossDraw, ModuleDraw, NormDraw
from modula_agd.verify.norm_laws import Shaped

WITNESS = ModuleDraw(weights="ones", steps="along", inputs="constant", input_steps="along", t=0.3, input_step=0.2)
SMALL = replace(WITNESS, t=1e-4)


@dataclass(frozen=True)
class Construction:
    """A subject, and where its laws are attained.

    Args:
        subject: a module, shaped norm, loss or objective.
        witnesses: draws by law name, where the default ones do not attain the law.
        loose: laws that no draw attains, with the reason.
        side: the one size of image that the subject takes, if it takes only one.
    """

    subject: Any
    witnesses: dict[str, Any] = field(default_factory=dict)
    loose: dict[str, str] = field(default_factory=dict)
    side: int | None = None

    def witness(self, law: str) -> Any | None:
        """A draw that attains the law; None where it is loose, or, for an objective, where none is listed."""
        if law in self.loose:
            return None
        default: Any = WITNESS
        if isinstance(self.subject, Objective):
            default = None
        elif isinstance(self.subject, Shaped):
            default = NormDraw(kind="ones", other="ones")
        elif isinstance(self.subject, Loss):
            default = LossDraw()
        elif law in ("ceiling depth", "depth"):
            default = SMALL
        return self.witnesses.get(law, default)


_STATIC = {"ceiling depth": "no weight, no growth", "depth": "no weight, no growth"}
_EXACT = {"second order": "linear in all that moves: 0 ≤ 0"}
_MEAN = {"ceiling depth": "a sum's ceiling takes the largest depth where γ has their mean"}


def _smooth(module: Module, steepest: float, most_curved: ModuleDraw | None, **loose: str) -> Construction:
    """A smooth nonlinearity: steepest at one point, most curved at one."""
    witnesses = {"growth": replace(WITNESS, magnitude=max(abs(steepest), 1e-4), input_step=1e-3 if steepest else 0.2)}
    if most_curved is not None:
        witnesses["second order"] = most_curved
    return Construction(module, witnesses, {**_STATIC, **loose})


_SPIKE_AT_ZERO = replace(WITNESS, inputs="zero", input_steps="spike", magnitude=1e-3, input_step=1.0)
_SPIKES = replace(WITNESS, inputs="spike", weights="identity")

MODULES: dict[str, Construction] = {
    "Linear": Construction(Linear(4, 3)),
    "Linear into Logits": Construction(Linear(Logits(4), 3)),
    "Linear on Sequence": Construction(Linear(Sequence(2), Sequence(3))),
    "Conv2d 3×3": Construction(Conv2d(4, 3, 3, padding=1)),
    "Conv2d 1×1": Construction(Conv2d(3, 2, 1)),
    "Conv2d strided": Construction(Conv2d(2, 3, (1, 3), stride=2, padding=1)),
    "Conv2d grouped": Construction(Conv2d(4, 2, 3, padding=1, groups=2)),
    "Conv2d dilated": Construction(Conv2d(2, 2, 2, dilation=2, padding=1)),
    "Embedding": Construction(Embedding(3, 5), loose=_EXACT),
    "Bias": Construction(Bias(3), loose=_MEAN | _EXACT),
    "Bias on Logits": Construction(Bias(Logits(3)), loose=_MEAN | _EXACT),
    "Bias on Image": Construction(Bias(Image(2)), loose=_MEAN | _EXACT),
    "Scale": Construction(Scale(3)),
    "ReLU": Construction(ReLU().bind(Features(3)), loose=_STATIC),
    "LeakyReLU": Construction(LeakyReLU(0.1).bind(Sequence(3)), loose=_STATIC),
    "Abs": Construction(Abs().bind(Logits(3)), loose=_STATIC),
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
    "Identity": Construction(Identity().bind(Image(2)), loose=_STATIC | _EXACT),
    "Flatten": Construction(Flatten(4, 4).bind(Image(2)), loose=_STATIC | _EXACT, side=4),
    "Mean": Construction(Mean().bind(Sequence(3)), loose=_STATIC | _EXACT),
    "AvgPool2d": Construction(AvgPool2d(2).bind(Image(3)), loose=_STATIC | _EXACT),
    "MaxPool2d": Construction(
        MaxPool2d(2).bind(Image(4)),
        dict.fromkeys(("magnitude", "growth"), replace(WITNESS, inputs="scattered", side=2)),
        _STATIC,
    ),
    "UnitBall": Construction(UnitBall().bind(Features(4)), {"growth": replace(WITNESS, magnitude=0.5)}, _STATIC),
    "Multiply": Construction(
        Multiply() @ (Linear(3, 3), Linear(3, 3)), dict.fromkeys(("magnitude", "growth", "second order"), _SPIKES)
    ),
    "Multiply by Logits": Construction(Multiply() @ (Linear(Logits(3), 3), Linear(3, 3))),
    "Sum": Construction(Linear(3, 4) + 2 * Linear(3, 4)),
    "Scaled": Construction(-0.5 * Linear(3, 4)),
    "Power": Construction(Linear(3, 3) ** 3),
    "masses": Construction(Linear(3, 4).with_mass(0.5) @ Linear(4, 4, mass=3.0)),
    "MLP": Construction(MLP(3, 5, 4, depth=3)),
    "MLP with bias": Construction(MLP(Logits(3), 5, 4, depth=3, bias=True), loose=_MEAN),
    "deep linear": Construction(Linear(2, 5) @ Linear(5, 4) @ Linear(4, 3)),
    "ResMLP": Construction(ResMLP(3, 5, 4, blocks=3), loose=_MEAN),
    "convolutional": Construction(Linear(3, 4) @ Mean() @ ReLU() @ Conv2d(4, 4, 1) @ ReLU() @ Conv2d(4, 2, 1)),
    "tokens": Construction(
        Linear(Logits(3), 4) @ Mean() @ (0.5 * Identity() + 0.5 * Linear(Sequence(4), Sequence(4))) @ Embedding(4, 5),
        loose=_MEAN,
    ),
}

NORMS: dict[str, Construction] = {
    "Spectral": Construction(Shaped(Spectral(), (4, 3))),
    "Spectral 1×n": Construction(Shaped(Spectral(), (1, 5))),
    "Spectral n×1": Construction(Shaped(Spectral(), (5, 1))),
    "Spectral 1×1": Construction(Shaped(Spectral(), (1, 1))),
    "Frobenius": Construction(Shaped(Frobenius(), (3, 5))),
    "RowNorm into Logits": Construction(Shaped(RowNorm.into_logits(4), (3, 4))),
    "RowNorm of Embedding": Construction(Shaped(RowNorm.of_embedding(3), (5, 3))),
    "RMS": Construction(Shaped(RMS(), (5,))),
    "Sign": Construction(Shaped(Sign(), (4,))),
    "PerTap Spectral": Construction(Shaped(PerTap(Spectral(), 3.0), (4, 3, 3, 3))),
    "PerTap Frobenius": Construction(Shaped(PerTap(Frobenius(), 2.0, groups=2), (4, 2, 2, 2))),
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
