"""Data sets: standardised to RMS norm 1, split alike every time, and batches that cover an epoch."""

import pytest
import torch

from modula_agd import InvalidArgument
from modula_agd.train import DataError, classification
from modula_agd.train.data import batches, batches_per_epoch, standardise
from pictures import cell, grey


def rms(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().mean(1).sqrt()


def test_digits_are_split_four_to_one_and_alike_every_time():
    first, second = classification("digits"), classification("digits")
    assert (len(first.train.labels), len(first.validation.labels)) == (1437, 360)
    assert first.shape == (1, 8, 8)
    assert first.classes == 10
    assert torch.equal(first.train.inputs, second.train.inputs)
    torch.testing.assert_close(rms(first.train.inputs), torch.ones(1437))
    torch.testing.assert_close(rms(first.validation.inputs), torch.ones(360))


def test_standardising_uses_the_training_channels_only():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)
    train = torch.randn((200, 2, 3, 3), generator=generator) * scale + 7
    held_out = train[:10] + 100
    rows, others = standardise(train, held_out)
    deviation, mean = torch.std_mean(train, dim=(0, 2, 3), correction=0, keepdim=True)
    expected = ((train - mean) / deviation).flatten(1)
    torch.testing.assert_close(rows, expected / rms(expected)[:, None])
    expected = ((held_out - mean) / deviation).flatten(1)
    torch.testing.assert_close(others, expected / rms(expected)[:, None])


def test_a_constant_channel_and_an_image_at_the_mean_stay_zero():
    images = torch.full((3, 1, 2, 2), 9, dtype=torch.uint8)
    rows, _ = standardise(images, images)
    assert torch.equal(rows, torch.zeros(3, 4))


def test_files_are_found_in_the_folder_and_in_the_one_below(tiny, tmp_path):
    direct = classification("mnist", tiny)
    below = tmp_path / "all" / "mnist"
    below.parent.mkdir()
    below.symlink_to(tiny)
    nested = classification("mnist", below.parent)
    assert torch.equal(direct.train.inputs, nested.train.inputs)
    assert direct.features == 36


def test_a_hub_name_is_a_data_set_too(tiny):
    data = classification(f"hub:{tiny}")
    assert data.classes == 10
    assert len(data.validation.labels) == 20


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(DataError, match=r"no folder was given\. Name it with --data-dir"):
        classification("mnist")
    with pytest.raises(DataError, match="is not a folder"):
        classification("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"needs train\.parquet, but neither"):
        classification("mnist", tmp_path)
    with pytest.raises(InvalidArgument, match="there is no data set 'imagenet'"):
        classification("imagenet", tmp_path)


def test_a_label_beyond_the_classes_is_named_with_file_and_row(tiny, write):
    path = write("test", [cell(image) for image in grey(3)], [0, 10, 2])
    with pytest.raises(DataError) as raised:
        classification("mnist", tiny)
    assert f"{path}, row 1, has the label 10, but mnist has 10 classes" in str(raised.value)


def test_splits_of_different_shapes_are_refused(tiny, write):
    write("test", [cell(image) for image in grey(3, side=5)], [0, 1, 2])
    with pytest.raises(DataError, match="Both must be alike"):
        classification("mnist", tiny)


def test_an_epoch_of_batches_has_every_sample_once_and_drops_the_rest():
    stream = batches(10, 3, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(stream) for _ in range(3)]).tolist() for _ in range(2)]
    assert batches_per_epoch(10, 3) == 3
    for epoch in epochs:
        assert len(set(epoch)) == 9
    assert epochs[0] != epochs[1]


def test_batches_are_alike_for_equal_seeds():
    first, second = (batches(10, 3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(next(first), next(second)) for _ in range(12))


def test_fewer_samples_than_a_batch_make_one_batch():
    stream = batches(4, 64, torch.Generator().manual_seed(0))
    assert sorted(next(stream).tolist()) == [0, 1, 2, 3]
    assert batches_per_epoch(4, 64) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_real_files_load(data_dir, name, shape):
    data = classification(name, data_dir)
    assert data.shape == shape
    assert len(data.validation.labels) == 10000
    torch.testing.assert_close(rms(data.train.inputs), torch.ones(len(data.train.labels)))
