"""Little pictures, packed as the ``datasets`` library packs images."""

import io
from typing import Any

import numpy
import PIL.Image

Cell = dict[str, Any] | None


def png(pixels: numpy.ndarray) -> bytes:
    content = io.BytesIO()
    PIL.Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


def cell(pixels: numpy.ndarray) -> Cell:
    return {"bytes": png(pixels), "path": None}


def grey(rows: int, seed: int = 0, side: int = 6) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, 256, (rows, side, side), dtype=numpy.uint8)


def colour(rows: int, seed: int = 0, side: int = 8) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, 256, (rows, side, side, 3), dtype=numpy.uint8)
