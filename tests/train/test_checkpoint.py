"""Checkpoints: what is read is what was written, and a failure leaves the old file whole."""

import os
from typing import NamedTuple

import pytest
import torch

from modula_agd import METHODS, MLP, CrossEntropy, InvalidArgument
from modula_agd.train import CheckpointError, files, load, save, state_like


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
    again = state_like(state, read.state)
    for name, value in state._asdict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(again, name), value), name
            assert getattr(again, name).dtype == value.dtype, name
    assert read.buffers == {}
    assert os.listdir(tmp_path) == ["run.safetensors"]


class Nested(NamedTuple):
    count: torch.Tensor
    momentum: dict[str, torch.Tensor]
    absent: None = None


def test_buffers_and_nested_states_come_back_by_dotted_names(tmp_path, trained):
    params, _ = trained
    state = Nested(torch.tensor(3), {"0.weight": torch.ones(2, 2)})
    buffers = {"1.mean": torch.arange(3.0), "1.count": torch.tensor(5)}
    save(tmp_path / "run", params, state, {}, buffers)
    read = load(tmp_path / "run")
    assert set(read.state) == {"count", "momentum.0.weight"}
    assert torch.equal(read.state["momentum.0.weight"], torch.ones(2, 2))
    again = state_like(Nested(torch.tensor(0), {}), read.state)
    assert torch.equal(again.count, state.count)
    assert torch.equal(again.momentum["0.weight"], torch.ones(2, 2))
    assert again.absent is None
    assert read.buffers.keys() == buffers.keys()
    assert all(torch.equal(read.buffers[name], value) for name, value in buffers.items())
    assert read.params.keys() == params.keys()


def test_the_state_of_another_method_is_refused(trained):
    with pytest.raises(CheckpointError, match="has no eta"):
        state_like(trained[1], {"count": torch.tensor(3)})


@pytest.mark.parametrize("name", [name for name in METHODS if name != "certified"])
def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path, name):
    method = METHODS[name](MLP(3, 4, 5, depth=2), CrossEntropy())
    inputs, labels = torch.randn((8, 5), generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    params = method.network.init(0)
    state = method.init(params)
    for step in range(4):
        if step == 2:
            save(tmp_path / "run", params, state, {})
            saved = load(tmp_path / "run")
            params, state = saved.params, state_like(method.init(params), saved.state)
        grads = torch.func.grad(method.objective)(params, inputs, labels)
        updates, state = method.update(grads, state, params)
        params = {key: value + updates[key] for key, value in params.items()}
    plain = method.network.init(0)
    state = method.init(plain)
    for _ in range(4):
        grads = torch.func.grad(method.objective)(plain, inputs, labels)
        updates, state = method.update(grads, state, plain)
        plain = {key: value + updates[key] for key, value in plain.items()}
    assert all(torch.equal(params[key], value) for key, value in plain.items())


def test_what_is_no_tensor_cannot_be_kept(tmp_path, trained):
    with pytest.raises(InvalidArgument, match=r"state\.rate is float"):
        save(tmp_path / "run", trained[0], {"rate": 0.1}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, trained, monkeypatch, fails):
    params, state = trained
    path = tmp_path / "run.safetensors"
    save(path, params, state, {"step": "1"})

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, fails, full)
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
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="holds tensors named weight"):
        load(path)


def test_a_state_of_another_shape_is_refused(trained):
    _, state = trained
    fields = {name: value for name, value in state._asdict().items() if isinstance(value, torch.Tensor)}
    with pytest.raises(CheckpointError, match="sizes has shape"):
        state_like(state, {**fields, "sizes": torch.ones(7)})


def test_a_write_that_fails_names_the_file(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"run\.json"):
        files.replace(tmp_path / "run.json", b"{}")
    assert os.listdir(tmp_path) == []
