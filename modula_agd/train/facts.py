"""What a data set is, without the data: all that a network, and whoever uses it later, must know of it."""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor

from modula_agd.train.vocabulary import Vocabulary

Images = Shaped[Tensor, "batch channels height width"]


@dataclass(frozen=True)
class ImageFacts:
    """Labelled images of one shape.

    Args:
        name: as the user named the data set.
        classes: number of classes, ≥ 1.
        shape: channels, height and width in pixels.
        mean: of each channel over the training images, in the units of the stored pixels.
        deviation: likewise, > 0.
    """

    name: str
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def features(self) -> int:
        """Numbers in one image."""
        return math.prod(self.shape)

    def standardised(self, images: Images) -> Float[Tensor, "batch channels height width"]:
        """Each channel less its mean, divided by its deviation, in float32.

        Args:
            images: in the units of the stored pixels, of any real dtype, on any device.
        """
        channels = images.shape[1]
        mean, deviation = (
            rearrange(torch.tensor(values, dtype=torch.float32, device=images.device), "c -> c 1 1", c=channels)
            for values in (self.mean, self.deviation)
        )
        return (images - mean).div_(deviation)

    def __str__(self) -> str:
        return f"the images of {self.name}"


@dataclass(frozen=True)
class TextFacts:
    """A text, cut into windows.

    Args:
        name: as the user named the data set.
        vocabulary: the characters that it is written in.
        context: characters that a network sees at once, ≥ 1.
    """

    name: str
    vocabulary: Vocabulary
    context: int

    @property
    def classes(self) -> int:
        """What a prediction chooses among: the distinct characters."""
        return len(self.vocabulary)

    def __str__(self) -> str:
        return f"the text of {self.name}"


Facts = ImageFacts | TextFacts


def measured(name: str, classes: int, train: Images) -> ImageFacts:
    """The facts of training images, their channels' mean and deviation measured.

    Args:
        name: of the data set.
        classes: number of classes.
        train: any real dtype. A channel that is constant has deviation 1, so that standardising only centres it.
    """
    deviation, mean = torch.std_mean(train.to(torch.float32), dim=(0, 2, 3), correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    _, channels, height, width = train.shape
    return ImageFacts(name, classes, (channels, height, width), tuple(mean.tolist()), tuple(deviation.tolist()))


def unit(images: Float[Tensor, "batch channels height width"], *, flat: bool) -> Float[Tensor, "batch *shape"]:
    """Each image divided by its root mean square over all entries: norm 1, as bounds assume of rows of inputs.

    Args:
        images: standardised. One that is 0 everywhere stays 0.
        flat: give rows [batch, channels·height·width] instead of images.
    """
    rows = rearrange(images, "b c h w -> b (c h w)")
    rms = torch.linalg.vector_norm(rows, dim=1, keepdim=True) / rows.shape[1] ** 0.5
    rows = rows / torch.where(rms > 0, rms, 1.0)
    _, c, h, w = images.shape
    return rows if flat else rearrange(rows, "b (c h w) -> b c h w", c=c, h=h, w=w)
