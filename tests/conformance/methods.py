"""Every method that the suite runs: a new method enters by one line of METHODS, with its equations in references.py."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_sop import MajorityKernels
from lightning_sop.reparam import Method
from tests.conformance.references import ConvexMix, Reference


@dataclass(frozen=True)
class Case:
    """A method with its options, and the equations that it has to follow, written down independently."""

    name: str
    method: Method
    reference: Reference

    def __str__(self) -> str:
        return self.name


METHODS = [
    Case("majority", MajorityKernels(3), ConvexMix(3)),
    Case("majority_dirichlet_out_channel", MajorityKernels(3, "dirichlet", granularity="out_channel"), ConvexMix(3)),
    Case("majority_one_hot_step", MajorityKernels(3, "one_hot", granularity="step", init="spread"), ConvexMix(3)),
    Case("majority_softmax_unscaled", MajorityKernels(3, "softmax_normal", gradient_scale=1.0), ConvexMix(3, scale=1)),
]
