"""How far rounding may carry a computed inequality from the exact one: one function, used by every law and test."""

import torch


def rounding(dtype: torch.dtype, size: int) -> float:
    """Relative slack for a quantity that ``size`` roundings entered, one after the other.

    Args:
        dtype: in which it was computed.
        size: number of operations in a row, at most; for a network the sum of the fans along its longest path.

    Returns:
        size·eps, with a few eps for the norms themselves; dimensionless.
    """
    return (8 + size) * torch.finfo(dtype).eps
