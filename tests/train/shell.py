"""The command, as the tests run it."""

from modula_agd.command_line import main


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
