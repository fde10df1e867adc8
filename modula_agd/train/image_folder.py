"""A folder of images too large for memory: train/CLASS/*.jpg and val/CLASS/*.jpg, each file decoded when it is needed.

Pillow decodes and resizes. The random crop is drawn here, in a few lines: torchvision, which has one, is a build for each
torch that not every machine can have, and kornia crops tensors of one size, not files of many.
"""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Int, UInt8
from torch import Tensor

from modula_agd.train.apart import drawn_apart
from modula_agd.train.facts import ImageFacts
from modula_agd.train.pixels import UNREADABLE, DataError, check_depth, reason

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]

IMAGENET = "imagenet"
SIDE = 224
SUFFIXES = (".jpg", ".jpeg", ".png")
_SPLITS = ("train", "val")

# Of ImageNet's training images, on the scale of bytes: torchvision's documentation of its pre-trained models.
_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
_DEVIATION = (0.229 * 255, 0.224 * 255, 0.225 * 255)

# Share of the area, and width over height, of a training crop: Szegedy et al. 2015 (arXiv:1409.4842), section 6.
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10

# Evaluation resizes the short side to 256 for a crop of 224: Krizhevsky et al. 2012, section 4.1.
_SHORT_SIDE = 256 / 224


@dataclass(frozen=True)
class Files:
    """One split: image files and their labels.

    Args:
        paths: in a fixed order.
        labels: class index of each.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]

    def of(self, chosen: Int[Tensor, " chosen"]) -> "Files":
        """Some of the files, by their index."""
        where = chosen.tolist()
        return Files(tuple(self.paths[index] for index in where), tuple(self.labels[index] for index in where))


@dataclass(frozen=True)
class ImageFolder:
    """Both splits of a folder of images.

    Args:
        facts: what the images are, once cropped.
        classes: names of the classes, in the order of their labels.
        train: files to learn from.
        validation: files held out.
    """

    facts: ImageFacts
    classes: tuple[str, ...]
    train: Files
    validation: Files

    @property
    def side(self) -> int:
        """Pixels along each side of a crop."""
        return self.facts.shape[1]

    def apart(self, share: float) -> "ImageFolder":
        """The training files alone, a share of which is held out in the place of what was."""
        learned, apart = drawn_apart(len(self.train.paths), share, "files")
        return replace(self, train=self.train.of(learned), validation=self.train.of(apart))


def image_folder(folder: Path | None, name: str = IMAGENET, side: int = SIDE) -> ImageFolder:
    """List the files of ``folder/train`` and ``folder/val``, or of ``folder/name/train`` and ``folder/name/val``.

    Args:
        folder: holds a folder for each split, which holds one for each class.
        name: what to call the data set.
        side: pixels along each side of a crop, ≥ 1.

    Raises:
        DataError: a folder is missing or empty, or the splits differ in their classes.
    """
    layout = "Name the folder that holds train/CLASS/*.jpg and val/CLASS/*.jpg with --data-dir."
    if folder is None:
        raise DataError(f"the data set {name!r} is read from files, but no folder was given. {layout}")
    places = (folder, folder / name)
    root = next((place for place in places if all((place / split).is_dir() for split in _SPLITS)), None)
    if root is None:
        raise DataError(f"neither {places[0]} nor {places[1]} holds the folders train and val. {layout}")
    classes, held_out = (_folders(root / split) for split in _SPLITS)
    if classes != held_out or not classes:
        odd = sorted(set(classes) ^ set(held_out))
        what = f"only one of them has {odd[0]!r}" if odd else "they have none"
        raise DataError(
            f"the folders train and val of {root} must have the same classes, but {what}. "
            "Put the images of each class into a folder of its own, in both."
        )
    facts = ImageFacts(name, len(classes), (3, side, side), _MEAN, _DEVIATION)
    return ImageFolder(facts, classes, *(_files(root / split, classes) for split in _SPLITS))


def _folders(split: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _files(split: Path, classes: tuple[str, ...]) -> Files:
    paths, labels = [], []
    for label, name in enumerate(classes):
        # hidden ones hold no image: a Mac leaves ._NAME.jpg beside NAME.jpg in an archive
        found = sorted(
            path
            for path in (split / name).iterdir()
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        )
        if not found:
            raise DataError(f"{split / name} holds no {', '.join(SUFFIXES)} file. Fill it, or remove the class.")
        paths += found
        labels += [label] * len(found)
    return Files(tuple(paths), tuple(labels))


def crop(path: Path, side: int, seed: int | None) -> UInt8[Tensor, "3 side side"]:
    """Read one image and cut a square out of it.

    Args:
        path: of the file.
        side: pixels along each side of what is returned, ≥ 1.
        seed: of a random part of the image, mirrored or not; None for the centre.

    Raises:
        DataError: the file cannot be read as an image of bytes.
    """
    import PIL.Image

    try:
        with PIL.Image.open(path) as file:
            mode, picture = file.mode, file.convert("RGB")
    except (*UNREADABLE, PIL.Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be read as an image: {reason(error)}. Repair it, or delete it from the folder."
        ) from error
    check_depth(mode, str(path))
    draw = None if seed is None else random.Random(seed)
    box = _centre(*picture.size) if draw is None else _anywhere(*picture.size, draw)
    square = picture.resize((side, side), PIL.Image.Resampling.BILINEAR, box=box)
    if draw is not None and draw.random() < 0.5:
        square = square.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return _tensor(square)


def _centre(width: int, height: int) -> Box:
    cut = min(width, height) / _SHORT_SIDE
    left, top = (width - cut) / 2, (height - cut) / 2
    return left, top, left + cut, top + cut


def _anywhere(width: int, height: int, draw: random.Random) -> Box:
    """A random part of random area and aspect; after ten that do not fit, the largest centred one that does."""
    for _ in range(_TRIES):
        area = draw.uniform(*_AREA) * width * height
        aspect = math.exp(draw.uniform(*map(math.log, _ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h
    aspect = min(max(width / height, _ASPECT[0]), _ASPECT[1])
    w, h = min(width, height * aspect), min(height, width / aspect)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def _tensor(picture: "Image") -> UInt8[Tensor, "3 height width"]:
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return rearrange(flat, "(h w c) -> c h w", h=picture.height, w=picture.width).contiguous()
