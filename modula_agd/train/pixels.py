"""Labelled images as one tensor of bytes, from Parquet files or a data set of the Hugging Face hub.

Columns are found by type: one image column ({bytes, path}, as the ``datasets`` library packs images) and one column of integer
labels. Decoding is a ``datasets`` map, so that library's cache keeps the pixels between runs.
"""

import io
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Int, UInt8
from torch import Tensor

from modula_agd.error import ModulaError
from modula_agd.train.extras import require

if TYPE_CHECKING:
    import datasets

IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label")

# What Pillow raises on damaged files, by decoder: SyntaxError from PNG, struct.error from truncated headers.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


class DataError(ModulaError, ValueError):
    """Data is missing, unreadable or not what was declared."""


class Pixels(NamedTuple):
    """One split of a data set.

    Args:
        images: grey or red-green-blue, 0 to 255.
        labels: class indices, 0 ≤ label < classes.
        classes: number of classes that the data set declares, or None where it does not.
        source: what an error message calls this split.
    """

    images: UInt8[Tensor, "batch channels height width"]
    labels: Int[Tensor, " batch"]
    classes: int | None
    source: str


def from_parquet(files: Mapping[str, Path]) -> dict[str, Pixels]:
    """Read each split from a Parquet file.

    Args:
        files: path of each split, such as {"train": ..., "test": ...}.

    Raises:
        DataError: a file is missing or no Parquet file, a column is missing, a row holds no readable image.
        MissingExtra: the ``datasets`` library is not installed.
    """
    for path in files.values():
        if not path.is_file():
            raise DataError(f"there is no file {path}. Name the folder that holds {path.name} with --data-dir.")
    require("reading Parquet files", "datasets", "PIL")
    import datasets
    from datasets.exceptions import DatasetsError

    splits: dict[str, Any] = {}
    for split, path in files.items():
        try:
            # one file at a time, so that an error names it, and columns of one need not be those of the other
            with _hushed():
                splits[split] = datasets.load_dataset("parquet", data_files={split: str(path)}, split=split)
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(
                f"{path} could not be read as Parquet: {reason(error)}. It is damaged or no Parquet file; download or write it again."
            ) from error
    return {split: _decoded(rows, str(files[split])) for split, rows in splits.items()}


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep the ``datasets`` library from logging what it raises as well: one error is one line."""
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def from_hub(name: str) -> dict[str, Pixels]:
    """Read the training split of a hub data set, and its validation or else test split, as "train" and "test".

    Args:
        name: of the data set, as on the hub, or a local folder that ``datasets.load_dataset`` can read.

    Raises:
        DataError: the data set cannot be had, has no second split, or is not labelled images.
        MissingExtra: the ``datasets`` library is not installed.
    """
    require("reading a hub data set", "datasets", "PIL")
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"the data set {name!r} could not be loaded: {reason(error)}. "
            "Check the name and the connection, or download Parquet files and name their folder with --data-dir."
        ) from error
    held_out = next((split for split in ("validation", "valid", "test") if split in splits), None)
    if "train" not in splits or held_out is None:
        raise DataError(
            f"the data set {name!r} has the splits {sorted(splits)}, but training needs 'train' and one of "
            "'validation' and 'test'. Choose another data set, or write the two splits to Parquet files."
        )
    return {
        "train": _decoded(splits["train"], f"{name} (train)"),
        "test": _decoded(splits[held_out], f"{name} ({held_out})"),
    }


def reason(error: BaseException) -> str:
    """The innermost cause, on one line: ``datasets`` wraps what it met in layers of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = re.sub(r"<_io\.BytesIO object at \w+>", "of a known format", str(error))
    return " ".join(said.split()).rstrip(".!") or type(error).__name__


def at_row(source: str, row: int) -> str:
    """How a message names a row."""
    return f"{source}, row {row} (counted from 0),"


def _decoded(rows: "datasets.Dataset", source: str) -> Pixels:
    import datasets
    import PIL.Image

    if len(rows) == 0:
        raise DataError(f"{source} has no rows. Download it again.")
    image, label = _columns(rows, source)
    feature = rows.features[label]
    classes = len(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    PIL.Image.init()
    rows = rows.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    mode = "L" if _open(rows[0]["image"], 0, source).mode in ("1", "L", "LA") else "RGB"
    pixels = rows.map(
        _decode,
        batched=True,
        with_indices=True,
        fn_kwargs={"mode": mode, "source": source},
        remove_columns=["image"],
        features=datasets.Features(
            label=rows.features["label"],
            pixels=datasets.Value("large_binary"),
            height=datasets.Value("int32"),
            width=datasets.Value("int32"),
        ),
        desc="Decoding images",
    )
    return _assembled(pixels, 1 if mode == "L" else 3, classes, source)


def _columns(rows: "datasets.Dataset", source: str) -> tuple[str, str]:
    """The names of the image and of the label column."""
    import datasets

    def is_image(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})

    def is_label(feature: Any) -> bool:
        return isinstance(feature, datasets.ClassLabel) or "int" in str(getattr(feature, "dtype", ""))

    found = []
    for what, matches, usual in (("image", is_image, IMAGE_NAMES), ("integer label", is_label, LABEL_NAMES)):
        names = [name for name, feature in rows.features.items() if matches(feature)]
        usually = [name for name in usual if name in names]
        if not usually and len(names) != 1:
            columns = ", ".join(f"{name} ({_kind(feature)})" for name, feature in rows.features.items())
            raise DataError(
                f"{source} has {'no' if not names else 'more than one'} {what} column among {columns}. Labelled images have one column of "
                f"pictures, {{bytes, path}}, and one of integers; name it {usual[0]!r}, or convert it."
            )
        found.append(usually[0] if usually else names[0])
    return found[0], found[1]


def _kind(feature: Any) -> str:
    return (
        "{" + ", ".join(feature) + "}"
        if isinstance(feature, dict)
        else getattr(feature, "dtype", type(feature).__name__)
    )


def _open(cell: dict[str, Any] | None, row: int, source: str) -> Any:
    """Decode one image completely."""
    import PIL.Image

    remedy = "Repair or drop that row, or download the file again."
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise DataError(f"{at_row(source, row)} holds no image. {remedy}")
    try:
        picture = PIL.Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"]))
        picture.load()
    except UNREADABLE as error:
        raise DataError(
            f"{at_row(source, row)} holds an image that cannot be read: {reason(error)}. {remedy}"
        ) from error
    check_depth(picture.mode, at_row(source, row))
    return picture


def check_depth(mode: str, what: str) -> None:
    """Refuse pixels of more than a byte, which Pillow would clip at 255: nearly all would be white.

    Args:
        mode: Pillow's name of the pixel format.
        what: the picture, for the message.

    Raises:
        DataError: the mode has 16 or 32 bits a channel.
    """
    if mode.startswith(("I", "F")):
        raise DataError(
            f"{what} holds a picture of mode {mode}, whose numbers do not fit into bytes. Convert it to 8 bits a channel first."
        )


def _decode(batch: dict[str, list[Any]], indices: list[int], mode: str, source: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"pixels": [], "height": [], "width": []}
    for row, cell in zip(indices, batch["image"], strict=True):
        picture = _open(cell, row, source)
        if mode == "L" and picture.mode not in ("1", "L", "LA"):
            raise DataError(
                f"{at_row(source, row)} holds a picture of mode {picture.mode}, but row 0 is grey. Store all images alike."
            )
        picture = picture if picture.mode == mode else picture.convert(mode)
        columns["pixels"].append(picture.tobytes())
        columns["height"].append(picture.height)
        columns["width"].append(picture.width)
    return columns


def _assembled(rows: "datasets.Dataset", channels: int, classes: int | None, source: str) -> Pixels:
    import numpy

    table: Any = rows.with_format("arrow")[:]
    column = {name: table[name].combine_chunks() for name in table.column_names}
    if column["label"].null_count:
        row = column["label"].is_null().index(True).as_py()
        raise DataError(f"{at_row(source, row)} has no label, where a class was expected. Drop unlabelled rows.")
    heights, widths = (column[side].to_numpy(zero_copy_only=False) for side in ("height", "width"))
    height, width = int(heights[0]), int(widths[0])
    odd = numpy.flatnonzero((heights != height) | (widths != width))
    if len(odd):
        row = int(odd[0])
        raise DataError(
            f"{at_row(source, row)} is {heights[row]}×{widths[row]}, but row 0 is {height}×{width}. "
            "Resize all images to one shape first."
        )
    flat = torch.frombuffer(bytearray().join(column["pixels"].to_pylist()), dtype=torch.uint8)
    images = rearrange(flat, "(b h w c) -> b c h w", h=height, w=width, c=channels).contiguous()
    labels = torch.from_numpy(column["label"].to_numpy(zero_copy_only=False).astype("int64"))
    _check_labels(labels, classes, source)
    return Pixels(images, labels, classes, source)


def _check_labels(labels: Int[Tensor, " batch"], classes: int | None, source: str) -> None:
    wrong = (labels < 0) if classes is None else (labels < 0) | (labels >= classes)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        allowed = "≥ 0" if classes is None else f"from 0 to {classes - 1}"
        raise DataError(
            f"{at_row(source, row)} has the label {int(labels[row])}, but labels must be {allowed}. Correct it, or drop the row."
        )
