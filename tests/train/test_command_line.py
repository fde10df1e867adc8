"""The command: tiny runs end to end, and every mistake of a user ends in one line and status 2."""

import json
import sys

import pytest
import torch

from modula_agd import METHODS, __version__
from modula_agd.command_line import main
from modula_agd.train import command_line, extras, load

TINY = ["train", "--data", "digits", "--width", "16", "--depth", "2", "--quiet"]


def failure(capsys, *arguments: str) -> str:
    """Run the command, which must fail as a user's mistake; what it said."""
    try:
        status = main(arguments)
    except SystemExit as exit:
        status = exit.code
    output = capsys.readouterr()
    assert status == 2
    assert output.err.startswith("error: ")
    assert "Traceback" not in output.err
    assert len(output.err.splitlines()) == 1
    return output.err


def test_a_run_leaves_its_folder(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*TINY, "--steps", "30", "--eval-every", "10", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("parameter")
    assert "test accuracy" in said
    assert str(out) in said
    assert {file.name for file in out.iterdir()} == {"log.jsonl", "checkpoint.safetensors", "config.json", "plot.png"}
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 10, 20, 30]
    wanted = {"step", "epoch", "train_loss", "val_loss", "val_accuracy", "eta", "seconds", "relative_update"}
    assert wanted <= set(lines[-1])
    config = json.loads((out / "config.json").read_text())
    assert config["width"] == 16
    assert config["steps"] == 30
    assert config["epochs"] is None
    assert config["versions"] == {
        "modula_agd": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    assert load(out / "checkpoint.safetensors").metadata["step"] == "30"


def test_runs_are_named_and_never_collide(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert main([*TINY, "--steps", "1"]) == 0
    names = sorted(folder.name for folder in (tmp_path / "runs").iterdir())
    assert len(names) == 3
    assert all(name.startswith("digits-fcn-agd-seed0-") for name in names)


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path, capsys):
    out = tmp_path / "run"
    short = [*TINY, "--steps", "1", "--out", str(out)]
    assert main(short) == 0
    (out / "notes.txt").write_text("mine")
    assert "is not empty" in failure(capsys, *short)
    assert main([*short, "--overwrite"]) == 0
    assert len((out / "log.jsonl").read_text().splitlines()) == 2
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("method", "loss"),
    [*((method, "cross-entropy") for method in METHODS), ("exact", "square"), ("agd", "unhalved-square")],
)
def test_methods_and_losses(tmp_path, capsys, method, loss):
    arch = "linear" if method == "certified" else "resmlp"
    options = ["--method", method, "--loss", loss, "--arch", arch, "--steps", "2", "--out", str(tmp_path / "run")]
    assert main([*TINY, *options]) == 0


def test_parquet_files_train(tiny, tmp_path, capsys):
    arguments = ["train", "--data", "mnist", "--data-dir", str(tiny), "--width", "8", "--epochs", "2", "--quiet"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert "40 training and 20 held-out samples of 36 features, 10 classes; 2 steps of 40" in capsys.readouterr().out


def test_the_bar_shows_loss_accuracy_and_eta(tmp_path, capsys):
    arguments = [part for part in TINY if part != "--quiet"]
    assert main([*arguments, "--steps", "25", "--out", str(tmp_path / "run")]) == 0
    assert "accuracy" in (bar := capsys.readouterr().err)
    assert "η" in bar


def test_an_interrupt_leaves_a_run_folder_and_status_130(tmp_path, monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modula_agd.train.loop._show", interrupted)
    out = tmp_path / "run"
    assert main([*TINY, "--steps", "50", "--eval-every", "40", "--out", str(out)]) == 130
    assert "interrupted after 20 steps" in capsys.readouterr().err
    assert (out / "plot.png").is_file()
    assert load(out / "checkpoint.safetensors").metadata["step"] == "20"


def test_an_interrupt_while_loading_is_quiet(monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "classification", interrupted)
    assert main(TINY) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "required"),
        (["bake"], "bake"),
        (["train"], "--data"),
        (["train", "--data", "imagenet"], "'imagenet' is not one of digits, mnist, cifar10, shakespeare and hub:NAME"),
        (["train", "--data", "hub:"], "hub:NAME"),
        ([*TINY, "--depth", "0"], "argument --depth: '0' is not an integer of at least 1"),
        ([*TINY, "--width", "-3"], "argument --width"),
        ([*TINY, "--width", "1.5"], "argument --width"),
        ([*TINY, "--epochs", "0"], "argument --epochs"),
        ([*TINY, "--steps", "many"], "argument --steps"),
        ([*TINY, "--epochs", "1", "--steps", "1"], "not allowed with"),
        ([*TINY, "--batch-size", "0"], "argument --batch-size"),
        ([*TINY, "--seed", "-1"], "argument --seed"),
        ([*TINY, "--loss", "hinge"], "cross-entropy"),
        ([*TINY, "--arch", "gpt"], "fcn"),
        ([*TINY, "--method", "adam"], "exact"),
        ([*TINY, "--lr", "0.1"], "--lr"),
        ([*TINY, "--device", "abacus"], "the device 'abacus' cannot be used"),
        ([*TINY, "--method", "certified"], "ReLU"),
        (["train", "--data", "shakespeare"], "needs the small transformer, which arrives in a later version"),
        (["train", "--data", "mnist"], "--data-dir"),
        (["train", "--data", "mnist", "--data-dir", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(options, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in failure(capsys, *options)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without an accelerator")
def test_a_device_that_is_not_there_is_a_mistake(capsys):
    assert "the device 'cuda' cannot be used" in failure(capsys, *TINY, "--device", "cuda")


def test_an_out_that_cannot_be_a_folder_is_a_mistake(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in failure(capsys, *TINY, "--steps", "1", "--out", str(file))
    assert str(file) in failure(capsys, *TINY, "--steps", "1", "--out", str(file / "below"))


def test_a_missing_extra_is_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "matplotlib" else True)
    assert (
        'needs matplotlib, which this environment lacks. Install the train extra: pip install "modula_agd[train]"'
        in (failure(capsys, *TINY))
    )


def test_help_and_version(capsys):
    for arguments, said in ((["--version"], __version__), (["--help"], "train"), (["train", "--help"], "--data-dir")):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 0
        output = capsys.readouterr().out
        assert said in output
        assert "learning-rate" not in output


@pytest.mark.slow
def test_the_demo_reaches_95_percent(tmp_path, capsys):
    demo = ["train", "--data", "digits", "--width", "128", "--epochs", "30", "--batch-size", "64", "--quiet"]
    assert main([*demo, "--out", str(tmp_path / "run")]) == 0
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["val_accuracy"] >= 0.95
