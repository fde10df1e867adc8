"""Image files: listed by class, cropped as ImageNet is, streamed alike however many processes read them."""

import random

import numpy
import PIL.Image
import pytest
import torch

from modula_agd.train import DataError, StreamTask, Task, image_folder, task
from modula_agd.train.image_folder import SIDE, _anywhere, crop

CLASSES = ("ant", "bee", "cow")


def save(path, width: int, height: int, seed: int, mode: str = "RGB") -> None:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    pixels = numpy.random.default_rng(seed).integers(0, 256, shape, dtype=numpy.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels, mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three classes of four training and two held-out images, of many sizes; one grey, one with transparency."""
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            for row in range(count):
                save(tmp_path / split / name / f"{row}.JPEG", 20 + 3 * row, 30 - 2 * label, 10 * label + row)
    save(tmp_path / "train" / "ant" / "0.JPEG", 25, 31, 3, "L")
    save(tmp_path / "train" / "bee" / "1.png", 25, 31, 3, "RGBA")
    (tmp_path / "train" / "bee" / "1.JPEG").unlink()
    (tmp_path / "train" / "cow" / "notes.txt").write_text("no image")
    return tmp_path


def stream(folder, workers: int = 0) -> StreamTask:
    return StreamTask(image_folder(folder, side=16), False, workers, torch.device("cpu"))


def test_files_are_found_by_class_here_and_below(folder, tmp_path_factory):
    listed = image_folder(folder)
    assert listed.classes == CLASSES
    assert listed.train.labels == (0,) * 4 + (1,) * 4 + (2,) * 4
    assert len(listed.validation.paths) == 6
    assert listed.facts.shape == (3, SIDE, SIDE)
    above = tmp_path_factory.mktemp("above")
    (above / "imagenet").symlink_to(folder)
    assert [path.name for path in image_folder(above).train.paths] == [path.name for path in listed.train.paths]


def test_batches_have_rms_1_and_the_right_labels(folder):
    data = stream(folder)
    assert isinstance(data, Task)
    assert data.per_epoch(4) == 3
    batches = data.batches(4, 0)
    shown = [next(batches) for _ in range(3)]
    assert all(batch.inputs.shape == (4, 3, 16, 16) for batch in shown)
    assert sorted(torch.cat([batch.labels for batch in shown]).tolist()) == sorted(data.folder.train.labels)
    held_out = list(data.evaluation(4))
    assert [len(batch.labels) for batch in held_out] == [4, 2]
    assert torch.cat([batch.labels for batch in held_out]).tolist() == [0, 0, 1, 1, 2, 2]
    for batch in (*shown, *held_out):
        torch.testing.assert_close(batch.inputs.flatten(1).square().mean(1), torch.ones(len(batch.labels)))
    assert "12 training and 6 held-out samples of 3×16×16, 3 classes" in str(data)


def test_workers_change_nothing_and_equal_seeds_are_alike(folder):
    before = torch.get_rng_state()
    runs = []
    for workers, seed in ((0, 1), (2, 1), (0, 2)):
        batches = stream(folder, workers).batches(5, seed)
        runs.append([next(batches) for _ in range(4)])
        del batches
    for one, other in zip(runs[0], runs[1], strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.labels, other.labels)
    assert not torch.equal(runs[0][0].inputs, runs[2][0].inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_second_epoch_crops_the_same_files_otherwise(folder):
    batches = stream(folder).batches(12, 0)
    first, second = (next(batches) for _ in range(2))
    assert sorted(first.labels.tolist()) == sorted(second.labels.tolist())
    assert not any(torch.equal(one, other) for one in first.inputs for other in second.inputs)


def test_the_evaluation_crop_is_the_centre_at_the_usual_share(tmp_path):
    path = tmp_path / "ramp.png"
    columns = numpy.broadcast_to(numpy.arange(256, dtype=numpy.uint8)[None, :, None], (256, 256, 3))
    PIL.Image.fromarray(numpy.ascontiguousarray(columns)).save(path)
    pixels = crop(path, 224, None)
    # a square of 256 needs no resizing: columns 16 to 239 are left
    assert torch.equal(pixels[0, 0].long(), torch.arange(16, 240))
    assert torch.equal(crop(path, 224, None), pixels)


def test_random_crops_keep_to_their_area_and_aspect():
    draw = random.Random(0)
    areas, aspects = [], []
    for _ in range(2000):
        left, top, right, bottom = _anywhere(640, 480, draw)
        assert 0 <= left < right <= 640
        assert 0 <= top < bottom <= 480
        areas.append((right - left) * (bottom - top) / (640 * 480))
        aspects.append((right - left) / (bottom - top))
    assert min(areas) >= 0.079
    assert max(areas) <= 1
    assert min(areas) < 0.1
    assert max(areas) > 0.9
    # sides are rounded to whole pixels
    assert 0.74 < min(aspects) < 0.76
    assert 1.32 < max(aspects) < 1.35


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 500), (500, 1)])
def test_a_sliver_is_cropped_within_its_sides(tmp_path, width, height):
    path = tmp_path / "sliver.png"
    save(path, width, height, 0)
    for seed in (None, *range(20)):
        assert crop(path, 8, seed).shape == (3, 8, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_named_in_one_line(folder, workers):
    broken = folder / "val" / "bee" / "1.JPEG"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError) as raised:
        list(stream(folder, workers).evaluation(2))
    assert str(raised.value).startswith(f"{broken} cannot be read as an image")
    assert "\n" not in str(raised.value)


def test_what_is_missing_is_said(folder, tmp_path):
    with pytest.raises(DataError, match="no folder was given"):
        image_folder(None)
    with pytest.raises(DataError, match="holds the folders train and val"):
        image_folder(tmp_path / "nowhere")
    (folder / "val" / "dog").mkdir()
    with pytest.raises(DataError, match="only one of them has 'dog'"):
        image_folder(folder)
    (folder / "train" / "dog").mkdir()
    with pytest.raises(DataError, match=r"dog holds no \.jpg"):
        image_folder(folder)


def test_no_class_at_all_is_said(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    with pytest.raises(DataError, match="they have none"):
        image_folder(tmp_path)


def test_imagenet_is_opened_by_its_name(folder):
    opened = task("imagenet", folder, workers=0)
    assert isinstance(opened, StreamTask)
    assert opened.facts.classes == 3
    assert next(opened.batches(2, 0)).inputs.shape == (2, 3, 224, 224)


def test_hidden_files_are_no_images(folder):
    (folder / "train" / "ant" / "._0.jpg").write_bytes(b"a Mac's notes on 0.jpg")
    assert len(image_folder(folder).train.paths) == 12


def test_pixels_of_16_bits_are_refused_rather_than_clipped_to_white(tmp_path):
    PIL.Image.fromarray(numpy.full((20, 20), 30000, dtype=numpy.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png holds a picture of mode I;16"):
        crop(tmp_path / "deep.png", 8, None)
