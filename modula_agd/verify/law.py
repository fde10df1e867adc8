"""Laws: inequalities lhs ≤ rhs that can be measured on a draw, attacked, and shrunk until they fail.

A law is a plain object. ``tensors`` turns a draw into free tensors; ``measure`` normalises them (so that whatever the
tensors are, the law's hypotheses hold) and evaluates both sides. Because the hypotheses hold by construction, gradient
ascent on lhs/rhs is an honest attack.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from modula_agd.bound import Grade


class Device(NamedTuple):
    """Where and in which dtype a law is evaluated."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float64


class Measurement(NamedTuple):
    """Both sides of a law on one case.

    Args:
        lhs: what is claimed to be smaller, ≥ 0.
        rhs: what is claimed to be larger, ≥ 0.
        slack: how far rounding alone may carry lhs above rhs, ≥ 0.
    """

    lhs: Tensor
    rhs: Tensor
    slack: float | Tensor

    @property
    def ratio(self) -> float:
        """lhs/(rhs + slack); 1 where the law is attained, above 1 where it is broken."""
        above = self.lhs - self.rhs
        if bool(above <= 0):
            return float(self.lhs / self.rhs) if bool(self.rhs > 0) else 0.0
        return (
            float("inf")
            if not bool(self.lhs.isfinite())
            else float(1 + (above - self.slack).clamp(min=0) / (self.rhs + self.slack))
        )

    def holds(self, shrink: float = 1.0) -> bool:
        """Whether lhs ≤ shrink·rhs + slack; False for NaN."""
        return bool(self.lhs <= shrink * self.rhs + self.slack)


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """On CUDA convolutions round to TF32, eleven bits, unless told otherwise: a slack is that of the dtype."""
    cudnn: Any = torch.backends.cudnn
    owner, name, exact = (
        (cudnn.conv, "fp32_precision", "ieee") if hasattr(cudnn, "conv") else (cudnn, "allow_tf32", False)
    )
    before = getattr(owner, name)
    setattr(owner, name, exact)
    try:
        yield
    finally:
        setattr(owner, name, before)


def side(value: Any, like: Tensor) -> Tensor:
    """A number that the algebra computed, as one side of a law beside a measured one."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


class Law(ABC):
    """One inequality, for any subject (a module, a norm, a loss, a network with its loss)."""

    name: ClassVar[str]
    statement: ClassVar[str]
    grade: ClassVar[Grade] = Grade.PROVED
    fixed: ClassVar[frozenset[str]] = frozenset({"targets"})
    """Tensors that an attack must leave alone, because the law supposes something of them that scaling does not restore."""

    @abstractmethod
    def applies(self, subject: Any) -> bool:
        """Whether the subject makes the claim at all."""

    @abstractmethod
    def tensors(self, subject: Any, draw: Any) -> dict[str, Tensor]:
        """The free tensors of a case, float64 on the CPU."""

    @abstractmethod
    def measure(self, subject: Any, draw: Any, tensors: dict[str, Tensor], where: Device) -> Measurement:
        """Both sides, for these tensors."""

    def __call__(self, subject: Any, draw: Any, where: Device = Device()) -> Measurement:  # noqa: B008 (immutable)
        """The measurement on a draw, after its attack if it has one."""
        tensors = self.tensors(subject, draw)
        with _exact_convolutions():
            if getattr(draw, "attack", 0):
                # the fused kernels of attention have no second derivative, which an attack on a gradient needs
                with sdpa_kernel(SDPBackend.MATH):
                    tensors = self._attacked(subject, draw, tensors, where)
            with torch.no_grad():
                return self.measure(subject, draw, tensors, where)

    def _attacked(self, subject: Any, draw: Any, tensors: dict[str, Tensor], where: Device) -> dict[str, Tensor]:
        """A few steps of gradient ascent on log lhs − log rhs, each a tenth of every tensor's own size."""
        for _ in range(draw.attack):
            free = {
                name: x.clone().requires_grad_()
                for name, x in tensors.items()
                if x.is_floating_point() and name not in self.fixed
            }
            with torch.enable_grad():
                lhs, rhs, _ = self.measure(subject, draw, {**tensors, **free}, where)
                if not (lhs.requires_grad and bool(lhs > 0) and bool(rhs > 0)):
                    return tensors
                gradients = torch.autograd.grad(lhs.log() - rhs.log(), list(free.values()), allow_unused=True)
            moved = dict(tensors)
            for (name, x), gradient in zip(free.items(), gradients, strict=True):
                size = None if gradient is None else torch.linalg.vector_norm(gradient)
                if gradient is not None and size is not None and bool(size > 0) and bool(size.isfinite()):
                    moved[name] = (x + 0.1 * torch.linalg.vector_norm(x) * gradient / size).detach()
            tensors = moved
        return tensors
