"""``--resume``: a run goes on with its own options; what contradicts them, or is no run, is one line and status 2."""

import json
import os
import shutil

import pytest

from faults import differences
from modula_agd.command_line import main
from modula_agd.train import command_line, load, restore, save
from modula_agd.train.checkpoint import FORMAT
from modula_agd.train.trainer import Trainer
from shell import failure

VERSE = "To be, or not to be, that is the question:\n" * 12


def arguments(folder) -> list[str]:
    (folder / "verse.txt").write_text(VERSE)
    run = ["train", "--data", f"text:{folder / 'verse.txt'}", "--arch", "gpt", "--context", "8", "--depth", "1"]
    run += ["--width", "8", "--heads", "2", "--dropout", "0.2", "--batch-size", "4", "--threads", "1", "--quiet"]
    return [*run, "--steps", "8", "--eval-every", "3", "--checkpoint-every", "2"]


def stopped_at(step: int, monkeypatch) -> None:
    """Have a user interrupt the step behind so many."""
    inner = Trainer.step

    def interrupted(self, point, *rest, **options):
        if point.step == step:
            raise KeyboardInterrupt
        return inner(self, point, *rest, **options)

    monkeypatch.setattr(Trainer, "step", interrupted)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with a whole run and one that was interrupted after four steps."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "_draw", lambda *_: None)
        assert main([*arguments(folder), "--out", str(folder / "whole")]) == 0
        stopped_at(4, patch)
        assert main([*arguments(folder), "--out", str(folder / "half")]) == 130
    return folder


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Plots take longer than these runs."""
    if "drawn" not in request.node.name and "own_options" not in request.node.name:
        monkeypatch.setattr(command_line, "_draw", lambda *_: None)


@pytest.fixture
def half(kept, tmp_path):
    """A copy of the interrupted run, to spoil."""
    return shutil.copytree(kept / "half", tmp_path / "half")


def test_a_run_goes_on_with_its_own_options(kept, half, capsys):
    same = ["--width", "8", "--dropout", "0.2", "--steps", "8", "--seed", "0", "--method", "fading", "--context", "8"]
    assert main(["train", "--resume", str(half), *same, "--quiet"]) == 0
    assert "goes on after 4 steps" in capsys.readouterr().out
    assert list(differences(kept / "whole", half)) == []
    assert (half / "plot.png").is_file()
    assert json.loads((half / "config.json").read_text())["out"] == str(half)


def test_a_finished_run_says_so_and_is_drawn_if_a_kill_left_it_undrawn(kept, tmp_path, capsys):
    done = shutil.copytree(kept / "whole", tmp_path / "done")
    before = (done / "checkpoint.safetensors").read_bytes(), (done / "log.jsonl").read_bytes()
    assert not (done / "plot.png").exists()
    assert main(["train", "--resume", str(done)]) == 0
    assert f"the run in {done} is finished: its 8 steps are made" in capsys.readouterr().out
    assert (done / "plot.png").is_file()
    assert ((done / "checkpoint.safetensors").read_bytes(), (done / "log.jsonl").read_bytes()) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--width", "16"], "--width 16 was given to go on with a run that was begun with 8"),
        (["--data", "digits"], "--data digits was given"),
        (["--arch", "fcn"], "--arch fcn was given to go on with a run that was begun with 'gpt'"),
        (["--loss", "square"], "--loss square was given"),
        (["--method", "agd"], "--method agd was given to go on with a run that was begun with 'fading'"),
        (["--batch-size", "5"], "--batch-size 5 was given"),
        (["--steps", "9"], "--steps 9 was given to go on with a run that was begun with 8"),
        (["--epochs", "3"], "--epochs 3 was given to go on with a run that was begun with None"),
        (["--eval-every", "4"], "--eval-every 4 was given"),
        (["--seed", "1"], "--seed 1 was given"),
        (["--dropout", "0.5"], "--dropout 0.5 was given"),
        (["--affine"], "--affine True was given"),
        (["--out", "elsewhere"], "--out elsewhere was given"),
        (["--overwrite"], "--overwrite begins a run anew and --resume goes on with it"),
    ],
)
def test_an_option_that_contradicts_the_run_is_refused_and_nothing_is_touched(half, capsys, options, said):
    before = {path.name: path.read_bytes() for path in half.iterdir()}
    assert said in failure(capsys, "train", "--resume", str(half), *options)
    assert {path.name: path.read_bytes() for path in half.iterdir()} == before


def test_how_a_run_is_computed_may_change(kept, half, capsys):
    free = ["--checkpoint-every", "1", "--threads", "1", "--device", "cpu", "--data-dir", str(kept)]
    assert main(["train", "--resume", str(half), *free, "--quiet"]) == 0
    assert list(differences(kept / "whole", half)) == []
    config = json.loads((half / "config.json").read_text())
    assert (config["checkpoint_every"], config["data_dir"]) == (1, str(kept))
    assert json.loads(load(half / "checkpoint.safetensors").metadata["config"]) == config


def test_a_run_goes_on_from_another_place(kept, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "_draw", lambda *_: None)
    (tmp_path / "begun").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "begun")
    relative = arguments(tmp_path / "begun")
    relative[2] = "text:verse.txt"
    with monkeypatch.context() as patch:
        stopped_at(4, patch)
        assert main([*relative, "--out", "run"]) == 130
    monkeypatch.chdir(tmp_path / "other")
    (tmp_path / "other" / "verse.txt").write_text("another text by the same name\n" * 20)
    assert main(["train", "--resume", "../begun/run", "--quiet"]) == 0
    assert [what for what in differences(kept / "whole", tmp_path / "begun" / "run") if what != "recipe"] == []


def test_other_data_are_noticed(half, kept, tmp_path, capsys):
    (tmp_path / "verse.txt").write_text(VERSE.replace("question", "questiom"))
    config = load(half / "checkpoint.safetensors")
    assert config.metadata["step"] == "4"
    # the same name, in another folder: only a file that is named by a relative path is looked for there
    told = json.loads(config.metadata["config"]) | {"data": "text:verse.txt", "data_dir": str(tmp_path)}
    _rewritten(half, config=json.dumps(told))
    (half / "config.json").unlink()
    assert "the data are not those that the run began with" in failure(capsys, "train", "--resume", str(half))
    (tmp_path / "verse.txt").unlink()
    assert "there is no text file" in failure(capsys, "train", "--resume", str(half))


def _rewritten(run, **metadata: str | None) -> None:
    """The run's checkpoint with other metadata; None takes an entry away."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = run / "checkpoint.safetensors"
    with safe_open(str(path), framework="pt") as file:
        told = {**file.metadata(), **metadata}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {name: value for name, value in told.items() if value is not None})


def test_a_later_version_a_foreign_file_and_a_torn_one_are_told_apart(half, capsys):
    path = half / "checkpoint.safetensors"
    whole = path.read_bytes()
    _rewritten(half, format=str(FORMAT + 1))
    said = failure(capsys, "train", "--resume", str(half))
    assert f"has the format {FORMAT + 1}, but this version of modula_agd reads formats up to {FORMAT}" in said
    _rewritten(half, format="pickle")
    assert "was written by another program" in failure(capsys, "train", "--resume", str(half))
    # of before there were formats: weights, but nothing to go on from
    _rewritten(half, format=None, loop=None, config=None)
    assert "does not say with which options its run was begun" in failure(capsys, "train", "--resume", str(half))
    assert restore(half).step == 4
    path.write_bytes(whole)
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "is not a whole safetensors file" in failure(capsys, "train", "--resume", str(half))
    path.write_bytes(whole + b"more")
    assert "is not a whole safetensors file" in failure(capsys, "train", "--resume", str(half))


def test_damaged_options_are_refused(half, capsys):
    (half / "config.json").write_text("{")
    assert "config.json is no configuration of a run" in failure(capsys, "train", "--resume", str(half))
    (half / "config.json").unlink()
    _rewritten(half, config="[1]")
    assert "holds no readable options" in failure(capsys, "train", "--resume", str(half))


def test_a_configuration_that_was_edited_is_noticed(half, capsys):
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"width": 16}))
    assert "has width 16, but the run to go on with was begun with 8" in failure(capsys, "train", "--resume", str(half))


def test_a_lost_configuration_is_written_again(kept, half, capsys):
    (half / "config.json").unlink()
    assert main(["train", "--resume", str(half), "--quiet"]) == 0
    assert json.loads((half / "config.json").read_text())["width"] == 8


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(kept, half, capsys):
    (half / "checkpoint.safetensors").unlink()
    (half / "log.jsonl").write_text((half / "log.jsonl").read_text().splitlines()[0] + '\n{"ste')
    (half / ".checkpoint.safetensors.123.tmp").write_bytes(b"half")
    assert main(["train", "--resume", str(half), "--quiet"]) == 0
    assert list(differences(kept / "whole", half)) == []


def test_a_lost_checkpoint_is_not_taken_for_a_run_that_has_not_begun(half, capsys):
    (half / "checkpoint.safetensors").unlink()
    before = (half / "log.jsonl").read_bytes()
    assert "there is no checkpoint" in failure(capsys, "train", "--resume", str(half))
    assert (half / "log.jsonl").read_bytes() == before


def test_what_is_no_run_is_refused(half, tmp_path, capsys):
    assert "there is no run folder" in failure(capsys, "train", "--resume", str(tmp_path / "nowhere"))
    assert "there is no run folder" in failure(capsys, "train", "--resume", str(half / "config.json"))
    (tmp_path / "empty").mkdir()
    assert "there is no checkpoint" in failure(capsys, "train", "--resume", str(tmp_path / "empty"))
    assert os.listdir(tmp_path / "empty") == []


def test_without_data_and_without_a_run_both_are_named(capsys):
    said = failure(capsys, "train", "--arch", "fcn")
    assert "--data" in said
    assert "--resume" in said


def test_no_code_is_run_by_reading_a_checkpoint(half, tmp_path, capsys):
    import pickle

    witness = tmp_path / "witness"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(witness),)

    (half / "checkpoint.safetensors").write_bytes(pickle.dumps(Malicious()))
    assert "is not a whole safetensors file" in failure(capsys, "train", "--resume", str(half))
    assert not witness.exists()
    # the witness is one: unpickled, the file does what it says
    pickle.loads((half / "checkpoint.safetensors").read_bytes())
    assert witness.exists()


def test_a_checkpoint_of_another_network_is_refused(half, capsys):
    saved = load(half / "checkpoint.safetensors")
    wider = {name: value.repeat(1, 2) for name, value in saved.params.items()}
    path = half / "checkpoint.safetensors"
    save(path, wider, saved.state, saved.metadata, saved.buffers, saved.average, saved.loop)  # type: ignore[arg-type]
    assert "other weights than the network to be trained" in failure(capsys, "train", "--resume", str(half))
