"""Training forms of weights: the interface, the methods, the selection, and the engine that trains through them."""

from lightning_sop.reparam.base import Method, Site
from lightning_sop.reparam.engine import Engine
from lightning_sop.reparam.form import TrainingForm
from lightning_sop.reparam.functional import collapse_, collapsed_from_state, expand_, forms_in, strip_
from lightning_sop.reparam.majority import MajorityKernels
from lightning_sop.reparam.methods import METHODS
from lightning_sop.reparam.select import DEFAULT_LAYERS, Plan, PlanRow, Rule, make_plan
from lightning_sop.reparam.tied import TiedForm

__all__ = [
    "DEFAULT_LAYERS",
    "METHODS",
    "Engine",
    "MajorityKernels",
    "Method",
    "Plan",
    "PlanRow",
    "Rule",
    "Site",
    "TiedForm",
    "TrainingForm",
    "collapse_",
    "collapsed_from_state",
    "expand_",
    "forms_in",
    "make_plan",
    "strip_",
]
