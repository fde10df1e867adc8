"""``python -m modula_agd``: the command ``modula-agd``."""

import sys

from modula_agd.command_line import main

if __name__ == "__main__":
    sys.exit(main())
