"""The command ``modula-agd``: its subcommands, and how every mistake of a user ends: one line, and exit status 2."""

import argparse
import importlib
import io
import sys
from collections.abc import Sequence
from typing import NoReturn

from modula_agd import __version__
from modula_agd.error import ModulaError

MISTAKE, INTERRUPTED = 2, 130

COMMANDS = {
    "train": ("modula_agd.train.command_line", "train a network on a data set"),
    "sample": ("modula_agd.train.sample_command", "write text with a network that was trained on text"),
    "verify": ("modula_agd.verify.command_line", "try to break the declared bounds of a module, loss or norm"),
}
"""Where each lives, which is imported only when asked for (extras may be missing), and what it does."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints look like every other error of the command."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}. See {self.prog} --help.", file=sys.stderr)
        sys.exit(MISTAKE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: what follows the command's name; those of this process by default.

    Returns:
        Exit status: 0 done, 1 a verified claim is broken, 2 a user's mistake (explained on stderr), 130 interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a table has η in it, and a text what its author liked: not every terminal or pipe can say it
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = Parser(prog="modula-agd", description="Train neural networks without a learning rate.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"modula-agd {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    try:
        for name, (module, about) in COMMANDS.items():
            command = commands.add_parser(name, help=about, allow_abbrev=False)
            if arguments[:1] == [name]:
                importlib.import_module(module).configure(command)
        options = parser.parse_args(arguments)
        return options.run(options)
    # OSError: a folder that cannot be written, a full disk; ImportError: a missing extra. Their texts name what is missing.
    except (ModulaError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
