"""Data sets in memory: standardised per channel, split alike every time, and batches that cover an epoch."""

import datasets
import pytest
import torch

from modula_agd import InvalidArgument
from modula_agd.train import DataError, classification
from modula_agd.train.data import batches, batches_per_epoch
from modula_agd.train.facts import measured, unit
from pictures import cell, grey


def rms(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1).square().mean(1).sqrt()


def assert_standardised(images: torch.Tensor) -> None:
    deviation, mean = torch.std_mean(images, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(deviation, torch.ones_like(deviation), atol=1e-4, rtol=0)


def test_digits_are_split_four_to_one_and_alike_every_time():
    first, second = classification("digits"), classification("digits")
    assert (len(first.train.labels), len(first.validation.labels)) == (1437, 360)
    assert first.shape == (1, 8, 8)
    assert first.classes == 10
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert first.train.inputs.shape == (1437, 1, 8, 8)
    assert_standardised(first.train.inputs)


def test_standardising_uses_the_training_channels_only():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)
    train = torch.randn((200, 2, 3, 3), generator=generator) * scale + 7
    held_out = train[:10] + 100
    facts = measured("noise", 3, train)
    deviation, mean = torch.std_mean(train, dim=(0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(facts.standardised(train), (train - mean) / deviation)
    torch.testing.assert_close(facts.standardised(held_out), (held_out - mean) / deviation)
    assert facts.features == 18


def test_a_constant_channel_is_only_centred():
    images = torch.full((3, 1, 2, 2), 9, dtype=torch.uint8)
    assert torch.equal(measured("grey", 2, images).standardised(images), torch.zeros(3, 1, 2, 2))


@pytest.mark.parametrize("flat", [False, True])
def test_a_unit_image_has_rms_1_over_all_entries_and_a_zero_one_stays_zero(flat):
    images = torch.randn((4, 3, 5, 6), generator=torch.Generator().manual_seed(0)) * 3
    images[2] = 0
    scaled = unit(images, flat=flat)
    assert scaled.shape == ((4, 90) if flat else (4, 3, 5, 6))
    torch.testing.assert_close(rms(scaled), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(scaled.flatten(1)[0] * rms(images)[0], images.flatten(1)[0])


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


@pytest.mark.parametrize("other", ["label", "coarse_label"])
def test_cifar100_has_100_classes_by_its_fine_labels(tmp_path, other):
    images = [cell(image) for image in grey(4)]
    for split in ("train", "test"):
        columns = {"img": images, "fine_label": [99, 3, 50, 0]}
        columns = columns if other == "label" else columns | {"coarse_label": [1, 0, 1, 0]}
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / f"{split}.parquet")
    data = classification("cifar100", tmp_path)
    assert data.classes == 100
    assert data.train.labels.tolist() == [99, 3, 50, 0]


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(DataError, match=r"no folder was given\. Name it with --data-dir"):
        classification("mnist")
    with pytest.raises(DataError, match="is not a folder"):
        classification("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"needs train\.parquet, but neither"):
        classification("mnist", tmp_path)
    with pytest.raises(InvalidArgument, match="there is no data set 'imagenette'"):
        classification("imagenette", tmp_path)


def test_a_label_beyond_the_classes_is_named_with_file_and_row(tiny, write):
    path = write("test", [cell(image) for image in grey(3)], [0, 10, 2])
    with pytest.raises(DataError) as raised:
        classification("mnist", tiny)
    assert f"{path}, row 1 (counted from 0), has the label 10, but mnist has 10 classes" in str(raised.value)


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
    assert_standardised(data.train.inputs)
