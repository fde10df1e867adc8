"""Losses: a value, and a bound on what the linear model of the loss leaves out.

For an output f and a change Δ the Bregman divergence is ℓ(f + Δ) − ℓ(f) − ⟨∂ℓ/∂f, Δ⟩. A loss states a bound of it,
B(‖Δ‖), in the norm of the network's codomain; the majorisation needs nothing else of it. Every B here is at most
h·δ²/2, with the curvature h in this table:

======================  ====================================  =================================  ========================
loss                    ℓ of one sample                       own norm of Δ, with its h          source
======================  ====================================  =================================  ========================
``SquareLoss``          ‖f − y‖²_RMS/2                        RMS, 1 (an identity)               arXiv:2304.05187, eq. 2
``CrossEntropy``        −Σ y·log softmax(f)                   max, 1 (a variance of Δ)           second derivative of KL
``BinaryCrossEntropy``  mean of −y log p − (1−y) log(1−p)     RMS, 1/4                           p(1 − p) ≤ 1/4
``UnhalvedSquareLoss``  ‖f − y‖²_RMS                          RMS, 1 (assumed; true: 2)          the published code
``Huber``               mean of huber(f − y)                  RMS, 1; linear beyond 2·threshold  \\|ℓ″\\| ≤ 1, \\|ℓ′\\| ≤ threshold
======================  ====================================  =================================  ========================

Over positions (sequences) the loss is the mean, and the bounds stay true.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn import functional

from modula_agd.bound import Constant, Grade, Number, smaller
from modula_agd.error import InvalidArgument, SpaceMismatch, UnknownBound
from modula_agd.space import Space, finite, positive


class Loss(ABC):
    """A loss that knows its Bregman bound. Final subclasses are frozen dataclasses."""

    curvature: ClassVar[Constant]
    """h with B(δ) ≤ h·δ²/2 for δ in the loss's own norm."""
    max_norm: ClassVar[bool]
    """Whether the loss's own norm is the maximum over outputs (else their RMS)."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("curvature", "max_norm"):
            if ABC not in cls.__bases__ and not hasattr(cls, name):
                raise UnknownBound(
                    f"the loss {cls.__name__} does not declare `{name}`. Declare h with B(δ) ≤ h·δ²/2 as `curvature: ClassVar[Constant] = "
                    "Constant(h, grade, source)`, and whether δ is a maximum over outputs, or their RMS, as `max_norm: ClassVar[bool]`."
                )

    @abstractmethod
    def per_sample(
        self, outputs: Float[Tensor, "batch *shape"], targets: Num[Tensor, "batch *target"]
    ) -> Float[Tensor, " batch"]:
        """ℓ of each sample."""

    def __call__(
        self, outputs: Float[Tensor, "batch *shape"], targets: Num[Tensor, "batch *target"]
    ) -> Float[Tensor, ""]:
        """The mean of ℓ over the batch.

        Args:
            outputs: the network's outputs.
            targets: as ``per_sample`` takes them.

        Raises:
            SpaceMismatch: the two shapes do not fit, or one is no batch of tensors.
        """
        self._check(outputs, targets)
        return self.per_sample(outputs, targets).mean()

    def _check(self, outputs: object, targets: object) -> None:
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
            kinds = f"{type(outputs).__name__} and {type(targets).__name__}"
            raise SpaceMismatch(f"{type(self).__name__} takes outputs and targets as tensors, but got {kinds}")
        if targets.is_complex() or not outputs.is_floating_point():
            raise SpaceMismatch(
                f"{type(self).__name__} takes real outputs and targets, but got {outputs.dtype} and {targets.dtype}"
            )
        if outputs.ndim < 2 or outputs.numel() == 0:
            raise SpaceMismatch(
                f"{type(self).__name__} takes a batch of at least one sample, [batch, ..., outputs], but the outputs have "
                f"shape {tuple(outputs.shape)}"
            )

    def conversion(self, codomain: Space) -> tuple[Constant, Constant]:
        """(proved, typical) constants by which δ in the codomain's norm exceeds δ in the loss's own norm."""
        if self.max_norm and not codomain.max_norm:
            worst = Constant(math.sqrt(codomain.width), Grade.PROVED, "‖·‖_max ≤ sqrt(n)·RMS", "one nonzero output")
            typical = Constant(1.0, Grade.TYPICAL, "all outputs move alike; end in Logits to prove it")
            return worst, typical
        one = Constant(1.0, Grade.PROVED, "RMS ≤ maximum")
        return one, one

    def bound(self, delta: Number) -> Number:
        """B(δ) for δ in the loss's own norm: convex, increasing, 0 at 0. Quadratic unless overridden."""
        return self.curvature.value * delta * delta / 2

    def divergence(
        self,
        outputs: Float[Tensor, "batch *shape"],
        moved: Float[Tensor, "batch *shape"],
        targets: Num[Tensor, "batch *target"],
    ) -> Float[Tensor, " batch"]:
        """The exact Bregman divergence ℓ(moved) − ℓ(outputs) − ⟨∂ℓ, moved − outputs⟩ of each sample, ≥ 0."""
        gradient = self.gradient(outputs, targets)
        change = (gradient * (moved - outputs)).flatten(1).sum(1)
        return self.per_sample(moved, targets) - self.per_sample(outputs, targets) - change

    def gradient(
        self, outputs: Float[Tensor, "batch *shape"], targets: Num[Tensor, "batch *target"]
    ) -> Float[Tensor, "batch *shape"]:
        """∂ℓ/∂f of each sample's own loss (not divided by the batch size)."""
        return torch.func.grad(lambda f: self.per_sample(f, targets).sum())(outputs)

    def residual(
        self, outputs: Float[Tensor, "batch *shape"], targets: Num[Tensor, "batch *target"], codomain: Space
    ) -> Float[Tensor, ""]:
        """R, the mean over samples of the dual norm of ∂ℓ/∂f in the codomain; for the square loss mean ‖f − y‖_RMS.

        Raises:
            SpaceMismatch: as the loss itself does.
        """
        self._check(outputs, targets)
        return codomain.dual(self.gradient(outputs, targets)).mean()


def one_hot(
    labels: Int[Tensor, " batch"], classes: int, dtype: torch.dtype | None = None
) -> Float[Tensor, "batch classes"]:
    """Class indices as targets of a square loss: one-hot times sqrt(classes), of RMS 1 (arXiv:2304.05187, section 4).

    Args:
        labels: class indices, 0 to classes − 1; looked at once, so call this before training rather than in a step.
        classes: number of classes.
        dtype: of the targets; the default dtype where not given.

    Raises:
        InvalidArgument: a label is out of range.
    """
    positive("the number of classes", classes)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InvalidArgument(
            f"one_hot takes integer class indices, but got {labels.dtype}. Convert them: labels.long()."
        )
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise InvalidArgument(
            f"one_hot was given labels from {int(labels.min())} to {int(labels.max())} for {classes} classes, 0..{classes - 1}"
        )
    return functional.one_hot(labels.long(), classes).to(dtype or torch.get_default_dtype()) * math.sqrt(classes)


def _same_shape(loss: Loss, outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape != targets.shape:
        remedy = (
            " Class indices become targets with one_hot(labels, classes)." if not targets.is_floating_point() else ""
        )
        raise SpaceMismatch(
            f"{type(loss).__name__} compares outputs of shape {tuple(outputs.shape)} with targets of shape {tuple(targets.shape)}.{remedy}"
        )


def _mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets.to(outputs.dtype)).square().flatten(1).mean(1)


@dataclass(frozen=True)
class SquareLoss(Loss):
    """‖f − y‖²_RMS/2: half the mean over outputs of (f − y)². Targets have the outputs' shape."""

    curvature: ClassVar[Constant] = Constant(1.0, Grade.PROVED, "an identity: the divergence is ‖Δ‖²_RMS/2", "any Δ")
    max_norm: ClassVar[bool] = False

    def per_sample(
        self, outputs: Float[Tensor, "batch *shape"], targets: Num[Tensor, "batch *target"]
    ) -> Float[Tensor, " batch"]:
        _same_shape(self, outputs, targets)
        return _mean_square(outputs, targets) / 2


@dataclass(frozen=True)
class UnhalvedSquareLoss(Loss):
    """‖f − y‖²_RMS with the curvature of *half* of it: what the published AGD code minimises.

    Its true curvature is 2. Steps as long as a curvature of 1 allows are not covered by a valid majorisation, so the
    grade is ``assumed``; the class exists to reproduce published trajectories.
    """

    curvature: ClassVar[Constant] = Constant(
        1.0, Grade.ASSUMED, "the AGD code's η, which belongs to half this loss; true: 2"
    )
    max_norm: ClassVar[bool] = False

    def per_sample(
        self, outputs: Float[Tensor, "batch *shape"], targets: Num[Tensor, "batch *target"]
    ) -> Float[Tensor, " batch"]:
        _same_shape(self, outputs, targets)
        return _mean_square(outputs, targets)


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """−Σ y·log softmax(f), over the last dimension; mean over positions where there are any.

    Targets are class indices ([batch] or [batch, time]) or probabilities of the outputs' shape, which must sum to 1: a sum
    above 1 multiplies the true curvature and voids the bound.

    Args:
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].

    Raises:
        InvalidArgument: it is not.
    """

    label_smoothing: float = 0.0
    curvature: ClassVar[Constant] = Constant(
        1.0,
        Grade.PROVED,
        "∂²ℓ along Δ is a variance of Δ, at most ‖Δ‖²_max",
        "Δ = ±δ on two classes of probability 1/2",
    )
    max_norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (finite(self.label_smoothing) and 0 <= self.label_smoothing <= 1):
            raise InvalidArgument(
                f"CrossEntropy was given label_smoothing={self.label_smoothing!r}, which must lie in [0, 1]"
            )

    def conversion(self, codomain: Space) -> tuple[Constant, Constant]:
        # over the columns of an image the softmax would be taken without a word, where there are as many as classes
        if codomain.axis != -1:
            raise SpaceMismatch(
                f"CrossEntropy takes its classes along the last dimension, but the network gives {codomain} = {codomain.shape}. End it "
                "in Logits, or in a Sequence of positions (ToSequence) for a class of each pixel."
            )
        return super().conversion(codomain)

    def per_sample(
        self, outputs: Float[Tensor, "batch *shape"], targets: Num[Tensor, "batch *target"]
    ) -> Float[Tensor, " batch"]:
        if targets.dtype == torch.bool:
            raise SpaceMismatch(
                "CrossEntropy takes class indices or probabilities, but got torch.bool. Two classes: targets.long()."
            )
        indices = not targets.is_floating_point()
        if targets.shape != (outputs.shape[:-1] if indices else outputs.shape):
            raise SpaceMismatch(
                f"CrossEntropy on outputs of shape {tuple(outputs.shape)} takes class indices of shape {tuple(outputs.shape[:-1])} "
                f"or probabilities of shape {tuple(outputs.shape)}, but got {targets.dtype} of shape {tuple(targets.shape)}"
            )
        flat = targets.flatten().long() if indices else targets.flatten(0, -2)
        try:
            losses = functional.cross_entropy(
                outputs.flatten(0, -2),
                flat,
                reduction="none",
                label_smoothing=self.label_smoothing,
                # torch would leave out index −100 without a word, and the mean would count it as learnt
                ignore_index=-(2**31),
            )
        except IndexError as error:
            raise InvalidArgument(
                f"CrossEntropy was given a class index outside 0..{outputs.shape[-1] - 1}. Check the labels and the number of outputs."
            ) from error
        return losses.reshape(outputs.shape[0], -1).mean(1)


@dataclass(frozen=True)
class BinaryCrossEntropy(Loss):
    """Mean over outputs of −y·log p − (1 − y)·log(1 − p), p = sigmoid(f); targets in [0, 1] of the outputs' shape."""

    curvature: ClassVar[Constant] = Constant(0.25, Grade.PROVED, "p(1 − p) ≤ 1/4, in the mean over outputs", "f = 0")
    max_norm: ClassVar[bool] = False

    def per_sample(
        self, outputs: Float[Tensor, "batch *shape"], targets: Num[Tensor, "batch *target"]
    ) -> Float[Tensor, " batch"]:
        _same_shape(self, outputs, targets)
        losses = functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")
        return losses.flatten(1).mean(1)


@dataclass(frozen=True)
class Huber(Loss):
    """Mean over outputs of z²/2 for |z| ≤ threshold, threshold·(|z| − threshold/2) beyond, with z = f − y.

    B(δ) = δ²/2 up to δ = 2·threshold and 2·threshold·(δ − threshold) beyond: for one output the exact supremum, reached
    from z = −Δ/2 (then from z = −threshold); it is concave in δ², so the mean over outputs obeys it in RMS (Jensen).

    Args:
        threshold: where the quadratic ends, in units of the outputs, > 0.

    Raises:
        InvalidArgument: the threshold is not a finite number above 0.
    """

    threshold: float = 1.0
    curvature: ClassVar[Constant] = Constant(
        1.0, Grade.PROVED, "|ℓ″| ≤ 1, in the mean over outputs", "|z| and |z + Δ| ≤ threshold"
    )
    max_norm: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (finite(self.threshold) and self.threshold > 0):
            raise InvalidArgument(f"Huber was given threshold={self.threshold!r}, which must be a finite number > 0")

    def per_sample(
        self, outputs: Float[Tensor, "batch *shape"], targets: Num[Tensor, "batch *target"]
    ) -> Float[Tensor, " batch"]:
        _same_shape(self, outputs, targets)
        return (
            functional.huber_loss(outputs, targets.to(outputs.dtype), reduction="none", delta=self.threshold)
            .flatten(1)
            .mean(1)
        )

    def bound(self, delta: Number) -> Number:
        """δ²/2, then linear."""
        # the tangent at 2·threshold lies below the parabola, so writing it with the clipped part needs no branch
        inner = smaller(delta, 2.0 * self.threshold)
        return inner * inner / 2 + 2 * self.threshold * (delta - inner)
