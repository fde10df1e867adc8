"""``modula-agd`` under torchrun, whose second rank is killed once, in the middle of a step."""

import os
import signal
import sys
from typing import Any

from modula_agd.command_line import main
from modula_agd.train.trainer import Trainer

STEP = 13
step = Trainer.step


def killed_once(self: Trainer, point: Any, *rest: Any, **options: Any) -> Any:
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and point.step == STEP:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, point, *rest, **options)


if __name__ == "__main__":
    Trainer.step = killed_once
    sys.exit(main())
