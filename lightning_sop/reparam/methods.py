"""Every method by the name under which checkpoints know it; a new method adds its file and a line here."""

from lightning_sop.reparam.base import Method
from lightning_sop.reparam.majority import MajorityKernels

METHODS: dict[str, type[Method]] = {method.__name__: method for method in (MajorityKernels,)}
