"""Norms on convolution kernels: a kernel is cut into matrices, and each is measured by a matrix norm.

=============  =========================================  ==================================  ======================
norm           ‖W‖                                        direction                           dual norm
=============  =========================================  ==================================  ======================
``PerTap``     gain·max over taps of the inner norm       per tap, divided by gain            Σ_taps inner dual/gain
``Unfolded``   inner norm of all taps side by side        of the unfolded matrix              inner dual of it
=============  =========================================  ==================================  ======================

``PerTap`` sees k matrices [o, i]; what their sum does is a separate constant. ``Unfolded`` sees one matrix [o, i·k],
which acts on a whole patch of the input, so that in the supremum over positions of the RMS over channels nothing is
left to add.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from modula_agd.error import InvalidArgument
from modula_agd.norm import Direction, Norm, Scalar, drawing_dtype


class KernelNorm(Norm, ABC):
    """Shared by both: factor·max of the inner norm over the matrices that a kernel is cut into.

    Kernels are laid out as torch has them: [o, i/groups, *k], and [i, o/groups, *k] for a transposed convolution.
    """

    inner: Norm
    groups: int
    transposed: bool

    @property
    @abstractmethod
    def factor(self) -> float:
        """What stands before the inner norm."""

    @abstractmethod
    def stacked(self, taps: Float[Tensor, "k groups out in_"]) -> list[Float[Tensor, "stack groups rows cols"]]:
        """The matrices, in one stack for each of their shapes."""

    @abstractmethod
    def unstacked(
        self, stacks: list[Float[Tensor, "stack groups rows cols"]], count: int
    ) -> Float[Tensor, "k groups out in_"]:
        """The ``count`` taps that ``stacked`` made the stacks of."""

    def cut(self, kernel: Float[Tensor, "a b *kernel"]) -> list[Float[Tensor, "stack groups rows cols"]]:
        """The matrices that a kernel is cut into, in one stack for each of their shapes."""
        # one name for any number of kernel dimensions
        layout = "(g i) o k -> k g o i" if self.transposed else "(g o) i k -> k g o i"
        return self.stacked(rearrange(kernel.flatten(2), layout, g=self.groups))

    def kernel(
        self, matrices: list[Float[Tensor, "stack groups rows cols"]], shape: torch.Size | tuple[int, ...]
    ) -> Float[Tensor, "a b *kernel"]:
        """The kernel of that shape that is cut into the matrices."""
        layout = "k g o i -> (g i) o k" if self.transposed else "k g o i -> (g o) i k"
        return rearrange(self.unstacked(matrices, math.prod(shape[2:])), layout).reshape(shape)

    def size(self, weight: Float[Tensor, "a b *kernel"]) -> Scalar:
        return self.factor * torch.stack([self.inner.size(x) for x in self.cut(weight)]).amax()

    def bound(self, weight: Float[Tensor, "a b *kernel"]) -> Scalar:
        return self.factor * torch.stack([self.inner.bound(x) for x in self.cut(weight)]).amax()

    def direction(self, gradient: Float[Tensor, "a b *kernel"]) -> Direction:
        return self._joined([self.inner.direction(x) for x in self.cut(gradient)], gradient.shape)

    def matrices(self, gradient: Float[Tensor, "a b *kernel"]) -> list[Float[Tensor, "*stack rows cols"]]:
        return [matrix for part in self.cut(gradient) for matrix in self.inner.matrices(part)]

    def assembled(
        self, gradient: Float[Tensor, "a b *kernel"], factors: list[Float[Tensor, "*stack rows cols"]]
    ) -> Direction:
        left, units = list(factors), []
        for part in self.cut(gradient):
            own = [left.pop(0) for _ in self.inner.matrices(part)]
            units.append(self.inner.assembled(part, own))
        return self._joined(units, gradient.shape)

    def _joined(self, units: list[Direction], shape: torch.Size) -> Direction:
        factors = [unit.factor for unit in units]
        if len(units) == 1 and not isinstance(factors[0], Tensor):
            kernel, factor = self.kernel([units[0].base], shape), factors[0] / self.factor
        else:
            kernel, factor = self.kernel([unit.dense() for unit in units], shape), 1 / self.factor
        # contiguous, as the gradients are that it is multiplied with
        return Direction(kernel.contiguous(), factor)

    def dual(self, gradient: Float[Tensor, "a b *kernel"]) -> Scalar:
        return torch.stack([self.inner.dual(x) for x in self.cut(gradient)]).sum() / self.factor

    def draw(
        self, shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "a b *kernel"]:
        shapes = [tuple(x.shape) for x in self.cut(torch.empty(shape, device="meta"))]
        drawn = [self.inner.draw(x, generator, generator.device, drawing_dtype(generator)) for x in shapes]
        return self.kernel([x / self.factor for x in drawn], shape).to(device, dtype).contiguous()


@dataclass(frozen=True)
class PerTap(KernelNorm):
    """gain·max over taps (and groups) of a matrix norm, for a convolution kernel [o, i/groups, *kernel].

    Args:
        inner: the norm of one tap's matrix [o/groups, i/groups], ``Spectral()`` or ``Frobenius()``.
        gain: what the sum over taps may add up to, in units of one tap; the AGD code uses sqrt(k_h·k_w).
        groups: channel groups, each with matrices of its own.
        transposed: whether the kernel is that of a transposed convolution, [i, o/groups, *kernel].
    """

    inner: Norm
    gain: float
    groups: int = 1
    transposed: bool = False

    @property
    def factor(self) -> float:
        return self.gain

    def stacked(self, taps: Float[Tensor, "k groups out in_"]) -> list[Float[Tensor, "stack groups rows cols"]]:
        return [taps]

    def unstacked(
        self, stacks: list[Float[Tensor, "stack groups rows cols"]], count: int
    ) -> Float[Tensor, "k groups out in_"]:
        return stacks[0]

    def __str__(self) -> str:
        return f"PerTap({self.inner}, {self.gain:.4g})"

    @property
    def euclidean(self) -> Norm:
        return PerTap(self.inner.euclidean, self.gain, self.groups, self.transposed)


@dataclass(frozen=True)
class Unfolded(KernelNorm):
    """max over patches (and groups) of a matrix norm of the taps of a patch side by side, [o/groups, (i/groups)·taps].

    With ``Spectral()`` it is sqrt(i·n/o)·σ_max for a patch of n taps: the operator norm from the RMS over a patch's
    channels and positions to the RMS over channels. A patch's RMS is at most its largest position's, so it bounds what
    a convolution does in the supremum over positions; where all taps are equal, that is attained by equal pixels.

    Args:
        inner: the norm of the unfolded matrix, ``Spectral()`` or ``Frobenius()``.
        groups: channel groups, each with matrices of its own.
        transposed: whether the kernel is that of a transposed convolution, [i, o/groups, *kernel].
        patches: the taps of each patch, counted through the kernel row by row; each tap in exactly one. Without any,
            one patch of all taps, as an ordinary convolution has it.

    Raises:
        InvalidArgument: a tap is missing, or in two patches.
    """

    inner: Norm
    groups: int = 1
    transposed: bool = False
    patches: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        taps = sorted(tap for patch in self.patches for tap in patch)
        if taps != list(range(len(taps))) or not all(self.patches):
            raise InvalidArgument(
                f"Unfolded was given patches={self.patches!r}, which name the taps {taps}. "
                "Name each of 0, 1, 2, ... once, in patches of at least one tap."
            )

    @property
    def factor(self) -> float:
        return 1.0

    def _patches_by_size(self, count: int) -> list[list[tuple[int, ...]]]:
        """Patches of one size share a stack, so that one polar iteration serves them all."""
        patches = self.patches or (tuple(range(count)),)
        if sum(map(len, patches)) != count:
            raise InvalidArgument(
                f"{self!r} was given a kernel of {count} taps, but its patches hold {sum(map(len, patches))}"
            )
        sizes = sorted({len(patch) for patch in patches})
        return [[patch for patch in patches if len(patch) == size] for size in sizes]

    def stacked(self, taps: Float[Tensor, "k groups out in_"]) -> list[Float[Tensor, "stack groups rows cols"]]:
        if not self.patches:
            return [rearrange(taps, "n g o i -> 1 g o (i n)")]
        # stacking views needs no index on the device, hence no wait for it
        alike = [
            torch.stack([torch.stack([taps[tap] for tap in patch]) for patch in patches])
            for patches in self._patches_by_size(len(taps))
        ]
        return [rearrange(x, "m n g o i -> m g o (i n)") for x in alike]

    def unstacked(
        self, stacks: list[Float[Tensor, "stack groups rows cols"]], count: int
    ) -> Float[Tensor, "k groups out in_"]:
        if not self.patches:
            return rearrange(stacks[0], "1 g o (i n) -> n g o i", n=count)
        found: dict[int, Tensor] = {}
        for x, patches in zip(stacks, self._patches_by_size(count), strict=True):
            parts = rearrange(x, "m g o (i n) -> m n g o i", n=len(patches[0]))
            found |= {tap: part[j] for part, patch in zip(parts, patches, strict=True) for j, tap in enumerate(patch)}
        return torch.stack([found[tap] for tap in range(count)])

    def __str__(self) -> str:
        return f"Unfolded({self.inner})"

    @property
    def euclidean(self) -> Norm:
        return Unfolded(self.inner.euclidean, self.groups, self.transposed, self.patches)
