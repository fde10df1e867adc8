"""The command: tiny runs end to end, and every mistake of a user ends in one line and status 2."""

import io
import json
import os
import sys

import PIL.Image
import pytest
import torch

from modula_agd import METHODS, Method, __version__
from modula_agd.command_line import main
from modula_agd.train import command_line, extras, load, restore
from pictures import colour
from shell import failure

TINY = ["train", "--data", "digits", "--width", "16", "--depth", "2", "--quiet"]


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
    assert restore(out).step == 30
    wanted = {"step", "epoch", "train_loss", "val_loss", "val_accuracy", "eta", "seconds", "relative_update"}
    assert wanted <= set(lines[-1])
    config = json.loads((out / "config.json").read_text())
    assert config["width"] == 16
    assert config["depth"] == 2
    assert config["bias"] is False
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
    assert all(name.startswith("digits-fcn-fading-seed0-") for name in names)


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
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "task", interrupted)
    assert main(TINY) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "required"),
        (["bake"], "bake"),
        (["train"], "--data"),
        (
            ["train", "--data", "imagenette"],
            "there is no data set 'imagenette'; choose one of digits, mnist, cifar10, ",
        ),
        (["train", "--data", "hub:"], "hub:NAME"),
        (["train", "--data", "text:"], "text:FILE"),
        (["train", "--data", "imagenet", "--arch", "resnet50"], "no folder was given"),
        ([*TINY, "--depth", "0"], "argument --depth: '0' is not an integer of at least 1"),
        (
            [*TINY, "--batch-size", str(2**63)],
            "argument --batch-size: '9223372036854775808' is above 9223372036854775807",
        ),
        ([*TINY, "--threads", "99999"], "argument --threads: '99999' is above 1024"),
        (["train", "--data", "imagenet", "--workers", "99999"], "argument --workers: '99999' is above 256"),
        ([*TINY, "--width", "-3"], "argument --width"),
        ([*TINY, "--width", "1.5"], "argument --width"),
        ([*TINY, "--epochs", "0"], "argument --epochs"),
        ([*TINY, "--steps", "many"], "argument --steps"),
        ([*TINY, "--epochs", "1", "--steps", "1"], "not allowed with"),
        ([*TINY, "--batch-size", "0"], "argument --batch-size"),
        ([*TINY, "--seed", "-1"], "argument --seed"),
        ([*TINY, "--loss", "hinge"], "cross-entropy"),
        ([*TINY, "--arch", "lstm"], "fcn"),
        ([*TINY, "--arch", "gpt"], "the architecture gpt takes text, but digits is images. Choose fcn or "),
        (["train", "--data", "shakespeare"], "the architecture fcn takes images, but shakespeare is text. Choose gpt"),
        ([*TINY, "--heads", "2"], "the option heads was given for the architecture fcn"),
        ([*TINY, "--affine"], "the option affine was given for the architecture fcn"),
        ([*TINY, "--dropout", "1"], "argument --dropout: '1' is not a number from 0 to below 1"),
        ([*TINY, "--context", "8"], "the option context was given for the data digits"),
        ([*TINY, "--workers", "0"], "the option workers was given for the data digits"),
        (["train", "--data", "imagenet", "--arch", "cnn", "--augment"], "imagenet is always augmented"),
        (["train", "--data", "text:nowhere.txt", "--arch", "gpt"], "there is no text file nowhere.txt"),
        (["train", "--data", "digits", "--arch", "vgg16"], "needs images of at least 32×32 pixels"),
        ([*TINY, "--method", "adam"], "exact"),
        ([*TINY, "--lr", "0.1"], "--lr"),
        ([*TINY, "--device", "abacus"], "the device 'abacus' cannot be used"),
        ([*TINY, "--method", "certified"], "--method certified cannot train --arch fcn"),
        ([*TINY, "--method", "certified"], "Choose --arch linear"),
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
    missing = ["train", "--data", "mnist", "--data-dir", str(tmp_path / "nowhere"), "--out", str(file / "below" / "it")]
    assert f"cannot be made, as {file} is a file" in failure(capsys, *missing)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore text."), "smaller --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "smaller --batch-size"),
        (MemoryError(), "training ended early: MemoryError. Take a smaller --batch-size"),
        (
            RuntimeError("no kernel image is available\nfor this device"),
            "no kernel image is available. Try --device cpu",
        ),
    ],
)
def test_what_the_machine_cannot_do_is_one_line_and_keeps_the_run(tmp_path, monkeypatch, capsys, error, said):
    update, calls = Method.update, []

    def exhausted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return update(self, *arguments, **options)

    monkeypatch.setattr(Method, "update", exhausted)
    out = tmp_path / "run"
    told = failure(capsys, *TINY, "--steps", "9", "--eval-every", "3", "--out", str(out))
    assert said in told
    assert f"What there is lies in {out}" in told
    assert restore(out).step == 3
    assert len((out / "log.jsonl").read_text().splitlines()) == 2


def test_a_network_that_does_not_fit_into_memory_is_one_line(tmp_path, capsys):
    huge = ["train", "--data", "digits", "--width", str(2**40), "--depth", "1", "--arch", "resmlp", "--quiet"]
    assert "smaller --batch-size or --width" in failure(capsys, *huge, "--out", str(tmp_path / "run"))


@pytest.mark.parametrize("arch", ["cnn", "vit", "rescnn"])
def test_images_train_with_augmentation(tiny_colour, tmp_path, capsys, arch):
    out = tmp_path / "run"
    arguments = ["train", "--data", "cifar10", "--data-dir", str(tiny_colour), "--arch", arch, "--augment", "--quiet"]
    sizes = ["--width", "8", "--depth", "1", *(["--heads", "2"] if arch == "vit" else [])]
    assert main([*arguments, *sizes, "--steps", "2", "--batch-size", "8", "--out", str(out)]) == 0
    assert "samples of 3×8×8, 10 classes; 2 steps of 8" in capsys.readouterr().out
    assert restore(out).recipe.arch == arch


def test_image_files_train(tmp_path, capsys):
    for split in ("train", "val"):
        for label in ("ant", "bee"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for row in range(3):
                PIL.Image.fromarray(colour(1, row, 12)[0]).save(folder / f"{row}.jpeg")
    arguments = ["train", "--data", "imagenet", "--data-dir", str(tmp_path / "data"), "--arch", "cnn", "--width", "2"]
    arguments += ["--steps", "2", "--batch-size", "2", "--workers", "1", "--quiet", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    assert "validation accuracy" in (said := capsys.readouterr().out)
    assert "6 training and 6 held-out samples of 3×224×224, 2 classes, read by 1 processes" in said


def test_text_trains(tmp_path, capsys):
    (tmp_path / "input.txt").write_text("the quick brown fox\n" * 30)
    arguments = ["train", "--data", "shakespeare", "--data-dir", str(tmp_path), "--arch", "gpt", "--context", "8"]
    arguments += ["--depth", "1", "--width", "8", "--heads", "2", "--dropout", "0.1", "--bias", "--affine"]
    assert main([*arguments, "--steps", "3", "--batch-size", "4", "--quiet", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "540 training and 60 held-out characters, 17 distinct, in windows of 8; 3 steps of 4 on cpu" in said
    assert "validation accuracy of the next character" in said
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["context"], config["form"], config["dropout"]) == (8, "convex", 0.1)


def test_a_missing_extra_is_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "matplotlib" else True)
    assert (
        'needs matplotlib, which this environment lacks. Install the train extra: pip install "modula_agd[train]"'
        in (failure(capsys, *TINY))
    )


def test_what_a_terminal_cannot_say_does_not_end_a_run(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main([*TINY, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    terminal.flush()
    assert rb"share of \u03b7" in terminal.buffer.getvalue()  # type: ignore[attr-defined]


def test_quiet_silences_the_bars_of_the_datasets_library_too(tmp_path, monkeypatch, capsys):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_DATASETS")}
    monkeypatch.setattr(os, "environ", environment)
    assert main([*TINY, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"


def test_a_certified_step_with_dropout_trains(tmp_path, capsys):
    (tmp_path / "verse.txt").write_text("a rose is a rose is a rose\n" * 20)
    arguments = [
        "train",
        "--data",
        f"text:{tmp_path / 'verse.txt'}",
        "--arch",
        "gpt",
        "--context",
        "8",
        "--quiet",
        "--steps",
        "2",
    ]
    arguments += ["--depth", "1", "--width", "8", "--heads", "2", "--dropout", "0.2", "--method", "certified"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0


def test_help_and_version(capsys):
    for arguments, said in (
        (["--version"], __version__),
        (["--help"], "train"),
        (["train", "--help"], "--data-dir"),
        (["train", "--help"], "agd: AGD exactly as published"),
        (["train", "--help"], "digits and letters must not be mirrored"),
        (["sample", "--help"], "--temperature"),
    ):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 0
        output = " ".join(capsys.readouterr().out.split())
        assert said in output
        assert "learning-rate" not in output


@pytest.mark.slow
def test_the_demo_reaches_95_percent(tmp_path, capsys):
    demo = ["train", "--data", "digits", "--width", "128", "--epochs", "30", "--batch-size", "64", "--quiet"]
    assert main([*demo, "--out", str(tmp_path / "run")]) == 0
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["val_accuracy"] >= 0.95
