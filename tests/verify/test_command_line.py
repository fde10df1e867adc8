"""`modula-agd verify`: what it prints, and that its exit status tells."""

import sys
from pathlib import Path

import pytest

from modula_agd.command_line import main

WRONG = Path(__file__).resolve().parents[1] / "wrong_layers.py"


def test_what_holds_exits_with_0_and_prints_the_table(capsys) -> None:
    assert main(["verify", "modula_agd:ReLU", "--cases", "5", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("law")
    assert "growth" in said
    assert "0 broken" in said


def test_what_breaks_exits_with_1_and_prints_code_that_reproduces_it(capsys) -> None:
    assert main(["verify", f"{WRONG}:OverconfidentReLU", "--cases", "20"]) == 1
    output = capsys.readouterr()
    assert "BROKEN" in output.out
    assert "Growth()(subject, ModuleDraw(" in output.out
    assert "case" in output.err  # the progress bar


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "write package.module:name"),
        ([f"{WRONG}:Missing"], "could not load"),
        (["missing_file.py:Layer"], "no such file"),
        ([f"{WRONG}:RowwiseLinear"], "Name an instance"),
        (["modula_agd:agd"], "agd"),
        (["modula_agd:__version__"], "neither a module"),
        (["modula_agd:ReLU", "--cases", "0"], "at least 1"),
        (["modula_agd:ReLU", "--side", "0"], "at least 1"),
        (["modula_agd:ReLU", "--device", "nowhere"], "cannot be used"),
    ],
)
def test_a_mistake_exits_with_2_and_one_line(arguments: list[str], said: str, capsys) -> None:
    assert main(["verify", *arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert len(error.splitlines()) == 1


def test_an_unknown_flag_exits_with_2(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "--lr", "1"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_file_that_fails_to_load_is_a_mistake_and_neighbours_are_found(tmp_path, capsys) -> None:
    (tmp_path / "fails.py").write_text("1 / 0")
    (tmp_path / "neighbour.py").write_text("from modula_agd import ReLU")
    (tmp_path / "torch.py").write_text("from neighbour import ReLU\nlayer = ReLU()")
    assert main(["verify", f"{tmp_path}/fails.py:x"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert main(["verify", f"{tmp_path}/torch.py:layer", "--cases", "2", "--quiet"]) == 0


def test_a_module_of_the_current_folder_is_found(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "layers_of_mine.py").write_text("from modula_agd import ReLU\nlayer = ReLU()")
    monkeypatch.chdir(tmp_path)
    # what the script that pip installs has
    monkeypatch.setattr("sys.path", [place for place in sys.path if place not in ("", str(tmp_path))])
    assert main(["verify", "layers_of_mine:layer", "--cases", "2", "--quiet"]) == 0
