"""Character data: ids and texts invert each other, windows are shifted by one."""

import pytest
import torch

from modula_agd import InvalidArgument
from modula_agd.train import DataError, characters

TEXT = "the quick brown fox jumps over the lazy dog\n" * 5


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "input.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def test_the_split_is_nine_to_one_in_order(folder):
    text = characters(folder)
    assert len(text.train) == len(TEXT) * 9 // 10
    assert text.decode(torch.cat((text.train, text.validation))) == TEXT
    assert text.vocabulary == "".join(sorted(set(TEXT)))


def test_encode_and_decode_are_inverse(folder):
    text = characters(folder)
    assert text.decode(text.encode("fox and dog")) == "fox and dog"
    with pytest.raises(InvalidArgument, match="holds 'X', which is not among the 28"):
        text.encode("foX")
    with pytest.raises(InvalidArgument, match="the id 28 was to be decoded"):
        text.decode(torch.tensor([28]))


@pytest.mark.parametrize("validation", [False, True])
def test_targets_are_the_inputs_one_later(folder, validation):
    text = characters(folder)
    inputs, targets = text.sample(torch.Generator().manual_seed(0), 50, 8, validation=validation)
    assert inputs.shape == targets.shape == (50, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    source = text.decode(text.validation if validation else text.train)
    assert all(text.decode(window) in source for window in inputs)


def test_the_longest_window_fits_and_a_longer_one_is_refused(folder):
    text = characters(folder)
    longest = len(text.validation) - 1
    generator = torch.Generator().manual_seed(0)
    _, targets = text.sample(generator, 3, longest, validation=True)
    assert targets[0, -1] == text.validation[-1]
    with pytest.raises(InvalidArgument, match=f"the text allows 1 to {longest}"):
        text.sample(generator, 3, longest + 1, validation=True)
    with pytest.raises(InvalidArgument, match="a batch of 0 windows"):
        text.sample(generator, 0, 4)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"needs input\.txt"):
        characters(tmp_path)
    (tmp_path / "input.txt").write_text("short")
    with pytest.raises(DataError, match="holds 5 characters"):
        characters(tmp_path)
    (tmp_path / "input.txt").write_bytes(b"\xff" * 100)
    with pytest.raises(DataError, match="is not UTF-8 text"):
        characters(tmp_path)


def test_tiny_shakespeare(data_dir):
    text = characters(data_dir)
    assert len(text.vocabulary) == 65
    assert (len(text.train), len(text.validation)) == (1003854, 111540)
