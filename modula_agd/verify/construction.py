"""A construction: a subject of verification together with draws that attain its bounds.

``WITNESS`` attains almost every rule at once: constant inputs, weights of rank one aligned with them, every change along
what it changes. Where a rule is attained elsewhere, the construction says where; where it is not tight, it says why.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from modula_agd.loss import Loss
from modula_agd.verify.descent_laws import Objective
from modula_agd.verify.draw import LossDraw, ModuleDraw, NormDraw
from modula_agd.verify.norm_laws import Shaped

WITNESS = ModuleDraw(weights="ones", steps="along", inputs="constant", input_steps="along", t=0.3, input_step=0.2)
SMALL = replace(WITNESS, t=1e-4)


@dataclass(frozen=True)
class Construction:
    """A subject, and where its laws are attained.

    Args:
        subject: a module, shaped norm, loss or objective.
        witnesses: draws by law name, where the default ones do not attain the law.
        loose: laws that no draw attains, with the reason.
        side: the one size of image that the subject takes, if it takes only one.
    """

    subject: Any
    witnesses: dict[str, Any] = field(default_factory=dict)
    loose: dict[str, str] = field(default_factory=dict)
    side: int | None = None

    def witness(self, law: str) -> Any | None:
        """A draw that attains the law; None where it is loose, or, for an objective, where none is listed."""
        if law in self.loose:
            return None
        default: Any = WITNESS
        if isinstance(self.subject, Objective):
            default = None
        elif isinstance(self.subject, Shaped):
            default = NormDraw(kind="ones", other="ones")
        elif isinstance(self.subject, Loss):
            default = LossDraw()
        elif law in ("ceiling depth", "depth"):
            default = SMALL
        return self.witnesses.get(law, default)


STATIC = {"ceiling depth": "no weight, no growth", "depth": "no weight, no growth"}
EXACT = {"second order": "linear in all that moves: 0 ≤ 0"}
MEAN = {"ceiling depth": "a sum's ceiling takes the largest depth where γ has their mean"}
SPIKES = replace(WITNESS, inputs="spike", weights="identity")
"""Inputs of one feature, which identity matrices hand on: where a product or a split into heads is attained."""
