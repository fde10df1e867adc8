"""Character data: ids and texts invert each other, windows are shifted by one."""

import dataclasses

import pytest
import torch

from modula_agd import InvalidArgument
from modula_agd.train import DataError, Task, TextTask, characters, task

TEXT = "the quick brown fox jumps over the lazy dog\n" * 5


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "input.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def test_the_split_is_nine_to_one_in_order(folder):
    text = characters(folder=folder)
    assert len(text.train) == len(TEXT) * 9 // 10
    assert text.vocabulary.decode(torch.cat((text.train, text.validation))) == TEXT
    assert text.vocabulary.characters == "".join(sorted(set(TEXT)))
    assert text.train.dtype == torch.int64


def test_encode_and_decode_are_inverse(folder):
    vocabulary = characters(folder=folder).vocabulary
    assert vocabulary.decode(vocabulary.encode("fox and dog")) == "fox and dog"
    with pytest.raises(InvalidArgument, match="holds 'X', which is not among the 28"):
        vocabulary.encode("foX")
    with pytest.raises(InvalidArgument, match="the id 28 was to be decoded"):
        vocabulary.decode(torch.tensor([28]))


def test_any_file_of_any_script_is_a_text(tmp_path):
    path = tmp_path / "odyssey.txt"
    path.write_text("ἄνδρα μοι ἔννεπε, μοῦσα 🏺\n" * 3, encoding="utf-8")
    text = characters(f"text:{path}")
    assert text.vocabulary.decode(torch.cat((text.train, text.validation))) == path.read_text(encoding="utf-8")
    assert "🏺" in text.vocabulary.characters


def test_targets_are_the_inputs_one_later_and_from_the_training_split(folder):
    text = characters(folder=folder)
    inputs, targets = text.sample(torch.Generator().manual_seed(0), 50, 8)
    assert inputs.shape == targets.shape == (50, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    source = text.vocabulary.decode(text.train)
    assert all(text.vocabulary.decode(window) in source for window in inputs)


def test_the_longest_window_fits_and_a_longer_one_is_refused(folder):
    text = characters(folder=folder)
    longest = len(text.validation) - 1
    generator = torch.Generator().manual_seed(0)
    assert text.sample(generator, 3, longest)[0].shape == (3, longest)
    for context in (0, longest + 1):
        with pytest.raises(InvalidArgument, match=f"the text allows 1 to {longest}"):
            text.sample(generator, 3, context)
    with pytest.raises(InvalidArgument, match="a batch of 0 windows"):
        text.sample(generator, 0, 4)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"needs input\.txt"):
        characters(folder=tmp_path)
    with pytest.raises(DataError, match="there is no text file"):
        characters(f"text:{tmp_path / 'nowhere.txt'}")
    (tmp_path / "input.txt").write_text("short")
    with pytest.raises(DataError, match="holds 5 characters"):
        characters(folder=tmp_path)
    (tmp_path / "input.txt").write_bytes(b"\xff" * 100)
    with pytest.raises(DataError, match="is not UTF-8 text"):
        characters(folder=tmp_path)


def test_a_task_evaluates_the_held_out_text_once_side_by_side(folder):
    task = TextTask(characters(folder=folder), 5)
    batches = list(task.evaluation(2))
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    validation = task.text.validation
    count = (len(validation) - 1) // 5
    assert inputs.shape == (count, 5)
    assert torch.equal(inputs.flatten(), validation[: 5 * count])
    assert torch.equal(labels.flatten(), validation[1 : 5 * count + 1])
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(batches, task.evaluation(2), strict=True))


def test_an_evaluation_of_a_long_text_is_a_spread_of_windows(folder, monkeypatch):
    monkeypatch.setattr("modula_agd.train.text_task._MOST_WINDOWS", 3)
    text = characters(folder=folder)
    long = dataclasses.replace(text, validation=torch.arange(101))
    (batch,) = TextTask(long, 10).evaluation(8)
    assert batch.inputs[:, 0].tolist() == [0, 30, 60]


def test_a_task_is_the_same_for_equal_seeds_and_an_epoch_shows_the_text_once(folder):
    task = TextTask(characters(folder=folder), 8)
    first, second, other = (next(task.batches(6, seed)) for seed in (1, 1, 2))
    assert torch.equal(first.inputs, second.inputs)
    assert not torch.equal(first.inputs, other.inputs)
    assert task.per_epoch(6) == 198 // 48
    assert task.per_epoch(1000) == 1
    assert isinstance(task, Task)
    assert "198 training and 22 held-out characters, 28 distinct, in windows of 8" in str(task)
    with pytest.raises(InvalidArgument, match="the text allows 1 to 21"):
        TextTask(task.text, 22)


def test_tiny_shakespeare(data_dir):
    text = characters(folder=data_dir)
    assert len(text.vocabulary) == 65
    assert (len(text.train), len(text.validation)) == (1003854, 111540)


def test_a_task_is_opened_by_name_with_a_path_or_its_text_and_known_options_alone(folder):
    assert str(task("shakespeare", str(folder), context=4)) == str(task("shakespeare", folder, context=4))
    with pytest.raises(InvalidArgument, match=r"the option data_dir was given.*augment, context, workers.*folder"):
        task("shakespeare", data_dir=folder)


def test_a_mark_before_the_text_is_no_character_of_it(tmp_path):
    path = tmp_path / "marked.txt"
    path.write_text(TEXT, encoding="utf-8-sig")
    text = characters(f"text:{path}")
    assert text.vocabulary.decode(torch.cat((text.train, text.validation))) == TEXT
