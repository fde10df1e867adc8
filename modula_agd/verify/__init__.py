"""Verification: every declared bound as a law that Hypothesis tries to break, on your own layers too.

>>> from modula_agd import ReLU
>>> from modula_agd.verify import check
>>> check(ReLU(), cases=20).ok
True
"""

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError(
        "modula_agd.verify needs Hypothesis, which is not installed: pip install 'modula_agd[verify]'"
    ) from error

from modula_agd.verify.check import Finding as Finding
from modula_agd.verify.check import Report as Report
from modula_agd.verify.check import check as check
from modula_agd.verify.check import laws_for as laws_for
from modula_agd.verify.check import run as run
from modula_agd.verify.descent_laws import DESCENT_LAWS as DESCENT_LAWS
from modula_agd.verify.descent_laws import BoundedGradient as BoundedGradient
from modula_agd.verify.descent_laws import BoundedObjective as BoundedObjective
from modula_agd.verify.descent_laws import CertifiedDescent as CertifiedDescent
from modula_agd.verify.descent_laws import CertifiedMajorisation as CertifiedMajorisation
from modula_agd.verify.descent_laws import ClosedFormMajorisation as ClosedFormMajorisation
from modula_agd.verify.descent_laws import ExactBeatsClosedForm as ExactBeatsClosedForm
from modula_agd.verify.descent_laws import ExactMajorisation as ExactMajorisation
from modula_agd.verify.descent_laws import FunctionalExpansion as FunctionalExpansion
from modula_agd.verify.descent_laws import Objective as Objective
from modula_agd.verify.draw import LossDraw as LossDraw
from modula_agd.verify.draw import ModuleDraw as ModuleDraw
from modula_agd.verify.draw import NormDraw as NormDraw
from modula_agd.verify.law import Device as Device
from modula_agd.verify.law import Law as Law
from modula_agd.verify.law import Measurement as Measurement
from modula_agd.verify.loss_laws import LOSS_LAWS as LOSS_LAWS
from modula_agd.verify.loss_laws import BregmanBound as BregmanBound
from modula_agd.verify.loss_laws import ConvexBound as ConvexBound
from modula_agd.verify.loss_laws import ConvexLoss as ConvexLoss
from modula_agd.verify.loss_laws import QuadraticBound as QuadraticBound
from modula_agd.verify.loss_laws import ResidualDual as ResidualDual
from modula_agd.verify.module_laws import MODULE_LAWS as MODULE_LAWS
from modula_agd.verify.module_laws import CeilingDepth as CeilingDepth
from modula_agd.verify.module_laws import DepthIsSlope as DepthIsSlope
from modula_agd.verify.module_laws import Growth as Growth
from modula_agd.verify.module_laws import Magnitude as Magnitude
from modula_agd.verify.module_laws import SecondOrder as SecondOrder
from modula_agd.verify.norm_laws import NORM_LAWS as NORM_LAWS
from modula_agd.verify.norm_laws import CertifiedSize as CertifiedSize
from modula_agd.verify.norm_laws import DualPairing as DualPairing
from modula_agd.verify.norm_laws import EuclideanAbove as EuclideanAbove
from modula_agd.verify.norm_laws import Hoelder as Hoelder
from modula_agd.verify.norm_laws import PairingWithinDual as PairingWithinDual
from modula_agd.verify.norm_laws import Shaped as Shaped
from modula_agd.verify.norm_laws import Triangle as Triangle
from modula_agd.verify.norm_laws import UnitDirection as UnitDirection
from modula_agd.verify.tolerance import rounding as rounding
