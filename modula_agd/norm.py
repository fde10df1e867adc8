"""Norms on weights: how large a weight is, and which unit step a gradient asks for.

An atom's weight lives in the operator norm between its two spaces. A norm answers five questions, and nothing about the
geometry of a step is decided anywhere else (theory: Large et al. 2024, arXiv:2405.14813; Bernstein & Newhouse 2024,
arXiv:2409.20325):

=============  ======================================================================================================
``size``       ‖W‖
``bound``      a certified upper bound of ‖W‖, by matrix products alone
``direction``  the unit dual direction u of a gradient g: ‖u‖ ≤ 1 and ⟨g, u⟩ = ‖g‖_dual (up to the polar factor's error)
``dual``       ‖g‖_dual = max over ‖u‖ ≤ 1 of ⟨g, u⟩, exactly
``draw``       a random weight of norm 1
=============  ======================================================================================================

=============  =========================================  ==================================  ======================
norm           ‖W‖                                        direction                           dual norm
=============  =========================================  ==================================  ======================
``Spectral``   sqrt(i/o)·σ_max(W)                         sqrt(o/i)·UVᵀ                       sqrt(o/i)·‖g‖_nuclear
``Frobenius``  sqrt(i/o)·‖W‖_F, an upper bound of it      sqrt(o/i)·g/‖g‖_F                   sqrt(o/i)·‖g‖_F
``RowNorm``    max over rows of factor·‖W_row‖₂           each row g_row/(factor·‖g_row‖₂)    Σ_rows ‖g_row‖₂/factor
``RMS``        ‖b‖₂/sqrt(d)                               sqrt(d)·g/‖g‖₂                      sqrt(d)·‖g‖₂
``Sign``       max |s|                                    sign(g)                             ‖g‖₁
``RowBlocks``  max over blocks of rows of the inner norm  per block                           Σ_blocks inner dual
``Transposed`` inner norm of the transpose                transposed                          inner dual
=============  =========================================  ==================================  ======================
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from modula_agd.device import precise
from modula_agd.polar import largest_singular_value_bound, polar, working_dtype
from modula_agd.rescale import rescale, unit

Scalar = Float[Tensor, ""]


def wide(x: Tensor) -> Tensor:
    """Scalars that steer a step are kept in double precision wherever the device has it."""
    return x.to(precise(x.device))


class Direction(NamedTuple):
    """A direction u = factor·base, left unmultiplied so that no copy of a weight is made before the step is known.

    ``factor`` is a Python number, a 0-d tensor, or holds one number per row (shape [rows, 1, ...]).
    """

    base: Float[Tensor, "*shape"]
    factor: float | Float[Tensor, "*broadcastable"] = 1.0

    @property
    def by_rows(self) -> bool:
        """Whether each row has a factor of its own."""
        return isinstance(self.factor, Tensor) and self.factor.ndim > 0

    def dense(self) -> Float[Tensor, "*shape"]:
        """The direction u itself."""
        factor = self.factor
        return self.base * (factor.to(self.base.dtype) if isinstance(factor, Tensor) else factor)

    def where(self, gradient: Float[Tensor, "*shape"]) -> "Direction":
        """The same direction, but 0 in each row of which ``gradient`` says nothing, where the direction is made row by row.

        A row of an embedding whose token has not been seen lately would move at full speed in a stale direction.
        """
        if not self.by_rows:
            return self
        factor = torch.as_tensor(self.factor)
        seen = gradient.flatten(1).count_nonzero(1).reshape(factor.shape) > 0
        return Direction(self.base, factor * seen)

    def silent(self) -> Scalar:
        """The number of rows that do not move, of a direction that is made row by row."""
        return wide((torch.as_tensor(self.factor) == 0).sum())

    def pair(self, gradient: Float[Tensor, "*shape"]) -> Scalar:
        """⟨gradient, u⟩, the descent per unit step along u, in double precision."""
        dtype = working_dtype(gradient.dtype)
        g, base = gradient.to(dtype), self.base.to(dtype)
        if not self.by_rows:
            return wide(torch.dot(g.flatten(), base.flatten())) * self.factor
        rows = torch.linalg.vecdot(g.flatten(1), base.flatten(1))
        return (wide(rows) * torch.as_tensor(self.factor).flatten()).sum()


class Norm(ABC):
    """A norm on one weight tensor. Final subclasses are frozen dataclasses without tensors."""

    @abstractmethod
    def size(self, weight: Float[Tensor, "*shape"]) -> Scalar:
        """‖weight‖, by an exact method (which may be slow)."""

    @abstractmethod
    def bound(self, weight: Float[Tensor, "*shape"]) -> Scalar:
        """A certified upper bound of ‖weight‖, cheap enough for every step."""

    @abstractmethod
    def direction(self, gradient: Float[Tensor, "*shape"]) -> Direction:
        """The unit dual direction of ``gradient``; zero where the gradient is zero."""

    def matrices(self, gradient: Float[Tensor, "*shape"]) -> list[Float[Tensor, "*stack rows cols"]]:
        """The stacks of matrices whose polar factors ``assembled`` asks for; none where a direction needs none.

        A norm that tells them lets the engine take the factors of all layers of one shape at once, and seldom.
        """
        return []

    def assembled(
        self, gradient: Float[Tensor, "*shape"], factors: list[Float[Tensor, "*stack rows cols"]]
    ) -> Direction:
        """``direction``, given the polar factors of ``matrices``."""
        return self.direction(gradient)

    @abstractmethod
    def dual(self, gradient: Float[Tensor, "*shape"]) -> Scalar:
        """‖gradient‖_dual, by an exact method (which may be slow)."""

    @abstractmethod
    def draw(
        self, shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "*shape"]:
        """A random weight with ‖weight‖ = 1. Drawn on the generator's device, then moved."""

    @property
    def euclidean(self) -> "Norm":
        """The norm whose dual direction needs no polar factor: never smaller, so every majorisation stays valid."""
        return self

    @property
    def stride(self) -> float:
        """How many unit steps move a typical (mean-field) input as far as one moves the input that the norm is attained at."""
        return 1.0


class BlockNorm(Norm):
    """max over blocks of factor·‖block‖₂; a subclass says what a block is."""

    @abstractmethod
    def factor(self, shape: torch.Size) -> float:
        """The factor before ‖block‖₂ for a weight of this shape."""

    @abstractmethod
    def dims(self, shape: torch.Size) -> tuple[int, ...]:
        """The dimensions within a block; the others count blocks."""

    def _block_norms(self, x: Tensor) -> Tensor:
        """The Euclidean norms of all blocks, in double precision."""
        scaled, peak = rescale(x.to(working_dtype(x.dtype)), self.dims(x.shape))
        return wide(torch.linalg.vector_norm(scaled, dim=self.dims(x.shape), keepdim=True)) * wide(peak)

    def size(self, weight: Float[Tensor, "*shape"]) -> Scalar:
        return self._block_norms(weight).amax() * self.factor(weight.shape)

    def bound(self, weight: Float[Tensor, "*shape"]) -> Scalar:
        # the sum of a block's n squares is rounded by at most n·eps; its root by half of that
        count = math.prod([weight.shape[dim] for dim in self.dims(weight.shape)])
        rounding = count * torch.finfo(working_dtype(weight.dtype)).eps
        return self.size(weight) * (1 + rounding)

    def direction(self, gradient: Float[Tensor, "*shape"]) -> Direction:
        dims = self.dims(gradient.shape)
        scaled = unit(gradient.to(working_dtype(gradient.dtype)), dims)
        norm = torch.linalg.vector_norm(scaled, dim=dims, keepdim=True)
        factor = 1 / (norm.masked_fill(norm == 0, 1.0) * self.factor(gradient.shape))
        if factor.numel() == 1:
            return Direction(scaled, factor.reshape(()))
        if factor.shape[0] == factor.numel():
            return Direction(scaled, factor)
        return Direction(scaled * factor)

    def dual(self, gradient: Float[Tensor, "*shape"]) -> Scalar:
        return self._block_norms(gradient).sum() / self.factor(gradient.shape)

    def draw(
        self, shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "*shape"]:
        noise = _gaussian(shape, generator)
        norm = torch.linalg.vector_norm(noise, dim=self.dims(noise.shape), keepdim=True)
        return (noise / (norm * self.factor(noise.shape))).to(device, dtype)


def drawing_dtype(generator: torch.Generator) -> torch.dtype:
    """Double precision wherever the generator's device has it, so that one seed gives one network in every dtype."""
    return torch.float64 if generator.device.type != "mps" else torch.float32


def _gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal draws."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=drawing_dtype(generator))


def _fan_ratio(shape: torch.Size) -> float:
    """sqrt(fan_in/fan_out) of a stack of matrices [..., fan_out, fan_in]."""
    return math.sqrt(shape[-1] / shape[-2])


@dataclass(frozen=True)
class Spectral(Norm):
    """sqrt(i/o)·σ_max(W) of a matrix [o, i], from RMS to RMS; of a stack [..., o, i] the largest."""

    def size(self, weight: Float[Tensor, "*stack out in_"]) -> Scalar:
        x, peak = rescale(weight.to(working_dtype(weight.dtype)), (-2, -1))
        largest = torch.linalg.matrix_norm(x, ord=2)
        return (wide(largest) * wide(peak[..., 0, 0])).amax() * _fan_ratio(weight.shape)

    def bound(self, weight: Float[Tensor, "*stack out in_"]) -> Scalar:
        return wide(largest_singular_value_bound(weight)).amax() * _fan_ratio(weight.shape)

    def direction(self, gradient: Float[Tensor, "*stack out in_"]) -> Direction:
        return self.assembled(gradient, [polar(gradient)])

    def matrices(self, gradient: Float[Tensor, "*stack out in_"]) -> list[Float[Tensor, "*stack out in_"]]:
        return [gradient]

    def assembled(
        self, gradient: Float[Tensor, "*stack out in_"], factors: list[Float[Tensor, "*stack out in_"]]
    ) -> Direction:
        return Direction(factors[0], 1 / _fan_ratio(gradient.shape))

    def dual(self, gradient: Float[Tensor, "*stack out in_"]) -> Scalar:
        x, peak = rescale(gradient.to(working_dtype(gradient.dtype)), (-2, -1))
        nuclear = torch.linalg.matrix_norm(x, ord="nuc")
        return (wide(nuclear) * wide(peak[..., 0, 0])).sum() / _fan_ratio(gradient.shape)

    def draw(
        self, shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "*stack out in_"]:
        """(Semi-)orthogonal matrices, uniform over the Stiefel manifold (Haar)."""
        *stack, rows, cols = shape
        q, r = torch.linalg.qr(_gaussian((*stack, max(rows, cols), min(rows, cols)), generator))
        # the sign of R's diagonal makes the factorisation unique and the draw uniform (Mezzadri 2007)
        q = q * torch.diagonal(r, dim1=-2, dim2=-1).sign()[..., None, :]
        matrix = q if rows >= cols else q.mT
        return (matrix / _fan_ratio(matrix.shape)).to(device, dtype).contiguous()

    @property
    def euclidean(self) -> Norm:
        return Frobenius()


@dataclass(frozen=True)
class Frobenius(BlockNorm):
    """sqrt(i/o)·‖W‖_F of a matrix [o, i], the AGD paper's choice; of a stack [..., o, i] the largest."""

    def factor(self, shape: torch.Size) -> float:
        return _fan_ratio(shape)

    def dims(self, shape: torch.Size) -> tuple[int, ...]:
        return (-2, -1)


@dataclass(frozen=True)
class RowNorm(BlockNorm):
    """max over rows of scale·‖W_row‖₂: from RMS into the max norm with scale sqrt(i), embeddings with 1/sqrt(d)."""

    scale: float

    @classmethod
    def into_logits(cls, fan_in: int) -> "RowNorm":
        """The operator norm from RMS over ``fan_in`` features to the max norm."""
        return cls(math.sqrt(fan_in))

    @classmethod
    def of_embedding(cls, width: int) -> "RowNorm":
        """The operator norm from one-hot tokens to RMS over ``width`` features."""
        return cls(1 / math.sqrt(width))

    def factor(self, shape: torch.Size) -> float:
        return self.scale

    @property
    def stride(self) -> float:
        """sqrt(i) of features that are incoherent with the rows; 1 of tokens, each of which is a row."""
        return max(1.0, self.scale)

    def __str__(self) -> str:
        return f"RowNorm({self.scale:.4g})"

    def dims(self, shape: torch.Size) -> tuple[int, ...]:
        return (-1,)


@dataclass(frozen=True)
class RMS(BlockNorm):
    """‖b‖₂/sqrt(d) over all entries: a bias on features."""

    def factor(self, shape: torch.Size) -> float:
        return 1 / math.sqrt(shape.numel())

    def dims(self, shape: torch.Size) -> tuple[int, ...]:
        return tuple(range(len(shape)))


@dataclass(frozen=True)
class Sign(Norm):
    """max |s| over all entries: an elementwise scale, or a bias on logits."""

    def size(self, weight: Float[Tensor, "*shape"]) -> Scalar:
        return wide(weight.abs().amax())

    def bound(self, weight: Float[Tensor, "*shape"]) -> Scalar:
        return self.size(weight)

    def direction(self, gradient: Float[Tensor, "*shape"]) -> Direction:
        return Direction(gradient.sign())

    def dual(self, gradient: Float[Tensor, "*shape"]) -> Scalar:
        return wide(gradient).abs().sum()

    def draw(
        self, shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "*shape"]:
        return _gaussian(shape, generator).sign().to(device, dtype)


@dataclass(frozen=True)
class RowBlocks(Norm):
    """max over equal blocks of rows of a matrix norm: a fused weight whose parts count each by itself.

    Args:
        inner: the norm of one block [rows/blocks, i], ``Spectral()`` or ``Frobenius()``.
        blocks: number of blocks, which divides the rows.
    """

    inner: Norm
    blocks: int

    def _stack(self, weight: Tensor) -> Tensor:
        return rearrange(weight, "(b o) i -> b o i", b=self.blocks)

    def size(self, weight: Float[Tensor, "rows in_"]) -> Scalar:
        return self.inner.size(self._stack(weight))

    def bound(self, weight: Float[Tensor, "rows in_"]) -> Scalar:
        return self.inner.bound(self._stack(weight))

    def direction(self, gradient: Float[Tensor, "rows in_"]) -> Direction:
        return self._joined(self.inner.direction(self._stack(gradient)))

    def matrices(self, gradient: Float[Tensor, "rows in_"]) -> list[Float[Tensor, "*stack rows cols"]]:
        return self.inner.matrices(self._stack(gradient))

    def assembled(
        self, gradient: Float[Tensor, "rows in_"], factors: list[Float[Tensor, "*stack rows cols"]]
    ) -> Direction:
        return self._joined(self.inner.assembled(self._stack(gradient), factors))

    def _joined(self, blocks: Direction) -> Direction:
        if not blocks.by_rows:
            return Direction(rearrange(blocks.base, "b o i -> (b o) i"), blocks.factor)
        return Direction(rearrange(blocks.dense(), "b o i -> (b o) i"))

    def dual(self, gradient: Float[Tensor, "rows in_"]) -> Scalar:
        return self.inner.dual(self._stack(gradient))

    def draw(
        self, shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "rows in_"]:
        rows, cols = shape
        stack = (self.blocks, rows // self.blocks, cols)
        blocks = self.inner.draw(stack, generator, generator.device, drawing_dtype(generator))
        return rearrange(blocks, "b o i -> (b o) i").to(device, dtype).contiguous()

    def __str__(self) -> str:
        return f"RowBlocks({self.inner}, {self.blocks})"

    @property
    def euclidean(self) -> Norm:
        return RowBlocks(self.inner.euclidean, self.blocks)


@dataclass(frozen=True)
class Transposed(Norm):
    """A norm of the matrices [..., o, i] whose transposes [..., i, o] are given: weights that multiply from the right.

    Args:
        inner: the norm of the matrices.
    """

    inner: Norm

    def size(self, weight: Float[Tensor, "*stack in_ out"]) -> Scalar:
        return self.inner.size(weight.mT)

    def bound(self, weight: Float[Tensor, "*stack in_ out"]) -> Scalar:
        return self.inner.bound(weight.mT)

    def direction(self, gradient: Float[Tensor, "*stack in_ out"]) -> Direction:
        return self._turned(self.inner.direction(gradient.mT))

    def matrices(self, gradient: Float[Tensor, "*stack in_ out"]) -> list[Float[Tensor, "*matrices rows cols"]]:
        return self.inner.matrices(gradient.mT)

    def assembled(
        self, gradient: Float[Tensor, "*stack in_ out"], factors: list[Float[Tensor, "*matrices rows cols"]]
    ) -> Direction:
        return self._turned(self.inner.assembled(gradient.mT, factors))

    def _turned(self, direction: Direction) -> Direction:
        if not direction.by_rows:
            return Direction(direction.base.mT.contiguous(), direction.factor)
        return Direction(direction.dense().mT.contiguous())

    def dual(self, gradient: Float[Tensor, "*stack in_ out"]) -> Scalar:
        return self.inner.dual(gradient.mT)

    def draw(
        self, shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "*stack in_ out"]:
        turned = (*shape[:-2], shape[-1], shape[-2])
        return self.inner.draw(turned, generator, device, dtype).mT.contiguous()

    def __str__(self) -> str:
        return f"Transposed({self.inner})"

    @property
    def euclidean(self) -> "Norm":
        return Transposed(self.inner.euclidean)
