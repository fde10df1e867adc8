"""Images in memory as a task: RMS 1 as they are used, the same for equal seeds, augmented only where asked."""

import pytest
import torch

from modula_agd.train import Classification, Examples, ImageTask, Task, classification
from modula_agd.train.augmentation import CropFlip
from modula_agd.train.facts import measured


def noise(channels: int = 3, count: int = 30, side: int = 8) -> Classification:
    images = torch.randn((count, channels, side, side), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 5
    facts = measured("noise", 5, images)
    return Classification(facts, Examples(images, labels), Examples(images[:12].clone(), labels[:12]))


def rms(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.flatten(1).square().mean(1).sqrt()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("augment", [False, True])
def test_every_sample_of_every_batch_has_rms_1(flat, augment):
    task = ImageTask(noise(), flat, augment)
    assert isinstance(task, Task)
    shape = (192,) if flat else (3, 8, 8)
    for batch in (next(task.batches(7, 0)), next(task.evaluation(7))):
        assert batch.inputs.shape == (7, *shape)
        torch.testing.assert_close(rms(batch.inputs), torch.ones(7))


def test_an_epoch_has_every_sample_and_the_evaluation_too():
    task = ImageTask(noise(), flat=True)
    stream = task.batches(10, 0)
    shown = torch.cat([next(stream).labels for _ in range(task.per_epoch(10))])
    assert sorted(shown.tolist()) == sorted(task.data.train.labels.tolist())
    assert torch.equal(torch.cat([batch.labels for batch in task.evaluation(5)]), task.data.validation.labels)


def test_rows_are_the_flattened_images():
    rows, images = (next(ImageTask(noise(), flat).batches(7, 3)) for flat in (True, False))
    assert torch.equal(rows.inputs, images.inputs.flatten(1))
    assert torch.equal(rows.labels, images.labels)


def test_equal_seeds_augment_alike_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    task = ImageTask(noise(), flat=False, augment=True)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(runs))
        stream = task.batches(10, seed)
        runs.append(torch.stack([next(stream).inputs for _ in range(4)]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    state = torch.get_rng_state()
    next(stream)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)


def test_augmentation_changes_neither_the_order_nor_the_evaluation():
    plain, augmented = (ImageTask(noise(), flat=False, augment=augment) for augment in (False, True))
    for one, other, _ in zip(plain.batches(10, 4), augmented.batches(10, 4), range(6), strict=False):
        assert torch.equal(one.labels, other.labels)
        assert not torch.equal(one.inputs, other.inputs)
    for one, other in zip(plain.evaluation(10), augmented.evaluation(10), strict=True):
        assert torch.equal(one.inputs, other.inputs)


def shifts(images: torch.Tensor) -> dict[tuple[int, int, bool], torch.Tensor]:
    """Every augmentation of an image that there can be."""
    side = images.shape[-1]
    found = {}
    for mirrored in (False, True):
        padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
        for top in range(9):
            for left in range(9):
                cut = padded[..., top : top + side, left : left + side]
                found[top, left, mirrored] = cut.flip(-1) if mirrored else cut
    return found


@pytest.mark.parametrize("flip", [False, True])
def test_an_augmented_image_is_a_shifted_one_mirrored_only_where_that_is_allowed(flip):
    image = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    allowed = shifts(image)
    generator = torch.Generator().manual_seed(0)
    drawn = CropFlip(8, 8, flip)(image.expand(400, -1, -1, -1), generator)
    keys = [next(key for key, one in allowed.items() if torch.equal(one[0], each)) for each in drawn]
    assert {key[:2] for key in keys} >= {(0, 0), (0, 8), (8, 0), (8, 8)}
    mirrored = sum(key[2] for key in keys)
    # 400 fair coins show between 150 and 250 heads but once in two million times
    assert 150 < mirrored < 250 if flip else mirrored == 0


def test_grey_images_are_never_mirrored():
    assert ImageTask(noise(channels=1), flat=False, augment=True)._augmentation.flip is False
    assert ImageTask(noise(channels=3), flat=False, augment=True)._augmentation.flip is True


def test_a_task_says_what_it_holds():
    digits = classification("digits")
    assert str(ImageTask(digits, flat=True)) == (
        "digits: 1,437 training and 360 held-out samples of 64 features, 10 classes"
    )
    assert "samples of 1×8×8, 10 classes" in str(ImageTask(digits, flat=False))
