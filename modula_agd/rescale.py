"""Rescaling: divide blocks of a tensor by their largest entry, so that no later square under- or overflows.

A row of past gradients that decays over many steps reaches denormal numbers; its Euclidean norm then underflows to 0 while its
entries do not, and 0/0 or m/0 destroys the weights. Every dual direction therefore starts from rescaled blocks, and a
block without a normal number in it counts as zero and stays zero.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def rescale(
    x: Float[Tensor, "*shape"], dims: tuple[int, ...]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*peaks"]]:
    """Divide each block by its largest absolute entry.

    Args:
        x: any shape, any units.
        dims: the dimensions that lie within one block; the remaining ones count the blocks.

    Returns:
        The rescaled tensor (largest absolute entry of each block 1, or 0 for a zero block) and the largest entries
        (``dims`` kept with size 1). A block whose largest entry is denormal is returned as zero. NaN and infinity pass
        through as NaN, so that a check further on sees them.
    """
    peak = peaks(x, dims)
    return divided(x, peak), peak.masked_fill(_empty(x, peak), 0.0)


def unit(x: Float[Tensor, "*shape"], dims: tuple[int, ...]) -> Float[Tensor, "*shape"]:
    """``rescale`` for those who do not ask for the largest entries."""
    return divided(x, peaks(x, dims))


def peaks(x: Float[Tensor, "*shape"], dims: tuple[int, ...]) -> Float[Tensor, "*peaks"]:
    """The largest absolute entry of each block, 0 of one without entries; arguments as for ``rescale``."""
    if x.numel() == 0:
        inside = {dim % x.ndim for dim in dims}
        return x.new_zeros([1 if dim in inside else extent for dim, extent in enumerate(x.shape)])
    if x.device.type != "cpu":
        return torch.linalg.vector_norm(x, torch.inf, dims, keepdim=True)
    # there fifty times faster than the infinity norm, and without the copy that abs() would make
    return torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))


def divided(x: Float[Tensor, "*shape"], peak: Float[Tensor, "*peaks"]) -> Float[Tensor, "*shape"]:
    """``unit``, given the largest absolute entries, which may be those of larger blocks that x is a part of."""
    # x/inf clears a block without a pass of its own
    return x / peak.masked_fill(_empty(x, peak), torch.inf)


def _empty(x: Tensor, peak: Float[Tensor, "*peaks"]) -> Bool[Tensor, "*peaks"]:
    """Blocks without a normal number; `<` is false for NaN, so that NaN is not mistaken for one."""
    return peak < torch.finfo(x.dtype).tiny
