"""``modula-agd`` with ``precision="full"``, in which nothing that is kept is rounded to bfloat16."""

import sys
from functools import partial

from modula_agd import METHODS, agd
from modula_agd.command_line import main

if __name__ == "__main__":
    METHODS["held-out"] = partial(agd, precision="full")
    sys.exit(main())
