"""Reading labelled images: what is read is what was written, and every fault is named with file and row."""

import datasets
import numpy
import pytest
import torch

from modula_agd.train.pixels import DataError, from_hub, from_parquet
from pictures import cell, grey, png


def test_grey_images_come_back_exactly(write):
    images = grey(7)
    pixels = from_parquet({"train": write("train", [cell(image) for image in images], range(7))})["train"]
    assert pixels.images.shape == (7, 1, 6, 6)
    assert torch.equal(pixels.images[:, 0], torch.from_numpy(images))
    assert pixels.labels.tolist() == list(range(7))
    assert pixels.classes is None


def test_colour_images_come_back_exactly_with_channels_first(write):
    images = numpy.random.default_rng(0).integers(0, 256, (5, 4, 8, 3), dtype=numpy.uint8)
    pixels = from_parquet({"train": write("train", [cell(image) for image in images], range(5))})["train"]
    assert pixels.images.shape == (5, 3, 4, 8)
    assert torch.equal(pixels.images, torch.from_numpy(images).permute(0, 3, 1, 2))


def test_declared_image_and_class_columns_are_found_by_type(write):
    features = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=["a", "b", "c"]))
    path = write("train", [cell(i) for i in grey(3)], [2, 0, 1], image="picture", label="kind", features=features)
    pixels = from_parquet({"train": path})["train"]
    assert pixels.classes == 3
    assert pixels.labels.tolist() == [2, 0, 1]


def test_grey_images_among_colour_ones_are_converted(write):
    colour = numpy.zeros((6, 6, 3), dtype=numpy.uint8)
    pixels = from_parquet({"train": write("train", [cell(colour), cell(grey(1)[0])], [0, 1])})["train"]
    assert pixels.images.shape == (2, 3, 6, 6)


def test_second_reading_uses_the_cache(write):
    path = write("train", [cell(image) for image in grey(7)], range(7))
    first, second = (from_parquet({"train": path})["train"] for _ in range(2))
    assert torch.equal(first.images, second.images)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"bytes": b"no image at all", "path": None}, "row 2 (counted from 0), holds an image that cannot be read"),
        ({"bytes": png(grey(1)[0])[:60], "path": None}, "row 2 (counted from 0), holds an image that cannot be read"),
        ({"bytes": b"", "path": None}, "row 2 (counted from 0), holds an image that cannot be read"),
        ({"bytes": None, "path": "nowhere/lost.png"}, "row 2 (counted from 0), holds an image that cannot be read"),
        ({"bytes": None, "path": None}, "row 2 (counted from 0), holds no image"),
        (None, "row 2 (counted from 0), holds no image"),
        (cell(grey(1, side=5)[0]), "row 2 (counted from 0), is 5×5, but row 0 is 6×6"),
        (
            cell(numpy.zeros((6, 6, 3), dtype=numpy.uint8)),
            "row 2 (counted from 0), holds a picture of mode RGB, but row 0 is grey",
        ),
    ],
)
def test_a_bad_row_is_named(write, damage, said):
    cells = [cell(image) for image in grey(4)]
    cells[2] = damage
    path = write("train", cells, range(4))
    with pytest.raises(DataError) as raised:
        from_parquet({"train": path})
    assert said in str(raised.value)
    assert str(path) in str(raised.value)


def test_damaged_bytes_never_escape_as_another_error(write):
    generator = numpy.random.default_rng(0)
    whole = png(grey(1)[0])
    for _ in range(25):
        damaged = bytearray(whole)
        for position in generator.integers(0, len(whole), 4):
            damaged[position] = generator.integers(0, 256)
        path = write("train", [cell(grey(1)[0]), {"bytes": bytes(damaged), "path": None}], [0, 1])
        try:
            from_parquet({"train": path})
        except DataError as error:
            assert "row 1" in str(error)  # noqa: PT017 (damage may also leave a readable image)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, -1, 2], "row 1 (counted from 0), has the label -1, but labels must be ≥ 0"),
        ([0, None, 2], "row 1 (counted from 0), has no label"),
    ],
)
def test_a_bad_label_is_named(write, labels, said):
    path = write("train", [cell(image) for image in grey(3)], labels)
    with pytest.raises(DataError) as raised:
        from_parquet({"train": path})
    assert said in str(raised.value)


def test_missing_and_ambiguous_columns_are_refused(tmp_path):
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(path)
    with pytest.raises(DataError, match=r"no image column among text \(string\), label \(int64\)"):
        from_parquet({"train": path})
    datasets.Dataset.from_dict({"image": [cell(grey(1)[0])], "fine": [0], "coarse": [1]}).to_parquet(path)
    with pytest.raises(DataError, match="more than one integer label column"):
        from_parquet({"train": path})


def test_a_missing_file_and_one_of_another_kind_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        from_parquet({"train": tmp_path / "train.parquet"})
    path = tmp_path / "train.parquet"
    path.write_text("not Parquet")
    with pytest.raises(DataError, match="could not be read as Parquet"):
        from_parquet({"train": path})


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "train.parquet"
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    datasets.Dataset.from_dict({"image": [], "label": []}, features=features).to_parquet(path)
    with pytest.raises(DataError, match="no data"):
        from_parquet({"train": path})


def test_a_folder_stands_in_for_a_hub_data_set(tiny):
    splits = from_hub(str(tiny))
    assert {name: len(split.labels) for name, split in splits.items()} == {"train": 40, "test": 20}


def test_a_hub_data_set_that_cannot_be_had_is_an_error():
    with pytest.raises(DataError, match="could not be loaded"):
        from_hub("nobody/has-this-data-set")


def test_a_hub_data_set_without_a_second_split_is_an_error(write):
    folder = write("train", [cell(image) for image in grey(3)], range(3)).parent
    with pytest.raises(DataError, match=r"has the splits \['train'\]"):
        from_hub(str(folder))


@pytest.mark.parametrize("row", [0, 1])
def test_pixels_of_16_bits_are_refused_rather_than_clipped_to_white(write, row):
    cells = [cell(grey(1)[0]), cell(grey(1)[0])]
    cells[row] = cell(numpy.full((6, 6), 30000, dtype=numpy.uint16))
    with pytest.raises(DataError, match=rf"row {row} \(counted from 0\), holds a picture of mode I;16"):
        from_parquet({"train": write("train", cells, [0, 1])})
