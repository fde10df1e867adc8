"""Checkpoints: what is read is what was written, and a failure leaves the old file whole."""

import os

import pytest
import torch

from modula_agd import METHODS, MLP, CrossEntropy
from modula_agd.train import CheckpointError, checkpoint, load, save


@pytest.fixture
def trained():
    network = MLP(3, 4, 5, depth=2)
    params = network.init(0)
    return params, METHODS["agd"](network, CrossEntropy()).init(params)


def test_round_trip(tmp_path, trained):
    params, state = trained
    path = tmp_path / "run.safetensors"
    save(path, params, state, {"step": "7"})
    read = load(path)
    assert read.metadata == {"step": "7"}
    assert read.params.keys() == params.keys()
    assert all(torch.equal(read.params[name], value) for name, value in params.items())
    again = type(state)(**read.state)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(again, state, strict=True))
    assert os.listdir(tmp_path) == ["run.safetensors"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, trained, monkeypatch, fails):
    params, state = trained
    path = tmp_path / "run.safetensors"
    save(path, params, state, {"step": "1"})

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.os, fails, full)
    with pytest.raises(OSError, match="no space left"):
        save(path, params, state, {"step": "2"})
    monkeypatch.undo()
    assert load(path).metadata == {"step": "1"}
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(path)
    path.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="holds tensors named weight"):
        load(path)
