"""Bad data through the command: one line with the file, the row where there is one, what was expected, and a remedy."""

import shutil

import datasets
import PIL.Image
import pytest

from faults import differences
from modula_agd.command_line import main
from modula_agd.train import command_line, load
from pictures import cell, colour, grey, png
from shell import failure

GREY = [cell(image) for image in grey(6)]


def parquet(path, images=GREY, labels=range(6), **names: str) -> None:
    columns = {names.get("image", "image"): list(images), names.get("label", "label"): list(labels)}
    datasets.Dataset.from_dict(columns).to_parquet(path)


def with_row(row: int, damage) -> list:
    return [*GREY[:row], damage, *GREY[row + 1 :]]


def cut(path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def flipped(path) -> None:
    content = bytearray(path.read_bytes())
    content[50:90] = bytes(byte ^ 255 for byte in content[50:90])
    path.write_bytes(bytes(content))


PNG = png(grey(1)[0])
FAULTS = {
    "undecodable image": (
        lambda path: parquet(path, with_row(4, {"bytes": b"no image", "path": None})),
        ["{path}, row 4 (counted from 0), holds an image that cannot be read", "Repair or drop that row"],
    ),
    "undecodable first image": (
        lambda path: parquet(path, with_row(0, {"bytes": b"no image", "path": None})),
        [
            "{path}, row 0 (counted from 0), holds an image that cannot be read: cannot identify image file of a known format"
        ],
    ),
    "torn image": (
        lambda path: parquet(path, with_row(3, {"bytes": PNG[:50], "path": None})),
        ["{path}, row 3 (counted from 0), holds an image that cannot be read", "Repair or drop that row"],
    ),
    "null image": (
        lambda path: parquet(path, with_row(5, None)),
        ["{path}, row 5 (counted from 0), holds no image", "Repair or drop that row"],
    ),
    "null label": (
        lambda path: parquet(path, labels=[0, 1, None, 3, 4, 5]),
        ["{path}, row 2 (counted from 0), has no label, where a class was expected", "Drop unlabelled rows"],
    ),
    "label beyond the classes": (
        lambda path: parquet(path, labels=[0, 1, 2, 3, 10, 5]),
        [
            "{path}, row 4 (counted from 0), has the label 10, but mnist has 10 classes, labelled 0 to 9",
            "Correct the labels",
        ],
    ),
    "negative label": (
        lambda path: parquet(path, labels=[0, -7, 2, 3, 4, 5]),
        ["{path}, row 1 (counted from 0), has the label -7, but labels must be ≥ 0", "Correct it, or drop the row"],
    ),
    "labels that are texts": (
        lambda path: parquet(path, labels="abcdef"),
        ["{path} has no integer label column among image ({{bytes, path}}), label (string)", "or convert it"],
    ),
    "labels that are all null": (
        lambda path: parquet(path, labels=[None] * 6),
        ["{path} has no integer label column", "label (null)"],
    ),
    "no label column": (
        lambda path: datasets.Dataset.from_dict({"image": GREY}).to_parquet(path),
        ["{path} has no integer label column among image", "name it 'label'"],
    ),
    "no image column": (
        lambda path: datasets.Dataset.from_dict({"label": [0, 1]}).to_parquet(path),
        ["{path} has no image column among label (int64)", "name it 'image'"],
    ),
    "images that are texts": (
        lambda path: parquet(path, images="abcdef"),
        ["{path} has no image column among image (string), label (int64)"],
    ),
    "images of two sizes": (
        lambda path: parquet(path, with_row(2, cell(grey(1, side=5)[0]))),
        ["{path}, row 2 (counted from 0), is 5×5, but row 0 is 6×6", "Resize"],
    ),
    "file cut short": (
        lambda path: cut(path, -20),
        ["{path} could not be read as Parquet", "It is damaged or no Parquet file", "again"],
    ),
    "half a file": (lambda path: cut(path, 300), ["{path} could not be read as Parquet", "again"]),
    "nothing of a file": (lambda path: cut(path, 0), ["{path} could not be read as Parquet", "again"]),
    "damaged inside": (flipped, ["{path} could not be read as Parquet", "again"]),
    "missing file": (lambda path: path.unlink(), ["the data set 'mnist' needs {path.name}", "--data-dir"]),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_parquet_file_is_one_line(tmp_path, capfd, fault, split):
    damage, said = FAULTS[fault]
    for each in ("train", "test"):
        parquet(tmp_path / f"{each}.parquet")
    path = tmp_path / f"{split}.parquet"
    damage(path)
    out = tmp_path / "run"
    told = failure(capfd, "train", "--data", "mnist", "--data-dir", str(tmp_path), "--quiet", "--out", str(out))
    for part in said:
        assert part.format(path=path) in told
    assert not out.exists()


def test_columns_of_one_file_need_not_be_those_of_the_other(tmp_path, capsys):
    parquet(tmp_path / "train.parquet")
    parquet(tmp_path / "test.parquet", image="img", label="labels")
    arguments = ["train", "--data", "mnist", "--data-dir", str(tmp_path), "--steps", "1", "--width", "4", "--quiet"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ["{path} holds 0 characters, but at least 20 are needed", "Take a longer text"]),
        (b"too short", ["{path} holds 9 characters"]),
        (
            b"x" * 200,
            [
                "windows of 64 characters were asked for, but the text allows 1 to 19",
                "{path} has 20",
                "Shorten the context",
            ],
        ),
        (b"a line\nand \xff\n" * 9, ["{path} is not UTF-8 text", "at byte 11 (counted from 0)", "Convert it first"]),
        (None, ["there is no text file {path}", "--data-dir"]),
    ],
)
def test_a_fault_of_a_text_is_one_line(tmp_path, capsys, content, said):
    path = tmp_path / "verse.txt"
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "run"
    told = failure(capsys, "train", "--data", f"text:{path}", "--arch", "gpt", "--quiet", "--out", str(out))
    for part in said:
        assert part.format(path=path) in told
    assert not out.exists()


@pytest.fixture
def pictures(tmp_path):
    """Image files of two classes."""
    for split in ("train", "val"):
        for label in ("ant", "bee"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for row in range(3):
                PIL.Image.fromarray(colour(1, row, 12)[0]).save(tmp_path / "data" / split / label / f"{row}.jpg")
    return tmp_path / "data"


def reading(folder) -> list[str]:
    run = ["train", "--data", "imagenet", "--data-dir", str(folder), "--arch", "cnn", "--width", "2", "--workers", "0"]
    return [*run, "--steps", "5", "--eval-every", "4", "--batch-size", "1", "--quiet"]


def test_a_broken_picture_ends_a_run_that_goes_on_once_it_is_repaired(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "_draw", lambda *_: None)
    assert main([*reading(pictures), "--out", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    # whichever comes second is met in the second step
    order = sorted((pictures / "train").rglob("*.jpg"))
    kept = {path: path.read_bytes() for path in order}
    for path in order:
        cut(path, 200)
        told = main([*reading(pictures), "--out", str(tmp_path / "run"), "--overwrite"])
        said = capsys.readouterr().err
        path.write_bytes(kept[path])
        if told == 2 and load(tmp_path / "run" / "checkpoint.safetensors").metadata["step"] not in ("0", "4"):
            break
    else:
        pytest.fail("no picture was met between two evaluations")
    assert f"{path} cannot be read as an image" in said
    assert "Repair it, or delete it from the folder" in said
    assert len(said.splitlines()) == 1
    assert main(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert list(differences(tmp_path / "whole", tmp_path / "run")) == []


def test_a_broken_picture_that_is_held_out_is_met_before_the_first_step(pictures, tmp_path, capsys):
    path = pictures / "val" / "bee" / "1.jpg"
    path.write_bytes(b"no picture")
    told = failure(capsys, *reading(pictures), "--out", str(tmp_path / "run"))
    assert f"{path} cannot be read as an image" in told


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: shutil.rmtree(folder / "val"), "holds the folders train and val"),
        (lambda folder: shutil.rmtree(folder / "val" / "bee"), "only one of them has 'bee'"),
        (
            lambda folder: [path.unlink() for path in (folder / "train" / "ant").iterdir()],
            "Fill it, or remove the class",
        ),
    ],
)
def test_a_fault_of_a_folder_is_one_line(pictures, tmp_path, capsys, damage, said):
    damage(pictures)
    assert said in failure(capsys, *reading(pictures), "--out", str(tmp_path / "run"))
