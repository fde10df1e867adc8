"""What the unit tests share: one rounding tolerance, seeded draws, matrices with chosen singular values."""

import torch
from torch import Tensor

from modula_agd.polar import working_dtype
from modula_agd.verify.tolerance import rounding

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def tolerance(dtype: torch.dtype, size: int = 1) -> float:
    """Relative slack for a result that ``size`` roundings entered; half precision is computed in float32, rounded once."""
    return torch.finfo(dtype).eps + rounding(working_dtype(dtype), size)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def with_singular_values(values: Tensor, rows: int, cols: int, seed: int = 0) -> Tensor:
    """U diag(values) Vᵀ of shape [rows, cols] with random orthogonal factors."""
    count = values.numel()
    u = torch.linalg.qr(gaussian(rows, count, seed=seed))[0]
    v = torch.linalg.qr(gaussian(cols, count, seed=seed + 1))[0]
    return (u * values.double()) @ v.mT
