"""Augmentation of small images on their device: pad, crop at random, flip at random.

The operations are kornia's (Apache-2.0). They draw from torch's global generator; here each batch seeds that from an explicit
one and puts it back as it was, so that a run depends on its own seed alone.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from modula_agd.train.extras import require

if TYPE_CHECKING:
    from torch import nn

# Four pixels and a flip: Lee et al. 2015 (arXiv:1409.5185), section 3, as ResNets are trained on CIFAR (arXiv:1512.03385, 4.2).
_PAD = 4


@dataclass(frozen=True)
class CropFlip:
    """Shift by up to four pixels, filling with 0 (the mean, for standardised images); mirror every second image.

    Args:
        height: pixels.
        width: pixels.
        flip: whether to mirror. Photographs mean the same when mirrored, writing does not.
    """

    height: int
    width: int
    flip: bool

    def __post_init__(self) -> None:
        require("augmentation", "kornia")

    @cached_property
    def _operations(self) -> "nn.Module":
        from kornia.augmentation import RandomCrop, RandomHorizontalFlip

        crop = RandomCrop((self.height, self.width), padding=_PAD)
        return torch.nn.Sequential(crop, RandomHorizontalFlip()) if self.flip else crop

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch channels height width"]:
        """Every image with a shift and a flip of its own.

        Args:
            images: standardised, on any device.
            generator: on the CPU; advanced by one draw.
        """
        seed = _drawn(generator)
        with torch.random.fork_rng(devices=()), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            return self._operations(images)

    def skip(self, generator: torch.Generator, batches: int) -> None:
        """Advance the generator by as many draws as so many batches take."""
        for _ in range(batches):
            _drawn(generator)


def _drawn(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))
