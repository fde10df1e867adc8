"""Small image data sets as Parquet files."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import pytest

from pictures import Cell, cell, colour, grey

Write = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the data sets of the tests out of the user's cache."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write one split: ``write("train", cells, labels)`` gives the path of train.parquet."""

    def one(
        split: str,
        cells: Sequence[Cell],
        labels: Sequence[int | None],
        *,
        image: str = "image",
        label: str = "label",
        features: datasets.Features | None = None,
    ) -> Path:
        rows = datasets.Dataset.from_dict({image: list(cells), label: list(labels)}, features=features)
        path = tmp_path / f"{split}.parquet"
        rows.to_parquet(path)
        return path

    return one


@pytest.fixture
def tiny(write: Write) -> Path:
    """A folder with 40 training and 20 test images, 6×6 grey, of ten classes, in the layout of MNIST."""
    for split, rows, seed in (("train", 40, 0), ("test", 20, 1)):
        images = grey(rows, seed)
        folder = write(split, [cell(image) for image in images], [row % 10 for row in range(rows)]).parent
    return folder


@pytest.fixture
def tiny_colour(write: Write) -> Path:
    """Likewise 8×8 in colour, in the layout of CIFAR-10."""
    for split, rows, seed in (("train", 40, 0), ("test", 20, 1)):
        folder = write(split, [cell(image) for image in colour(rows, seed)], [row % 10 for row in range(rows)]).parent
    return folder
